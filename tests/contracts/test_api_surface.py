"""The public names, frozen; and each of them documented with an example that runs."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from checks import needed

PUBLIC = {
    "crossmix": [
        "BoxMasks", "ClassMix", "ConfidenceWeightedCE", "CowMasks", "CrossDomainMix", "DistributionAlignment",
        "MaskedImages", "MeanTeacher", "Mixed", "PseudoLabels", "SelfTraining", "SelfTrainingOutput", "StrongAugment",
        "functional", "recipes",
    ],
    "crossmix.functional": [
        "align_distribution", "block_mask", "box_mask", "class_mask", "confidence_weight", "cow_mask", "ema_update_",
        "mix", "pseudo_label", "pseudo_label_from_probs", "sample_classes", "upsampled_cross_entropy",
        "weighted_cross_entropy",
    ],
    "crossmix.recipes": ["METHODS", "MIC", "PAPER", "RELEASED", "Recipe", "self_training"],
    "crossmix.models": [
        "DeepLabV2", "LoadReport", "WeightsError", "deeplab_v2_resnet101", "deeplab_v2_tiny", "load_weights",
        "save_weights",
    ],
    "crossmix.datasets": [
        "GTA5", "CachedSamples", "Cityscapes", "Classes", "DataError", "ImageFiles", "RareClassSampler", "Sample",
        "SegmentationFolder", "StreetScenes", "Synthia", "class_counts", "image_files", "image_size", "read_classes",
        "read_image", "write_png",
    ],
    "crossmix.metrics": ["ConfusionMatrix", "IoU"],
    "crossmix.evaluation": ["evaluate", "resize_labels"],
    "crossmix.diagnostics": [
        "PseudoLabelMonitor", "PseudoLabelQuality", "UnsupervisedQuality", "UnsupervisedScores",
    ],
    "crossmix.optim": ["RepeatedSGD", "parameter_groups", "poly_lr"],
    "crossmix.visualize": ["colorize", "gallery"],
    "crossmix.integrations": ["SeededAugment", "semantic_logits"],
    "crossmix.integrations.torchmetrics": ["MeanIoU"],
    "crossmix.engine": [
        "BusyError", "CheckpointError", "CheckpointStore", "FiniteGuard", "FolderLock", "KeyedCrops",
        "NonFiniteError", "Progress", "QuietLoader", "RunLog", "StopRequest", "keyed_generator",
        "quiet_worker", "resident",
    ],
}  # fmt: skip

ADAPTERS = {"crossmix.integrations.torchmetrics": "torchmetrics"}  # and what they cannot be imported without

SIGNATURES = {
    "crossmix.functional.sample_classes":
        "labels num_classes * ratio=0.5 ignore_index=255 include_ignored=False rounding='ceil' whole_batch=False "
        "class_weights=None scores=None generator=None",
    "crossmix.functional.class_mask": "labels classes * ignore_index=255",
    "crossmix.functional.mix": "pasted base mask",
    "crossmix.functional.box_mask": "scores size * area=(0.02, 0.4) aspect=(0.3, 3.3333333333333335)",
    "crossmix.functional.cow_mask": "noise * sigma ratio=0.5",
    "crossmix.functional.block_mask": "scores size block * ratio=0.7",
    "crossmix.functional.pseudo_label": "logits",
    "crossmix.functional.pseudo_label_from_probs": "probs",
    "crossmix.functional.confidence_weight": "confidence threshold=0.968 * scope='image'",
    "crossmix.functional.weighted_cross_entropy":
        "logits labels weights=None * ignore_index=255 normalizer='all' label_smoothing=0.0 "
        "class_weights=None reduction='mean'",
    "crossmix.functional.upsampled_cross_entropy":
        "logits labels weights=None * align_corners=True ignore_index=255 normalizer='all' label_smoothing=0.0 "
        "class_weights=None reduction='mean'",
    "crossmix.functional.align_distribution": "probs prior running * eps=1e-06",
    "crossmix.functional.ema_update_": "averaged current decay",
    "crossmix.ClassMix":
        "num_classes * ratio=0.5 ignore_index=255 include_ignored=False rounding='ceil' whole_batch=False "
        "class_weights=None masks=None",
    "crossmix.ClassMix.sample_scores": "self n size=None * generator=None device=None",
    "crossmix.CrossDomainMix":
        "num_classes * ratio=0.5 ignore_index=255 include_ignored=False rounding='ceil' whole_batch=False "
        "class_weights=None masks=None",
    "crossmix.CrossDomainMix.sample_scores": "self n size=None * generator=None device=None",
    "crossmix.ClassMix.sample": "self labels * generator=None",
    "crossmix.ClassMix.forward":
        "self images labels weights=None * classes=None scores=None mask=None generator=None",
    "crossmix.CrossDomainMix.sample": "self source_labels * generator=None",
    "crossmix.CrossDomainMix.forward":
        "self source_images source_labels target_images target_labels target_weights=None * classes=None scores=None "
        "mask=None generator=None",
    "crossmix.BoxMasks": "* area=(0.02, 0.4) aspect=(0.3, 3.3333333333333335)",
    "crossmix.BoxMasks.sample": "self n size=None * generator=None device=None",
    "crossmix.CowMasks": "* sigma=(8.0, 32.0) ratio=0.5",
    "crossmix.CowMasks.sample": "self n size=None * generator=None device=None",
    "crossmix.StrongAugment":
        "* brightness=0.25 contrast=0.25 saturation=0.25 hue=0.25 jitter_p=0.8 blur_p=0.5 blur_sigma=(0.15, 1.15) "
        "flavor='torchvision' same_on_batch=False mean=None std=None",
    "crossmix.MeanTeacher": "student * decay=0.99 warmup=True buffers='copy' mode='train' network=None start=0",
    "crossmix.ConfidenceWeightedCE":
        "threshold=0.968 * scope='image' ignore_index=255 normalizer='all' label_smoothing=0.0 class_weights=None "
        "sync=False",
    "crossmix.DistributionAlignment": "num_classes * prior=None momentum=0.999 sync=False ignore_index=255",
    "crossmix.SelfTraining":
        "student teacher * mix num_classes=None augment=None criterion=None source_criterion=None align=None "
        "weigh='target' upsample=False align_corners=True logits=None consistency=None consistency_augment=None "
        "consistency_weight=1.0 consistency_running_stats=True ignore_top=0 ignore_bottom=0 mean=None std=None",
    "crossmix.SelfTraining.forward":
        "self source_images source_labels target_images * target_weights=None generator=None draw=None",
    "crossmix.SelfTraining.terms":
        "self source_images source_labels target_images * target_weights=None generator=None draw=None",
    "crossmix.SelfTraining.sample": "self n size=None * generator=None device=None",
    "crossmix.MaskedImages": "block=64 ratio=0.7 fill=(0.485, 0.456, 0.406)",
    "crossmix.MaskedImages.sample": "self n size * generator=None device=None",
    "crossmix.MaskedImages.forward": "self images * scores=None generator=None",
    "crossmix.recipes.self_training":
        "student num_classes * method='dacs' recipe='released' prior=None sync=False ignore_index=255 upsample=False "
        "align_corners=True logits=None mean=None std=None **overrides",
    "crossmix.models.deeplab_v2_resnet101": "num_classes=19 * aspp_branches=4 freeze_bn_affine=True upsample=True",
    "crossmix.datasets.RareClassSampler":
        "counts * ignore_index=255 temperature=0.01 min_pixels=3000 num_samples=None seed=0 rank=0 world_size=1",
    "crossmix.engine.KeyedCrops": "samples size * seed stream skip=0 pad=False rare=None ignore_index=None",
    "crossmix.metrics.ConfusionMatrix": "num_classes * ignore_index=255",
    "crossmix.evaluation.resize_labels": "labels size",
    "crossmix.evaluation.evaluate":
        "network data * num_classes=19 image_size=None label_sizes=(None,) window=None stride=None flip=False "
        "align_corners=True forward=None logits=None device=None dtype=None workers=0 sync=False ignore_index=255 "
        "progress=False",
    "crossmix.integrations.SeededAugment": "augment",
    "crossmix.integrations.SeededAugment.sample": "self n * generator=None device=None",
    "crossmix.integrations.SeededAugment.forward": "self images * draw=None generator=None",
    "crossmix.integrations.semantic_logits": "output",
    "crossmix.integrations.torchmetrics.MeanIoU": "num_classes * ignore_index=255 classes=None",
    "crossmix.diagnostics.PseudoLabelMonitor": "num_classes * threshold=0.968 ignore_index=255",
    "crossmix.diagnostics.PseudoLabelMonitor.update": "self labels confidence * truth=None student=None",
    "crossmix.diagnostics.PseudoLabelMonitor.compute": "self prior=None",
    "crossmix.diagnostics.PseudoLabelQuality.as_dict": "self class_names=None",
    "crossmix.diagnostics.UnsupervisedScores": "num_classes * pixels=1000 temperature=0.05",
    "crossmix.diagnostics.UnsupervisedScores.update": "self logits",
    "crossmix.diagnostics.UnsupervisedScores.compute": "self",
}  # fmt: skip


def find(path: str) -> object:
    for module, other in ADAPTERS.items():
        if path.startswith(module):
            needed(other)
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(path)


@pytest.mark.parametrize("module", PUBLIC)
def test_all__is_frozen(module: str) -> None:
    assert sorted(find(module).__all__) == sorted(PUBLIC[module])  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures__are_frozen(path: str) -> None:
    words, keyword_only = [], False
    for p in inspect.signature(find(path)).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            words.append("*")
            keyword_only = True
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        words.append(stars + (p.name if p.default is p.empty else f"{p.name}={p.default!r}"))
    assert " ".join(words) == SIGNATURES[path]


@pytest.mark.parametrize("path", [f"{module}.{name}" for module, names in PUBLIC.items() for name in names])
def test_docstrings__every_public_name_has_an_example(path: str) -> None:
    found = find(path)
    if inspect.ismodule(found) or not callable(found) or hasattr(found, "_fields"):
        return  # modules, constants and plain records
    if isinstance(found, type) and issubclass(found, Exception):
        return
    text = inspect.getdoc(found) or ""
    assert ">>>" in text or path == "crossmix.models.DeepLabV2", path
    if not isinstance(found, type):
        signature = inspect.signature(found)
        documented = set(re.findall(r"^    \**(\w+):", text, re.MULTILINE))
        assert set(signature.parameters) <= documented, path


def documented() -> dict[str, object]:
    """What the pages of the reference list, by the name under which they list it."""
    found = {}
    for page in (Path(__file__).parents[2] / "docs" / "reference").glob("*.md"):
        for module, rows in re.findall(r"currentmodule:: (\S+)\n\n.*\n.*\n\n((?: {3}\w+\n)+)", page.read_text("utf-8")):
            names = [f"{module}.{name}" for name in rows.split()]
            found |= {name: None if module in ADAPTERS else find(name) for name in names}
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_reference__documents_every_public_name(module: str) -> None:
    shown = documented()
    for name in PUBLIC[module]:
        found = find(f"{module}.{name}")
        assert inspect.ismodule(found) or f"{module}.{name}" in shown or any(found is o for o in shown.values()), name
