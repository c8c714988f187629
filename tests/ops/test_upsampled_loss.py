"""The cross-entropy of upsampled logits by blocks of rows is that of the logits that were upsampled first."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, func, nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from checks import channels_last, strided, transposed
from crossmix import ConfidenceWeightedCE
from crossmix import functional as F
from crossmix._cross_entropy import sum_by_blocks
from oracles import seeded

NORMALIZERS = ("all", "valid", "weights")
Layout = Callable[[Tensor], Tensor]


def plain(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, align_corners: bool = True, **options: Any
) -> Tensor:
    """Full-size logits by torch's own upsampling, then the loss that test_losses.py compares with a loop."""
    full = tf.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=align_corners)
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


@pytest.mark.parametrize("align_corners", [True, False])
@given(st.integers(0, 3), st.integers(1, 4), sizes, sizes, st.integers(1, 75), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_equals_upsampling_first(
    align_corners: bool, n: int, classes: int, h: int, w: int, height: int, width: int, seed: int
) -> None:
    logits, labels, weights = batch(n, classes, (h, w), (height, width), seed)
    for given_weights in (None, weights, weights[:, 0, 0]):
        for normalizer in NORMALIZERS:
            for ignore_index, smoothing in ((255, 0.0), (0, 0.1)):
                options: dict[str, Any] = {
                    "align_corners": align_corners,
                    "ignore_index": ignore_index,
                    "normalizer": normalizer,
                    "label_smoothing": smoothing,
                }
                got = with_gradient(F.upsampled_cross_entropy, logits, labels, given_weights, **options)
                assert_agree(got, with_gradient(plain, logits, labels, given_weights, **options), 1e-10)
    options = {"align_corners": align_corners, "reduction": "sum"}
    total = with_gradient(F.upsampled_cross_entropy, logits, labels, weights, **options)
    assert_agree(total, with_gradient(plain, logits, labels, weights, **options), 1e-10)
    options["reduction"] = "none"
    each = F.upsampled_cross_entropy(logits, labels, weights, **options)
    torch.testing.assert_close(each, plain(logits, labels, weights, **options), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("full", [(65, 65), (96, 64), (97, 63), (129, 40), (512, 31), (31, 33), (1, 1), (5, 7)])
@pytest.mark.parametrize("small", [(65, 65), (13, 9), (1, 17), (17, 1), (2, 2), (130, 128)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_float32_is_exact_to_rounding(align_corners: bool, small: tuple[int, int], full: tuple[int, int]) -> None:
    logits, labels, weights = batch(1, 7, small, full)
    options = {"align_corners": align_corners}
    got = with_gradient(F.upsampled_cross_entropy, logits.float(), labels, weights.float(), **options)
    assert got[0].dtype == got[1].dtype == torch.float32
    exact = with_gradient(plain, logits.float().double(), labels, weights.float().double(), **options)
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
    [transposed, strided, channels_last, lambda value: value[:1].expand_as(value)],
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
    logits = size * logits.float().clamp(-1, 1)
    weights = torch.zeros(2, 31, 18)
    weights[0, 5, 7] = weights[1, 30, 17] = 0.5
    labels[0, 5, 7], labels[1, 30, 17] = 1, 2
    for values in (logits, logits.clamp(min=0), logits.clamp(max=0)):
        got = with_gradient(F.upsampled_cross_entropy, values, labels, weights, label_smoothing=smoothing)
        want = with_gradient(plain, values, labels, weights, label_smoothing=smoothing)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)


def test_extreme_logits_do_not_disturb_where_they_do_not_count() -> None:
    logits, labels, _ = batch(2, 3, (4, 5), (31, 18))
    logits = logits.float()
    logits[1] = torch.tensor([3e38, -3e38, 0])[:, None, None]
    labels[1] = 255
    for smoothing in (0.0, 0.1):
        options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "sum"}
        got = with_gradient(F.upsampled_cross_entropy, logits, labels, **options)
        want = with_gradient(F.upsampled_cross_entropy, logits * torch.eye(2)[:, :1, None, None], labels, **options)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert not got[1][1].any()


def lone_pixels(labels: Tensor, weights: Tensor | None, num_classes: int, ignore_index: int) -> list[tuple[int, ...]]:
    """The pixels that count."""
    maps = torch.ones(labels.shape) if weights is None else weights
    return [
        place
        for place in np.ndindex(*labels.shape)
        if 0 <= labels[place] < num_classes and labels[place] != ignore_index and maps[place] != 0
    ]


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
@settings(max_examples=150, deadline=None)
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
    counted = lone_pixels(labels, weights if weighted else None, 3, 255)
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
    for loss in (F.upsampled_cross_entropy, plain):
        value, gradient = with_gradient(loss, logits, labels)
        assert value.isnan()
        assert gradient[0].isnan().any()
        labels_elsewhere = labels.clone()
        labels_elsewhere[0] = 255
        assert with_gradient(loss, logits, labels_elsewhere)[0].isfinite()


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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("align_corners", [True, False])
def test_derivatives(align_corners: bool, smoothing: float) -> None:
    logits, labels, weights = batch(1, 3, (2, 3), (35, 4))
    logits.requires_grad_()

    def loss(z: Tensor) -> Tensor:
        return F.upsampled_cross_entropy(z, labels, weights, align_corners=align_corners, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, logits, check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradcheck(loss, logits, check_batched_forward_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, logits, check_batched_grad=True, check_fwd_over_rev=True)


Loss = Callable[..., Tensor]


def dual(loss: Loss, z: Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(z, z.cos())))


def dual_gradient(loss: Loss, z: Tensor) -> object:
    with forward_ad.dual_level():
        leaf = forward_ad.make_dual(z.clone().requires_grad_(), z.cos())
        return forward_ad.unpack_dual(torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0])


def linearized(loss: Loss, z: Tensor) -> object:
    value, tangent = func.linearize(loss, z)
    return value, tangent(z.cos())


def pulled_back(loss: Loss, z: Tensor) -> object:
    value, pull = func.vjp(loss, z)
    return value, pull(torch.ones_like(value))


def checkpointed(loss: Loss, z: Tensor, *, use_reentrant: bool) -> object:
    leaf = z.clone().requires_grad_()
    value = checkpoint(loss, leaf, use_reentrant=use_reentrant)
    return value.detach(), torch.autograd.grad(value, leaf) if not use_reentrant else value.backward() or leaf.grad


def trained(loss: Loss, z: Tensor) -> object:
    network = nn.Conv2d(z.shape[1], z.shape[1], 1, dtype=z.dtype)
    with torch.no_grad():
        network.weight.copy_(torch.eye(z.shape[1])[..., None, None] + 0.1)
        network.bias.zero_()
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    gradients = func.grad(lambda given: loss(func.functional_call(network, given, (z,))))(parameters)
    value = loss(func.functional_call(network, parameters, (z,)))
    return value, gradients


TRANSFORMS: dict[str, Callable[[Loss, Tensor], object]] = {
    "grad": lambda f, z: func.grad(f)(z),
    "grad_and_value": lambda f, z: func.grad_and_value(f)(z),
    "vjp": pulled_back,
    "jacrev": lambda f, z: func.jacrev(f)(z),
    "jvp": lambda f, z: func.jvp(f, (z,), (z.cos(),)),
    "linearize": linearized,
    "jacfwd": lambda f, z: func.jacfwd(f)(z),
    "hessian": lambda f, z: func.hessian(f)(z),
    "jacrev of jacrev": lambda f, z: func.jacrev(func.jacrev(f))(z),
    "jacfwd of jacfwd": lambda f, z: func.jacfwd(func.jacfwd(f))(z),
    "grad along a line": lambda f, z: func.grad(lambda t: func.jvp(f, (t * z,), (z.cos(),))[1])(z.new_ones(())),
    "vmap": lambda f, z: func.vmap(f)(torch.stack([z, z.sin()])),
    "vmap of grad": lambda f, z: func.vmap(func.grad(f))(torch.stack([z, z.sin()])),
    "grad of vmap": lambda f, z: func.grad(lambda t: func.vmap(f)(torch.stack([t, t.sin()])).sum())(z),
    "functional_call": trained,
    "dual numbers": dual,
    "dual numbers of a gradient": dual_gradient,
    "autograd hessian": torch.autograd.functional.hessian,
    "autograd hessian, forward mode": lambda f, z: torch.autograd.functional.hessian(
        f, z, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "autograd jvp": lambda f, z: torch.autograd.functional.jvp(f, z, z.cos()),
    "autograd hvp": lambda f, z: torch.autograd.functional.hvp(f, z, z.cos()),
    "checkpoint": lambda f, z: checkpointed(f, z, use_reentrant=False),
    "reentrant checkpoint": lambda f, z: checkpointed(f, z, use_reentrant=True),
    "inference mode": lambda f, z: torch.inference_mode()(f)(z) + 0,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own
def test_transforms(transform: Callable[[Loss, Tensor], object], weighted: bool) -> None:
    logits, labels, weights = batch(2, 3, (3, 2), (20, 5))
    given_weights = weights if weighted else None
    for options in ({"normalizer": "valid"}, {"align_corners": False, "label_smoothing": 0.1, "reduction": "sum"}):
        got, want = (
            transform(lambda z, loss=loss: loss(z, labels, given_weights), logits)  # type: ignore[misc]
            for loss in (functools.partial(F.upsampled_cross_entropy, **options), functools.partial(plain, **options))
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_transforms_of_the_weights() -> None:
    logits, labels, weights = batch(2, 3, (3, 2), (20, 5))
    for transform in ("grad", "jvp", "jacfwd", "vmap", "dual numbers"):
        got, want = (
            TRANSFORMS[transform](lambda w, loss=loss: loss(logits, labels, w, normalizer="weights"), weights)  # type: ignore[misc]
            for loss in (F.upsampled_cross_entropy, plain)
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_transforms_of_the_criterion() -> None:
    logits, labels, weights = batch(2, 3, (3, 2), (20, 5))
    criterion = ConfidenceWeightedCE(normalizer="weights")
    for transform in ("grad", "jvp", "vmap of grad", "dual numbers"):
        got, want = (
            TRANSFORMS[transform](lambda z, loss=loss: loss(z, labels, weights), logits)  # type: ignore[misc]
            for loss in (criterion.upsampled, functools.partial(plain, normalizer="weights"))
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


def test_samples_of_their_own_labels() -> None:
    logits, labels, weights = batch(3, 4, (3, 2), (20, 5))
    got, want = (
        func.vmap(func.grad(lambda z, y, w, loss=loss: loss(z[None], y[None], w[None])))(logits, labels, weights)  # type: ignore[misc]
        for loss in (F.upsampled_cross_entropy, plain)
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14)


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

    def forward(z: Tensor) -> object:
        return func.jvp(loss, (z,), (z.cos(),))

    for function, kept in ((loss, True), (first, False), (forward, False)):
        torch.compiler.reset()
        got = torch.compile(function, fullgraph=True, backend=backend)(logits)
        torch.testing.assert_close(got, function(logits), rtol=1e-12, atol=0)
        assert ("upsampled_cross_entropy_sum" in graphs.pop()) == kept
        assert not graphs


def test_empty_labels_under_transforms() -> None:
    logits, _, _ = batch(2, 3, (3, 2))
    empty = torch.zeros(2, 0, 5, dtype=torch.long)
    assert not func.grad(lambda z: F.upsampled_cross_entropy(z, empty))(logits).any()
    assert F.upsampled_cross_entropy(logits, empty, reduction="none").shape == (2, 0, 5)


def test_criterion__align_corners_and_a_subclass_with_a_loss_of_its_own() -> None:
    logits, labels, weights = batch()

    class Halved(ConfidenceWeightedCE):
        def forward(self, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
            return super().forward(logits, labels, weights) / 2

    for align_corners in (True, False):
        want = with_gradient(plain, logits, labels, weights, align_corners=align_corners)
        got = with_gradient(ConfidenceWeightedCE().upsampled, logits, labels, weights, align_corners=align_corners)
        assert_agree(got, want, 1e-10)
        own = with_gradient(Halved().upsampled, logits, labels, weights, align_corners=align_corners)
        assert_agree((2 * own[0], 2 * own[1]), want, 1e-10)


def test_unknown_reduction_is_refused() -> None:
    logits, labels, _ = batch()
    with pytest.raises(ValueError, match="`reduction` must be one of 'mean', 'sum', 'none', got 'avg'"):
        F.upsampled_cross_entropy(logits, labels, reduction="avg")  # type: ignore[arg-type]


def test_valid_pixels_are_counted_by_classes_not_by_height() -> None:
    logits, labels, _ = batch(2, 3, (6, 7), (30, 20))
    labels = labels.masked_fill(labels == 4, 17)  # between C and every height and width
    want = with_gradient(plain, logits, labels.masked_fill(labels == 17, 255), normalizer="valid")
    for loss in (
        functools.partial(F.upsampled_cross_entropy, normalizer="valid"),
        ConfidenceWeightedCE(normalizer="valid").upsampled,
    ):
        assert_agree(with_gradient(loss, logits, labels), want, 1e-12)


def test_logits_without_pixels_are_refused() -> None:
    logits, labels, _ = batch(small=(0, 3))
    for loss in (F.upsampled_cross_entropy, ConfidenceWeightedCE().upsampled):
        with pytest.raises(ValueError, match=r"must have pixels to be upsampled to \(70, 41\), got \(2, 5, 0, 3\)"):
            loss(logits, labels)


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
