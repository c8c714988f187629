"""Reference networks, and their weights."""

from crossmix.models.deeplab_v2 import DeepLabV2, deeplab_v2_resnet101, deeplab_v2_tiny

__all__ = ["DeepLabV2", "deeplab_v2_resnet101", "deeplab_v2_tiny"]
