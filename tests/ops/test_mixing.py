"""Class masks and mixing."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checks import Watch
from crossmix import BoxMasks, ClassMix, CowMasks, CrossDomainMix, _class_codes
from crossmix import functional as F
from oracles import classes_by_loop, mask_by_loop, seeded

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


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
    if draw(st.booleans()):  # ids from anywhere
        far = torch.randint(0 if dtype == torch.uint8 else -300, 256, labels.shape, generator=seeded(labels.numel()))
        labels = torch.where(torch.rand(labels.shape, generator=seeded(1)) < 0.5, far, labels)
    if draw(st.booleans()) and labels.numel():
        labels[..., 0] = 255
    if dtype == torch.int64 and draw(st.booleans()) and labels.numel():
        labels[..., 0] = 2**40 + 1
    return labels.to(dtype), num_classes, ignore_index


@pytest.fixture(params=[1 << 18, 5], ids=["in one part", "in parts of five pixels"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_class_codes, "PART", request.param)


@pytest.mark.usefixtures("part")
@given(label_maps(), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sample_classes_and_class_mask__equal_the_loops(
    maps: tuple[torch.Tensor, int, int], ratio: float, ignored: bool, seed: int
) -> None:
    labels, num_classes, ignore_index = maps
    scores = torch.rand(len(labels), num_classes + 1, generator=seeded(seed))
    if seed % 3 == 0:
        scores = (scores * 3).floor()  # many ties
    before = labels.clone()
    got = F.sample_classes(
        labels, num_classes, ratio=ratio, ignore_index=ignore_index, include_ignored=ignored, scores=scores
    )
    want = classes_by_loop(labels, num_classes, scores, ratio, ignore_index, ignored)
    assert torch.equal(got, want)
    assert torch.equal(F.class_mask(labels, got, ignore_index=ignore_index), mask_by_loop(labels, want, ignore_index))
    anything = torch.rand(len(labels), num_classes + 1, generator=seeded(seed + 1)) < 0.5
    got_mask = F.class_mask(labels, anything, ignore_index=ignore_index)
    assert torch.equal(got_mask, mask_by_loop(labels, anything, ignore_index))
    assert torch.equal(labels, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_classes", [1, 19, 30, 31, 32, 33, 64])
@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_ids__every_one_is_its_class_or_ignored(dtype: torch.dtype, num_classes: int, ignore_index: int) -> None:
    ids = torch.arange(0 if dtype == torch.uint8 else -300, 256 if dtype == torch.uint8 else 300)
    labels = ids.to(dtype)[:, None, None]  # one image per id
    known = (ids >= 0) & (ids < num_classes) & (ids != ignore_index)
    want = torch.zeros(len(ids), num_classes + 1, dtype=torch.bool)
    want[torch.arange(len(ids)), torch.where(known, ids, num_classes)] = True
    options = {"ratio": 1.0, "ignore_index": ignore_index}
    assert torch.equal(F.sample_classes(labels, num_classes, include_ignored=True, **options), want)
    assert F.class_mask(labels, want, ignore_index=ignore_index).all()
    assert not F.class_mask(labels, ~want, ignore_index=ignore_index).any()


@pytest.mark.parametrize("n", range(1, 9))
def test_sample_classes__draws_half_rounded_up(n: int) -> None:
    labels = torch.arange(n).reshape(1, 1, n)
    assert int(F.sample_classes(labels, 19).sum()) == [1, 1, 2, 2, 3, 3, 4, 4][n - 1]


def test_sample_classes__ignored_counts_only_when_asked() -> None:
    labels = torch.full((400, 2, 2), 255)
    labels[:, 0, 0] = 3
    assert not F.sample_classes(labels, 19)[:, 19].any()
    assert F.sample_classes(labels, 19)[:, 3].all()
    asked = F.sample_classes(labels, 19, include_ignored=True, generator=seeded(0))
    assert torch.equal(asked.sum(1), torch.ones(400, dtype=torch.long))
    assert abs(int(asked[:, 19].sum()) - 200) < 4 * math.sqrt(100)
    assert not F.sample_classes(torch.full((2, 3, 3), 255), 19).any()  # nothing to draw, nothing drawn


RATIOS = [0.0, 1.0, 5e-324, 2**-53, 1 - 2**-53, *(a / b for b in (3, 7, 10, 20, 100) for a in range(1, b))]


@pytest.mark.parametrize("ulps", [-1, 0, 1])
def test_sample_classes__counts_what_python_counts_for_every_ratio(ulps: int) -> None:
    """0.55 * 20 is 11 in double precision, and 0.55 * 100 a little more than 55."""
    n = 130
    labels = torch.arange(n).expand(n, n).tril()[:, None]  # i + 1 classes in image i
    scores = torch.rand(n, n + 1, generator=seeded(0))
    for exact in RATIOS:
        ratio = exact if ulps == 0 else min(max(math.nextafter(exact, ulps * math.inf), 0.0), 1.0)
        got = F.sample_classes(labels, n, ratio=ratio, scores=scores).sum(1)
        assert got.tolist() == [math.ceil(ratio * k) for k in range(1, n + 1)], ratio


@pytest.mark.parametrize("num_classes", [257, 5000])
def test_sample_classes__of_many_ids_in_memory_that_grows_with_their_number(num_classes: int) -> None:
    labels = torch.randint(0, num_classes, (2, 24, 25), generator=seeded(0))
    scores = (torch.rand(2, num_classes + 1, generator=seeded(1)) * 50).floor()  # many ties
    with Watch() as seen:
        got = F.sample_classes(labels, num_classes, ratio=0.3, scores=scores, include_ignored=True)
    assert torch.equal(got, classes_by_loop(labels, num_classes, scores, 0.3, 255, ignored=True))
    assert seen.largest <= max(labels.numel(), 2 * (num_classes + 2))


@pytest.mark.parametrize("num_classes", [6, 40])
def test_sample_classes__is_uniform_without_replacement(num_classes: int) -> None:
    n = 20_000
    labels = torch.tensor([0, 2, 3, 5, 1]).expand(n, 1, 5)
    classes = F.sample_classes(labels, num_classes, generator=seeded(0))
    assert torch.equal(classes.sum(1), torch.full((n,), 3))
    sets, counts = classes.long().unique(dim=0, return_counts=True)
    assert len(sets) == 10  # all 3-subsets of 5
    assert float(((counts - n / 10) ** 2 / (n / 10)).sum()) < 33  # chi-square, 9 degrees: beyond with p < 2e-4


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 6.0])


def inclusion(weights: list[float], count: int) -> tuple[list[float], dict[tuple[int, ...], float]]:
    """How likely each class and each set is among `count` draws without replacement, over all orders."""
    sets: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), count):
        left, chance = sum(weights), 1.0
        for k in order:
            chance *= weights[k] / left
            left -= weights[k]
        key = tuple(sorted(order))
        sets[key] = sets.get(key, 0.0) + chance
    return [sum(chance for key, chance in sets.items() if k in key) for k in range(len(weights))], sets


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [4, 40])
def test_sample_classes__weighted_has_the_exact_inclusion_probabilities(count: int, num_classes: int) -> None:
    n = 20_000
    labels = torch.arange(4).expand(n, 1, 4)
    weights = torch.cat([WEIGHTS, torch.full((num_classes - 4,), 100.0)])  # the others are in no image
    got = F.sample_classes(labels, num_classes, ratio=count / 4, class_weights=weights, generator=seeded(0))
    single, sets = inclusion(WEIGHTS.tolist(), count)
    assert torch.equal(got.sum(1), torch.full((n,), count))
    for k, chance in enumerate(single):
        assert abs(int(got[:, k].sum()) - n * chance) < 4 * math.sqrt(n * chance * (1 - chance))
    found = {key: int(got[:, list(key)].all(1).sum()) for key in sets}
    assert sum((found[key] - n * p) ** 2 / (n * p) for key, p in sets.items()) < 26  # chi-square: 3 or 5 degrees, 1e-4


def test_sample_classes__the_ignored_have_the_mean_weight() -> None:
    n = 20_000
    labels = torch.tensor([0, 1, 255]).expand(n, 1, 3)
    for scale in (1.0, 1e-6, 1e6):  # only proportions count
        weights = torch.tensor([1.0, 5.0]) * scale
        got = F.sample_classes(labels, 2, ratio=0.3, include_ignored=True, class_weights=weights, generator=seeded(0))
        for k, chance in enumerate(inclusion([1.0, 5.0, 3.0], 1)[0]):
            assert abs(int(got[:, k].sum()) - n * chance) < 4 * math.sqrt(n * chance * (1 - chance))


def test_sample_classes__weights_are_formula_and_equal_ones_change_nothing() -> None:
    labels = torch.randint(0, 6, (50, 3, 4), generator=seeded(0))
    scores = torch.rand(50, 7, generator=seeded(1))
    weights = torch.tensor([0.1, 1.0, 3.0, 0.2, 9.0, 1.0])
    keys = -torch.log(1 - scores.double()) / torch.cat([weights, weights.mean()[None]]).double()
    got = F.sample_classes(labels, 6, class_weights=weights, scores=scores, include_ignored=True)
    assert torch.equal(got, classes_by_loop(labels, 6, keys, 0.5, 255, ignored=True))
    equal = F.sample_classes(labels, 6, class_weights=torch.full((6,), 0.3), scores=scores)
    assert torch.equal(equal, F.sample_classes(labels, 6, scores=scores))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.55, 1.0])
def test_sample_classes__rounds_down_when_asked(ratio: float) -> None:
    n = 40
    labels = torch.arange(n).expand(n, n).tril()[:, None]  # i + 1 classes in image i
    got = F.sample_classes(labels, n, ratio=ratio, rounding="floor", generator=seeded(0))
    assert got.sum(1).tolist() == [math.floor(ratio * k) for k in range(1, n + 1)]
    up = F.sample_classes(labels, n, ratio=ratio, generator=seeded(0))
    assert not (got & ~up).any()


def test_sample_classes__whole_batch_draws_for_each_image_from_the_classes_of_all() -> None:
    """As `unique` of the batch's labels does in the code of DAFormer and MIC, with a choice per image."""
    n = 20_000
    labels = torch.tensor([[0, 0], [1, 1], [2, 3], [255, 255]]).repeat(n // 4, 1)[:, None]
    got = F.sample_classes(labels, 9, whole_batch=True, generator=seeded(0))
    assert torch.equal(got.sum(1), torch.full((n,), 2))
    assert not got[:, 4:].any()
    sets, counts = got.long().unique(dim=0, return_counts=True)
    assert len(sets) == 6
    assert float(((counts - n / 6) ** 2 / (n / 6)).sum()) < 26
    wide = labels.reshape(1, 1, -1).expand(3, -1, -1)  # each of three images is the whole batch
    scores = torch.rand(n, 10, generator=seeded(1))
    assert torch.equal(
        F.sample_classes(labels, 9, whole_batch=True, scores=scores)[:3], F.sample_classes(wide, 9, scores=scores[:3])
    )
    assert F.sample_classes(labels[:0], 9, whole_batch=True).shape == (0, 10)


OPTIONS: dict[str, dict[str, Any]] = {
    "down": {"rounding": "floor"},
    "batch": {"whole_batch": True},
    "odds": {"class_weights": torch.tensor([0.2, 1.0, 4.0, 1.0, 1.0])},
    "all": {
        "rounding": "floor", "whole_batch": True, "class_weights": torch.rand(5, generator=seeded(3)) + 0.1,
        "ratio": 0.7, "include_ignored": True, "ignore_index": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_mixers__take_the_options_of_sample_classes(name: str) -> None:
    labels = torch.randint(0, 6, (4, 5, 6), generator=seeded(0))
    labels[0] %= 2  # an image without most classes
    images, scores = torch.rand(4, 3, 5, 6), torch.rand(4, 6, generator=seeded(1))
    want = F.sample_classes(labels, 5, scores=scores, **OPTIONS[name])
    mask = F.class_mask(labels, want, ignore_index=OPTIONS[name].get("ignore_index", 255))
    assert not torch.equal(want, F.sample_classes(labels, 5, scores=scores))
    for mixer in (ClassMix(5, **OPTIONS[name]), CrossDomainMix(5, **OPTIONS[name])):
        other = () if isinstance(mixer, ClassMix) else (images, labels)
        assert torch.equal(mixer(images, labels, *other, scores=scores).mask, mask)
        drawn = F.sample_classes(labels, 5, generator=seeded(2), **OPTIONS[name])
        assert torch.equal(mixer.sample(labels, generator=seeded(2)), drawn)
        assert torch.equal(mixer(images, labels, *other, classes=want).mask, mask)


def test_class_weights__are_checked_once_moved_and_kept_wide() -> None:
    mixer = CrossDomainMix(3, class_weights=[1e-9, 1.0, 2.0])
    assert mixer.class_weights.dtype == torch.float32
    for change in (mixer.half, mixer.bfloat16, mixer.double, mixer.float):
        change()
        torch.testing.assert_close(
            mixer.class_weights.double(), torch.tensor([1e-9, 1.0, 2.0]).double(), rtol=1e-6, atol=0
        )
    assert copy.deepcopy(mixer).to("meta").class_weights.device.type == "meta"
    given = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mixer = ClassMix(3, class_weights=given)
    given.zero_()  # is not the mixer's
    assert mixer.class_weights.tolist() == [1.0, 2.0, 3.0]
    images, labels = torch.rand(2, 3, 2, 2), torch.zeros(2, 2, 2, dtype=torch.uint8)
    mixer.class_weights[0] = math.nan  # not looked at again
    assert mixer(images, labels).mask.all()


class Halves(torch.nn.Module):
    """A user's own masks: the left or the right half."""

    def sample(self, n: int, _: Any, *, generator: torch.Generator | None = None, device: Any = None) -> torch.Tensor:
        return torch.rand(n, generator=generator).to(device or "cpu") < 0.5

    def forward(self, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        left = torch.arange(size[1], device=scores.device) < size[1] // 2
        return (left ^ scores[:, None])[:, None].expand(-1, *size)


@pytest.mark.parametrize("masks", [BoxMasks(), CowMasks(sigma=(2.0, 4.0)), Halves()], ids=["boxes", "blobs", "own"])
def test_masks__take_the_place_of_classes(masks: Any) -> None:
    g = seeded(0)
    source, target, weights = torch.rand(3, 3, 12, 17), torch.rand(3, 3, 12, 17), torch.rand(3, 12, 17)
    labels, pseudo = torch.randint(0, 5, (2, 3, 12, 17), generator=g)
    labels[0] = 255
    mixer, onto_next = CrossDomainMix(5, masks=masks), ClassMix(5, masks=masks)
    scores = mixer.sample_scores(3, (12, 17), generator=seeded(1))
    assert torch.equal(scores, onto_next.sample_scores(3, (12, 17), generator=seeded(1)))
    want = masks(scores, (12, 17))
    assert want.any()
    mixed = mixer(source, labels, target, pseudo, weights, scores=scores)
    assert torch.equal(mixed.mask, want)
    assert torch.equal(mixed.images, torch.where(want[:, None], source, target))
    assert torch.equal(mixed.labels, torch.where(want, labels, pseudo))  # ignored pixels too
    assert torch.equal(mixed.weights, torch.where(want, torch.ones(()), weights))
    for got, other in zip(mixer(source, labels, target, pseudo, weights, generator=seeded(1)), mixed, strict=True):
        assert torch.equal(got, other)
    for got, other in zip(mixer(source, labels, target, pseudo, weights, mask=want), mixed, strict=True):
        assert torch.equal(got, other)
    rows = mixer(source[1:], labels[1:], target[1:], pseudo[1:], weights[1:], scores=scores[1:])  # of another rank
    for got, other in zip(rows, mixed, strict=True):
        assert torch.equal(got, other[1:])
    turned = onto_next(source, labels, weights, scores=scores)
    assert torch.equal(turned.images, torch.where(want[:, None], source, source.roll(-1, 0)))
    with pytest.raises(ValueError, match="`sample` draws classes, but this mix uses `masks`"):
        mixer.sample(labels)
    with pytest.raises(ValueError, match="`classes` must be None, since this mix uses `masks`"):
        onto_next(source, labels, classes=torch.ones(3, 6) > 0)


def test_sample_scores__is_what_forward_draws() -> None:
    images, labels = torch.rand(3, 3, 4, 5), torch.randint(0, 5, (3, 4, 5))
    for mixer in (ClassMix(5), CrossDomainMix(5)):
        other = () if isinstance(mixer, ClassMix) else (images.flip(0), labels.flip(0))
        scores = mixer.sample_scores(3, (4, 5), generator=seeded(1))
        assert scores.shape == (3, 6)
        assert torch.equal(scores, mixer.sample_scores(3, generator=seeded(1)))
        got = mixer(images, labels, *other, scores=scores)
        for a, b in zip(got, mixer(images, labels, *other, generator=seeded(1)), strict=True):
            assert torch.equal(a, b)
        assert mixer.sample_scores(3, device="meta").device.type == "meta"


def test_mask__that_is_ready_is_taken_as_it_is() -> None:
    images, labels, mask = torch.rand(3, 3, 4, 5), torch.randint(0, 5, (3, 4, 5)), torch.rand(3, 4, 5) < 0.5
    mixed = ClassMix(5)(images, labels, mask=mask)
    assert torch.equal(mixed.mask, mask)
    assert torch.equal(mixed.labels, torch.where(mask, labels, labels.roll(-1, 0)))


@pytest.mark.parametrize("num_classes", [5, 40])
def test_class_codes__can_be_used_again(num_classes: int, part: None) -> None:  # noqa: ARG001
    labels = torch.randint(0, 6, (2, 8, 9), generator=seeded(0))
    codes = _class_codes.class_codes(labels, num_classes, 255)
    present = codes.present()
    for seed in range(3):
        classes = torch.rand(2, num_classes + 1, generator=seeded(seed)) < 0.5
        assert torch.equal(codes.mask(classes), mask_by_loop(labels, classes, 255))
        assert torch.equal(codes.present(), present)


def test_sample_classes__generator() -> None:
    labels = torch.randint(0, 19, (4, 8, 8), generator=seeded(0))
    state = torch.get_rng_state()
    one = F.sample_classes(labels, 19, generator=seeded(1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one, F.sample_classes(labels, 19, generator=seeded(1)))
    assert torch.equal(one, F.sample_classes(labels, 19, scores=torch.rand(4, 20, generator=seeded(1))))
    assert torch.equal(one, CrossDomainMix(19).sample(labels, generator=seeded(1)))
    assert torch.equal(one, ClassMix(19).sample(labels, generator=seeded(1)))


@given(st.integers(0, 4), st.integers(0, 5), st.integers(0, 5), st.integers(0, 2**31), st.sampled_from([3, 40]))
@settings(max_examples=80, deadline=None)
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
    assert not bool((mixed.mask & (labels == 255)).any())
    for i in range(n):
        present = set(labels[i].flatten().tolist()) - {255}
        pasted = set(labels[i][mixed.mask[i]].tolist())
        assert len(pasted) == math.ceil(len(present) / 2)
        assert not pasted & set(labels[i][~mixed.mask[i]].tolist())  # a class is pasted whole or not at all


@given(st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_class_mix__pastes_image_i_onto_the_next(n: int, seed: int) -> None:
    g = seeded(seed)
    images = torch.rand(n, 3, 4, 5, generator=g)
    labels = torch.randint(0, 5, (n, 4, 5), generator=g)
    weights = torch.rand(n, 4, 5, generator=g)
    classes = ClassMix(5).sample(labels, generator=g)
    mixed = ClassMix(5)(images, labels, weights, classes=classes)
    assert torch.equal(mixed.mask, mask_by_loop(labels, classes, 255))
    for i in range(n):
        j, mask = (i + 1) % n, mixed.mask[i]
        assert torch.equal(mixed.images[i], torch.where(mask, images[i], images[j]))
        assert torch.equal(mixed.labels[i], torch.where(mask, labels[i], labels[j]))
        assert torch.equal(mixed.weights[i], torch.where(mask, weights[i], weights[j]))
    order = torch.arange(n).roll(1)  # rotating the batch rotates the result
    turned = ClassMix(5)(images[order], labels[order], weights[order], classes=classes[order])
    for got, want in zip(turned, mixed, strict=True):
        assert torch.equal(got, want[order])


def test_mix__identities_and_trailing_shapes() -> None:
    a, b = torch.rand(2, 4, 3, 5), torch.rand(2, 4, 3, 5)
    mask = torch.rand(2, 3, 5) < 0.5
    assert torch.equal(F.mix(a, b, torch.ones_like(mask)), a)
    assert torch.equal(F.mix(a, b, torch.zeros_like(mask)), b)
    assert torch.equal(F.mix(a, a, mask), a)
    deep = F.mix(a[:, :, None], b[:, :, None], mask)
    assert torch.equal(deep[:, :, 0], F.mix(a, b, mask))
    assert torch.equal(F.mix(torch.tensor([1.0, 2.0]), b[:, 0], mask)[1], torch.where(mask[1], 2.0, b[1, 0]))
    assert F.mix(torch.ones(2), torch.zeros(2), mask).shape == (2, 3, 5)
    a[0, 0, 0, 0] = math.nan
    assert not F.mix(a, b, torch.zeros_like(mask)).isnan().any()  # what is not taken does not leak


@pytest.mark.parametrize("one", DTYPES)
@pytest.mark.parametrize("two", DTYPES)
def test_mix__label_dtypes_promote(one: torch.dtype, two: torch.dtype) -> None:
    images = torch.rand(1, 3, 2, 2)
    mixed = CrossDomainMix(3)(images, torch.ones(1, 2, 2, dtype=one), images, torch.zeros(1, 2, 2, dtype=two))
    assert mixed.labels.dtype == torch.promote_types(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", ["none", "vector", "map"])
def test_cross_domain_mix__dtypes(dtype: torch.dtype, weights: str) -> None:
    images = torch.rand(2, 3, 4, 6).to(dtype)
    labels = torch.randint(0, 5, (2, 4, 6), dtype=torch.uint8)
    given_weights = {"none": None, "vector": torch.tensor([0.25, 0.5]).to(dtype), "map": torch.rand(2, 4, 6).to(dtype)}[
        weights
    ]
    for mixed in (
        CrossDomainMix(5)(images, labels, images, labels, given_weights),
        ClassMix(5)(images, labels, given_weights),
    ):
        assert mixed.images.dtype == dtype
        assert mixed.labels.dtype == torch.uint8
        assert mixed.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert mixed.weights.shape == mixed.mask.shape == (2, 4, 6)
        if weights == "none":
            assert torch.equal(mixed.weights, torch.ones_like(mixed.weights))


def test_mixers__memory_formats_and_untouched_inputs() -> None:
    g = seeded(0)
    source, target = torch.rand(2, 3, 6, 8, generator=g), torch.rand(2, 3, 6, 8, generator=g)
    labels, pseudo = torch.randint(0, 7, (2, 2, 6, 8), generator=g)
    scores = torch.rand(2, 8, generator=g)
    want = CrossDomainMix(7)(source, labels, target, pseudo, scores=scores)
    views = {
        "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
        "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        "strided": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    }
    for view in views.values():
        inputs = [view(x) for x in (source, labels, target, pseudo)]
        versions = [x._version for x in inputs]
        copies = [x.clone() for x in inputs]
        got = CrossDomainMix(7)(*inputs, scores=scores)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
        for x, version, old in zip(inputs, versions, copies, strict=True):
            assert x._version == version
            assert torch.equal(x, old)
    last = [source.to(memory_format=torch.channels_last), target.to(memory_format=torch.channels_last)]
    mixed = CrossDomainMix(7)(last[0], labels, last[1], pseudo)
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "mixer",
    [
        ClassMix(5, ratio=0.3),
        CrossDomainMix(5, ignore_index=0, include_ignored=True, rounding="floor", class_weights=[1, 2, 3, 4, 5]),
        CrossDomainMix(5, masks=CowMasks(ratio=0.4)),
    ],
)
def test_mixers__are_stateless_modules(mixer: torch.nn.Module) -> None:
    assert not mixer.state_dict()
    assert not list(mixer.parameters())
    assert repr(pickle.loads(pickle.dumps(mixer))) == repr(copy.deepcopy(mixer)) == repr(mixer)
    assert f"ratio={mixer.ratio}" in repr(mixer)


def test_cross_domain_mix__autocast_changes_nothing() -> None:
    images, labels = torch.rand(2, 3, 4, 4), torch.randint(0, 5, (2, 4, 4))
    scores = torch.rand(2, 6)
    want = CrossDomainMix(5)(images, labels, images.flip(0), labels, scores=scores)
    with torch.autocast("cpu", torch.bfloat16):
        got = CrossDomainMix(5)(images, labels, images.flip(0), labels, scores=scores)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


IMAGES, LABELS = torch.rand(2, 3, 4, 6), torch.zeros(2, 4, 6, dtype=torch.uint8)
WRONG: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("float labels drawn from", lambda: F.sample_classes(LABELS.float(), 5), TypeError, "`labels` must be uint8"),
    ("float labels masked", lambda: F.class_mask(LABELS.float(), torch.zeros(2, 6) > 0), TypeError, "`labels` must be"),
    ("float labels mixed", lambda: ClassMix(5)(IMAGES, LABELS.float()), TypeError, "`labels` must be uint8"),
    ("float labels sampled", lambda: CrossDomainMix(5).sample(LABELS.float()), TypeError, "`labels` must be uint8"),
    ("byte images", lambda: ClassMix(5)(IMAGES.byte(), LABELS), TypeError, "`images` must be floating.*uint8; convert"),
    ("one image", lambda: ClassMix(5)(IMAGES[0], LABELS), ValueError, r"`images` must have shape \(N, C, H, W\)"),
    ("numpy images", lambda: ClassMix(5)(IMAGES.numpy(), LABELS), TypeError, "`images` must be a torch.Tensor"),
    ("numpy labels", lambda: ClassMix(5)(IMAGES, LABELS.numpy()), TypeError, "`labels` must be a torch.Tensor"),
    ("numpy weights", lambda: ClassMix(5)(IMAGES, LABELS, np.ones(2)), TypeError, "`weights` must be a torch.Tensor"),
    ("numpy drawn from", lambda: F.sample_classes(LABELS.numpy(), 5), TypeError, "`labels` must be a torch.Tensor"),
    ("numpy scores", lambda: F.sample_classes(LABELS, 5, scores=np.ones((2, 6))), TypeError, "`scores` must be"),
    ("numpy classes", lambda: F.class_mask(LABELS, np.ones((2, 6))), TypeError, "`classes` must be a torch.Tensor"),
    ("numpy pasted", lambda: F.mix(IMAGES.numpy(), IMAGES, LABELS > 0), TypeError, "`pasted` must be a torch.Tensor"),
    ("numpy base", lambda: F.mix(IMAGES, IMAGES.numpy(), LABELS > 0), TypeError, "`base` must be a torch.Tensor"),
    ("numpy mask", lambda: F.mix(IMAGES, IMAGES, LABELS.numpy() > 0), TypeError, "`mask` must be a torch.Tensor"),
    ("mask device", lambda: F.mix(IMAGES, IMAGES, (LABELS > 0).to("meta")), ValueError, "`mask` is on meta"),
    ("label size", lambda: ClassMix(5)(IMAGES, LABELS[..., :5]), ValueError, "`labels` .2, 4, 5. and `images`"),
    ("labels device", lambda: ClassMix(5)(IMAGES, LABELS.to("meta")), ValueError, "`labels` is on meta"),
    ("classes device", lambda: F.class_mask(LABELS, torch.ones(2, 6, device="meta") > 0), ValueError, "is on meta"),
    ("classes drawn", lambda: F.sample_classes(LABELS, 0), ValueError, "`num_classes` must be at least 1"),
    ("ratio drawn", lambda: F.sample_classes(LABELS, 5, ratio=2.0), ValueError, r"`ratio` must lie in \[0, 1\]"),
    ("rounding", lambda: ClassMix(5, rounding="round"), ValueError, "`rounding` must be one of 'ceil', 'floor'"),
    ("rounding drawn", lambda: F.sample_classes(LABELS, 5, rounding="up"), ValueError, "`rounding` must be one of"),
    ("odds of 0", lambda: ClassMix(2, class_weights=[1, 0]), ValueError, "`class_weights` must be positive and finite"),
    ("odds of nan", lambda: CrossDomainMix(2, class_weights=[1, math.nan]), ValueError, "must be positive and finite"),
    ("odds of inf", lambda: CrossDomainMix(2, class_weights=[1, math.inf]), ValueError, "must be positive and finite"),
    ("odds below float32", lambda: ClassMix(2, class_weights=[1, 1e-60]), ValueError, "must be positive and finite"),
    ("odds too few", lambda: ClassMix(3, class_weights=[1, 2]), ValueError, r"shape \(C,\) = \(3,\), got \(2,\)"),
    ("odds too many", lambda: ClassMix(3, class_weights=torch.ones(4)), ValueError, "none for ignored pixels"),
    ("odds no numbers", lambda: ClassMix(2, class_weights="ab"), TypeError, "`class_weights` must be a sequence of"),
    ("odds drawn of 0", lambda: F.sample_classes(LABELS, 2, class_weights=torch.zeros(2)), ValueError, "be positive"),
    ("odds drawn integer", lambda: F.sample_classes(LABELS, 2, class_weights=torch.ones(2).int()), TypeError, "float"),
    ("odds drawn list", lambda: F.sample_classes(LABELS, 2, class_weights=[1, 2]), TypeError, "must be a torch.Tensor"),
    ("odds drawn shape", lambda: F.sample_classes(LABELS, 2, class_weights=torch.ones(3)), ValueError, "got .3,."),
    (
        "odds device",
        lambda: F.sample_classes(LABELS, 2, class_weights=torch.ones(2, device="meta")),
        ValueError,
        "`class_weights` is on meta but `labels` is on cpu",
    ),
    ("odds and masks", lambda: ClassMix(2, class_weights=[1, 2], masks=BoxMasks()), ValueError, "must not both be"),
    ("masks class", lambda: ClassMix(2, masks=BoxMasks), TypeError, r"got the class BoxMasks; build `BoxMasks\(\)`"),
    ("masks mask", lambda: ClassMix(2, masks=LABELS > 0), TypeError, "got Tensor; build .* `forward.mask=....`"),
    ("masks function", lambda: ClassMix(2, masks=lambda s, n: s), TypeError, "`masks` must have `sample.n, size.`"),
    ("mask type", lambda: ClassMix(5)(IMAGES, LABELS, mask=LABELS), TypeError, "`mask` must be bool, got torch.uint8"),
    ("mask list", lambda: ClassMix(5)(IMAGES, LABELS, mask=[True]), TypeError, "`mask` must be a torch.Tensor"),
    ("mask size", lambda: ClassMix(5)(IMAGES, LABELS, mask=LABELS[1:] > 0), ValueError, "`mask` must have shape"),
    ("mask dims", lambda: ClassMix(5)(IMAGES, LABELS, mask=IMAGES > 0), ValueError, "without a channel dimension"),
    ("mask place", lambda: ClassMix(5)(IMAGES, LABELS, mask=(LABELS > 0).to("meta")), ValueError, "`mask` is on meta"),
    (
        "mask and scores",
        lambda: ClassMix(5)(IMAGES, LABELS, mask=LABELS > 0, scores=torch.rand(2, 6)),
        ValueError,
        "`scores` and `mask` must not both be given",
    ),
    (
        "own masks too small",
        lambda: CrossDomainMix(5, masks=Halves())(IMAGES, LABELS, IMAGES, LABELS, scores=torch.ones(1) > 0),
        ValueError,
        r"`masks.scores, size.` must have shape .N, H, W. = .2, 4, 6., got .1, 4, 6.",
    ),
    (
        "image sizes",
        lambda: CrossDomainMix(5)(IMAGES, LABELS, IMAGES[..., :5], LABELS[..., :5]),
        ValueError,
        "`target_images` .2, 3, 4, 5. and `source_images` .2, 3, 4, 6. must agree",
    ),
    (
        "image channels",
        lambda: CrossDomainMix(5)(IMAGES, LABELS, IMAGES[:, :1], LABELS),
        ValueError,
        "`target_images` .2, 1, 4, 6. and `source_images`",
    ),
    (
        "pseudo-label sizes",
        lambda: CrossDomainMix(5)(IMAGES, LABELS, IMAGES, LABELS[:, :3]),
        ValueError,
        "`target_labels` .2, 3, 6. and `target_images`",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
