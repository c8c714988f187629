"""StrongAugment against kornia's functional operations, applied image by image in the drawn order."""

import copy
import itertools
import math

import kornia.enhance
import kornia.filters
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossmix import StrongAugment
from crossmix.augment import AugmentDraw

GREY = torch.tensor([0.299, 0.587, 0.114])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_image(image: Tensor, draw: AugmentDraw, i: int, flavor: str) -> Tensor:
    """The drawn operations, one after the other, by kornia."""
    if draw.jitter[i]:
        for operation in draw.order[i].tolist():
            image = one_operation(image, draw, i, operation, flavor)
    if draw.blur[i]:
        sigma = float(draw.sigma[i])
        image = kornia.filters.gaussian_blur2d(image, (51, 51), (sigma, sigma))
    return image


def one_operation(image: Tensor, draw: AugmentDraw, i: int, operation: int, flavor: str) -> Tensor:
    brightness, contrast, saturation = (float(v[i]) for v in (draw.brightness, draw.contrast, draw.saturation))
    grey = (image * GREY.to(image.dtype)[None, :, None, None]).sum(1, keepdim=True)
    additive = flavor == "additive"
    if operation == 0:
        return (image + (brightness - 1) if additive else image * brightness).clamp(0, 1)
    if operation == 1:
        return (image * contrast if additive else contrast * image + (1 - contrast) * grey.mean()).clamp(0, 1)
    if operation == 2:
        if additive:
            return kornia.enhance.adjust_saturation(image, saturation)
        return (saturation * image + (1 - saturation) * grey).clamp(0, 1)
    return kornia.enhance.adjust_hue(image, float(draw.hue[i]) * 2 * math.pi)


@pytest.mark.parametrize("flavor", ["additive", "torchvision"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward__equals_kornia_image_by_image(flavor: str, dtype: torch.dtype) -> None:
    augment = StrongAugment(flavor=flavor, blur_p=0.5)
    orders = set()
    for seed in range(6):
        images = torch.rand(8, 3, 57, 64, generator=seeded(seed)).to(dtype)
        draw = augment.sample(8, generator=seeded(100 + seed))
        got = augment(images, draw=draw)
        for i in range(8):
            want = one_image(images[i : i + 1], draw, i, flavor)
            torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=3e-6)
            orders.add(tuple(draw.order[i].tolist()))
    assert len(orders) > 15


@pytest.mark.parametrize("flavor", ["additive", "torchvision"])
def test_forward__every_order_of_operations(flavor: str) -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    augment = StrongAugment(flavor=flavor, brightness=0.9, contrast=0.9, saturation=0.9, hue=0.5, jitter_p=1, blur_p=0)
    draw = augment.sample(24, generator=seeded(0))._replace(order=orders)
    images = torch.rand(24, 3, 9, 7, generator=seeded(1))
    got = augment(images, draw=draw)
    for i in range(24):
        want = one_image(images[i : i + 1], draw, i, flavor)
        torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (6, 6), (20, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_forward__any_size(n: int, size: tuple[int, int]) -> None:
    augment = StrongAugment(jitter_p=1, blur_p=1)
    images = torch.rand(n, 3, *size, generator=seeded(0))
    out = augment(images, generator=seeded(1))
    assert out.shape == images.shape
    assert bool(((out >= 0) & (out <= 1)).all())


def test_blur__repeats_the_edge_where_the_image_is_too_small_to_reflect() -> None:
    augment = StrongAugment(jitter_p=0, blur_p=1)
    image = torch.rand(1, 3, 1, 4, dtype=torch.float64, generator=seeded(0))
    draw = augment.sample(1, generator=seeded(1))
    taps = torch.arange(-5, 6, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (taps / draw.sigma.double()) ** 2)
    kernel /= kernel.sum()
    padded = [image[0, 0, 0, min(max(j, 0), 3)] for j in range(-5, 9)]
    want = [sum(kernel[k] * padded[j + k] for k in range(11)) for j in range(4)]
    torch.testing.assert_close(augment(image, draw=draw)[0, 0, 0], torch.stack(want), rtol=0, atol=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from(["additive", "torchvision"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_forward__stays_in_range_and_leaves_undrawn_images_alone(seed: int, n: int, flavor: str, same: bool) -> None:
    augment = StrongAugment(flavor=flavor, jitter_p=0.5, blur_p=0.5, same_on_batch=same)
    images = torch.rand(n, 3, 8, 11, generator=seeded(seed))
    images[0, :, :4] = images[0, :1, :4]  # grey pixels
    images[0, :, 0] = 0
    before = images.clone()
    draw = augment.sample(n, generator=seeded(seed + 1))
    out = augment(images, draw=draw)
    assert torch.equal(images, before)
    assert bool(((out >= 0) & (out <= 1)).all())
    untouched = ~(draw.jitter | draw.blur)
    assert torch.equal(out[untouched], images[untouched])
    if same:
        assert bool((draw.jitter == draw.jitter[0]).all())
        assert bool((draw.blur == draw.blur[0]).all())


def test_sample__strengths_zero_change_nothing() -> None:
    augment = StrongAugment(brightness=0, contrast=0, saturation=0, hue=0, jitter_p=1, blur_p=0)
    images = torch.rand(4, 3, 8, 8, generator=seeded(0))
    torch.testing.assert_close(augment(images), images, rtol=0, atol=2e-6)


def test_sample__distributions() -> None:
    n = 20_000
    draw = StrongAugment(brightness=0.1, contrast=0.2, saturation=0.3, hue=0.4).sample(n, generator=seeded(0))
    for decision, p in ((draw.jitter, 0.8), (draw.blur, 0.5)):
        assert abs(float(decision.double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / n)
    for value, center, v in (
        (draw.brightness, 1, 0.1),
        (draw.contrast, 1, 0.2),
        (draw.saturation, 1, 0.3),
        (draw.hue, 0, 0.4),
    ):
        assert float((value - center).abs().max()) <= v + 1e-6
        assert abs(float(value.double().mean()) - center) < 4 * v / math.sqrt(3 * n)
        assert float((value - center).abs().max()) > 0.99 * v
    assert float(draw.sigma.min()) >= 0.15
    assert float(draw.sigma.max()) <= 1.15
    assert torch.equal(draw.order.sort(1).values, torch.arange(4).expand(n, 4))
    _, counts = (draw.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert len(counts) == 24
    chi_square = float(((counts - n / 24) ** 2 / (n / 24)).sum())
    assert chi_square < 55  # 23 degrees of freedom: above with probability 2e-4


def test_sample__generator_is_honoured_and_the_global_one_left_alone() -> None:
    augment = StrongAugment()
    before = torch.get_rng_state()
    one, two = (augment.sample(5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)
    images = torch.rand(5, 3, 8, 8, generator=seeded(0))
    assert torch.equal(augment(images, generator=seeded(3)), augment(images, draw=one))
    torch.manual_seed(7)
    drawn = augment.sample(5)
    torch.manual_seed(7)
    assert torch.equal(augment(images), augment(images, draw=drawn))


def test_forward__rows_of_a_draw_can_be_split() -> None:
    augment = StrongAugment(same_on_batch=True)
    images = torch.rand(6, 3, 12, 12, generator=seeded(0))
    draw = augment.sample(6, generator=seeded(1))
    parts = [augment(images[rows], draw=AugmentDraw(*(v[rows] for v in draw))) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), augment(images, draw=draw), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward__low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    augment = StrongAugment()
    images = torch.rand(4, 3, 16, 16, generator=seeded(0)).to(dtype)
    draw = augment.sample(4, generator=seeded(1))
    out = augment(images, draw=draw)
    assert out.dtype == dtype
    assert torch.equal(out, augment(images.float(), draw=draw).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images.float(), draw=draw), augment(images.float(), draw=draw).float())
        assert augment(images.float(), draw=draw).dtype == torch.float32


def test_forward__memory_formats() -> None:
    augment = StrongAugment()
    images = torch.rand(4, 3, 16, 12, generator=seeded(0))
    draw = augment.sample(4, generator=seeded(1))
    want = augment(images, draw=draw)
    views = [images.to(memory_format=torch.channels_last), images.transpose(2, 3).contiguous().transpose(2, 3)]
    for view in views:
        torch.testing.assert_close(augment(view, draw=draw), want, rtol=0, atol=1e-6)
    one = torch.rand(3, 16, 12, generator=seeded(2)).expand(4, 3, 16, 12)
    torch.testing.assert_close(augment(one, draw=draw), augment(one.contiguous(), draw=draw), rtol=0, atol=1e-6)


def test_forward__nan_stays_in_its_image() -> None:
    augment = StrongAugment(jitter_p=1, blur_p=1, flavor="torchvision")
    images = torch.rand(3, 3, 8, 8, generator=seeded(0))
    draw = augment.sample(3, generator=seeded(1))
    want = augment(images, draw=draw)
    images[1, 0, 0, 0] = math.nan
    out = augment(images, draw=draw)
    torch.testing.assert_close(out[[0, 2]], want[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("flavor", ["additive", "torchvision"])
def test_forward__gradients_are_finite_and_right(flavor: str) -> None:
    augment = StrongAugment(flavor=flavor, jitter_p=1, blur_p=1)
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=seeded(0)) * 0.4 + 0.3
    draw = augment.sample(2, generator=seeded(1))
    assert torch.autograd.gradcheck(lambda x: augment(x, draw=draw), images.requires_grad_())
    grey = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    black = torch.zeros(2, 3, 4, 4, requires_grad=True)
    for flat in (grey, black):
        augment(flat, draw=draw).sum().backward()
        assert flat.grad is not None
        assert bool(flat.grad.isfinite().all())


@pytest.mark.parametrize("flavor", ["additive", "torchvision"])
def test_forward__compiles_in_one_graph(flavor: str) -> None:
    augment = StrongAugment(flavor=flavor)
    images = torch.rand(3, 3, 16, 16, generator=seeded(0))
    draw = augment.sample(3, generator=seeded(1))
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, draw=draw), augment(images, draw=draw), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"brightness": -0.1}, ValueError, r"`brightness` must lie in \[0, 1\]"),
        ({"hue": 0.6}, ValueError, r"`hue` must lie in \[0, 0.5\]"),
        ({"jitter_p": 1.5}, ValueError, r"`jitter_p` must lie in \[0, 1\]"),
        ({"blur_p": math.nan}, ValueError, r"`blur_p` must lie in \[0, 1\]"),
        ({"blur_sigma": (0.0, 1.0)}, ValueError, "0 < least <= greatest"),
        ({"blur_sigma": (2.0, 1.0)}, ValueError, "0 < least <= greatest"),
        ({"flavor": "kornia"}, ValueError, "`flavor` must be one of 'additive', 'torchvision'"),
        ({"contrast": "much"}, TypeError, "`contrast` must be a float"),
    ],
)
def test_init__refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StrongAugment(**options)


def test_forward__refuses() -> None:
    augment = StrongAugment()
    draw = augment.sample(3)
    with pytest.raises(ValueError, match=r"`images` must have shape \(N, 3, H, W\)"):
        augment(torch.rand(3, 8, 8))
    with pytest.raises(ValueError, match="convert them to 3 channels"):
        augment(torch.rand(3, 1, 8, 8))
    with pytest.raises(TypeError, match=r"`.float\(\) / 255`"):
        augment(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="is for 3 images but `images` holds 2"):
        augment(torch.rand(2, 3, 8, 8), draw=draw)
    with pytest.raises(ValueError, match="is on meta but `images` is on cpu"):
        augment(torch.rand(3, 3, 8, 8), draw=draw._replace(sigma=draw.sigma.to("meta")))


def test_repr__shows_the_arguments() -> None:
    assert "flavor='torchvision', same_on_batch=True" in repr(StrongAugment(flavor="torchvision", same_on_batch=True))
