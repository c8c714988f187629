"""Boxes, blobs and blocks, against loops over pixels."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import Watch, check_module, check_op
from crossmix import BoxMasks, CowMasks, MaskedImages
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


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How far counts are from the law, over the value that chance exceeds once in 10,000 times."""
    expected = probabilities.double() * int(counts.sum())
    assert abs(float(probabilities.sum()) - 1) < 1e-9
    assert expected.min() > 5
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return float(((counts - expected) ** 2 / expected).sum()) / limit


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


def test_block_mask__hides_each_block_by_itself_with_the_asked_chance() -> None:
    hidden = F.block_mask(torch.rand(20_000, 2, 3, generator=seeded(0)), (2, 3), 1, ratio=0.7).flatten(1)
    sets = (hidden.long() * 2 ** torch.arange(6)).sum(1).bincount(minlength=64)
    ones = torch.tensor([bin(i).count("1") for i in range(64)])
    counts = torch.zeros(7).scatter_add(0, ones, sets.float())
    assert chi_square(counts, torch.tensor([math.comb(6, k) * 0.7**k * 0.3 ** (6 - k) for k in range(7)])) < 1
    assert abs(float(hidden.double().mean()) - 0.7) < 4 * math.sqrt(0.21 / hidden.numel())


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


@pytest.mark.parametrize("size", [(64, 90), (150, 20), (20, 150)])
@pytest.mark.parametrize("sigma", [1.0, 6.0, 15.0])
def test_cow_mask__of_few_waves_or_all_pixels_equals_the_loop(size: tuple[int, int], sigma: float) -> None:
    """By waves along a long side of the image, by all pixels along a short one; both in either dtype."""
    noise = torch.randn(2, *size, generator=seeded(4), dtype=torch.float64)
    for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        got = F.cow_mask(noise.to(dtype), sigma=sigma, ratio=0.3)
        for i in range(2):
            smooth = smooth_by_loop(noise[i].numpy(), sigma)
            smooth = (smooth - smooth.mean()) / smooth.std()
            limit = math.sqrt(2) * float(torch.erfinv(torch.tensor(0.4).double()))
            clear = np.abs(smooth - limit) > slack
            assert clear.mean() > 0.999
            assert np.array_equal(got[i].numpy()[clear], (smooth > limit)[clear])


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


def cosines(size: int) -> Tensor:
    """Columns: the orthonormal waves of a cosine transform."""
    waves = [
        [math.sqrt((2 if k else 1) / size) * math.cos(math.pi * k * (x + 0.5) / size) for k in range(size)]
        for x in range(size)
    ]
    return torch.tensor(waves, dtype=torch.float64)


@pytest.mark.parametrize("ratio", [0.2, 0.5])
@pytest.mark.parametrize(("size", "sigma"), [((48, 61), 2.0), ((33, 40), 5.0), ((64, 16), 1.2)])
def test_cow_masks__are_white_noise_after_a_gaussian(size: tuple[int, int], sigma: float, ratio: float) -> None:
    """Noise mirrored beyond the edge, smoothed tap by tap, against the draw that has the noise's longest waves."""
    height, width = size
    noise = torch.randn(3, height, width, generator=seeded(0), dtype=torch.float64)
    masks = CowMasks(sigma=sigma, ratio=ratio)
    waves = cosines(height).T @ noise @ cosines(width)
    kept = [min(length, math.ceil(math.sqrt(2 * math.log(100)) * length / (math.pi * sigma))) for length in size]
    heights = waves[:, : kept[0], : kept[1]].flatten(1)
    scores = torch.cat([torch.zeros(3, 1), (1 + (heights / math.sqrt(2)).erf()) / 2], 1)
    assert scores.shape == masks.sample(3, size).shape
    got = masks(scores, size)
    assert torch.equal(
        CowMasks(sigma=(sigma, 9.0), ratio=ratio)(scores, size), got
    )  # the lowest score: the least sigma
    for i in range(3):
        tall = np.pad(noise[i].numpy(), ((height, height), (width, width)), mode="symmetric")
        smooth = smooth_by_loop(tall, sigma)[height : 2 * height, width : 2 * width]
        smooth = (smooth - smooth.mean()) / smooth.std()
        limit = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * ratio).double()))
        clear = np.abs(smooth - limit) > 0.03  # without the short waves: 0.6 % of the standard deviation, 5 sigma of it
        assert clear.mean() > 0.95
        assert np.array_equal(got[i].numpy()[clear], (smooth > limit)[clear])


@pytest.mark.parametrize("size", [(48, 61), (33, 40), (1, 9), (2, 3), (7, 1), (1, 1)])
def test_cow_masks__are_the_sum_of_their_waves(size: tuple[int, int]) -> None:
    """All waves at all pixels in double precision, where the module makes one half of the image from the other."""
    height, width = size
    masks = CowMasks(sigma=(2.0, 3.0), ratio=0.4)
    scores = masks.sample(4, size, generator=seeded(6))
    kept = [min(n, max(2, math.ceil(math.sqrt(2 * math.log(100)) * n / (math.pi * 2.0)))) for n in size]
    normal = math.sqrt(2) * torch.erfinv(2 * scores[:, 1:].double() - 1).reshape(4, *kept)
    down, across = (math.pi * torch.arange(count).double() / n for count, n in zip(kept, size, strict=True))
    square = down[:, None].square() + across.square()
    sigma = (math.log(2) + math.log(1.5) * scores[:, 0].double()).exp()[:, None, None]
    damping = (-0.5 * sigma.square() * (square - (math.pi / max(size)) ** 2).clamp(min=0)).exp() * (square > 0)
    smooth = cosines(height)[:, : kept[0]] @ (normal * damping) @ cosines(width)[:, : kept[1]].T
    limit = smooth.square().mean((1, 2), keepdim=True).sqrt() * math.sqrt(2) * torch.erfinv(torch.tensor(0.2).double())
    clear = (smooth - limit).abs() > 1e-5
    got = masks(scores, size)
    assert torch.equal(got[clear], (smooth > limit)[clear])
    assert clear.double().mean() > 0.99 or size == (1, 1)


def test_cow_masks__mark_the_share_they_are_asked_for() -> None:
    for ratio, slack in ((0.0, 0.0), (0.3, 0.02), (0.5, 0.02), (1.0, 0.0)):
        masks = CowMasks(sigma=(2.0, 4.0), ratio=ratio)
        mask = masks(masks.sample(64, (96, 128), generator=seeded(0)), (96, 128))
        assert abs(float(mask.double().mean()) - ratio) <= slack


def test_cow_masks__sigma_is_linear_in_the_logarithm_of_the_first_number() -> None:
    masks = CowMasks(sigma=(8.0, 32.0))
    scores = masks.sample(1, (80, 90), generator=seeded(0)).expand(3, -1).clone()
    scores[:, 0] = torch.tensor([0.0, 0.5, 1.0])
    got = masks(scores, (80, 90))
    edges = (got[:, 1:] != got[:, :-1]).sum((1, 2)).tolist()
    assert edges == sorted(edges, reverse=True)
    for i, sigma in enumerate((8.0, 16.0, 32.0)):
        fewer = CowMasks(sigma=sigma)
        rows, columns = fewer.sample(1, (80, 90)).shape[1] - 1, masks.sample(1, (80, 90)).shape[1] - 1
        assert rows <= columns
        one = CowMasks(sigma=(8.0, sigma))
        assert torch.equal(one(torch.cat([torch.ones(1, 1), scores[i : i + 1, 1:]], 1), (80, 90)), got[i : i + 1])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (16, 16)])
@pytest.mark.parametrize("sigma", [0.3, 40.0, 1e4])
def test_cow_masks__of_any_size_and_width(size: tuple[int, int], sigma: float) -> None:
    """A Gaussian wider than the image leaves its longest wave: half of the image or so."""
    masks = CowMasks(sigma=sigma)
    mask = masks(masks.sample(200, size, generator=seeded(0)), size)
    assert mask.shape == (200, *size)
    if size[0] > 1:
        assert 0.4 < float(mask.double().mean()) < 0.6
        assert not mask.flatten(1).all(1).any()


def test_cow_masks__of_numbers_at_the_ends_are_as_good_as_any() -> None:
    masks = CowMasks(sigma=2.0)
    scores = masks.sample(2, (20, 20), generator=seeded(0))
    for end in (0.0, 1.0):
        scores[:, ::3] = end
        mask = masks(scores, (20, 20))
        assert 0.05 < float(mask.double().mean()) < 0.95


SOURCES = {
    "boxes": (BoxMasks(area=(0.1, 0.3)), {"area": (0.1, 0.3)}),
    "blobs": (CowMasks(sigma=(1.0, 4.0), ratio=0.4), {"sigma": (1.0, 4.0), "ratio": 0.4}),
}


@pytest.mark.parametrize("name", SOURCES)
def test_mask_sources__are_modules_whose_draw_is_rows(name: str) -> None:
    masks, shown = SOURCES[name]
    size = (18, 25)
    scores = masks.sample(5, size, generator=seeded(0))
    state = torch.get_rng_state()
    assert torch.equal(scores, masks.sample(5, size, generator=seeded(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert ((scores >= 0) & (scores < 1)).all()
    assert masks.sample(2, size, device="meta").device.type == "meta"
    assert not masks.state_dict()
    check_module(copy.deepcopy(masks), lambda module: module(scores, size), shown)
    check_op(lambda scores: masks(scores, size), {"scores": scores})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masks(scores, size), masks(scores, size))
    with Watch() as seen:
        want = masks(scores, size)
    assert torch.float64 not in seen.dtypes
    torch.compiler.reset()
    assert torch.equal(torch.compile(masks, fullgraph=True, backend="aot_eager")(scores, size), want)


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
    (
        "a sigma",
        lambda: F.cow_mask(NOISE, sigma=SIGMAS - 1),
        ValueError,
        "`sigma` must be positive and finite, got .-0.69",
    ),
    ("sigmas", lambda: F.cow_mask(NOISE, sigma=SIGMAS[:2]), ValueError, r"\(N,\) = \(5,\), got \(2,\)"),
    ("sigma type", lambda: F.cow_mask(NOISE, sigma="wide"), TypeError, "a number or a tensor, got str"),
    ("sigma ids", lambda: F.cow_mask(NOISE, sigma=SIGMAS.long()), TypeError, "`sigma` must be floating"),
    ("sigma device", lambda: F.cow_mask(NOISE, sigma=SIGMAS.to("meta")), ValueError, "`sigma` is on meta"),
    ("block", lambda: F.block_mask(GRID, (9, 14), 0), ValueError, "`block` must be at least 1"),
    ("block type", lambda: F.block_mask(GRID, (9, 14), 4.0), TypeError, "`block` must be an int, got float"),
    ("box range", lambda: BoxMasks(area=(0.5, 0.4)), ValueError, "`area` must be .* got"),
    ("box pair", lambda: BoxMasks(aspect=2.0), TypeError, r"`aspect` must be two numbers \(low, high\), got 2.0"),
    ("box words", lambda: F.box_mask(SCORES, (4, 4), area=("a", "b")), TypeError, "`area` must be two numbers"),
    ("box draw", lambda: BoxMasks()(SCORES[:, :3], (4, 4)), ValueError, r"shape \(N, 4\), got \(5, 3\)"),
    ("cow sigma", lambda: CowMasks(sigma=0.0), ValueError, "`sigma` must be .* 0 < low <= high"),
    ("cow range", lambda: CowMasks(sigma=(32.0, 8.0)), ValueError, "`sigma` must be .* 0 < low <= high"),
    ("cow nan", lambda: CowMasks(sigma=math.nan), ValueError, "`sigma` must be .* 0 < low <= high"),
    ("cow type", lambda: CowMasks(sigma=("a", "b")), TypeError, "`sigma` must be two numbers"),
    ("cow bool", lambda: CowMasks(sigma=True), TypeError, "`sigma` must be two numbers"),
    ("cow ratio", lambda: CowMasks(ratio=2.0), ValueError, r"`ratio` must lie in \[0, 1\]"),
    ("cow draw size", lambda: CowMasks().sample(2), ValueError, "`size` must be given"),
    (
        "cow other size",
        lambda: CowMasks(sigma=1.0)(CowMasks(sigma=1.0).sample(2, (8, 8)), (9, 9)),
        ValueError,
        "draw them",
    ),
    ("cow integers", lambda: CowMasks()(torch.ones(2, 5).long(), (8, 8)), TypeError, "`scores` must be floating"),
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
    ("block", lambda: MaskedImages(0), ValueError, "`block` must be at least 1, got 0; it is in pixels"),
    ("block type", lambda: MaskedImages(4.0), TypeError, "`block` must be an int, got float"),
    ("ratio", lambda: MaskedImages(4, 1.5), ValueError, r"`ratio` must lie in \[0, 1\], got 1.5"),
    ("fill", lambda: MaskedImages(4, fill=()), ValueError, "`fill` must hold a finite number per channel, got"),
    ("fill nan", lambda: MaskedImages(4, fill=(math.nan,) * 3), ValueError, "`fill` must hold a finite number"),
    ("fill type", lambda: MaskedImages(4, fill=0.5), TypeError, "`fill` must hold a number per channel, got 0.5"),
    ("fill word", lambda: MaskedImages(4, fill="mean"), TypeError, "`fill` must hold a number per channel, got 'mean'"),
    ("fill none", lambda: MaskedImages(4, fill=[None]), TypeError, r"must hold a number per channel, got \[None"),
    ("too large", lambda: MaskedImages()(IMAGES), ValueError, "got 64 pixels for images of 9 x 14; use a smaller one"),
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
