"""GTA5: 24,966 rendered street scenes.

Richter et al., ECCV 2016, https://download.visinf.tu-darmstadt.de/data/from_games
"""

from pathlib import Path

from crossmix.datasets._arguments import check_size
from crossmix.datasets._folder_dataset import FolderDataset, find, label_maps, paired
from crossmix.datasets._labels import LABEL_IDS

__all__ = ["GTA5"]

LAYOUT = "expected <root>/images/*.png and <root>/labels/*.png with the same names"


class GTA5(FolderDataset):
    """Read GTA5 as unpacked from its zips: `images/*.png` and `labels/*.png`, in sorted order.

    Label ids are mapped to train ids. Label files with a palette are read as indices, which are the ids. Files
    `*_labelTrainIds`, which DAFormer's converter writes beside them, are left out.

    Args:
        root: The folder that contains `images` and `labels`.
        size: (height, width) that images (bicubic, antialiased) and labels (nearest) are resized to: (720, 1280) in the
            released code, (760, 1280) in the paper's text. None keeps each pair's own size.
        names: A text file that lists the images to use, one name per line, with or without folders and extension.
        images: Whether to read images. Without, `image` is empty, (3, 0, 0); useful for counting classes.
        labels: Whether to read label maps. Without, `label` is None, and the files may be missing.

    Raises:
        DataError: If a folder is missing or empty, an image has no label map, a label map has no image and there is no
            list of `names`, or that lists missing files; on access, if a file is damaged or has other ids, or a pair
            differs in size and `size` is None.
        TypeError: If `size` is not a pair of ints.
        ValueError: If `size` is not positive, or neither images nor labels are read.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2).write(root, layout="gta5")
        >>> data = GTA5(root)
        >>> len(data), data[0].name, data[0].image.shape
        (2, '00001', torch.Size([3, 64, 128]))
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
        of_images = find(self.root / "images") if images else None
        of_labels = label_maps(self.root / "labels") if labels else None
        expected = (self.root, "GTA5")
        files = paired(f"{self.root}:", of_images, of_labels, LAYOUT, names=names, strict=names is None, root=expected)
        super().__init__(files, LABEL_IDS, size, "bicubic")
