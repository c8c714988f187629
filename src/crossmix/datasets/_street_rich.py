"""The rich look of StreetScenes: a street in perspective, with light, shadow and haze.

Everything but sky and ground is a sprite on an upright plane that faces the camera or runs along the street. Lengths
are in metres: x right of the camera, y above the ground, z ahead. Traffic keeps left.
"""

import math

import numpy as np
from numpy.typing import NDArray

from crossmix.datasets._street_layout import ID
from crossmix.datasets._street_sprites import Array, bare_tree, drawing, facade, foliage, noise, paints

__all__ = ["rich_scene"]

Span = tuple[float, float]
POSTS = ("lamp post", "lamp post", "pole", "traffic light", "traffic light", "ring", "triangle", "disc", "board")
SIZES = {"car": (1.75, 1.45, 4.2), "truck": (2.2, 3.0, 6.5), "bus": (2.5, 4.1, 10.0), "train": (2.6, 3.6, 24.0)}


class _View:
    """The picture, and the camera that looks along the street; (x, y, z) is seen at focal / z * (x, eye - y)."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator) -> None:
        height, width = size
        self.rng = rng
        self.focal = math.sqrt(height * width) * rng.uniform(0.9, 1.2)
        self.eye = rng.uniform(1.2, 1.7)
        self.rows = (np.arange(height) + 0.5 - height * rng.uniform(0.4, 0.54)).astype(np.float32)  # from the horizon
        self.columns = (np.arange(width) + 0.5 - width * rng.uniform(0.35, 0.65)).astype(np.float32)
        self.image = np.empty((height, width, 3), np.float32)
        self.label = np.full(size, ID["sky"], np.uint8)
        self.daylight = math.exp(rng.uniform(math.log(0.35), math.log(1.8)))
        self.haze = rng.uniform(0.5, 0.9) * min(self.daylight + 0.2, 1.0)
        self.sight = math.exp(rng.uniform(math.log(80), math.log(800)))
        grain = _lookup(7 * self.rows[:, None], 7 * self.columns)
        self.light = self.daylight * (1 + 0.06 * grain)

    def facing(self, sprite: Array, name: str, *, x: Span, y: Span, z: float, light: float = 1.0) -> None:
        """Draw a sprite on a plane that faces the camera."""
        unit = self.focal / z
        left, top = x[0] * unit, (self.eye - y[1]) * unit
        right, bottom = max(x[1] * unit, left + 1), max((self.eye - y[0]) * unit, top + 1)  # at least one pixel
        rows, columns = _between(self.rows, top, bottom), _between(self.columns, left, right)
        v = _texel((self.rows[rows, None] - top) / (bottom - top), len(sprite))
        u = _texel((self.columns[columns] - left) / (right - left), sprite.shape[1])
        self._paint((rows, columns), sprite[v, u], name, np.full(1, z, np.float32), light)

    def along(self, sprite: Array, name: str, *, x: float, y: Span, z: Span, light: float = 1.0) -> None:
        """Draw a sprite on a plane along the street; its left end is the near one."""
        columns = _between(self.columns, *sorted(self.focal * x / end for end in z))
        depth = (self.focal * x / self.columns[columns]).clip(*z)
        edges = [(self.eye - height) * self.focal / end for height in y for end in z]
        rows = _between(self.rows, min(edges), max(edges))
        v = (self.rows[rows, None] * (depth / self.focal) + (y[1] - self.eye)) / (y[1] - y[0])
        part = sprite[_texel(v, len(sprite)), _texel((depth - z[0]) / (z[1] - z[0]), sprite.shape[1])]
        part[(v < 0) | (v >= 1), 3] = -1
        self._paint((rows, columns), part, name, depth, light)

    def stand(self, what: str, name: str, *, x: float, half: float, y: Span, z: float) -> None:
        """Draw something small on the ground, in random colours."""
        self.shadow((x - half, x + half), (z, z + 0.5))
        light = self.rng.uniform(0.5, 1.0)
        self.facing(paints(self.rng)[drawing(what)], name, x=(x - half, x + half), y=y, z=z, light=light)

    def shadow(self, x: Span, z: Span) -> None:
        """Darken a rectangle on the ground."""
        rows = _between(self.rows, self.eye * self.focal / z[1], self.eye * self.focal / z[0])
        across = self.columns * self.eye / self.rows[rows, None]
        self.image[rows][(across > x[0]) & (across < x[1])] *= 0.4

    def _paint(self, window: tuple[slice, slice], part: Array, name: str, z: Array, light: float) -> None:
        clear = np.exp(-z / self.sight)
        color = part[..., :3] * (self.light[window] * (float(light) * clear))[..., None]
        color += (self.haze * (1 - clear))[:, None] - self.image[window]
        self.image[window] += np.maximum(part[..., 3:], 0) * color
        self.label[window][part[..., 3] >= 0] = ID[name]


def _between(axis: Array, low: float, high: float) -> slice:
    """The pixels with their centres between two positions, at least one if it is in the picture."""
    return slice(*np.searchsorted(axis, (low, max(high, low + 1))))


def _texel(fraction: Array, count: int) -> NDArray[np.int64]:
    return (fraction * count).astype(np.int64).clip(0, count - 1)


def _lookup(y: Array, x: Array) -> Array:
    """Noise at these coordinates."""
    found: Array = noise()[y.astype(np.int32) & 255, x.astype(np.int32) & 255]
    return found


def rich_scene(size: tuple[int, int], rng: np.random.Generator) -> tuple[Array, NDArray[np.uint8]]:
    """Draw one scene: an (H, W, 3) image in about [0, 1], and (H, W) train ids."""
    view = _View(size, rng)
    curbs = (-rng.uniform(1.6, 4.0), rng.uniform(3.0, 7.0))
    walks = (curbs[0] - rng.uniform(1.5, 5.0), curbs[1] + rng.uniform(1.5, 5.0))  # where the sidewalks end
    lights = tuple(rng.permutation([rng.uniform(0.9, 1.6), rng.uniform(0.4, 1.0)]))  # on the left and on the right
    junction = rng.uniform(8, 60)
    _sky(view)
    _ground(view, curbs, walks, junction=junction, lights=lights)
    _distance(view)
    for walk, light in zip(walks, lights, strict=True):
        _roadside(view, walk, junction, light)
    _things(view, curbs, walks)
    return _photographed(view), view.label


def _sky(view: _View) -> None:
    """Bright at the horizon, blue or white above, with or without clouds."""
    rng = view.rng
    rows = slice(0, np.searchsorted(view.rows, 0.3))
    up = (-view.rows[rows, None] / view.focal).clip(0)
    far = 100 / (up + 0.15)
    clouds = float(rng.choice([0, 0.05, 0.12])) * _lookup(far, far * view.columns / view.focal)
    zenith = np.array([0.45, 0.7, 1.0]) + rng.uniform(0, 0.5) * np.array([1.0, 0.55, 0.0])
    color = 0.95 + (zenith - 0.95) * (up * 2.5).clip(0, 1)[..., None]
    bright = rng.uniform(0.8, 1.4) * (0.4 + 0.6 * min(view.daylight, 1.0))
    view.image[rows] = (color * bright).astype(np.float32) + (clouds * bright)[..., None]


def _ground(view: _View, curbs: Span, walks: Span, *, junction: float, lights: Span) -> None:
    """Grass, sidewalk, and road with its markings; and the shadow of the houses on the darker side."""
    rng = view.rng
    rows = slice(np.searchsorted(view.rows, 0.3), None)
    z = view.focal * view.eye / view.rows[rows, None]
    x = view.columns * z / view.focal
    crossing = abs(z - junction) < 4
    road = ((x > curbs[0]) & (x < curbs[1])) | crossing
    code = np.where((x > walks[0]) & (x < walks[1]), 1, 0)  # 0 grass, 1 sidewalk
    code[(x > curbs[0] - 0.15) & (x < curbs[1] + 0.15)] = 2  # curbs, then 3 asphalt, 4 white, 5 yellow
    code[road] = 3
    dashes = (z / rng.choice([3.0, 6.0]) + rng.random()) % 1 < 0.5
    inset = abs(x - np.mean(curbs)) - np.ptp(curbs) / 2 + rng.uniform(0.3, 0.5)
    code[(abs(inset) < 0.06) & ~crossing] = rng.choice([3, 4, 5])
    code[(abs(x - rng.uniform(1.2, 3.0)) < 0.07) & dashes & ~crossing] = 4
    code[road & (abs(z - junction + 6) < 1.5) & (x % 1.2 < 0.6)] = 4
    asphalt, walk = rng.uniform(0.2, 0.45) + rng.normal(0, 0.01, 3), rng.uniform(0.25, 0.5) + np.array([0.02, 0, -0.02])
    colors = np.array([(0.25, 0.3, 0.14), walk, walk * 1.2, asphalt, (0.75, 0.75, 0.75), (0.6, 0.5, 0.2)], np.float32)
    shade = 1 + 0.1 * _lookup(z * 25, x * 25) + 0.06 * _lookup(z * 2, x * 2)
    side = lights.index(min(lights))
    edge = rng.uniform(-0.4, 1.0) * walks[side]
    shade[(x > edge) if side else (x < edge)] *= 0.4 + 0.6 * min(lights)
    clear = np.exp(-z / view.sight)
    view.image[rows] = colors[code] * (view.daylight * shade * clear)[..., None] + (view.haze * (1 - clear))[..., None]
    names = ("terrain", "sidewalk", "sidewalk", "road", "road", "road")
    view.label[rows] = np.array([ID[name] for name in names], np.uint8)[code]


def _distance(view: _View) -> None:
    """Houses and trees at the end of the street."""
    rng, house = view.rng, facade(view.rng, 3, 4)
    for x in np.arange(-90, 90, 15) + rng.uniform(-5, 5):
        z, half = rng.uniform(90, 160), rng.uniform(6, 12)
        if rng.random() < 0.5:
            view.facing(house, "building", x=(x - half, x + half), y=(0, rng.uniform(6, 14)), z=z)
        else:
            _tree(view, x, half, z)


def _tree(view: _View, x: float, half: float, z: float) -> None:
    rng = view.rng
    sprite = (bare_tree if rng.random() < 0.7 else foliage)(int(rng.integers(8)))
    across, top = (x - half, x + half), half * rng.uniform(1.8, 2.4)
    view.facing(sprite, "vegetation", x=across, y=(0, top), z=z, light=rng.uniform(0.5, 1.6))


def _roadside(view: _View, walk: float, junction: float, light: float) -> None:
    """Houses and gardens along one side of the street, with a gap at the junction."""
    rng = view.rng
    built, height = rng.choice([0.4, 0.8, 0.95]), rng.uniform(6, 14)
    ends = [1.0]
    while ends[-1] < 100:
        ends.append(ends[-1] + rng.uniform(5, 20))
    for z in zip(ends[-2::-1], ends[:0:-1], strict=True):  # distant ones first
        if z[0] < junction + 4 and z[1] > junction - 4:
            continue
        setback = rng.choice([1.0, 1.02, 1.4])
        if rng.random() < built:
            _house(view, walk * setback, z, height * rng.uniform(0.7, 1.4), light)
        else:
            _garden(view, walk, z)
        if setback > 1 and rng.random() < 0.8:
            _edging(view, walk, z, light)


def _house(view: _View, x: float, z: Span, height: float, light: float) -> None:
    """Two walls of a house: its end, and the one along the street."""
    sprite = facade(view.rng, max(round(height / 3), 1), max(round((z[1] - z[0]) / 3), 1))
    view.facing(sprite, "building", x=(x, x + 9) if x > 0 else (x - 9, x), y=(0, height), z=z[0], light=0.8)
    view.along(sprite, "building", x=x, y=(0, height), z=z, light=light)


def _garden(view: _View, walk: float, z: Span) -> None:
    """Trees beside the sidewalk."""
    for depth in sorted(view.rng.uniform(max(z[0], 8), max(z[1], 9), view.rng.integers(1, 6)), reverse=True):
        _tree(view, walk * view.rng.uniform(1.1, 2.0), view.rng.uniform(2, 4.5), depth)


def _edging(view: _View, walk: float, z: Span, light: float) -> None:
    """A hedge, a wall or a fence along the sidewalk."""
    rng = view.rng
    kind = str(rng.choice(["vegetation", "wall", "fence", "fence"]))
    if kind == "vegetation":
        sprite = foliage(int(rng.integers(8)), hedge=True)
    elif kind == "wall":
        sprite = facade(rng, 1, 4)[-1:]  # below the windows
    else:
        sprite = np.full((16, 16 * math.ceil(z[1] - z[0]), 4), rng.choice([0.08, 0.3, 0.7]), np.float32)
        sprite[..., 3] = 0
        sprite[:2, :, 3] = sprite[-4:-2, :, 3] = sprite[:, :: rng.choice([2, 4, 8]), 3] = 1
    view.along(sprite, kind, x=walk, y=(0, rng.uniform(0.8, 2.5)), z=z, light=light)


def _things(view: _View, curbs: Span, walks: Span) -> None:
    """Parked cars, traffic, people and posts, distant ones first."""
    rng = view.rng
    things: list[tuple[float, str, float]] = []  # distance, kind, x
    for side, (curb, walk) in enumerate(zip(curbs, walks, strict=True)):
        parked, start = rng.choice([0, 0, 0.5, 0.9]), rng.uniform(4, 12)
        lane = rng.uniform(-0.5, 0.5) if side == 0 else (curb + 0.5) / 2
        x = curb + (1 - 2 * side) * rng.uniform(0.9, 1.2)
        things += [(z, "car", x) for z in np.arange(start, rng.uniform(20, 70), 5.6) if rng.random() < parked]
        kinds = rng.choice(["car", "car", "car", "car", "truck", "bus", "train"], rng.integers(0, 3))
        things += [(rng.uniform(7, 45), str(kind), lane) for kind in kinds]
        kinds = rng.choice(["person", "person", "post", "post", "post", "tree"], rng.integers(4, 16))
        things += [(rng.uniform(7, 50), str(kind), rng.uniform(min(curb, walk), max(curb, walk))) for kind in kinds]
    things += [(rng.uniform(6, 30), "cycle", rng.uniform(curbs[0] + 0.5, curbs[1])) for _ in range(rng.integers(0, 5))]
    for z, kind, x in sorted(things, reverse=True):
        if kind in SIZES:
            _vehicle(view, kind, x, z, oncoming=x > 1)
        elif kind == "person":
            view.stand("person", "person", x=x, half=rng.uniform(0.22, 0.32), y=(0, rng.uniform(1.5, 1.9)), z=z)
        elif kind == "tree":
            _tree(view, x, rng.uniform(2, 4), z)
        else:
            (_post if kind == "post" else _cycle)(view, x, z)


def _vehicle(view: _View, kind: str, x: float, z: float, *, oncoming: bool) -> None:
    """The end and one side of a vehicle; the cabin of a car is further away than its lower part."""
    rng = view.rng
    width, height, length = (size * rng.uniform(0.92, 1.08) for size in SIZES[kind])
    colors, light = paints(rng), rng.uniform(0.7, 1.1)
    across = (x - width / 2, x + width / 2)
    view.shadow((across[0] - 0.1, across[1] + 0.1), (z, z + length))
    model = "bus" if kind == "train" else kind
    end = colors[drawing(f"{model} end" if kind != "car" else "car front" if oncoming else "car rear")]
    low = len(end) * 35 // 100 if kind == "car" else 0
    if kind == "car":
        behind = 1.1 if oncoming else rng.choice([0.2, 0.8])
        view.facing(end, kind, x=across, y=(0, height), z=z + behind, light=light)
    if across[0] > 0 or across[1] < 0:
        side = colors[drawing(f"{model} side")][:, :: -1 if oncoming else 1]
        view.along(side, kind, x=min(across, key=abs), y=(0, height), z=(z, z + length), light=light * 0.9)
    view.facing(end[low:], kind, x=across, y=(0, height * (1 - low / len(end))), z=z, light=light)


def _cycle(view: _View, x: float, z: float) -> None:
    """A bicycle or a motorcycle, turned at random, mostly with a rider."""
    kind = str(view.rng.choice(["bicycle", "bicycle", "motorcycle"]))
    if view.rng.random() < 0.8:
        view.stand("rider", "rider", x=x, half=0.3, y=(0.35, view.rng.uniform(1.65, 1.85)), z=z)
    view.stand(kind, kind, x=x, half=view.rng.uniform(0.2, 0.9), y=(0, 1.1), z=z)


def _post(view: _View, x: float, z: float) -> None:
    """A lamp post, a bollard, or a pole with a traffic light or a sign."""
    rng = view.rng
    kind = str(rng.choice(POSTS))
    if kind == "lamp post":
        view.stand(kind, "pole", x=x, half=rng.uniform(0.6, 1.0), y=(0, rng.uniform(5, 8)), z=z)
        return
    top, half = rng.uniform(2.0, 3.2), rng.uniform(0.35, 0.6)
    view.stand("pole", "pole", x=x, half=0.12, y=(0, top if kind != "pole" else top / 2), z=z)
    if kind == "traffic light":
        view.stand(kind, kind, x=x, half=half / 2, y=(top - half, top + half), z=z)
    elif kind != "pole":
        view.stand(kind, "traffic sign", x=x, half=half, y=(top - half, top + half), z=z)


def _photographed(view: _View) -> Array:
    """Contrast, tint, a little blur, and noise of the sensor."""
    rng, image = view.rng, view.image.clip(0, 1)
    image *= 1 + rng.uniform(-0.3, 0.4) * (image - 1)
    image *= (1 + rng.normal(0, 0.03, 3)).astype(np.float32)
    blur = rng.uniform(0, 0.2)
    for moved in (image, image.swapaxes(0, 1)):
        moved[1:-1] += blur * (moved[2:] + moved[:-2] - 2 * moved[1:-1])
    image += rng.uniform(0.01, 0.08) * (rng.random(image.shape, np.float32) - 0.5)
    return image
