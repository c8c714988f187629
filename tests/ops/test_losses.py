"""Confidence weights and the weighted cross-entropy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as tf

from crossmix import ConfidenceWeightedCE
from crossmix import functional as F
from oracles import confidence_weights_by_loop, cross_entropy_by_loop, seeded

NORMALIZERS = ("all", "valid", "weights")


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_weighted_cross_entropy__equals_the_loop(n: int, height: int, width: int, num_classes: int, seed: int) -> None:
    g = seeded(seed)
    logits = torch.randn(n, num_classes, height, width, generator=g, dtype=torch.float64) * 5
    labels = torch.randint(-1, num_classes + 2, (n, height, width), generator=g)
    labels = torch.where(torch.rand(labels.shape, generator=g) < 0.3, 255, labels)
    options = [None, torch.rand(n, height, width, generator=g), torch.rand(n, generator=g)]
    for weights in options:
        for normalizer in NORMALIZERS:
            for ignore_index, smoothing in ((255, 0.0), (0, 0.1)):
                got = F.weighted_cross_entropy(
                    logits, labels, weights, ignore_index=ignore_index, normalizer=normalizer, label_smoothing=smoothing
                )
                want = cross_entropy_by_loop(logits, labels, weights, ignore_index, normalizer, smoothing)
                assert float(got) == pytest.approx(want, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weighted_cross_entropy__is_torchs_where_they_mean_the_same(dtype: torch.dtype, smoothing: float) -> None:
    logits = torch.randn(2, 5, 6, 7, generator=seeded(0))
    labels = torch.randint(0, 5, (2, 6, 7), generator=seeded(1))
    labels[0, 0] = 255
    got = F.weighted_cross_entropy(logits, labels.to(dtype), normalizer="valid", label_smoothing=smoothing)
    want = tf.cross_entropy(logits, labels, ignore_index=255, label_smoothing=smoothing)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    each = F.weighted_cross_entropy(logits, labels.to(dtype), reduction="none")
    torch.testing.assert_close(each, tf.cross_entropy(logits, labels, ignore_index=255, reduction="none"))
    total = F.weighted_cross_entropy(logits, labels.to(dtype), reduction="sum")
    torch.testing.assert_close(total, each.sum())


@pytest.mark.parametrize("upsampled", [False, True])
def test_weighted_cross_entropy__weights_of_classes_are_torchs(upsampled: bool) -> None:
    logits = torch.randn(2, 5, 6, 7, generator=seeded(0), dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 6, 7), generator=seeded(1))
    labels[0, 0] = 255
    class_weights = torch.rand(5, generator=seeded(2), dtype=torch.float64)
    loss = F.upsampled_cross_entropy if upsampled else F.weighted_cross_entropy
    got = loss(logits, labels, class_weights[labels.clamp(0, 4)], normalizer="weights")
    torch.testing.assert_close(got, tf.cross_entropy(logits, labels, weight=class_weights, ignore_index=255))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weighted_cross_entropy__gradients(normalizer: str) -> None:
    logits = torch.randn(2, 3, 2, 4, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    labels = torch.randint(0, 3, (2, 2, 4), generator=seeded(1))
    labels[0, 0, :2] = 255
    weights = torch.rand(2, 2, 4, dtype=torch.float64, generator=seeded(2))
    assert torch.autograd.gradcheck(
        lambda z: F.weighted_cross_entropy(z, labels, weights, normalizer=normalizer, label_smoothing=0.1), logits
    )
    F.weighted_cross_entropy(logits, labels, weights, normalizer=normalizer).backward()
    assert logits.grad is not None
    assert not logits.grad[0, :, 0, :2].any()  # ignored pixels get exactly nothing
    assert logits.grad[0, :, 1].any()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("shape", [(2, 3, 3), (0, 3, 3), (2, 0, 3)])
def test_weighted_cross_entropy__degenerate_batches_are_zero(normalizer: str, shape: tuple[int, int, int]) -> None:
    logits = torch.randn(shape[0], 4, *shape[1:], requires_grad=True)
    for weights in (None, torch.zeros(shape)):
        for labels in (torch.full(shape, 255), torch.full(shape, 200)):
            loss = F.weighted_cross_entropy(logits, labels, weights, normalizer=normalizer)
            assert float(loss.detach()) == 0.0
            (grad,) = torch.autograd.grad(loss, logits)
            assert not grad.any()
    loss = F.weighted_cross_entropy(
        logits, torch.zeros(shape, dtype=torch.long), torch.zeros(shape), normalizer=normalizer
    )
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weighted_cross_entropy__extreme_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([1e4, -1e4]).to(dtype)[None, :, None, None].requires_grad_()
    right = F.weighted_cross_entropy(logits, torch.tensor([[[0]]]))
    wrong = F.weighted_cross_entropy(logits, torch.tensor([[[1]]]))
    assert right.dtype == wrong.dtype == torch.float32
    assert float(right.detach()) == 0.0
    assert float(wrong.detach()) == pytest.approx(float(logits.detach().float()[0, 0]) * 2, rel=1e-6)
    wrong.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("silence", ["ignored", "unknown label", "weight 0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy__what_does_not_count_adds_exactly_nothing(
    value: float, silence: str, dtype: torch.dtype, smoothing: float
) -> None:
    g = seeded(0)
    logits = torch.randn(2, 3, 4, 5, generator=g).to(dtype)
    labels, weights = torch.randint(0, 3, (2, 4, 5), generator=g), torch.rand(2, 4, 5, generator=g) + 0.1
    quiet = torch.rand(2, 4, 5, generator=g) < 0.4
    quiet[1] = True
    strange = logits.masked_fill(quiet[:, None] & (torch.rand(logits.shape, generator=g) < 0.7), value)
    options: list[torch.Tensor | None] = [weights.masked_fill(quiet, 0)]
    if silence != "weight 0":
        labels = labels.masked_fill(quiet, 255 if silence == "ignored" else -7)
        options = [None, weights.masked_fill(quiet, math.nan), weights.masked_fill(quiet, math.inf), weights]
    for given_weights in options:
        clean = given_weights if given_weights is None else weights.masked_fill(quiet, 0)
        for normalizer in NORMALIZERS:
            for criterion in (False, True):
                results = []
                for z, w in ((strange, given_weights), (logits, clean)):
                    leaf = z.clone().requires_grad_()
                    if criterion:
                        module = ConfidenceWeightedCE(normalizer=normalizer, label_smoothing=smoothing)
                        loss = module(leaf, labels, w)
                    else:
                        loss = F.weighted_cross_entropy(
                            leaf, labels, w, normalizer=normalizer, label_smoothing=smoothing
                        )
                    results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
                torch.testing.assert_close(*results, rtol=0, atol=0)
                assert not results[0][1].masked_fill(~quiet[:, None], 0).any()
                assert results[0][1].any()
        each = F.weighted_cross_entropy(strange, labels, given_weights, label_smoothing=smoothing, reduction="none")
        assert not each[quiet].any()
        assert (each[~quiet] > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weighted_cross_entropy__what_counts_is_not_hidden(value: float) -> None:
    logits, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])
    logits[0, 0, 0, 0] = value
    assert F.weighted_cross_entropy(logits, labels).isnan()
    assert F.weighted_cross_entropy(logits, labels, torch.tensor([[[0.5, 0.0]]])).isnan()
    assert F.weighted_cross_entropy(torch.zeros(1, 2, 1, 2), labels, torch.full((1, 1, 2), math.nan)).isnan()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weighted_cross_entropy__weights_of_zero_have_a_gradient(normalizer: str) -> None:
    logits = torch.randn(1, 3, 2, 4, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    labels = torch.tensor([[[0, 1, 2, 255], [2, 1, 0, 7]]])
    weights = torch.tensor([[[0.0, 0.5, 0.0, 1.0], [1.0, 0.0, 2.0, 0.0]]], dtype=torch.float64, requires_grad=True)

    def loss(z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.weighted_cross_entropy(z, labels, w, normalizer=normalizer)

    assert torch.autograd.gradcheck(loss, (logits, weights))
    assert torch.autograd.gradgradcheck(loss, (logits, weights))


def test_weighted_cross_entropy__valid_pixels_are_counted_by_classes_not_by_height() -> None:
    logits = torch.randn(2, 3, 9, 8, generator=seeded(0))
    labels = torch.randint(0, 8, (2, 9, 8), generator=seeded(1))  # ids between C and every height and width
    want = tf.cross_entropy(logits, labels.masked_fill(labels >= 3, 255), ignore_index=255)
    torch.testing.assert_close(F.weighted_cross_entropy(logits, labels, normalizer="valid"), want)
    torch.testing.assert_close(ConfidenceWeightedCE(normalizer="valid")(logits, labels), want)
    ones = torch.ones(2)
    torch.testing.assert_close(ConfidenceWeightedCE(normalizer="weights")(logits, labels, ones), want)


LOGITS, LABELS = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
LOSSES = {
    "weighted_cross_entropy": F.weighted_cross_entropy,
    "upsampled_cross_entropy": F.upsampled_cross_entropy,
    "criterion": ConfidenceWeightedCE(),
    "criterion.upsampled": ConfidenceWeightedCE().upsampled,
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses__refuse_what_is_no_tensor_or_of_another_dtype(loss: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(TypeError, match=r"`logits` must be a torch.Tensor, got ndarray; convert it"):
        loss(LOGITS.numpy(), LABELS)
    with pytest.raises(TypeError, match=r"`labels` must be a torch.Tensor, got ndarray; convert it"):
        loss(LOGITS, LABELS.numpy())
    with pytest.raises(TypeError, match=r"`weights` must be a torch.Tensor, got ndarray; convert it"):
        loss(LOGITS, LABELS, np.ones(2, dtype=np.float32))
    with pytest.raises(TypeError, match=r"`labels` must be uint8, int16, int32 or int64, got torch.float32"):
        loss(LOGITS, LABELS.float())
    with pytest.raises(TypeError, match=r"`logits` must be floating, got torch.int64"):
        loss(LOGITS.long(), LABELS)
    with pytest.raises(TypeError, match=r"`weights` must be floating, got torch.bool"):
        loss(LOGITS, LABELS, LABELS > 0)
    with pytest.raises(ValueError, match=r"`weights` must have shape \(N, H, W\) = \(2, 4, 5\) or \(N,\), got \(3,\)"):
        loss(LOGITS, LABELS, torch.ones(3))


def test_confidence_weight__refuses_what_is_no_tensor() -> None:
    for weigh in (F.confidence_weight, ConfidenceWeightedCE().weights):
        with pytest.raises(TypeError, match=r"`confidence` must be a torch.Tensor, got ndarray"):
            weigh(np.ones((1, 2, 2), dtype=np.float32))


def test_losses__under_another_default_device() -> None:
    small, labels, weights = LOGITS[..., :2, :3], LABELS, torch.rand(2, 4, 5)
    want = [loss(LOGITS, labels, weights) for loss in LOSSES.values()] + [F.upsampled_cross_entropy(small, labels)]
    with torch.device("meta"):
        got = [loss(LOGITS, labels, weights) for loss in LOSSES.values()] + [F.upsampled_cross_entropy(small, labels)]
        for scope in ("image", "batch", "pixel", "none"):
            assert F.confidence_weight(weights, scope=scope).device.type == "cpu"
    torch.testing.assert_close(got, want)


def test_losses__arithmetic_is_float32_under_autocast_and_float64_where_an_input_is() -> None:
    logits, labels = torch.randn(1, 3, 4, 4, dtype=torch.bfloat16), torch.randint(0, 3, (1, 4, 4))
    want = F.weighted_cross_entropy(logits.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        got = F.weighted_cross_entropy(logits, labels)
        assert torch.equal(got, want)
        assert F.pseudo_label(logits).confidence.dtype == torch.float32
        assert F.confidence_weight(torch.rand(1, 2, 2).bfloat16()).dtype == torch.float32
    assert F.weighted_cross_entropy(logits.double(), labels).dtype == torch.float64
    assert F.weighted_cross_entropy(logits, labels, torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert F.confidence_weight(torch.rand(1, 2, 2, dtype=torch.float64)).dtype == torch.float64


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
@settings(max_examples=60, deadline=None)
def test_confidence_weight__equals_the_loop(n: int, height: int, width: int, threshold: float, seed: int) -> None:
    confidence = torch.rand(n, height, width, generator=seeded(seed), dtype=torch.float64)
    if confidence.numel():
        confidence[0, 0, 0] = threshold  # at the threshold counts
    for scope in ("image", "batch", "pixel", "none"):
        got = F.confidence_weight(confidence, threshold, scope=scope)
        torch.testing.assert_close(got, confidence_weights_by_loop(confidence, threshold, scope), rtol=1e-12, atol=0)
        assert torch.equal(got, ConfidenceWeightedCE(threshold, scope=scope).weights(confidence))
        got[:, 0] = 0  # a map of its own: users blank out the ego-vehicle in it


def test_confidence_weight__empty_maps() -> None:
    for shape in ((0, 3, 3), (2, 0, 3)):
        for scope in ("image", "batch", "pixel", "none"):
            assert F.confidence_weight(torch.rand(shape), scope=scope).shape == shape


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_criterion__is_the_function(normalizer: str, smoothing: float) -> None:
    logits = torch.randn(2, 3, 4, 4, generator=seeded(0))
    labels = torch.randint(0, 4, (2, 4, 4), generator=seeded(1))
    weights = torch.rand(2, 4, 4, generator=seeded(2))
    criterion = ConfidenceWeightedCE(ignore_index=3, normalizer=normalizer, label_smoothing=smoothing)
    want = F.weighted_cross_entropy(
        logits, labels, weights, ignore_index=3, normalizer=normalizer, label_smoothing=smoothing
    )
    torch.testing.assert_close(criterion(logits, labels, weights), want)
    alone = ConfidenceWeightedCE(ignore_index=3, normalizer=normalizer, label_smoothing=smoothing, sync=True)
    torch.testing.assert_close(alone(logits, labels, weights), want)  # sync without a process group
    assert not criterion.state_dict()
    assert f"normalizer={normalizer!r}" in repr(criterion)


def test_pseudo_label__is_the_softmax_maximum() -> None:
    logits = torch.randn(2, 5, 3, 4, generator=seeded(0), dtype=torch.float64, requires_grad=True)
    labels, confidence = F.pseudo_label(logits)
    assert labels.dtype == torch.int64
    assert not confidence.requires_grad
    for i in range(2):
        for row in range(3):
            for column in range(4):
                z = logits[i, :, row, column].tolist()
                p = [math.exp(v) / sum(math.exp(u) for u in z) for v in z]
                assert int(labels[i, row, column]) == p.index(max(p))
                assert float(confidence[i, row, column]) == pytest.approx(max(p), rel=1e-12)
    again = F.pseudo_label_from_probs(logits.detach().softmax(1))
    assert torch.equal(again.labels, labels)
    assert torch.equal(again.confidence, confidence)
    assert F.pseudo_label(torch.zeros(0, 5, 2, 2)).labels.shape == (0, 2, 2)
