"""The losses with labels that are probabilities, and with a weight per class, against torch's cross-entropy."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from crossmix import ConfidenceWeightedCE
from crossmix import functional as F
from oracles import seeded

C = 5
NORMALIZERS = ("all", "valid", "weights")
SIZE = (4, 7)
Loss = Callable[..., Tensor]


def batch(dtype: torch.dtype = torch.float64, n: int = 2, size: tuple[int, int] = SIZE) -> tuple[Tensor, ...]:
    """Logits, soft labels, labels with ignored and unknown ids, weights and class weights with a 0 each."""
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


def criterion(logits: Tensor, labels: Tensor, weights: Tensor | None = None, **options: Any) -> Tensor:
    module = ConfidenceWeightedCE(**options)
    if options.get("class_weights") is not None:
        module.class_weights = options["class_weights"]  # not rounded to float32
    return module(logits, labels, weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", ["soft", "ids"])
@pytest.mark.parametrize("loss", [F.weighted_cross_entropy, criterion], ids=["function", "criterion"])
def test_losses__are_torchs(loss: Loss, kind: str, by_class: bool, weighted: bool, smoothing: float) -> None:
    logits, soft, ids, weights, class_weights = batch()
    labels = soft if kind == "soft" else ids
    for normalizer in NORMALIZERS:
        options = {
            "normalizer": normalizer,
            "class_weights": class_weights if by_class else None,
            "label_smoothing": smoothing,
        }
        results = []
        for one in (loss, torchs):
            leaf, leaf_weights = logits.clone().requires_grad_(), weights.clone().requires_grad_()
            value = one(leaf, labels, leaf_weights if weighted else None, **options)
            leaves = [leaf, leaf_weights] if weighted else [leaf]
            results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_losses__means_that_torch_has_too() -> None:
    logits, soft, ids, _, class_weights = batch()
    for smoothing in (0.0, 0.2):
        options = {"class_weights": class_weights, "label_smoothing": smoothing}
        theirs = {"weight": class_weights, "label_smoothing": smoothing}
        for normalizer in ("all", "valid"):
            got = F.weighted_cross_entropy(logits, soft, normalizer=normalizer, **options)
            torch.testing.assert_close(got, tf.cross_entropy(logits, soft, **theirs), rtol=1e-14, atol=0)
        got = F.weighted_cross_entropy(logits, ids, normalizer="weights", **options)
        torch.testing.assert_close(got, tf.cross_entropy(logits, ids, ignore_index=255, **theirs), rtol=1e-14, atol=0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_soft_labels__of_one_class_each_are_ids(normalizer: str) -> None:
    logits, _, ids, weights, class_weights = batch()
    ids = ids.where(ids != 255, 0)
    one_hot = tf.one_hot(ids, C).movedim(-1, 1).double()
    for by_class in (None, class_weights):
        for smoothing in (0.0, 0.1):
            options = {"normalizer": normalizer, "class_weights": by_class, "label_smoothing": smoothing}
            want = F.weighted_cross_entropy(logits, ids, weights, **options)
            got = F.weighted_cross_entropy(logits, one_hot, weights, **options)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("kind", ["soft", "ids"])
def test_upsampled__equals_upsampling_first(kind: str, by_class: bool, smoothing: float, align_corners: bool) -> None:
    full = (21, 18)
    _, soft, ids, weights, class_weights = batch(size=full)
    labels = soft if kind == "soft" else ids
    small = torch.randn(2, C, 4, 5, generator=seeded(3), dtype=torch.float64)
    for normalizer in NORMALIZERS:
        for reduction in ("mean", "none"):
            options: dict[str, Any] = {
                "normalizer": normalizer,
                "class_weights": class_weights if by_class else None,
                "label_smoothing": smoothing,
            }
            results = []
            for ours in (True, False):
                leaf = small.clone().requires_grad_()
                if ours:
                    value = F.upsampled_cross_entropy(
                        leaf, labels, weights, align_corners=align_corners, reduction=reduction, **options
                    )
                else:
                    large = tf.interpolate(leaf, size=full, mode="bilinear", align_corners=align_corners)
                    value = torchs(large, labels, weights, reduction=reduction, **options)
                results.append((value, *torch.autograd.grad(value.sum(), leaf)))
            torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)
        module = ConfidenceWeightedCE(**options).double()
        module.class_weights = options["class_weights"]
        got = module.upsampled(small, labels, weights, align_corners=align_corners)
        large = tf.interpolate(small, size=full, mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(got, torchs(large, labels, weights, **options), rtol=1e-10, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("where", ["logits", "labels", "both"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_soft_labels__weight_0_adds_exactly_nothing(
    value: float, where: str, smoothing: float, dtype: torch.dtype
) -> None:
    logits, soft, _, weights, _ = batch(torch.float32)
    logits, soft = logits.to(dtype), soft.to(dtype)
    quiet = torch.rand(2, *SIZE, generator=seeded(1)) < 0.4
    weights = (weights + 0.1).masked_fill(quiet, 0)
    strange = quiet[:, None] & (torch.rand(logits.shape, generator=seeded(2)) < 0.7)
    odd_logits = logits if where == "labels" else logits.masked_fill(strange, value)
    odd_labels = soft if where == "logits" else soft.masked_fill(strange, value)
    for normalizer in NORMALIZERS:
        for loss in (F.weighted_cross_entropy, F.upsampled_cross_entropy, criterion):
            results = []
            for z, y in ((odd_logits, odd_labels), (logits, soft)):
                leaf = z.clone().requires_grad_()
                got = loss(leaf, y, weights, normalizer=normalizer, label_smoothing=smoothing)
                results.append((got.detach(), *torch.autograd.grad(got, leaf)))
            torch.testing.assert_close(*results, rtol=1e-6 if normalizer == "weights" else 0, atol=0)
            assert not results[0][1].masked_fill(~quiet[:, None], 0).any()
    each = F.weighted_cross_entropy(odd_logits, odd_labels, weights, reduction="none", label_smoothing=smoothing)
    assert not each[quiet].any()
    assert (each[~quiet] > 0).all()


def test_soft_labels__what_counts_is_not_hidden() -> None:
    for z, y in ((math.nan, 0.5), (math.inf, 0.5), (0.0, math.nan)):
        logits, labels = torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), 0.5)
        logits[0, 0], labels[0, 0] = z, y
        assert F.weighted_cross_entropy(logits, labels).isnan()
        assert F.weighted_cross_entropy(logits, labels, torch.full((1,), 0.5), normalizer="weights").isnan()


def test_soft_labels__a_class_that_is_ruled_out_costs_what_its_label_says() -> None:
    logits = torch.tensor([0.0, 1.0, -math.inf])[None, :, None, None].requires_grad_()
    labels = torch.tensor([0.3, 0.7, 0.0])[None, :, None, None]
    loss = F.weighted_cross_entropy(logits, labels)
    torch.testing.assert_close(loss, tf.cross_entropy(logits[:, :2], labels[:, :2]))
    (gradient,) = torch.autograd.grad(loss, logits)
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
@pytest.mark.parametrize("shape", [(2, 3, 3), (0, 3, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("kind", ["soft", "ids"])
def test_losses__degenerate_batches_are_zero(kind: str, shape: tuple[int, int, int], normalizer: str) -> None:
    n, height, width = shape
    logits = torch.randn(n, 4, height, width, requires_grad=True)
    labels = torch.rand(n, 4, height, width).softmax(1) if kind == "soft" else torch.zeros(shape, dtype=torch.long)
    cases = [(torch.zeros(shape), None), (torch.zeros(shape), torch.rand(4)), (None, torch.zeros(4))]
    for weights, class_weights in cases:
        for smoothing in (0.0, 0.1):
            for loss in (F.weighted_cross_entropy, F.upsampled_cross_entropy):
                value = loss(
                    logits,
                    labels,
                    weights,
                    class_weights=class_weights,
                    normalizer=normalizer,
                    label_smoothing=smoothing,
                )
                (gradient,) = torch.autograd.grad(value, logits)
                assert float(value.detach()) == 0.0
                assert not gradient.any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("upsampled", [False, True])
def test_losses__derivatives(normalizer: str, smoothing: float, upsampled: bool) -> None:
    _, soft, ids, weights, class_weights = batch(size=(3, 4))
    size = (2, 3) if upsampled else (3, 4)
    logits = torch.randn(2, C, *size, dtype=torch.float64, generator=seeded(4), requires_grad=True)
    loss = F.upsampled_cross_entropy if upsampled else F.weighted_cross_entropy
    leaves = [value.clone().requires_grad_() for value in (weights, class_weights + 0.1)]
    options = {"normalizer": normalizer, "label_smoothing": smoothing}

    def of_soft(z: Tensor, y: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return loss(z, y, w, class_weights=c, **options)

    def of_ids(z: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return loss(z, ids, w, class_weights=c, **options)

    assert torch.autograd.gradcheck(of_soft, (logits, soft.clone().requires_grad_(), *leaves))
    assert torch.autograd.gradcheck(of_ids, (logits, *leaves))
    assert torch.autograd.gradgradcheck(of_soft, (logits, soft.clone().requires_grad_(), *leaves))


def test_losses__under_transforms() -> None:
    logits, soft, ids, weights, class_weights = batch()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.upsampled_cross_entropy(z, y, weights, class_weights=class_weights, label_smoothing=0.1)

    for labels in (soft, ids):
        leaf = logits[..., :3, :3].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(leaf, labels), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(leaf.detach(), labels), want)


def test_losses__arithmetic_is_float32_under_autocast_and_float64_where_an_input_is() -> None:
    logits, soft, ids, _, class_weights = (value.float() if value.is_floating_point() else value for value in batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for labels in (soft, ids):
            got = F.weighted_cross_entropy(logits, labels, class_weights=class_weights, label_smoothing=0.1)
            assert got.dtype == torch.float32
            torch.testing.assert_close(
                got, torchs(logits, labels, class_weights=class_weights, label_smoothing=0.1), rtol=1e-6, atol=0
            )
    for half in (torch.float16, torch.bfloat16):
        got = F.weighted_cross_entropy(logits.to(half), soft.to(half), class_weights=class_weights.to(half))
        want = F.weighted_cross_entropy(
            logits.to(half).float(), soft.to(half).float(), class_weights=class_weights.to(half).float()
        )
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    for loss in (F.weighted_cross_entropy, F.upsampled_cross_entropy):
        assert loss(logits, soft.double()).dtype == torch.float64
        assert loss(logits, ids, class_weights=class_weights.double()).dtype == torch.float64
        assert (
            loss(logits[..., :2, :2] if loss is F.upsampled_cross_entropy else logits, soft.double()).dtype
            == torch.float64
        )


@pytest.mark.parametrize("kind", ["soft", "ids"])
@pytest.mark.parametrize("dynamic", [False, True])
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
    arguments = (soft if kind == "soft" else ids, weights, class_weights)
    results = []
    for run in (compiled, losses):
        leaf = logits.clone().requires_grad_()
        values = run(leaf, *arguments)
        results.append((values, torch.autograd.grad(sum(values), leaf)))
    torch.testing.assert_close(*results)


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


def test_mix_of_soft_labels__is_the_mix_of_their_losses() -> None:
    """The loss is linear in the label, so pixels from either side keep their own."""
    logits, soft, ids, weights, _ = batch()
    one_hot = tf.one_hot(ids.where(ids != 255, 0), C).movedim(-1, 1).double()
    mask = torch.rand(2, *SIZE, generator=seeded(5)) < 0.5
    mixed = F.mix(one_hot, soft, mask)
    mixed_weights = F.mix((ids != 255).double(), weights, mask)
    got = F.weighted_cross_entropy(logits, mixed, mixed_weights, reduction="none")
    of_ids = F.weighted_cross_entropy(logits, ids, reduction="none")
    torch.testing.assert_close(
        got, F.mix(of_ids, F.weighted_cross_entropy(logits, soft, weights, reduction="none"), mask)
    )


LOGITS, SOFT, IDS = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
CASES: dict[str, tuple[Callable[[Loss], object], type[Exception], str]] = {
    "classes": (
        lambda loss: loss(LOGITS, SOFT[:, :2]),
        ValueError,
        r"soft `labels` must have shape .* C = 3 like `logits`, got \(2, 2",
    ),
    "batch": (lambda loss: loss(LOGITS, SOFT[:1]), ValueError, "hold 2 images but `labels` 1"),
    "rank": (lambda loss: loss(LOGITS, SOFT[0]), TypeError, "must be uint8, int16, int32 or int64, got torch.float32"),
    "weights": (lambda loss: loss(LOGITS, SOFT, SOFT), ValueError, r"\(N, H, W\) = \(2, 4, 5\) or \(N,\)"),
    "ids": (lambda loss: loss(LOGITS, IDS[:, None]), ValueError, "squeeze the channel dimension"),
    "bool": (lambda loss: loss(LOGITS, SOFT > 0.5), TypeError, "must be uint8"),
    "class weights length": (
        lambda loss: loss(LOGITS, IDS, class_weights=torch.ones(4)),
        ValueError,
        r"shape \(C,\) = \(3,\), got \(4,\)",
    ),
    "class weights rank": (lambda loss: loss(LOGITS, IDS, class_weights=torch.ones(3, 1)), ValueError, r"\(C,\)"),
    "class weights dtype": (lambda loss: loss(LOGITS, IDS, class_weights=torch.arange(3)), TypeError, "floating"),
    "class weights list": (lambda loss: loss(LOGITS, IDS, class_weights=[1.0, 1.0, 1.0]), TypeError, "a torch.Tensor"),
    "class weights NaN": (
        lambda loss: loss(LOGITS, IDS, class_weights=torch.tensor([1, math.nan, 1])),
        ValueError,
        "finite and at least 0, got",
    ),
    "class weights sign": (
        lambda loss: loss(LOGITS, SOFT, class_weights=torch.tensor([1.0, -1.0, 1.0])),
        ValueError,
        "finite and at least 0, got",
    ),
    "class weights device": (
        lambda loss: loss(LOGITS, SOFT, class_weights=torch.ones(3, device="meta")),
        ValueError,
        "is on meta but `logits` is on cpu",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loss", [F.weighted_cross_entropy, F.upsampled_cross_entropy], ids=["plain", "upsampled"])
def test_losses__refuse(name: str, loss: Loss) -> None:
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call(loss)


def test_losses__refuse_another_size() -> None:
    with pytest.raises(ValueError, match="must agree in batch size, height and width"):
        F.weighted_cross_entropy(LOGITS, SOFT[..., :2])
    with pytest.raises(ValueError, match=r"must have pixels to be upsampled to \(4, 5\)"):
        F.upsampled_cross_entropy(LOGITS[..., :0], SOFT)


@pytest.mark.parametrize("values", [[1.0, math.nan], [1.0, -1.0], [1.0, math.inf], [], [[1.0]]])
def test_criterion__refuses_class_weights_where_it_is_made(values: list[Any]) -> None:
    with pytest.raises(ValueError, match="`class_weights` must"):
        ConfidenceWeightedCE(class_weights=values)


def test_criterion__refuses_class_weights_of_other_classes() -> None:
    with pytest.raises(TypeError, match="sequence of numbers, got str"):
        ConfidenceWeightedCE(class_weights="rare")
    module = ConfidenceWeightedCE(class_weights=[1, 2])
    for loss in (module, module.upsampled):
        with pytest.raises(ValueError, match=r"shape \(C,\) = \(3,\), got \(2,\)"):
            loss(LOGITS, IDS)
