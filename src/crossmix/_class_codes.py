"""Encode label maps once, so that finding the present classes and marking the drawn ones takes few passes.

`Indices` is the plain form for any number of classes, `Words` a faster one for up to 31. Their cost on one CPU thread
for 8 x 512 x 512 labels, as a multiple of one `torch.where` each over 8 x 3 x 512 x 512 images, labels and weights (a
lower bound for mixing):

    Indices                 1.08 (int64 labels)   1.11 (uint8)
    Words                   0.78                  0.57
    Words, part by part     0.61                  0.46
"""

from typing import NamedTuple

import torch
from torch import Tensor

PART = 1 << 18  # pixels of all images together: a megabyte of words


class Words(NamedTuple):
    """One int32 per pixel with a single bit set: an OR gives the present classes, an AND the pixels of drawn ones.

    Bit c stands for class c; ignored pixels have a bit that is not a class.
    """

    parts: list[Tensor]  # the words of the flattened maps, (N, pixels of a part) each
    union: Tensor  # the OR of all parts, in the shape of the first
    columns: Tensor  # (C + 1,) int32: the bits of each column of `classes`
    shape: torch.Size  # (N, H, W)

    @classmethod
    def of(cls, labels: Tensor, num_classes: int, ignore_index: int) -> "Words":
        """Encode labels; on a CPU in parts, so that intermediate results stay in its cache (a compiler fuses them)."""
        pixels = labels.flatten(1)
        whole = torch.compiler.is_compiling() or labels.device.type != "cpu" or pixels.numel() <= PART
        parts: list[Tensor] = []
        for part in [pixels] if whole else pixels.chunk(-(-pixels.numel() // PART), 1):
            words = _words(part, num_classes)
            if not parts:
                union = words if whole else words.clone()
            else:
                union[:, : words.shape[1]] |= words
            parts.append(words)
        known = (1 << num_classes) - 1
        if 0 <= ignore_index < num_classes:
            known &= ~(1 << ignore_index)
        column = torch.arange(num_classes + 1, device=labels.device, dtype=torch.int32)
        bits = torch.bitwise_left_shift(1, column.clamp(max=31)) & known
        columns = torch.where(column == num_classes, ~known, bits)  # last column: all bits that are not classes
        return cls(parts, union, columns, labels.shape)

    def present(self) -> Tensor:
        """The present classes, (N, C + 1) bool."""
        words = self.union
        # OR the two halves of the map repeatedly. Halves of an odd length overlap by one, which is harmless. On a GPU,
        # further launches would cost more than reading the rest.
        while words.shape[1] > (32 if words.device.type == "cpu" else 1 << 14):
            half = (words.shape[1] + 1) // 2
            words = words[:, :half] | words[:, -half:]
        return ((words[:, None] & self.columns[:, None]) != 0).any(2)

    def mask(self, classes: Tensor) -> Tensor:
        """The pixels of the drawn classes, (N, H, W) bool."""
        chosen = (classes * self.columns).sum(1).to(torch.int32)[:, None]  # bits are disjoint, so the sum is an OR
        if len(self.parts) == 1:
            return ((self.parts[0] & chosen) != 0).reshape(self.shape)
        mask = torch.empty(self.shape, dtype=torch.bool, device=chosen.device)
        places = torch.split(mask.flatten(1), [part.shape[1] for part in self.parts], 1)
        for place, part in zip(places, self.parts, strict=True):
            place.copy_(part & chosen)  # nonzero becomes True; a third of the time of `!= 0` and `torch.cat`
        return mask


class Indices(NamedTuple):
    """Indices into a table of classes.

    Class c has column c + 1; the first column is for negative ids, the last one for ids beyond the classes.
    """

    columns: Tensor  # (N, pixels) int64
    labelled: Tensor  # (C,) bool: False for an `ignore_index` that is one of the classes
    shape: torch.Size  # (N, H, W)

    @classmethod
    def of(cls, labels: Tensor, num_classes: int, ignore_index: int) -> "Indices":
        """Encode labels, clamping in their own dtype, whose range may be smaller than the number of classes."""
        kind = torch.iinfo(labels.dtype)
        index = labels.flatten(1).clamp(max(-1, kind.min), min(num_classes, kind.max)).long() + 1
        return cls(index, torch.arange(num_classes, device=labels.device) != ignore_index, labels.shape)

    def present(self) -> Tensor:
        """The present classes, (N, C + 1) bool."""
        table = self.columns.new_zeros(len(self.columns), len(self.labelled) + 2, dtype=torch.bool)
        table = table.scatter(1, self.columns, value=True)
        known = table[:, 1:-1]
        ignored = table[:, 0] | table[:, -1] | (known & ~self.labelled).any(1)
        return torch.cat([known & self.labelled, ignored[:, None]], 1)

    def mask(self, classes: Tensor) -> Tensor:
        """The pixels of the drawn classes, (N, H, W) bool."""
        known, ignored = classes[:, :-1], classes[:, -1:]
        table = torch.cat([ignored, torch.where(self.labelled, known, ignored), ignored], 1)
        return table.gather(1, self.columns).reshape(self.shape)


def class_codes(labels: Tensor, num_classes: int, ignore_index: int) -> Words | Indices:
    """Encode (N, H, W) label maps; ids outside 0..num_classes-1, and `ignore_index`, count as ignored."""
    form = Words if num_classes <= 31 else Indices
    return form.of(labels, num_classes, ignore_index)


def _words(labels: Tensor, num_classes: int) -> Tensor:
    """An int32 with the bit of each label; ids beyond the classes set bit `num_classes`, negative ones bit 31."""
    if labels.dtype == torch.uint8:
        columns = labels.clamp(max=num_classes).to(torch.int32)
    else:
        columns = labels.clamp(-1, num_classes).to(torch.int32).bitwise_and_(31)  # in place on a copy; -1 & 31 is 31
    return torch.bitwise_left_shift(1, columns)
