"""The layout of a rendered street scene: its label map and the object that each pixel shows.

The camera looks along a street. A ground point at depth t (0 at the horizon, 1 at the lower edge) and lateral position
u (in units of the camera height, 0 straight ahead) projects to x = vanish + u * t * scale, y = horizon + t * scale; an
object of height h there is h * t * scale pixels tall. So t alone determines the position, size and order of objects.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossmix.datasets.classes import CLASS_NAMES, IGNORED

__all__ = ["Layout", "street_layout"]

ID = {name: i for i, name in enumerate(CLASS_NAMES)}

Mask = NDArray[np.bool_]


class Layout(NamedTuple):
    """A street scene without its appearance.

    Attributes:
        label: (H, W) uint8 train ids, 255 for the ego-vehicle.
        instance: (H, W) int64 index into `classes`: the object that a pixel shows.
        classes: The train id of each object.
        depth: (H, W) float64, t of the ground point below each pixel: 0 far, 1 near.
        detail: (H, W) float64 in [-1, 1]: windows, lane markings, rails of fences.
    """

    label: NDArray[np.uint8]
    instance: NDArray[np.int64]
    classes: list[int]
    depth: NDArray[np.float64]
    detail: NDArray[np.float64]


class _Scene:
    """The canvas and the camera."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        height, width = size
        self.rng = rng
        self.y, self.x = np.mgrid[0:height, 0:width] + 0.5
        self.horizon = height * rng.uniform(0.36, 0.46)
        self.vanish = width * rng.uniform(0.38, 0.62)
        self.scale = height - self.horizon
        self.road = rng.uniform(0.75, 1.15)  # half the road's width, in units of the camera's height
        self.walk = self.road + rng.uniform(0.35, 0.6)  # where the sidewalk ends
        self.label = np.full(size, ID["sky"], np.uint8)
        self.instance = np.zeros(size, np.int64)
        self.classes = [ID["sky"]]
        self.depth = np.zeros(size)
        self.detail = np.zeros(size)
        self.ground = np.maximum((self.y - self.horizon) / self.scale, 0.0)
        self.lateral = np.abs(self.x - self.vanish) / self.scale  # of the vertical plane that a column sees, times t

    def paint(self, mask: Mask, name: str, depth: float | NDArray[np.float64], detail: float = 0.0) -> None:
        """Draw an object in front of everything drawn so far."""
        self.label[mask] = ID[name] if name != "own car" else IGNORED
        self.instance[mask] = len(self.classes)
        self.classes.append(ID.get(name, IGNORED))
        self.depth[mask] = depth[mask] if isinstance(depth, np.ndarray) else depth
        self.detail[mask] = detail

    def box(self, u: float, t: float, span: tuple[float, float], rise: tuple[float, float]) -> Mask:
        """Pixels of an upright rectangle on the ground point (u, t): lateral span and heights in camera heights."""
        unit = t * self.scale
        left, right = self.vanish + (u * self.scale + np.array(span) * self.scale) * t
        top, bottom = self.horizon + unit * (1 - rise[1]), self.horizon + unit * (1 - rise[0])
        right, bottom = max(right, left + 1.0), max(bottom, top + 1.0)  # at least one pixel
        mask: Mask = (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)
        return mask

    def disc(self, u: float, t: float, span: tuple[float, float], rise: tuple[float, float]) -> Mask:
        """Pixels of the ellipse inside such a rectangle."""
        unit = t * self.scale
        left, right = self.vanish + (u * self.scale + np.array(span) * self.scale) * t
        top, bottom = self.horizon + unit * (1 - rise[1]), self.horizon + unit * (1 - rise[0])
        rx, ry = max(right - left, 1.2) / 2, max(bottom - top, 1.2) / 2
        mask: Mask = ((self.x - (left + right) / 2) / rx) ** 2 + ((self.y - (top + bottom) / 2) / ry) ** 2 <= 1
        return mask


def street_layout(size: tuple[int, int], rng: np.random.Generator) -> Layout:
    """Draw one scene.

    Args:
        size: Height and width in pixels.
        rng: Source of randomness.

    Returns:
        The scene.
    """
    scene = _Scene(size, rng)
    _ground(scene)
    for side in (-1, 1):
        _facades(scene, side)
        _edging(scene, side)
    things = [
        *((rng.uniform(0.28, 0.75), _upright) for _ in range(rng.integers(2, 5))),
        *((rng.uniform(0.28, 0.9), _vehicle) for _ in range(rng.integers(1, 4))),
        *((rng.uniform(0.35, 0.85), _pedestrian) for _ in range(rng.integers(1, 3))),
        *((rng.uniform(0.4, 0.9), _two_wheeler) for _ in range(rng.integers(1, 4))),
        *((rng.uniform(0.25, 0.8), _tree) for _ in range(rng.integers(0, 3))),
    ]
    if rng.random() < 0.3:
        things.append((rng.uniform(0.25, 0.6), _train))
    for t, thing in sorted(things, key=lambda item: item[0]):  # distant objects first
        thing(scene, t)
    if rng.random() < 0.5:
        _own_car(scene)
    return Layout(scene.label, scene.instance, scene.classes, scene.depth, scene.detail)


def _ground(scene: _Scene) -> None:
    """Terrain, sidewalk and road, and the road's markings."""
    below = scene.y > scene.horizon
    u = np.abs(scene.x - scene.vanish) / np.maximum(scene.ground * scene.scale, 1e-6)
    scene.paint(below, "terrain", scene.ground)
    for side in (-1, 1):
        mine = below & (np.sign(scene.x - scene.vanish) == side)
        scene.paint(mine & (u < scene.walk + 0.05), "sidewalk", scene.ground)
    on_road = below & (u < scene.road)
    scene.paint(on_road, "road", scene.ground)
    dashes = np.floor(1.5 / np.maximum(scene.ground, 0.05)) % 2 == 0
    scene.detail[on_road & (u < 0.04) & dashes] = 1.0
    scene.detail[on_road & (np.abs(u - scene.road + 0.08) < 0.03)] = 0.8


def _facades(scene: _Scene, side: int) -> None:
    """Buildings along one side, with gaps of sky and trees; a building is a plane of constant lateral position."""
    rng = scene.rng
    lateral = scene.walk + rng.choice([0.1, 0.5, 1.0])
    mine = np.sign(scene.x - scene.vanish) == side
    t = scene.lateral / lateral
    edges = np.concatenate([[0.0], np.sort(rng.uniform(0.06, 1.2, rng.integers(3, 6))), [9.0]])
    for near, far in zip(edges[:0:-1], edges[-2::-1], strict=True):
        kind = rng.choice(["building", "building", "building", "vegetation", "gap"])
        if kind == "gap":
            continue
        height = rng.uniform(2.0, 5.0) if kind == "building" else rng.uniform(1.6, 3.0)
        rough = rng.uniform(-0.25, 0.25, scene.x.shape[1])[None] if kind == "vegetation" else 0.0
        top = scene.horizon + t * scene.scale * (1 - height - rough)
        mask = mine & (t >= far) & (t < near) & (scene.y >= top) & (scene.y < scene.horizon + t * scene.scale)
        scene.paint(mask, str(kind), np.minimum(t, 1.0))
        if kind == "building":
            floors = (scene.horizon + t * scene.scale - scene.y) / np.maximum(t * scene.scale, 1e-6)
            columns = np.log(np.maximum(t, 1e-3)) * 6
            windows = ((floors % 0.9) > 0.45) & ((columns % 1.0) > 0.5) & (floors > 0.5)
            scene.detail[mask & windows] = -1.0


def _edging(scene: _Scene, side: int) -> None:
    """A wall, a fence or a hedge beside the sidewalk."""
    rng = scene.rng
    if rng.random() < 0.25:
        return
    lateral = scene.walk + 0.05
    mine = np.sign(scene.x - scene.vanish) == side
    t = scene.lateral / lateral
    start = rng.uniform(0.15, 0.5)
    kind = str(rng.choice(["wall", "fence", "wall", "fence", "vegetation"]))
    height = {"wall": rng.uniform(0.6, 1.0), "fence": rng.uniform(0.5, 0.9), "vegetation": rng.uniform(0.4, 0.8)}[kind]
    base = scene.horizon + t * scene.scale
    mask = mine & (t >= start) & (t < start + rng.uniform(0.4, 0.9)) & (scene.y < base)
    mask &= scene.y >= base - height * t * scene.scale
    scene.paint(mask, kind, np.minimum(t, 1.0))
    if kind == "fence":
        scene.detail[mask & (np.floor(scene.x) % 3 == 0)] = -1.0


def _curbside(scene: _Scene, *, spread: float = 0.35) -> float:
    """A lateral position on one of the sidewalks."""
    middle = (scene.road + scene.walk) / 2
    return float(scene.rng.choice([-1, 1]) * (middle + scene.rng.uniform(-spread, spread) * (scene.walk - scene.road)))


def _upright(scene: _Scene, t: float) -> None:
    """A pole, bare, or with a traffic light or a sign on it."""
    rng = scene.rng
    u = _curbside(scene)
    height = rng.uniform(1.9, 2.8)
    scene.paint(scene.box(u, t, (-0.07, 0.07), (0.0, height)), "pole", t)
    top = rng.choice(["light", "light", "sign", "sign", "bare"])
    if top == "light":
        mask = scene.box(u, t, (-0.2, 0.2), (height - 0.75, height + 0.1))
        scene.paint(mask, "traffic light", t)
        scene.detail[scene.disc(u, t, (-0.1, 0.1), (height - 0.2, height + 0.05)) & mask] = 1.0
    elif top == "sign":
        shape = scene.disc if rng.random() < 0.5 else scene.box
        mask = shape(u, t, (-0.32, 0.32), (height - 0.5, height + 0.14))
        scene.paint(mask, "traffic sign", t)
        scene.detail[scene.box(u, t, (-0.15, 0.15), (height - 0.24, height - 0.1)) & mask] = 1.0


def _vehicle(scene: _Scene, t: float) -> None:
    """A car, a truck or a bus, on one of the lanes, seen from behind."""
    rng = scene.rng
    kind = str(rng.choice(["car", "car", "truck", "bus"]))
    width, height = {"car": (0.55, 0.95), "truck": (0.62, 1.8), "bus": (0.62, 1.75)}[kind]
    u = rng.choice([-1, 1]) * rng.uniform(0.45, 0.8) * scene.road
    span = (-width * 0.75, width * 0.75)
    body = scene.box(u, t, span, (0.12, height if kind != "car" else height * 0.6))
    if kind == "car":
        body |= scene.box(u, t, (span[0] * 0.75, span[1] * 0.75), (0.4, height))
    if kind == "truck" and rng.random() < 0.5:  # the load overhangs a lower, narrower cabin on one side
        body &= ~scene.box(u, t, (span[0], span[0] * 0.2), (1.2, 2.0))
    wheels = scene.box(u, t, (span[0], span[0] * 0.6), (0.0, 0.25)) | scene.box(
        u, t, (span[1] * 0.6, span[1]), (0.0, 0.25)
    )
    scene.paint(body | wheels, kind, t)
    scene.detail[wheels] = -1.0
    low, high = {"car": (0.62, 0.85), "truck": (0.35, 0.45), "bus": (0.9, 1.5)}[kind]
    scene.detail[scene.box(u, t, (span[0] * 0.65, span[1] * 0.65), (low, high)) & body] = -0.8
    scene.detail[scene.box(u, t, (span[0], span[0] * 0.8), (0.3, 0.45)) & body] = 1.0
    scene.detail[scene.box(u, t, (span[1] * 0.8, span[1]), (0.3, 0.45)) & body] = 1.0


def _train(scene: _Scene, t: float) -> None:
    """A long low tram across the far end of the street or along its side."""
    rng = scene.rng
    u = rng.uniform(-1.5, 1.5)
    length = rng.uniform(2.2, 4.0)
    body = scene.box(u, t, (-length / 2, length / 2), (0.1, 1.5))
    scene.paint(body, "train", t)
    spacing = (scene.x - scene.vanish) / (t * scene.scale) % 0.5
    windows = body & scene.box(u, t, (-length / 2, length / 2), (0.75, 1.2)) & (spacing < 0.36)
    scene.detail[windows] = -1.0


def _pedestrian(scene: _Scene, t: float) -> None:
    """One to three people on a sidewalk, now and then on the road."""
    rng = scene.rng
    u = _curbside(scene) if rng.random() < 0.75 else rng.uniform(-0.8, 0.8) * scene.road
    for i in range(rng.integers(1, 4)):
        _human(scene, u + i * rng.uniform(0.3, 0.45), t, "person", feet=0.0, height=rng.uniform(1.0, 1.25))


def _human(scene: _Scene, u: float, t: float, name: str, *, feet: float, height: float) -> None:
    """Legs, trunk and head."""
    trunk = scene.box(u, t, (-0.17, 0.17), (feet + 0.42 * (height - feet), height - 0.2))
    legs = scene.box(u, t, (-0.12, 0.12), (feet, height - 0.4))
    head = scene.disc(u, t, (-0.1, 0.1), (height - 0.24, height))
    scene.paint(trunk | legs | head, name, t)
    scene.detail[legs & ~trunk] = -0.6
    scene.detail[head] = 0.7


def _two_wheeler(scene: _Scene, t: float) -> None:
    """A bicycle or a motorcycle, mostly with a rider on it."""
    rng = scene.rng
    kind = str(rng.choice(["bicycle", "motorcycle"]))
    u = rng.uniform(-0.95, 0.95) * scene.road
    if rng.random() < 0.75:
        _human(scene, u, t, "rider", feet=0.45, height=rng.uniform(1.25, 1.45))
    if kind == "bicycle":  # from the side: two rings and a bar
        reach = rng.uniform(0.42, 0.55)
        for center in (-reach * 0.6, reach * 0.6):
            wheel = scene.disc(u, t, (center - 0.28, center + 0.28), (0.0, 0.56))
            scene.paint(wheel, "bicycle", t, -0.3)
            scene.detail[scene.disc(u, t, (center - 0.14, center + 0.14), (0.14, 0.42)) & wheel] = 0.8
        scene.paint(scene.box(u, t, (-reach * 0.7, reach * 0.7), (0.42, 0.56)), "bicycle", t, -0.3)
        return
    body = scene.box(u, t, (-0.42, 0.42), (0.28, 0.72)) | scene.disc(u, t, (-0.2, 0.2), (0.0, 0.85))
    scene.paint(body, "motorcycle", t)
    scene.detail[scene.disc(u, t, (-0.12, 0.12), (0.5, 0.75)) & body] = 1.0


def _tree(scene: _Scene, t: float) -> None:
    """A trunk and a crown."""
    rng = scene.rng
    u = rng.choice([-1, 1]) * (scene.walk + rng.uniform(0.0, 0.5))
    crown = rng.uniform(1.4, 2.2)
    scene.paint(scene.box(u, t, (-0.09, 0.09), (0.0, crown)), "vegetation", t, -0.8)
    mask = scene.disc(u, t, (-0.75, 0.75), (crown - 0.4, crown + 1.1))
    mask |= scene.disc(u + 0.3, t, (-0.6, 0.6), (crown - 0.2, crown + 0.8))
    scene.paint(mask, "vegetation", t)


def _own_car(scene: _Scene) -> None:
    """The bonnet of the ego-vehicle: ignored, as in Cityscapes."""
    height, width = scene.label.shape
    reach = height * scene.rng.uniform(0.04, 0.09)
    bow = ((scene.x - width / 2) / (0.42 * width)) ** 2
    scene.paint(scene.y > height - reach * (1 - 0.5 * bow), "own car", 1.0)
