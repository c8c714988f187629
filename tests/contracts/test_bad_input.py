"""Every mistake gets a sentence: what was expected, what came, what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossmix import (
    ClassMix,
    ConfidenceWeightedCE,
    CrossDomainMix,
    DistributionAlignment,
    MaskedImages,
    MeanTeacher,
    SelfTraining,
    StrongAugment,
    recipes,
)
from crossmix import functional as F
from crossmix.diagnostics import PseudoLabelMonitor
from crossmix.metrics import ConfusionMatrix

IMAGES, LABELS = torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
LOGITS, MAP = torch.rand(2, 3, 4, 5), torch.rand(2, 4, 5)
MASK, CLASSES = torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
META = torch.device("meta")
PRIOR = torch.full((3,), 1 / 3)


def mixed(**changes: Any) -> object:
    """A CrossDomainMix call with some arguments replaced."""
    names = ("source_images", "source_labels", "target_images", "target_labels")
    return CrossDomainMix(3)(**dict(zip(names, (IMAGES, LABELS, IMAGES, LABELS), strict=True)) | changes)


CASES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "images rank": (lambda: mixed(source_images=IMAGES[0]),
        ValueError, r"shape \(N, C, H, W\), got \(3, 4, 5\); add the batch"),
    "images dtype": (lambda: mixed(target_images=IMAGES.to(torch.uint8)),
        TypeError, r"floating in \[0, 1\], got torch.uint8; convert"),
    "images type": (lambda: mixed(source_images=[1]),
        TypeError, "`source_images` must be a torch.Tensor, got list; convert"),
    "labels rank": (lambda: mixed(source_labels=LABELS[:, None]),
        ValueError, r"got \(2, 1, 4, 5\); squeeze the channel dimension"),
    "labels dtype": (lambda: mixed(target_labels=MAP),
        TypeError, "must be uint8, int16, int32 or int64, got torch.float32"),
    "labels bool": (lambda: mixed(source_labels=MASK), TypeError, "got torch.bool"),
    "labels int8": (lambda: mixed(source_labels=LABELS.to(torch.int8)), TypeError, "got torch.int8"),
    "labels size": (lambda: mixed(source_labels=LABELS[:, :3]),
        ValueError, "must agree in batch size, height and width"),
    "batches do not pair": (lambda: mixed(target_images=IMAGES[:1]),
        ValueError, "`target_images` .* must agree in batch size"),
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
    "classes and scores": (lambda: mixed(classes=CLASSES, scores=torch.rand(2, 4)),
        ValueError, "must not both be given"),
    "ClassMix images dtype": (lambda: ClassMix(3)(IMAGES.to(torch.uint8), LABELS),
        TypeError, r"`images` must be floating in \[0, 1\], got torch.uint8"),
    "ClassMix labels dtype": (lambda: ClassMix(3)(IMAGES, MAP), TypeError, "`labels` must be uint8, int16, int32"),
    "ClassMix numpy": (lambda: ClassMix(3)(IMAGES.numpy(), LABELS), TypeError, "must be a torch.Tensor, got ndarray"),
    "image sizes": (lambda: mixed(target_images=IMAGES[..., :4], target_labels=LABELS[..., :4]),
        ValueError, r"`target_images` \(2, 3, 4, 4\) and `source_images` \(2, 3, 4, 5\) must agree"),
    "ClassMix labels": (lambda: ClassMix(3)(IMAGES, LABELS[:1]), ValueError, "must agree in batch size"),
    "ratio": (lambda: ClassMix(3, ratio=1.5), ValueError, r"`ratio` must lie in \[0, 1\], got 1.5"),
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
    "ClassMix ignore": (lambda: ClassMix(3, ignore_index=255.0), TypeError, "`ignore_index` must be an int, got float"),
    "sample ignore": (lambda: F.sample_classes(LABELS, 3, ignore_index="255"),
        TypeError, "`ignore_index` must be an int, got str"),
    "class mask ignore": (lambda: F.class_mask(LABELS, torch.zeros(2, 4, dtype=torch.bool), ignore_index=None),
        TypeError, "`ignore_index` must be an int, got None"),
    "matrix ignore": (lambda: ConfusionMatrix(3, ignore_index=None), TypeError, "`ignore_index` must be an int"),
    "monitor ignore": (lambda: PseudoLabelMonitor(3, ignore_index=True), TypeError, "`ignore_index` must be an int"),
    "recipe": (lambda: recipes.self_training(nn.ReLU(), 3, recipe=None), TypeError, "a name or a Recipe, got NoneType"),
    "matrix no classes": (lambda: ConfusionMatrix(3).compute([]), ValueError, r"got \[\]; pass at least one"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


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


class Criterion(ConfidenceWeightedCE):
    """Weighs as it is told."""

    def __init__(self, weights: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weights = weights


PARTS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
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
    "augment's layout": (lambda: step(augment=lambda x: x.permute(0, 2, 3, 1)),
        ValueError, "`augment` must keep the shape of images"),
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
    "draw's type": (lambda: train()(IMAGES, LABELS, IMAGES, draw=(None, None)),
        TypeError, "`draw` must be a SelfTrainingDraw, got tuple; make it with `sample`"),
    "augment's type": (lambda: step(augment=lambda x: {"image": x}),
        TypeError, r"`augment\(images\)` must be a torch.Tensor, got dict"),
    "augment's device": (lambda: step(augment=lambda x: x.to(META)), ValueError, r"`augment\(images\)` is on meta"),
    "images": (lambda: train()(255 * IMAGES, LABELS, IMAGES),
        ValueError, r"`source_images` must lie in \[0, 1\], got values from .* to .*; divide bytes by 255"),
    "target images": (lambda: train()(IMAGES, LABELS, 5 * IMAGES - 2), ValueError,
        r"`target_images` must lie in \[0, 1\], .* or give `StrongAugment` the `mean` and `std` of your loader"),
    "image sizes": (lambda: train(mix=lambda a, b, c, d, e: (c, d, e, d > 0))(IMAGES, LABELS, IMAGES[..., :4]),
        ValueError, r"`target_images` \(2, 3, 4, 4\) and `source_images` \(2, 3, 4, 5\) must agree"),
    "target's type": (lambda: train()(IMAGES, LABELS, IMAGES.numpy()), TypeError, "`target_images` must be a torch.Te"),
    "integer logits": (lambda: step(Returns(Tensor.long)),
        TypeError, "`student` must return floating logits, got torch.int64; return them before argmax"),
    "source_criterion's type": (lambda: step(source_criterion=lambda logits, labels: 1.0),
        TypeError, r"`source_criterion\(logits, labels\)` must be a torch.Tensor, got float"),
    "images dtype": (lambda: train()(IMAGES.byte(), LABELS, IMAGES), TypeError, "`source_images` must be floating"),
    "labels dtype": (lambda: train()(IMAGES, MAP, IMAGES), TypeError, "`source_labels` must be uint8, int16, int32"),
    "numpy": (lambda: train()(IMAGES.numpy(), LABELS, IMAGES), TypeError, "must be a torch.Tensor, got ndarray"),
    "num_classes type": (lambda: train(num_classes=3.0), TypeError, "`num_classes` must be an int, got float"),
    "num_classes of SelfTraining": (lambda: train(num_classes=4),
        ValueError, "`SelfTraining` has num_classes=4 but `mix` 3; use the same for both"),
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


@pytest.mark.parametrize(("call", "error", "message"), PARTS.values(), ids=PARTS)
def test_self_training__mistakes(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
