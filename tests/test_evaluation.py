"""The confusion matrix, evaluation and pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from crossmix.datasets import Sample
from crossmix.datasets.classes import PALETTE
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from crossmix.models import deeplab_v2_tiny
from crossmix.visualize import colorize, gallery
from oracles import seeded


def samples(sizes: list[tuple[int, int]]) -> list[Sample]:
    out = []
    for i, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), generator=seeded(i), dtype=torch.uint8)
        label = torch.randint(0, 5, (height, width), generator=seeded(i + 9), dtype=torch.uint8)
        label[0] = 255
        out.append(Sample(image, label, f"s{i}"))
    return out


def test_evaluate__equals_the_steps_by_hand() -> None:
    torch.manual_seed(0)
    model = deeplab_v2_tiny(5).train()
    data = samples([(32, 48), (40, 64), (33, 47)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    matrices = evaluate(
        model, data, num_classes=5, image_size=(32, 64), label_sizes=[None, (16, 32)], forward=model.forward_features
    )
    assert list(matrices) == ["native", "16x32"]
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.eval()
    want = [ConfusionMatrix(5), ConfusionMatrix(5)]
    with torch.no_grad():
        for image, label, _ in data:
            small = tf.interpolate(image[None], size=(32, 64), mode="bilinear", antialias=True).float() / 255
            logits = model.forward_features(small)
            for matrix, size in zip(want, (label.shape, (16, 32)), strict=True):
                target = tf.interpolate(label[None, None].double(), size=size, mode="nearest-exact")[0].long()
                up = tf.interpolate(logits, size=size, mode="bilinear", align_corners=True)
                matrix.update(up.argmax(1), target)
    for matrix, other in zip(matrices.values(), want, strict=True):
        assert torch.equal(matrix.counts, other.counts)


def test_evaluate__workers_and_precision() -> None:
    torch.manual_seed(0)
    model, data = nn.Conv2d(3, 5, 1), samples([(8, 12), (9, 7), (5, 5)])
    state = torch.get_rng_state()
    alone, ahead = evaluate(model, data, num_classes=5), evaluate(model, data, num_classes=5, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(alone["native"].counts, ahead["native"].counts)

    def forward(images: Tensor) -> Tensor:
        logits = model(images)
        assert logits.dtype == torch.bfloat16
        return logits

    half = evaluate(model, data, num_classes=5, dtype=torch.bfloat16, forward=forward)
    with torch.no_grad():
        want = ConfusionMatrix(5)
        for image, label, _ in data:
            logits = (image[None] / 255).bfloat16()
            logits = tf.conv2d(logits, model.weight.bfloat16(), model.bias.bfloat16())
            want.update(logits.argmax(1), label[None])
    assert torch.equal(half["native"].counts, want.counts)
    for options in ({"workers": 1}, {"sync": True}):
        with pytest.raises(TypeError, match="need a data set with a length, got list_iterator"):
            evaluate(model, iter(data), num_classes=5, **options)


RANKS = """
import sys, torch
import torch.distributed as dist
from torch import nn
from crossmix.datasets import StreetScenes
from crossmix.evaluation import evaluate
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
torch.manual_seed(0)
model = nn.Conv2d(3, 19, 3, padding=1)
scenes = [StreetScenes(5)[i] for i in range(5)]
matrices = evaluate(model, scenes, label_sizes=[None, (32, 64)], sync=True)
assert int(matrices["native"].counts.sum()) <= 64 * 128 * len(range(rank, 5, size))  # its own share
scores = [matrix.compute() for matrix in matrices.values()]
print([(score.per_class.tolist(), score.mean, score.pixel_accuracy) for score in scores])
few = evaluate(model, scenes[:1], sync=True)  # some ranks have none
print(few["native"].compute().per_class.tolist())
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_evaluate__ranks_share_the_samples_and_agree_exactly(tmp_path: Path) -> None:
    outputs = set()
    for size in (1, 2, 3):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANKS, str(rank), str(size), str(tmp_path / f"store{size}")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        for process in processes:
            output, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            outputs.add(output)
    assert len(outputs) == 1


class Perfect(nn.Module):
    """Reads the class off the red channel."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return tf.one_hot((images[:, 0] * 255).round().long(), 5).permute(0, 3, 1, 2).float()


def test_evaluate__a_perfect_model_and_mixed_modes() -> None:
    label = torch.randint(0, 5, (6, 8), dtype=torch.uint8)
    model = Perfect()
    data = [Sample(label.expand(3, 6, 8), label, "a")]
    assert evaluate(model, iter(data), num_classes=5)["native"].compute().mean == 1.0
    assert model.modes == [False]
    assert model.training
    assert not model.frozen.training  # every submodule's own mode is put back


def test_evaluate__refuses() -> None:
    model = nn.Conv2d(3, 5, 1)
    with pytest.raises(ValueError, match="a: has no label to score against"):
        evaluate(model, [Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), None, "a")], num_classes=5)
    assert model.training
    with pytest.raises(ValueError, match="returned 5 classes but `num_classes` is 19"):
        evaluate(model, samples([(4, 4)]))
    with pytest.raises(ValueError, match="`samples` must not be empty"):
        evaluate(model, [], num_classes=5)


def test_colorize_and_gallery() -> None:
    labels = torch.tensor([[0, 18, 255], [-1, 19, 5]])
    colors = colorize(labels)
    assert colors[:, 0, 1].tolist() == list(PALETTE[18])
    assert colors[:, 1, 2].tolist() == list(PALETTE[5])
    assert not colors[:, 0, 2].any()
    assert not colors[:, 1, :2].any()
    sheet = gallery([[colors, torch.ones(3, 2, 3)], [torch.full((3, 2, 3), 0.5), colors]], gap=1)
    assert sheet.shape == (3, 7, 9)
    assert torch.equal(sheet[:, 1:3, 1:4], colors)
    assert torch.equal(sheet[:, 4:6, 5:8], colors)
    assert sheet[:, 4:6, 1:4].unique().tolist() == [128]
    assert sheet[:, 0].unique().tolist() == [255]
    with pytest.raises(ValueError, match="equally many pictures of one size"):
        gallery([[colors], [colors, colors]])
    with pytest.raises(ValueError, match="equally many pictures of one size"):
        gallery([])
    with pytest.raises(ValueError, match=r"shape \(H, W\)"):
        colorize(colors)
