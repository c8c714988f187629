"""Rare-class sampling, against a slow statement of it."""

import math
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from checks import examples, refusal
from crossmix.datasets import RareClassSampler, Sample, class_counts
from crossmix.engine import KeyedCrops, keyed_generator, resident
from crossmix.engine.sampling import _with_enough
from oracles import seeded


def probabilities_by_loop(counts: list[list[int]], temperature: float, min_pixels: int) -> list[float]:
    """P(c) of the paper, of the classes that can be drawn."""
    total = sum(map(sum, counts))
    shares = [sum(row[c] for row in counts) / total for c in range(len(counts[0]))]
    drawn = [any(row[c] >= min_pixels for row in counts) for c in range(len(counts[0]))]
    odds = [math.exp((1 - f) / temperature) if d else 0.0 for f, d in zip(shares, drawn, strict=True)]
    return [value / sum(odds) for value in odds]


COUNTS = [
    [90_000, 0, 5000, 0, 2999],
    [80_000, 4000, 0, 0, 0],
    [95_000, 3000, 3000, 0, 0],
    [99_000, 0, 0, 0, 10],
    [2000, 0, 0, 0, 0],
]


@given(
    st.lists(st.lists(st.integers(0, 9000), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.1, 1.0, 7.0]),
    st.integers(1, 4000),
)
@settings(max_examples=examples(100), deadline=None)
def test_probabilities__equal_the_loop(counts: list[list[int]], temperature: float, min_pixels: int) -> None:
    make = partial(RareClassSampler, torch.tensor(counts), temperature=temperature, min_pixels=min_pixels)
    if max(map(max, counts)) < min_pixels:
        refusal(make, "`min_pixels` must be reached by some class", ValueError)
        return
    got = make().probabilities
    assert got.tolist() == pytest.approx(probabilities_by_loop(counts, temperature, min_pixels), rel=1e-9, abs=1e-300)


def test_draws__are_distributed_as_the_slow_ones() -> None:
    """Chi-square over 10,000 draws: each pair of class and image as often as it should be."""
    sampler = RareClassSampler(torch.tensor(COUNTS), temperature=0.5, num_samples=10_000)
    want: Counter[int] = Counter()
    for c, p in enumerate(probabilities_by_loop(COUNTS, 0.5, 3000)):
        having = [i for i, row in enumerate(COUNTS) if row[c] >= 3000]
        for i in having:
            want[i] += p / len(having)  # type: ignore[assignment]
    got = Counter(sampler)
    assert set(got) == set(want) == {0, 1, 2, 3}
    statistic = sum((got[i] - 10_000 * p) ** 2 / (10_000 * p) for i, p in want.items())
    assert statistic < 16.3  # 3 degrees of freedom, 1 in 1000


def test_pick__every_number_has_its_place() -> None:
    """The scores are cut as the cumulated probabilities say, to the last number below 1."""
    sampler = RareClassSampler(torch.tensor(COUNTS), temperature=0.5)
    scores = torch.rand(500, 2, dtype=torch.float64, generator=seeded(1))
    scores[0], scores[1] = 0.0, 1 - 2**-53
    images, classes = sampler.pick(scores)
    for (u, v), image, c in zip(scores.tolist(), images.tolist(), classes.tolist(), strict=True):
        below = sum(sampler.probabilities[:c].tolist())
        assert below - 1e-12 <= u <= below + float(sampler.probabilities[c]) + 1e-12
        having = [i for i, row in enumerate(COUNTS) if row[c] >= 3000]
        assert image == having[int(v * len(having))]
    assert classes[1] == 2  # the last class that is ever drawn, though more columns follow
    first = RareClassSampler([[0, 0, 3000], [5, 4000, 0]]).pick(torch.zeros(2))
    assert int(first[1]) == 1  # nor is one before the first
    one = sampler.pick(scores[7])
    assert (int(one[0]), int(one[1])) == (int(images[7]), int(classes[7]))
    refusal(lambda: sampler.pick(scores[:, 0]), r"`scores` must have shape \(\.\.\., 2\)", ValueError)


@pytest.mark.parametrize("temperature", [5e-324, 1e-5, 1e300, math.inf])
def test_probabilities__of_any_temperature_are_finite(temperature: float) -> None:
    sampler = RareClassSampler(torch.tensor(COUNTS), temperature=temperature)
    assert float(sampler.probabilities.sum()) == pytest.approx(1)
    want = [0, 1, 0, 0, 0] if temperature < 1 else [1 / 3, 1 / 3, 1 / 3, 0, 0]
    assert sampler.probabilities.tolist() == pytest.approx(want)
    assert set(sampler) <= {0, 1, 2, 3}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [None, 12, 17])
def test_ranks__share_the_draws_of_one_process_and_resume(world_size: int, num_samples: int | None) -> None:
    options = {"temperature": 0.5, "num_samples": num_samples, "seed": 3}
    alone = RareClassSampler(torch.tensor(COUNTS), **options)
    alone.set_epoch(5)
    whole = list(alone)
    assert len(whole) == (num_samples or 5)
    for rank in range(world_size):
        part = RareClassSampler(torch.tensor(COUNTS), **options, rank=rank, world_size=world_size)
        for start in (0, 2, 4, 100):
            part.set_epoch(5, start=start)
            assert list(part) == whole[rank::world_size][start:]
            assert len(part) == len(whole[rank::world_size][start:])


def test_draws__depend_on_seed_epoch_and_number_alone() -> None:
    counts = torch.tensor(COUNTS)
    state = torch.get_rng_state()
    long, short = (RareClassSampler(counts, temperature=0.5, num_samples=n) for n in (60, 20))
    first = list(long)
    assert list(short) == first[:20] == list(islice(long, 20))
    assert list(pickle.loads(pickle.dumps(short))) == first[:20]
    long.set_epoch(1)
    second = list(long)
    assert second != first
    assert list(RareClassSampler(counts, temperature=0.5, num_samples=60, seed=1)) not in (first, second)
    long.set_epoch(0)
    assert list(long) == first
    assert torch.equal(torch.get_rng_state(), state)
    loader = DataLoader(torch.arange(5), batch_size=3, sampler=short)
    assert torch.cat(list(loader)).tolist() == first[:20]
    assert len(loader) == 7


def test_counts__of_any_kind_and_with_ignored_pixels() -> None:
    want = RareClassSampler(torch.tensor(COUNTS), temperature=0.5)
    whole = torch.zeros(5, 256, dtype=torch.int64)
    whole[:, :5] = torch.tensor(COUNTS)
    whole[:, 255] = 10**6  # ignored: of no class, and in no share
    kinds: list[Any] = [COUNTS, np.array(COUNTS), np.array(COUNTS, dtype=np.float64), torch.tensor(COUNTS).int(), whole]
    for counts in kinds:
        given = counts.clone() if isinstance(counts, Tensor) else counts
        sampler = RareClassSampler(given, temperature=0.5)
        assert len(sampler.probabilities) == len(counts[0])
        assert torch.equal(sampler.probabilities[:5], want.probabilities)
        assert not sampler.probabilities[5:].any()
        assert list(sampler) == list(want)
    assert torch.equal(whole[:, 255], torch.full((5,), 10**6))  # and left as they are
    dropped = torch.tensor(COUNTS)
    dropped[:, 1] = 0
    assert RareClassSampler(dropped).probabilities[1] == 0
    whole[:, 11] = 4000
    assert RareClassSampler(whole, temperature=0.5).probabilities[11] > 0
    other = RareClassSampler(whole, temperature=0.5, ignore_index=11)
    assert torch.equal(other.probabilities[:5], want.probabilities)
    assert not other.probabilities[5:].any()
    assert list(RareClassSampler(COUNTS, temperature=0.5, ignore_index=-100)) == list(want)


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: RareClassSampler(None), TypeError, "`counts` must hold numbers, .* got NoneType"),
    (lambda: RareClassSampler(torch.tensor(COUNTS) > 3), TypeError, "got torch.bool; pass `class_counts"),
    (lambda: RareClassSampler([["a"]]), TypeError, "`counts` must hold numbers"),
    (lambda: RareClassSampler([[1, 2], [3]]), TypeError, "`counts` must hold numbers"),
    (lambda: RareClassSampler(torch.tensor(COUNTS)[0]), ValueError, r"shape \(images, C\), .* got \(5,\)"),
    (lambda: RareClassSampler(torch.zeros(0, 19)), ValueError, r"got \(0, 19\)"),
    (lambda: RareClassSampler(torch.zeros(4, 0)), ValueError, r"got \(4, 0\)"),
    (lambda: RareClassSampler([[4000.0, math.nan]]), ValueError, "finite and not negative"),
    (lambda: RareClassSampler([[4000.0, math.inf]]), ValueError, "finite and not negative"),
    (lambda: RareClassSampler([[4000, -1]]), ValueError, "finite and not negative"),
    (lambda: RareClassSampler([[2999, 10]]), ValueError, "got 3000, but the most is 2999; scale it"),
    (lambda: RareClassSampler([[0, 0]], min_pixels=1), ValueError, "but the most is 0"),
    (lambda: RareClassSampler(COUNTS, min_pixels=0), ValueError, "`min_pixels` must be at least 1, got 0"),
    (lambda: RareClassSampler(COUNTS, min_pixels=0.5), TypeError, "`min_pixels` must be an int"),
    (lambda: RareClassSampler(COUNTS, temperature=0), ValueError, "`temperature` must be positive, got 0"),
    (lambda: RareClassSampler(COUNTS, temperature=math.nan), ValueError, "`temperature` must be positive, got nan"),
    (lambda: RareClassSampler(COUNTS, temperature="0.1"), TypeError, "`temperature` must be a float, got str"),
    (lambda: RareClassSampler(COUNTS, num_samples=0), ValueError, "`num_samples` must be at least 1"),
    (lambda: RareClassSampler(COUNTS, ignore_index=0.5), TypeError, "`ignore_index` must be an int"),
    (lambda: RareClassSampler(COUNTS, seed=-1), ValueError, "`seed` must not be negative"),
    (lambda: RareClassSampler(COUNTS, world_size=0), ValueError, "`world_size` must be at least 1"),
    (lambda: RareClassSampler(COUNTS, rank=2, world_size=2), ValueError, r"`rank` must lie in 0\.\.1, got 2"),
    (lambda: RareClassSampler(COUNTS, rank=-1), ValueError, "`rank` must not be negative"),
    (lambda: RareClassSampler(COUNTS).set_epoch(-1), ValueError, "`epoch` must not be negative"),
    (lambda: RareClassSampler(COUNTS).set_epoch(0, start=-1), ValueError, "`start` must not be negative"),
    (lambda: RareClassSampler(COUNTS).set_epoch(0.5), TypeError, "`epoch` must be an int"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=range(len(BAD)))
def test_sampler__refuses(make: Callable[[], object], error: type[Exception], message: str) -> None:
    refusal(make, message, error)


def scene(i: int, *, patch: int = 0) -> Sample:
    """Road, with a patch of class 1 in one corner of some, whose image says where each pixel is."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    label = torch.zeros(40, 60, dtype=torch.uint8)
    label[40 - patch :, 60 - patch :] = 1
    return Sample(torch.stack([torch.full_like(rows, i), rows, columns]).to(torch.uint8), label, f"s{i}")


SCENES = [scene(0), scene(1, patch=6), scene(2), scene(3), scene(4, patch=8), scene(5)]


def rare(samples: list[Sample] = SCENES, **options: Any) -> RareClassSampler:
    return RareClassSampler(class_counts(samples), **{"temperature": 0.01, "min_pixels": 30, **options})


def test_crops__have_enough_of_the_class_or_are_the_last_try() -> None:
    """Against the tries themselves: those that a data set with one image, and no crop to choose, would take."""
    size, sampler = (10, 12), rare()
    crops = KeyedCrops(SCENES, size, seed=4, stream=1, rare=sampler)
    tries: list[int] = []
    for draw in range(150):
        image, label = crops[draw]
        index, wanted = next(crops._candidates(draw))
        assert crops.index(draw) == index == int(image[0, 0, 0])
        assert wanted == 1  # by far the rarer class
        assert index in {1, 4}
        generator = keyed_generator(4, 1, 1, draw)
        places = [tuple(int(torch.randint(n, (), generator=generator)) for n in (31, 49)) for _ in range(11)]
        cuts = [SCENES[index].label[top : top + 10, left : left + 12] for top, left in places]
        attempt = next((k for k, cut in enumerate(cuts) if int((cut == 1).sum()) >= 15), 10)
        tries.append(attempt)
        assert (int(image[1, 0, 0]), int(image[2, 0, 0])) == places[attempt]
        assert torch.equal(label, cuts[attempt])
    assert min(tries) == 0
    assert max(tries) == 10
    plain = KeyedCrops(SCENES, size, seed=4, stream=1)
    seen, before = (sum(bool((c[k][1] == 1).any()) for k in range(150)) for c in (crops, plain))
    assert seen > 4 * before


def test_crops__the_draws_are_those_of_the_probabilities() -> None:
    sampler = rare(temperature=0.5)
    crops = KeyedCrops(SCENES, (8, 8), seed=0, stream=0, rare=sampler)
    got = Counter(next(crops._candidates(draw)) for draw in range(4000))
    want = {
        (i, c): 4000 * float(sampler.probabilities[c]) / len(having)
        for c, having in ((0, range(6)), (1, (1, 4)))
        for i in having
    }
    assert set(got) == set(want)
    assert sum((got[key] - n) ** 2 / n for key, n in want.items()) < 24.3  # 7 degrees of freedom, 1 in 1000


def test_crops__order_workers_and_the_samplers_own_numbers_change_nothing() -> None:
    crops = KeyedCrops(SCENES, (8, 8), seed=0, stream=0, rare=rare())
    want = [crops[draw] for draw in range(24)]
    other = KeyedCrops(SCENES, (8, 8), seed=0, stream=0, rare=rare(seed=9, num_samples=2, rank=1, world_size=3))
    again = [other[draw] for draw in reversed(range(24))][::-1]
    workers = list(DataLoader(crops, batch_size=None, sampler=range(24), num_workers=2))
    kept = KeyedCrops(resident(SCENES, "cpu"), (8, 8), seed=0, stream=0, rare=rare())
    for draw, (image, label) in enumerate(want):
        for found in (again[draw], workers[draw], kept[draw]):
            assert torch.equal(image, found[0])
            assert torch.equal(label, found[1])
    reseeded = KeyedCrops(SCENES, (8, 8), seed=1, stream=0, rare=rare())
    assert [reseeded.index(k) for k in range(24)] != [crops.index(k) for k in range(24)]


def test_crops__without_a_look_at_the_device_are_the_same() -> None:
    """On a GPU all tries are cut and one is taken there; no look has to wait."""
    image, label, _ = SCENES[4]
    for seed in range(40):
        places = torch.randint(0, 31, (11, 2), generator=seeded(seed)).tolist()
        boxes = [(slice(top, top + 10), slice(left, left + 12)) for top, left in places]
        for enough in (1, 15, 1000):
            want = _with_enough(image, label, boxes, 1, enough)
            got = _with_enough(image, OnAnotherDevice(label), boxes, 1, enough)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


class OnAnotherDevice(Tensor):
    """A label map that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


@pytest.mark.parametrize(
    ("size", "min_pixels", "enough"),
    [((512, 512), 3000, 1500), ((1024, 1024), 3000, 6000), ((512, 1024), 3000, 3000), ((256, 256), 3000, 1500),
     ((8, 8), 30, 15), ((4, 6), 3000, 12)],
)  # fmt: skip
def test_crops__how_much_is_enough(size: tuple[int, int], min_pixels: int, enough: float) -> None:
    sampler = RareClassSampler([[min_pixels, 0]], min_pixels=min_pixels)
    assert KeyedCrops(SCENES[:1], size, seed=0, stream=0, rare=sampler)._enough == enough


def test_crops__padded_ones_are_looked_at_too() -> None:
    crops = KeyedCrops(SCENES, (44, 30), seed=0, stream=0, pad=True, rare=rare())
    for draw in range(20):
        image, label = crops[draw]
        assert image.shape == (3, 44, 30)
        assert label[40:].unique().tolist() == [255]
    assert sum(bool((crops[draw][1] == 1).any()) for draw in range(20)) >= 12


def test_crops__a_broken_sample_gives_way_to_one_of_an_ordinary_pass() -> None:
    class Broken(list[Sample]):
        def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
            if index in {1, 4}:
                raise ValueError(f"file{index}.png: is cut off.")
            return super().__getitem__(index)

    crops = KeyedCrops(Broken(SCENES), (8, 8), seed=0, stream=0, skip=2, rare=rare())
    want = KeyedCrops(SCENES, (8, 8), seed=0, stream=0)
    for draw in range(30):
        later = next(k for k in range(draw, 10**6, 6) if want.index(k) not in {1, 4})
        assert int(crops[draw][0][0, 0, 0]) == want.index(later)
    assert set(crops.skipped) == {1, 4}
    one = KeyedCrops(Broken(SCENES), (8, 8), seed=0, stream=0, skip=1, rare=rare())
    refusal(lambda: [one[draw] for draw in range(30)], "one more than the 1 broken samples", ValueError)


def test_crops__refuse_what_does_not_belong_to_the_samples() -> None:
    def crops(samples: list[Sample], sampler: Any) -> KeyedCrops:
        return KeyedCrops(samples, (8, 8), seed=0, stream=0, rare=sampler)

    fewer = "counts of 6 images, but there are 5 samples; count these"
    refusal(lambda: crops(SCENES[:5], rare()), fewer, ValueError)
    wrong = "`rare` must be a RareClassSampler, got Tensor; build one"
    refusal(lambda: crops(SCENES, class_counts(SCENES)), wrong, TypeError)
    unlabelled = [one._replace(label=None) for one in SCENES]
    refusal(lambda: crops(unlabelled, rare())[0], r"s[14]: has no label to look for rare classes in")
