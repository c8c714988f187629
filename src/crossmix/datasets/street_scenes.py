"""StreetScenes: rendered street scenes in two looks, a small pair of domains that needs no download.

The source looks like a clean computer game: one saturated colour per class, little variation, no texture. The target
looks like camera images on an overcast day: muted colours, nearly equal for road and sidewalk, for building, wall and
fence, for vegetation and terrain, and for person and rider; texture, a colour cast, uneven light, haze, blur and noise.
The layouts of both have the same distribution.

A second source, the rich style, has streets of its own in the perspective of a camera behind a windscreen: houses with
windows and shops, gardens, parked cars and traffic, all with texture, in light from dusk to glare. It is meant for
training before photographs.
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from crossmix._checks import check_choice, check_size
from crossmix.datasets._arguments import check_count, check_index
from crossmix.datasets._png import write_png
from crossmix.datasets._street_layout import ID, Layout, street_layout
from crossmix.datasets._street_rich import rich_scene
from crossmix.datasets.classes import CLASS_NAMES, IGNORED, label_ids
from crossmix.datasets.sample import Sample

__all__ = ["StreetScenes"]

Array = NDArray[np.float64]

# Mean colour (R, G, B) of each class and the standard deviation of an object's brightness, all in 0..255.
SOURCE_COLORS: dict[str, tuple[tuple[int, int, int], int]] = {
    "road": ((92, 84, 104), 10),
    "sidewalk": ((196, 158, 150), 14),
    "building": ((176, 112, 74), 26),
    "wall": ((206, 196, 132), 16),
    "fence": ((126, 84, 44), 16),
    "pole": ((206, 206, 214), 12),
    "traffic light": ((246, 184, 22), 16),
    "traffic sign": ((236, 236, 60), 20),
    "vegetation": ((30, 136, 34), 18),
    "terrain": ((150, 196, 76), 16),
    "sky": ((84, 158, 236), 14),
    "person": ((226, 54, 70), 24),
    "rider": ((240, 122, 214), 22),
    "car": ((42, 64, 190), 36),
    "truck": ((44, 180, 176), 24),
    "bus": ((206, 60, 24), 24),
    "train": ((96, 44, 126), 20),
    "motorcycle": ((22, 28, 66), 14),
    "bicycle": ((116, 12, 40), 16),
}

TARGET_COLORS: dict[str, tuple[tuple[int, int, int], int]] = {
    "road": ((98, 97, 100), 6),
    "sidewalk": ((122, 116, 115), 7),
    "building": ((130, 114, 102), 14),
    "wall": ((142, 134, 120), 9),
    "fence": ((106, 95, 84), 9),
    "pole": ((132, 134, 136), 9),
    "traffic light": ((96, 84, 52), 10),
    "traffic sign": ((160, 156, 118), 14),
    "vegetation": ((70, 92, 58), 9),
    "terrain": ((106, 114, 76), 9),
    "sky": ((190, 204, 218), 9),
    "person": ((104, 68, 72), 15),
    "rider": ((96, 78, 100), 15),
    "car": ((66, 74, 106), 20),
    "truck": ((94, 126, 126), 15),
    "bus": ((142, 92, 78), 15),
    "train": ((98, 84, 112), 13),
    "motorcycle": ((50, 52, 62), 9),
    "bicycle": ((84, 56, 62), 9),
}


class StreetScenes(Dataset[Sample]):
    """Rendered street scenes with all 19 classes of Cityscapes.

    Item i is a pure function of (domain, style, size, seed, i).

    Args:
        length: Number of scenes.
        domain: `"source"`, the clean look, or `"target"`, the shifted one.
        size: Height and width of the images, in pixels, at least 16 each.
        seed: Scenes of different seeds are unrelated.
        style: `"flat"`, or `"rich"` for a source with more variety and detail.

    Raises:
        TypeError: If `length` or `seed` is not an int, or `size` not two.
        ValueError: If an argument is out of range, or the style is `"rich"` and the domain `"target"`.

    Example:
        >>> scene = StreetScenes(10, domain="target")[3]
        >>> scene.image.shape, scene.label.shape, scene.name
        (torch.Size([3, 64, 128]), torch.Size([64, 128]), '000003')
    """

    def __init__(
        self,
        length: int,
        *,
        domain: Literal["source", "target"] = "source",
        size: tuple[int, int] = (64, 128),
        seed: int = 0,
        style: Literal["flat", "rich"] = "flat",
    ) -> None:
        check_choice("domain", domain, ("source", "target"))
        check_choice("style", style, ("flat", "rich"))
        if style == "rich" and domain == "target":
            raise ValueError("`style` 'rich' is a look of the source, got `domain` 'target'.")
        self.length: int = check_count("length", length, least=1)
        self.domain = domain
        self.size: tuple[int, int] = check_size("size", size, least=16)
        self.seed: int = check_count("seed", seed)
        self.style = style

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        index = check_index(index, self.length)
        image, label = self._render(index)
        return Sample(image, label, f"{index:06d}")

    def write(
        self, root: str | os.PathLike[str], *, layout: Literal["gta5", "cityscapes"], split: str = "train"
    ) -> None:
        """Write all scenes to disk in the layout of an official data set, with label ids in the label maps.

        Args:
            root: The data set's folder, created if missing. Files with the same names are replaced.
            layout: `"gta5"` for the reader `GTA5`, `"cityscapes"` for `Cityscapes`.
            split: The folder of the split, for `"cityscapes"`.

        Raises:
            ValueError: If the layout is unknown.
        """
        check_choice("layout", layout, ("gta5", "cityscapes"))
        table = label_ids()
        for i in range(len(self)):
            image, label = self._render(i)
            if layout == "gta5":
                image_path, label_path = (Path(root) / folder / f"{i + 1:05d}.png" for folder in ("images", "labels"))
            else:
                stem = f"street_{i:06d}_000019"
                image_path = Path(root) / "leftImg8bit" / split / "street" / f"{stem}_leftImg8bit.png"
                label_path = Path(root) / "gtFine" / split / "street" / f"{stem}_gtFine_labelIds.png"
            for path, pixels in ((image_path, image), (label_path, table[label.long()])):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_png(path, pixels)

    def _render(self, index: int) -> tuple[Tensor, Tensor]:
        image: NDArray[np.floating]
        rng = np.random.default_rng([self.seed, index, 2 if self.style == "rich" else self.domain == "target"])
        if self.style == "rich":
            image, label = rich_scene(self.size, rng)
        else:
            layout = street_layout(self.size, rng)
            look = _source_look if self.domain == "source" else _target_look
            image, label = look(layout, rng), layout.label
        pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), torch.from_numpy(label)


def _source_look(layout: Layout, rng: np.random.Generator) -> Array:
    """Render flat bright colours under even light."""
    image = _painted(layout, SOURCE_COLORS, rng, hue=8.0)
    image += 0.12 * layout.detail[..., None]
    image *= rng.uniform(0.8, 1.15)
    return image + rng.normal(0, 0.015, image.shape)


def _target_look(layout: Layout, rng: np.random.Generator) -> Array:
    """Render muted colours with the effects of lens, light and weather."""
    height, width = layout.label.shape
    image = _painted(layout, TARGET_COLORS, rng, hue=4.0)
    image += 0.09 * layout.detail[..., None]
    image *= 1 + 0.04 * _texture(height, width, rng)[..., None]
    haze = rng.uniform(0.0, 0.25) * (1 - layout.depth) ** 2 * (layout.label != ID["sky"])
    image += (0.72 - image) * haze[..., None]
    slope = np.linspace(-1, 1, width)[None, :] * rng.uniform(-0.12, 0.12)
    fall = np.linspace(-1, 1, height)[:, None] * rng.uniform(-0.1, 0.1)
    image *= (1 + slope + fall)[..., None] * rng.uniform(0.75, 1.0)
    image *= 1 + np.array([-0.05, 0.03, -0.01]) + rng.normal(0, 0.02, 3)  # white balance: greenish, as Cityscapes is
    image = _blurred(image, rng.uniform(0.35, 0.6))
    return image + rng.normal(0, rng.uniform(0.005, 0.015), image.shape)


def _painted(
    layout: Layout, colors: dict[str, tuple[tuple[int, int, int], int]], rng: np.random.Generator, *, hue: float
) -> Array:
    """Paint each object in a colour near its class's: lighter or darker by the spread, with a small shift in hue."""
    table = np.empty((len(layout.classes), 3))
    for i, train_id in enumerate(layout.classes):
        mean, spread = ((40, 40, 44), 10) if train_id == IGNORED else colors[CLASS_NAMES[train_id]]
        table[i] = np.array(mean) + rng.normal(0, spread) + rng.normal(0, hue, 3)
    painted: Array = table[layout.instance] / 255
    return painted


def _texture(height: int, width: int, rng: np.random.Generator) -> Array:
    """Noise at three scales with unit total variance."""
    texture = np.zeros((height, width))
    for cell in (1, 2, 4):
        grid = rng.normal(0, 1, (-(-height // cell), -(-width // cell)))
        texture += grid.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    scaled: Array = texture / np.sqrt(3)
    return scaled


def _blurred(image: Array, sigma: float) -> Array:
    """Gaussian blur with five taps; edges are repeated."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    taps /= taps.sum()
    out: Array = image
    for axis in (0, 1):
        padded = np.pad(out, [(2, 2) if i == axis else (0, 0) for i in range(3)], mode="edge")
        shifted = [np.take(padded, range(k, k + image.shape[axis]), axis) for k in range(5)]
        out = np.tensordot(taps, np.stack(shifted), 1)
    return out
