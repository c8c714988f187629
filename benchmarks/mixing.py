"""Class masks and the mix of images, labels and weights, against what the field does.

- `crossmix`: `CrossDomainMix` as a user calls it, checks and random draw included.
- `released loop`: our own statement of what the released DACS code does image by image: `unique`, a random choice on
  the host, one comparison per drawn class, and three blends M * source + (1 - M) * target.
- `whole-batch unique`: the variant of its best-known descendants, which look for the classes in the whole batch, once
  per image.
- `kornia transplant`: `RandomTransplantation`, the nearest operation in kornia: it pastes one class of the neighbouring
  image, into images and labels alone, so it does less.
- `floor`: one `torch.where` each over images, labels and weights with a ready mask.
"""

import kornia.augmentation
import numpy as np
import torch
from torch import Tensor

from common import arguments, interleave, save, show
from crossmix import CrossDomainMix
from crossmix import functional as F

CLASSES = 19
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def street_like(n: int, size: int, dtype: torch.dtype, device: str) -> Batch:
    """Images, blocky labels with a few ignored pixels, pseudo-labels and weights."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, n, 3, size, size, generator=generator)
    blocks = torch.randint(0, CLASSES, (2, n, size // 32, size // 32), generator=generator)
    labels = blocks.repeat_interleave(32, 2).repeat_interleave(32, 3)
    labels[0, :, :8] = 255
    weights = torch.rand(n, 1, 1, generator=generator).expand(n, size, size).contiguous()
    batch = (images[0], labels[0].to(dtype), images[1], labels[1].to(dtype), weights)
    return tuple(tensor.contiguous().to(device) for tensor in batch)  # type: ignore[return-value]


def blend(mask: Tensor, pasted: Tensor, base: Tensor) -> Tensor:
    """M * A + (1 - M) * B, for one image."""
    return mask * pasted + (1 - mask) * base


def host_choice(classes: Tensor) -> Tensor:
    """Half of the classes, rounded up, chosen on the host."""
    count = len(classes)
    chosen = np.random.choice(count, (count + 1) // 2, replace=False)  # noqa: NPY002 - as the released code does
    return classes[torch.as_tensor(chosen, device=classes.device)]


def per_image_loop(batch: Batch, *, whole_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The released loop, or its variant that looks for the classes in the whole batch."""
    images, labels, target_images, target_labels, weights = batch
    mixed: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for i in range(len(images)):
        chosen = host_choice(torch.unique(labels if whole_batch else labels[i]))
        mask = (labels[i][None] == chosen[:, None, None]).sum(0)
        mixed[0].append(blend(mask, images[i], target_images[i]))
        mixed[1].append(blend(mask.to(labels.dtype), labels[i], target_labels[i]))
        mixed[2].append(blend(mask, torch.ones_like(weights[i]), weights[i]))
    return torch.stack(mixed[0]), torch.stack(mixed[1]), torch.stack(mixed[2])


def measure(n: int, size: int, dtype: torch.dtype, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """One table: all candidates on the same batch."""
    batch = street_like(n, size, dtype, device)
    images, labels, target_images, target_labels, weights = batch
    mixer = CrossDomainMix(CLASSES, include_ignored=True)
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

    return interleave(
        {
            "floor": floor,
            "crossmix": lambda: mixer(*batch),
            "released loop": lambda: per_image_loop(batch, whole_batch=False),
            "whole-batch unique": lambda: per_image_loop(batch, whole_batch=True),
            "kornia transplant": lambda: transplant(pairs[:n], pair_labels[:n]),
        },
        rounds=rounds,
        device=device,
    )


def main() -> None:
    """Print the tables; save them where asked."""
    args = arguments(__doc__)
    results = []
    for dtype in (torch.int64, torch.uint8):
        rows = measure(8, 512, dtype, args.rounds, args.device)
        name = str(dtype).removeprefix("torch.")
        show(f"8 x 3 x 512 x 512, {name} labels, {args.device}", rows, "crossmix")
        ratio = rows["released loop"]["median_ms"] / rows["crossmix"]["median_ms"]
        print(f"  crossmix is {ratio:.2f} times as fast as the released loop")
        results.append({"batch": 8, "size": 512, "labels": name, "rows": rows, "speedup_over_released_loop": ratio})
    if args.save:
        save("mixing", args.device, results)


if __name__ == "__main__":
    main()
