"""Slow statements of what the library computes, pixel by pixel, from the paper and from what the released code does."""

import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import kornia.enhance
import kornia.filters
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crossmix.augment import AugmentDraw


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square(counts: Tensor, shares: Tensor | list[float]) -> float:
    """How far counts are from the law, over the value that chance exceeds once in 10,000 times."""
    shares = torch.as_tensor(shares, dtype=torch.float64)
    expected = shares * int(counts.sum())
    assert abs(float(shares.sum()) - 1) < 1e-9
    assert expected.min() > 5
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    return float(((counts - expected) ** 2 / expected).sum()) / limit


def classes_by_loop(
    labels: Tensor, num_classes: int, scores: Tensor, ratio: float, ignore_index: int, ignored: bool
) -> Tensor:
    """Per image: the present ids, sorted by score and id, the first ceil(ratio * n)."""
    chosen = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool)
    for i, label in enumerate(labels):
        present = set()
        for value in label.flatten().tolist():
            if value != ignore_index and 0 <= value < num_classes:
                present.add(value)
            elif ignored:
                present.add(num_classes)
        ranked = sorted(present, key=lambda c: (float(scores[i, c]), c))
        for c in ranked[: math.ceil(ratio * len(ranked))]:
            chosen[i, c] = True
    return chosen


def mask_by_loop(labels: Tensor, classes: Tensor, ignore_index: int) -> Tensor:
    num_classes = classes.shape[1] - 1
    mask = torch.zeros(labels.shape, dtype=torch.bool)
    for i, row, column in np.ndindex(*labels.shape):
        value = int(labels[i, row, column])
        known = value != ignore_index and 0 <= value < num_classes
        mask[i, row, column] = classes[i, value if known else num_classes]
    return mask


def cross_entropy_by_loop(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int, normalizer: str, smoothing: float
) -> float:
    """In Python floats, one pixel at a time."""
    n, num_classes, height, width = logits.shape
    total, valid, weight_sum = 0.0, 0, 0.0
    for i, row, column in np.ndindex(n, height, width):
        label = int(labels[i, row, column])
        if label == ignore_index or not 0 <= label < num_classes:
            continue
        z = [float(v) for v in logits[i, :, row, column]]
        top = max(z)
        log_sum = top + math.log(sum(math.exp(v - top) for v in z))
        log_p = [v - log_sum for v in z]
        w = 1.0 if weights is None else float(weights[i] if weights.ndim == 1 else weights[i, row, column])
        total += w * (-(1 - smoothing) * log_p[label] - smoothing * sum(log_p) / num_classes)
        valid += 1
        weight_sum += w
    divisor = {"all": float(n * height * width), "valid": float(valid), "weights": weight_sum}[normalizer]
    return total / divisor if divisor else 0.0


def confidence_weights_by_loop(confidence: Tensor, threshold: float, scope: str) -> Tensor:
    weights = torch.ones_like(confidence)
    flags = [[float(v) >= threshold for v in image.flatten()] for image in confidence]
    everything = [flag for image in flags for flag in image]
    for i, image in enumerate(flags):
        if scope == "image":
            weights[i] = sum(image) / len(image)
        elif scope == "batch":
            weights[i] = sum(everything) / len(everything)
        elif scope == "pixel":
            weights[i] = torch.tensor(image, dtype=confidence.dtype).reshape(confidence[i].shape)
    return weights


def small_network(num_classes: int, *, stride: int = 1) -> nn.Module:
    """A network of two convolutions, always the same."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, padding=1, stride=stride)
    return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1))


class SlowNetwork(nn.Module):
    """Convolution, BatchNorm, convolution: small enough to restate by hand, with batch statistics that matter."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.conv(images))))
        return out


def with_batch_statistics(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
    """`SlowNetwork` on the statistics of the batch, from its parameters alone."""
    x = torch.nn.functional.conv2d(images, parameters["conv.weight"], parameters["conv.bias"], padding=1)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    x = (x - mean) / (variance + 1e-5).sqrt()
    x = x * parameters["norm.weight"][:, None, None] + parameters["norm.bias"][:, None, None]
    return torch.nn.functional.conv2d(x.clamp(min=0), parameters["head.weight"], parameters["head.bias"])


def softmax(logits: Tensor) -> Tensor:
    e = (logits - logits.max(1, keepdim=True).values).exp()
    return e / e.sum(1, keepdim=True)


def mean_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor, divisor: float) -> Tensor:
    """Differentiable, but by explicit gathering of the valid pixels."""
    log_p = softmax(logits).log()
    total = logits.sum() * 0
    for i, row, column in np.ndindex(*labels.shape):
        label = int(labels[i, row, column])
        if label != 255:
            total = total - weights[i, row, column] * log_p[i, label, row, column]
    return total / divisor


def paste(pasted: Sequence[Tensor], base: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """M * A + (1 - M) * B."""
    out = []
    for a, b in zip(pasted, base, strict=True):
        m = (mask[:, None] if a.ndim == 4 else mask).to(a.dtype)
        out.append(m * a + (1 - m) * b)
    return out


def augment_one_by_one(images: Tensor, draw: AugmentDraw, flavor: str) -> Tensor:
    """The drawn operations by kornia, one image and one operation after the other, and a blur of 51 taps."""
    out = []
    for i in range(len(images)):
        image = images[i : i + 1]
        if draw.jitter[i]:
            for operation in draw.order[i].tolist():
                image = colour_operation(image, draw, i, operation, flavor)
        if draw.blur[i]:
            taps = [min(51, 2 * length - 1) for length in image.shape[2:]]  # kornia can only reflect
            image = kornia.filters.gaussian_blur2d(image, taps, (float(draw.sigma[i]),) * 2)
        out.append(image)
    return torch.cat(out)


def colour_operation(image: Tensor, draw: AugmentDraw, i: int, operation: int, flavor: str) -> Tensor:
    brightness, contrast, saturation = (float(v[i]) for v in (draw.brightness, draw.contrast, draw.saturation))
    grey = (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    additive = flavor == "additive"
    if operation == 0:
        return (image + (brightness - 1) if additive else image * brightness).clamp(0, 1)
    if operation == 1:
        return (image * contrast if additive else contrast * image + (1 - contrast) * grey.mean()).clamp(0, 1)
    if operation == 2:
        if additive:
            return kornia.enhance.adjust_saturation(image, saturation)
        return (saturation * image + (1 - saturation) * grey).clamp(0, 1)
    return kornia.enhance.adjust_hue(image, float(draw.hue[i]) * 2 * math.pi)


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    return torch.randint(0, 256, (height, width, 3), generator=seeded(seed)).numpy().astype(np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def flipped(data: bytes, place: int | None = None, bits: int = 1) -> bytes:
    """Some bits of a byte another way, in the middle by default."""
    place = len(data) // 2 if place is None else place
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def png_file(path: Path, size: tuple[int, int], bits: int, color: int, lines: bytes, *, palette: bool = False) -> Path:
    """A PNG, written from the specification; each line begins with its filter."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", size[1], size[0], bits, color, 0, 0, 0)
    colours = chunk(b"PLTE", bytes(3 << bits)) if palette else b""
    body = chunk(b"IHDR", header) + colours + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def deep_png(path: Path, pixels: np.ndarray) -> Path:
    """Of 16 bits, grey or RGB: high byte first."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return png_file(path, pixels.shape[:2], 16, {1: 0, 3: 2}[pixels.shape[2]], lines)
