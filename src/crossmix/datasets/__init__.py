"""Data set readers that map label ids to Cityscapes train ids and report invalid files by name.

Modules: `_listing` decides which files are images, `_folder_dataset` pairs them with label maps and builds samples,
`_images` and `_png` decode files, `_labels` maps label ids (with the table in `classes`, or a user's own, read by
`_class_file`), `cache` stores samples on disk, `statistics` counts classes, and `_check` validates folders.
"""

from crossmix.datasets._class_file import Classes, read_classes
from crossmix.datasets._images import image_size, read_image
from crossmix.datasets._listing import ImageFiles, image_files
from crossmix.datasets._png import write_png
from crossmix.datasets.cache import CachedSamples
from crossmix.datasets.cityscapes import Cityscapes
from crossmix.datasets.gta5 import GTA5
from crossmix.datasets.sample import DataError, Sample
from crossmix.datasets.sampling import RareClassSampler
from crossmix.datasets.segmentation_folder import SegmentationFolder
from crossmix.datasets.statistics import class_counts
from crossmix.datasets.street_scenes import StreetScenes
from crossmix.datasets.synthia import Synthia

__all__ = [
    "GTA5",
    "CachedSamples",
    "Cityscapes",
    "Classes",
    "DataError",
    "ImageFiles",
    "RareClassSampler",
    "Sample",
    "SegmentationFolder",
    "StreetScenes",
    "Synthia",
    "class_counts",
    "image_files",
    "image_size",
    "read_classes",
    "read_image",
    "write_png",
]
