"""DeepLab-v2: a dilated ResNet with atrous spatial pyramid pooling that sums its branches.

DeepLab-v2: Chen et al., PAMI 2018, https://arxiv.org/abs/1606.00915. This is the variant used in domain adaptation
since AdaptSegNet, https://arxiv.org/abs/1802.10349, and for the published DACS numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from crossmix._checks import check_images, check_num_classes

__all__ = ["DeepLabV2", "deeplab_v2_resnet101", "deeplab_v2_tiny"]

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
"""Mean that the Caffe-trained weights expect to be subtracted from images in 0..255."""


class DeepLabV2(nn.Module):
    """DeepLab-v2 on a bottleneck ResNet; maps images in [0, 1] to logits. `deeplab_v2_resnet101` builds one.

    Bottlenecks have their stride on the first 1x1 convolution, the max-pooling rounds sizes up, the last two stages are
    dilated by 2 and 4 instead of strided, and the head sums 3x3 convolutions with different dilations. The network
    itself applies the preprocessing that the published weights expect (BGR, 0..255, minus the mean).

    Args:
        num_classes: The number of classes C.
        blocks: Bottlenecks in each of the four stages.
        width: Channels of the stem; stage i has 4 * width * 2^i.
        stem_stride: Stride of the first convolution; the output stride is four times that.
        dilations: Dilation of each branch of the head.
        aspp_branches: Number of branches to sum, starting with the first. The others remain parameters that get no
            gradient, as in the released code, which returns after two of four; DistributedDataParallel then needs
            `find_unused_parameters=True`.
        freeze_bn_affine: Whether BatchNorm's scale and shift get no gradient, as published. Running statistics are
            updated in either case.
        upsample: Whether `forward` returns logits at the size of the images, upsampled bilinearly with
            align_corners=True, or those of `forward_features`.

    Raises:
        ValueError: If `num_classes` or `aspp_branches` is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        blocks: Sequence[int],
        width: int,
        stem_stride: int,
        dilations: Sequence[int],
        aspp_branches: int,
        freeze_bn_affine: bool,
        upsample: bool,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.num_classes = num_classes
        self.upsample = upsample
        self.conv1: nn.Conv2d = nn.Conv2d(3, width, 7, stem_stride, 3, bias=False)
        self.bn1: nn.BatchNorm2d = nn.BatchNorm2d(width)
        self.relu: nn.ReLU = nn.ReLU(inplace=True)
        self.maxpool: nn.MaxPool2d = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        channels = width
        stages = []
        for i, (count, stride, dilation) in enumerate(zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            stages.append(_stage(channels, width * 2**i, count, stride, dilation))
            channels = _Bottleneck.expansion * width * 2**i
        self.layer1: nn.Sequential
        self.layer2: nn.Sequential
        self.layer3: nn.Sequential
        self.layer4: nn.Sequential
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.layer5: nn.Module = _Pyramid(channels, num_classes, dilations, aspp_branches)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.01)
            elif isinstance(module, nn.BatchNorm2d) and freeze_bn_affine:
                module.requires_grad_(requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Score images, (N, 3, H, W) floating, RGB in [0, 1].

        Returns:
            (N, C, H, W) logits, or those of `forward_features` if built with `upsample=False`.

        Raises:
            TypeError: If `images` is not floating.
            ValueError: If its shape is wrong.
        """
        logits = self.forward_features(images)
        if not self.upsample:
            return logits
        return functional.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=True)

    def forward_features(self, images: Tensor) -> Tensor:
        """Score `images` at the network's own resolution, (N, C, h, w): 1/8 for ResNet-101, 65 x 65 for 512 x 512."""
        check_images("images", images, channels=3)
        x = _caffe_images(images)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.layer5(x)
        return logits


def deeplab_v2_resnet101(
    num_classes: int = 19, *, aspp_branches: int = 4, freeze_bn_affine: bool = True, upsample: bool = True
) -> DeepLabV2:
    """Build the published network: ResNet-101, output stride 8, dilations 6, 12, 18 and 24 in the head.

    Parameter names and shapes are those of the released checkpoints. Weights are initialised as published, N(0, 0.01).

    Args:
        num_classes: The number of classes C.
        aspp_branches: 4, or 2 as in the released code.
        freeze_bn_affine: Whether to freeze BatchNorm's scale and shift, as published; see `DeepLabV2`.
        upsample: Whether to return logits at the size of the images.

    Raises:
        ValueError: If `num_classes` or `aspp_branches` is out of range.

    Example:
        >>> network = deeplab_v2_resnet101(19).eval()
        >>> sum(parameter.numel() for parameter in network.parameters())
        43901068
    """
    return DeepLabV2(
        num_classes,
        blocks=(3, 4, 23, 3),
        width=64,
        stem_stride=2,
        dilations=(6, 12, 18, 24),
        aspp_branches=aspp_branches,
        freeze_bn_affine=freeze_bn_affine,
        upsample=upsample,
    )


def deeplab_v2_tiny(
    num_classes: int = 19, *, aspp_branches: int = 4, freeze_bn_affine: bool = False, upsample: bool = True
) -> DeepLabV2:
    """Build a small network of the same design for laptops, tests and demos, trained from random weights.

    It has one bottleneck per stage, 3/16 of the width, output stride 8, and dilations 1, 3, 6 and 9 in the head.

    Args:
        num_classes: As in `deeplab_v2_resnet101`.
        aspp_branches: As there.
        freeze_bn_affine: As there.
        upsample: As there.

    Raises:
        ValueError: If `num_classes` or `aspp_branches` is out of range.

    Example:
        >>> deeplab_v2_tiny(19).eval()(torch.rand(1, 3, 64, 128)).shape
        torch.Size([1, 19, 64, 128])
    """
    network = DeepLabV2(
        num_classes,
        blocks=(1, 1, 1, 1),
        width=12,
        stem_stride=2,
        dilations=(1, 3, 6, 9),
        aspp_branches=aspp_branches,
        freeze_bn_affine=freeze_bn_affine,
        upsample=upsample,
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:  # the backbone; the head is initialised as published
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class _Bottleneck(nn.Module):
    """1x1 (with the stride), 3x3 (with the dilation) and 1x1 convolutions, and a projection if shapes change."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, *, project: bool) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if project
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class _Pyramid(nn.Module):
    """The head: a sum of 3x3 convolutions with different dilations."""

    def __init__(self, inputs: int, num_classes: int, dilations: Sequence[int], branches: int) -> None:
        super().__init__()
        if not 1 <= branches <= len(dilations):
            most = len(dilations)
            raise ValueError(f"`aspp_branches` must lie in 1..{most}, got {branches}; the published ones are 2 and 4.")
        self.branches = branches
        self.conv2d_list: nn.ModuleList = nn.ModuleList(
            nn.Conv2d(inputs, num_classes, 3, 1, dilation, dilation, bias=True) for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2d_list[0](x)
        for conv in self.conv2d_list[1 : self.branches]:
            out = out + conv(x)
        return out

    def extra_repr(self) -> str:
        return f"branches={self.branches}"


def _caffe_images(images: Tensor) -> Tensor:
    """Convert RGB in [0, 1] to BGR in 0..255 minus the mean. A float32 buffer would round the mean for float64."""
    blue_green_red = reversed(images.unbind(1))
    return torch.stack([channel * 255 - mean for channel, mean in zip(blue_green_red, MEAN_BGR, strict=True)], 1)


def _stage(inputs: int, planes: int, count: int, stride: int, dilation: int) -> nn.Sequential:
    """A stage of `count` bottlenecks; the first one has the stride and the projection."""
    blocks = [_Bottleneck(inputs, planes, stride, dilation, project=True)]
    outputs = planes * _Bottleneck.expansion
    blocks += [_Bottleneck(outputs, planes, 1, dilation, project=False) for _ in range(count - 1)]
    return nn.Sequential(*blocks)
