"""StrongAugment against kornia's functional operations, applied image by image in the drawn order."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import channels_last, strided, transposed
from crossmix import StrongAugment
from crossmix.augment import AugmentDraw
from oracles import augment_one_by_one, seeded

FLAVORS = ("additive", "torchvision")
ORDERS = torch.tensor(list(itertools.permutations(range(4))))
LAYOUTS = {
    "contiguous": Tensor.contiguous,
    "transposed": transposed,
    "strided": strided,
    "channels last": channels_last,
}


def every_order(augment: StrongAugment, seed: int) -> AugmentDraw:
    return augment.sample(24, generator=seeded(seed))._replace(order=ORDERS)


def with_ties(n: int, size: tuple[int, int], seed: int) -> Tensor:
    """Any colours, and in every other image few levels: grey, black, white and primary colours among them."""
    images = torch.rand(n, 3, *size, generator=seeded(seed))
    images[::2] = (images[::2] * 4).round() / 4
    return images


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward__equals_kornia_image_by_image(flavor: str, dtype: torch.dtype) -> None:
    augment = StrongAugment(flavor=flavor, blur_p=0.5)
    orders = set()
    for seed in range(6):
        images = torch.rand(8, 3, 57, 64, generator=seeded(seed)).to(dtype)
        draw = augment.sample(8, generator=seeded(100 + seed))
        got = augment(images, draw=draw)
        torch.testing.assert_close(got, augment_one_by_one(images, draw, flavor), rtol=0, atol=3e-6)
        orders |= {tuple(order) for order in draw.order.tolist()}
    assert len(orders) > 15


@pytest.mark.parametrize("size", [(9, 7), (1, 1), (1, 13), (5, 6), (32, 17)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-6), (torch.float64, 1e-7)])  # kornia adds 1e-8 to V
@pytest.mark.parametrize("strength", [0.25, 0.9])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_jitter__every_order_equals_one_operation_after_the_other(
    flavor: str, strength: float, dtype: torch.dtype, atol: float, size: tuple[int, int]
) -> None:
    augment = StrongAugment(
        flavor=flavor,
        brightness=strength,
        contrast=strength,
        saturation=strength,
        hue=min(strength, 0.5),
        jitter_p=1,
        blur_p=0,
    )
    draw = every_order(augment, 0)
    images = with_ties(24, size, 1).to(dtype)
    want = augment_one_by_one(images, draw, flavor)
    for name, layout in LAYOUTS.items():
        got = augment(layout(images), draw=draw)
        torch.testing.assert_close(got, want, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("flavor", FLAVORS)
def test_jitter__extreme_factors(flavor: str) -> None:
    """All brightness or none, no contrast, no colour, twice the colour, opposite hues: every clamp holds at once."""
    augment = StrongAugment(flavor=flavor, jitter_p=1, blur_p=0)
    images = with_ties(24, (6, 5), 1)
    for brightness, contrast, saturation, hue in itertools.product((0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-0.5, 0.5)):
        draw = every_order(augment, 0)._replace(
            brightness=torch.full((24,), brightness),
            contrast=torch.full((24,), contrast),
            saturation=torch.full((24,), saturation),
            hue=torch.full((24,), hue),
        )
        want = augment_one_by_one(images, draw, flavor)
        torch.testing.assert_close(augment(images, draw=draw), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flavor", FLAVORS)
def test_forward__undrawn_images_come_back_bit_by_bit(flavor: str, layout: str, dtype: torch.dtype) -> None:
    augment = StrongAugment(flavor=flavor)
    images = LAYOUTS[layout](with_ties(24, (13, 12), 1).to(dtype))
    before = images.clone()
    draw = every_order(augment, 0)
    draw = draw._replace(jitter=torch.arange(24) % 3 == 1, blur=torch.arange(24) % 3 == 2)
    out = augment(images, draw=draw)
    assert torch.equal(out[::3], images[::3])
    assert not torch.equal(out[1::3], images[1::3])
    assert not torch.equal(out[2::3], images[2::3])
    assert torch.equal(images, before)
    jittered = augment(images, draw=draw._replace(jitter=torch.ones(24, dtype=torch.bool)))
    assert torch.equal(out[1::3], jittered[1::3])


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


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from(FLAVORS), st.booleans())
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


@pytest.mark.parametrize("flavor", FLAVORS)
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


@pytest.mark.parametrize("flavor", FLAVORS)
def test_jitter__gradients_of_every_order(flavor: str) -> None:
    augment = StrongAugment(flavor=flavor, jitter_p=1, blur_p=0)
    images = torch.rand(24, 3, 2, 2, dtype=torch.float64, generator=seeded(0)) * 0.4 + 0.3
    draw = every_order(augment, 1)
    got = images.clone().requires_grad_()
    want = images.clone().requires_grad_()
    weights = torch.rand(24, 3, 2, 2, dtype=torch.float64, generator=seeded(2))
    (augment(got, draw=draw) * weights).sum().backward()
    (augment_one_by_one(want, draw, flavor) * weights).sum().backward()
    assert got.grad is not None
    torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("flavor", "size", "sigma"),
    [
        ("additive", (16, 17), (0.15, 1.15)),
        # Too small to reflect; and a kernel that is not unrolled.
        pytest.param("torchvision", (4, 7), (0.15, 1.15), marks=pytest.mark.slow),
        pytest.param("torchvision", (50, 9), (3, 9), marks=pytest.mark.slow),
    ],
)
def test_forward__compiles_in_one_graph(flavor: str, size: tuple[int, int], sigma: tuple[float, float]) -> None:
    torch.compiler.reset()
    augment = StrongAugment(flavor=flavor, blur_sigma=sigma)
    images = torch.rand(3, 3, *size, dtype=torch.float64, generator=seeded(0))
    draw = augment.sample(3, generator=seeded(1))
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, draw=draw), augment(images, draw=draw), rtol=0, atol=1e-12)
    got = images.clone().requires_grad_()
    want = images.clone().requires_grad_()
    compiled(got, draw=draw).sum().backward()
    augment(want, draw=draw).sum().backward()
    assert got.grad is not None
    torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-9)


def test_forward__compiled_for_any_size() -> None:
    torch.compiler.reset()
    augment = StrongAugment()
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="eager", dynamic=True)
    for i, (n, height, width) in enumerate([(2, 16, 12), (3, 20, 31), (5, 13, 18)]):
        images = torch.rand(n, 3, height, width, generator=seeded(i))
        draw = augment.sample(n, generator=seeded(i))
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(images, draw=draw)
        torch.testing.assert_close(got, augment(images, draw=draw), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_forward__inductor_equals_one_operation_after_the_other() -> None:
    torch.compiler.reset()
    augment = StrongAugment(flavor="additive", jitter_p=1, blur_p=0.5)
    images = with_ties(24, (13, 37), 1)
    draw = every_order(augment, 0)
    got = torch.compile(copy.deepcopy(augment), fullgraph=True)(images, draw=draw)
    torch.testing.assert_close(got, augment_one_by_one(images, draw, "additive"), rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(16, 12), *(pytest.param(size, marks=pytest.mark.slow) for size in ((5, 1), (1, 1)))])
@pytest.mark.parametrize("options", [{}, {"jitter_p": 0}, {"blur_p": 0}, {"jitter_p": 0, "blur_p": 0}], ids=str)
def test_forward__keeps_the_layout(options: dict[str, float], size: tuple[int, int]) -> None:
    torch.compiler.reset()
    augment = StrongAugment(**options)
    images = torch.rand(4, 3, *size, generator=seeded(0))
    draw = augment.sample(4, generator=seeded(1))
    want = augment(images, draw=draw)
    assert want.is_contiguous()
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="aot_eager")
    for view in (channels_last(images), images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)):
        for dtype in (torch.float32, torch.bfloat16):
            for step in (augment, compiled):
                out = step(view.to(dtype), draw=draw)
                assert out.stride() == view.stride()
                assert out.dtype == dtype
        torch.testing.assert_close(augment(view, draw=draw), want, rtol=0, atol=1e-6)
    assert augment(images[:1].expand(4, 3, *size), draw=draw).is_contiguous()  # what is not dense has no layout to keep


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, dtype=images.dtype)[:, None, None] for value in (MEAN, STD))
    return (images - mean) / std


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(
    ("mean", "std"), [(MEAN, STD), (list(MEAN), torch.tensor(STD, dtype=torch.float64))], ids=["tuples", "others"]
)
def test_mean_and_std__augment_the_images_that_were_normalised(flavor: str, mean: object, std: object) -> None:
    images = torch.rand(8, 3, 11, 13, dtype=torch.float64, generator=seeded(0))
    plain, augment = StrongAugment(flavor=flavor), StrongAugment(flavor=flavor, mean=mean, std=std)
    draw = plain.sample(8, generator=seeded(1))
    draw.jitter[0] = draw.blur[0] = False
    out = augment(channels_last(normalised(images)), draw=draw)
    torch.testing.assert_close(out, normalised(plain(images, draw=draw)), rtol=0, atol=1e-12)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(normalised(images), draw=draw), out, rtol=0, atol=1e-12)
    untouched = ~(draw.jitter | draw.blur)
    for dtype in (torch.float16, torch.float32):
        narrow = normalised(images).to(dtype)
        assert torch.equal(augment(narrow, draw=draw)[untouched], narrow[untouched])  # bit by bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_forward__refuses_values_far_out_of_range(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=seeded(0))
    augment, of_normalised = StrongAugment(), StrongAugment(mean=MEAN, std=STD)
    for wrong, found in (
        (normalised(images), "got values from -2"),
        (2 * images - 1, "got values from -0.9"),
        (255 * images, "got values from .* to 25"),
    ):
        with pytest.raises(ValueError, match=rf"`images` must lie in \[0, 1\], {found}.*; divide bytes by 255"):
            augment(wrong.to(dtype))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\] before they are normalised by mean=\(0.485, .*\) and"):
        of_normalised((255 * images).to(dtype))
    of_normalised(normalised(images).to(dtype))
    board = (torch.arange(8)[:, None] + torch.arange(8) % 2).remainder(2).to(images)  # overshoots most
    larger = torch.nn.functional.interpolate(board.expand(2, 3, 8, 8), scale_factor=7, mode="bicubic")
    assert float(larger.min()) < -0.2
    augment(larger.to(dtype))  # a bicubic resize is no mistake
    augment(images.to(dtype).masked_fill(images > 0.9, math.nan))  # nor is NaN one of the range


def test_forward__looks_at_no_values_in_a_compiled_graph() -> None:
    """Not in a compiled graph. `test_no_sync` sees to other devices."""
    torch.compiler.reset()
    augment = StrongAugment()
    draw = augment.sample(2, generator=seeded(0))
    bytes_ = torch.rand(2, 3, 8, 8, generator=seeded(1)) * 255
    torch.compile(augment, fullgraph=True, backend="eager")(bytes_, draw=draw)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean": MEAN}, ValueError, "`mean` and `std` belong together, got mean=.* and std=None"),
        ({"std": STD}, ValueError, "`mean` and `std` belong together"),
        ({"mean": MEAN[:2], "std": STD}, ValueError, "`mean` must hold 3 finite numbers"),
        ({"mean": 0.5, "std": 0.5}, TypeError, "`mean` must be a sequence of 3 numbers, one per channel, got 0.5"),
        ({"blur_sigma": 1.0}, TypeError, "`blur_sigma` must be a sequence of 2 numbers, .* got 1.0"),
        ({"blur_sigma": (0.1, 1.0, 2.0)}, ValueError, "`blur_sigma` must hold 2 finite numbers"),
        ({"mean": MEAN, "std": (1.0, math.inf, 1.0)}, ValueError, "`std` must hold 3 finite numbers"),
        ({"mean": MEAN, "std": (1.0, 0.0, 1.0)}, ValueError, "`std` must be positive in each channel"),
        ({"brightness": -0.1}, ValueError, r"`brightness` must lie in \[0, 1\]"),
        ({"hue": 0.6}, ValueError, r"`hue` must lie in \[0, 0.5\]"),
        ({"jitter_p": 1.5}, ValueError, r"`jitter_p` must lie in \[0, 1\]"),
        ({"blur_p": math.nan}, ValueError, r"`blur_p` must lie in \[0, 1\]"),
        ({"blur_sigma": (0.0, 1.0)}, ValueError, "0 < low <= high"),
        ({"blur_sigma": (2.0, 1.0)}, ValueError, "0 < low <= high"),
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
    assert "flavor='additive', same_on_batch=True" in repr(StrongAugment(flavor="additive", same_on_batch=True))
    assert "flavor='torchvision', same_on_batch=False, mean=None, std=None" in repr(StrongAugment())
    assert f"mean={MEAN}, std={STD}" in repr(StrongAugment(mean=list(MEAN), std=STD))
