"""Label maps coded once, so that finding the classes and marking the chosen ones reads them in few passes.

`Indices` is the plain form, for any number of classes, `Words` a faster one for up to 31. What they cost on one CPU
thread for 8 x 512 x 512 labels, as a multiple of the time of one `torch.where` each over 8 x 3 x 512 x 512 images,
labels and weights, which is the least that mixing takes:

    Indices                 1.08 (int64 labels)   1.11 (uint8)
    Words                   0.78                  0.57
    Words, part by part     0.61                  0.46
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Indices", "Words", "class_codes"]

PART = 1 << 18  # pixels of all images together: a megabyte of words


class Words(NamedTuple):
    """One bit per pixel in an int32: which classes occur is an OR, which pixels are chosen an AND.

    Bit c stands for class c; an ignored pixel carries a bit outside of the classes.
    """

    parts: list[Tensor]  # the words of the flattened maps, (N, pixels of a part) each
    union: Tensor  # the OR of all parts, of the size of the first
    columns: Tensor  # (C + 1,) int32: the bits that belong to each column of a table of classes
    shape: torch.Size

    @classmethod
    def of(cls, labels: Tensor, num_classes: int, ignore_index: int) -> "Words":
        """On a CPU part by part, so that what lies between labels and words stays in its cache; a compiler fuses it."""
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
        columns = torch.where(column == num_classes, ~known, bits)  # all bits that are no class: a negative number
        return cls(parts, union, columns, labels.shape)

    def present(self) -> Tensor:
        """Which classes occur, (N, C + 1) bool."""
        words = self.union
        # OR the map onto itself, half by half; the halves of an odd length overlap by one, which OR does not mind. On a
        # GPU launches cost more than what is left to read.
        while words.shape[1] > (32 if words.device.type == "cpu" else 1 << 14):
            half = (words.shape[1] + 1) // 2
            words = words[:, :half] | words[:, -half:]
        return ((words[:, None] & self.columns[:, None]) != 0).any(2)

    def mask(self, classes: Tensor) -> Tensor:
        """Where a chosen class is, (N, H, W) bool."""
        chosen = (classes * self.columns).sum(1).to(torch.int32)[:, None]  # bits are disjoint: the sum is an OR
        if len(self.parts) == 1:
            return ((self.parts[0] & chosen) != 0).reshape(self.shape)
        mask = torch.empty(self.shape, dtype=torch.bool, device=chosen.device)
        places = torch.split(mask.flatten(1), [part.shape[1] for part in self.parts], 1)
        for place, part in zip(places, self.parts, strict=True):
            place.copy_(part & chosen)  # not 0 is True; a third of the time of `!= 0` and `torch.cat`
        return mask


class Indices(NamedTuple):
    """Indices into a table of classes.

    Class c has column c + 1; the first column stands for negative ids and the last one for those beyond the classes.
    """

    columns: Tensor  # (N, pixels) int64
    labelled: Tensor  # (C,) bool: all but an `ignore_index` that is a class
    shape: torch.Size

    @classmethod
    def of(cls, labels: Tensor, num_classes: int, ignore_index: int) -> "Indices":
        """Clamp in the labels' own dtype, which may be too small for the number of classes."""
        kind = torch.iinfo(labels.dtype)
        index = labels.flatten(1).clamp(max(-1, kind.min), min(num_classes, kind.max)).long() + 1
        return cls(index, torch.arange(num_classes, device=labels.device) != ignore_index, labels.shape)

    def present(self) -> Tensor:
        """Which classes occur, (N, C + 1) bool."""
        table = self.columns.new_zeros(len(self.columns), len(self.labelled) + 2, dtype=torch.bool)
        table = table.scatter(1, self.columns, value=True)
        known = table[:, 1:-1]
        ignored = table[:, 0] | table[:, -1] | (known & ~self.labelled).any(1)
        return torch.cat([known & self.labelled, ignored[:, None]], 1)

    def mask(self, classes: Tensor) -> Tensor:
        """Where a chosen class is, (N, H, W) bool."""
        known, ignored = classes[:, :-1], classes[:, -1:]
        table = torch.cat([ignored, torch.where(self.labelled, known, ignored), ignored], 1)
        return table.gather(1, self.columns).reshape(self.shape)


def class_codes(labels: Tensor, num_classes: int, ignore_index: int) -> Words | Indices:
    """Code (N, H, W) label maps; ids outside 0..num_classes-1, and `ignore_index`, count as ignored."""
    form = Words if num_classes <= 31 else Indices
    return form.of(labels, num_classes, ignore_index)


def _words(labels: Tensor, num_classes: int) -> Tensor:
    """The bit of each label in an int32: ids beyond the classes become bit `num_classes`, negative ones bit 31."""
    if labels.dtype == torch.uint8:
        columns = labels.clamp(max=num_classes).to(torch.int32)
    else:
        columns = labels.clamp(-1, num_classes).to(torch.int32).bitwise_and_(31)  # in place on a copy; -1 & 31 is 31
    return torch.bitwise_left_shift(1, columns)
