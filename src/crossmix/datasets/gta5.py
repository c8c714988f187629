"""GTA5: 24,966 rendered street scenes.

Richter et al., ECCV 2016, https://download.visinf.tu-darmstadt.de/data/from_games
"""

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from crossmix.datasets._files import Files, check_size, read_sample
from crossmix.datasets.sample import DataError, Sample

__all__ = ["GTA5"]

LAYOUT = "expected <root>/images/*.png and <root>/labels/*.png with the same names"


class GTA5(Dataset[Sample]):
    """Read GTA5 as its zips unpack: `images/*.png` and `labels/*.png`, in sorted order.

    Label ids are mapped to train ids. Palette files give their indices, which are the ids.

    Args:
        root: The folder that holds `images` and `labels`.
        size: (height, width) that images (bicubic, antialiased) and labels (nearest) are resized to, as in the released
            code: (720, 1280); (760, 1280) in the paper's text. None keeps each pair's own size.

    Raises:
        DataError: If a folder is missing or empty or an image has no label map; on access, if a file is damaged, holds
            ids that are no label ids, or the two files of a pair differ in size and `size` is None.
        ValueError: If `size` is not positive.

    Example:
        >>> import tempfile
        >>> from crossmix.datasets import StreetScenes
        >>> root = tempfile.mkdtemp()
        >>> StreetScenes(2).write(root, layout="gta5")
        >>> data = GTA5(root)
        >>> len(data), data[0].name, data[0].image.shape
        (2, '00001', torch.Size([3, 64, 128]))
    """

    def __init__(self, root: str | Path, *, size: tuple[int, int] | None = None) -> None:
        self.root = Path(root)
        self.size = check_size(size)
        images = {path.name: path for path in sorted((self.root / "images").glob("*.png"))}
        labels = {path.name: path for path in (self.root / "labels").glob("*.png")}
        if not images:
            found = f"has {len(labels)} label maps but no images" if labels else "has no images"
            raise DataError(f"{self.root}: {found}; {LAYOUT}.")
        missing = [name for name in images if name not in labels]
        if missing:
            raise DataError(
                f"{self.root / 'labels' / missing[0]}: no such label map, as for {len(missing)} of {len(images)} "
                f"images; {LAYOUT}."
            )
        self.files = [Files(path, labels[name], path.stem) for name, path in images.items()]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self.files[index], self.size, "bicubic")

    def fingerprint(self) -> dict[str, Any]:
        """Return what the samples depend on besides the files, for caches of them: a dict that JSON can hold."""
        return {"reader": "GTA5", "size": self.size, "resampling": "bicubic"}
