"""Readers of the field's data sets: label ids become Cityscapes train ids, and a wrong file is named."""

from crossmix.datasets._png import write_png
from crossmix.datasets.cache import CachedSamples
from crossmix.datasets.cityscapes import Cityscapes
from crossmix.datasets.gta5 import GTA5
from crossmix.datasets.sample import DataError, Sample
from crossmix.datasets.street_scenes import StreetScenes

__all__ = ["GTA5", "CachedSamples", "Cityscapes", "DataError", "Sample", "StreetScenes", "write_png"]
