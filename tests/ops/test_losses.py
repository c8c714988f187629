"""Confidence weights and the cross-entropy of ids and of soft labels, with weights of pixels and of classes."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as tf

from checks import examples
from crossmix import ConfidenceWeightedCE, losses
from crossmix import functional as F
from oracles import confidence_weights_by_loop, cross_entropy_by_loop, seeded, softmax

C = 5
NORMALIZERS = ("all", "valid", "weights")
SCOPES = ("image", "batch", "pixel", "none")
SIZE = (4, 7)
Loss = Callable[..., Tensor]


def batch(dtype: torch.dtype = torch.float64, n: int = 2, size: tuple[int, int] = SIZE) -> tuple[Tensor, ...]:
    """Logits, soft labels, labels with ignored ids, weights and class weights with a 0 each."""
    g = seeded(0)
    logits = 3 * torch.randn(n, C, *size, generator=g, dtype=dtype)
    soft = (3 * torch.randn(n, C, *size, generator=g, dtype=dtype)).softmax(1)
    labels = torch.randint(0, C, (n, *size), generator=g)
    labels = labels.where(torch.rand(labels.shape, generator=g) > 0.2, 255)
    weights = (torch.rand(n, *size, generator=g, dtype=dtype) - 0.1).clamp(min=0)
    class_weights = torch.rand(C, generator=g, dtype=dtype)
    class_weights[1] = 0
    return logits, soft, labels, weights, class_weights


def torchs(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalizer: str = "all",
    reduction: str = "mean",
) -> Tensor:
    """By torch's own losses of pixels, class weights included, and the divisors as they are documented."""
    soft = labels.is_floating_point()
    ids = {} if soft else {"ignore_index": 255}
    each = tf.cross_entropy(logits, labels, class_weights, label_smoothing=label_smoothing, reduction="none", **ids)
    valid = torch.ones_like(each) if soft else (labels != 255).to(each.dtype)
    ones = torch.ones(C, dtype=each.dtype) if class_weights is None else class_weights
    by_class = torch.einsum("nchw,c->nhw", labels, ones) if soft else ones[labels.where(labels != 255, 0)] * valid
    weights = torch.ones_like(each) if weights is None else weights.expand_as(each)
    if reduction == "none":
        return each * weights
    divisors = {"all": each.numel(), "valid": valid.sum(), "weights": (by_class * weights).sum()}
    return (each * weights).sum() / divisors[normalizer]


def criterion(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, upsampled: bool = False, **options: Any
) -> Tensor:
    how = {"align_corners": options.pop("align_corners")} if "align_corners" in options else {}
    module = ConfidenceWeightedCE(**options)
    if options.get("class_weights") is not None:
        module.class_weights = options["class_weights"]  # not rounded to float32
    return (module.upsampled if upsampled else module)(logits, labels, weights, **how)


def derived(loss: Loss, logits: Tensor, labels: Tensor, weights: Tensor | None = None, **options: Any) -> list[Tensor]:
    """The loss, and its gradients by the logits and the weights."""
    leaves = [value.clone().requires_grad_() for value in (logits, weights) if value is not None]
    value = loss(leaves[0], labels, *leaves[1:], **options)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=examples(40), deadline=None)
def test_weighted_cross_entropy__equals_the_loop(n: int, height: int, width: int, num_classes: int, seed: int) -> None:
    g = seeded(seed)
    logits = torch.randn(n, num_classes, height, width, generator=g, dtype=torch.float64) * 5
    labels = torch.randint(-1, num_classes + 2, (n, height, width), generator=g)
    labels = torch.where(torch.rand(labels.shape, generator=g) < 0.3, 255, labels)
    for weights in (None, torch.rand(n, height, width, generator=g), torch.rand(n, generator=g)):
        for normalizer, (ignored, smoothing) in itertools.product(NORMALIZERS, ((255, 0.0), (0, 0.1))):
            options = {"ignore_index": ignored, "normalizer": normalizer, "label_smoothing": smoothing}
            want = cross_entropy_by_loop(logits, labels, weights, ignored, normalizer, smoothing)
            for loss in (F.weighted_cross_entropy, criterion, partial(criterion, sync=True)):  # there is no group
                assert float(loss(logits, labels, weights, **options)) == pytest.approx(want, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", ["soft", "ids"])
@pytest.mark.parametrize("loss", [F.weighted_cross_entropy, criterion], ids=["function", "criterion"])
def test_losses__are_torchs(loss: Loss, kind: str, by_class: bool) -> None:
    logits, soft, ids, weights, class_weights = batch()
    labels = soft if kind == "soft" else ids
    for weighted, smoothing, normalizer in itertools.product((None, weights), (0.0, 0.2), NORMALIZERS):
        options = {"normalizer": normalizer, "label_smoothing": smoothing}
        if by_class:
            options["class_weights"] = class_weights
        got, want = (derived(one, logits, labels, weighted, **options) for one in (loss, torchs))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", ["soft", "ids"])
def test_upsampled__equals_upsampling_first(kind: str, by_class: bool, align_corners: bool) -> None:
    full = (21, 18)
    _, soft, ids, weights, class_weights = batch(size=full)
    labels = soft if kind == "soft" else ids
    small = torch.randn(2, C, 4, 5, generator=seeded(3), dtype=torch.float64)

    def upsampled_first(logits: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        return torchs(tf.interpolate(logits, full, mode="bilinear", align_corners=align_corners), *rest, **options)

    for smoothing, normalizer in itertools.product((0.0, 0.2), NORMALIZERS):
        options = {"normalizer": normalizer, "label_smoothing": smoothing}
        if by_class:
            options["class_weights"] = class_weights
        want = derived(upsampled_first, small, labels, weights, **options)
        for loss in (F.upsampled_cross_entropy, partial(criterion, upsampled=True)):
            got = derived(loss, small, labels, weights, align_corners=align_corners, **options)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    options["reduction"] = "none"
    got = F.upsampled_cross_entropy(small, labels, weights, align_corners=align_corners, **options)
    torch.testing.assert_close(got, upsampled_first(small, labels, weights, **options), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_losses__means_that_torch_has_too(dtype: torch.dtype) -> None:
    logits, soft, ids, _, class_weights = batch()
    for smoothing, (labels, normalizer) in itertools.product((0.0, 0.2), ((soft, "valid"), (ids.to(dtype), "weights"))):
        options = {"class_weights": class_weights, "label_smoothing": smoothing, "normalizer": normalizer}
        got = F.weighted_cross_entropy(logits, labels, **options)
        ours, theirs = (soft, {}) if labels is soft else (ids, {"ignore_index": 255})
        want = tf.cross_entropy(logits, ours, weight=class_weights, label_smoothing=smoothing, **theirs)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    for reduction in ("none", "sum"):
        got = F.weighted_cross_entropy(logits, ids.to(dtype), reduction=reduction)
        torch.testing.assert_close(got, tf.cross_entropy(logits, ids, ignore_index=255, reduction=reduction))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("silence", ["ignored", "unknown id", "weight 0", "weight 0 of soft labels"])
def test_losses__what_does_not_count_adds_exactly_nothing(silence: str, dtype: torch.dtype, value: float) -> None:
    logits, soft, ids, weights, _ = batch(torch.float32)
    logits, weights = logits.to(dtype), weights + 0.1
    labels = soft.to(dtype) if "soft" in silence else ids.clamp(max=C - 1)
    quiet = torch.rand(2, *SIZE, generator=seeded(1)) < 0.4
    quiet[1] = True
    strange = quiet[:, None] & (torch.rand(logits.shape, generator=seeded(2)) < 0.7)
    silent = weights.masked_fill(quiet, 0)
    cases = [(logits.masked_fill(strange, value), labels, silent)]
    if "soft" in silence:
        odd = labels.masked_fill(strange, value)
        cases += [(logits, odd, silent), (cases[0][0], odd, silent)]
    elif silence != "weight 0":
        labels = labels.masked_fill(quiet, 255 if silence == "ignored" else -7)
        maps = (None, weights, weights.masked_fill(quiet, math.nan), weights.masked_fill(quiet, math.inf))
        cases = [(cases[0][0], labels, one) for one in maps]
    losses = (F.weighted_cross_entropy, F.upsampled_cross_entropy, criterion)
    for z, y, w in cases:
        for normalizer, loss in zip(NORMALIZERS, losses, strict=True):
            options = {"normalizer": normalizer, "label_smoothing": 0.1 * (loss is not criterion)}
            got, want = (
                derived(partial(loss, weights=one), *inputs, **options)
                for one, inputs in ((w, (z, y)), (None if w is None else silent, (logits, labels)))
            )
            torch.testing.assert_close(got, want, rtol=1e-6 if "soft" in silence else 0, atol=0)
            assert not got[1].masked_fill(~quiet[:, None], 0).any()
            assert got[1].any()
        each = F.weighted_cross_entropy(z, y, w, label_smoothing=0.1, reduction="none")
        assert not each[quiet].any()
        assert (each[~quiet] > 0).all()


def test_losses__what_counts_is_not_hidden() -> None:
    for z, y, w in ((math.nan, 0.5, 1.0), (math.inf, 0.5, 1.0), (0.0, math.nan, 1.0), (0.0, 0.5, math.nan)):
        logits, soft, ids = torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 0.5), torch.zeros(1, 1, 1).long()
        logits[0, 0], soft[0, 0] = z, y
        for labels in (soft,) if math.isnan(y) else (soft, ids):
            for normalizer in ("all", "weights"):
                assert F.weighted_cross_entropy(logits, labels, torch.full((1,), w), normalizer=normalizer).isnan()


def test_soft_labels__a_class_that_is_ruled_out_costs_what_its_label_says() -> None:
    logits = torch.tensor([0.0, 1.0, -math.inf])[None, :, None, None]
    labels = torch.tensor([0.3, 0.7, 0.0])[None, :, None, None]
    loss, gradient = derived(F.weighted_cross_entropy, logits, labels)
    torch.testing.assert_close(loss, tf.cross_entropy(logits[:, :2], labels[:, :2]))
    assert gradient.isfinite().all()
    assert F.weighted_cross_entropy(logits, labels.flip(1)) == math.inf


def test_soft_labels__all_zero_rows_cost_nothing_and_still_count() -> None:
    logits, soft, *_ = batch()
    half = soft.clone()
    half[0] = 0
    assert not F.weighted_cross_entropy(logits, half, reduction="none")[0].any()
    for normalizer, share in (("all", 0.5), ("valid", 0.5), ("weights", 1.0)):
        want = share * F.weighted_cross_entropy(logits[1:], soft[1:])
        torch.testing.assert_close(F.weighted_cross_entropy(logits, half, normalizer=normalizer), want)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("shape", [(2, 6, 4), (0, 6, 4), (2, 0, 4), (2, 6, 0)])
def test_losses__degenerate_batches_are_zero(shape: tuple[int, int, int], normalizer: str) -> None:
    n, height, width = shape
    soft, ids = torch.rand(n, 4, height, width).softmax(1), torch.zeros(shape, dtype=torch.long)
    nothing, ones = torch.zeros(shape), torch.ones(shape)
    cases: list[tuple[Tensor, Tensor | None, Tensor | None]] = [
        *((labels, nothing, by_class) for labels in (soft, ids) for by_class in (None, torch.rand(4))),
        *((labels, None, torch.zeros(4)) for labels in (soft, ids)),
        *((torch.full(shape, unknown), weights, None) for unknown in (255, 200, -3) for weights in (None, ones)),
        (ids, torch.zeros(n), None),
    ]
    small = (n, 4, min(height, 3), min(width, 3))
    losses = ((F.weighted_cross_entropy, (n, 4, height, width)), (F.upsampled_cross_entropy, small))
    for (loss, size), smoothing in itertools.product(losses, (0.0, 0.1)):
        logits = torch.randn(size)
        options = {"normalizer": normalizer, "label_smoothing": smoothing}
        for labels, weights, class_weights in cases:
            got = derived(partial(loss, weights=weights), logits, labels, class_weights=class_weights, **options)
            assert not any(value.any() for value in got)


@pytest.mark.parametrize(("normalizer", "smoothing"), [("all", 0.1), ("valid", 0.0), ("weights", 0.1)])
@pytest.mark.parametrize("loss", [F.weighted_cross_entropy, F.upsampled_cross_entropy])
def test_losses__derivatives(loss: Loss, normalizer: str, smoothing: float) -> None:
    _, soft, ids, weights, class_weights = batch(n=1, size=(3, 4))
    assert not weights.all()  # weights of zero have a gradient
    size = (2, 3) if loss is F.upsampled_cross_entropy else (3, 4)
    logits = torch.randn(1, C, *size, dtype=torch.float64, generator=seeded(4))
    leaves = [value.requires_grad_() for value in (logits, weights, class_weights + 0.1, soft)]
    loss = partial(loss, normalizer=normalizer, label_smoothing=smoothing)

    def of_ids(z: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return loss(z, ids, w, class_weights=c)

    def of_soft(z: Tensor, w: Tensor, c: Tensor, y: Tensor) -> Tensor:
        return loss(z, y, w, class_weights=c)

    assert torch.autograd.gradcheck(of_ids, leaves[:3])
    assert torch.autograd.gradcheck(of_soft, leaves)
    assert torch.autograd.gradgradcheck(of_ids, leaves[:3])
    assert torch.autograd.gradgradcheck(of_soft, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weighted_cross_entropy__extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([1e4, -1e4]).to(dtype)[None, :, None, None]
    right, wrong = (derived(F.weighted_cross_entropy, logits, torch.tensor([[[k]]])) for k in (0, 1))
    assert right[0].dtype == wrong[0].dtype == torch.float32
    assert (float(right[0]), float(wrong[0])) == (0.0, pytest.approx(2 * float(logits[0, 0]), rel=1e-6))
    assert bool(wrong[1].isfinite().all())


@pytest.mark.parametrize("loss", [F.weighted_cross_entropy, F.upsampled_cross_entropy])
def test_losses__arithmetic_is_float32_and_float64_where_an_input_is(loss: Loss) -> None:
    logits, soft, ids, weights, class_weights = (v.float() if v.is_floating_point() else v for v in batch())
    small = logits if loss is F.weighted_cross_entropy else logits[..., :2, :2]
    for labels, smoothing in itertools.product((soft, ids), (0.0, 0.1)):
        want = loss(small, labels, class_weights=class_weights, label_smoothing=smoothing)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = loss(small, labels, class_weights=class_weights, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    for half in (torch.float16, torch.bfloat16):
        narrow = [value.to(half) for value in (small, soft, class_weights)]
        got, want = (loss(z, y, class_weights=c) for z, y, c in (narrow, [value.float() for value in narrow]))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    for wide in (
        loss(small.double(), ids),
        loss(small, soft.double()),
        loss(small, ids, weights.double()),
        loss(small, ids, class_weights=class_weights.double()),
    ):
        assert wide.dtype == torch.float64


@pytest.mark.parametrize("kind", ["soft", pytest.param("ids", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses__compile_whole(kind: str, dynamic: bool) -> None:
    torch.compiler.reset()
    module = ConfidenceWeightedCE(class_weights=[1, 2, 0, 4, 5], normalizer="weights", label_smoothing=0.1)

    def losses(z: Tensor, y: Tensor, w: Tensor, c: Tensor) -> list[Tensor]:
        return [
            F.weighted_cross_entropy(z, y, w, class_weights=c, normalizer="weights"),
            F.weighted_cross_entropy(z, y, w, class_weights=c, label_smoothing=0.1),
            F.upsampled_cross_entropy(z[..., :3, :3], y, w, class_weights=c, normalizer="valid"),
            module(z, y, w),
            module.upsampled(z[..., :3, :3], y, w),
        ]

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    logits, soft, ids, weights, class_weights = batch(torch.float32)
    results = []
    for run in (compiled, losses):
        leaf = logits.clone().requires_grad_()
        values = run(leaf, soft if kind == "soft" else ids, weights, class_weights)
        results.append((values, torch.autograd.grad(sum(values), leaf)))
    torch.testing.assert_close(*results)


def test_losses__under_another_default_device() -> None:
    logits, _, labels, weights, _ = batch(torch.float32)

    def results() -> list[Tensor]:
        found = [loss(logits, labels, weights) for loss in LOSSES.values()]
        found += [F.confidence_weight(weights, scope=scope) for scope in SCOPES]
        return [*found, F.upsampled_cross_entropy(logits[..., :2, :3], labels)]

    want = results()
    with torch.device("meta"):
        got = results()
    torch.testing.assert_close(got, want)


def test_criterion__class_weights_are_a_buffer_that_is_not_saved_nor_rounded() -> None:
    values = [0.1, 1.7, 3.3]
    module = nn.Sequential(ConfidenceWeightedCE(class_weights=torch.tensor(values, dtype=torch.float64)))
    module.half().bfloat16()
    assert torch.equal(module[0].class_weights, torch.tensor(values))
    assert not module.state_dict()
    assert module.double()[0].class_weights.dtype == torch.float64
    assert "class_weights=[0.1, 1.7, 3.3]" in repr(module)
    assert "class_weights=None" in repr(ConfidenceWeightedCE())
    assert module.to("meta")[0].class_weights.is_meta


LOGITS, SOFT, IDS = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
LOSSES: dict[str, Loss] = {
    "weighted_cross_entropy": F.weighted_cross_entropy,
    "upsampled_cross_entropy": F.upsampled_cross_entropy,
    "criterion": ConfidenceWeightedCE(),
    "criterion.upsampled": ConfidenceWeightedCE().upsampled,
}
REFUSED: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "logits array": ((LOGITS.numpy(), IDS), TypeError, "`logits` must be a torch.Tensor, got ndarray; convert it"),
    "labels array": ((LOGITS, IDS.numpy()), TypeError, "`labels` must be a torch.Tensor, got ndarray; convert it"),
    "weights array": ((LOGITS, IDS, np.ones(2)), TypeError, "`weights` must be a torch.Tensor, got ndarray"),
    "labels dtype": ((LOGITS, IDS.float()), TypeError, "must be uint8, int16, int32 or int64, got torch.float32"),
    "labels bool": ((LOGITS, SOFT > 0.5), TypeError, "must be uint8"),
    "logits dtype": ((LOGITS.long(), IDS), TypeError, "`logits` must be floating, got torch.int64"),
    "weights dtype": ((LOGITS, IDS, IDS > 0), TypeError, "`weights` must be floating, got torch.bool"),
    "weights shape": ((LOGITS, IDS, torch.ones(3)), ValueError, r"\(N, H, W\) = \(2, 4, 5\) or \(N,\), got \(3,\)"),
    "weights of classes": ((LOGITS, SOFT, SOFT), ValueError, r"\(N, H, W\) = \(2, 4, 5\) or \(N,\)"),
    "classes": ((LOGITS, SOFT[:, :2]), ValueError, r"soft `labels` .* C = 3 like `logits`, got \(2, 2"),
    "batch": ((LOGITS, SOFT[:1]), ValueError, "hold 2 images but `labels` 1"),
    "ids": ((LOGITS, IDS[:, None]), ValueError, "squeeze the channel dimension"),
}
CLASS_WEIGHTS: dict[str, tuple[Any, type[Exception], str]] = {
    "length": (torch.ones(4), ValueError, r"shape \(C,\) = \(3,\), got \(4,\)"),
    "rank": (torch.ones(3, 1), ValueError, r"\(C,\)"),
    "dtype": (torch.arange(3), TypeError, "floating"),
    "list": ([1.0, 1.0, 1.0], TypeError, "a torch.Tensor"),
    "NaN": (torch.tensor([1, math.nan, 1]), ValueError, "finite and at least 0, got"),
    "sign": (torch.tensor([1.0, -1.0, 1.0]), ValueError, "finite and at least 0, got"),
    "device": (torch.ones(3, device="meta"), ValueError, "is on meta but `logits` is on cpu"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses__refuse(name: str, loss: str) -> None:
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        LOSSES[loss](*arguments)


@pytest.mark.parametrize("name", CLASS_WEIGHTS)
@pytest.mark.parametrize("loss", [F.weighted_cross_entropy, F.upsampled_cross_entropy], ids=["plain", "upsampled"])
def test_losses__refuse_class_weights(name: str, loss: Loss) -> None:
    class_weights, error, message = CLASS_WEIGHTS[name]
    for labels in (IDS, SOFT):
        with pytest.raises(error, match=message):
            loss(LOGITS, labels, class_weights=class_weights)


def test_losses__refuse_another_size_and_an_unknown_reduction() -> None:
    for name, loss in LOSSES.items():
        logits = LOGITS[..., :0] if "upsampled" in name else LOGITS[..., :2]
        message = r"must have pixels to be upsampled to \(4, 5\)" if "upsampled" in name else "must agree in batch size"
        for labels in (SOFT, IDS):
            with pytest.raises(ValueError, match=message):
                loss(logits, labels)
    for loss in (F.weighted_cross_entropy, F.upsampled_cross_entropy):
        with pytest.raises(ValueError, match="`reduction` must be one of 'mean', 'sum', 'none', got 'avg'"):
            loss(LOGITS, IDS, reduction="avg")


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, -1.0], [1.0, math.inf], [], [[1.0]], "rare"])
def test_criterion__refuses_class_weights_where_it_is_made(values: Any) -> None:
    with pytest.raises(TypeError if values == "rare" else ValueError, match="`class_weights` must"):
        ConfidenceWeightedCE(class_weights=values)


def test_criterion__refuses_class_weights_of_other_classes() -> None:
    module = ConfidenceWeightedCE(class_weights=[1, 2])
    for loss in (module, module.upsampled):
        with pytest.raises(ValueError, match=r"shape \(C,\) = \(3,\), got \(2,\)"):
            loss(LOGITS, IDS)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.968, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confidence_weight__counts_at_the_threshold(threshold: float, dtype: torch.dtype) -> None:
    at = torch.tensor(threshold, dtype=dtype)
    below = torch.nextafter(at, torch.tensor(-1.0, dtype=dtype))
    confidence = torch.stack([below, at, at, at])[None, None]
    assert F.confidence_weight(confidence, threshold, scope="pixel").flatten().tolist() == [0, 1, 1, 1]
    assert F.confidence_weight(confidence, threshold).flatten().tolist() == [0.75] * 4
    assert not F.confidence_weight(torch.full_like(confidence, math.nan), threshold).any()


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=examples(40), deadline=None)
def test_confidence_weight__equals_the_loop(n: int, height: int, width: int, threshold: float, seed: int) -> None:
    confidence = torch.rand(n, height, width, generator=seeded(seed), dtype=torch.float64)
    for scope in SCOPES:
        got = F.confidence_weight(confidence, threshold, scope=scope)
        torch.testing.assert_close(got, confidence_weights_by_loop(confidence, threshold, scope), rtol=1e-12, atol=0)
        assert torch.equal(got, ConfidenceWeightedCE(threshold, scope=scope).weights(confidence))
        got[:, 0] = 0  # a map of its own: users blank out the ego-vehicle in it
        assert F.confidence_weight(confidence[:, :0], scope=scope).shape == (n, 0, width)


def test_confidence_weight__refuses_what_is_no_tensor() -> None:
    for weigh in (F.confidence_weight, ConfidenceWeightedCE().weights):
        with pytest.raises(TypeError, match=r"`confidence` must be a torch.Tensor, got ndarray"):
            weigh(np.ones((1, 2, 2), dtype=np.float32))


def test_pseudo_label__is_the_softmax_maximum() -> None:
    logits = torch.randn(2, 5, 3, 4, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    got = F.pseudo_label(logits)
    confidence, labels = softmax(logits.detach()).max(1)
    assert torch.equal(got.labels, labels)
    torch.testing.assert_close(got.confidence, confidence, rtol=1e-12, atol=0)
    torch.testing.assert_close(F.pseudo_label_from_probs(logits.detach().softmax(1)), got, rtol=0, atol=0)
    assert F.pseudo_label(torch.zeros(0, 5, 2, 2)).labels.shape == (0, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.pseudo_label(logits.bfloat16()).confidence.dtype == torch.float32


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_sync__the_mean_over_two_ranks_is_that_of_the_whole_batch(
    normalizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, _, labels, weights, _ = batch()
    valid = labels != 255
    divisors = {"all": labels.numel(), "valid": int(valid.sum()), "weights": float(weights[valid].sum())}
    monkeypatch.setattr(losses, "all_reduce_sum", lambda own: torch.full_like(own, divisors[normalizer]))
    monkeypatch.setattr(losses, "world_size", lambda: 2)
    options = {"normalizer": normalizer, "sync": True}
    parts = [criterion(*(value[i : i + 1] for value in (logits, labels, weights)), **options) for i in (0, 1)]
    torch.testing.assert_close(sum(parts) / 2, criterion(logits, labels, weights, normalizer=normalizer))


def test_sync__lambda_of_the_batch_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    confidence = torch.rand(3, *SIZE, generator=seeded(0))
    others = torch.tensor([float((confidence[1:] >= 0.6).sum()), confidence[1:].numel()])
    monkeypatch.setattr(losses, "all_reduce_sum", lambda own: own + others)
    got = ConfidenceWeightedCE(0.6, scope="batch", sync=True).weights(confidence[:1])
    torch.testing.assert_close(got, F.confidence_weight(confidence, 0.6, scope="batch")[:1])
