"""The cross-entropy of upsampled logits by blocks of rows is that of the logits that were upsampled first."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as tf
from torch.utils._python_dispatch import TorchDispatchMode

from crossmix import ConfidenceWeightedCE
from crossmix import functional as F
from crossmix._cross_entropy import sum_by_blocks
from oracles import seeded

NORMALIZERS = ("all", "valid", "weights")
Layout = Callable[[Tensor], Tensor]


def plain(logits: Tensor, labels: Tensor, weights: Tensor | None = None, **options: Any) -> Tensor:
    """Full-size logits by torch's own upsampling, then the loss that test_losses.py compares with a loop."""
    full = tf.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=True)
    return F.weighted_cross_entropy(full, labels, weights, **options)


def batch(
    n: int = 2, num_classes: int = 5, small: tuple[int, int] = (6, 9), full: tuple[int, int] = (70, 41), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits, labels with ignored and unknown ids, weights with zeros."""
    g = seeded(seed)
    logits = 4 * torch.randn(n, num_classes, *small, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, num_classes + 2, (n, *full), generator=g)
    labels = torch.where(torch.rand(n, *full, generator=g) < 0.2, 255, labels)
    return logits, labels, (torch.rand(n, *full, generator=g, dtype=torch.float64) - 0.1).clamp(min=0)


def with_gradient(loss: Callable[..., Tensor], logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rtol: float) -> None:
    """Losses relative to themselves, gradients to their largest entry."""
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=1e-14, check_dtype=False)
    bound = rtol * want[1].abs().max().item() if want[1].numel() else 0.0
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=bound + 1e-14, check_dtype=False)


sizes = st.integers(1, 12)


@given(st.integers(0, 3), st.integers(1, 4), sizes, sizes, st.integers(1, 75), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equals_upsampling_first(n: int, classes: int, h: int, w: int, height: int, width: int, seed: int) -> None:
    logits, labels, weights = batch(n, classes, (h, w), (height, width), seed)
    for given_weights in (None, weights, weights[:, 0, 0]):
        for normalizer in NORMALIZERS:
            for ignore_index, smoothing in ((255, 0.0), (0, 0.1)):
                options: dict[str, Any] = {
                    "ignore_index": ignore_index,
                    "normalizer": normalizer,
                    "label_smoothing": smoothing,
                }
                got = with_gradient(F.upsampled_cross_entropy, logits, labels, given_weights, **options)
                assert_agree(got, with_gradient(plain, logits, labels, given_weights, **options), 1e-10)
    total = with_gradient(F.upsampled_cross_entropy, logits, labels, weights, reduction="sum")
    assert_agree(total, with_gradient(plain, logits, labels, weights, reduction="sum"), 1e-10)
    each = F.upsampled_cross_entropy(logits, labels, weights, reduction="none")
    torch.testing.assert_close(each, plain(logits, labels, weights, reduction="none"), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("full", [(65, 65), (96, 64), (97, 63), (129, 40), (512, 31), (31, 33), (1, 1), (5, 7)])
@pytest.mark.parametrize("small", [(65, 65), (13, 9), (1, 17), (17, 1), (2, 2)])
def test_float32_is_exact_to_rounding(small: tuple[int, int], full: tuple[int, int]) -> None:
    logits, labels, weights = batch(1, 7, small, full)
    got = with_gradient(F.upsampled_cross_entropy, logits.float(), labels, weights.float())
    assert got[0].dtype == got[1].dtype == torch.float32
    exact = with_gradient(plain, logits.float().double(), labels, weights.float().double())
    assert_agree(got, exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, -100, 300, 3])
def test_labels_of_every_dtype(dtype: torch.dtype, ignore_index: int) -> None:
    logits, labels, weights = batch()
    labels = labels.clamp(min=0)  # -100 and 300 wrap to ids that uint8 has: those must count
    got = with_gradient(F.upsampled_cross_entropy, logits, labels.to(dtype), weights, ignore_index=ignore_index)
    want = with_gradient(plain, logits, labels, weights, ignore_index=ignore_index)
    assert_agree(got, want, 1e-10)
    assert got[0] > 0


@pytest.mark.parametrize(
    "layout",
    [
        lambda value: value.mT.contiguous().mT,
        lambda value: torch.stack([value, value], -1).flatten(-2)[..., ::2],
        lambda value: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value,
        lambda value: value[:1].expand_as(value),
    ],
    ids=["transposed", "strided", "channels last", "expanded"],
)
def test_layouts(layout: Layout) -> None:
    logits, labels, weights = (layout(value) for value in batch())
    got = with_gradient(F.upsampled_cross_entropy, logits, labels, weights)
    assert_agree(got, with_gradient(plain, *(v.contiguous() for v in (logits, labels, weights))), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    logits, labels, weights = batch()
    narrow = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, gradient = with_gradient(F.upsampled_cross_entropy, narrow, labels, weights.float())
    want_loss, want_gradient = with_gradient(F.upsampled_cross_entropy, narrow.float(), labels, weights.float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, want_loss)
    assert torch.equal(gradient, want_gradient.to(dtype))
    double = F.upsampled_cross_entropy(narrow, labels, weights)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double, plain(narrow.double(), labels, weights), rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(
    ("n", "small", "full"),
    [(0, (3, 4), (40, 9)), (2, (3, 4), (0, 9)), (2, (3, 4), (9, 0)), (2, (0, 4), (0, 9)), (2, (3, 4), (40, 9))],
)
def test_degenerate_batches_are_zero(n: int, small: tuple[int, int], full: tuple[int, int], normalizer: str) -> None:
    logits, _, weights = batch(n, 4, small, full)
    options: dict[str, Any] = {"normalizer": normalizer}
    for name in (255, 200, -3):
        labels = torch.full((n, *full), name)
        for given_weights in (None, weights, torch.zeros(n)):
            loss, gradient = with_gradient(F.upsampled_cross_entropy, logits, labels, given_weights, **options)
            assert loss.item() == 0
            assert not gradient.any()
    unweighted = torch.zeros(n, *full, dtype=torch.long), torch.zeros(n)
    loss, gradient = with_gradient(F.upsampled_cross_entropy, logits, *unweighted, **options)
    assert loss.item() == 0
    assert not gradient.any()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_stay_finite(size: float) -> None:
    logits = torch.tensor([size, -size])[None, :, None, None].expand(1, 2, 2, 2)
    for label, want in ((0, 0.0), (1, 2 * size)):
        loss, gradient = with_gradient(F.upsampled_cross_entropy, logits, torch.full((1, 40, 5), label))
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_derivatives(smoothing: float) -> None:
    logits, labels, weights = batch(1, 3, (2, 3), (35, 4))
    logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return F.upsampled_cross_entropy(z, labels, weights, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)
    assert torch.autograd.gradcheck(loss, logits, check_batched_grad=True)


def test_second_derivative_is_there_without_a_differentiable_loss_gradient() -> None:
    # A penalty on the gradient: what comes into the backward pass is a constant, and it must not cut the graph.
    logits, labels, _ = batch()
    logits.requires_grad_()
    penalties = []
    for loss in (F.upsampled_cross_entropy, plain):
        (gradient,) = torch.autograd.grad(loss(logits, labels), logits, create_graph=True)
        penalties.append(torch.autograd.grad((gradient**2).sum(), logits)[0])
    torch.testing.assert_close(*penalties, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weights_get_their_gradient(normalizer: str) -> None:
    logits, labels, weights = batch()
    gradients = []
    for loss in (F.upsampled_cross_entropy, plain):
        leaves = logits.clone().requires_grad_(), weights.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaves[0], labels, leaves[1], normalizer=normalizer), leaves))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("sync", [False, True])
def test_criterion(normalizer: str, sync: bool) -> None:
    logits, labels, weights = batch()
    criterion = ConfidenceWeightedCE(ignore_index=3, normalizer=normalizer, label_smoothing=0.1, sync=sync)
    want = with_gradient(plain, logits, labels, weights, ignore_index=3, normalizer=normalizer, label_smoothing=0.1)
    assert_agree(with_gradient(criterion.upsampled, logits, labels, weights), want, 1e-10)


def test_criterion__a_subclass_keeps_its_own_loss() -> None:
    class Halved(ConfidenceWeightedCE):
        def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
            return super().forward(logits, labels, weights) / 2

    logits, labels, weights = batch()
    torch.testing.assert_close(
        Halved().upsampled(logits, labels, weights), ConfidenceWeightedCE().upsampled(logits, labels, weights) / 2
    )


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation made, and what the operators of crossmix were told."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.gradients: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "crossmix":
            assert kwargs is not None
            self.gradients.append(kwargs["with_gradient"])
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_full_size_logits_never_exist() -> None:
    logits, labels, weights = batch(1, 16, (17, 17), (256, 128))
    options: dict[str, Any] = {"ignore_index": 255, "label_smoothing": 0.1, "with_gradient": True}
    with Largest() as seen:
        sum_by_blocks(logits, labels, weights, align_corners=True, **options)
    assert seen.bytes == 8 * 16 * 17 * 128  # the widened logits; blocks have 16 rows
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        F.upsampled_cross_entropy(logits.requires_grad_(), labels, weights)
    assert sum(tensor.numel() for tensor in kept if tensor.is_floating_point()) < 256 * 128 + 3 * logits.numel()


def test_gradient_is_made_where_it_is_wanted() -> None:
    logits, labels, _ = batch()
    with Largest() as seen:
        F.upsampled_cross_entropy(logits, labels)
        F.upsampled_cross_entropy(logits.requires_grad_(), labels)
        with torch.no_grad():
            F.upsampled_cross_entropy(logits, labels)
    assert seen.gradients == [False, True, False]
    assert not F.upsampled_cross_entropy(logits.detach(), labels).requires_grad


@pytest.mark.parametrize("weighted", [False, True])
def test_operator(weighted: bool) -> None:
    logits, labels, weights = batch()
    for wanted in (False, True):
        torch.library.opcheck(
            torch.ops.crossmix.upsampled_cross_entropy_sum.default,
            (logits.clone().requires_grad_(wanted), labels, weights if weighted else None),
            {"align_corners": True, "ignore_index": 255, "label_smoothing": 0.1, "with_gradient": wanted},
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, while it loads the compiler
def test_compiled_equals_eager(backend: str) -> None:
    torch.compiler.reset()
    logits, labels, weights = batch()

    def loss(z: Tensor, criterion: ConfidenceWeightedCE) -> Tensor:
        return criterion.upsampled(z, labels, weights) + F.upsampled_cross_entropy(z, labels.to(torch.uint8))

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    criterion = ConfidenceWeightedCE(normalizer="weights", sync=True)
    assert_agree(with_gradient(compiled, logits, criterion), with_gradient(loss, logits, criterion), 1e-12)
    with torch.no_grad():
        torch.testing.assert_close(compiled(logits, criterion), loss(logits, criterion))


def test_logits_without_pixels_are_refused() -> None:
    logits, labels, _ = batch(small=(0, 3))
    for loss in (F.upsampled_cross_entropy, ConfidenceWeightedCE().upsampled):
        with pytest.raises(ValueError, match=r"must have pixels to be upsampled to \(70, 41\), got \(2, 5, 0, 3\)"):
            loss(logits, labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cuda_equals_cpu_without_waiting(smoothing: float) -> None:
    logits, labels, weights = batch(full=(300, 41))
    want = with_gradient(plain, logits, labels, weights, label_smoothing=smoothing)
    on_gpu = tuple(value.cuda() for value in (logits, labels, weights))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            got = with_gradient(F.upsampled_cross_entropy, *on_gpu, label_smoothing=smoothing)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert_agree((got[0].cpu(), got[1].cpu()), want, 1e-10)
