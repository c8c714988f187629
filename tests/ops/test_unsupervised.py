"""Scores without labels, against loops over pixels and pairs of pixels."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import Watch
from crossmix.datasets import StreetScenes
from crossmix.diagnostics import UnsupervisedQuality, UnsupervisedScores
from crossmix.diagnostics.unsupervised import _spread
from crossmix.evaluation import evaluate
from oracles import seeded


def softmax(values: list[float]) -> list[float]:
    odds = [math.exp(value - max(values)) for value in values]
    return [value / sum(odds) for value in odds]


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p)


def density_by_loop(probs: list[list[float]], temperature: float) -> list[float]:
    """For each pixel, the entropy over all others of the softmax of their cosine similarities."""
    found = []
    for i, p in enumerate(probs):
        similar = []
        for j, q in enumerate(probs):
            if j != i:
                dot = sum(a * b for a, b in zip(p, q, strict=True))
                similar.append(dot / math.hypot(*p) / math.hypot(*q) / temperature)
        found.append(entropy(softmax(similar)))
    return found


def scores_by_loop(batches: list[Tensor], temperature: float) -> UnsupervisedQuality:
    """All pixels of every batch compared with all others of it; those with NaN left out."""
    everything, densities = [], []
    for logits in batches:
        pixels = logits.movedim(1, -1).flatten(0, 2).double().tolist()
        probs = [softmax(values) for values in pixels if not any(map(math.isnan, values))]
        everything += probs
        densities += density_by_loop(probs, temperature) if len(probs) > 1 else []
    mean = [sum(p[c] for p in everything) / len(everything) for c in range(batches[0].shape[1])]
    sure = sum(map(entropy, everything)) / len(everything)
    return UnsupervisedQuality(sure, entropy(mean) - sure, sum(densities) / len(densities))


@given(
    st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
    st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 3), st.integers(2, 5)),
    st.sampled_from([0.05, 0.5, 3.0]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.sampled_from([torch.float32, torch.float64, torch.float16]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_compute__equals_the_loop(
    seeds: list[int], size: tuple[int, int, int, int], temperature: float, scale: float, dtype: torch.dtype, hole: bool
) -> None:
    n, c, height, width = size
    scores = UnsupervisedScores(c, temperature=temperature)
    batches = []
    for seed in seeds:
        logits = (torch.randn(n, c, height, width, generator=seeded(seed)) * scale).to(dtype)
        if hole and n * height * width > 2:
            logits[0, 0, 0, 0] = math.nan
        before = logits.clone()
        scores.update(logits)
        assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
        batches.append(logits)
    assert scores.compute() == pytest.approx(scores_by_loop(batches, temperature), abs=3e-6, rel=1e-6)


def test_compute__by_hand() -> None:
    """Sure of everything, in two groups of equal size: every neighbour is in a pixel's own group."""
    logits = torch.tensor([40.0, -40.0]).repeat(8)[:16].view(1, 1, 4, 4)
    scores = UnsupervisedScores(2)
    scores.update(torch.cat([logits, -logits], 1))
    entropy, information, density = scores.compute()
    assert entropy == pytest.approx(0, abs=1e-6)
    assert information == pytest.approx(math.log(2), abs=1e-6)
    assert density == pytest.approx(math.log(7), abs=1e-5)  # of the eight, one is the pixel itself
    scores.reset()
    scores.update(torch.zeros(1, 2, 4, 4))  # knows nothing: no score but the density can tell
    assert scores.compute() == pytest.approx((math.log(2), 0, math.log(15)), abs=1e-5)


def test_information__tells_a_network_that_calls_everything_one_class() -> None:
    collapsed, good = UnsupervisedScores(3), UnsupervisedScores(3)
    truth = torch.randint(0, 3, (2, 8, 8), generator=seeded(0))
    good.update(20.0 * nn.functional.one_hot(truth, 3).movedim(-1, 1))
    collapsed.update(20.0 * nn.functional.one_hot(truth * 0, 3).movedim(-1, 1))
    assert collapsed.compute().entropy == pytest.approx(good.compute().entropy, abs=1e-6)
    assert collapsed.compute().information < 0.01
    assert good.compute().information > 1


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_spread__different_places_in_equal_parts(total: int, count: int) -> None:
    if count > total:
        return
    places = _spread(total, count, torch.device("cpu")).tolist()
    assert len(set(places)) == count
    for k, place in enumerate(places):
        assert k * total // count <= place < (k + 1) * total // count


@pytest.mark.parametrize("size", [(1000, 2000), (500, 1000), (128, 1000), (64, 125), (512, 1024), (1024, 2048)])
def test_spread__prefers_no_row_and_no_column(size: tuple[int, int]) -> None:
    """Also where the parts are as long as a row, or twice: chi-square over ten stripes each way."""
    places = _spread(size[0] * size[1], 1000, torch.device("cpu"))
    for where, length in ((places // size[1], size[0]), (places % size[1], size[1])):
        found = torch.bincount(where * 10 // length, minlength=10)
        assert float(((found - 100) ** 2 / 100).sum()) < 21.7  # 9 degrees of freedom, 1 in 100


def test_update__samples_pixels_and_counts_the_others_all_the_same() -> None:
    logits = torch.randn(2, 4, 9, 13, generator=seeded(2)) * 3
    scores, whole = UnsupervisedScores(4, pixels=31), UnsupervisedScores(4)
    scores.update(logits)
    whole.update(logits)
    assert scores.compute()[:2] == whole.compute()[:2]
    places = _spread(2 * 9 * 13, 31, torch.device("cpu"))
    chosen = logits.movedim(1, -1).flatten(0, 2)[places]
    want = scores_by_loop([chosen.T[None, :, None]], 0.05).neighborhood_density
    assert scores.compute().neighborhood_density == pytest.approx(want, abs=1e-5)
    state = torch.get_rng_state()
    again = UnsupervisedScores(4, pixels=31)
    again.update(logits)
    assert again.compute() == scores.compute()
    assert torch.equal(torch.get_rng_state(), state)


def test_update__strides_order_and_memory_formats_change_nothing() -> None:
    batches = [torch.randn(2, 5, 6, 7, generator=seeded(seed)) for seed in range(4)]
    one, other = UnsupervisedScores(5), UnsupervisedScores(5)
    for logits in batches:
        one.update(logits)
    for logits in reversed(batches):
        other.update(logits.to(memory_format=torch.channels_last))
    for name, value in one.named_buffers():
        assert (other.get_buffer(name) - value).abs().max() <= 400, name
    other.reset()
    for logits in reversed(batches):
        other.update(logits)
    assert other.compute() == one.compute()  # whole numbers in any order


def test_update__in_float32_under_autocast() -> None:
    logits = torch.randn(1, 5, 6, 7, generator=seeded(0))
    one, other = UnsupervisedScores(5), UnsupervisedScores(5)
    one.update(logits)
    with torch.autocast("cpu", torch.bfloat16):
        other.update(logits)
    assert other.compute() == one.compute()


def test_update__needs_no_gradient_and_no_more_memory_than_the_probabilities() -> None:
    logits = torch.randn(1, 5, 6, 7, requires_grad=True)
    scores = UnsupervisedScores(5, pixels=10)
    with Watch() as seen:
        scores.update(logits)
    assert seen.largest <= logits.numel()
    assert not any(buffer.requires_grad for buffer in scores.buffers())


def test_masked_classes__have_no_part() -> None:
    """A network may say minus infinity of a class."""
    logits = torch.randn(1, 3, 4, 5, generator=seeded(0))
    masked = torch.cat([logits, torch.full((1, 1, 4, 5), -math.inf)], 1)
    one, other = UnsupervisedScores(3), UnsupervisedScores(4)
    one.update(logits)
    other.update(masked)
    assert other.compute() == pytest.approx(one.compute(), abs=1e-6)


def test_nothing_seen__is_nan() -> None:
    scores = UnsupervisedScores(3)
    for logits in (torch.zeros(0, 3, 4, 5), torch.zeros(2, 3, 0, 5), torch.full((1, 3, 2, 2), math.nan)):
        scores.update(logits)
        assert all(map(math.isnan, scores.compute()))
    scores.update(torch.zeros(1, 3, 1, 1))  # one pixel has no others
    assert scores.compute()[:2] == pytest.approx((math.log(3), 0), abs=1e-6)
    assert math.isnan(scores.compute().neighborhood_density)
    two = torch.zeros(1, 3, 1, 2)
    two[..., 1] = math.nan
    scores.update(two)
    assert math.isnan(scores.compute().neighborhood_density)


def test_state__copies_casts_merges_and_loads() -> None:
    scores = UnsupervisedScores(4, pixels=20, temperature=0.1)
    assert repr(scores) == "UnsupervisedScores(num_classes=4, pixels=20, temperature=0.1)"
    empty = copy.deepcopy(scores.state_dict())
    logits = torch.randn(2, 4, 6, 7, generator=seeded(1))
    scores.update(logits)
    want = scores.compute()
    loaded = UnsupervisedScores(4)
    loaded.load_state_dict(scores.state_dict())
    for other in (loaded, copy.deepcopy(scores), pickle.loads(pickle.dumps(scores)), scores.half()):
        assert other.compute() == want
    scores.merge()
    scores.merge()
    assert scores.compute() == want
    scores.update(torch.zeros(1, 4, 3, 3))  # what was merged is stale now
    assert scores.compute() != want
    scores.merge()
    scores.load_state_dict(empty)
    assert all(map(math.isnan, scores.compute()))
    scores.update(logits)
    scores.reset()
    assert all(map(math.isnan, scores.compute()))


def test_evaluate__hands_its_logits_on() -> None:
    """As the documentation says: no second pass over the images."""
    torch.manual_seed(0)
    network, scores, want = nn.Conv2d(3, 19, 3, padding=1), UnsupervisedScores(19), UnsupervisedScores(19)
    data = [StreetScenes(2)[i] for i in range(2)]

    def watched(images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        scores.update(logits)
        return logits

    matrices = evaluate(network, data, forward=watched)
    assert torch.equal(matrices["native"].counts, evaluate(network, data)["native"].counts)
    for sample in data:
        want.update(network(sample.image[None] / 255))
    assert scores.compute() == want.compute()


LOGITS = torch.zeros(1, 3, 4, 5)
CASES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: UnsupervisedScores(0), ValueError, "`num_classes` must be at least 1"),
    (lambda: UnsupervisedScores(3.0), TypeError, "`num_classes` must be an int"),
    (lambda: UnsupervisedScores(3, pixels=1), ValueError, "`pixels` must be at least 2, got 1"),
    (lambda: UnsupervisedScores(3, pixels=9.0), TypeError, "`pixels` must be an int, got float"),
    (lambda: UnsupervisedScores(3, temperature=0), ValueError, "`temperature` must be positive, got 0"),
    (lambda: UnsupervisedScores(3, temperature=math.nan), ValueError, "`temperature` must be positive, got nan"),
    (lambda: UnsupervisedScores(3, temperature="1"), TypeError, "`temperature` must be a float, got str"),
    (lambda: UnsupervisedScores(3).update(LOGITS[0]), ValueError, r"`logits` must have shape \(N, C, H, W\)"),
    (lambda: UnsupervisedScores(3).update(LOGITS.long()), TypeError, "`logits` must be floating"),
    (lambda: UnsupervisedScores(3).update({"out": LOGITS}), TypeError, "`logits` must be a torch.Tensor, got dict"),
    (lambda: UnsupervisedScores(4).update(LOGITS), ValueError, "`logits` have 3 classes but `num_classes` is 4"),
    (lambda: UnsupervisedScores(3).update(LOGITS.to("meta")), ValueError, "`logits` is on meta"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=range(len(CASES)))
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
