"""Class masks and mixing."""

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checks import Watch
from crossmix import ClassMix, CrossDomainMix, _class_codes
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


@pytest.mark.parametrize("mixer", [ClassMix(5, ratio=0.3), CrossDomainMix(5, ignore_index=0, include_ignored=True)])
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
