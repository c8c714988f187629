"""Distribution alignment: move the average prediction towards a class prior.

ReMixMatch: Berthelot et al., ICLR 2020, https://arxiv.org/abs/1911.09785
For pseudo-labels of a target domain: DACS, Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702, section 4.5.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crossmix._checks import (
    check_bool,
    check_floating,
    check_fraction,
    check_int,
    check_labels,
    check_logits,
    check_num_classes,
    check_same_device,
    class_shares,
    wrong_shape,
)
from crossmix._distributed import all_reduce_sum
from crossmix._tensors import KeepsFloat32, arithmetic, at_least_float32, valid_pixels

__all__ = ["DistributionAlignment", "align_distribution"]


def align_distribution(probs: Tensor, prior: Tensor, running: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Reweight predictions by the ratio of a class prior to the average prediction (section 4.5 of the paper).

    q~ = Normalize(q * p / p~)

    Pixels where the product is 0 in every class, or not finite, keep their prediction, so the result always sums to 1.

    Args:
        probs: q, (N, C, H, W) floating, summing to 1 over dimension 1.
        prior: p, (C,) floating, summing to 1: the desired class distribution of the predictions.
        running: p~, (C,) floating, summing to 1: the running average of predictions.
        eps: Lower bound on the divisor `running`.

    Returns:
        (N, C, H, W) float32, or float64 for float64 `probs`. No host sync.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes or devices disagree, or `eps` is not positive.

    Example:
        >>> probs = torch.tensor([0.6, 0.4])[None, :, None, None]
        >>> align_distribution(probs, torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25])).flatten()
        tensor([0.3333, 0.6667])
    """
    check_logits("probs", probs)
    for name, value in (("prior", prior), ("running", running)):
        check_floating(name, value, "divide class counts by their sum")
        if tuple(value.shape) != (probs.shape[1],):
            want = f"(C,) = ({probs.shape[1]},) to match `probs`"
            raise wrong_shape(name, want, value, "pass one number per class")
    check_same_device(probs=probs, prior=prior, running=running)
    if not eps > 0:
        raise ValueError(f"`eps` must be positive, got {eps}; the default is 1e-6.")
    probs = at_least_float32(probs)
    least = max(eps, torch.finfo(probs.dtype).tiny)  # a smaller divisor could be rounded to 0
    ratio = prior.to(probs.dtype) / running.to(probs.dtype).clamp(min=least)
    aligned = probs * ratio[:, None, None]
    total = aligned.sum(1, keepdim=True)
    usable = (total > 0) & (total < math.inf)
    return torch.where(usable, aligned / torch.where(usable, total, 1.0), probs)


class DistributionAlignment(KeepsFloat32):
    """Align predictions on the target with a class prior, and keep the running average this requires.

    The paper's experiment takes the prior from the target's ground truth (an oracle): pass it as `prior=`. Otherwise it
    is uniform until `update_prior` estimates it from source labels, which the paper leaves to future work. The paper
    gives no momentum; the released code has no alignment.

    Args:
        num_classes: The number of classes C.
        prior: (C,) class frequencies or counts, >= 0; normalised to sum to 1.
        momentum: Share of an average that an update keeps, in [0, 1]. It warms up as min(1 - 1 / (t + 1), momentum),
            t counting earlier updates, so the first update copies.
        sync: Whether updates average over all ranks; only a vector of length C is reduced, never the maps.
        ignore_index: The label id of ignored pixels. If it is below C, the prior gives this class no share.

    State:
        `prior`, `running`: (C,) float32 buffers, each summing to 1, changed by `update_prior` and `update`.
        `prior_count`, `running_count`: int64 scalars, the number of updates.
        The averages stay in float32 when a parent module is cast to a lower precision.

    Raises:
        TypeError: If `prior` is not a sequence of numbers, or another argument has a wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> align = DistributionAlignment(2, prior=[0.5, 0.5])
        >>> probs = torch.tensor([0.75, 0.25])[None, :, None, None]
        >>> align.update(probs)
        >>> align(probs).flatten()
        tensor([0.5000, 0.5000])
    """

    prior: Tensor
    running: Tensor
    prior_count: Tensor
    running_count: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        prior: Tensor | Sequence[float] | None = None,
        momentum: float = 0.999,
        sync: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_fraction("momentum", momentum)
        check_int("ignore_index", ignore_index)
        check_bool("sync", sync)
        self.num_classes = num_classes
        self.momentum = momentum
        self.sync = sync
        self.ignore_index = ignore_index
        self.fixed_prior: bool = prior is not None
        # The values of a prior are read only here, once, where a sync is acceptable.
        if prior is None:
            counted = [float(c != ignore_index) for c in range(num_classes)]
            self._start = [one / max(sum(counted), 1.0) for one in counted]
        else:
            self._start = class_shares(prior, num_classes, ignore_index).tolist()
        for name in ("prior", "running"):
            self.register_buffer(name, torch.empty(num_classes, dtype=torch.float32))
            self.register_buffer(f"{name}_count", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Reset averages and counts; needed after `to_empty` on a module created on the meta device."""
        self.prior.copy_(torch.tensor(self._start, dtype=torch.float32, device="cpu"))
        self.running.fill_(1.0 / self.num_classes)
        self.prior_count.zero_()
        self.running_count.zero_()

    def forward(self, probs: Tensor) -> Tensor:
        """Align (N, C, H, W) predictions, in their dtype; see `crossmix.functional.align_distribution`."""
        return align_distribution(probs, self.prior, self.running).to(probs.dtype)

    @torch.no_grad()
    def update(self, probs: Tensor) -> None:
        """Update the running average with (N, C, H, W) predictions before alignment; empty or NaN ones change nothing.

        Raises:
            TypeError: If `probs` is not floating.
            ValueError: If the number of classes or the device disagrees.
        """
        check_logits("probs", probs)
        if probs.shape[1] != self.num_classes:
            count = f"C = {self.num_classes} classes, got {probs.shape[1]}"
            raise ValueError(f"`probs` must have {count}; build DistributionAlignment with the network's number.")
        check_same_device(running=self.running, probs=probs)
        self._average(self.running, self.running_count, probs.sum((0, 2, 3), dtype=arithmetic(probs)))

    @torch.no_grad()
    def update_prior(self, labels: Tensor) -> None:
        """Update the prior with the class frequencies of source labels (N, H, W); ignored pixels do not count.

        Raises:
            TypeError: If `labels` is not an accepted integer tensor.
            ValueError: If its shape or device is wrong, or the prior was given to the constructor.
        """
        if self.fixed_prior:
            raise ValueError("`update_prior` cannot change a prior that was given as `prior=`; leave out one.")
        check_labels("labels", labels)
        check_same_device(prior=self.prior, labels=labels)
        index, valid = valid_pixels(labels.flatten(), self.num_classes, self.ignore_index)
        index = index.where(valid, self.num_classes)
        counts = index.new_zeros(self.num_classes + 1).scatter_add(0, index, torch.ones_like(index))
        self._average(self.prior, self.prior_count, counts[:-1].float())

    def extra_repr(self) -> str:
        """Constructor arguments, for `repr`."""
        prior = "given" if self.fixed_prior else None
        return f"num_classes={self.num_classes}, prior={prior}, momentum={self.momentum}, sync={self.sync}"

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401 - torch's
        super()._load_from_state_dict(*args)
        self.prior, self.running = map(at_least_float32, (self.prior, self.running))  # `assign=True` keeps any dtype

    def _average(self, average: Tensor, count: Tensor, sums: Tensor) -> None:
        """Update `average` in place with normalised `sums`; if their total is 0 or not finite, leave it unchanged."""
        if self.sync:
            sums = all_reduce_sum(sums)
        total = sums.sum()
        seen = (total > 0) & (total < math.inf)
        current = (sums / torch.where(seen, total, 1)).to(average.dtype)
        share = (1.0 / (count.to(average.dtype) + 1.0)).clamp(min=1.0 - self.momentum)
        average.copy_(torch.where(seen, torch.lerp(average, current, share), average))
        count.add_(seen)
