"""SYNTHIA-RAND-CITYSCAPES: 9,400 rendered street scenes with the classes of Cityscapes.

Ros et al., CVPR 2016, https://synthia-dataset.net
"""

from pathlib import Path

from crossmix.datasets._arguments import check_size
from crossmix.datasets._folder_dataset import FolderDataset, find, label_maps, paired
from crossmix.datasets._labels import SYNTHIA_IDS
from crossmix.datasets._listing import is_folder

__all__ = ["Synthia"]

LABEL_FOLDERS = ("GT/LABELS", "synthia_mapped_to_cityscapes")
LAYOUT = "expected <root>/RGB/*.png and <root>/GT/LABELS/*.png with the same names"


class Synthia(FolderDataset):
    """Read SYNTHIA-RAND-CITYSCAPES as unpacked from its archive: `RGB/*.png` and `GT/LABELS/*.png`, in sorted order.

    The label files are 16-bit RGB with the class in the first channel; programs that keep only the high byte of each
    value read zeros. One-channel files of the same ids in 8 or 16 bits, `synthia_mapped_to_cityscapes`, are read too.
    Files `*_labelTrainIds`, which DAFormer's converter writes beside them, are left out.
    The ids of void, parking, road work and lane marking are ignored, and so are terrain, truck and train, which this
    part of SYNTHIA lacks.

    Args:
        root: The folder that contains `RGB` and `GT/LABELS` (or `synthia_mapped_to_cityscapes`).
        size: (height, width) that images (bicubic, antialiased) and labels (nearest) are resized to. None keeps the
            published 760 x 1280.
        names: A text file that lists the images to use, one name per line, with or without folders and extension.
        images: Whether to read images. Without, `image` is empty, (3, 0, 0); useful for counting classes.
        labels: Whether to read label maps. Without, `label` is None, and the files may be missing.

    Raises:
        DataError: If a folder is missing or empty, an image has no label map, a label map has no image and there is no
            list of `names`, or that lists missing files; on access, if a file is damaged, was saved from the high
            bytes, or contains ids that are not SYNTHIA's.
        TypeError: If `size` is not a pair of ints.
        ValueError: If `size` is not positive, or neither images nor labels are read.

    Example:
        >>> import tempfile, torch
        >>> from crossmix.datasets import write_png
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder, pixels in (("RGB", torch.zeros(3, 4, 6)), ("GT/LABELS", torch.full((4, 6), 3.0))):
        ...     (root / folder).mkdir(parents=True)
        ...     write_png(root / folder / "0000000.png", pixels.byte())
        >>> Synthia(root)[0].label.unique()
        tensor([0], dtype=torch.uint8)
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: tuple[int, int] | None = None,
        names: str | Path | None = None,
        images: bool = True,
        labels: bool = True,
    ) -> None:
        size = check_size(size)
        self.root: Path = Path(root)
        of_images = find(self.root / "RGB") if images else None
        of_labels = label_maps(labels_in(self.root)) if labels else None
        expected = (self.root, "SYNTHIA")
        files = paired(f"{self.root}:", of_images, of_labels, LAYOUT, names=names, strict=names is None, root=expected)
        super().__init__(files, SYNTHIA_IDS, size, "bicubic")


def labels_in(root: Path) -> Path:
    """The folder of the label maps."""
    return next((root / name for name in LABEL_FOLDERS if is_folder(root / name)), root / LABEL_FOLDERS[0])
