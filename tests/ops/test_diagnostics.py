"""The monitor of pseudo-labels, against loops over pixels."""

import copy
import json
import math
import pickle
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crossmix import MeanTeacher
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor, PseudoLabelQuality
from crossmix.metrics import ConfusionMatrix
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
    for labels, confidence, truth, student in batches:
        for i, row, column in np.ndindex(*labels.shape):
            pseudo, sure = int(labels[i, row, column]), float(confidence[i, row, column])
            true = None if truth is None else int(truth[i, row, column])
            seen = None if student is None else int(student[i, row, column])
            if known(pseudo) and not math.isnan(sure) and (true is None or known(true)):
                kept.append(Pixel(pseudo, sure, true, seen if seen is not None and known(seen) else None))
    return kept


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def precision_by_loop(pixels: list[Pixel], c: int) -> float:
    right = sum(p.pseudo == c == p.truth for p in pixels)
    wrong = sum(p.pseudo == c != p.truth for p in pixels)
    return ratio(right, right + wrong)


def recall_by_loop(pixels: list[Pixel], c: int) -> float:
    right = sum(p.truth == c == p.pseudo for p in pixels)
    missed = sum(p.truth == c != p.pseudo for p in pixels)
    return ratio(right, right + missed)


def calibration_by_loop(pixels: list[Pixel], bins: int = 15) -> float:
    """The weighted mean over bins of |accuracy - confidence|, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = [
            p for p in pixels if b / bins <= p.confidence < (b + 1) / bins or (b == bins - 1 and p.confidence == 1)
        ]
        if inside:
            accuracy = sum(p.pseudo == p.truth for p in inside) / len(inside)
            confidence = sum(p.confidence for p in inside) / len(inside)
            total += len(inside) / len(pixels) * abs(accuracy - confidence)
    return total if pixels else math.nan


def quality_by_loop(
    pixels: list[Pixel], num_classes: int, threshold: float, ignore_index: int = 255
) -> dict[str, object]:
    labelled = [p for p in pixels if p.truth is not None]
    sure = [p for p in labelled if p.confidence >= threshold]
    compared = [p for p in pixels if p.student is not None]
    classes = range(num_classes)
    share = [ratio(sum(p.pseudo == c for p in pixels), len(pixels)) for c in classes]
    expected = [ratio(sum(p.truth == c for p in labelled), len(labelled)) for c in classes]
    return {
        "precision": [precision_by_loop(labelled, c) for c in classes],
        "recall": [recall_by_loop(labelled, c) for c in classes],
        "confident_precision": [precision_by_loop(sure, c) for c in classes],
        "confident_recall": [recall_by_loop(sure, c) for c in classes],
        "share": share,
        "expected_share": expected,
        # The same total variation from its other definition, as the mass by which one exceeds the other.
        "divergence": sum(s - e if not s <= e else 0.0 for s, e in zip(share, expected, strict=True)),
        "confident_share": ratio(sum(p.confidence >= threshold for p in pixels), len(pixels)),
        "mean_confidence": ratio(sum(p.confidence for p in pixels), len(pixels)),
        "agreement": ratio(sum(p.student == p.pseudo for p in compared), len(compared)),
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
    edges = torch.randint(0, 9, size, generator=g) / 8  # 0, 1 and the threshold itself among them
    confidence = torch.where(torch.rand(size, generator=g) < 0.5, edges.to(confidence.dtype), confidence)
    confidence = confidence.masked_fill(torch.rand(size, generator=g) < 0.05, math.nan)
    return Batch(ids(-1), confidence, ids(-1) if truth else None, ids(-1) if student else None)


@given(
    st.lists(st.tuples(st.integers(0, 2**31), st.booleans(), st.booleans()), min_size=0, max_size=3),
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.5, 0.625, 1.0]),
    st.sampled_from([255, 0, -1]),
)
@example([(0, True, True), (1, False, True)], (3, 4, 5), 4, 0.5, 255)
@settings(max_examples=150, deadline=None)
def test_compute__equals_the_loop(
    calls: list[tuple[int, bool, bool]], size: tuple[int, int, int], c: int, threshold: float, ignore_index: int
) -> None:
    monitor = PseudoLabelMonitor(c, threshold=threshold, ignore_index=ignore_index)
    batches = [batch(seed, size, c, truth=truth, student=student) for seed, truth, student in calls]
    for labels, confidence, truth, student in batches:
        given = [None if x is None else x.clone() for x in (labels, confidence, truth, student)]
        monitor.update(labels, confidence, truth=truth, student=student)
        for before, after in zip(given, (labels, confidence, truth, student), strict=True):
            assert before is None or torch.equal(before.nan_to_num(7), after.nan_to_num(7))
    pixels = pixels_by_loop(batches, c, ignore_index)
    assert_quality(monitor.compute(), quality_by_loop(pixels, c, threshold, ignore_index))
    monitor.reset()
    assert_quality(monitor.compute(), quality_by_loop([], c, threshold, ignore_index))


def test_compute__by_hand() -> None:
    """A lost class: the truth is half road, half pavement, and all of it is called road, with confidence."""
    monitor = PseudoLabelMonitor(3)
    truth = torch.tensor([[[0, 0, 1, 1]]])
    monitor.update(torch.zeros_like(truth), torch.tensor([[[0.99, 0.98, 0.97, 0.50]]]), truth=truth)
    quality = monitor.compute()
    assert quality.precision.tolist() == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)
    assert quality.recall.tolist() == pytest.approx([1, 0, math.nan], nan_ok=True)
    assert quality.confident_precision.tolist() == pytest.approx([2 / 3, math.nan, math.nan], nan_ok=True)
    assert quality.confident_recall.tolist() == pytest.approx([1, 0, math.nan], nan_ok=True)
    assert quality.share.tolist() == [1, 0, 0]
    assert quality.expected_share.tolist() == [0.5, 0.5, 0]
    assert quality.divergence == 0.5
    assert quality.confident_share == 0.75
    assert quality.mean_confidence == pytest.approx(0.86, abs=1e-6)
    assert math.isnan(quality.agreement)
    # The last bin of 15 holds three pixels, 2 of them right at 0.98; the one of 0.5 holds a wrong one.
    assert quality.calibration_error == pytest.approx(0.75 * (0.98 - 2 / 3) + 0.25 * 0.5, abs=1e-6)
    assert quality.never_predicted == 2
    assert quality.pixels == 4


@given(st.integers(0, 2**31), st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_compute__weighted_sums(seed: int, c: int) -> None:
    """Accuracy is precision weighed by the predicted shares, and recall weighed by the true ones."""
    labels, confidence, truth, _ = batch(seed, (2, 6, 7), c)
    monitor, matrix = PseudoLabelMonitor(c, threshold=0.5), ConfusionMatrix(c)
    monitor.update(labels, confidence, truth=truth, student=labels)
    assert truth is not None
    counted = (labels >= 0) & (labels < c) & ~confidence.isnan()
    matrix.update(labels.where(counted, 0), truth.where(counted, 255 if truth.dtype == torch.uint8 else -1))
    quality = monitor.compute()
    if not quality.pixels:
        return
    accuracy = matrix.compute().pixel_accuracy
    assert float((quality.precision * quality.share).nansum()) == pytest.approx(accuracy, rel=1e-12)
    assert float((quality.recall * quality.expected_share).nansum()) == pytest.approx(accuracy, rel=1e-12)
    for share in (quality.share, quality.expected_share):
        assert float(share.sum()) == pytest.approx(1, rel=1e-12)
    assert quality.agreement == 1
    assert quality.never_predicted == int((quality.share == 0).sum())
    assert 0 <= quality.divergence <= 1
    assert 0 <= quality.calibration_error <= 1


def test_update__any_order_and_any_split_give_the_same_numbers() -> None:
    labels, confidence, truth, student = batch(3, (6, 8, 9), 5)
    assert truth is not None
    assert student is not None
    whole, parts = PseudoLabelMonitor(5, threshold=0.5), PseudoLabelMonitor(5, threshold=0.5)
    whole.update(labels, confidence, truth=truth, student=student)
    for i in (4, 0, 5, 3, 1, 2):
        rows = slice(i, i + 1)
        parts.update(
            labels[rows].mT, confidence[rows].mT, truth=truth[rows].mT.contiguous(), student=student[rows].mT
        )  # any strides
    for name, value in whole.named_buffers():
        assert value.dtype == torch.int64
        assert torch.equal(parts.get_buffer(name), value), name


def test_lambda__is_that_of_the_loss() -> None:
    monitor = PseudoLabelMonitor(4, threshold=0.4)
    shares = []
    for seed in range(3):
        pseudo = F.pseudo_label(torch.randn(2, 4, 6, 7, generator=seeded(seed)))
        monitor.update(*pseudo)
        shares += F.confidence_weight(pseudo.confidence, 0.4)[:, 0, 0].tolist()
    quality = monitor.compute()
    assert quality.confident_share == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    assert 0 < quality.confident_share < 1
    assert math.isnan(quality.divergence)
    assert quality.expected_share.isnan().all()


def test_confidence__half_precision_is_compared_in_float32() -> None:
    """As the loss does it: 0.968 is no float16, and rounding it there would let through what it should not."""
    confidence = torch.tensor([[[0.968, 1.0, 0.5]]], dtype=torch.float16)
    monitor = PseudoLabelMonitor(2)
    monitor.update(torch.zeros(1, 1, 3, dtype=torch.uint8), confidence)
    want = F.confidence_weight(confidence, scope="pixel").mean()
    assert monitor.compute().confident_share == pytest.approx(float(want))


def test_calibration__of_a_network_that_knows_itself_is_0() -> None:
    """Right in exactly as many pixels as the confidence says."""
    confidence = torch.tensor([0.25] * 4 + [0.5] * 4 + [1.0] * 4).reshape(1, 3, 4)
    truth = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]).reshape(1, 3, 4)
    monitor = PseudoLabelMonitor(2)
    monitor.update(torch.zeros_like(truth), confidence, truth=truth)
    assert monitor.compute().calibration_error == 0
    monitor.update(torch.zeros_like(truth), torch.ones_like(confidence), truth=torch.ones_like(truth))
    assert monitor.compute().calibration_error == 0.5


def test_calibration__bin_by_bin() -> None:
    """One pixel a bin, right and wrong in turn: bins that ran together would cancel out."""
    confidence = (torch.arange(15) + 0.5)[None, None] / 15
    truth = torch.arange(15)[None, None] % 2
    for pseudo in (0, 1):
        monitor = PseudoLabelMonitor(2)
        monitor.update(torch.full_like(truth, pseudo), confidence, truth=truth)
        want = ((truth == pseudo).double() - confidence.double()).abs().mean()
        assert monitor.compute().calibration_error == pytest.approx(float(want), abs=2**-21)


def test_mean_confidence__is_rounded_not_cut_off() -> None:
    monitor = PseudoLabelMonitor(1)
    confidence = torch.full((1, 2, 3), 1 - 2**-24)
    monitor.update(torch.zeros(1, 2, 3, dtype=torch.uint8), confidence)
    assert monitor.compute().mean_confidence == pytest.approx(float(confidence[0, 0, 0]), abs=2**-21)


def test_confidence__beyond_the_range_is_the_nearest_end() -> None:
    """A softmax may sum to a little more than 1, and a bug to much more."""
    monitor = PseudoLabelMonitor(2)
    zeros = torch.zeros(1, 1, 3, dtype=torch.uint8)
    monitor.update(zeros, torch.tensor([[[1.0000001, math.inf, -0.5]]]), truth=zeros)
    assert monitor.compute().mean_confidence == pytest.approx(2 / 3, abs=1e-9)
    assert monitor.compute().calibration_error == pytest.approx(1 / 3, abs=1e-9)


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
    assert monitor.compute().expected_share.tolist() == [0, 0, 1]


def test_ignored_class__has_no_part_in_a_prior() -> None:
    monitor = PseudoLabelMonitor(3, ignore_index=0)
    monitor.update(torch.tensor([[[0, 1, 1, 2]]]), torch.ones(1, 1, 4))
    quality = monitor.compute([6, 2, 1])  # of all pixels, the ignored class included
    assert quality.expected_share.tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert quality.divergence == pytest.approx(0, abs=1e-12)
    assert quality.never_predicted == 0
    with pytest.raises(ValueError, match="not all zero"):
        monitor.compute([1, 0, 0])


def test_state__a_loaded_one_takes_the_place_of_what_was_merged() -> None:
    labels, confidence = torch.zeros(1, 2, 2, dtype=torch.int64), torch.ones(1, 2, 2)
    monitor, empty = PseudoLabelMonitor(2), PseudoLabelMonitor(2).state_dict()
    monitor.update(labels, confidence)
    monitor.merge()
    monitor.load_state_dict(empty)
    assert monitor.compute().pixels == 0


def test_teacher_and_student__agree_after_the_first_update() -> None:
    torch.manual_seed(0)
    student = nn.Conv2d(3, 5, 1)
    teacher = MeanTeacher(student)
    images = torch.rand(2, 3, 6, 7, generator=seeded(1))
    monitor = PseudoLabelMonitor(5)
    monitor.update(*teacher.pseudo_label(images), student=student(images).argmax(1))
    assert monitor.compute().agreement == 1
    with torch.no_grad():
        student.bias[2] += 100
    monitor.update(*teacher.pseudo_label(images), student=student(images).argmax(1))
    assert monitor.compute().agreement == pytest.approx((1 + float(monitor.compute().share[2])) / 2)


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
    monitor = PseudoLabelMonitor(4, threshold=0.5)
    assert repr(monitor) == "PseudoLabelMonitor(num_classes=4, threshold=0.5, ignore_index=255)"
    labels, confidence, truth, student = batch(5, (2, 6, 7), 4)
    monitor.update(labels, confidence, truth=truth, student=student)
    want = monitor.compute().as_dict()
    loaded = PseudoLabelMonitor(4, threshold=0.5)
    loaded.load_state_dict(monitor.state_dict())
    for other in (loaded, copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor)), monitor.half()):
        assert other.compute().as_dict() == want
    monitor.merge()
    monitor.merge()
    assert monitor.compute().as_dict() == want
    monitor.update(labels, confidence, truth=truth, student=student)  # merged counts are stale now
    assert monitor.compute().pixels == 2 * int(want["pixels"] or 0)
    monitor.merge()
    monitor.reset()
    assert monitor.compute().pixels == 0


LABELS = torch.zeros(2, 4, 5, dtype=torch.int64)
CONFIDENCE = torch.ones(2, 4, 5)
MONITOR = PseudoLabelMonitor(3)
CASES: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("classes", lambda: PseudoLabelMonitor(0), ValueError, "`num_classes` must be at least 1"),
    ("classes type", lambda: PseudoLabelMonitor(3.0), TypeError, "`num_classes` must be an int"),
    ("threshold", lambda: PseudoLabelMonitor(3, threshold=1.5), ValueError, r"`threshold` must lie in \[0, 1\]"),
    ("labels", lambda: MONITOR.update(CONFIDENCE, CONFIDENCE), TypeError, "`labels` must be uint8.* take the argmax"),
    ("labels rank", lambda: MONITOR.update(LABELS[0], CONFIDENCE), ValueError, r"`labels` .*add the batch"),
    ("confidence", lambda: MONITOR.update(LABELS, LABELS), TypeError, "`confidence` must be floating"),
    (
        "confidence type",
        lambda: MONITOR.update(LABELS, 0.5),
        TypeError,
        "`confidence` must be a torch.Tensor, got float",
    ),
    ("confidence size", lambda: MONITOR.update(LABELS, CONFIDENCE[:1]), ValueError, "`confidence` .* must agree"),
    ("truth", lambda: MONITOR.update(LABELS, CONFIDENCE, truth=CONFIDENCE), TypeError, "`truth` must be uint8"),
    ("truth size", lambda: MONITOR.update(LABELS, CONFIDENCE, truth=LABELS.mT), ValueError, "`truth` .* must agree"),
    ("student", lambda: MONITOR.update(LABELS, CONFIDENCE, student=LABELS[:, None]), ValueError, "squeeze the channel"),
    ("device", lambda: MONITOR.update(LABELS.to("meta"), CONFIDENCE.to("meta")), ValueError, "`labels` is on meta"),
    ("prior size", lambda: MONITOR.compute([1, 2]), ValueError, r"shape \(3,\), got \(2,\); count"),
    ("prior sign", lambda: MONITOR.compute([1, -1, 2]), ValueError, "not negative and not all zero"),
    ("prior zero", lambda: MONITOR.compute([0, 0, 0]), ValueError, "not negative and not all zero"),
    ("prior nan", lambda: MONITOR.compute([math.nan, 0, 1]), ValueError, "must be finite"),
    ("names", lambda: MONITOR.compute().as_dict(["a", "b"]), ValueError, "3 distinct names, got 2 among 2"),
    ("names twice", lambda: MONITOR.compute().as_dict(["a", "b", "a"]), ValueError, "got 2 among 3; name each"),
]


@pytest.mark.parametrize(("call", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert MONITOR.compute().pixels == 0  # what is refused leaves no trace
