"""Boxes, blobs and blocks, against loops over pixels."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import Watch, check_module, check_op
from crossmix import MaskedImages
from crossmix import functional as F
from oracles import seeded

SCORES = torch.rand(5, 4, generator=seeded(0))
NOISE = torch.randn(5, 20, 31, generator=seeded(1))
GRID = torch.rand(5, 3, 4, generator=seeded(2))
SIGMAS = torch.tensor([0.3, 1.0, 2.5, 6.0, 40.0])


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
@settings(max_examples=200, deadline=None)
def test_box_mask__equals_the_loop(n: int, height: int, width: int, seed: int) -> None:
    g = seeded(seed)
    low, high = sorted(torch.rand(2, generator=g).tolist())
    narrow, wide = sorted((torch.rand(2, generator=g) * 4 + 0.1).tolist())
    scores = torch.rand(n, 4, generator=g, dtype=torch.float64)  # as the loop computes
    got = F.box_mask(scores, (height, width), area=(low, high), aspect=(narrow, wide))
    want = [box_by_loop(row, height, width, (low, high), (narrow, wide)) for row in scores.tolist()]
    assert torch.equal(got, torch.stack(want) if want else torch.zeros(0, height, width, dtype=torch.bool))


def test_box_mask__shares_shapes_and_places_are_as_asked() -> None:
    n, height, width = 4000, 90, 120
    mask = F.box_mask(torch.rand(n, 4, generator=seeded(0)), (height, width), area=(0.02, 0.25), aspect=(0.5, 2.0))
    rows, columns = mask.any(2).sum(1), mask.any(1).sum(1)
    assert torch.equal(rows * columns, mask.sum((1, 2)))  # one full rectangle
    share = mask.double().mean((1, 2))
    slack = ((rows + 0.5) * (columns + 0.5) / (rows * columns)).max()  # sides are off by half a pixel at most
    assert 0.02 / slack <= share.min() <= share.max() <= 0.25 * slack
    assert abs(float(share.mean()) - 0.135) < 4 * 0.23 / math.sqrt(12 * n)
    assert abs(float((columns / rows).log().mean())) < 4 * 2 * math.log(2) / math.sqrt(12 * n)
    ends = F.box_mask(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]]), (height, width))
    assert ends[0, 0, 0]
    assert ends[1, -1, -1]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_box_mask__every_place_where_it_fits_is_as_likely(place: int) -> None:
    """A 2 x 2 box fits into four places on a side of five pixels."""
    scores = torch.tensor([[0.5, 0.5, (place + 0.5) / 4, 0.0]])
    mask = F.box_mask(scores, (5, 5), area=(0.16, 0.16), aspect=(1.0, 1.0))
    assert mask[0].nonzero().tolist() == [[place, 0], [place, 1], [place + 1, 0], [place + 1, 1]]


def mirrored(i: int, size: int) -> int:
    while not 0 <= i < size:
        i = -i if i < 0 else 2 * (size - 1) - i
    return i


def smooth_by_loop(noise: np.ndarray, sigma: float) -> np.ndarray:
    """Row by row, then column by column; the taps reach as far as the image, and are mirrored beyond its border."""
    for axis in (0, 1):
        size = noise.shape[axis]
        taps = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-(size - 1), size)]
        total = sum(taps)
        lines = np.moveaxis(noise, axis, 0)
        smooth = np.stack(
            [
                sum(
                    tap / total * lines[mirrored(i + d, size)]
                    for d, tap in zip(range(1 - size, size), taps, strict=True)
                )
                for i in range(size)
            ]
        )
        noise = np.moveaxis(smooth, 0, axis)
    return noise


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("size", [(20, 31), (1, 9), (2, 3), (17, 1)])
def test_cow_mask__equals_the_loop(ratio: float, size: tuple[int, int]) -> None:
    noise = torch.randn(5, *size, generator=seeded(3), dtype=torch.float64)
    got = F.cow_mask(noise, sigma=SIGMAS.double(), ratio=ratio)
    for i, sigma in enumerate(SIGMAS.tolist()):
        smooth = smooth_by_loop(noise[i].numpy(), sigma)
        limit = smooth.mean() + smooth.std() * math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * ratio).double()))
        clear = np.abs(smooth - limit) > 1e-9
        assert np.array_equal(got[i].numpy()[clear], (smooth > limit)[clear])
        assert torch.equal(F.cow_mask(noise[i : i + 1], sigma=sigma, ratio=ratio)[0], got[i])


def test_cow_mask__marks_the_share_it_is_asked_for() -> None:
    noise = torch.randn(8, 128, 160, generator=seeded(0))
    for ratio in (0.0, 0.05, 0.3, 0.5, 0.9, 1.0):
        shares = F.cow_mask(noise, sigma=2.0, ratio=ratio).double().mean((1, 2))
        assert float((shares - ratio).abs().max()) < 0.02
    assert F.cow_mask(torch.ones(1, 4, 5), sigma=1.0, ratio=1.0).all()
    assert not F.cow_mask(torch.ones(1, 4, 5), sigma=1.0, ratio=0.0).any()


def test_cow_mask__wider_gaussians_make_larger_blobs() -> None:
    noise = torch.randn(1, 128, 128, generator=seeded(0)).expand(4, -1, -1)
    mask = F.cow_mask(noise, sigma=torch.tensor([0.5, 2.0, 6.0, 16.0]))
    edges = (mask[:, 1:] != mask[:, :-1]).sum((1, 2)).tolist()
    assert edges == sorted(edges, reverse=True)
    assert edges[0] > 4 * edges[-1]


def test_cow_mask__autocast_changes_nothing() -> None:
    want = F.cow_mask(NOISE, sigma=SIGMAS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(F.cow_mask(NOISE, sigma=SIGMAS), want)


@given(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20), st.integers(1, 25), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_block_mask__equals_the_loop(n: int, height: int, width: int, block: int, ratio: float) -> None:
    scores = torch.rand(n, -(-height // block), -(-width // block), generator=seeded(height), dtype=torch.float64)
    got = F.block_mask(scores, (height, width), block, ratio=ratio)
    assert got.shape == (n, height, width)
    assert got.is_contiguous()
    for i, row, column in np.ndindex(n, height, width):
        assert bool(got[i, row, column]) == (float(scores[i, row // block, column // block]) < ratio)


OPS: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
    "box": (lambda scores: F.box_mask(scores, (9, 12)), {"scores": SCORES}),
    "cow": (lambda noise: F.cow_mask(noise, sigma=3.0), {"noise": NOISE}),
    "cow of each": (lambda noise, sigma: F.cow_mask(noise, sigma=sigma), {"noise": NOISE, "sigma": SIGMAS}),
    "block": (lambda scores: F.block_mask(scores, (9, 14), 4), {"scores": GRID}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_masks__as_every_function(name: str, dtype: torch.dtype) -> None:
    op, inputs = OPS[name]
    inputs = {key: value.to(dtype) for key, value in inputs.items()}
    check_op(op, inputs)
    mask = op(**inputs)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()


@pytest.mark.parametrize("name", OPS)
def test_masks__compiled_equal_eager_and_no_device_needs_float64(name: str) -> None:
    torch.compiler.reset()
    op, inputs = OPS[name]
    with Watch() as seen:
        want = op(**inputs)
    assert torch.float64 not in seen.dtypes
    assert torch.equal(torch.compile(op, fullgraph=True, backend="aot_eager")(**inputs), want)


CASES: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("scores", lambda: F.box_mask([0.1], (4, 4)), TypeError, "`scores` must be a torch.Tensor, got list"),
    ("integers", lambda: F.box_mask(SCORES.long(), (4, 4)), TypeError, "`scores` must be floating, got torch.int64"),
    ("columns", lambda: F.box_mask(SCORES[:, :3], (4, 4)), ValueError, r"shape \(N, 4\), got \(5, 3\)"),
    ("area", lambda: F.box_mask(SCORES, (4, 4), area=(0.5, 0.4)), ValueError, "`area` must be .* got"),
    ("area nan", lambda: F.box_mask(SCORES, (4, 4), area=(0.1, math.nan)), ValueError, "`area` must be .* got"),
    ("aspect", lambda: F.box_mask(SCORES, (4, 4), aspect=(0, 1)), ValueError, "`aspect` must be .* 0 < low"),
    ("size", lambda: F.box_mask(SCORES, (4, 4, 1)), TypeError, "two ints, height and width"),
    ("float size", lambda: F.block_mask(GRID, (4.0, 4), 4), TypeError, "two ints, height and width"),
    ("empty size", lambda: F.box_mask(SCORES, (0, 4)), ValueError, "`size` must be positive"),
    ("noise", lambda: F.cow_mask(NOISE[:, None], sigma=1.0), ValueError, r"`noise` must have shape \(N, H, W\)"),
    ("ratio", lambda: F.cow_mask(NOISE, sigma=1.0, ratio=1.5), ValueError, r"`ratio` must lie in \[0, 1\]"),
    ("sigma", lambda: F.cow_mask(NOISE, sigma=0.0), ValueError, "`sigma` must be positive"),
    ("a sigma", lambda: F.cow_mask(NOISE, sigma=SIGMAS - 1), ValueError, "`sigma` must be positive, got -0.69"),
    ("sigmas", lambda: F.cow_mask(NOISE, sigma=SIGMAS[:2]), ValueError, r"\(N,\) = \(5,\), got \(2,\)"),
    ("sigma type", lambda: F.cow_mask(NOISE, sigma="wide"), TypeError, "a number or a tensor, got str"),
    ("sigma ids", lambda: F.cow_mask(NOISE, sigma=SIGMAS.long()), TypeError, "`sigma` must be floating"),
    ("sigma device", lambda: F.cow_mask(NOISE, sigma=SIGMAS.to("meta")), ValueError, "`sigma` is on meta"),
    ("block", lambda: F.block_mask(GRID, (9, 14), 0), ValueError, "`block` must be at least 1"),
    ("block type", lambda: F.block_mask(GRID, (9, 14), 4.0), TypeError, "`block` must be an int, got float"),
    ("grid", lambda: F.block_mask(GRID, (9, 14), 5), ValueError, r"= \(N, 2, 3\), got \(5, 3, 4\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def hidden_by_loop(images: Tensor, scores: Tensor, block: int, ratio: float, fill: tuple[float, ...]) -> Tensor:
    out = images.clone()
    for i, c, row, column in np.ndindex(*images.shape):
        if float(scores[i, row // block, column // block]) < ratio:
            out[i, c, row, column] = fill[c]
    return out


@given(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_masked_images__equals_the_loop(n: int, height: int, width: int, share: float, ratio: float) -> None:
    images = torch.rand(n, 3, height, width, generator=seeded(height), dtype=torch.float64)
    block = 1 + int(share * (min(height, width) - 1))
    hide = MaskedImages(block, ratio)
    scores = hide.sample(n, (height, width), generator=seeded(width))
    assert scores.shape == (n, -(-height // block), -(-width // block))
    want = hidden_by_loop(images, scores, block, ratio, (0.485, 0.456, 0.406))
    assert torch.equal(hide(images, scores=scores), want)
    assert torch.equal(hide(images, generator=seeded(width)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_masked_images__as_every_function(dtype: torch.dtype) -> None:
    hide = MaskedImages(4, fill=(0.25, 0.5, 0.75))
    images = torch.rand(5, 3, 9, 14, generator=seeded(0)).to(dtype)
    check_op(lambda images, scores: hide(images, scores=scores), {"images": images, "scores": GRID})
    for layout in (torch.contiguous_format, torch.channels_last):
        hidden = hide(images.contiguous(memory_format=layout), scores=GRID)
        assert hidden.dtype == dtype
        assert hidden.is_contiguous(memory_format=layout)


def test_masked_images__as_every_module() -> None:
    images = torch.rand(5, 3, 9, 14, generator=seeded(0))
    shown = {"block": 4, "ratio": 0.5, "fill": (0.0, 0.0, 0.0)}
    check_module(MaskedImages(4, 0.5, [0, 0, 0]), lambda hide: hide(images, scores=GRID), shown)


def test_masked_images__compiled_equal_eager() -> None:
    torch.compiler.reset()
    images = torch.rand(5, 3, 9, 14, generator=seeded(0))
    hide = MaskedImages(4)
    compiled = torch.compile(hide, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, scores=GRID), hide(images, scores=GRID))


def test_masked_images__hides_the_share_it_is_asked_for_in_every_block() -> None:
    n, ratio = 20_000, 0.7
    hidden = MaskedImages(1, ratio, (2.0,))(torch.zeros(n, 1, 2, 3), generator=seeded(0))[:, 0] == 2.0
    counts = hidden.sum(0).flatten().double()
    chi_square = float(((counts - ratio * n) ** 2 / (n * ratio * (1 - ratio))).sum())
    assert chi_square < 22.5  # of 6 degrees of freedom, in all but 1 of 1000
    pairs = torch.corrcoef(hidden.flatten(1).T.double()) - torch.eye(6)
    assert float(pairs.abs().max()) < 4 / math.sqrt(n)  # each by itself


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


def test_masked_images__leaves_the_global_generator_alone_and_lets_gradients_through() -> None:
    state = torch.get_rng_state()
    images = torch.rand(2, 3, 8, 8, generator=seeded(0)).requires_grad_()
    hidden = MaskedImages(4)(images, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    hidden.sum().backward()
    assert torch.equal(images.grad == 1, hidden == images)


IMAGES = torch.rand(5, 3, 9, 14, generator=seeded(4))
MASKED: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("block", lambda: MaskedImages(0), ValueError, "`block` must be at least 1 pixel, got 0"),
    ("block type", lambda: MaskedImages(4.0), TypeError, "`block` must be an int, got float"),
    ("ratio", lambda: MaskedImages(4, 1.5), ValueError, r"`ratio` must lie in \[0, 1\], got 1.5"),
    ("fill", lambda: MaskedImages(4, fill=()), ValueError, "`fill` must hold a finite number per channel, got"),
    ("fill nan", lambda: MaskedImages(4, fill=(math.nan,) * 3), ValueError, "`fill` must hold a finite number"),
    ("fill type", lambda: MaskedImages(4, fill=0.5), TypeError, "`fill` must hold a number per channel, got float"),
    ("too large", lambda: MaskedImages()(IMAGES), ValueError, "got 64 pixels for images of 9 x 14; take a smaller one"),
    ("large", lambda: MaskedImages(10).sample(1, (9, 14)), ValueError, "got 10 pixels for images of 9 x 14"),
    ("size", lambda: MaskedImages().sample(1, 64), TypeError, "`size` must be two ints, height and width, got 64"),
    ("images", lambda: MaskedImages(4)(IMAGES[0]), ValueError, r"`images` must have shape \(N, 3, H, W\)"),
    ("channels", lambda: MaskedImages(4)(IMAGES[:, :1]), ValueError, r"must have shape \(N, 3, H, W\), got \(5, 1,"),
    ("bytes", lambda: MaskedImages(4)(IMAGES.byte()), TypeError, r"`images` must be floating in \[0, 1\]"),
    ("grid", lambda: MaskedImages(5)(IMAGES, scores=GRID), ValueError, r"= \(N, 2, 3\), got \(5, 3, 4\)"),
    ("batch", lambda: MaskedImages(4)(IMAGES[:2], scores=GRID), ValueError, "is for 5 images but `images` holds 2"),
    ("device", lambda: MaskedImages(4)(IMAGES, scores=GRID.to("meta")), ValueError, "`scores` is on meta but `images`"),
]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in MASKED], ids=[case[0] for case in MASKED])
def test_masked_images__mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
