"""Distribution alignment."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import assert_equal_states, examples
from crossmix import DistributionAlignment, alignment
from crossmix import functional as F
from oracles import seeded


def simplex(*shape: int, seed: int, dim: int = 1) -> Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64).add(0.01).log().softmax(dim)


@given(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=examples(40), deadline=None)
def test_align_distribution__equals_the_formula(n: int, num_classes: int, seed: int) -> None:
    probs = simplex(n, num_classes, 2, 3, seed=seed)
    prior, running = (simplex(num_classes, seed=seed + k, dim=0) for k in (1, 2))
    got = F.align_distribution(probs, prior, running)
    for i, row, column in np.ndindex(n, 2, 3):
        q = [float(probs[i, c, row, column] * prior[c] / running[c]) for c in range(num_classes)]
        want = torch.tensor([v / sum(q) for v in q], dtype=torch.float64)
        torch.testing.assert_close(got[i, :, row, column], want, rtol=1e-10, atol=0)
    torch.testing.assert_close(F.align_distribution(probs, prior, prior), probs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eps", [1e-6, 1e-30, 1e-45, 1e-300])
def test_align_distribution__never_divides_by_zero(eps: float) -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).T[None, :, :, None]
    prior, want = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for running in (torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.5, 0.5, math.inf])):
        got = F.align_distribution(probs, prior, running, eps=eps)
        assert bool(got.isfinite().all())
        torch.testing.assert_close(got.sum(1), torch.ones(1, 3, 1))
        torch.testing.assert_close(got[0, :, :2, 0].T, want)  # nothing left: the prediction stays
    torch.testing.assert_close(got[0, :, 2, 0], want[1])  # an infinite average leaves nothing of its class


def test_update__warms_up_and_averages() -> None:
    align = DistributionAlignment(3, momentum=0.6)
    want = torch.full((3,), 1 / 3, dtype=torch.float64)
    for t in range(6):
        probs = simplex(2, 3, 4, 5, seed=t)
        align.update(probs)
        decay = min(1 - 1 / (t + 1), 0.6)
        want = decay * want + (1 - decay) * probs.mean((0, 2, 3))
        torch.testing.assert_close(align.running.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(align.running.sum(), torch.ones(()))
    assert int(align.running_count) == 6
    before = copy.deepcopy(align.state_dict())
    align.update(torch.rand(0, 3, 4, 5))  # nothing seen
    align(probs)  # forward changes nothing
    for value in (math.nan, math.inf):  # nor does a broken batch
        broken = probs.clone()
        broken[0, 1, 2, 2] = value
        align.update(broken)
    assert_equal_states(align.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_update__sums_half_precision_in_float32(dtype: torch.dtype) -> None:
    probs = simplex(2, 3, 200, 200, seed=0).to(dtype)
    align = DistributionAlignment(3)
    align.update(probs)
    want = probs.double().mean((0, 2, 3))
    torch.testing.assert_close(align.running.double(), want / want.sum(), rtol=1e-6, atol=0)


def test_update_prior__counts_valid_source_pixels() -> None:
    align = DistributionAlignment(3, momentum=0.9)
    assert align.prior.tolist() == pytest.approx([1 / 3] * 3)
    one = torch.tensor([[[0, 0, 1, 255], [0, 2, 200, 2]]], dtype=torch.uint8)
    align.update_prior(one)
    assert align.prior.tolist() == pytest.approx([3 / 6, 1 / 6, 2 / 6])
    align.update_prior(torch.full((1, 2, 2), 255))
    align.update_prior(torch.full((1, 2, 2), -1))
    assert int(align.prior_count) == 1
    align.update_prior(torch.ones(1, 2, 2, dtype=torch.int32))  # t = 1: decay min(1/2, 0.9)
    assert align.prior.tolist() == pytest.approx([3 / 12, 1 / 12 + 1 / 2, 2 / 12])


def test_prior__is_scaled_and_then_fixed() -> None:
    want = [0.75, 0.25]
    for prior in ([3, 1], (3.0, 1.0), np.array([3, 1]), torch.tensor([3, 1], dtype=torch.uint8), [1.5e308, 0.5e308]):
        align = DistributionAlignment(2, prior=prior)
        assert align.prior.tolist() == want
        with pytest.raises(ValueError, match="`update_prior` cannot change a prior that was given as `prior=`"):
            align.update_prior(torch.zeros(1, 2, 2, dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_forward__keeps_the_dtype(dtype: torch.dtype) -> None:
    align = DistributionAlignment(4, prior=[4, 3, 2, 1])
    probs = simplex(2, 4, 3, 3, seed=0).to(dtype)
    align.update(probs)
    got = align(probs)
    assert got.dtype == dtype
    want = F.align_distribution(probs, align.prior, align.running)
    assert want.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got, want.to(dtype))
    assert set(align.state_dict()) == {"prior", "running", "prior_count", "running_count"}
    assert "prior=given" in repr(align)


BAD_PRIORS: list[tuple[Any, type[Exception], str]] = [
    *(
        (prior, ValueError, "`prior` must")
        for prior in ([0.0, 0.0], [-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [1.0, 1.0, 1.0])
    ),
    *(
        (prior, TypeError, "`prior` must be a sequence of numbers, got")
        for prior in ("half", {"road": 1.0}, 3 + 1j, [None, 1.0], object())
    ),
    (torch.ones(2, device="meta"), ValueError, "`prior` must have values, got a meta tensor"),
]


@pytest.mark.parametrize(("prior", "error", "message"), BAD_PRIORS)
def test_prior__bad_values(prior: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DistributionAlignment(2, prior=prior)


ALIGN, PROBS, VECTOR = DistributionAlignment(3), torch.full((1, 3, 2, 2), 1 / 3), torch.full((3,), 1 / 3)
BAD_INPUTS: dict[str, tuple[Callable[[], object], str]] = {
    "probs": (lambda: ALIGN(PROBS.numpy()), "`probs` must be a torch.Tensor, got ndarray"),
    "probs of update": (lambda: ALIGN.update(PROBS.numpy()), "`probs` must be a torch.Tensor, got ndarray"),
    "dtype": (lambda: ALIGN(PROBS.long()), "`probs` must be floating, got torch.int64"),
    "dtype of update": (lambda: ALIGN.update(PROBS.long()), "`probs` must be floating, got torch.int64"),
    "labels": (lambda: ALIGN.update_prior(np.zeros((1, 2, 2), dtype=np.int64)), "`labels` must be a torch.Tensor"),
    "dtype of labels": (lambda: ALIGN.update_prior(PROBS[:, 0]), "must be uint8, int16, int32 or int64, got torch.fl"),
    "prior": (lambda: F.align_distribution(PROBS, VECTOR.numpy(), VECTOR), "`prior` must be a torch.Tensor, got nd"),
    "running": (lambda: F.align_distribution(PROBS, VECTOR, [1, 1, 1]), "`running` must be a torch.Tensor, got list"),
}


@pytest.mark.parametrize(("call", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs__that_are_no_tensors_or_of_another_dtype(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to dtype": lambda module: module.to(torch.float16),
    "to device and dtype": lambda module: module.to("cpu", torch.bfloat16),
    "type": lambda module: module.type(torch.float16),
    "half twice": lambda module: module.half().bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_averages__stay_in_float32_unrounded_and_move(cast: Callable[[nn.Module], object]) -> None:
    parts = [DistributionAlignment(3, momentum=0.99) for _ in range(2)]
    for part in parts:
        part.update(simplex(1, 3, 4, 4, seed=0).float())
        part.update_prior(torch.tensor([[[0, 1, 2, 2, 2, 1, 0]]]))
    before = copy.deepcopy(parts[0].state_dict())
    parent = nn.Sequential(nn.Conv2d(3, 3, 1), parts[0])
    cast(parent)
    assert parent[0].weight.dtype != torch.float32
    assert_equal_states(parts[0].state_dict(), before)
    for step in range(400):
        probs = simplex(1, 3, 4, 4, seed=1).float()
        labels = torch.full((1, 2, 2), step % 2)
        for part in parts:
            part.update(probs)
            part.update_prior(labels)
    assert_equal_states(parts[0].state_dict(), parts[1].state_dict())
    moved = simplex(1, 3, 4, 4, seed=1).mean((0, 2, 3))
    torch.testing.assert_close(parts[0].running.double(), moved, rtol=0.02, atol=0)
    assert parts[0](probs.half()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_averages__loaded_in_half_precision_are_kept_in_float32_and_move(dtype: torch.dtype) -> None:
    align = DistributionAlignment(2)
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in align.state_dict().items()
    }
    state["running_count"] = torch.tensor(10**6)
    align.load_state_dict(state, assign=True)
    for _ in range(3000):
        align.update(torch.tensor([0.53, 0.47])[None, :, None, None])
    assert align.running.dtype == align.prior.dtype == torch.float32
    assert float(align.running.double().sum()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(align.running[0], torch.tensor(0.53 - 0.03 * 0.999**3000), rtol=0, atol=1e-5)


@pytest.mark.parametrize("prior", [None, [3.0, 2.0, 1.0]])
def test_meta_device__and_back(prior: list[float] | None) -> None:
    want = DistributionAlignment(3, prior=prior)
    with torch.device("meta"):
        align = DistributionAlignment(3, prior=prior)
    assert all(value.is_meta for value in align.state_dict().values())
    align.to_empty(device="cpu")
    for value in align.buffers():
        value.fill_(7)
    align.reset_parameters()
    assert_equal_states(align.state_dict(), want.state_dict())
    align.update(simplex(1, 3, 4, 4, seed=0).float())
    want.update(simplex(1, 3, 4, 4, seed=0).float())
    assert torch.equal(align.running, want.running)
    align.reset_parameters()
    assert torch.equal(align.running, torch.full((3,), 1 / 3))
    assert int(align.running_count) == 0


def test_sync__the_average_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    probs = simplex(3, 4, 2, 3, seed=0)
    monkeypatch.setattr(alignment, "all_reduce_sum", lambda own: own + probs[1:].sum((0, 2, 3)))
    rank, whole = DistributionAlignment(4, sync=True), DistributionAlignment(4)
    rank.update(probs[:1])
    whole.update(probs)
    torch.testing.assert_close(rank.running, whole.running)


@pytest.mark.parametrize(("num_classes", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_alignment__refuses_other_numbers_of_classes(num_classes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`num_classes` must be"):
        DistributionAlignment(num_classes)


def test_prior__gives_an_ignored_class_no_share() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2]).view(1, 2, 3)
    align = DistributionAlignment(4, ignore_index=0)
    torch.testing.assert_close(align.prior, torch.tensor([0.0, 1 / 3, 1 / 3, 1 / 3]))
    align.update_prior(labels)
    torch.testing.assert_close(align.prior, torch.tensor([0.0, 1 / 3, 2 / 3, 0.0]))
    assert DistributionAlignment(3, prior=[6, 1, 3], ignore_index=0).prior.tolist() == [0, 0.25, 0.75]
