"""Reference networks and their weights."""

from crossmix.models.deeplab_v2 import DeepLabV2, deeplab_v2_resnet101, deeplab_v2_tiny
from crossmix.models.weight_files import WeightsError
from crossmix.models.weights import LoadReport, load_weights, save_weights

__all__ = [
    "DeepLabV2",
    "LoadReport",
    "WeightsError",
    "deeplab_v2_resnet101",
    "deeplab_v2_tiny",
    "load_weights",
    "save_weights",
]
