"""What the rich look of StreetScenes is made of: noise, and sprites of vehicles, people, signs, trees and houses.

A sprite is (H, W, 4) float32 with red, green, blue, and opacity, which is negative outside of the object.
"""

import functools
import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "bare_tree", "drawing", "facade", "foliage", "noise", "paints"]

Array = NDArray[np.floating]  # float32 almost everywhere, for speed

MATERIALS = ("outside", "hole", "paint", "cloth", "grey", "dark", "light", "red", "skin")
BOX = "dark 5 20 0 30 0 0, dark 80 95 0 30 0 0, paint 0 100 10 100 1 1"
CAR = (
    "dark 5 20 0 30 0 0, dark 80 95 0 30 0 0, paint 0 100 15 66 2 2, paint 3 97 60 100 14 14, grey 10 90 66 94 10 10, "
    "dark 2 98 15 24 0 0, light 36 64 30 38 0 0"
)
# Parts, later ones on top: material; left, right, bottom and top in percent; and how far the upper left and the upper
# right corner are moved inwards. Without these two it is an ellipse.
DRAWINGS = {
    "car side": "paint 0 100 16 64 0 4, paint 0 78 60 100 7 22, grey 6 68 65 93 6 17, paint 34 37 60 95 0 0, "
    "dark 10 25 0 42, dark 75 90 0 42",
    "car rear": f"{CAR}, red 2 20 46 60 0 4, red 80 98 46 60 4 0",
    "car front": f"{CAR}, light 4 24 44 56, light 76 96 44 56",
    "truck side": "paint 0 100 10 100 0 1, dark 8 20 0 24, dark 76 88 0 24, grey 88 98 45 75 0 2",
    "truck end": f"{BOX}, dark 49 51 20 95 0 0, red 5 95 14 18 0 0",
    "bus side": "paint 0 100 8 100 0 0, dark 12 22 0 24, dark 74 84 0 24, grey 2 98 35 54 0 0, grey 2 98 72 92 0 0",
    "bus end": f"{BOX}, grey 8 92 35 55 0 0, grey 8 92 72 92 0 0",
    "person": "cloth 20 48 0 50 10 0, cloth 52 85 0 50 0 15, paint 10 90 42 85 5 5, "
    "skin 33 67 84 100, dark 33 67 92 100",
    "rider": "cloth 20 45 0 45 0 -10, cloth 55 80 10 45 -10 0, paint 10 85 36 82 10 10, skin 38 68 80 100, "
    "light 38 68 91 100",
    "bicycle": "dark 0 40 0 62, hole 5 35 8 54, dark 60 100 0 62, hole 65 95 8 54, paint 28 33 30 90 0 0, "
    "dark 20 40 88 95 0 0, paint 30 74 68 75 0 0, paint 45 50 30 74 20 -20, paint 77 82 30 100 -8 8",
    "motorcycle": "dark 0 34 0 60, dark 66 100 0 60, dark 25 75 20 60 5 5, paint 10 80 50 85 10 10, light 72 86 65 85",
    "traffic light": "dark 0 100 0 100 0 0, red 20 80 70 95, cloth 20 80 38 63, grey 20 80 6 31",
    "ring": "red 0 100 0 100, light 15 85 15 85, dark 30 70 40 60 0 0",
    "triangle": "red 0 100 0 100 50 50, light 20 80 12 75 30 30",
    "disc": "paint 0 100 0 100, light 40 60 20 80 0 0",
    "board": "paint 0 100 0 100 0 0, light 15 85 55 75 0 0",
    "pole": "grey 0 100 0 100 10 10",
    "lamp post": "grey 0 12 0 98 0 3, grey 5 100 96 100 0 0",
}
PAINTS = np.array([(12, 12, 14), (150, 152, 156), (80, 82, 86), (235, 235, 232), (22, 30, 70), (120, 16, 20)]) / 255
WALLS = np.array([(112, 62, 46), (150, 126, 90), (196, 190, 176), (120, 118, 114), (84, 70, 60), (170, 110, 80)]) / 255


@functools.cache
def noise() -> Array:
    """A square of 256 texels of noise that is periodic and looks alike at all scales; deviation 1."""
    spectrum = np.fft.rfft2(np.random.default_rng(0).normal(size=(256, 256)))
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256))
    frequency[0, 0] = math.inf
    values = np.fft.irfft2(spectrum / frequency)
    scaled: Array = (values / values.std()).astype(np.float32)
    return scaled


@functools.cache
def drawing(name: str) -> NDArray[np.int64]:
    """A drawing as numbers of materials, to index `paints`; the upper row comes first."""
    axis = (np.arange(64) + 0.5) / 64 * 100
    codes = np.zeros((64, 64), np.int64)
    for part in DRAWINGS[name].split(", "):
        material, (left, right, bottom, top, *inwards) = part.split()[0], map(int, part.split()[1:])
        v = (axis[::-1, None] - bottom) / (top - bottom)
        if inwards:
            inside = (v >= 0) & (v < 1) & (axis >= left + v * inwards[0]) & (axis < right - v * inwards[1])
        else:
            inside = ((axis - left) / (right - left) - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25
        codes[inside] = MATERIALS.index(material)
    return codes


def paints(rng: np.random.Generator) -> Array:
    """Random colours of the materials, (9, 4)."""
    paint, cloth = PAINTS[rng.integers(len(PAINTS), size=2)] * rng.uniform(0.4, 1.4, (2, 1)) + rng.normal(
        0, 0.03, (2, 3)
    )
    grey = np.full(3, rng.uniform(0.03, 0.5))
    fixed = [(0.06, 0.06, 0.06), (0.85, 0.85, 0.75), (0.7, 0.05, 0.05), (0.6, 0.42, 0.34)]
    colors = np.array([(0, 0, 0), (0, 0, 0), paint, cloth, grey, *fixed])
    return np.concatenate([colors, [[-1], [0], *[[1]] * 7]], 1).astype(np.float32)


@functools.cache
def bare_tree(seed: int) -> Array:
    """A tree in winter, with sky between its branches."""
    rng = np.random.default_rng(seed)
    wood = np.zeros((96, 96), bool)
    at, angle, length = np.array([[48.0, 0.0]]), np.array([math.pi / 2]), rng.uniform(16, 21)
    for order in range(8):
        end = at + length * np.stack([np.cos(angle), np.sin(angle)], 1)
        x, y = (at + (end - at) * np.linspace(0, 1, 40)[:, None, None]).reshape(-1, 2).T.astype(int).clip(0, 95)
        for right in range(3 if order < 2 else 1):  # the trunk is thicker
            wood[95 - y, (x + right).clip(0, 95)] = True
        at, angle = end.repeat(2, 0), angle.repeat(2) + rng.normal(0, 0.45, 2 * len(angle))
        length *= rng.uniform(0.7, 0.85)
    crown = wood
    for _ in range(3):
        crown = crown | np.roll(crown, 1, 0) | np.roll(crown, -1, 0) | np.roll(crown, 1, 1) | np.roll(crown, -1, 1)
    sprite = np.full((96, 96, 4), 0.17, np.float32)
    sprite[..., 3] = np.where(wood, 0.9, np.where(crown, 0.25, -1))
    return sprite


@functools.cache
def foliage(seed: int, *, hedge: bool = False) -> Array:
    """A crown on a trunk, or a hedge, with a ragged outline."""
    rng = np.random.default_rng(seed)
    ragged = np.roll(noise(), rng.integers(256, size=2), (0, 1))[:96, :96]
    y, x = np.mgrid[0:96, 0:96] / 48 - 1
    shape = (y + 0.8) * 2 if hedge else 0.9 - np.hypot(x, 1.2 * (y + 0.2)) ** 2
    sprite = np.empty((96, 96, 4), np.float32)
    sprite[..., :3] = (rng.uniform(0.3, 1.0, (96, 96)) * np.exp(0.3 * ragged))[..., None] * (0.24, 0.26, 0.17)
    sprite[..., 3] = np.where((shape + 0.3 * ragged > 0) | ((abs(x) < 0.06) & (y > 0)), 1, -1)
    return sprite


def facade(rng: np.random.Generator, floors: int, bays: int) -> Array:
    """Rows of windows above doors or shops, below a roof; 16 texels a floor and a bay."""
    bay = np.zeros((16, 16), np.int64)  # 0 wall, 1 pane, 2 frame, 3 roof, 4 sign
    top, left = rng.integers(2, 5), rng.choice([0, 2, 4, 5])
    bay[top - 1 : 12, left : 16 - left] = 2
    bay[top:11, left + 1 : 15 - left] = 1
    bay[rng.choice([6, 7, 15])] = bay[top - 1]  # a bar across, or none
    codes = np.tile(bay, (floors, bays))
    if rng.random() < 0.5:  # a shop
        codes[-16:-12], codes[-12:-2], codes[-12:-2, ::8] = 4, 1, 2
    codes = np.concatenate([np.full((rng.integers(2, 14), codes.shape[1]), 3), codes])
    wall = WALLS[rng.integers(len(WALLS))] * rng.uniform(0.5, 1.1) + rng.normal(0, 0.02, 3)
    frame, roof, sign = (
        np.full(3, rng.choice([0.1, 0.8])),
        np.full(3, rng.uniform(0.1, 0.35)),
        rng.uniform(0.05, 0.7, 3),
    )
    colors = np.array([(*wall, 1), (0, 0, 0, 1), (*frame, 1), (*roof, 1), (*sign, 1)], np.float32)[codes]
    panes = rng.choice([0.05, 0.1, 0.2, 0.5], (floors + 1, bays)).repeat(16, 0).repeat(16, 1)[-len(codes) :]
    colors[..., :3] += (panes * (codes == 1))[..., None]
    colors[..., :3] *= rng.uniform(0.85, 1.15, (*codes.shape, 1))
    return colors
