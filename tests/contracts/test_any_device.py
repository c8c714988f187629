"""Nothing in a forward pass or an update needs float64, which not every device has."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from checks import Watch
from crossmix import (
    BoxMasks,
    ClassMix,
    ConfidenceWeightedCE,
    CowMasks,
    CrossDomainMix,
    DistributionAlignment,
    MaskedImages,
    MeanTeacher,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix._cross_entropy import sum_by_blocks
from crossmix._workers import QuietLoader
from crossmix.datasets import CachedSamples, RareClassSampler, SegmentationFolder, write_png
from crossmix.datasets.classes import label_ids, train_ids
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.engine import KeyedCrops
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from crossmix.visualize import colorize, gallery
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
    "class weights": lambda: CrossDomainMix(C, class_weights=range(1, C + 1))(IMAGES, LABELS, IMAGES, LABELS),
    "BoxMasks": lambda: ClassMix(C, masks=BoxMasks())(IMAGES, LABELS),
    "CowMasks": lambda: ClassMix(C, masks=CowMasks(sigma=2.0))(IMAGES, LABELS),
    "StrongAugment": lambda: StrongAugment(jitter_p=1, blur_p=1)(IMAGES),
    "MaskedImages": lambda: MaskedImages(4)(IMAGES),
    "pseudo_label": lambda: F.pseudo_label(LOGITS),
    "confidence_weight": lambda: F.confidence_weight(CONFIDENCE, 0.5),
    "ConfidenceWeightedCE": lambda: ConfidenceWeightedCE()(LOGITS, LABELS, CONFIDENCE),
    "soft labels": lambda: F.weighted_cross_entropy(LOGITS, LOGITS.softmax(1), CONFIDENCE, normalizer="weights"),
    "weights of classes": lambda: ConfidenceWeightedCE(class_weights=range(C), label_smoothing=0.1)(LOGITS, LABELS),
    "upsampled_cross_entropy": lambda: F.upsampled_cross_entropy(LOGITS[..., :3, :4], LABELS, CONFIDENCE),
    "MeanTeacher.update": lambda: MeanTeacher(nn.Conv2d(3, C, 1)).update(nn.Conv2d(3, C, 1)),
    "ConfusionMatrix.update": lambda: ConfusionMatrix(C).update(LABELS.flip(0), LABELS),
    "PseudoLabelMonitor.update": lambda: PseudoLabelMonitor(C).update(
        LABELS, CONFIDENCE, truth=LABELS, student=LABELS),
    "UnsupervisedScores.update": lambda: UnsupervisedScores(C, pixels=9).update(LOGITS),
    "evaluate": lambda: evaluate(nn.Conv2d(3, C, 1), [(IMAGES[0], LABELS[0])], num_classes=C, window=(5, 6), flip=True),
}  # fmt: skip


def step(method: str) -> None:
    """All that a training step does, twice."""
    student = nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C), nn.AvgPool2d(2))
    training = recipes.self_training(student, C, method=method, upsample=True, recipe="mic")
    for _ in range(2):
        output = training(IMAGES, LABELS, IMAGES.flip(0), target_weights=CONFIDENCE)
        output.loss.backward()
        training.update()


def alignment_and_losses() -> None:
    """In all their forms, and inside the operator, which is opaque from outside."""
    align, criterion = DistributionAlignment(C, sync=True), ConfidenceWeightedCE(sync=True)
    probs, small = LOGITS.softmax(1), LOGITS[..., :3, :4]
    align.update(probs)
    align.update_prior(LABELS)
    align(probs)
    align.reset_parameters()
    for scope in ("image", "batch", "pixel", "none"):
        F.confidence_weight(CONFIDENCE, scope=scope)
    for normalizer in ("all", "valid", "weights"):
        for reduction in ("mean", "sum", "none"):
            F.upsampled_cross_entropy(small, LABELS, CONFIDENCE, normalizer=normalizer, reduction=reduction)
    criterion(LOGITS, LABELS, criterion.weights(CONFIDENCE))
    options = {"align_corners": False, "ignore_index": 255, "label_smoothing": 0.1, "with_gradient": True}
    sum_by_blocks(small, LABELS, CONFIDENCE, **options)


CALLS["alignment and losses"] = alignment_and_losses
CALLS |= {f"a step of {method}": partial(step, method) for method in recipes.METHODS}


def test_draws_are_float32_whatever_the_default_is() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            training, augment = recipes.self_training(nn.Conv2d(3, C, 1), C), StrongAugment()
            draws = [
                module.sample(2, generator=generator)
                for module in (training, augment) for generator in (None, torch.Generator())
            ]  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
        assert {v.dtype for v in pytree.tree_leaves(draws) if v is not None} == {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize("size", [(8, 9), (64, 72)])  # smoothed by one product, and by two
def test_blobs_do_not_depend_on_the_default_dtype(size: tuple[int, int]) -> None:
    noise = torch.randn(2, *size, generator=seeded(0))
    for sigma in (3.0, torch.tensor([2.0, 3.0])):
        want = F.cow_mask(noise, sigma=sigma)
        torch.set_default_dtype(torch.float64)
        try:
            got = F.cow_mask(noise, sigma=sigma)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got, want)


def test_data_is_read_on_the_cpu_whatever_the_default_device_is(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", torch.zeros(3, 8, 9, dtype=torch.uint8))
    counts = torch.tensor([[3, 5], [7, 0]])
    with torch.device("meta"):
        unlabelled = SegmentationFolder(tmp_path)
        crops = KeyedCrops(unlabelled, (4, 4), seed=0, stream=0)
        tables = train_ids(), label_ids()
        assert {part.device.type for part in (*unlabelled[0][:2], *crops[0], *tables)} == {"cpu"}
        sampler = RareClassSampler(counts, min_pixels=1)
        KeyedCrops([unlabelled[0]] * 2, (4, 4), seed=0, stream=0, rare=sampler)[0]
        assert len(list(sampler)) == 2
        assert gallery([[colorize(torch.zeros(2, 2, dtype=torch.uint8, device="cpu"))]]).device.type == "cpu"
        cached = CachedSamples(unlabelled, tmp_path / "cache", progress=False)
        assert torch.equal(cached[0].image, torch.zeros(3, 8, 9, dtype=torch.uint8, device="cpu"))
        for workers in (0, 1):
            loader = QuietLoader(range(2), num_workers=workers, generator=torch.Generator(), collate_fn=list)
            assert list(loader) == [[0], [1]]


@pytest.mark.parametrize("name", CALLS)
def test_no_float64(name: str) -> None:
    with Watch() as seen:
        CALLS[name]()
    assert seen.dtypes
    assert torch.float64 not in seen.dtypes
