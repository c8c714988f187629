"""The monitor of pseudo-labels, against loops over pixels."""

import copy
import json
import math
import pickle
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import examples
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor, PseudoLabelQuality
from oracles import seeded

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)
PER_CLASS = ("precision", "recall", "confident_precision", "confident_recall", "share", "expected_share")


class Batch(NamedTuple):
    """What one update gets."""

    labels: Tensor
    confidence: Tensor
    truth: Tensor | None
    student: Tensor | None


class Pixel(NamedTuple):
    """What counts, as Python numbers."""

    pseudo: int
    confidence: float
    truth: int | None
    student: int | None


def pixels_by_loop(batches: Sequence[Batch], num_classes: int, ignore_index: int) -> list[Pixel]:
    """The pixels that count, and of those whether the student's class does."""

    def known(value: int) -> bool:
        return value != ignore_index and 0 <= value < num_classes

    kept = []
    for batch in batches:
        nothing = [None] * batch.labels.numel()
        columns = (nothing if x is None else x.flatten().tolist() for x in batch)
        for pseudo, sure, true, seen in zip(*columns, strict=True):
            if known(pseudo) and not math.isnan(sure) and (true is None or known(true)):
                seen = seen if seen is not None and known(seen) else None  # noqa: PLW2901
                kept.append(Pixel(pseudo, min(max(sure, 0.0), 1.0), true, seen))
    return kept


def share_of(part: Sequence[bool]) -> float:
    """Of the pixels for which something is known, those for which it is true."""
    return sum(part) / len(part) if part else math.nan


def calibration_by_loop(pixels: list[Pixel], bins: int = 15) -> float:
    """The weighted mean over bins of |accuracy - confidence|, bin by bin."""
    total = 0.0
    for b in range(bins):
        ends = (b / bins, (b + 1) / bins if b < bins - 1 else math.inf)
        inside = [p for p in pixels if ends[0] <= p.confidence < ends[1]]
        if inside:
            confidence = sum(p.confidence for p in inside) / len(inside)
            total += len(inside) / len(pixels) * abs(share_of([p.pseudo == p.truth for p in inside]) - confidence)
    return total if pixels else math.nan


def quality_by_loop(
    pixels: list[Pixel], num_classes: int, threshold: float, ignore_index: int = 255
) -> dict[str, object]:
    labelled = [p for p in pixels if p.truth is not None]
    sure = [p for p in labelled if p.confidence >= threshold]
    classes = range(num_classes)
    share = [share_of([p.pseudo == c for p in pixels]) for c in classes]
    expected = [share_of([p.truth == c for p in labelled]) for c in classes]
    return {
        "precision": [share_of([p.truth == c for p in labelled if p.pseudo == c]) for c in classes],
        "recall": [share_of([p.pseudo == c for p in labelled if p.truth == c]) for c in classes],
        "confident_precision": [share_of([p.truth == c for p in sure if p.pseudo == c]) for c in classes],
        "confident_recall": [share_of([p.pseudo == c for p in sure if p.truth == c]) for c in classes],
        "share": share,
        "expected_share": expected,
        # The same total variation from its other definition, as the mass by which one exceeds the other.
        "divergence": sum(s - e if not s <= e else 0.0 for s, e in zip(share, expected, strict=True)),
        "confident_share": share_of([p.confidence >= threshold for p in pixels]),
        "mean_confidence": sum(p.confidence for p in pixels) / len(pixels) if pixels else math.nan,
        "agreement": share_of([p.student == p.pseudo for p in pixels if p.student is not None]),
        "calibration_error": calibration_by_loop(labelled),
        "never_predicted": sum(all(p.pseudo != c for p in pixels) for c in classes if c != ignore_index),
        "pixels": len(pixels),
    }


def assert_quality(got: PseudoLabelQuality, want: dict[str, object]) -> None:
    assert set(got._fields) == set(want)
    for field in got._fields:
        value = getattr(got, field)
        # Confidence is rounded to 2**-20; everything else is a ratio of counts.
        tolerance = 2**-21 + 1e-12 if field in {"mean_confidence", "calibration_error"} else 1e-12
        if field in PER_CLASS:
            assert value.dtype == torch.float64
            assert value.device.type == "cpu"
            value = value.tolist()
        assert value == pytest.approx(want[field], abs=tolerance, rel=0, nan_ok=True), field


def batch(seed: int, size: tuple[int, int, int], c: int, *, truth: bool = True, student: bool = True) -> Batch:
    g = seeded(seed)

    def ids(least: int) -> Tensor:
        dtype = DTYPES[int(torch.randint(0, 4, (), generator=g))]
        values = torch.randint(least, c + 2, size, generator=g)
        return (values % 256 if dtype == torch.uint8 else values).to(dtype)  # -1 becomes 255

    confidence = torch.rand(size, generator=g, dtype=torch.float64 if seed % 2 else torch.float32)
    # 0, 1 and the threshold itself; and values beyond: a softmax may sum to a little more than 1, and a bug to more.
    edges = torch.tensor([0.0, 0.125, 0.5, 0.625, 0.75, 1.0, 1 + 1e-7, math.inf, -0.5, math.nan])
    edges = edges[torch.randint(0, len(edges), size, generator=g)].to(confidence.dtype)
    confidence = torch.where(torch.rand(size, generator=g) < 0.5, edges, confidence)
    return Batch(ids(-1), confidence, ids(-1) if truth else None, ids(-1) if student else None)


@given(
    st.lists(st.tuples(st.integers(0, 2**31), st.booleans(), st.booleans()), min_size=0, max_size=3),
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.5, 0.625, 1.0]),
    st.sampled_from([255, 0, -1]),
)
@example([(0, True, True), (1, False, True)], (3, 4, 5), 4, 0.5, 255)
@settings(max_examples=examples(150), deadline=None)
def test_compute__equals_the_loop(
    calls: list[tuple[int, bool, bool]], size: tuple[int, int, int], c: int, threshold: float, ignore_index: int
) -> None:
    monitor = PseudoLabelMonitor(c, threshold=threshold, ignore_index=ignore_index)
    batches = [batch(seed, size, c, truth=truth, student=student) for seed, truth, student in calls]
    for labels, confidence, truth, student in batches:
        before = confidence.clone()
        monitor.update(labels, confidence, truth=truth, student=student)
        assert torch.equal(before.nan_to_num(7), confidence.nan_to_num(7))
    pixels = pixels_by_loop(batches, c, ignore_index)
    assert_quality(monitor.compute(), quality_by_loop(pixels, c, threshold, ignore_index))
    monitor.reset()
    assert_quality(monitor.compute(), quality_by_loop([], c, threshold, ignore_index))


def test_update__any_order_and_any_split_give_the_same_numbers() -> None:
    whole, parts = PseudoLabelMonitor(5, threshold=0.5), PseudoLabelMonitor(5, threshold=0.5)
    labels, confidence, truth, student = batch(3, (6, 8, 9), 5)
    whole.update(labels, confidence, truth=truth, student=student)
    for i in (4, 0, 5, 3, 1, 2):  # and any strides
        row, sure, true, seen = (x[i : i + 1].mT for x in (labels, confidence, truth, student))
        parts.update(row, sure, truth=true.contiguous(), student=seen)
    for name, value in whole.named_buffers():
        assert value.dtype == torch.int64
        assert torch.equal(parts.get_buffer(name), value), name


def test_lambda__is_that_of_the_loss() -> None:
    """Compared in float32, as there: 0.968 is no float16, and rounding it would let through what it should not."""
    edge = torch.tensor([[[0.968, 1.0, 0.5]]], dtype=torch.float16)
    random = [torch.rand(2, 6, 7, generator=seeded(seed)).to(torch.float16) for seed in range(3)]
    for threshold, confidences in ((0.968, [edge]), (0.4, random)):
        monitor = PseudoLabelMonitor(2, threshold=threshold)
        for confidence in confidences:
            monitor.update(torch.zeros(confidence.shape, dtype=torch.uint8), confidence)
        shares = [float(F.confidence_weight(confidence, threshold, scope="pixel").mean()) for confidence in confidences]
        assert monitor.compute().confident_share == pytest.approx(sum(shares) / len(shares), rel=1e-6)


def test_compute__against_a_prior() -> None:
    monitor = PseudoLabelMonitor(3)
    monitor.update(torch.tensor([[[0, 0, 0, 1]]]), torch.ones(1, 1, 4))
    for prior in ([2, 1, 1], torch.tensor([0.5, 0.25, 0.25])):
        quality = monitor.compute(prior)
        assert quality.expected_share.tolist() == [0.5, 0.25, 0.25]
        assert quality.divergence == 0.25
        assert quality.recall.isnan().all()
    monitor.update(torch.tensor([[[2]]]), torch.ones(1, 1, 1), truth=torch.tensor([[[2]]]))
    assert monitor.compute([1, 1, 0]).expected_share.tolist() == [0.5, 0.5, 0]  # goes before the truth
    monitor = PseudoLabelMonitor(3, ignore_index=0)
    monitor.update(torch.tensor([[[0, 1, 1, 2]]]), torch.ones(1, 1, 4))
    quality = monitor.compute([6, 2, 1])  # of all pixels, the ignored class included, which has no part
    assert quality.expected_share.tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert quality.divergence == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="not all zero"):
        monitor.compute([1, 0, 0])


def test_as_dict__is_json() -> None:
    monitor = PseudoLabelMonitor(2, threshold=0.5)
    empty = monitor.compute().as_dict()
    labels, truth = torch.tensor([[[0, 0]]]), torch.tensor([[[0, 1]]])
    monitor.update(labels, torch.ones(1, 1, 2), truth=truth, student=truth)
    record = monitor.compute().as_dict(("road", "traffic light"))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert list(record) == [
        *(f"{field}/{name}" for field in PER_CLASS for name in ("road", "traffic light")),
        "divergence", "lambda", "mean_confidence", "agreement", "calibration_error", "never_predicted", "pixels",
    ]  # fmt: skip
    assert record["precision/traffic light"] is None
    assert record["recall/traffic light"] == 0
    assert record["lambda"] == 1
    assert record["agreement"] == 0.5
    assert record["never_predicted"] == 1
    assert {type(value) for value in record.values()} <= {float, int, type(None)}
    assert len(empty) == len(record)
    assert {name for name, value in empty.items() if value is not None} == {"never_predicted", "pixels"}
    assert "recall/1" in empty


def test_state__is_linear_in_the_number_of_classes() -> None:
    monitor = PseudoLabelMonitor(10_000)
    assert sum(buffer.nbytes for buffer in monitor.buffers()) < 1_000_000
    labels = torch.tensor([[[9_999, 7, 7, 8]]])
    monitor.update(labels, torch.ones(1, 1, 4), truth=torch.tensor([[[9_999, 7, 8, 8]]]))
    quality = monitor.compute()
    assert quality.precision[[7, 8, 9_999]].tolist() == [0.5, 1, 1]
    assert quality.recall[[7, 8, 9_999]].tolist() == [1, 0.5, 1]
    assert quality.never_predicted == 10_000 - 3 - 1  # 255 is ignored


def test_state__copies_casts_and_merges_without_ranks() -> None:
    monitor, empty = PseudoLabelMonitor(4, threshold=0.5), PseudoLabelMonitor(4).state_dict()
    assert repr(monitor) == "PseudoLabelMonitor(num_classes=4, threshold=0.5, ignore_index=255)"
    labels, confidence, truth, student = batch(5, (2, 6, 7), 4)
    monitor.update(labels, confidence, truth=truth, student=student)
    want = monitor.compute().as_dict()
    loaded = PseudoLabelMonitor(4, threshold=0.5)
    loaded.load_state_dict(monitor.state_dict())
    for other in (loaded, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor)), monitor.half()):
        assert other.compute().as_dict() == want
    for _ in range(2):
        monitor.merge()
    assert monitor.compute().as_dict() == want
    monitor.update(labels, confidence, truth=truth, student=student)  # merged counts are stale now
    assert monitor.compute().pixels == 2 * int(want["pixels"] or 0)
    for forget in (monitor.reset, lambda: monitor.load_state_dict(empty)):
        monitor.update(labels, confidence)
        monitor.merge()
        forget()
        assert monitor.compute().pixels == 0
