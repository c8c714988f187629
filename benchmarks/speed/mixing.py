"""Class masks and the mix of images, labels and weights, compared with common implementations.

- `crossmix`: `CrossDomainMix` as a user calls it, including checks and the random draw.
- `crossmix compiled`: the same under `torch.compile`, with `scores` drawn outside, since generators cannot be traced.
- `crossmix boxes`, `crossmix blobs`: the same with `masks=BoxMasks()` and `masks=CowMasks()` instead of classes.
- `released loop`: our reimplementation of the released DACS code's loop over images: `unique`, a random choice on the
  host, one comparison per drawn class, and three blends M * source + (1 - M) * target.
- `whole-batch unique`: the variant of its best-known descendants, which search the whole batch for classes, once per
  image.
- `kornia transplant`: `RandomTransplantation`, the closest operation in kornia. It pastes one class of the neighbouring
  image into images and labels only, so it does less.
- `floor`, `floor compiled`: one `torch.where` each over images, labels and weights with a ready mask.
- `copy`: `clone` of images, labels and weights, which reads and writes one batch and so gives the memory bandwidth.
  `share_of_copy` is the share of that bandwidth that a candidate reaches, counting each input and output once.
"""

from collections.abc import Callable

import kornia.augmentation
import numpy as np
import torch
from torch import Tensor

from benchmarks.speed.common import Rows, compare, is_cuda
from crossmix import BoxMasks, CowMasks, CrossDomainMix
from crossmix import functional as F

CLASSES = 19
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def street_like(n: int, size: tuple[int, int], dtype: torch.dtype, device: str, *, num_classes: int = CLASSES) -> Batch:
    """Images, blocky labels with a few ignored pixels, pseudo-labels and weights."""
    height, width = size
    block = -(-height // 16)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, n, 3, height, width, generator=generator)
    blocks = torch.randint(0, num_classes, (2, n, -(-height // block), -(-width // block)), generator=generator)
    labels = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width].contiguous()
    labels[0, :, : -(-height // 64)] = 255
    weights = torch.rand(n, 1, 1, generator=generator).expand(n, height, width).contiguous()
    batch = (images[0], labels[0].to(dtype), images[1], labels[1].to(dtype), weights)
    return tuple(tensor.contiguous().to(device) for tensor in batch)  # type: ignore[return-value]


def blend(mask: Tensor, pasted: Tensor, base: Tensor) -> Tensor:
    return mask * pasted + (1 - mask) * base


def host_choice(classes: Tensor, _: int) -> Tensor:
    """Choose half of the classes, rounded up, on the host."""
    count = len(classes)
    chosen = np.random.choice(count, (count + 1) // 2, replace=False)  # noqa: NPY002 - as the released code does
    return classes[torch.as_tensor(chosen, device=classes.device)]


def per_image_loop(
    batch: Batch, *, whole_batch: bool = False, choose: Callable[[Tensor, int], Tensor] = host_choice
) -> tuple[Tensor, Tensor, Tensor]:
    """The released loop, or its variant that searches the whole batch; `choose` takes classes and image index."""
    images, labels, target_images, target_labels, weights = batch
    mixed: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for i in range(len(images)):
        chosen = choose(torch.unique(labels if whole_batch else labels[i]), i)
        mask = (labels[i][None] == chosen[:, None, None]).sum(0)
        mixed[0].append(blend(mask, images[i], target_images[i]))
        mixed[1].append(blend(mask.to(labels.dtype), labels[i], target_labels[i]))
        mixed[2].append(blend(mask, torch.ones_like(weights[i]), weights[i]))
    return torch.stack(mixed[0]), torch.stack(mixed[1]), torch.stack(mixed[2])


def table(n: int, size: int, dtype: torch.dtype, rounds: int, device: str) -> Rows:
    batch = street_like(n, (size, size), dtype, device)
    images, labels, target_images, target_labels, weights = batch
    mixer = CrossDomainMix(CLASSES, include_ignored=True)
    boxes, blobs = CrossDomainMix(CLASSES, masks=BoxMasks()), CrossDomainMix(CLASSES, masks=CowMasks())
    mask = F.class_mask(labels, mixer.sample(labels))
    transplant = kornia.augmentation.RandomTransplantation(p=1.0)
    pairs = torch.stack([images, target_images], 1).flatten(0, 1)
    pair_labels = torch.stack([labels, target_labels], 1).flatten(0, 1)

    def floor() -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.where(mask[:, None], images, target_images),
            torch.where(mask, labels, target_labels),
            torch.where(mask, 1.0, weights),
        )

    torch.compiler.reset()  # otherwise a second size would be compiled with dynamic shapes
    fast, fast_floor = torch.compile(mixer, fullgraph=True), torch.compile(floor, fullgraph=True)
    candidates: dict[str, Callable[[], object]] = {
        "copy": lambda: (images.clone(), labels.clone(), weights.clone()),
        "floor": floor,
        "floor compiled": fast_floor,
        "crossmix": lambda: mixer(*batch),
        "crossmix boxes": lambda: boxes(*batch),
        "crossmix blobs": lambda: blobs(*batch),
        "crossmix compiled": lambda: fast(*batch, scores=torch.rand(n, CLASSES + 1, device=device)),
        "released loop": lambda: per_image_loop(batch),
        "whole-batch unique": lambda: per_image_loop(batch, whole_batch=True),
        "kornia transplant": lambda: transplant(pairs[:n], pair_labels[:n]),
    }
    title = f"{n} x 3 x {size} x {size}, {labels.dtype} labels, {device}"
    rows = compare(title, candidates, "crossmix", rounds=rounds, device=device)
    copied = 2 * sum(tensor.nbytes for tensor in (images, labels, weights)) / rows["copy"]["median_ms"]
    moved = 3 * (images.nbytes + labels.nbytes) + 2 * weights.nbytes + mask.nbytes
    for name in ("floor", "floor compiled", "crossmix", "crossmix compiled"):
        rows[name]["share_of_copy"] = moved / rows[name]["median_ms"] / copied
    return rows


def measure(device: str, rounds: int, *, quick: bool) -> list[dict[str, object]]:  # noqa: ARG001 - quick enough
    results: list[dict[str, object]] = []
    for n in (8, 32) if is_cuda(device) else (8,):
        for dtype in (torch.int64, torch.uint8):
            rows = table(n, 512, dtype, rounds, device)
            ratio = rows["released loop"]["median_ms"] / rows["crossmix"]["median_ms"]
            share = rows["crossmix"]["share_of_copy"]
            print(
                f"  crossmix is {ratio:.2f} times as fast as the released loop, with {share:.2f} of a copy's bandwidth"
            )
            results.append({"batch": n, "size": 512, "labels": str(dtype).removeprefix("torch."), "rows": rows})
    return results
