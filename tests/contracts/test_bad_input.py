"""Every mistake gets a sentence: what was expected, what came, what to do."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crossmix import (
    BoxMasks,
    ClassMix,
    ConfidenceWeightedCE,
    CowMasks,
    CrossDomainMix,
    DistributionAlignment,
    MaskedImages,
    MeanTeacher,
    SelfTraining,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor, UnsupervisedScores
from crossmix.metrics import ConfusionMatrix
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr
from crossmix.visualize import colorize, gallery

IMAGES, LABELS = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
LOGITS, MAP = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5)
MASK, CLASSES = torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
META = torch.device("meta")
PRIOR = torch.full((3,), 1 / 3)


def mixed(**changes: Any) -> object:
    """A CrossDomainMix call with some arguments replaced."""
    names = ("source_images", "source_labels", "target_images", "target_labels")
    return CrossDomainMix(3)(**dict(zip(names, (IMAGES, LABELS, IMAGES, LABELS), strict=True)) | changes)


Cases = dict[str, tuple[Callable[[], object], type[Exception], str]]
CASES: Cases = {
    "images rank": (lambda: mixed(source_images=IMAGES[0]),
        ValueError, r"shape \(N, C, H, W\), got \(3, 4, 5\); add the batch"),
    "images dtype": (lambda: mixed(target_images=IMAGES.to(torch.uint8)),
        TypeError, r"floating in \[0, 1\], got torch.uint8; convert"),
    "images type": (lambda: mixed(source_images=[1]),
        TypeError, "`source_images` must be a torch.Tensor, got list; convert"),
    "images sparse": (lambda: mixed(source_images=IMAGES.to_sparse()),
        TypeError, "`source_images` must be a dense tensor, got torch.sparse_coo; convert it with `.to_dense"),
    "prior sparse": (lambda: DistributionAlignment(3, prior=PRIOR.to_sparse()), TypeError, "`prior` must be a dense"),
    "no values": (lambda: ConfusionMatrix(3).update(LABELS.to(META), LABELS.to(META)),
        ValueError, "`labels` must have values, got a meta tensor"),
    "no values to paint": (lambda: colorize(LABELS[0].to(META)), ValueError, "`labels` must have values"),
    "align_corners": (lambda: F.upsampled_cross_entropy(LOGITS, LABELS, align_corners="yes"),
        TypeError, "`align_corners` must be True or False, got 'yes'"),
    "align_corners of the module": (lambda: ConfidenceWeightedCE().upsampled(LOGITS, LABELS, align_corners=1),
        TypeError, "`align_corners` must be True or False, got 1"),
    "picture type": (lambda: gallery([["street"]]), TypeError, "`rows` must be a torch.Tensor, got str"),
    "picture rank": (lambda: gallery([[MAP]]), ValueError, r"`rows` must have shape \(3, H, W\) each, got \(2, 4"),
    "gap": (lambda: gallery([[IMAGES[0]]], gap=-1), ValueError, "`gap` must be at least 0, got -1"),
    "labels rank": (lambda: mixed(source_labels=LABELS[:, None]),
        ValueError, r"got \(2, 1, 4, 5\); squeeze the channel dimension"),
    "labels in colour": (lambda: mixed(source_labels=LABELS[:, None].expand(2, 3, 4, 5)),
        ValueError, r"got \(2, 3, 4, 5\); they hold ids, not colours"),
    "labels dtype": (lambda: mixed(target_labels=MAP),
        TypeError, "must be uint8, int16, int32 or int64, got torch.float32"),
    "labels int8": (lambda: mixed(source_labels=LABELS.to(torch.int8)), TypeError, "got torch.int8"),
    "labels size": (lambda: mixed(source_labels=LABELS[:, :3]),
        ValueError, "must agree in batch size, height and width"),
    "batches do not pair": (lambda: mixed(target_images=IMAGES[:1]),
        ValueError, "`target_images` .* must agree in batch size, .*; load equally many, in loaders with `drop_last"),
    "labels do not pair": (lambda: mixed(target_labels=LABELS[:1]),
        ValueError, "`target_labels` .* must agree in batch size"),
    "device": (lambda: mixed(target_images=IMAGES.to(META)),
        ValueError, "is on meta but `source_images` is on cpu; move"),
    "weights dtype": (lambda: mixed(target_weights=LABELS), TypeError, "`target_weights` must be floating"),
    "weights shape": (lambda: mixed(target_weights=MAP[:, None]),
        ValueError, r"\(2, 4, 5\) or \(N,\), got \(2, 1, 4, 5\); squeeze"),
    "classes dtype": (lambda: mixed(classes=CLASSES.long()), TypeError, "`classes` must be bool, got torch.int64"),
    "classes columns": (lambda: mixed(classes=CLASSES[:, :3]),
        ValueError, r"num_classes \+ 1\) = \(2, 4\), got \(2, 3\)"),
    "classes rows": (lambda: mixed(classes=CLASSES[:1]), ValueError, r"got \(1, 4\)"),
    "scores shape": (lambda: mixed(scores=torch.rand(2, 3)),
        ValueError, r"num_classes \+ 1\) = \(2, 4\), got \(2, 3\); draw"),
    "scores device": (lambda: mixed(scores=torch.rand(2, 4, device=META)), ValueError, "`scores` is on meta"),
    "scores dtype": (lambda: mixed(scores=torch.rand(2, 4).to(torch.complex64)),
        TypeError, "`scores` must be real, got torch.complex64"),
    "scores of drawn classes": (lambda: mixed(scores=CLASSES), TypeError, "got torch.bool; .* pass drawn `classes`"),
    "generator": (lambda: mixed(generator=0),
        TypeError, "`generator` must be a torch.Generator or None, got int; for a seed"),
    "classes and scores": (lambda: mixed(classes=CLASSES, scores=torch.rand(2, 4)),
        ValueError, "must not both be given"),
    "ClassMix images dtype": (lambda: ClassMix(3)(IMAGES.to(torch.uint8), LABELS),
        TypeError, r"`images` must be floating in \[0, 1\], got torch.uint8"),
    "ClassMix labels dtype": (lambda: ClassMix(3)(IMAGES, MAP), TypeError, "`labels` must be uint8, int16, int32"),
    "image sizes": (lambda: mixed(target_images=IMAGES[..., :4], target_labels=LABELS[..., :4]),
        ValueError, r"`target_images` \(2, 3, 4, 4\) and `source_images` \(2, 3, 4, 5\) must agree"),
    "ClassMix labels": (lambda: ClassMix(3)(IMAGES, LABELS[:1]), ValueError, "must agree in batch size"),
    "ratio nan": (lambda: CrossDomainMix(3, ratio=float("nan")), ValueError, "`ratio` must lie in"),
    "ratio type": (lambda: CrossDomainMix(3, ratio="half"), TypeError, "`ratio` must be a float, got str"),
    "num_classes 0": (lambda: CrossDomainMix(0), ValueError, "`num_classes` must be at least 1, got 0"),
    "num_classes type": (lambda: ClassMix(19.0), TypeError, "`num_classes` must be an int, got float"),
    "class_mask shape": (lambda: F.class_mask(LABELS, CLASSES[0]), ValueError, r"\(2, C \+ 1\), got \(4,\)"),
    "mask dtype": (lambda: F.mix(MAP, MAP, LABELS), TypeError, "`mask` must be bool, got torch.int64; compare first"),
    "mask rank": (lambda: F.mix(IMAGES, IMAGES, MASK[:, None]), ValueError, "drop the channel dimension"),
    "mix shape": (lambda: F.mix(IMAGES, MAP[:, :2], MASK),
        ValueError, r"`base` must have shape \(N, ..., H, W\) or \(N,\)"),
    "mix channels": (lambda: F.mix(IMAGES, IMAGES[:, :1], MASK), ValueError, "must have the same shape"),
    "mix vector": (lambda: F.mix(torch.rand(3), MAP, MASK), ValueError, "`pasted` must have shape"),
    "confidence dtype": (lambda: F.confidence_weight(LABELS), TypeError, "`confidence` must be floating"),
    "confidence rank": (lambda: F.confidence_weight(LOGITS),
        ValueError, "take the maximum of the probabilities over dimension 1"),
    "threshold": (lambda: F.confidence_weight(MAP, 1.01), ValueError, r"`threshold` must lie in \[0, 1\], got 1.01"),
    "scope": (lambda: F.confidence_weight(MAP, scope="pixels"),
        ValueError, "one of 'image', 'batch', 'pixel', 'none', got 'pixels'"),
    "criterion scope": (lambda: ConfidenceWeightedCE(scope="class"), ValueError, "`scope` must be one of"),
    "criterion threshold": (lambda: ConfidenceWeightedCE(-1), ValueError, "`threshold` must lie in"),
    "normalizer": (lambda: ConfidenceWeightedCE(normalizer="mean"),
        ValueError, "one of 'all', 'valid', 'weights', got 'mean'"),
    "smoothing": (lambda: ConfidenceWeightedCE(label_smoothing=2), ValueError, "`label_smoothing` must lie in"),
    "reduction": (lambda: F.weighted_cross_entropy(LOGITS, LABELS, reduction="avg"),
        ValueError, "one of 'mean', 'sum', 'none'"),
    "logits rank": (lambda: F.weighted_cross_entropy(MAP, LABELS),
        ValueError, r"\(N, C, H, W\) with C >= 1, got \(2, 4, 5\)"),
    "logits dtype": (lambda: F.pseudo_label(LABELS[:, None]), TypeError, "`logits` must be floating, got torch.int64"),
    "logits size": (lambda: ConfidenceWeightedCE()(LOGITS[..., :2], LABELS), ValueError, "must agree in batch size"),
    "no image, no pixels": (lambda: F.upsampled_cross_entropy(LOGITS[:0, :, :, :0], LABELS[:0]),
        ValueError, r"`logits` must have pixels to be upsampled to \(4, 5\), got"),
    "loss batch": (lambda: F.upsampled_cross_entropy(LOGITS[:1], LABELS), ValueError, "hold 1 images but `labels` 2"),
    "loss weights dtype": (lambda: F.weighted_cross_entropy(LOGITS, LABELS, LABELS),
        TypeError, "`weights` must be floating"),
    "loss weights shape": (lambda: F.weighted_cross_entropy(LOGITS, LABELS, MAP[:, :1]),
        ValueError, "crop them to the labels"),
    "loss device": (lambda: F.weighted_cross_entropy(LOGITS, LABELS.to(META)),
        ValueError, "is on meta but `logits` is on cpu"),
    "probs rank": (lambda: F.align_distribution(MAP, PRIOR, PRIOR), ValueError, "`probs` must have shape"),
    "prior length": (lambda: F.align_distribution(LOGITS, PRIOR[:2], PRIOR),
        ValueError, r"shape \(C,\) = \(3,\) to match `probs`"),
    "prior dtype": (lambda: F.align_distribution(LOGITS, PRIOR.long(), PRIOR),
        TypeError, "divide class counts by their sum"),
    "running device": (lambda: F.align_distribution(LOGITS, PRIOR, PRIOR.to(META)), ValueError, "`running` is on meta"),
    "eps": (lambda: F.align_distribution(LOGITS, PRIOR, PRIOR, eps=0), ValueError, "`eps` must be positive"),
    "momentum": (lambda: DistributionAlignment(3, momentum=1.5), ValueError, "`momentum` must lie in"),
    "align classes": (lambda: DistributionAlignment(4).update(LOGITS), ValueError, "must have C = 4 classes, got 3"),
    "align device": (lambda: DistributionAlignment(3).update(LOGITS.to(META)), ValueError, "is on meta"),
    "decay": (lambda: MeanTeacher(nn.Conv2d(3, 3, 1), decay=1.1), ValueError, "`decay` must lie in"),
    "teacher mode": (lambda: MeanTeacher(nn.Conv2d(3, 3, 1), mode="test"),
        ValueError, "one of 'eval', 'train', got 'test'"),
    "teacher buffers": (lambda: MeanTeacher(nn.Conv2d(3, 3, 1), buffers="keep"),
        ValueError, "one of 'copy', 'average'"),
    "teacher update": (lambda: MeanTeacher(nn.ReLU()).update(None),
        TypeError, "`student` must be an nn.Module, got None"),
    "teacher student": (lambda: MeanTeacher(lambda x: x), TypeError, "`student` must be an nn.Module, got function"),
    "ema lengths": (lambda: F.ema_update_([MAP], [], 0.5), ValueError, "holds 1 tensors but `current` 0"),
    "ema shapes": (lambda: F.ema_update_([MAP], [PRIOR], 0.5), ValueError, r"`averaged\[0\]` has shape \(2, 4, 5\)"),
    "ema decay": (lambda: F.ema_update_([MAP], [MAP], 2), ValueError, "`decay` must lie in"),
    "matrix shapes": (lambda: ConfusionMatrix(3).update(LABELS, LABELS[:1]), ValueError, "must agree in batch size"),
    "matrix logits": (lambda: ConfusionMatrix(3).update(LOGITS, LABELS), TypeError, "take the argmax"),
    "matrix prediction": (lambda: ConfusionMatrix(3).update(LABELS + 3, LABELS),
        ValueError, r"must lie in 0..2 at labelled pixels"),
    "matrix classes": (lambda: ConfusionMatrix(3).compute([3]), ValueError, r"ids in 0..2, got \[3\]"),
    "loss ignore": (lambda: F.weighted_cross_entropy(LOGITS, LABELS, ignore_index=None),
        TypeError, "must be an int, got"),
    "upsampled ignore": (lambda: F.upsampled_cross_entropy(LOGITS, LABELS, ignore_index=1.0),
        TypeError, "`ignore_index`"),
    "criterion ignore": (lambda: ConfidenceWeightedCE(ignore_index="255"),
        TypeError, "`ignore_index` .* got str; to ignore"),
    "mix ignore": (lambda: CrossDomainMix(3, ignore_index=None), TypeError, "`ignore_index` must be an int, got None"),
    "sample ignore": (lambda: F.sample_classes(LABELS, 3, ignore_index="255"),
        TypeError, "`ignore_index` must be an int, got str"),
    "class mask ignore": (lambda: F.class_mask(LABELS, torch.zeros(2, 4, dtype=torch.bool), ignore_index=None),
        TypeError, "`ignore_index` must be an int, got None"),
    "matrix ignore": (lambda: ConfusionMatrix(3, ignore_index=None), TypeError, "`ignore_index` must be an int"),
    "monitor ignore": (lambda: PseudoLabelMonitor(3, ignore_index=True), TypeError, "`ignore_index` must be an int"),
    "recipe": (lambda: recipes.self_training(nn.ReLU(), 3, recipe=None), TypeError, "a name or a Recipe, got NoneType"),
    "matrix no classes": (lambda: ConfusionMatrix(3).compute([]), ValueError, r"got \[\]; pass at least one"),
}  # fmt: skip


class Returns(nn.Module):
    """A network whose output is made from its logits."""

    def __init__(self, change: Callable[[Tensor], object], num_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, num_classes, 1)
        self.change = change

    def forward(self, images: Tensor) -> object:
        return self.change(self.conv(images))


def train(student: nn.Module | None = None, **options: Any) -> SelfTraining:
    student = nn.Conv2d(3, 3, 1) if student is None else student
    return SelfTraining(student, MeanTeacher(student), **{"mix": CrossDomainMix(3), **options})


def step(*student: nn.Module, **options: Any) -> object:
    return train(*student, **options)(IMAGES, LABELS, IMAGES)


def recipe(num_classes: int = 3, **options: Any) -> SelfTraining:
    return recipes.self_training(nn.Conv2d(3, 3, 1), num_classes, **options)


def counting(num_classes: object) -> DistributionAlignment:
    align = DistributionAlignment(4)
    align.num_classes = num_classes
    return align


class Criterion(ConfidenceWeightedCE):
    """Weighs as it is told."""

    def __init__(self, weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights


PARTS: Cases = {
    "student's keys": (lambda: step(Returns(lambda logits: {"out": logits, "aux": logits})), TypeError,
        r"`student` must return logits as a tensor, got dict with keys 'out', 'aux'; .*lambda out: out\['out'\]`"),
    "student's size": (lambda: step(Returns(lambda logits: logits[..., ::2, ::2])), ValueError,
        r"logits of size \(2, 3\) for images of size \(4, 5\); pass `upsample=True` to SelfTraining"),
    "student's rank": (lambda: step(Returns(lambda logits: logits.flatten(2))), ValueError,
        r"must return logits of shape \(N, C, H, W\) with N = 2, got \(2, 3, 20\)"),
    "student": (lambda: SelfTraining(lambda x: x, None, mix=None),
        TypeError, "`student` must be an nn.Module, got function"),
    "teacher": (lambda: SelfTraining(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), mix=None), TypeError,
        r"`teacher` must have a method `.update\(student\)` or `.update_parameters\(student\)`, got Conv2d"),
    "mix": (lambda: train(mix="classmix"), TypeError, "`mix` must be callable, got str; build a module such as Cross"),
    "mix class": (lambda: train(mix=CrossDomainMix), TypeError, "`mix` must be callable, got the class CrossDomainMix"),
    "mix arguments": (lambda: train(mix=lambda images, labels: (images, labels)), TypeError,
        r"`mix` must take .* or \(images, labels, weights\), .* got \(images, labels\); see `SourceOntoTarget`"),
    "mix result": (lambda: step(mix=lambda images, labels, weights: images),
        TypeError, r"`mix` must return Mixed\(images, labels, weights, mask\), got Tensor"),
    "mix result's shape": (lambda: step(mix=lambda x, y, w: (x, y, w[:, :2], w > 0)),
        ValueError, r"`mix` must return `weights` of shape \(2, 4, 5\), got \(2, 2, 5\)"),
    "mix result's images": (lambda: step(mix=lambda x, y, w: ((255 * x).byte(), y, w, w > 0)),
        TypeError, r"`mixed.images` must be floating in \[0, 1\], got torch.uint8"),
    "mix result's range": (lambda: step(mix=lambda x, y, w: (255 * x, y, w, w > 0)), ValueError, "`mixed.images`"),
    "mix result's device": (lambda: step(mix=lambda x, y, w: (x, y, w.to("meta"), w > 0)),
        ValueError, r"`mixed.weights` is on meta but `target_images` is on cpu; move one by `.to\('cpu'\)`"),
    "mix without classes": (lambda: train(mix=lambda x, y, w, *, scores: (x, y, w, w > scores[0, 0])),
        ValueError, "the number of classes is unknown; pass `num_classes=` to SelfTraining"),
    "align": (lambda: train(align=1), TypeError, "`align` must be callable, got int; build a module such as Distrib"),
    "align method": (lambda: train(align=nn.Identity()),
        TypeError, r"`align` must have a method `.update\(probs\)`, got Identity without one"),
    "logits": (lambda: train(logits="logits"), TypeError, "`logits` must be callable, got str"),
    "source_criterion": (lambda: train(source_criterion=1), TypeError, "`source_criterion` must be callable, got int"),
    "source_criterion's shape": (lambda: step(source_criterion=nn.CrossEntropyLoss(reduction="none")),
        ValueError, r"`source_criterion` must return a scalar, got shape \(2, 4, 5\); average over pixels"),
    "augment's size": (lambda: step(augment=lambda x: x[..., :4]), ValueError,
        r"`augment` must keep the shape of images, \(2, 3, 4, 5\), got \(2, 3, 4, 4\); labels and weights are"),
    "augment's dtype": (lambda: step(augment=lambda x: (x * 255).to(torch.uint8)),
        TypeError, r"`augment\(images\)` must be floating"),
    "augment's range": (lambda: step(augment=lambda x: x * 255),
        ValueError, r"`augment\(images\)` must lie in \[0, 1\]"),
    "criterion's weights are no tensor": (lambda: step(criterion=Criterion(lambda confidence: confidence.numpy())),
        TypeError, r"`criterion.weights\(confidence\)` must be a torch.Tensor, got ndarray"),
    "criterion's weights are bool": (lambda: step(criterion=Criterion(lambda confidence: confidence > 0.5)),
        TypeError, r"`criterion.weights\(confidence\)` must be floating, got torch.bool"),
    "criterion's weights of another shape": (lambda: step(criterion=Criterion(lambda confidence: confidence[:, None])),
        ValueError, r"`criterion.weights\(confidence\)` must have shape \(N, H, W\)"),
    "draw of another type": (lambda: StrongAugment()(IMAGES, draw=3),
        TypeError, "`draw` must be an AugmentDraw, got int; use `sample`"),
    "draw's type": (lambda: train()(IMAGES, LABELS, IMAGES, draw=(None, None)),
        TypeError, "`draw` must be a SelfTrainingDraw, got tuple; make it with `sample`"),
    "augment's type": (lambda: step(augment=lambda x: {"image": x}),
        TypeError, r"`augment\(images\)` must be a torch.Tensor, got dict"),
    "augment's device": (lambda: step(augment=lambda x: x.to(META)), ValueError, r"`augment\(images\)` is on meta"),
    "images": (lambda: train()(255 * IMAGES, LABELS, IMAGES),
        ValueError, r"`source_images` must lie in \[0, 1\], got values from .* to .*; divide bytes by 255"),
    "target images": (lambda: train()(IMAGES, LABELS, 5 * IMAGES - 2), ValueError,
        r"`target_images` must lie in \[0, 1\], .* or pass the `mean` and `std` that your loader uses"),
    "image sizes": (lambda: train(mix=lambda a, b, c, d, e: (c, d, e, d > 0))(IMAGES, LABELS, IMAGES[..., :4]),
        ValueError, r"`target_images` \(2, 3, 4, 4\) and `source_images` \(2, 3, 4, 5\) must agree"),
    "target's type": (lambda: train()(IMAGES, LABELS, IMAGES.numpy()), TypeError, "`target_images` must be a torch.Te"),
    "integer logits": (lambda: step(Returns(Tensor.long)),
        TypeError, "`student` must return floating logits, got torch.int64; return them before argmax"),
    "source_criterion's type": (lambda: step(source_criterion=lambda logits, labels: 1.0),
        TypeError, r"`source_criterion\(logits, labels\)` must be a torch.Tensor, got float"),
    "images dtype": (lambda: train()(IMAGES.byte(), LABELS, IMAGES), TypeError, "`source_images` must be floating"),
    "labels dtype": (lambda: train()(IMAGES, MAP, IMAGES), TypeError, "`source_labels` must be uint8, int16, int32"),
    "num_classes type": (lambda: train(num_classes=3.0), TypeError, "`num_classes` must be an int, got float"),
    "num_classes of SelfTraining": (lambda: train(num_classes=4),
        ValueError, "`SelfTraining` has num_classes=4 but `mix` 3; use the same for both"),
    "running statistics": (lambda: train(consistency_running_stats="yes"),
        TypeError, "`consistency_running_stats` must be True or False, got 'yes'"),
    "NumPy's num_classes of a part": (lambda: train(align=counting(np.int64(4))),
        ValueError, "`mix` has num_classes=3 but `align` 4; use the same for both"),
    "ignored id of the mix": (lambda: train(mix=CrossDomainMix(3, ignore_index=0), criterion=ConfidenceWeightedCE()),
        ValueError, "`mix` has ignore_index=0 but `criterion` 255; use the same for both"),
    "ignored id of the source criterion": (lambda: train(source_criterion=ConfidenceWeightedCE(ignore_index=-100)),
        ValueError, "`mix` has ignore_index=255 but `source_criterion` -100"),
    "ignored id of torch's loss": (lambda: train(source_criterion=nn.CrossEntropyLoss(ignore_index=0)),
        ValueError, "`mix` has ignore_index=255 but `source_criterion` 0"),
    "ignored ids of the criteria": (lambda: train(
        mix=None, criterion=ConfidenceWeightedCE(), source_criterion=nn.NLLLoss(ignore_index=254)),
        ValueError, "`criterion` has ignore_index=255 but `source_criterion` 254"),
    "augment": (lambda: train(augment=3), TypeError, "`augment` must be callable, got int"),
    "weigh": (lambda: train(weigh="both"), ValueError, "`weigh` must be one of 'target', 'mixed', got 'both'"),
    "align classes": (lambda: train(align=DistributionAlignment(4)), ValueError, "num_classes=3 but `align` 4"),
    "classes": (lambda: step(mix=ClassMix(19)),
        ValueError, "returned 3 classes but SelfTraining was built with num_classes=19"),
    "classes of the baseline": (lambda: recipe(19, method="source")(IMAGES, LABELS, IMAGES),
        ValueError, "`student` returned 3 classes but .* num_classes=19"),
    "classes of pseudo-labelling": (lambda: recipe(19, method="pseudo-label")(IMAGES, LABELS, IMAGES),
        ValueError, "returned 3 classes but .* num_classes=19; use the same number for both"),
    "num_classes": (lambda: recipe(0), ValueError, "must be at least 1, got 0"),
    "criterion": (lambda: train(criterion=nn.CrossEntropyLoss()), TypeError,
        r"must have a method `.weights\(confidence\)`, got CrossEntropyLoss without one; pass a ConfidenceWeightedCE"),
    "batches": (lambda: train()(IMAGES, LABELS, IMAGES[:1]), ValueError, "must agree in batch size"),
    "sizes": (lambda: train()(IMAGES, LABELS, IMAGES[..., :4]),
        ValueError, "must agree in batch size, height and width"),
    "labels": (lambda: train()(IMAGES, LABELS[:1], IMAGES), ValueError, "`source_labels` .* must agree"),
    "weights": (lambda: train()(IMAGES, LABELS, IMAGES, target_weights=MAP[:, 0]), ValueError,
        r"`target_weights` must have shape \(N, H, W\) = \(2, 4, 5\) or \(N,\), got \(2, 5\); .* crop them"),
    "weights dtype": (lambda: train()(IMAGES, LABELS, IMAGES, target_weights=MASK),
        TypeError, "`target_weights` must be floating"),
    "device": (lambda: train()(IMAGES, LABELS.to(META), IMAGES), ValueError, "`source_labels` is on meta"),
    "draw": (lambda: train()(IMAGES, LABELS, IMAGES, draw=train(mix=None).sample(2)),
        ValueError, "`draw.scores` must be given"),
    "draw of augment": (lambda: recipe(3)(IMAGES, LABELS, IMAGES, draw=train().sample(2)),
        ValueError, "`draw.augment` must be given"),
    "method": (lambda: recipe(method="cutmix"), ValueError, "`method` must be one of 'source'"),
    "recipe": (lambda: recipe(recipe="v2"), ValueError, "one of 'released', 'paper', 'mic', got 'v2'"),
    "option": (lambda: recipe(lamda="image"), TypeError, "unknown option 'lamda'; the options are"),
    "threshold": (lambda: recipe(threshold=2), ValueError, r"`threshold` must lie in \[0, 1\], got 2"),
    "value": (lambda: recipe(flavor="none"), ValueError, "`flavor` must be one of"),
    "consistency without a teacher": (
        lambda: SelfTraining(nn.Conv2d(3, 3, 1), None, mix=None, consistency=MaskedImages()),
        ValueError, "`consistency` needs the pseudo-labels of a `teacher`, got none; pass a MeanTeacher"),
    "consistency of the source": (lambda: recipe(method="source", consistency=MaskedImages()),
        ValueError, "`consistency` needs the pseudo-labels of a `teacher`"),
    "consistency class": (lambda: train(consistency=MaskedImages),
        TypeError, "`consistency` must be callable, got the class MaskedImages; build a module such as MaskedImages"),
    "consistency_augment": (lambda: train(consistency=MaskedImages(), consistency_augment=0.5),
        TypeError, "`consistency_augment` must be callable, got float"),
    "consistency_weight": (lambda: train(consistency_weight=-1.0),
        ValueError, "`consistency_weight` must be finite and at least 0, got -1.0"),
    "consistency_weight nan": (lambda: recipe(consistency_weight=float("nan")),
        ValueError, "`consistency_weight` must be finite and at least 0, got nan"),
    "block": (lambda: step(consistency=MaskedImages(16)),
        ValueError, "`block` must fit into the images, got 16 pixels for images of 4 x 5; use a smaller one, or None"),
    "shape of masked images": (lambda: step(consistency=lambda images: images[..., 1:]),
        ValueError, r"`consistency` must keep the shape of images, \(2, 3, 4, 5\), got \(2, 3, 4, 4\)"),
    "no size": (lambda: train(consistency=MaskedImages(2)).sample(2),
        ValueError, r"`size` must be given, since the blocks of `consistency` depend on it; pass \(height, width\)"),
    "draw without blocks": (lambda: train(consistency=MaskedImages(2))(IMAGES, LABELS, IMAGES, draw=train().sample(2)),
        ValueError, "`draw.consistency` must be given, since there is a `MaskedImages`; make the draw with `sample`"),
    "draw without colours": (
        lambda: train(consistency=MaskedImages(2), consistency_augment=StrongAugment())(
            IMAGES, LABELS, IMAGES, draw=train(consistency=MaskedImages(2)).sample(2, (4, 5))),
        ValueError, "`draw.consistency_augment` must be given, since there is a `StrongAugment`"),
    "ignored rows": (lambda: train(ignore_top=-1), ValueError, "`ignore_top` must be at least 0, got -1"),
    "share of ignored rows": (lambda: recipe(ignore_bottom=0.1),
        TypeError, "`ignore_bottom` must be an int, got float; count rows of an image of 512"),
    "all rows": (lambda: train(ignore_top=500, ignore_bottom=12),
        ValueError, "`ignore_top` and `ignore_bottom` must leave some of 512 rows, got 500 and 12"),
    "recipe's consistency": (lambda: recipe(consistency=64),
        TypeError, "`consistency` must be True, False, None, a MaskedImages or another function of images, got 64"),
    "recipe's block": (lambda: recipe(recipe="mic", consistency_block=0),
        ValueError, "`consistency_block` must be at least 1, got 0; it is in pixels"),
    "recipe's ratio": (lambda: recipe(recipe="mic", consistency_ratio=1.5),
        ValueError, r"`consistency_ratio` must lie in \[0, 1\], got 1.5"),
    "prior": (lambda: recipe(prior=[1, 1, 1]), ValueError, "belongs to method='alignment'"),
}  # fmt: skip


CLASS_SCORES, ODDS = np.ones((2, 4)), torch.ones(3)
MIXING: Cases = {
    "float labels drawn from": (lambda: F.sample_classes(MAP, 3), TypeError, "`labels` must be uint8"),
    "float labels masked": (lambda: F.class_mask(MAP, CLASSES), TypeError, "`labels` must be uint8"),
    "float labels sampled": (lambda: CrossDomainMix(3).sample(MAP), TypeError, "`labels` must be uint8"),
    "numpy drawn from": (lambda: F.sample_classes(LABELS.numpy(), 3), TypeError, "`labels` must be a torch.Tensor"),
    "numpy weights": (lambda: mixed(target_weights=np.ones(2)), TypeError, "`target_weights` must be a torch.Tensor"),
    "numpy scores": (lambda: F.sample_classes(LABELS, 3, scores=CLASS_SCORES), TypeError, "`scores` must be a torch.T"),
    "numpy classes": (lambda: F.class_mask(LABELS, CLASS_SCORES), TypeError, "`classes` must be a torch.Tensor"),
    "numpy pasted": (lambda: F.mix(IMAGES.numpy(), IMAGES, MASK), TypeError, "`pasted` must be a torch.Tensor"),
    "numpy mask": (lambda: F.mix(IMAGES, IMAGES, MASK.numpy()), TypeError, "`mask` must be a torch.Tensor"),
    "mask's device": (lambda: F.mix(IMAGES, IMAGES, MASK.to(META)), ValueError, "`mask` is on meta"),
    "labels' device": (lambda: ClassMix(3)(IMAGES, LABELS.to(META)), ValueError, "`labels` is on meta"),
    "classes' device": (lambda: F.class_mask(LABELS, CLASSES.to(META)), ValueError, "`classes` is on meta"),
    "number of classes": (lambda: F.sample_classes(LABELS, 0), ValueError, "`num_classes` must be at least 1"),
    "ratio": (lambda: F.sample_classes(LABELS, 3, ratio=2.0), ValueError, r"`ratio` must lie in \[0, 1\]"),
    "rounding": (lambda: ClassMix(3, rounding="round"), ValueError, "`rounding` must be one of 'ceil', 'floor'"),
    "rounding drawn": (lambda: F.sample_classes(LABELS, 3, rounding="up"), ValueError, "`rounding` must be one of"),
    "odds of 0": (lambda: ClassMix(2, class_weights=[1, 0]), ValueError, "`class_weights` must be positive and finite"),
    "odds of nan": (lambda: CrossDomainMix(2, class_weights=[1, math.nan]), ValueError, "be positive and finite"),
    "odds of inf": (lambda: CrossDomainMix(2, class_weights=[1, math.inf]), ValueError, "be positive and finite"),
    "odds below float32": (lambda: ClassMix(2, class_weights=[1, 1e-60]), ValueError, "be positive and finite"),
    "odds too few": (lambda: ClassMix(3, class_weights=[1, 2]), ValueError, r"shape \(C,\) = \(3,\), got \(2,\)"),
    "odds too many": (lambda: ClassMix(2, class_weights=ODDS), ValueError, "none for ignored pixels"),
    "odds no numbers": (lambda: ClassMix(2, class_weights="ab"), TypeError, "`class_weights` must be a sequence of"),
    "odds drawn of 0": (lambda: F.sample_classes(LABELS, 3, class_weights=0 * ODDS), ValueError, "be positive"),
    "odds drawn integer": (lambda: F.sample_classes(LABELS, 3, class_weights=ODDS.int()), TypeError, "be floating"),
    "odds drawn list": (lambda: F.sample_classes(LABELS, 2, class_weights=[1, 2]), TypeError, "must be a torch.Tensor"),
    "odds drawn shape": (lambda: F.sample_classes(LABELS, 2, class_weights=ODDS), ValueError, r"got \(3,\)"),
    "odds' device": (lambda: F.sample_classes(LABELS, 3, class_weights=ODDS.to(META)),
        ValueError, "`class_weights` is on meta but `labels` is on cpu"),
    "odds and masks": (lambda: ClassMix(3, class_weights=ODDS, masks=BoxMasks()), ValueError, "must not both be given"),
    "masks class": (lambda: ClassMix(2, masks=BoxMasks), TypeError, r"got the class BoxMasks; build `BoxMasks\(\)`"),
    "masks mask": (lambda: ClassMix(2, masks=MASK), TypeError, r"got Tensor; build .* `forward\(mask=...\)`"),
    "masks function": (lambda: ClassMix(2, masks=lambda s, n: s), TypeError, r"must have `sample\(n, size\)` and be"),
    "masks' result": (lambda: CrossDomainMix(3, masks=BoxMasks())(IMAGES, LABELS, IMAGES, LABELS, scores=SCORES[:1]),
        ValueError, r"`masks\(scores, size\)` must have shape \(N, H, W\) = \(2, 4, 5\), got \(1, 4, 5\)"),
    "mask's type": (lambda: mixed(mask=LABELS), TypeError, "`mask` must be bool, got torch.int64"),
    "mask of a list": (lambda: mixed(mask=[True]), TypeError, "`mask` must be a torch.Tensor"),
    "mask's size": (lambda: mixed(mask=MASK[1:]), ValueError, "`mask` must have shape"),
    "mask's dimensions": (lambda: mixed(mask=IMAGES > 0), ValueError, "without a channel dimension"),
    "given mask's device": (lambda: mixed(mask=MASK.to(META)), ValueError, "`mask` is on meta"),
    "mask and scores": (lambda: mixed(mask=MASK, scores=torch.rand(2, 4)),
        ValueError, "`scores` and `mask` must not both be given"),
    "channels": (lambda: mixed(target_images=IMAGES[:, :1]),
        ValueError, r"`target_images` \(2, 1, 4, 5\) and `source_images`"),
    "classes of masks": (lambda: ClassMix(3, masks=BoxMasks())(IMAGES, LABELS, classes=CLASSES),
        ValueError, "`classes` must be None, since this mix uses `masks`"),
    "sample of masks": (lambda: ClassMix(3, masks=BoxMasks()).sample(LABELS),
        ValueError, "`sample` draws classes, but this mix uses `masks`"),
}  # fmt: skip

SCORES, SIGMAS, GRID, LARGE = torch.rand(2, 4), torch.tensor([1.0, 2.0]), torch.rand(2, 3, 4), torch.rand(2, 3, 9, 14)
MASKS: Cases = {
    "scores": (lambda: F.box_mask([0.1], (4, 4)), TypeError, "`scores` must be a torch.Tensor, got list"),
    "integers": (lambda: F.box_mask(SCORES.long(), (4, 4)), TypeError, "`scores` must be floating, got torch.int64"),
    "columns": (lambda: F.box_mask(SCORES[:, :3], (4, 4)), ValueError, r"shape \(N, 4\), got \(2, 3\)"),
    "area": (lambda: F.box_mask(SCORES, (4, 4), area=(0.5, 0.4)), ValueError, "`area` must be .* got"),
    "area nan": (lambda: F.box_mask(SCORES, (4, 4), area=(0.1, math.nan)), ValueError, "`area` must be .* got"),
    "area of words": (lambda: F.box_mask(SCORES, (4, 4), area=("a", "b")), TypeError, "`area` must be two numbers"),
    "aspect": (lambda: F.box_mask(SCORES, (4, 4), aspect=(0, 1)), ValueError, "`aspect` must be .* 0 < low"),
    "three sides": (lambda: F.box_mask(SCORES, (4, 4, 1)), TypeError, r"\(height, width\), ints in pixels"),
    "float size": (lambda: F.block_mask(GRID, (4.0, 4), 4), TypeError, r"\(height, width\), ints in pixels"),
    "empty size": (lambda: F.box_mask(SCORES, (0, 4)), ValueError, "`size` must be positive"),
    "noise": (lambda: F.cow_mask(LOGITS, sigma=1.0), ValueError, r"`noise` must have shape \(N, H, W\)"),
    "ratio": (lambda: F.cow_mask(MAP, sigma=1.0, ratio=1.5), ValueError, r"`ratio` must lie in \[0, 1\]"),
    "sigma": (lambda: F.cow_mask(MAP, sigma=0.0), ValueError, "`sigma` must be positive"),
    "one sigma": (lambda: F.cow_mask(MAP, sigma=SIGMAS - 1), ValueError, r"be positive and finite, got \[0.0, 1.0\]"),
    "sigmas": (lambda: F.cow_mask(MAP, sigma=SIGMAS[:1]), ValueError, r"\(N,\) = \(2,\), got \(1,\)"),
    "sigma's type": (lambda: F.cow_mask(MAP, sigma="wide"), TypeError, "a number or a tensor, got str"),
    "sigma's dtype": (lambda: F.cow_mask(MAP, sigma=SIGMAS.long()), TypeError, "`sigma` must be floating"),
    "sigma's device": (lambda: F.cow_mask(MAP, sigma=SIGMAS.to(META)), ValueError, "`sigma` is on meta"),
    "block": (lambda: F.block_mask(GRID, (9, 14), 0), ValueError, "`block` must be at least 1"),
    "block's type": (lambda: F.block_mask(GRID, (9, 14), 4.0), TypeError, "`block` must be an int, got float"),
    "grid": (lambda: F.block_mask(GRID, (9, 14), 5), ValueError, r"= \(N, 2, 3\), got \(2, 3, 4\)"),
    "box's range": (lambda: BoxMasks(area=(0.5, 0.4)), ValueError, "`area` must be .* got"),
    "box's pair": (lambda: BoxMasks(aspect=2.0), TypeError, r"`aspect` must be two numbers \(low, high\), got 2.0"),
    "box's draw": (lambda: BoxMasks()(SCORES[:, :3], (4, 4)), ValueError, r"shape \(N, 4\), got \(2, 3\)"),
    "cow's sigma": (lambda: CowMasks(sigma=0.0), ValueError, "`sigma` must be .* 0 < low <= high"),
    "cow's range": (lambda: CowMasks(sigma=(32.0, 8.0)), ValueError, "`sigma` must be .* 0 < low <= high"),
    "cow's nan": (lambda: CowMasks(sigma=math.nan), ValueError, "`sigma` must be .* 0 < low <= high"),
    "cow's type": (lambda: CowMasks(sigma=("a", "b")), TypeError, "`sigma` must be two numbers"),
    "cow's bool": (lambda: CowMasks(sigma=True), TypeError, "`sigma` must be two numbers"),
    "cow's ratio": (lambda: CowMasks(ratio=2.0), ValueError, r"`ratio` must lie in \[0, 1\]"),
    "cow's draw": (lambda: CowMasks().sample(2), ValueError, "`size` must be given"),
    "cow of another size": (lambda: CowMasks(sigma=1.0)(CowMasks(sigma=1.0).sample(2, (8, 8)), (9, 9)),
        ValueError, "draw them with"),
    "cow's integers": (lambda: CowMasks()(SCORES.long(), (8, 8)), TypeError, "`scores` must be floating"),
    "hidden block": (lambda: MaskedImages(0), ValueError, "`block` must be at least 1, got 0; it is in pixels"),
    "hidden block's type": (lambda: MaskedImages(4.0), TypeError, "`block` must be an int, got float"),
    "hidden ratio": (lambda: MaskedImages(4, 1.5), ValueError, r"`ratio` must lie in \[0, 1\], got 1.5"),
    "fill": (lambda: MaskedImages(4, fill=()), ValueError, "`fill` must hold a finite number per channel, got"),
    "fill nan": (lambda: MaskedImages(4, fill=(math.nan,) * 3), ValueError, "`fill` must hold a finite number"),
    "fill's type": (lambda: MaskedImages(4, fill=0.5), TypeError, "`fill` must hold a number per channel, got 0.5"),
    "fill of words": (lambda: MaskedImages(4, fill="mean"), TypeError, "must hold a number per channel, got 'mean'"),
    "fill none": (lambda: MaskedImages(4, fill=[None]), TypeError, r"must hold a number per channel, got \[None"),
    "too large": (lambda: MaskedImages()(LARGE), ValueError, "got 64 pixels for images of 9 x 14; use a smaller one"),
    "large": (lambda: MaskedImages(10).sample(1, (9, 14)), ValueError, "got 10 pixels for images of 9 x 14"),
    "no batch": (lambda: BoxMasks().sample(-1), ValueError, "`n` must be at least 0, got -1; pass the number of"),
    "no batch to hide": (lambda: MaskedImages(4).sample(-2, (8, 8)), ValueError, "`n` must be at least 0, got -2"),
    "one side": (lambda: MaskedImages().sample(1, 64), TypeError, r"`size` must be \(height, width\), ints .* got 64"),
    "hidden channels": (lambda: MaskedImages(4)(LARGE[:, :1]), ValueError, r"have shape \(N, 3, H, W\), got \(2, 1,"),
    "bytes": (lambda: MaskedImages(4)(LARGE.byte()), TypeError, r"`images` must be floating in \[0, 1\]"),
    "hidden grid": (lambda: MaskedImages(5)(LARGE, scores=GRID), ValueError, r"= \(N, 2, 3\), got \(2, 3, 4\)"),
    "hidden batch": (lambda: MaskedImages(4)(LARGE[:1], scores=GRID), ValueError, "for 2 images but `images` holds 1"),
    "hidden device": (lambda: MaskedImages(4)(LARGE, scores=GRID.to(META)), ValueError, "`scores` is on meta but `im"),
}  # fmt: skip

MEAN, STD, AUGMENT = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), StrongAugment()
DRAW = AUGMENT.sample(2)
AUGMENTS: Cases = {
    "mean alone": (lambda: StrongAugment(mean=MEAN), ValueError, "`mean` and `std` belong together, .* and std=None"),
    "std alone": (lambda: StrongAugment(std=STD), ValueError, "`mean` and `std` belong together"),
    "mean's length": (lambda: StrongAugment(mean=MEAN[:2], std=STD), ValueError, "`mean` must hold 3 finite numbers"),
    "mean's type": (lambda: StrongAugment(mean=0.5, std=0.5), TypeError,
        "`mean` must be a sequence of 3 numbers, one per channel, got 0.5"),
    "std inf": (lambda: StrongAugment(mean=MEAN, std=(1.0, math.inf, 1.0)), ValueError, "`std` must hold 3 finite num"),
    "std 0": (lambda: StrongAugment(mean=MEAN, std=(1.0, 0.0, 1.0)), ValueError, "`std` must be positive in each chan"),
    "sigma": (lambda: StrongAugment(blur_sigma=1.0), TypeError, "`blur_sigma` must be a sequence of 2 numbers, .* 1.0"),
    "sigmas": (lambda: StrongAugment(blur_sigma=(0.1, 1, 2)), ValueError, "`blur_sigma` must hold 2 finite numbers"),
    "sigma 0": (lambda: StrongAugment(blur_sigma=(0.0, 1.0)), ValueError, "0 < low <= high"),
    "sigmas' order": (lambda: StrongAugment(blur_sigma=(2.0, 1.0)), ValueError, "0 < low <= high"),
    "brightness": (lambda: StrongAugment(brightness=-0.1), ValueError, r"`brightness` must lie in \[0, 1\]"),
    "contrast": (lambda: StrongAugment(contrast="much"), TypeError, "`contrast` must be a float"),
    "hue": (lambda: StrongAugment(hue=0.6), ValueError, r"`hue` must lie in \[0, 0.5\]"),
    "jitter_p": (lambda: StrongAugment(jitter_p=1.5), ValueError, r"`jitter_p` must lie in \[0, 1\]"),
    "blur_p": (lambda: StrongAugment(blur_p=math.nan), ValueError, r"`blur_p` must lie in \[0, 1\]"),
    "flavor": (lambda: StrongAugment(flavor="kornia"), ValueError, "`flavor` must be one of 'additive', 'torchvision'"),
    "one image": (lambda: AUGMENT(IMAGES[0]), ValueError, r"`images` must have shape \(N, 3, H, W\)"),
    "channels": (lambda: AUGMENT(IMAGES[:, :1]), ValueError, "convert them to 3 channels"),
    "bytes": (lambda: AUGMENT(IMAGES.byte()), TypeError, r"`.float\(\) / 255`"),
    "batch": (lambda: AUGMENT(IMAGES[:1], draw=DRAW), ValueError, "is for 2 images but `images` holds 1"),
    "device": (lambda: AUGMENT(IMAGES, draw=DRAW._replace(sigma=DRAW.sigma.to(META))),
        ValueError, r"`draw.sigma` is on meta but `images` is on cpu"),
    "numpy": (lambda: AUGMENT(IMAGES, draw=DRAW._replace(hue=DRAW.hue.numpy())), TypeError, "`draw.hue` must be a tor"),
}  # fmt: skip

MONITOR = PseudoLabelMonitor(3)
MONITORS: Cases = {
    "classes": (lambda: PseudoLabelMonitor(0), ValueError, "`num_classes` must be at least 1"),
    "classes' type": (lambda: PseudoLabelMonitor(3.0), TypeError, "`num_classes` must be an int"),
    "threshold": (lambda: PseudoLabelMonitor(3, threshold=1.5), ValueError, r"`threshold` must lie in \[0, 1\]"),
    "labels": (lambda: MONITOR.update(MAP, MAP), TypeError, "`labels` must be uint8.* take the argmax"),
    "labels' rank": (lambda: MONITOR.update(LABELS[0], MAP), ValueError, r"`labels` .*add the batch"),
    "confidence": (lambda: MONITOR.update(LABELS, LABELS), TypeError, "`confidence` must be floating"),
    "confidence's type": (lambda: MONITOR.update(LABELS, 0.5), TypeError, "`confidence` must be a torch.Tensor, got f"),
    "confidence's size": (lambda: MONITOR.update(LABELS, MAP[:1]), ValueError, "`confidence` .* must agree"),
    "truth": (lambda: MONITOR.update(LABELS, MAP, truth=MAP), TypeError, "`truth` must be uint8"),
    "truth's size": (lambda: MONITOR.update(LABELS, MAP, truth=LABELS.mT), ValueError, "`truth` .* must agree"),
    "student": (lambda: MONITOR.update(LABELS, MAP, student=LABELS[:, None]), ValueError, "squeeze the channel"),
    "device": (lambda: MONITOR.update(LABELS.to(META), MAP.to(META)), ValueError, "`labels` is on meta"),
    "prior's size": (lambda: MONITOR.compute([1, 2]), ValueError, r"shape \(3,\), got \(2,\); count"),
    "prior's sign": (lambda: MONITOR.compute([1, -1, 2]), ValueError, "not negative and not all zero"),
    "prior of zeros": (lambda: MONITOR.compute([0, 0, 0]), ValueError, "not negative and not all zero"),
    "prior nan": (lambda: MONITOR.compute([math.nan, 0, 1]), ValueError, "must be finite"),
    "names": (lambda: MONITOR.compute().as_dict(["a", "b"]), ValueError, "3 distinct names, got 2 among 2"),
    "names twice": (lambda: MONITOR.compute().as_dict(["a", "b", "a"]), ValueError, "got 2 among 3; name each"),
    "scores' classes": (lambda: UnsupervisedScores(0), ValueError, "`num_classes` must be at least 1"),
    "scores' classes' type": (lambda: UnsupervisedScores(3.0), TypeError, "`num_classes` must be an int"),
    "pixels": (lambda: UnsupervisedScores(3, pixels=1), ValueError, "`pixels` must be at least 2, got 1"),
    "pixels' type": (lambda: UnsupervisedScores(3, pixels=9.0), TypeError, "`pixels` must be an int, got float"),
    "temperature": (lambda: UnsupervisedScores(3, temperature=0), ValueError, "`temperature` must be positive, got 0"),
    "temperature nan": (lambda: UnsupervisedScores(3, temperature=math.nan), ValueError, "must be positive, got nan"),
    "temperature's type": (lambda: UnsupervisedScores(3, temperature="1"), TypeError, "must be a float, got str"),
    "logits' rank": (lambda: UnsupervisedScores(3).update(MAP), ValueError, r"`logits` must have shape \(N, C, H, W\)"),
    "logits": (lambda: UnsupervisedScores(3).update(LOGITS.long()), TypeError, "`logits` must be floating"),
    "logits' type": (lambda: UnsupervisedScores(3).update({"out": LOGITS}), TypeError, "a torch.Tensor, got dict"),
    "logits' classes": (lambda: UnsupervisedScores(4).update(LOGITS), ValueError, "3 classes but `num_classes` is 4"),
    "logits' device": (lambda: UnsupervisedScores(3).update(LOGITS.to(META)), ValueError, "`logits` is on meta"),
}  # fmt: skip

NETWORK = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2), "relu": nn.ReLU()})
WEIGHT = nn.Parameter(torch.ones(1))


def groups(lr: float = 0.1, *, head: Any = "head", **options: Any) -> object:
    return parameter_groups(NETWORK, lr, head=head, **options)


OPTIMIZERS: Cases = {
    "dampening": (lambda: RepeatedSGD([{"params": [WEIGHT], "dampening": 0.5}], 0.1), ValueError, "`dampening` must b"),
    "two groups": (lambda: RepeatedSGD([{"params": [WEIGHT]}, {"params": [WEIGHT]}], 0.1),
        ValueError, "more than one parameter group"),
    "rate": (lambda: RepeatedSGD([WEIGHT], -1.0), ValueError, "learning rate"),
    "nesterov": (lambda: RepeatedSGD([WEIGHT], 0.1, nesterov=True), ValueError, "Nesterov"),
    "no such head": (lambda: parameter_groups(NETWORK, 0.1), ValueError,
        "`head` must name a submodule of the model, got 'layer5'; it has body, head, relu"),
    "no head": (lambda: groups(head=""), ValueError, "`head` must name a submodule"),
    "idle head": (lambda: groups(head="relu"), ValueError,
        "`head` must have parameters, all of them the model's, got 'relu' with 0"),
    "another's head": (lambda: groups(head=nn.Linear(2, 2)), ValueError,
        "all of them the model's, got a Linear with 2; pass a part of this model"),
    "heads' type": (lambda: groups(head=[3]), TypeError, "a name, a module, several of them or None, got int"),
    "head's type": (lambda: groups(head=3), TypeError, "a name, a module, several of them or None, got int"),
    "wrapper as a head": (lambda: parameter_groups(nn.DataParallel(NETWORK), 0.1, head="module"),
        ValueError, "`head` must name a submodule of the model, got 'module'; it has body"),
    "negative rate": (lambda: groups(-0.1), ValueError, "`lr` must be finite and not negative, got -0.1; start"),
    "rate nan": (lambda: groups(math.nan), ValueError, "`lr` must be finite and not negative"),
    "factor": (lambda: groups(head_factor=-1.0), ValueError,
        "`head_factor` must be finite and not negative, got -1.0; 1 trains the head like the backbone"),
    "factor inf": (lambda: groups(head_factor=math.inf), ValueError, "`head_factor` must be finite and not negative"),
    "network": (lambda: parameter_groups([WEIGHT], 0.1), TypeError, r"`network` must be an nn\.Module, got list"),
    "decay": (lambda: groups(no_decay=["norms"]), ValueError, "must be of 'norm', 'bias' and 'position', got 'norms'"),
    "decay's type": (lambda: groups(no_decay=None), TypeError, "must hold 'norm', 'bias' or 'position', got None"),
    "step": (lambda: poly_lr(11, 10, 1.0), ValueError, r"`step` must lie in 0..steps = 10, got 11"),
    "steps": (lambda: poly_lr(0, 0, 1.0), ValueError, "`steps` must be at least 1, got 0; pass the length of the run"),
    "lr below 0": (lambda: poly_lr(0, 10, -1.0), ValueError, "`lr` must be finite and at least 0, got -1.0; start"),
    "warmup": (lambda: poly_lr(0, 10, 1.0, warmup=-1), ValueError, "`warmup` must be at least 0 steps, got -1"),
    "power": (lambda: poly_lr(10, 10, 1.0, power=-1), ValueError, "`power` must be finite and at least 0, got -1"),
    "warmup's ratio": (lambda: poly_lr(0, 10, 1.0, warmup=1, warmup_ratio=2),
        ValueError, r"`warmup_ratio` must lie in \[0, 1\], got 2"),
}  # fmt: skip

ALL = {"mixing": MIXING, "masks": MASKS, "augment": AUGMENTS, "monitors": MONITORS, "optim": OPTIMIZERS,
       "several": CASES, "self-training": PARTS}  # fmt: skip
MISTAKES = {f"{room}: {name}": case for room, cases in ALL.items() for name, case in cases.items()}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
    assert MONITOR.compute().pixels == 0  # what is refused leaves no trace
