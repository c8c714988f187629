"""The cross-entropy of upsampled logits by blocks of rows is that of the logits that were upsampled first."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as tf
from torch.utils.checkpoint import checkpoint

from checks import Watch, examples
from crossmix import ConfidenceWeightedCE, _cross_entropy
from crossmix import functional as F
from crossmix._cross_entropy import sum_by_blocks
from oracles import seeded

NORMALIZERS = ("all", "valid", "weights")
Loss = Callable[..., Tensor]


def plain(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, align_corners: bool = True, **options: Any
) -> Tensor:
    """Full-size logits by torch's own upsampling, then the loss that test_losses.py compares with a loop."""
    full = tf.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
    return F.weighted_cross_entropy(full, labels, weights, **options)


def batch(
    n: int = 2, num_classes: int = 5, small: tuple[int, int] = (6, 9), full: tuple[int, int] = (70, 41), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 logits, labels with ignored and unknown ids (below sizes too), weights with zeros."""
    g = seeded(seed)
    logits = 4 * torch.randn(n, num_classes, *small, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, num_classes + 2, (n, *full), generator=g)
    labels = torch.where(torch.rand(n, *full, generator=g) < 0.2, 255, labels)
    return logits, labels, (torch.rand(n, *full, generator=g, dtype=torch.float64) - 0.1).clamp(min=0)


def with_gradient(loss: Loss, logits: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(leaf, *args, **options)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def assert_agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rtol: float) -> None:
    """Losses relative to themselves, gradients to their largest entry."""
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=1e-14, check_dtype=False)
    bound = rtol * want[1].abs().max().item() if want[1].numel() else 0.0
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=bound + 1e-14, check_dtype=False)


def assert_is_plain(
    *values: Tensor | None, loss: Loss = F.upsampled_cross_entropy, rtol: float = 1e-10, **options: Any
) -> None:
    assert_agree(with_gradient(loss, *values, **options), with_gradient(plain, *values, **options), rtol)


sizes = st.integers(1, 12)


@pytest.mark.parametrize("align_corners", [True, False])
@given(st.integers(0, 3), st.integers(1, 4), sizes, sizes, st.integers(1, 75), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=examples(15), deadline=None)
def test_equals_upsampling_first(
    align_corners: bool, n: int, classes: int, h: int, w: int, height: int, width: int, seed: int
) -> None:
    logits, labels, weights = batch(n, classes, (h, w), (height, width), seed)
    how: dict[str, Any] = {"align_corners": align_corners}
    for i, normalizer in enumerate((*NORMALIZERS, *NORMALIZERS)):
        odd = {"ignore_index": 0, "label_smoothing": 0.1} if i % 2 else {}
        for given_weights in (None, weights, weights[:, 0, 0]):
            assert_is_plain(logits, labels, given_weights, normalizer=normalizer, **how, **odd)
    assert_is_plain(logits, labels, weights, reduction="sum", **how)
    each, want = (loss(logits, labels, weights, reduction="none", **how) for loss in (F.upsampled_cross_entropy, plain))
    torch.testing.assert_close(each, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("small", [(65, 65), (13, 9), (1, 17), (130, 128)])
@pytest.mark.parametrize("full", [(96, 64), (129, 40), (512, 31), (1, 1)])
def test_float32_is_exact_to_rounding(align_corners: bool, small: tuple[int, int], full: tuple[int, int]) -> None:
    logits, labels, weights = (v.float() if v.is_floating_point() else v for v in batch(1, 7, small, full))
    got = with_gradient(F.upsampled_cross_entropy, logits, labels, weights, align_corners=align_corners)
    assert got[0].dtype == got[1].dtype == torch.float32
    exact = with_gradient(plain, logits.double(), labels, weights.double(), align_corners=align_corners)
    assert_agree(got, exact, 1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, -100, 300, 3])
def test_labels_of_every_dtype(dtype: torch.dtype, ignore_index: int) -> None:
    logits, labels, weights = batch()
    labels = labels.clamp(min=0)  # -100 and 300 wrap to ids that uint8 has: those must count
    got = with_gradient(F.upsampled_cross_entropy, logits, labels.to(dtype), weights, ignore_index=ignore_index)
    assert_agree(got, with_gradient(plain, logits, labels, weights, ignore_index=ignore_index), 1e-10)
    assert got[0] > 0


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


@pytest.mark.parametrize("size", [1e4, 1e30, 1.2e38, 1.7e38])
def test_extreme_logits_stay_finite(size: float) -> None:
    logits = torch.tensor([size, -size])[None, :, None, None].expand(1, 2, 2, 2)
    for label, want in ((0, 0.0), (1, 2 * size)):
        labels = torch.full((1, 40, 5), 255)
        labels[0, 20, 2] = label
        loss, gradient = with_gradient(F.upsampled_cross_entropy, logits, labels, reduction="sum")
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1e30, 1e38, 2.5e38, 3e38])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits_give_what_the_plain_form_gives(size: float, smoothing: float) -> None:
    # Above a quarter of the largest number what float32 holds of the loss is infinity, in both.
    logits, labels, _ = batch(2, 3, (4, 5), (31, 18))
    logits, weights = size * logits.float().clamp(-1, 1), torch.zeros(2, 31, 18)
    for place, label in (((0, 5, 7), 1), ((1, 30, 17), 2)):
        weights[place], labels[place] = 0.5, label
    for values in (logits, logits.clamp(min=0), logits.clamp(max=0)):
        got, want = (
            with_gradient(loss, values, labels, weights, label_smoothing=smoothing)
            for loss in (F.upsampled_cross_entropy, plain)
        )
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def neighbours(i: int, size: int, small: int, *, align_corners: bool) -> dict[int, Fraction]:
    """Which small places make up place i of `size`, each by its share, in exact numbers."""
    if align_corners:
        at = Fraction(i * (small - 1), max(size - 1, 1))
    else:
        at = min(max(Fraction((2 * i + 1) * small, 2 * size) - Fraction(1, 2), Fraction(0)), Fraction(small - 1))
    return {k: 1 - abs(at - k) for k in range(small) if abs(at - k) < 1}


def pixel_loss(z: list[float], label: int, smoothing: float) -> float:
    """By the formula; NaN where it has no value."""
    if any(math.isnan(v) or v == math.inf for v in z) or max(z) == -math.inf:
        return math.nan
    partition = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
    loss = (1 - smoothing) * (partition - z[label])
    return loss + smoothing * sum(partition - v for v in z) / len(z) if smoothing else loss


SPECIAL = (math.nan, math.inf, -math.inf, 1e30, -1e30)


@pytest.mark.parametrize("align_corners", [True, False])
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(1, 20), st.integers(1, 7)),
    st.sampled_from(SPECIAL),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 9999),
)
@settings(max_examples=examples(50), deadline=None)
def test_only_pixels_that_count_are_visited(
    align_corners: bool,
    small: tuple[int, int],
    full: tuple[int, int],
    special: float,
    dtype: torch.dtype,
    weighted: bool,
    smoothing: float,
    seed: int,
) -> None:
    logits, labels, weights = batch(2, 3, small, full, seed)
    g = seeded(seed + 1)
    strange = torch.rand(logits.shape, generator=g) < 0.1
    strange[:, 2] &= special != -math.inf  # a network does not rule out every class
    logits = torch.where(strange, special, logits).to(dtype)
    labels[0] = labels[0].where(torch.rand(full, generator=g) < 0.2, 255)
    labels[1] = 255 if seed % 2 else labels[1]
    weights = weights.where(torch.rand(weights.shape, generator=g) < 0.5, 0).to(logits.dtype)
    counted = ((labels >= 0) & (labels < 3) & ((weights != 0) | (not weighted))).nonzero().tolist()
    unheard = labels == 255
    broken = weights.masked_fill(unheard, math.nan) if weighted else None
    reaching = torch.zeros(2, *small, dtype=torch.bool)
    want = 0.0
    for n, row, column in counted:
        z = [0.0] * 3
        for i, share in neighbours(row, full[0], small[0], align_corners=align_corners).items():
            for j, other in neighbours(column, full[1], small[1], align_corners=align_corners).items():
                reaching[n, i, j] = True
                z = [z[c] + float(share * other) * logits[n, c, i, j].item() for c in range(3)]
        weight = weights[n, row, column].item() if weighted else 1.0
        want += weight * pixel_loss(z, int(labels[n, row, column]), smoothing)
    options: dict[str, Any] = {"align_corners": align_corners, "label_smoothing": smoothing, "reduction": "sum"}
    total, gradient = with_gradient(F.upsampled_cross_entropy, logits, labels, broken, **options)
    rounding = 2.0**-21 if total.dtype == torch.float32 else 2.0**-50
    bound = rounding * (1e30 if abs(special) == 1e30 else 1) * len(counted)
    assert total.item() == pytest.approx(want, rel=1e-5, abs=bound, nan_ok=True)
    # What reaches no pixel that counts might as well be 0; and gets nothing.
    heard = logits.where(reaching[:, None], 0)
    quiet = with_gradient(F.upsampled_cross_entropy, heard, labels, broken, **options)
    torch.testing.assert_close((total, gradient), quiet, rtol=0, atol=0, equal_nan=True)
    if not math.isnan(want):
        assert not gradient.masked_fill(reaching[:, None], 0).any()
        assert gradient.isfinite().all()
    for normalizer in NORMALIZERS:
        options |= {"normalizer": normalizer, "reduction": "mean"}
        mean = F.upsampled_cross_entropy(logits, labels, broken, **options)
        silent = F.upsampled_cross_entropy(logits, labels, weights if weighted else None, **options)
        torch.testing.assert_close(mean, silent, rtol=0, atol=0, equal_nan=True)
        assert math.isnan(mean) == math.isnan(want)


def test_every_class_ruled_out_is_nan() -> None:
    logits, labels, _ = batch(2, 4, (3, 3), (16, 16))
    logits[0, :, 1, 1] = -math.inf
    elsewhere = labels.index_fill(0, torch.tensor([0]), 255)
    for loss in (F.upsampled_cross_entropy, plain):
        value, gradient = with_gradient(loss, logits, labels)
        assert value.isnan()
        assert gradient[0].isnan().any()
        assert with_gradient(loss, logits, elsewhere)[0].isfinite()


def test_infinite_label_is_an_infinite_loss() -> None:
    # Where the network rules a class out and the label has it, both forms give infinity and the same gradient.
    logits, labels, _ = batch(1, 4, (9, 9), (64, 64))
    logits[0, 2, 4, 4] = -math.inf
    labels = labels.clamp(max=3)
    one = torch.full_like(labels, 255)
    one[0, 33, 29] = 2  # it takes a little of the infinite logit
    for ruled_out in (labels, labels.masked_fill(labels == 2, 1), one):
        for dtype in (torch.float32, torch.float64):
            got = with_gradient(F.upsampled_cross_entropy, logits.to(dtype), ruled_out)
            want = with_gradient(plain, logits.to(dtype), ruled_out)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
            assert got[0].isinf() == (ruled_out == 2).any()


@pytest.mark.parametrize(("align_corners", "smoothing"), [(True, 0.0), (False, 0.2)])
def test_derivatives(align_corners: bool, smoothing: float) -> None:
    logits, labels, weights = batch(1, 3, (2, 3), (35, 4))
    logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return F.upsampled_cross_entropy(z, labels, weights, align_corners=align_corners, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, logits, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(loss, logits, check_batched_forward_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, logits, check_batched_grad=True, check_fwd_over_rev=True)


def dual(loss: Loss, z: Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(z, z.cos())))


def dual_gradient(loss: Loss, z: Tensor) -> object:
    with forward_ad.dual_level():
        leaf = forward_ad.make_dual(z.clone().requires_grad_(), z.cos())
        return forward_ad.unpack_dual(torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0])


def checkpointed(loss: Loss, z: Tensor, *, use_reentrant: bool) -> object:
    leaf = z.clone().requires_grad_()
    value = checkpoint(loss, leaf, use_reentrant=use_reentrant)
    return value.detach(), torch.autograd.grad(value, leaf) if not use_reentrant else value.backward() or leaf.grad


def penalty(loss: Loss, z: Tensor) -> object:
    """On the gradient: what comes into the backward pass is a constant, and it must not cut the graph."""
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    return torch.autograd.grad((gradient**2).sum(), leaf)


TRANSFORMS: dict[str, Callable[[Loss, Tensor], object]] = {
    "grad": lambda f, z: func.grad(f)(z),
    "grad_and_value": lambda f, z: func.grad_and_value(f)(z),
    "jacrev": lambda f, z: func.jacrev(f)(z),
    "jvp": lambda f, z: func.jvp(f, (z,), (z.cos(),)),
    "jacfwd": lambda f, z: func.jacfwd(f)(z),
    "hessian": lambda f, z: func.hessian(f)(z),
    "jacrev of jacrev": lambda f, z: func.jacrev(func.jacrev(f))(z),
    "jacfwd of jacfwd": lambda f, z: func.jacfwd(func.jacfwd(f))(z),
    "grad along a line": lambda f, z: func.grad(lambda t: func.jvp(f, (t * z,), (z.cos(),))[1])(z.new_ones(())),
    "vmap": lambda f, z: func.vmap(f)(torch.stack([z, z.sin()])),
    "vmap of grad": lambda f, z: func.vmap(func.grad(f))(torch.stack([z, z.sin()])),
    "grad of vmap": lambda f, z: func.grad(lambda t: func.vmap(f)(torch.stack([t, t.sin()])).sum())(z),
    "dual numbers": dual,
    "dual numbers of a gradient": dual_gradient,
    "autograd hessian": torch.autograd.functional.hessian,
    "autograd hessian, forward mode": lambda f, z: torch.autograd.functional.hessian(
        f, z, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd jvp": lambda f, z: torch.autograd.functional.jvp(f, z, z.cos()),
    "autograd hvp": lambda f, z: torch.autograd.functional.hvp(f, z, z.cos()),
    "penalty": penalty,
    "checkpoint": lambda f, z: checkpointed(f, z, use_reentrant=False),
    "reentrant checkpoint": lambda f, z: checkpointed(f, z, use_reentrant=True),
    "inference mode": lambda f, z: torch.inference_mode()(f)(z) + 0,
}


def assert_transformed(transform: str, one: Loss, other: Loss, at: Tensor) -> None:
    torch.testing.assert_close(TRANSFORMS[transform](one, at), TRANSFORMS[transform](other, at), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str) -> None:
    logits, labels, weights = batch(2, 3, (3, 2), (20, 5))
    for given_weights, options in (
        (None, {"normalizer": "valid"}),
        (weights, {"align_corners": False, "label_smoothing": 0.1, "reduction": "sum"}),
        (weights, {"class_weights": torch.tensor([1.0, 0.5, 2.0])}),
    ):
        losses = (
            partial(loss, labels=labels, weights=given_weights, **options)
            for loss in (F.upsampled_cross_entropy, plain)
        )
        assert_transformed(transform, *losses, logits)


def test_transforms_of_the_weights_and_of_the_criterion() -> None:
    logits, labels, weights = batch(2, 3, (3, 2), (20, 5))
    criterion = ConfidenceWeightedCE(normalizer="weights")
    for transform in ("grad", "jvp", "jacfwd", "vmap", "dual numbers"):
        of_weights = (
            lambda w, loss=loss: loss(logits, labels, w, normalizer="weights")
            for loss in (F.upsampled_cross_entropy, plain)
        )
        assert_transformed(transform, *of_weights, weights)
        of_criterion = partial(plain, labels=labels, weights=weights, normalizer="weights")
        assert_transformed(
            transform, partial(criterion.upsampled, labels=labels, weights=weights), of_criterion, logits
        )


def test_samples_of_their_own_labels_and_none() -> None:
    logits, labels, weights = batch(3, 4, (3, 2), (20, 5))
    got, want = (
        func.vmap(func.grad(lambda z, y, w, loss=loss: loss(z[None], y[None], w[None])))(logits, labels, weights)
        for loss in (F.upsampled_cross_entropy, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)
    empty = labels[:, :0]
    assert not func.grad(lambda z: F.upsampled_cross_entropy(z, empty))(logits).any()
    assert F.upsampled_cross_entropy(logits, empty, reduction="none").shape == (3, 0, 5)


@pytest.mark.usefixtures("process_group")
def test_tensors_over_ranks_take_the_plain_form() -> None:
    logits, labels, weights = batch()
    want = with_gradient(F.upsampled_cross_entropy, logits, labels, weights)
    mesh = DeviceMesh("cpu", [0])
    spread = [distribute_tensor(value, mesh, [Shard(0)]) for value in (logits, labels, weights)]
    spread[0].requires_grad_()
    loss = F.upsampled_cross_entropy(*spread)
    loss.backward()
    assert_agree((loss.full_tensor().detach(), spread[0].grad.full_tensor()), want, 1e-10)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_criterion__and_a_subclass_with_a_loss_of_its_own(normalizer: str, align_corners: bool) -> None:
    class Doubled(ConfidenceWeightedCE):
        def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
            return super().forward(logits, labels, weights) * 2

    values, options = batch(), {"ignore_index": 3, "normalizer": normalizer, "label_smoothing": 0.1}
    want = with_gradient(plain, *values, align_corners=align_corners, **options)
    for kind, factor in ((ConfidenceWeightedCE, 1), (Doubled, 2)):
        criterion = kind(sync=True, **options)
        got = with_gradient(criterion.upsampled, *values, align_corners=align_corners)
        assert_agree(got, (factor * want[0], factor * want[1]), 1e-10)


def test_full_size_logits_never_exist() -> None:
    logits, labels, weights = batch(1, 16, (17, 17), (256, 128))
    options: dict[str, Any] = {"ignore_index": 255, "label_smoothing": 0.1, "with_gradient": True}
    with Watch() as seen:
        sum_by_blocks(logits, labels, weights, align_corners=True, **options)
    assert seen.largest == 2 * 256 * 128  # two marks per pixel; blocks of logits have 16 rows
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        F.upsampled_cross_entropy(logits.requires_grad_(), labels, weights)
    assert sum(tensor.numel() for tensor in kept if tensor.is_floating_point()) < 256 * 128 + 3 * logits.numel()


def test_gradient_is_made_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels, _ = batch()
    told: list[bool] = []

    def operator(logits: Tensor, *_: object, with_gradient: bool, **__: object) -> tuple[Tensor, Tensor]:
        told.append(with_gradient)
        return logits.sum(), logits

    monkeypatch.setattr(_cross_entropy, "_operator", operator)
    assert not F.upsampled_cross_entropy(logits, labels).requires_grad
    F.upsampled_cross_entropy(logits.requires_grad_(), labels)
    with torch.no_grad():
        F.upsampled_cross_entropy(logits, labels)
    assert told == [False, True, False]


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


def test_compiled__keeps_the_operator_but_under_transforms() -> None:
    logits, labels, weights = batch(2, 3, (3, 2), (20, 5))
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    def loss(z: Tensor) -> Tensor:
        return F.upsampled_cross_entropy(z, labels, weights)

    def first(z: Tensor) -> object:
        return func.grad(loss)(z)

    for function, kept in ((loss, True), (first, False), (lambda z: func.jvp(loss, (z,), (z.cos(),)), False)):
        torch.compiler.reset()
        got = torch.compile(function, fullgraph=True, backend=backend)(logits)
        torch.testing.assert_close(got, function(logits), rtol=1e-12, atol=0)
        assert ("upsampled_cross_entropy_sum" in graphs.pop()) == kept
        assert not graphs


@pytest.mark.gpu
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
