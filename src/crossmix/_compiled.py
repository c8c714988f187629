"""Forms of the mix and of the blur that torch's compiler turns into fused, vectorised CPU code.

Each form exists only for its speed. The figures compare the time with and without it, on one thread with torch 2.13.
For the mix, they are the time of a compiled `CrossDomainMix` of 8 x 3 x 512 x 512 images as a multiple of one eager
`torch.where` each over images, labels and weights: 3.0 (int64 labels) and 3.5 (uint8) without any of the forms, 0.93
and 0.77 with all of them. The committed results are the compiled rows of `benchmarks/results/mixing--cpu.json` and
`augment--cpu.json`.
"""

import torch
from torch import Tensor


def where(mask: Tensor, pasted: Tensor, base: Tensor) -> Tensor:
    """`pasted` where the mask (N, H, W) is true, `base` elsewhere, (N, ..., H, W)."""
    contiguous = pasted.is_contiguous() and base.is_contiguous()
    if pasted.shape == base.shape and pasted.ndim == 4 and 1 <= pasted.shape[1] <= 4 and contiguous:
        # With a channel dimension, images would be a separate pass that reads the mask back: 1.05 instead of 0.93.
        channels = zip(pasted.unbind(1), base.unbind(1), strict=True)
        return torch.stack([torch.where(mask, a, b) for a, b in channels], 1)
    mask = mask.reshape(mask.shape[0], *[1] * (base.ndim - 3), *mask.shape[1:])
    dtype = torch.promote_types(pasted.dtype, base.dtype)
    if dtype in {torch.uint8, torch.int8, torch.int16}:
        # Masked selection of bytes is not vectorised: 1.25 instead of 0.77 for uint8 labels.
        return torch.where(mask, pasted.to(torch.int32), base.to(torch.int32)).to(dtype)
    return torch.where(mask, pasted, base)


def stored(mask: Tensor) -> Tensor:
    """The mask as an output. Bools would be stored one by one and read back by other passes: 2.5 instead of 0.93."""
    if not torch.compiler.is_compiling() or mask.device.type != "cpu":
        return mask
    one = torch.ones((), dtype=torch.int32, device=mask.device)
    return torch.where(mask, one, torch.zeros_like(one)).to(torch.uint8).view(torch.bool)


def convolve(x: Tensor, kernels: Tensor, axis: int) -> Tensor:
    """Convolve images (N, C, H, W) along an axis with symmetric kernels (N, taps), without padding.

    A sum over taps is one fused pass, in a third of the time of `conv2d`: 0.10 instead of 0.26 of kornia's blur.
    """
    taps = kernels.shape[1]
    weights = kernels[..., None, None, None].unbind(1)  # taps tensors (N, 1, 1, 1)
    length = x.shape[axis] - taps + 1
    out = x.narrow(axis, taps // 2, length) * weights[taps // 2]
    for i in range(taps // 2):
        out = out + (x.narrow(axis, i, length) + x.narrow(axis, taps - 1 - i, length)) * weights[i]
    return out
