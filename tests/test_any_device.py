"""Nothing in a forward pass or an update needs float64, which not every device has."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from checks import Watch
from crossmix import ClassMix, ConfidenceWeightedCE, CrossDomainMix, MeanTeacher, StrongAugment
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from oracles import seeded

C = 5
LABELS = torch.randint(0, C, (2, 8, 9), generator=seeded(0))
IMAGES, LOGITS = torch.rand(2, 3, 8, 9, generator=seeded(1)), torch.randn(2, C, 8, 9, generator=seeded(2))
CONFIDENCE = torch.rand(2, 8, 9, generator=seeded(3))

CALLS: dict[str, Callable[[], object]] = {
    "sample_classes": lambda: F.sample_classes(LABELS, C),
    "sample_classes of 55 %": lambda: F.sample_classes(LABELS, 120, ratio=0.55),
    "ClassMix": lambda: ClassMix(C)(IMAGES, LABELS),
    "CrossDomainMix": lambda: CrossDomainMix(C)(IMAGES, LABELS, IMAGES, LABELS, CONFIDENCE),
    "StrongAugment": lambda: StrongAugment(jitter_p=1, blur_p=1)(IMAGES),
    "pseudo_label": lambda: F.pseudo_label(LOGITS),
    "confidence_weight": lambda: F.confidence_weight(CONFIDENCE, 0.5),
    "ConfidenceWeightedCE": lambda: ConfidenceWeightedCE()(LOGITS, LABELS, CONFIDENCE),
    "upsampled_cross_entropy": lambda: F.upsampled_cross_entropy(LOGITS[..., :3, :4], LABELS, CONFIDENCE),
    "MeanTeacher.update": lambda: MeanTeacher(nn.Conv2d(3, C, 1)).update(nn.Conv2d(3, C, 1)),
    "ConfusionMatrix.update": lambda: ConfusionMatrix(C).update(LABELS.flip(0), LABELS),
    "PseudoLabelMonitor.update": lambda: PseudoLabelMonitor(C).update(
        LABELS, CONFIDENCE, truth=LABELS.flip(0), student=LABELS.flip(1)
    ),
    "UnsupervisedScores.update": lambda: UnsupervisedScores(C, pixels=9).update(LOGITS),
    "evaluate": lambda: evaluate(nn.Conv2d(3, C, 1), [(IMAGES[0], LABELS[0])], num_classes=C, window=(5, 6), flip=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_float64(name: str) -> None:
    with Watch() as seen:
        CALLS[name]()
    assert seen.dtypes
    assert torch.float64 not in seen.dtypes
