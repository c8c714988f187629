"""The public names, frozen; and each of them documented with an example that runs."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

PUBLIC = {
    "crossmix": [
        "ClassMix", "ConfidenceWeightedCE", "CrossDomainMix", "DistributionAlignment", "MeanTeacher", "Mixed",
        "PseudoLabels", "SelfTraining", "SelfTrainingOutput", "StrongAugment", "functional", "recipes",
    ],
    "crossmix.functional": [
        "align_distribution", "class_mask", "confidence_weight", "ema_update_", "mix", "pseudo_label",
        "pseudo_label_from_probs", "sample_classes", "upsampled_cross_entropy", "weighted_cross_entropy",
    ],
    "crossmix.recipes": ["METHODS", "PAPER", "RELEASED", "Recipe", "self_training"],
    "crossmix.models": [
        "DeepLabV2", "LoadReport", "WeightsError", "deeplab_v2_resnet101", "deeplab_v2_tiny", "load_weights",
        "save_weights",
    ],
    "crossmix.datasets": [
        "GTA5", "CachedSamples", "Cityscapes", "DataError", "Sample", "SegmentationFolder", "StreetScenes", "Synthia",
        "class_counts", "write_png",
    ],
    "crossmix.metrics": ["ConfusionMatrix", "IoU"],
    "crossmix.evaluation": ["evaluate"],
    "crossmix.diagnostics": ["PseudoLabelMonitor", "PseudoLabelQuality"],
    "crossmix.optim": ["RepeatedSGD", "parameter_groups", "poly_lr"],
    "crossmix.visualize": ["colorize", "gallery"],
    "crossmix.engine": [
        "BusyError", "CheckpointError", "CheckpointStore", "FiniteGuard", "FolderLock", "KeyedCrops",
        "NonFiniteError", "Progress", "QuietLoader", "Report", "RunLog", "StopRequest", "keyed_generator",
        "quiet_worker", "resident",
    ],
}  # fmt: skip

SIGNATURES = {
    "crossmix.functional.sample_classes":
        "labels num_classes * ratio=0.5 ignore_index=255 include_ignored=False scores=None generator=None",
    "crossmix.functional.class_mask": "labels classes * ignore_index=255",
    "crossmix.functional.mix": "pasted base mask",
    "crossmix.functional.pseudo_label": "logits",
    "crossmix.functional.pseudo_label_from_probs": "probs",
    "crossmix.functional.confidence_weight": "confidence threshold=0.968 * scope='image'",
    "crossmix.functional.weighted_cross_entropy":
        "logits labels weights=None * ignore_index=255 normalizer='all' label_smoothing=0.0 reduction='mean'",
    "crossmix.functional.upsampled_cross_entropy":
        "logits labels weights=None * ignore_index=255 normalizer='all' label_smoothing=0.0 reduction='mean'",
    "crossmix.functional.align_distribution": "probs prior running * eps=1e-06",
    "crossmix.functional.ema_update_": "averaged current decay",
    "crossmix.ClassMix": "num_classes * ratio=0.5 ignore_index=255 include_ignored=False",
    "crossmix.CrossDomainMix": "num_classes * ratio=0.5 ignore_index=255 include_ignored=False",
    "crossmix.StrongAugment":
        "* brightness=0.25 contrast=0.25 saturation=0.25 hue=0.25 jitter_p=0.8 blur_p=0.5 blur_sigma=(0.15, 1.15) "
        "flavor='additive' same_on_batch=False",
    "crossmix.MeanTeacher": "student * decay=0.99 warmup=True buffers='copy' mode='eval'",
    "crossmix.ConfidenceWeightedCE":
        "threshold=0.968 * scope='image' ignore_index=255 normalizer='all' label_smoothing=0.0 sync=False",
    "crossmix.DistributionAlignment": "num_classes * prior=None momentum=0.999 sync=False",
    "crossmix.SelfTraining":
        "student teacher * mix augment=None criterion=None source_criterion=None align=None weigh='target' "
        "upsample=False",
    "crossmix.SelfTraining.forward":
        "self source_images source_labels target_images * target_weights=None generator=None draw=None",
    "crossmix.recipes.self_training":
        "student num_classes * method='dacs' recipe='released' prior=None sync=False upsample=False **overrides",
    "crossmix.models.deeplab_v2_resnet101": "num_classes=19 * aspp_branches=4 freeze_bn_affine=True upsample=True",
    "crossmix.metrics.ConfusionMatrix": "num_classes * ignore_index=255",
    "crossmix.diagnostics.PseudoLabelMonitor": "num_classes * threshold=0.968 ignore_index=255",
    "crossmix.diagnostics.PseudoLabelMonitor.update": "self labels confidence * truth=None student=None",
    "crossmix.diagnostics.PseudoLabelMonitor.compute": "self prior=None",
    "crossmix.diagnostics.PseudoLabelQuality.as_dict": "self class_names=None",
}  # fmt: skip


def find(path: str) -> object:
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
    assert sorted(importlib.import_module(module).__all__) == sorted(PUBLIC[module])


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


def test_reference__lists_every_public_name() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\w+", page))
    for module, names in PUBLIC.items():
        assert module in page or module == "crossmix"
        if module == "crossmix":
            assert set(names) <= listed


def run(code: str, *flags: str) -> str:
    result = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import__touches_no_global_state() -> None:
    code = """
import logging, os, random, warnings
import numpy, torch, kornia
def state():
    return (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(), torch.get_default_dtype(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), dict(os.environ),
            list(logging.getLogger().handlers), logging.getLogger().level, list(warnings.filters),
            torch.is_grad_enabled())
before = state()
import crossmix, crossmix.models, crossmix.datasets, crossmix.engine, crossmix.evaluation, crossmix.diagnostics
assert state() == before
"""
    run(code)


def test_import__warns_of_nothing_and_needs_no_asserts() -> None:
    run("import kornia, warnings; warnings.simplefilter('error'); import crossmix")
    checked = "import torch, crossmix\ntry:\n crossmix.ClassMix(0)\nexcept ValueError:\n print('refused')"
    assert run(checked, "-O").strip() == "refused"


def test_import__brings_in_little() -> None:
    code = (
        "import sys, torch, kornia, kornia.color; a = set(sys.modules); import crossmix; print(*(set(sys.modules) - a))"
    )
    new = {name for name in run(code).split() if not name.startswith(("crossmix", "torch", "kornia"))}
    assert not new, new
