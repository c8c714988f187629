"""Replay an augmentation that draws from torch's global generator, such as those of kornia and torchvision."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from crossmix._checks import check_images, check_tensor

__all__ = ["SeededAugment"]

SEEDS = 2**62


class SeededAugment(nn.Module):
    """Make any augmentation reproducible: each image is augmented by itself, after seeding torch with its own number.

    As the `augment` of `SelfTraining` or of a recipe it is then replayed by `draw=`, follows `generator=`, and gives
    the same images when a global batch is split over ranks. The state of the global generators is restored afterwards.
    What draws from numpy or Python, or on devices other than CPU and CUDA, is not replayed. A call for each image costs
    time: where nothing is replayed, pass the augmentation itself.

    Args:
        augment: Called with a batch of one image, (1, C, H, W); returns another of the same shape. It must not move
            pixels, since labels and weights are not transformed.

    Raises:
        TypeError: If `augment` is not callable.

    Example:
        >>> noise = SeededAugment(lambda images: images + 0.1 * torch.randn_like(images))
        >>> draw = noise.sample(2, generator=torch.Generator().manual_seed(0))
        >>> images = torch.rand(2, 3, 4, 4)
        >>> torch.equal(noise(images, draw=draw), noise(images, draw=draw))
        True
    """

    augment: Any  # as given; Any keeps its own attributes accessible

    def __init__(self, augment: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if isinstance(augment, type) or not callable(augment):
            raise TypeError(f"`augment` must be callable on images, got {augment!r}; build it, or pass a function.")
        self.augment = augment

    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,  # noqa: ARG002 - the seeds are read on the host
    ) -> Tensor:
        """Draw a seed for each image.

        Args:
            n: The number of images.
            generator: Source of randomness; None uses the global one of the CPU. One on a GPU costs a host sync.
            device: Ignored: seeds stay on the CPU, where they are read without a sync.

        Returns:
            (n,) int64 on the CPU.
        """
        where = torch.device("cpu") if generator is None else generator.device
        return torch.randint(SEEDS, (n,), generator=generator, device=where).cpu()

    def forward(
        self, images: Tensor, *, draw: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Augment a batch. It cannot be compiled or captured as a CUDA graph.

        Args:
            images: (N, C, H, W) floating.
            draw: Seeds from `sample`, to replay them.
            generator: Source of randomness, without `draw`; None uses the global one.

        Returns:
            What the augmentation returned, concatenated.

        Raises:
            TypeError: If `images` is not floating, or `draw` is no tensor.
            ValueError: If a shape is wrong.
        """
        check_images("images", images)
        draw = self.sample(len(images), generator=generator) if draw is None else draw
        check_tensor("draw", draw)
        if tuple(draw.shape) != (len(images),):
            raise ValueError(
                f"`draw` must have shape (N,) = ({len(images)},), got {tuple(draw.shape)}; sample for this batch size."
            )
        if not len(images):
            return images.clone()
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return torch.cat([self._one(image[None], seed) for image, seed in zip(images, draw.tolist(), strict=True)])

    def _one(self, image: Tensor, seed: int) -> Tensor:
        # Not torch.manual_seed, which would also seed GPUs whose state is not restored.
        torch.default_generator.manual_seed(seed)
        if image.device.type == "cuda":
            torch.cuda.default_generators[image.device.index].manual_seed(seed)
        augmented: Tensor = self.augment(image)
        return augmented

    @override
    def extra_repr(self) -> str:
        """The augmentation, for `repr`, if it is no module, which is shown anyway."""
        return "" if isinstance(self.augment, nn.Module) else f"augment={self.augment!r}"
