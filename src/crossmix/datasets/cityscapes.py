"""Cityscapes (Cordts et al., CVPR 2016, https://www.cityscapes-dataset.com): street scenes of 50 cities."""

from pathlib import Path

from crossmix.datasets._arguments import check_size
from crossmix.datasets._folder_dataset import FolderDataset, find, paired
from crossmix.datasets._labels import LABEL_IDS
from crossmix.datasets._listing import Found, bare, is_folder, subfolders

__all__ = ["Cityscapes"]

IMAGES, FINE, COARSE = "leftImg8bit", "gtFine", "gtCoarse"
LAYOUT = (
    f"expected <root>/{IMAGES}/<split>/<city>/*_{IMAGES}.png and <root>/{{0}}/<split>/<city>/*_{{0}}_labelIds.png, "
    "with or without the folders of the zips around them"
)
SEQUENCE = f"{IMAGES}_sequence"  # the frames before and after each image, of which few have labels


class Cityscapes(FolderDataset):
    """Read Cityscapes as unpacked from its zips, in sorted order.

    Pairs `leftImg8bit/<split>/<city>/*_leftImg8bit.png` with `gtFine/<split>/<city>/*_gtFine_labelIds.png`, or with
    `gtCoarse` for the split `train_extra`. Each may be inside the folder of its zip, `leftImg8bit_trainvaltest`,
    `gtFine_trainvaltest`, `gtCoarse` and so on; `leftImg8bit_sequence*` is not read. Label ids are mapped to train ids.

    Args:
        root: The folder that contains `leftImg8bit` and `gtFine`.
        split: `"train"`, `"val"`, `"train_extra"`, or any other folder there.
        size: (height, width) that images (bilinear, antialiased) and labels (nearest) are resized to; (512, 1024) in
            the released code. None keeps their own size.
        names: A text file that lists the images to use, one name per line, with or without folders and
            `_leftImg8bit.png`.
        images: Whether to read images. Without, `image` is empty, (3, 0, 0); useful for counting classes.
        labels: Whether to read label maps. An unlabelled target needs none; the files may then be missing.

    Raises:
        DataError: If the split is missing or empty, images and label maps do not pair up, or `names` lists missing
            files; on access, if a file is damaged or contains ids that are not label ids.
        TypeError: If `size` is not a pair of ints.
        ValueError: If `size` is not positive, or neither images nor labels are read.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2, domain="target").write(root, layout="cityscapes", split="val")
        >>> data = Cityscapes(root, "val", size=(32, 64))
        >>> len(data), data[1].name, data[1].label.shape
        (2, 'street_000001_000019', torch.Size([32, 64]))
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        size: tuple[int, int] | None = None,
        names: str | Path | None = None,
        images: bool = True,
        labels: bool = True,
    ) -> None:
        size = check_size(size)
        self.root: Path = Path(root)
        self.split = split
        kind = labels_of(split)
        of_images = of_split(self.root, split, IMAGES, f"_{IMAGES}") if images else None
        of_labels = of_split(self.root, split, kind, f"_{kind}_labelIds") if labels else None
        where, expected = f"{self.root}: split {split!r}", (self.root, "Cityscapes")
        files = paired(where, of_images, of_labels, LAYOUT.format(kind), names=names, strict=True, root=expected)
        super().__init__(files, LABEL_IDS, size, "bilinear")


def labels_of(split: str) -> str:
    """The annotations (fine or coarse) of a split."""
    return COARSE if split == "train_extra" else FINE


def of_split(root: Path, split: str, folder: str, suffix: str) -> Found:
    """The files of a split, keyed by "<city>/<name>"."""

    def ours(path: str) -> bool:
        return path.count("/") == 1 and bare(path).endswith(suffix)

    found = Found({})
    for base in _bases(root, folder):
        if is_folder(base / split) and not found.files:  # there may be other images (blurred, foggy) in such folders
            found = find(base / split, recursive=True, only=ours, suffix=suffix)
    return found


def splits(root: Path) -> list[str]:
    """The splits that have images or label maps."""
    bases = [base for folder in (IMAGES, FINE, COARSE) for base in _bases(root, folder)]
    zips = {IMAGES, FINE, COARSE}
    names = {path.name for base in bases if is_folder(base) for path in subfolders(base)}
    return sorted(name for name in names - zips if not name.startswith("."))


def _bases(root: Path, folder: str) -> list[Path]:
    """Folders that may contain a kind of file, with or without the folder of its zip."""
    beside = root.glob(f"{folder}_*") if is_folder(root) else ()
    zips = sorted(path for path in beside if not path.name.startswith(SEQUENCE))
    return [root / folder, *(path / folder for path in (root / folder, *zips)), *zips]
