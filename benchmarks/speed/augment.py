"""Colour jitter and Gaussian blur of every image, compared with kornia's modules.

- `kornia`: `ColorJiggle` (the old semantics), which draws one order of operations for the whole batch, and
  `RandomGaussianBlur` with 51 taps per axis, as in the released code.
- `crossmix eager`, `crossmix compiled`: `StrongAugment` as a user calls it, including checks and the random draw, with
  an order per image. The compiled one gets its draw from outside, since generators cannot be traced.
- `copy`: `clone` of the images, the minimum for any augmentation.

Before timing, each crossmix candidate is compared with kornia's functional operations, applied to one image at a time
in the drawn order.
"""

import math
from collections.abc import Callable
from functools import partial

import kornia.augmentation
import kornia.enhance
import kornia.filters
import torch
from torch import Tensor

from benchmarks.speed.common import compare
from crossmix import StrongAugment

STRENGTH = 0.25
SIGMA = (0.15, 1.15)
TAPS = 51


def one_by_one(images: Tensor, draw: tuple[Tensor, ...]) -> Tensor:
    """Apply kornia's functional operations as drawn, image by image."""
    jitter, order, brightness, contrast, saturation, hue, blur, sigma = draw
    done = []
    for i in range(len(images)):
        operations = (
            partial(kornia.enhance.adjust_brightness, factor=float(brightness[i]) - 1),
            partial(kornia.enhance.adjust_contrast, factor=float(contrast[i])),
            partial(kornia.enhance.adjust_saturation, factor=float(saturation[i])),
            partial(kornia.enhance.adjust_hue, factor=2 * math.pi * float(hue[i])),
        )
        image = images[i : i + 1]
        for operation in order[i].tolist() if bool(jitter[i]) else ():
            image = operations[operation](image)
        if bool(blur[i]):
            image = kornia.filters.gaussian_blur2d(image, (TAPS, TAPS), (float(sigma[i]), float(sigma[i])))
        done.append(image)
    return torch.cat(done)


def measure(device: str, rounds: int, *, quick: bool) -> list[dict[str, object]]:
    """Times of all candidates on the same batch, and their errors against `one_by_one`."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 512, 512).to(device)
    results: list[dict[str, object]] = []
    parts = (("whole", True, True), ("jitter", True, False), ("blur", False, True))
    for name, jitter, blur in parts[:1] if quick else parts:
        torch.compiler.reset()
        augment = StrongAugment(flavor="additive", jitter_p=float(jitter), blur_p=float(blur))
        jiggle = kornia.augmentation.ColorJiggle(STRENGTH, STRENGTH, STRENGTH, STRENGTH, p=float(jitter))
        gauss = kornia.augmentation.RandomGaussianBlur((TAPS, TAPS), SIGMA, p=float(blur))
        modules = torch.nn.Sequential(*[module for module, used in ((jiggle, jitter), (gauss, blur)) if used])
        compiled = torch.compile(augment, fullgraph=True)
        sample = partial(augment.sample, len(images), device=device)
        draw = sample()
        want = one_by_one(images, draw)
        errors = {
            name: float((candidate(images, draw=draw) - want).abs().max())
            for name, candidate in (("crossmix eager", augment), ("crossmix compiled", compiled))
        }
        candidates: dict[str, Callable[[], object]] = {
            "copy": images.clone,
            "kornia": partial(modules, images),
            "crossmix eager": partial(augment, images),
            "crossmix compiled": lambda compiled=compiled, sample=sample: compiled(images, draw=sample()),  # type: ignore[misc]
        }
        rows = compare(f"{name}, 8 x 3 x 512 x 512, {device}", candidates, "kornia", rounds=rounds, device=device)
        print(", ".join(f"error of {candidate} {error:.1e}" for candidate, error in errors.items()))
        ratios = {key: rows[key]["median_ms"] / rows["kornia"]["median_ms"] for key in errors}
        results.append({"what": name, "batch": 8, "size": 512, "rows": rows, "of_kornia": ratios, "error": errors})
    return results
