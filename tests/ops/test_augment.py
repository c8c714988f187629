"""StrongAugment against kornia's functional operations, applied image by image in the drawn order."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import channels_last, check_op, examples, strided, transposed
from crossmix import StrongAugment
from crossmix.augment import AugmentDraw
from oracles import augment_one_by_one, chi_square, seeded

FLAVORS = ("additive", "torchvision")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ORDERS = torch.tensor(list(itertools.permutations(range(4))))
LAYOUTS = (Tensor.contiguous, transposed, strided, channels_last)


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
    draw = augment.sample(16, generator=seeded(100))
    for size in ((57, 64), (6, 6)):  # the smaller one is just large enough to reflect
        images = torch.rand(16, 3, *size, generator=seeded(0)).to(dtype)
        want = augment_one_by_one(images, draw, flavor)
        torch.testing.assert_close(augment(images, draw=draw), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("size", [(9, 7), (1, 1), (1, 13)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-6), (torch.float64, 1e-7)])  # kornia adds 1e-8 to V
@pytest.mark.parametrize("flavor", FLAVORS)
def test_jitter__every_order_equals_one_operation_after_the_other(
    flavor: str, dtype: torch.dtype, atol: float, size: tuple[int, int]
) -> None:
    for v in (0.25, 0.9):
        augment = StrongAugment(
            flavor=flavor, brightness=v, contrast=v, saturation=v, hue=min(v, 0.5), jitter_p=1, blur_p=0
        )
        draw, images = every_order(augment, 0), with_ties(24, size, 1).to(dtype)
        want = augment_one_by_one(images, draw, flavor)
        for layout in LAYOUTS:
            torch.testing.assert_close(augment(layout(images), draw=draw), want, rtol=0, atol=atol)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_jitter__extreme_factors(flavor: str) -> None:
    """All brightness or none, no contrast, no colour, twice the colour, opposite hues: every clamp holds at once."""
    augment = StrongAugment(flavor=flavor, jitter_p=1, blur_p=0)
    images = with_ties(24, (6, 5), 1)
    for factors in itertools.product((0.0, 2.0), (0.0, 2.0), (0.0, 2.0), (-0.5, 0.5)):
        brightness, contrast, saturation, hue = torch.tensor(factors)[:, None].expand(4, 24)
        draw = every_order(augment, 0)._replace(
            brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
        want = augment_one_by_one(images, draw, flavor)
        torch.testing.assert_close(augment(images, draw=draw), want, rtol=0, atol=3e-6)


@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(0, 6), st.integers(0, 13), st.integers(0, 12)),
    st.sampled_from(FLAVORS),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)
@settings(max_examples=examples(80), deadline=None)
def test_forward__stays_in_range_and_leaves_undrawn_images_alone(
    seed: int, shape: tuple[int, int, int], flavor: str, same: bool, dtype: torch.dtype, layout: object
) -> None:
    n, *size = shape
    augment = StrongAugment(flavor=flavor, jitter_p=0.5, blur_p=0.5, same_on_batch=same)
    images = with_ties(n, size, seed).to(dtype)
    images[1:2] = 1  # rounding makes the blur of white more than white
    images = layout(images)
    draw = augment.sample(n, generator=seeded(seed + 1))
    out = augment(images, draw=draw)
    assert out.shape == images.shape
    assert bool(((out >= 0) & (out <= 1)).all())
    untouched = ~(draw.jitter | draw.blur)
    assert torch.equal(out[untouched], images[untouched])  # bit by bit
    jittered = augment(images, draw=draw._replace(jitter=torch.ones(n, dtype=torch.bool)))
    assert torch.equal(out[draw.jitter], jittered[draw.jitter])
    assert not same or len(draw.jitter.unique()) <= 1 >= len(draw.blur.unique())


def test_blur__repeats_the_edge_where_the_image_is_too_small_to_reflect() -> None:
    augment = StrongAugment(jitter_p=0, blur_p=1)
    image = torch.rand(1, 3, 1, 4, dtype=torch.float64, generator=seeded(0))
    draw = augment.sample(1, generator=seeded(1))
    kernel = torch.exp(-0.5 * (torch.arange(-5, 6).double() / draw.sigma.double()) ** 2)
    padded = torch.nn.functional.pad(image, (5, 5, 0, 0), mode="replicate")
    want = (padded.unfold(3, 11, 1) * kernel / kernel.sum()).sum(-1)
    torch.testing.assert_close(augment(image, draw=draw), want, rtol=0, atol=1e-12)


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
        (draw.sigma, 0.65, 0.5),
    ):
        assert 0.99 * v < float((value - center).abs().max()) <= v + 1e-6
        assert chi_square(((value - center) / v * 5 + 5).clamp(0, 9).long().bincount(), [0.1] * 10) < 1
    _, counts = draw.order.unique(dim=0, return_counts=True)
    assert torch.equal(draw.order.sort(1).values, torch.arange(4).expand(n, 4))
    assert chi_square(counts, [1 / 24] * 24) < 1


def test_sample__generator_is_honoured_and_the_global_one_left_alone() -> None:
    augment = StrongAugment()
    before = torch.get_rng_state()
    one, two = (augment.sample(5, generator=seeded(3)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    images = torch.rand(5, 3, 8, 8, generator=seeded(0))
    assert torch.equal(augment(images, generator=seeded(3)), augment(images, draw=one))
    torch.manual_seed(7)
    drawn = augment.sample(5)
    torch.manual_seed(7)
    assert torch.equal(augment(images), augment(images, draw=drawn))


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward__as_every_function_and_in_float32_or_more(dtype: torch.dtype) -> None:
    augment = StrongAugment(same_on_batch=True)
    images = torch.rand(4, 3, 16, 12, generator=seeded(0)).to(dtype)
    draw = augment.sample(4, generator=seeded(1))
    check_op(lambda images, **rows: augment(images, draw=AugmentDraw(**rows)), {"images": images, **draw._asdict()})
    out = augment(images, draw=draw)
    assert out.dtype == dtype
    wide = images.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(out, augment(wide, draw=draw).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(wide, draw=draw).to(dtype), out)


def test_forward__nan_stays_in_its_image() -> None:
    augment = StrongAugment(jitter_p=1, blur_p=1, flavor="torchvision")
    images = torch.rand(3, 3, 8, 8, generator=seeded(0))
    draw = augment.sample(3, generator=seeded(1))
    want = augment(images, draw=draw)
    images[1, 0, 0, 0] = math.nan
    torch.testing.assert_close(augment(images, draw=draw)[[0, 2]], want[[0, 2]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_forward__gradients_are_finite_and_right(flavor: str) -> None:
    augment = StrongAugment(flavor=flavor, jitter_p=1, blur_p=1)
    images = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=seeded(0)) * 0.4 + 0.3
    draw = augment.sample(2, generator=seeded(1))
    assert torch.autograd.gradcheck(lambda x: augment(x, draw=draw), images.requires_grad_())
    for level in (0.5, 0.0):
        flat = torch.full((2, 3, 4, 4), level, requires_grad=True)
        augment(flat, draw=draw).sum().backward()
        assert flat.grad is not None
        assert bool(flat.grad.isfinite().all())


@pytest.mark.parametrize("flavor", FLAVORS)
def test_jitter__gradients_of_every_order(flavor: str) -> None:
    augment = StrongAugment(flavor=flavor, jitter_p=1, blur_p=0)
    images = torch.rand(24, 3, 2, 2, dtype=torch.float64, generator=seeded(0)) * 0.4 + 0.3
    draw, weights = every_order(augment, 1), torch.rand(24, 3, 2, 2, dtype=torch.float64, generator=seeded(2))
    got, want = images.clone().requires_grad_(), images.clone().requires_grad_()
    (augment(got, draw=draw) * weights).sum().backward()
    (augment_one_by_one(want, draw, flavor) * weights).sum().backward()
    assert got.grad is not None
    torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-6)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(value, dtype=images.dtype)[:, None, None] for value in (MEAN, STD))
    return (images - mean) / std


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flavor", "size", "options"),
    [
        ("additive", (16, 17), {"mean": MEAN, "std": STD}),
        ("torchvision", (4, 7), {}),  # too small to reflect
        ("torchvision", (50, 9), {"blur_sigma": (3, 9)}),  # a kernel that is not unrolled
    ],
)
def test_forward__compiles_in_one_graph(flavor: str, size: tuple[int, int], options: dict[str, object]) -> None:
    torch.compiler.reset()
    augment = StrongAugment(flavor=flavor, **options)
    images = torch.rand(3, 3, *size, dtype=torch.float64, generator=seeded(0))
    draw = augment.sample(3, generator=seeded(1))
    got, want = images.clone().requires_grad_(), images.clone().requires_grad_()
    step = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="aot_eager")
    compiled, eager = step(got, draw=draw), augment(want, draw=draw)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-12)
    compiled.sum().backward()
    eager.sum().backward()
    assert got.grad is not None
    torch.testing.assert_close(got.grad, want.grad, rtol=0, atol=1e-9)


def test_forward__compiled_for_any_size_looks_at_no_values() -> None:
    torch.compiler.reset()
    augment = StrongAugment()
    compiled = torch.compile(copy.deepcopy(augment), fullgraph=True, backend="eager", dynamic=True)
    for i, (n, height, width) in enumerate([(2, 16, 12), (3, 20, 31), (5, 13, 18)]):
        images = torch.rand(n, 3, height, width, generator=seeded(i))
        draw = augment.sample(n, generator=seeded(i))
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(images, draw=draw)
            compiled(images * 255, draw=draw)  # out of range
        torch.testing.assert_close(got, augment(images, draw=draw), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_forward__inductor_equals_one_operation_after_the_other() -> None:
    torch.compiler.reset()
    augment = StrongAugment(flavor="additive", jitter_p=1, blur_p=0.5)
    images = with_ties(24, (13, 37), 1)
    draw = every_order(augment, 0)
    got = torch.compile(copy.deepcopy(augment), fullgraph=True)(images, draw=draw)
    torch.testing.assert_close(got, augment_one_by_one(images, draw, "additive"), rtol=0, atol=3e-6)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"jitter_p": 0}, {"blur_p": 0}, {"jitter_p": 0, "blur_p": 0}], ids=str)
def test_forward__keeps_the_layout(options: dict[str, float], compiled: bool) -> None:
    augment = StrongAugment(**options)
    for size in ((16, 12), (5, 1), (1, 1)):
        torch.compiler.reset()
        step = torch.compile(augment, fullgraph=True, backend="aot_eager") if compiled else augment
        images = torch.rand(4, 3, *size, generator=seeded(0))
        draw = augment.sample(4, generator=seeded(1))
        for layout, dtype in ((channels_last, torch.float32), (transposed, torch.bfloat16)):
            view = layout(images.to(dtype))
            out = step(view, draw=draw)
            assert out.stride() == view.stride()
            assert out.dtype == dtype
        assert augment(images[:1].expand(4, 3, *size), draw=draw).is_contiguous()  # not dense: no layout to keep


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
    untouched = ~(draw.jitter | draw.blur)
    for dtype in (torch.float16, torch.float32):
        narrow = normalised(images).to(dtype)
        assert torch.equal(augment(narrow, draw=draw)[untouched], narrow[untouched])  # bit by bit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def test_repr__shows_the_arguments() -> None:
    assert "flavor='additive', same_on_batch=True" in repr(StrongAugment(flavor="additive", same_on_batch=True))
    assert "flavor='torchvision', same_on_batch=False, mean=None, std=None" in repr(StrongAugment())
    assert f"mean={MEAN}, std={STD}" in repr(StrongAugment(mean=list(MEAN), std=STD))
