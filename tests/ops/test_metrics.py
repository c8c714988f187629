"""The confusion matrix."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import examples, waiting_is_an_error
from crossmix.metrics import ConfusionMatrix
from oracles import seeded


@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 6), st.integers(0, 2**31), st.sampled_from([255, 0, -1]))
@settings(max_examples=examples(60), deadline=None)
def test_confusion_matrix__equals_the_loop(n: int, height: int, c: int, seed: int, ignore_index: int) -> None:
    g = seeded(seed)
    matrix = ConfusionMatrix(c, ignore_index=ignore_index)
    want = np.zeros((c, c))
    for _ in range(2):
        labels = torch.randint(-1, c + 2, (n, height, 5), generator=g)
        predictions = torch.randint(0, c, (n, height, 5), generator=g, dtype=torch.uint8)
        matrix.update(predictions, labels)
        counted = (labels >= 0) & (labels < c) & (labels != ignore_index)
        np.add.at(want, (labels[counted].numpy(), predictions[counted].numpy()), 1)
    assert matrix.counts.tolist() == want.tolist()
    iou = matrix.compute()
    each = []
    for k in range(c):
        union = want[k].sum() + want[:, k].sum() - want[k, k]
        each.append(want[k, k] / union if union and k != ignore_index else math.nan)
        assert float(iou.per_class[k]) == pytest.approx(each[-1], nan_ok=True)
    assert iou.per_class.dtype == torch.float64
    present = [v for v in each if not math.isnan(v)]
    assert iou.mean == pytest.approx(sum(present) / len(present) if present else math.nan, nan_ok=True)
    accuracy = want.trace() / want.sum() if want.sum() else math.nan
    assert iou.pixel_accuracy == pytest.approx(accuracy, nan_ok=True)
    subset = matrix.compute([0])
    assert subset.mean == pytest.approx(each[0], nan_ok=True)
    assert len(subset.per_class) == c
    matrix.reset()
    assert not matrix.counts.any()


def test_confusion_matrix__state_and_merge_without_ranks() -> None:
    matrix, other = ConfusionMatrix(3), ConfusionMatrix(3)
    labels = torch.randint(0, 3, (2, 4, 4))
    matrix.update(labels, labels)
    other.load_state_dict(matrix.state_dict())
    for _ in range(2):
        matrix.merge()
        assert matrix.compute().mean == other.compute().mean == 1.0
    matrix.update((labels + 1) % 3, labels)  # merged counts are stale now
    assert matrix.compute().pixel_accuracy == 0.5
    assert "num_classes=3" in repr(matrix)
    matrix.invalid.add_(1)
    matrix.merge()
    for copied in (matrix, copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        copied.load_state_dict(other.state_dict())  # takes the place of what was merged
        assert copied.compute().mean == 1


def test_confusion_matrix__a_prediction_that_is_no_class() -> None:
    labels = torch.tensor([[[0, 1, 255]]])
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([[[0, 1, 7]]]), labels)  # not where there is no label
    for bad in (2, -1, 255):
        with pytest.raises(ValueError, match=r"must lie in 0..1 at labelled pixels"):
            matrix.update(torch.tensor([[[0, bad, 0]]]), labels)
    assert matrix.counts.tolist() == [[1, 0], [0, 1]]  # nothing of it was counted
    matrix.invalid.add_(1)  # what a device that is not waited for would have left
    with pytest.raises(ValueError, match=r"must lie in 0..1 at labelled pixels"):
        matrix.compute()
    matrix.reset()
    assert math.isnan(matrix.compute().mean)


@pytest.mark.gpu
def test_confusion_matrix__on_a_gpu_without_waiting() -> None:
    labels, predictions = torch.randint(-1, 7, (2, 4, 33, 47), generator=seeded(0)) % 300
    predictions = predictions.remainder(5)
    want = ConfusionMatrix(5)
    want.update(predictions, labels)
    matrix = ConfusionMatrix(5).cuda()
    on_device = predictions.cuda(), labels.cuda()
    torch.cuda.synchronize()
    with waiting_is_an_error():
        matrix.update(*on_device)
    assert torch.equal(matrix.counts.cpu(), want.counts)
    matrix.update(on_device[0] + 5, on_device[1])
    with pytest.raises(ValueError, match="must lie in"):
        matrix.compute()


def test_ignored_class__has_no_score_and_no_part_in_the_mean() -> None:
    """Two of the three labelled pixels are right; one of class 1 is called 0, the class that is ignored."""
    matrix = ConfusionMatrix(3, ignore_index=0)
    matrix.update(torch.tensor([[[0, 1, 2, 0]]]), torch.tensor([[[0, 1, 2, 1]]]))
    iou = matrix.compute()
    assert iou.per_class.tolist() == pytest.approx([math.nan, 1 / 2, 1], nan_ok=True)
    assert iou.mean == 0.75
    assert iou.pixel_accuracy == pytest.approx(2 / 3)
    assert math.isnan(matrix.compute([0]).mean)  # and no warning, which would be an error here
    for classes in ([0, 2], (0, 2), {0, 2}, range(0, 3, 2), torch.tensor([0, 2]), np.array([0, 2]), iter([0, 2])):
        assert matrix.compute(classes).mean == 1
    with pytest.raises(TypeError, match="integer"):
        matrix.compute([0.5])


def test_update__refuses_other_dtypes_and_devices_of_either() -> None:
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    matrix = ConfusionMatrix(3)
    with pytest.raises(TypeError, match="`predictions` must be uint8"):
        matrix.update(ids.float(), ids)
    with pytest.raises(TypeError, match="`labels` must be uint8"):
        matrix.update(ids, ids.float())
    with pytest.raises(ValueError, match="`predictions` is on meta but `labels` is on cpu"):
        matrix.update(ids.to("meta"), ids)
