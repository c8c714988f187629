"""Scores without labels, against loops over pixels and pairs of pixels."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import Watch, examples
from crossmix.datasets import StreetScenes
from crossmix.diagnostics import UnsupervisedQuality, UnsupervisedScores
from crossmix.diagnostics.unsupervised import _spread
from crossmix.evaluation import evaluate
from oracles import chi_square, seeded


def entropy(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p)


def density_by_loop(probs: list[list[float]], temperature: float) -> list[float]:
    """For each pixel, the entropy over all others of the softmax of their cosine similarities."""
    found = []
    for i, p in enumerate(probs):
        others = probs[:i] + probs[i + 1 :]
        dots = [sum(a * b for a, b in zip(p, q, strict=True)) for q in others]
        similar = [d / math.hypot(*p) / math.hypot(*q) / temperature for d, q in zip(dots, others, strict=True)]
        odds = [math.exp(value - max(similar)) for value in similar]
        found.append(entropy([value / sum(odds) for value in odds]))
    return found


def scores_by_loop(batches: list[Tensor], temperature: float) -> UnsupervisedQuality:
    """All pixels of every batch compared with all others of it; those with NaN left out."""
    everything, densities = [], []
    for logits in batches:
        pixels = logits.double().softmax(1).movedim(1, -1).flatten(0, 2).tolist()
        probs = [values for values in pixels if not any(map(math.isnan, values))]
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
@settings(max_examples=examples(40), deadline=None)
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


@given(st.integers(1, 400), st.integers(1, 400))
@settings(max_examples=examples(60), deadline=None)
def test_spread__different_places_in_equal_parts(total: int, count: int) -> None:
    if count > total:
        return
    places = _spread(total, count, torch.device("cpu")).tolist()
    assert len(set(places)) == count
    for k, place in enumerate(places):
        assert k * total // count <= place < (k + 1) * total // count


@pytest.mark.parametrize("size", [(1000, 2000), (500, 1000), (128, 1000), (64, 125), (512, 1024), (1024, 2048)])
def test_spread__prefers_no_row_and_no_column(size: tuple[int, int]) -> None:
    """Also where the parts are as long as a row, or twice: ten stripes each way."""
    places = _spread(size[0] * size[1], 1000, torch.device("cpu"))
    for where, length in ((places // size[1], size[0]), (places % size[1], size[1])):
        stripes = torch.arange(length) * 10 // length
        shares = stripes.bincount().double() / length
        assert chi_square(stripes[where].bincount(minlength=10), shares) < 0.65  # 1 in 100


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
    one, other, strided = (UnsupervisedScores(5) for _ in range(3))
    for logits in batches:
        one.update(logits)
    with torch.autocast("cpu", torch.bfloat16):  # in float32 all the same
        for logits in reversed(batches):
            other.update(logits)
            strided.update(logits.to(memory_format=torch.channels_last))
    assert other.compute() == one.compute()  # whole numbers in any order
    for name, value in one.named_buffers():
        assert (strided.get_buffer(name) - value).abs().max() <= 400, name


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
    for _ in range(2):
        scores.merge()
    assert scores.compute() == want
    scores.update(torch.zeros(1, 4, 3, 3))  # what was merged is stale now
    assert scores.compute() != want
    for forget in (scores.reset, lambda: scores.load_state_dict(empty)):
        scores.update(logits)
        scores.merge()
        forget()
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
