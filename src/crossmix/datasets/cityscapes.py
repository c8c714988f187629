"""Cityscapes (Cordts et al., CVPR 2016, https://www.cityscapes-dataset.com): street scenes of 50 cities."""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from crossmix.datasets._files import Files, check_size, read_sample
from crossmix.datasets.sample import DataError, Sample

__all__ = ["Cityscapes"]

IMAGE, LABEL = "_leftImg8bit.png", "_gtFine_labelIds.png"
LAYOUT = (
    f"expected <root>/leftImg8bit/<split>/<city>/*{IMAGE} and <root>/gtFine/<split>/<city>/*{LABEL}, "
    "with or without the folders of the zips around them"
)


class Cityscapes(Dataset[Sample]):
    """Read Cityscapes as its zips unpack, in sorted order.

    `leftImg8bit/<split>/<city>/*_leftImg8bit.png` with `gtFine/<split>/<city>/*_gtFine_labelIds.png`; both may lie in
    the folders of the zips, `leftImg8bit_trainvaltest` and `gtFine_trainvaltest`. Label ids are mapped to train ids.

    Args:
        root: The folder that holds `leftImg8bit` and `gtFine`.
        split: `"train"`, `"val"`, or any other folder there.
        size: (height, width) that images (bilinear, antialiased) and labels (nearest) are resized to; (512, 1024) in
            the released code. None keeps their own size.
        labels: Whether to read label maps. An unlabelled target needs none; they may then be missing.

    Raises:
        DataError: If the split is missing or empty or images and label maps do not pair up; on access, if a file is
            damaged or holds ids that are no label ids.
        ValueError: If `size` is not positive.

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
        self, root: str | Path, split: str = "train", *, size: tuple[int, int] | None = None, labels: bool = True
    ) -> None:
        self.root = Path(root)
        self.split = split
        self.size = check_size(size)
        images = self._find("leftImg8bit", IMAGE)
        found = self._find("gtFine", LABEL) if labels else {}
        if not images:
            what = f"has {len(found)} label maps but no images" if found else "has no images"
            raise DataError(f"{self.root}: split {split!r} {what}; {LAYOUT}.")
        alone = sorted(images.keys() ^ found.keys()) if labels else []
        if alone:
            kind = "label map" if alone[0] in images else "image"
            raise DataError(
                f"{self.root}: split {split!r} has {len(images)} images and {len(found)} label maps that do not pair "
                f"up, {alone[0]} has no {kind}; {LAYOUT}."
            )
        self.files = [Files(path, found.get(key), key.rpartition("/")[2]) for key, path in sorted(images.items())]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self.files[index], self.size, "bilinear")

    def fingerprint(self) -> dict[str, Any]:
        """Return what the samples depend on besides the files, for caches of them: a dict that JSON can hold."""
        return {"reader": "Cityscapes", "size": self.size, "resampling": "bilinear"}

    def _find(self, folder: str, suffix: str) -> dict[str, Path]:
        """Files of the split by "<city>/<name>"."""
        for base in (
            self.root / folder,
            self.root / f"{folder}_trainvaltest" / folder,
            self.root / f"{folder}_trainvaltest",
        ):
            if (base / self.split).is_dir():
                paths = (base / self.split).glob(f"*/*{suffix}")
                return {f"{path.parent.name}/{path.name.removesuffix(suffix)}": path for path in paths}
        return {}
