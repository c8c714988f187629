"""Boxes, blobs and blocks, against loops over pixels."""

import copy
import math
from collections.abc import Callable

import kornia.filters
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import Watch, check_module, check_op, examples
from crossmix import BoxMasks, CowMasks, MaskedImages
from crossmix import functional as F
from oracles import chi_square, seeded

SIGMAS = torch.tensor([0.3, 1.0, 2.5, 6.0, 15.0, 40.0], dtype=torch.float64)


def test_cow_mask__of_bfloat16_is_that_of_the_same_numbers_in_float32() -> None:
    noise = torch.randn(1, 64, 64, generator=seeded(0)).bfloat16()
    assert torch.equal(F.cow_mask(noise, sigma=10.1), F.cow_mask(noise.float(), sigma=10.1))


def box_by_loop(
    scores: list[float], height: int, width: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Tensor:
    share = area[0] + scores[0] * (area[1] - area[0])
    ratio = aspect[0] * (aspect[1] / aspect[0]) ** scores[1]
    rows = min(max(round(math.sqrt(share * height * width / ratio)), 1), height)
    columns = min(max(round(math.sqrt(share * height * width * ratio)), 1), width)
    top = min(int(scores[2] * (height - rows + 1)), height - rows)
    left = min(int(scores[3] * (width - columns + 1)), width - columns)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + rows, left : left + columns] = True
    return mask


@given(st.integers(0, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=examples(100), deadline=None)
def test_box_mask__equals_the_loop(n: int, height: int, width: int, seed: int) -> None:
    g = seeded(seed)
    low, high = sorted(torch.rand(2, generator=g).tolist())
    narrow, wide = sorted((torch.rand(2, generator=g) * 4 + 0.1).tolist())
    scores = torch.rand(n, 4, generator=g, dtype=torch.float64)  # as the loop computes
    scores[::2, 2:] = scores[::2, 2:].round()  # ends included
    got = F.box_mask(scores, (height, width), area=(low, high), aspect=(narrow, wide))
    want = [box_by_loop(row, height, width, (low, high), (narrow, wide)) for row in scores.tolist()]
    assert torch.equal(got, torch.stack(want) if want else torch.zeros(0, height, width, dtype=torch.bool))


def sides(masks: BoxMasks, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heights, widths, tops and lefts of 20,000 boxes."""
    mask = masks(masks.sample(20_000, generator=seeded(0)), size)
    rows, columns = mask.any(2), mask.any(1)
    return rows.sum(1), columns.sum(1), rows.int().argmax(1), columns.int().argmax(1)


def test_box_masks__area_is_linear() -> None:
    low, high, size = 0.04, 0.36, 40
    rows, columns, *_ = sides(BoxMasks(area=(low, high), aspect=(1.0, 1.0)), (size, size))
    assert torch.equal(rows, columns)
    lengths = torch.arange(8, 25, dtype=torch.float64)  # that of 0.04 to that of 0.36
    ends = torch.stack([lengths - 0.5, lengths + 0.5]).square().div(size**2).clamp(low, high)  # rounded to pixels
    assert chi_square(rows.bincount(minlength=25)[8:], (ends[1] - ends[0]) / (high - low)) < 1


def test_box_masks__aspect_is_linear_in_the_logarithm() -> None:
    low, high, pixels = 0.3, 1 / 0.3, 400.0
    rows, columns, *_ = sides(BoxMasks(area=(0.25, 0.25), aspect=(low, high)), (40, 40))
    lengths = torch.arange(11, 38, dtype=torch.float64)  # 20 * sqrt(0.3) = 10.95 to 36.5
    ends = (torch.stack([lengths - 0.5, lengths + 0.5]).square() / pixels).clamp(low, high).log()
    law = (ends[1] - ends[0]) / (math.log(high) - math.log(low))
    assert chi_square(columns.bincount(minlength=38)[11:], law) < 1
    assert chi_square(rows.bincount(minlength=38)[11:], law) < 1  # height over width has the same law


def test_box_masks__places_are_uniform() -> None:
    rows, columns, top, left = sides(BoxMasks(area=(0.1, 0.1), aspect=(0.5, 0.5)), (24, 20))
    height, width = int(rows[0]), int(columns[0])
    assert (height, width) == (10, 5)  # 48 pixels, twice as high as wide
    places = (top * 16 + left).bincount(minlength=15 * 16)
    assert chi_square(places, torch.full((15 * 16,), 1 / (15 * 16), dtype=torch.float64)) < 1


def smoothed(noise: Tensor, sigma: Tensor) -> Tensor:
    """By taps that reach as far as the image and are mirrored beyond its border."""
    taps = [2 * length - 1 for length in noise.shape[1:]]
    return kornia.filters.gaussian_blur2d(noise[:, None], taps, torch.stack([sigma, sigma], 1))[:, 0]


def standard(images: Tensor) -> Tensor:
    """With mean 0 and deviation 1 each."""
    centred = images - images.mean((1, 2), keepdim=True)
    return centred / centred.square().mean((1, 2), keepdim=True).sqrt()


def quantile(ratio: float) -> Tensor:
    """What a share `ratio` of normal numbers exceeds."""
    return math.sqrt(2) * torch.tensor(1 - 2 * ratio, dtype=torch.float64).erfinv()


@pytest.mark.parametrize("size", [(20, 31), (1, 9), (2, 3), (17, 1), (64, 90), (150, 20), (20, 150)])
def test_cow_mask__is_smoothed_noise_above_a_quantile(size: tuple[int, int]) -> None:
    """By waves along a long side of the image, by all pixels along a short one; both in either dtype."""
    noise = torch.randn(len(SIGMAS), *size, generator=seeded(3), dtype=torch.float64)
    smooth = standard(smoothed(noise, SIGMAS))
    for ratio in (0.0, 0.1, 0.5, 0.8, 1.0):
        want = smooth > quantile(ratio)
        for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
            images = noise.to(dtype)
            together = F.cow_mask(images, sigma=SIGMAS.to(dtype), ratio=ratio)
            alone = [F.cow_mask(images[i : i + 1], sigma=float(sigma), ratio=ratio) for i, sigma in enumerate(SIGMAS)]
            clear = (smooth - quantile(ratio)).abs() > slack
            assert clear.double().mean() > 0.99
            for got in (together, torch.cat(alone)):
                assert torch.equal(got[clear], want[clear])


def test_cow_mask__of_constant_noise_is_all_or_nothing_and_of_no_numbers_has_a_shape() -> None:
    assert F.cow_mask(torch.ones(1, 4, 5), sigma=1.0, ratio=1.0).all()
    assert not F.cow_mask(torch.ones(1, 4, 5), sigma=1.0, ratio=0.0).any()
    with torch.device("meta"):
        assert F.cow_mask(torch.ones(2, 4, 5), sigma=1.0).shape == (2, 4, 5)


@given(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 25), st.floats(0, 1))
@settings(max_examples=examples(60), deadline=None)
def test_block_mask_and_masked_images__equal_the_loop(
    n: int, height: int, width: int, block: int, ratio: float
) -> None:
    g, size, fill = seeded(height), (height, width), (0.25, 0.5, 0.75)
    scores = torch.rand(n, -(-height // block), -(-width // block), generator=g, dtype=torch.float64)
    images = torch.rand(n, 3, *size, generator=g)
    got = F.block_mask(scores, size, block, ratio=ratio)
    assert got.shape == (n, *size)
    for i, row, column in np.ndindex(n, *size):
        assert bool(got[i, row, column]) == (float(scores[i, row // block, column // block]) < ratio)
    if block <= min(size):
        hide = MaskedImages(block, ratio, fill)
        want = torch.where(got[:, None], torch.tensor(fill)[:, None, None], images)
        assert torch.equal(hide(images, scores=scores), want)
        scores = hide.sample(n, size, generator=seeded(width))
        assert torch.equal(hide(images, generator=seeded(width)), hide(images, scores=scores))


def cosines(size: int) -> Tensor:
    """Columns: the orthonormal waves of a cosine transform."""
    k = torch.arange(size, dtype=torch.float64)
    return torch.where(k > 0, 2 / size, 1 / size).sqrt() * (math.pi * k * (k[:, None] + 0.5) / size).cos()


@pytest.mark.parametrize(("size", "sigma"), [((48, 61), 2.0), ((33, 40), 5.0), ((64, 16), 1.2)])
def test_cow_masks__are_white_noise_after_a_gaussian(size: tuple[int, int], sigma: float) -> None:
    """Noise mirrored beyond the edge, smoothed tap by tap, against the draw that has the noise's longest waves."""
    height, width = size
    noise = torch.randn(3, height, width, generator=seeded(0), dtype=torch.float64)
    waves = cosines(height).T @ noise @ cosines(width)
    kept = [min(length, math.ceil(math.sqrt(2 * math.log(100)) * length / (math.pi * sigma))) for length in size]
    heights = waves[:, : kept[0], : kept[1]].flatten(1)
    scores = torch.cat([torch.zeros(3, 1), (1 + (heights / math.sqrt(2)).erf()) / 2], 1)
    tall = torch.from_numpy(np.pad(noise.numpy(), ((0, 0), (height, height), (width, width)), mode="symmetric"))
    smooth = standard(smoothed(tall, torch.tensor([sigma] * 3))[:, height:-height, width:-width])
    for ratio in (0.2, 0.5):
        got = CowMasks(sigma=sigma, ratio=ratio)(scores, size)
        clear = (smooth - quantile(ratio)).abs() > 0.03  # the short waves: 0.6 % of the deviation, 5 sigma of it
        assert clear.double().mean() > 0.95
        assert torch.equal(got[clear], (smooth > quantile(ratio))[clear])


@pytest.mark.parametrize("size", [(48, 61), (33, 40), (1, 9), (2, 3), (7, 1), (1, 1)])
def test_cow_masks__are_the_sum_of_their_waves(size: tuple[int, int]) -> None:
    """All waves at all pixels in double precision, where the module makes one half of the image from the other."""
    height, width = size
    scores = CowMasks(sigma=(2.0, 3.0)).sample(4, size, generator=seeded(6))
    scores[0], scores[1, 0], scores[2, 0] = scores[0].round(), 0.0, 1.0  # numbers at the ends are as good as any
    kept = [min(n, max(2, math.ceil(math.sqrt(2 * math.log(100)) * n / (math.pi * 2.0)))) for n in size]
    normal = math.sqrt(2) * (2 * scores[:, 1:].double() - 1).clamp(2**-24 - 1, 1 - 2**-24).erfinv().reshape(4, *kept)
    down, across = (math.pi * torch.arange(count).double() / n for count, n in zip(kept, size, strict=True))
    square = down[:, None].square() + across.square()
    sigma = (math.log(2) + math.log(1.5) * scores[:, 0].double()).exp()[:, None, None]
    damping = (-0.5 * sigma.square() * (square - (math.pi / max(size)) ** 2).clamp(min=0)).exp() * (square > 0)
    smooth = cosines(height)[:, : kept[0]] @ (normal * damping) @ cosines(width)[:, : kept[1]].T
    for ratio in (0.0, 0.4, 1.0):
        limit = smooth.square().mean((1, 2), keepdim=True).sqrt() * quantile(ratio)
        clear = (smooth - limit).abs() > 1e-5
        got = CowMasks(sigma=(2.0, 3.0), ratio=ratio)(scores, size)
        assert torch.equal(got[clear], (smooth > limit)[clear])
        assert clear.double().mean() > 0.99 or size == (1, 1)


@pytest.mark.parametrize("sigma", [0.3, 40.0, 1e4])
def test_cow_masks__of_any_size_and_width(sigma: float) -> None:
    """A Gaussian wider than the image leaves its longest wave: half of the image or so."""
    masks = CowMasks(sigma=sigma)
    for size in ((1, 1), (1, 9), (3, 2), (16, 16)):
        mask = masks(masks.sample(200, size, generator=seeded(0)), size)
        assert mask.shape == (200, *size)
        assert size[0] == 1 or 0.4 < float(mask.double().mean()) < 0.6
        assert size[0] == 1 or not mask.flatten(1).all(1).any()


HIDE = MaskedImages(4, 0.5, [0.25, 0.5, 0.75])
BLOBS, SIZE = CowMasks(sigma=(1.0, 4.0), ratio=0.4), (9, 14)
GRID = torch.rand(5, 3, 4, generator=seeded(2))
NOISE = {"noise": torch.randn(5, 20, 31, generator=seeded(1))}
OPS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "box": (lambda scores: F.box_mask(scores, SIZE), {"scores": torch.rand(5, 4, generator=seeded(0))}),
    "cow": (lambda noise: F.cow_mask(noise, sigma=3.0), NOISE),
    "cow of each": (lambda noise, sigma: F.cow_mask(noise, sigma=sigma), {**NOISE, "sigma": SIGMAS[:5].float()}),
    "block": (lambda scores: F.block_mask(scores, SIZE, 4), {"scores": GRID}),
    "CowMasks": (lambda scores: BLOBS(scores, SIZE), {"scores": BLOBS.sample(5, SIZE, generator=seeded(0))}),
    "MaskedImages": (lambda images, scores: HIDE(images, scores=scores), {
        "images": torch.rand(5, 3, *SIZE, generator=seeded(0)), "scores": GRID}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_masks__as_every_function(name: str) -> None:
    op, inputs = OPS[name]
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        values = {key: value.to(dtype) for key, value in inputs.items()}
        check_op(op, values)
        out = op(**values)
        assert out.dtype == (dtype if "images" in inputs else torch.bool)
        assert out.is_contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(**values), out)
    with Watch() as seen:
        op(**values)
    assert torch.float64 not in seen.dtypes  # which not every device has
    torch.compiler.reset()
    assert torch.equal(torch.compile(op, fullgraph=True, backend="aot_eager")(**values), out)


MODULES: dict[str, tuple[nn.Module, dict[str, object], Callable[[nn.Module, Tensor], Tensor]]] = {
    "boxes": (BoxMasks(area=(0.1, 0.3)), {"area": (0.1, 0.3)}, lambda masks, scores: masks(scores, SIZE)),
    "blobs": (BLOBS, {"sigma": (1.0, 4.0), "ratio": 0.4}, lambda masks, scores: masks(scores, SIZE)),
    "hide": (HIDE, {"block": 4, "ratio": 0.5, "fill": (0.25, 0.5, 0.75)},
        lambda hide, scores: hide(torch.ones(5, 3, *SIZE), scores=scores)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules__draw_rows_of_uniform_numbers(name: str) -> None:
    module, shown, call = MODULES[name]
    state = torch.get_rng_state()
    scores = module.sample(5, SIZE, generator=seeded(0))
    assert torch.equal(scores, module.sample(5, SIZE, generator=seeded(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert ((scores >= 0) & (scores < 1)).all()
    assert module.sample(2, SIZE, device="meta").is_meta
    assert not module.state_dict()
    check_module(copy.deepcopy(module), lambda module: call(module, scores), shown)


@pytest.mark.parametrize("name", MODULES)
def test_modules__take_sizes_in_ints_of_any_type(name: str) -> None:
    module = MODULES[name][0]
    scores = module.sample(5, [np.int64(SIZE[0]), np.uint16(SIZE[1])], generator=seeded(0))
    assert torch.equal(scores, module.sample(5, SIZE, generator=seeded(0)))


@pytest.mark.parametrize(
    ("size", "block"),
    [((1024, 1024), 64), ((512, 513), 64), ((512, 512), 32), ((64, 128), 32), ((40, 24), 24), ((1, 1), 1)],
)
def test_masked_images__blocks_go_by_the_size_where_asked(size: tuple[int, int], block: int) -> None:
    hide, same = MaskedImages(None), MaskedImages(block)
    scores = hide.sample(1, size, generator=seeded(0))
    assert torch.equal(scores, same.sample(1, size, generator=seeded(0)))
    images = torch.rand(1, 3, *size, generator=seeded(1))
    assert torch.equal(hide(images, scores=scores), same(images, scores=scores))


def test_masked_images__keep_the_layout_and_let_gradients_through() -> None:
    images = torch.rand(5, 3, *SIZE).to(memory_format=torch.channels_last).requires_grad_()
    hidden = HIDE(images, scores=GRID)
    assert hidden.is_contiguous(memory_format=torch.channels_last)
    hidden.sum().backward()
    assert torch.equal(images.grad == 1, hidden == images)
