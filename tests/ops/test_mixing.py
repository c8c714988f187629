"""Class masks and mixing."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checks import Watch, assert_same, check_module, examples
from crossmix import BoxMasks, ClassMix, CowMasks, CrossDomainMix, _class_codes
from crossmix import functional as F
from oracles import chi_square, classes_by_loop, mask_by_loop, seeded

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EXACT = {"rtol": 0, "atol": 0}


@st.composite
def label_maps(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Label maps of any size and dtype, with ids out of range, negative ones and ignored pixels; C; ignore_index."""
    num_classes = draw(st.sampled_from([1, 2, 3, 7, 19, 30, 31, 32, 33, 63, 150, 200, 300]))
    n, height, width = draw(st.integers(0, 3)), draw(st.integers(0, 6)), draw(st.integers(0, 7))
    dtype = draw(st.sampled_from(DTYPES))
    ignore_index = draw(st.sampled_from([255, 0, num_classes - 1, -1]))
    low = 0 if dtype == torch.uint8 else -3
    high = min(num_classes + 4, 255) if draw(st.booleans()) else min(3, num_classes + 1)
    labels = torch.randint(low, high, (n, height, width), generator=seeded(draw(st.integers(0, 2**31))))
    if labels.numel() and draw(st.booleans()):
        labels[..., 0] = 2**40 + 1 if dtype == torch.int64 and draw(st.booleans()) else 255
    return labels.to(dtype), num_classes, ignore_index


@pytest.fixture(params=[1 << 18, 5], ids=["in one part", "in parts of five pixels"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_class_codes, "PART", request.param)


@pytest.mark.usefixtures("part")
@given(label_maps(), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sample_classes_and_class_mask__equal_the_loops(
    maps: tuple[torch.Tensor, int, int], ratio: float, ignored: bool, seed: int
) -> None:
    labels, num_classes, ignore_index = maps
    scores = torch.rand(len(labels), num_classes + 1, generator=seeded(seed))
    if seed % 3 == 0:
        scores = (scores * 3).floor()  # many ties
    got = F.sample_classes(
        labels, num_classes, ratio=ratio, ignore_index=ignore_index, include_ignored=ignored, scores=scores
    )
    assert torch.equal(got, classes_by_loop(labels, num_classes, scores, ratio, ignore_index, ignored))
    codes = _class_codes.class_codes(labels, num_classes, ignore_index)
    for classes in (got, torch.rand(len(labels), num_classes + 1, generator=seeded(seed + 1)) < 0.5):
        want = mask_by_loop(labels, classes, ignore_index)
        assert torch.equal(F.class_mask(labels, classes, ignore_index=ignore_index), want)
        assert torch.equal(codes.mask(classes), want)  # also a second time


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_ids__every_one_is_its_class_or_ignored(dtype: torch.dtype, ignore_index: int) -> None:
    ids = torch.arange(0 if dtype == torch.uint8 else -300, 256 if dtype == torch.uint8 else 300)
    labels = ids.to(dtype)[:, None, None]  # one image per id
    for num_classes in (1, 19, 30, 31, 32, 33, 64):
        known = (ids >= 0) & (ids < num_classes) & (ids != ignore_index)
        want = torch.zeros(len(ids), num_classes + 1, dtype=torch.bool)
        want[torch.arange(len(ids)), torch.where(known, ids, num_classes)] = True
        got = F.sample_classes(labels, num_classes, include_ignored=True, ratio=1.0, ignore_index=ignore_index)
        assert torch.equal(got, want)
        assert F.class_mask(labels, want, ignore_index=ignore_index).all()
        assert not F.class_mask(labels, ~want, ignore_index=ignore_index).any()


RATIOS = [0.0, 0.5, 1.0, 5e-324, 2**-53, 1 - 2**-53, *(a / b for b in (3, 7, 10, 20, 100) for a in range(1, b))]


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_sample_classes__counts_what_python_counts_for_every_ratio(ulps: int) -> None:
    """0.55 * 20 is 11 in double precision, and 0.55 * 100 a little more than 55."""
    n = 105
    labels = torch.arange(n).expand(n, n).tril()[:, None]  # i + 1 classes in image i
    scores = torch.rand(n, n + 1, generator=seeded(0))
    for exact in RATIOS:
        ratio = exact if ulps == 0 else min(max(math.nextafter(exact, ulps * math.inf), 0.0), 1.0)
        got = F.sample_classes(labels, n, ratio=ratio, scores=scores)
        assert got.sum(1).tolist() == [math.ceil(ratio * k) for k in range(1, n + 1)], ratio
        down = F.sample_classes(labels, n, ratio=ratio, scores=scores, rounding="floor")
        assert down.sum(1).tolist() == [math.floor(ratio * k) for k in range(1, n + 1)], ratio
        assert not (down & ~got).any()


@pytest.mark.parametrize("num_classes", [257, 5000])
def test_sample_classes__of_many_ids_in_memory_that_grows_with_their_number(num_classes: int) -> None:
    labels = torch.randint(0, num_classes, (2, 24, 25), generator=seeded(0))
    scores = (torch.rand(2, num_classes + 1, generator=seeded(1)) * 50).floor()  # many ties
    with Watch() as seen:
        got = F.sample_classes(labels, num_classes, ratio=0.3, scores=scores, include_ignored=True)
    assert torch.equal(got, classes_by_loop(labels, num_classes, scores, 0.3, 255, ignored=True))
    assert seen.largest <= max(labels.numel(), 2 * (num_classes + 2))


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 6.0])
DRAWS = 100_000


def inclusion(weights: list[float], count: int) -> dict[tuple[int, ...], float]:
    """How likely each set is among `count` draws without replacement, over all orders."""
    sets: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), count):
        left, chance = sum(weights), 1.0
        for k in order:
            chance *= weights[k] / left
            left -= weights[k]
        key = tuple(sorted(order))
        sets[key] = sets.get(key, 0.0) + chance
    return sets


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [4, 40])
def test_sample_classes__each_set_is_as_likely_as_without_replacement(
    count: int, num_classes: int, equal: bool
) -> None:
    odds = WEIGHTS * 0 + 1 if equal else WEIGHTS
    weights = None if equal else torch.cat([odds, torch.full((num_classes - 4,), 100.0)])  # the others are in no image
    labels = torch.arange(4).expand(DRAWS, 1, 4)
    got = F.sample_classes(labels, num_classes, ratio=count / 4, class_weights=weights, generator=seeded(0))
    assert torch.equal(got.sum(1), torch.full((DRAWS,), count))
    sets = inclusion(odds.tolist(), count)
    found = torch.tensor([int(got[:, list(key)].all(1).sum()) for key in sets])
    assert chi_square(found, list(sets.values())) < 1


def test_sample_classes__the_ignored_count_only_when_asked_and_have_the_mean_weight() -> None:
    labels = torch.tensor([0, 1, 255]).expand(DRAWS, 1, 3)
    assert not F.sample_classes(labels, 2, ratio=1.0)[:, 2].any()
    assert not F.sample_classes(torch.full((2, 3, 3), 255), 19).any()  # nothing to draw, nothing drawn
    for weights in (torch.tensor(odds) * scale for odds in ([1.0, 5.0], [2.0, 2.0]) for scale in (1.0, 1e-6, 1e6)):
        got = F.sample_classes(labels, 2, ratio=0.3, include_ignored=True, class_weights=weights, generator=seeded(0))
        shares = torch.cat([weights, weights.mean()[None]]).double()  # only proportions count
        assert chi_square(got.sum(0), shares / shares.sum()) < 1


def test_sample_classes__weights_are_formula_and_equal_ones_change_nothing() -> None:
    labels = torch.randint(0, 6, (50, 3, 4), generator=seeded(0))
    scores = torch.rand(50, 7, generator=seeded(1))
    weights = torch.tensor([0.1, 1.0, 3.0, 0.2, 9.0, 1.0])
    keys = -torch.log(1 - scores.double()) / torch.cat([weights, weights.mean()[None]]).double()
    got = F.sample_classes(labels, 6, class_weights=weights, scores=scores, include_ignored=True)
    assert torch.equal(got, classes_by_loop(labels, 6, keys, 0.5, 255, ignored=True))
    equal = F.sample_classes(labels, 6, class_weights=torch.full((6,), 0.3), scores=scores)
    assert torch.equal(equal, F.sample_classes(labels, 6, scores=scores))


def test_sample_classes__whole_batch_draws_for_each_image_from_the_classes_of_all() -> None:
    """As `unique` of the batch's labels does in the code of DAFormer and MIC, with a choice per image."""
    labels = torch.tensor([[0, 0], [1, 1], [2, 3], [255, 255]]).repeat(DRAWS // 4, 1)[:, None]
    got = F.sample_classes(labels, 9, whole_batch=True, generator=seeded(0))
    assert torch.equal(got.sum(1), torch.full((DRAWS,), 2))
    assert not got[:, 4:].any()
    sets, counts = got.long().unique(dim=0, return_counts=True)
    assert len(sets) == 6
    assert chi_square(counts, [1 / 6] * 6) < 1
    wide = labels.reshape(1, 1, -1).expand(3, -1, -1)  # each of three images is the whole batch
    scores = torch.rand(DRAWS, 10, generator=seeded(1))
    narrow = F.sample_classes(labels, 9, whole_batch=True, scores=scores)
    assert torch.equal(narrow[:3], F.sample_classes(wide, 9, scores=scores[:3]))
    assert F.sample_classes(labels[:0], 9, whole_batch=True).shape == (0, 10)


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "down": {"rounding": "floor"},
    "batch": {"whole_batch": True},
    "odds": {"class_weights": torch.tensor([0.2, 1.0, 4.0, 1.0, 1.0])},
    "all": {
        "rounding": "floor", "whole_batch": True, "class_weights": torch.rand(5, generator=seeded(3)) + 0.1,
        "ratio": 0.7, "include_ignored": True, "ignore_index": 1,
    },
}  # fmt: skip
MIXERS = [ClassMix, CrossDomainMix]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", MIXERS)
def test_mixers__take_the_options_and_the_draws_of_sample_classes(kind: Any, name: str) -> None:
    labels = torch.randint(0, 6, (4, 5, 6), generator=seeded(0))
    labels[0] %= 2  # an image without most classes
    images, weights, scores = torch.rand(4, 3, 5, 6), torch.rand(4, 5, 6), torch.rand(4, 6, generator=seeded(1))
    mixer, pasted = kind(5, **OPTIONS[name]), (images, labels, weights)
    if kind is ClassMix:  # image i is pasted onto the next
        arguments, base = pasted, tuple(value.roll(-1, 0) for value in pasted)
    else:
        base = (images.flip(0), labels.flip(0), weights)
        arguments, pasted = (images, labels, *base), (images, labels, torch.ones(4, 5, 6))
    want = F.sample_classes(labels, 5, scores=scores, **OPTIONS[name])
    assert name == "none" or not torch.equal(want, F.sample_classes(labels, 5, scores=scores))
    mask = F.class_mask(labels, want, ignore_index=mixer.ignore_index)
    before = torch.get_rng_state()
    assert torch.equal(scores, mixer.sample_scores(4, generator=seeded(1)))
    assert torch.equal(want, mixer.sample(labels, generator=seeded(1)))
    assert torch.equal(want, F.sample_classes(labels, 5, generator=seeded(1), **OPTIONS[name]))
    for given_ in ({"scores": scores}, {"classes": want}, {"mask": mask}, {"generator": seeded(1)}):
        mixed = mixer(*arguments, **given_)
        assert torch.equal(mixed.mask, mask)
        assert_same(mixed[:3], tuple(F.mix(a, b, mask) for a, b in zip(pasted, base, strict=True)), **EXACT)
    assert torch.equal(torch.get_rng_state(), before)
    assert mixer.sample_scores(3, device="meta").is_meta


def test_class_weights__are_checked_once_moved_and_kept_wide() -> None:
    mixer = CrossDomainMix(3, class_weights=[1e-9, 1.0, 2.0])
    for change in (mixer.float, mixer.half, mixer.bfloat16, mixer.double, mixer.float):
        change()
        torch.testing.assert_close(mixer.class_weights.tolist(), [1e-9, 1.0, 2.0], rtol=1e-6, atol=0)
    assert mixer.class_weights.dtype == torch.float32
    assert copy.deepcopy(mixer).to("meta").class_weights.is_meta
    own = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mixer = ClassMix(3, class_weights=own)
    own.zero_()  # is not the mixer's
    assert mixer.class_weights.tolist() == [1.0, 2.0, 3.0]
    mixer.class_weights[0] = math.nan  # not looked at again
    assert mixer(torch.rand(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8)).mask.all()


class Halves(torch.nn.Module):
    """A user's own masks: the left or the right half."""

    def sample(self, n: int, _: Any, *, generator: torch.Generator | None = None, device: Any = None) -> torch.Tensor:
        return torch.rand(n, generator=generator).to(device or "cpu") < 0.5

    def forward(self, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        left = torch.arange(size[1], device=scores.device) < size[1] // 2
        return (left ^ scores[:, None])[:, None].expand(-1, *size)


@pytest.mark.parametrize("masks", [BoxMasks(), CowMasks(sigma=(2.0, 4.0)), Halves()], ids=["boxes", "blobs", "own"])
def test_masks__take_the_place_of_classes(masks: Any) -> None:
    source, target, weights = torch.rand(3, 3, 12, 17), torch.rand(3, 3, 12, 17), torch.rand(3, 12, 17)
    labels, pseudo = torch.randint(0, 5, (2, 3, 12, 17), generator=seeded(0))
    labels[0] = 255
    mixer, onto_next = CrossDomainMix(5, masks=masks), ClassMix(5, masks=masks)
    scores = mixer.sample_scores(3, (12, 17), generator=seeded(1))
    assert torch.equal(scores, onto_next.sample_scores(3, (12, 17), generator=seeded(1)))
    mask = masks(scores, (12, 17))
    assert mask.any()
    everything = (source, labels, target, pseudo, weights)
    want = (
        torch.where(mask[:, None], source, target),
        torch.where(mask, labels, pseudo),  # ignored pixels too
        torch.where(mask, torch.ones(()), weights),
        mask,
    )
    for given_ in ({"scores": scores}, {"generator": seeded(1)}, {"mask": mask}):
        assert_same(mixer(*everything, **given_), want, **EXACT)
    rows = mixer(*(value[1:] for value in everything), scores=scores[1:])  # of another rank
    assert_same(rows, tuple(value[1:] for value in want), **EXACT)
    turned = onto_next(source, labels, weights, scores=scores)
    assert torch.equal(turned.images, torch.where(mask[:, None], source, source.roll(-1, 0)))


@given(st.integers(0, 4), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**31), st.sampled_from([3, 40]))
@settings(max_examples=examples(60), deadline=None)
def test_cross_domain_mix__pixel_label_and_weight_come_from_one_side(
    n: int, height: int, width: int, seed: int, num_classes: int
) -> None:
    g = seeded(seed)
    shape = (n, height, width)
    source = torch.rand(n, 3, height, width, generator=g)  # in [0, 1)
    target = torch.rand(n, 3, height, width, generator=g) + 1  # in [1, 2)
    labels = torch.randint(0, num_classes, shape, generator=g)
    labels = torch.where(torch.rand(shape, generator=g) < 0.2, 255, labels)
    pseudo = torch.randint(0, num_classes, shape, generator=g)
    weights = torch.rand(shape, generator=g) * 0.5
    mixed = CrossDomainMix(num_classes)(source, labels, target, pseudo, weights, generator=g)
    from_source = mixed.images[:, 0] < 1
    assert torch.equal(from_source, mixed.mask)
    assert torch.equal(mixed.images, torch.where(from_source[:, None], source, target))
    assert torch.equal(mixed.labels, torch.where(from_source, labels, pseudo))
    assert torch.equal(mixed.weights, torch.where(from_source, torch.ones(()), weights))
    for i in range(n):
        present = set(labels[i].flatten().tolist()) - {255}
        pasted = set(labels[i][mixed.mask[i]].tolist())
        assert 255 not in pasted
        assert len(pasted) == math.ceil(len(present) / 2)
        assert not pasted & set(labels[i][~mixed.mask[i]].tolist())  # a class is pasted whole or not at all


def test_mix__identities_and_trailing_shapes() -> None:
    a, b = torch.rand(2, 4, 3, 5), torch.rand(2, 4, 3, 5)
    mask = torch.rand(2, 3, 5) < 0.5
    assert torch.equal(F.mix(a, b, mask), torch.where(mask[:, None], a, b))
    deep = F.mix(a[:, :, None], b[:, :, None], mask)
    assert torch.equal(deep[:, :, 0], F.mix(a, b, mask))
    assert torch.equal(F.mix(torch.tensor([1.0, 2.0]), b[:, 0], mask)[1], torch.where(mask[1], 2.0, b[1, 0]))
    assert F.mix(torch.ones(2), torch.zeros(2), mask).shape == (2, 3, 5)
    a[0, 0, 0, 0] = math.nan
    assert not F.mix(a, b, torch.zeros_like(mask)).isnan().any()  # what is not taken does not leak


def test_mix__label_dtypes_promote() -> None:
    images = torch.rand(1, 3, 2, 2)
    for one, two in itertools.product(DTYPES, DTYPES):
        mixed = CrossDomainMix(3)(images, torch.ones(1, 2, 2, dtype=one), images, torch.zeros(1, 2, 2, dtype=two))
        assert mixed.labels.dtype == torch.promote_types(one, two)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mixers__dtypes_of_images_and_weights(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 4, 6).to(dtype, memory_format=torch.channels_last)
    labels = torch.randint(0, 5, (2, 4, 6), dtype=torch.uint8)
    for weights in (None, torch.tensor([0.25, 0.5]).to(dtype), torch.rand(2, 4, 6).to(dtype)):
        for mixed in (
            CrossDomainMix(5)(images, labels, images, labels, weights),
            ClassMix(5)(images, labels, weights),
        ):
            assert mixed.images.dtype == dtype
            assert mixed.images.is_contiguous(memory_format=torch.channels_last)
            assert mixed.labels.dtype == torch.uint8
            assert mixed.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert mixed.weights.shape == mixed.mask.shape == (2, 4, 6)
            assert weights is not None or mixed.weights.eq(1).all()


@pytest.mark.parametrize(
    "mixer",
    [
        CrossDomainMix(5, ignore_index=0, include_ignored=True, rounding="floor", class_weights=[1, 2, 3, 4, 5]),
        CrossDomainMix(5, masks=CowMasks(ratio=0.4)),
    ],
)
def test_mixers__are_stateless_modules_and_autocast_changes_nothing(mixer: CrossDomainMix) -> None:
    assert not mixer.state_dict()
    images, labels = torch.rand(2, 3, 4, 4), torch.randint(0, 5, (2, 4, 4))
    arguments, scores = (images, labels, images.flip(0), labels), mixer.sample_scores(2, (4, 4), generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = mixer(*arguments, scores=scores)
    assert_same(got, mixer(*arguments, scores=scores), **EXACT)
    check_module(copy.deepcopy(mixer), lambda module: module(*arguments, scores=scores), {"ratio": mixer.ratio})
