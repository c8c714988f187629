"""What holds for every function and every module alike."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from checks import Inputs, Op, check_module, check_op, leaves
from crossmix import ClassMix, ConfidenceWeightedCE, CrossDomainMix, DistributionAlignment, MeanTeacher
from crossmix import functional as F
from oracles import seeded

N, C, H, W = 3, 6, 5, 9
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = seeded(0)
    labels = torch.randint(0, C, (2, N, H, W), generator=g)
    labels[0, 0, :2] = 255
    labels[1, 1] = -7
    return {
        "labels": labels[0].to(torch.uint8),
        "other_labels": labels[1],
        "images": torch.rand(N, 3, H, W, generator=g).to(dtype),
        "other_images": torch.rand(N, 3, H, W, generator=g).to(dtype),
        "logits": (torch.randn(N, C, H, W, generator=g) * 4).to(dtype),
        "probs": torch.randn(N, C, H, W, generator=g).softmax(1).to(dtype),
        "confidence": torch.rand(N, H, W, generator=g).to(dtype),
        "weights": torch.rand(N, H, W, generator=g).to(dtype),
        "mask": torch.rand(N, H, W, generator=g) < 0.5,
        "scores": torch.rand(N, C + 1, generator=g),
        "classes": torch.rand(N, C + 1, generator=g) < 0.5,
        "prior": torch.rand(C, generator=g).softmax(0).to(dtype),
        "running": torch.rand(C, generator=g).softmax(0).to(dtype),
    }


# What is called; its inputs in the order of the arguments; whether image i of the output comes from image i alone.
OPS: dict[str, tuple[Op, tuple[str, ...], bool]] = {
    "sample_classes": (lambda labels, scores: F.sample_classes(labels, C, scores=scores), ("labels", "scores"), True),
    "sample_classes of 40": (
        lambda labels, scores: F.sample_classes(labels, 40, scores=scores.repeat(1, 6)[:, :41], include_ignored=True),
        ("labels", "scores"), True),
    "class_mask": (F.class_mask, ("labels", "classes"), True),
    "class_mask of 41": (
        lambda labels, classes: F.class_mask(labels, classes.repeat(1, 6)), ("other_labels", "classes"), True),
    "mix": (F.mix, ("images", "other_images", "mask"), True),
    "pseudo_label": (F.pseudo_label, ("logits",), True),
    "pseudo_label_from_probs": (F.pseudo_label_from_probs, ("probs",), True),
    **{f"confidence_weight {scope}": (partial(F.confidence_weight, scope=scope), ("confidence",), scope != "batch")
       for scope in ("image", "pixel", "none", "batch")},
    "weighted_cross_entropy none": (
        partial(F.weighted_cross_entropy, reduction="none"), ("logits", "labels", "weights"), True),
    "weighted_cross_entropy": (F.weighted_cross_entropy, ("logits", "other_labels", "weights"), False),
    "upsampled_cross_entropy": (
        lambda logits, labels: F.upsampled_cross_entropy(logits[..., :3, :4], labels, reduction="none"),
        ("logits", "labels"), True),
    "upsampled_cross_entropy mean": (
        lambda logits, labels, weights: F.upsampled_cross_entropy(logits[..., :3, :4], labels, weights),
        ("logits", "other_labels", "weights"), False),
    "align_distribution": (F.align_distribution, ("probs", "prior", "running"), True),
    "DistributionAlignment": (DistributionAlignment(C, prior=range(1, C + 1)), ("probs",), True),
    "CrossDomainMix": (
        lambda *batch: tuple(CrossDomainMix(C)(*batch[:-1], scores=batch[-1])),
        ("images", "labels", "other_images", "other_labels", "weights", "scores"), True),
    "ClassMix": (
        lambda *batch: tuple(ClassMix(C)(*batch[:-1], scores=batch[-1])),
        ("images", "labels", "weights", "scores"), False),
}  # fmt: skip
GENEROUS = (  # at least float32 whatever comes in
    "pseudo_label", "confidence_weight", "weighted_cross_entropy", "upsampled_cross_entropy", "align_distribution",
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, dtype: torch.dtype) -> None:
    op, order, per_image = OPS[name]
    values = tensors(dtype)
    # By position, under the name of the argument: one call with keywords would tie the list to every signature.
    inputs: Inputs = {argument: values[argument] for argument in order}
    by_name: Op = lambda **given: op(*(given[argument] for argument in order))  # noqa: E731
    check_op(by_name, inputs, per_image=per_image, whole=("prior", "running"))
    outputs = leaves(op(*inputs.values()))
    if name.startswith(GENEROUS):
        assert outputs[-1].dtype == torch.promote_types(torch.float32, dtype)
    if {"logits", "probs"} & {*order}:  # half precision is computed in float32
        wide = torch.promote_types(torch.float32, dtype)
        in_wide = leaves(op(*(v.to(wide) if v.is_floating_point() else v for v in inputs.values())))
        for a, b in zip(outputs, in_wide, strict=True):
            assert torch.equal(a, b.to(a.dtype))


MODULES: dict[str, tuple[nn.Module, Callable[..., object], dict[str, object]]] = {
    "ClassMix": (
        ClassMix(C, ratio=0.25),
        lambda m, x: tuple(m(x["images"], x["labels"], scores=x["scores"])),
        {"num_classes": C, "ratio": 0.25, "ignore_index": 255, "include_ignored": False}),
    "ConfidenceWeightedCE": (
        ConfidenceWeightedCE(0.5, scope="pixel", normalizer="weights"),
        lambda m, x: m(x["logits"], x["labels"], m.weights(x["confidence"])),
        {"threshold": 0.5, "scope": "pixel", "normalizer": "weights", "label_smoothing": 0.0, "sync": False}),
    "DistributionAlignment": (
        DistributionAlignment(C, momentum=0.75),
        lambda m, x: m(x["probs"]),
        {"num_classes": C, "prior": None, "momentum": 0.75, "sync": False}),
    "MeanTeacher": (
        MeanTeacher(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)), decay=0.5, mode="train"),
        lambda m, x: m(x["images"]),
        {"decay": 0.5, "warmup": True, "buffers": "copy", "mode": "train"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module, call, shown = MODULES[name]
    values = tensors()
    if isinstance(module, DistributionAlignment):
        module.update(values["probs"])
        module.update_prior(values["labels"])
    check_module(module, lambda m: call(m, values), shown)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generators__draw_on_their_own_device(device: str) -> None:
    labels = tensors()["labels"].to(device)
    mixer = CrossDomainMix(C)
    state = torch.get_rng_state()
    for place in {device, "cpu"}:
        one, two = (mixer.sample(labels, generator=torch.Generator(place).manual_seed(4)) for _ in range(2))
        assert one.device == labels.device
        assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_classes", [2, 33])
def test_sample_classes__sees_a_single_pixel_wherever_it_is(num_classes: int) -> None:
    for width in (1, 2, 31, 32, 33, 64, 65, 97, 127, 130):
        labels = torch.eye(width, dtype=torch.uint8)[:, None]  # image i: class 1 in pixel i alone
        scores = torch.ones(width, num_classes + 1)
        scores[:, 1] = 0.0
        got = F.sample_classes(labels, num_classes, scores=scores)
        assert got[:, 1].all()
        assert got.sum() == width  # one of two, and class 1 comes first
