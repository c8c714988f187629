"""`MeanIoU` in torchmetrics."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from checks import needed
from crossmix.metrics import ConfusionMatrix
from oracles import seeded

needed("torchmetrics")
from torchmetrics import MetricCollection  # noqa: E402
from torchmetrics.classification import MulticlassJaccardIndex  # noqa: E402

from crossmix.integrations.torchmetrics import MeanIoU  # noqa: E402

C = 5
pytestmark = pytest.mark.filterwarnings("ignore:torchmetrics")


def batch(seed: int) -> tuple[Tensor, Tensor]:
    logits = torch.randn(2, C, 6, 7, generator=seeded(seed))
    labels = torch.randint(0, C, (2, 6, 7), generator=seeded(100 + seed), dtype=torch.uint8)
    labels[:, 0] = 255
    return logits, labels


def test_mean__is_that_of_one_confusion_matrix_and_of_the_jaccard_index() -> None:
    ours, theirs, matrix = MeanIoU(C), MulticlassJaccardIndex(C, ignore_index=255), ConfusionMatrix(C)
    for seed in range(3):
        logits, labels = batch(seed)
        ours.update(logits, labels)
        theirs.update(logits.argmax(1), labels.long())
        matrix.update(logits.argmax(1), labels)
    torch.testing.assert_close(ours.compute(), torch.tensor(matrix.compute().mean))
    torch.testing.assert_close(ours.compute(), theirs.compute())
    assert torch.equal(ours.scores().per_class, matrix.compute().per_class)


def test_collection__shares_counts_and_takes_subsets_of_classes() -> None:
    metrics = MetricCollection({"all": MeanIoU(C), "two": MeanIoU(C, classes=[0, 3]), "again": MeanIoU(C)})
    matrix = ConfusionMatrix(C)
    for seed in range(3):
        logits, labels = batch(seed)
        metrics.update(logits, labels)
        matrix.update(logits.argmax(1), labels)
    want = {"all": None, "two": [0, 3], "again": None}
    got = metrics.compute()
    for name, classes in want.items():
        torch.testing.assert_close(got[name], torch.tensor(matrix.compute(classes).mean))
    metrics.reset()
    metrics.update(*batch(9))
    alone = ConfusionMatrix(C)
    alone.update(batch(9)[0].argmax(1), batch(9)[1])
    torch.testing.assert_close(metrics.compute()["all"], torch.tensor(alone.compute().mean))


def test_collection__keeps_apart_what_ignores_other_ids() -> None:
    metrics = MetricCollection({"all": MeanIoU(C), "without": MeanIoU(C, ignore_index=2)})
    want = {"all": ConfusionMatrix(C), "without": ConfusionMatrix(C, ignore_index=2)}
    for seed, absent in ((0, True), (1, False)):  # equal counts after the first batch
        logits, labels = batch(seed)
        labels[labels == 2] = 255 if absent else 2
        logits[:, 2] -= 99 * absent
        metrics.update(logits, labels)
        for matrix in want.values():
            matrix.update(logits.argmax(1), labels)
    for name, matrix in want.items():
        torch.testing.assert_close(metrics.compute()[name], torch.tensor(matrix.compute().mean))


def test_forward__returns_the_score_of_the_batch_and_counts_on() -> None:
    metric, matrix = MeanIoU(C), ConfusionMatrix(C)
    for seed in range(2):
        logits, labels = batch(seed)
        one = ConfusionMatrix(C)
        one.update(logits.argmax(1), labels)
        matrix.update(logits.argmax(1), labels)
        torch.testing.assert_close(metric(logits, labels), torch.tensor(one.compute().mean))
    torch.testing.assert_close(metric.compute(), torch.tensor(matrix.compute().mean))


def test_state__is_summed_copied_and_pickled() -> None:
    parts = [MeanIoU(C), MeanIoU(C)]
    whole = MeanIoU(C)
    for seed, part in enumerate(parts):
        part.update(*batch(seed))
        whole.update(*batch(seed))
    assert set(whole._reductions) == {"counts", "ignored", "invalid"}
    merged = copy.deepcopy(parts[0])
    merged.merge_state(parts[1])
    assert torch.equal(merged.counts, whole.counts)
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(other.compute(), whole.compute())


def test_refused__predictions_that_are_no_classes_and_classes_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"`predictions` must lie in 0..4"):
        MeanIoU(C).update(torch.full((1, 2, 2), 7), torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="find out why the scores are NaN"):
        MeanIoU(C).update(torch.full((1, C, 2, 2), torch.nan), torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="`classes` must be ids"):
        MeanIoU(C, classes=[5])
    with pytest.raises(TypeError, match="`predictions` must be a torch"):
        MeanIoU(C).update([1], torch.zeros(1, 2, 2, dtype=torch.long))  # type: ignore[arg-type]


@pytest.mark.usefixtures("process_group")
def test_ranks__are_synchronised_by_torchmetrics() -> None:
    metric = MeanIoU(C)
    metric.update(*batch(0))
    before = metric.counts.clone()
    metric.sync(distributed_available=lambda: True)
    assert torch.equal(metric.counts, before)  # the sum over one rank
    metric.unsync()
    assert torch.equal(metric.counts, before)
