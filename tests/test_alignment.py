"""Distribution alignment."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossmix import DistributionAlignment
from crossmix import functional as F
from oracles import seeded


def simplex(*shape: int, seed: int, dim: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64).add(0.01).log().softmax(dim)


@given(st.integers(0, 3), st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_align_distribution__equals_the_formula(n: int, num_classes: int, seed: int) -> None:
    probs = simplex(n, num_classes, 2, 3, seed=seed)
    prior, running = (simplex(num_classes, seed=seed + k, dim=0) for k in (1, 2))
    got = F.align_distribution(probs, prior, running)
    for i in range(n):
        for row in range(2):
            for column in range(3):
                q = [float(probs[i, c, row, column] * prior[c] / running[c]) for c in range(num_classes)]
                want = torch.tensor([v / sum(q) for v in q], dtype=torch.float64)
                torch.testing.assert_close(got[i, :, row, column], want, rtol=1e-10, atol=0)
    torch.testing.assert_close(F.align_distribution(probs, prior, prior), probs, rtol=1e-12, atol=0)


def test_align_distribution__never_divides_by_zero() -> None:
    probs = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]).T[None, :, :, None]
    prior, running = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.5, 0.5, 0.0])
    got = F.align_distribution(probs, prior, running)
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got.sum(1), torch.ones(1, 2, 1))
    assert got[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]  # nothing left: the prediction stays
    assert got[0, :, 1, 0].tolist() == [0.0, 1.0, 0.0]


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
    for name, value in align.state_dict().items():
        assert torch.equal(value, before[name])


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
    align = DistributionAlignment(3, prior=[2, 1, 1])
    assert align.prior.tolist() == [0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="`update_prior` needs a prior of its own, but `prior=` was given"):
        align.update_prior(torch.zeros(1, 2, 2, dtype=torch.long))
    assert torch.equal(DistributionAlignment(3, prior=torch.tensor([2, 1, 1])).prior, align.prior)


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


@pytest.mark.parametrize("prior", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0], [1.0, 1.0, 1.0]])
def test_prior__bad_values(prior: list[float]) -> None:
    with pytest.raises(ValueError, match="`prior` must"):
        DistributionAlignment(2, prior=prior)
