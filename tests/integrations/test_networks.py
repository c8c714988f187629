"""Networks of other packages, with random weights, in a step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from checks import needed
from crossmix import MeanTeacher, recipes
from crossmix.evaluation import evaluate
from crossmix.integrations import semantic_logits
from oracles import seeded

C, SIZE = 19, (64, 64)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages, of each other
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def segformer() -> nn.Module:
    t = needed("transformers")
    sizes = {"hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16, "num_attention_heads": [1, 1, 2, 4]}
    return t.SegformerForSemanticSegmentation(t.SegformerConfig(num_labels=C, depths=[1] * 4, **sizes))


def upernet() -> nn.Module:
    t = needed("transformers")
    backbone = t.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=STAGES)
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 24, "auxiliary_channels": 8}
    return t.UperNetForSemanticSegmentation(t.UperNetConfig(backbone_config=backbone, num_labels=C, **sizes))


def mask2former() -> nn.Module:
    t = needed("transformers")
    backbone = t.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES)
    config = t.Mask2FormerConfig(
        backbone_config=backbone, num_labels=C, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32, num_queries=20,
    )  # fmt: skip
    return t.Mask2FormerForUniversalSegmentation(config)


def unet() -> nn.Module:
    return needed("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None, classes=C)


def smp_segformer() -> nn.Module:
    return needed("segmentation_models_pytorch").Segformer("mit_b0", encoder_weights=None, classes=C)


def lraspp() -> nn.Module:
    models = needed("torchvision.models.segmentation")
    return models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=C)


QUARTER = {"logits": lambda out: out.logits, "upsample": True, "align_corners": False}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "SegFormer": (segformer, QUARTER),
    "UPerNet": (upernet, {"logits": lambda out: out.logits}),
    "Mask2Former": (mask2former, {**QUARTER, "logits": semantic_logits}),
    "smp Unet": (unet, {}),
    "smp SegFormer": (smp_segformer, {}),
    "torchvision LRASPP": (lraspp, {"logits": lambda out: out["out"]}),
}


def data() -> tuple[Tensor, Tensor, Tensor]:
    source, target = torch.rand(2, 2, 3, *SIZE, generator=seeded(0))
    return source, torch.randint(0, C, (2, *SIZE), generator=seeded(1)), target


class FullSize(nn.Module):
    """What a user would write by hand: logits as a tensor, of the images' size."""

    def __init__(self, network: nn.Module, logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.logits = network, logits

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits(self.network(images)).float()
        return functional.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_step__trains_and_is_the_wrapped_network(name: str) -> None:
    torch.manual_seed(0)
    build, options = NETWORKS[name]
    network, (source, labels, target) = build().eval(), data()  # without dropout, to compare
    training = recipes.self_training(network, C, mode="eval", **options)
    draw = training.sample(2, SIZE, generator=seeded(2))
    output = training(source, labels, target, draw=draw)

    wrapped = FullSize(network, options.get("logits", lambda out: out))
    by_hand = recipes.self_training(wrapped, C, mode="eval").eval()(source, labels, target, draw=draw)
    torch.testing.assert_close(output.loss, by_hand.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.confidence, by_hand.confidence, rtol=1e-4, atol=1e-5)

    training.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = {name: value.clone() for name, value in training.teacher.module.named_parameters()}
    training(source, labels, target).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    optimizer.step()
    training.update()
    moved = [not torch.equal(value, before[name]) for name, value in training.teacher.module.named_parameters()]
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluate__takes_the_same_arguments(name: str) -> None:
    build, options = NETWORKS[name]
    source, labels, _ = data()
    options = {key: value for key, value in options.items() if key != "upsample"}
    matrix = evaluate(build(), [(source, labels)], num_classes=C, **options)["native"]
    assert int(matrix.counts.sum()) == labels.numel()


def test_teacher__hint_for_segformer_works() -> None:
    teacher, images = MeanTeacher(segformer()), data()[2]
    with pytest.raises(TypeError, match=r"crossmix.functional.pseudo_label\(output.logits\).*upsampled"):
        teacher.pseudo_label(images)
    assert teacher(images).logits.shape == (2, C, 16, 16)


def test_mask2former__logits_are_the_log_of_what_the_processor_sums() -> None:
    network, images = mask2former().eval(), data()[2]
    with torch.no_grad():
        output = network(images)
    classes, masks = output.class_queries_logits.softmax(-1)[..., :-1], output.masks_queries_logits.sigmoid()
    scores = torch.stack(
        [sum(c[:, None, None] * m for c, m in zip(*pair, strict=True)) for pair in zip(classes, masks, strict=True)]
    )
    torch.testing.assert_close(semantic_logits(output).exp(), scores, rtol=1e-4, atol=1e-6)
