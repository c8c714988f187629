"""Scaling of the operations with batch size, image size and number of classes.

- `mix`: `CrossDomainMix`, including class masks and the random draw.
- `augment`: `StrongAugment`.
- `loss`: `upsampled_cross_entropy` from 1/8 logits, forward and backward.
- `pseudo-labels`: softmax, maximum and confidence weights of full-size logits.

Each series varies one quantity. `exponent` is the least-squares slope of log(time) over log(quantity): 1 is linear, 0
is constant. `exponent_last` is the slope of the last three points, where the fixed cost of a call is negligible. Batch
and image size should scale linearly, and so should the classes in loss and pseudo-labels, which read one number per
class. The mix reads one label per pixel for any number of classes, with bit operations up to 31 classes and a table
beyond.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.speed.common import interleave, is_cuda
from benchmarks.speed.mixing import street_like
from crossmix import CrossDomainMix, StrongAugment
from crossmix import functional as F


class Shape(NamedTuple):
    batch: int
    size: tuple[int, int]
    classes: int = 19

    @property
    def pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]


Call = Callable[[], object]


def mix(shape: Shape, device: str) -> Call:
    batch = street_like(shape.batch, shape.size, torch.uint8, device, num_classes=shape.classes)
    mixer = CrossDomainMix(shape.classes, include_ignored=True)
    return lambda: mixer(*batch)


def augment(shape: Shape, device: str) -> Call:
    images = torch.rand(shape.batch, 3, *shape.size, device=device)
    strong = StrongAugment(flavor="additive")
    return lambda: strong(images)


def loss(shape: Shape, device: str) -> Call:
    _, labels, _, _, weights = street_like(shape.batch, shape.size, torch.uint8, device, num_classes=shape.classes)
    small = [side // 8 + 1 for side in shape.size]
    logits = torch.randn(shape.batch, shape.classes, *small, device=device, requires_grad=True)
    return lambda: torch.autograd.grad(F.upsampled_cross_entropy(logits, labels, weights), logits)


def pseudo_labels(shape: Shape, device: str) -> Call:
    logits = torch.randn(shape.batch, shape.classes, *shape.size, device=device)
    return lambda: F.confidence_weight(F.pseudo_label(logits).confidence)


OPERATIONS = {"mix": mix, "augment": augment, "loss": loss, "pseudo-labels": pseudo_labels}
CLASS_COUNTS = (19, 31, 32, 63, 150)
MOST = {"mix": 64, "augment": 16, "loss": 16, "pseudo-labels": 16}  # images of a batch


def series(device: str, *, quick: bool) -> dict[tuple[str, str], list[Shape]]:
    """The shapes of every series; smaller images on a CPU, and fewer, smaller steps with `quick`."""
    size = (512, 512) if is_cuda(device) else (64, 128) if quick else (128, 256)
    heights = [32, 64, 128] if quick else [64, 128, 256, 512, 1024]
    found = {}
    for name, most in MOST.items():
        batches = [2**i for i in range(0, most.bit_length(), 2 if quick else 1)]
        found[name, "batch"] = [Shape(n, size) for n in batches]
        found[name, "pixels"] = [Shape(2, (height, 2 * height)) for height in heights]
        if name != "augment":
            found[name, "classes"] = [Shape(2, size, count) for count in CLASS_COUNTS]
    return found


def grown(axis: str, shape: Shape) -> int:
    return {"batch": shape.batch, "pixels": shape.size[0] * shape.size[1], "classes": shape.classes}[axis]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Least-squares slope of log(y) over log(x)."""
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    mean_x, mean_y = (math.fsum(column) / len(logs) for column in zip(*logs, strict=True))
    across = math.fsum((x - mean_x) * (y - mean_y) for x, y in logs)
    return across / math.fsum((x - mean_x) ** 2 for x, _ in logs)


def measure(device: str, rounds: int, *, quick: bool) -> list[dict[str, object]]:
    torch.manual_seed(0)
    results: list[dict[str, object]] = []
    for (name, axis), shapes in series(device, quick=quick).items():
        calls = {str(i): OPERATIONS[name](shape, device) for i, shape in enumerate(shapes)}
        rows = interleave(calls, rounds=rounds, device=device).values()
        xs, times = [grown(axis, shape) for shape in shapes], [row["median_ms"] for row in rows]
        each = [1e6 * time / shape.pixels for time, shape in zip(times, shapes, strict=True)]
        whole, last = slope(xs, times), slope(xs[-3:], times[-3:])
        print(f"\n{name} by {axis}, {device}: exponent {whole:.2f}, of the last three points {last:.2f}")
        points = []
        for x, row, shape, ns in zip(xs, rows, shapes, each, strict=True):
            print(f"  {x:9}  {row['median_ms']:9.3f} ms  (IQR {row['iqr_ms']:7.3f})  {ns:8.3f} ns per pixel")
            points.append({**shape._asdict(), **row, "ns_per_pixel": ns})
        found = {"grown": xs, "points": points, "exponent": whole, "exponent_last": last}
        results.append({"operation": name, "axis": axis, **found})
    return results
