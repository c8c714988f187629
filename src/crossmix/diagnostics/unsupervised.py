"""Label-free scores of a network on the target, for choosing among checkpoints and hyperparameters.

Soft neighbourhood density: Saito et al., ICCV 2021, https://arxiv.org/abs/2108.10860, section 3.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from crossmix._checks import check_int, check_logits, check_num_classes, check_same_device, check_temperature
from crossmix._distributed import Counts
from crossmix._tensors import at_least_float32, no_autocast

__all__ = ["UnsupervisedQuality", "UnsupervisedScores"]

UNIT = 2**26  # sums are integers in units of 1 / UNIT (enough for 10**10 pixels), independent of the order of addition


class UnsupervisedQuality(NamedTuple):
    """Label-free scores in nats; NaN without any data.

    Attributes:
        entropy: Mean over pixels of the entropy of the prediction, in [0, ln C]. Lower is better, but a network that
            confidently predicts one class everywhere has the lowest.
        information: Entropy of the mean prediction minus `entropy`, in [0, ln C]. Higher is better: confident
            predictions, spread over many classes.
        neighborhood_density: Soft neighbourhood density, in [0, ln(pixels - 1)]. Higher is better: predictions form
            dense clusters.
    """

    entropy: float
    information: float
    neighborhood_density: float


class UnsupervisedScores(Counts):
    """Accumulate label-free scores of predictions on the target over batches.

    The neighbourhood density is the mean over sampled pixels i, with softmax outputs p_i, of

        density_i = - sum_{j != i} q_ij ln q_ij,    q_ij = softmax over j != i of cos(p_i, p_j) / temperature

    The sampled pixels are spread evenly over each update and depend only on its shape, so nothing is random. Compare
    scores between networks on the same images, in batches of the same size.

    Args:
        num_classes: The number of classes C.
        pixels: Number of pixels of each update that are compared with each other, at least 2 (all, if there are fewer).
            Time and memory grow quadratically: 1000 pixels take 4 MB.
        temperature: Temperature of the similarities, > 0; 0.05 in the paper.

    State:
        int64 buffers, which `update` adds to and `reset` zeroes. `prediction`: (C,), sum of the probabilities in units
        of 2**-26. `entropy`: (2,), its sum in these units, and the number of pixels. `density`: (2,), likewise for the
        sampled pixels.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> scores = UnsupervisedScores(2)
        >>> scores.update(torch.tensor([[9.0, 9.0, -9.0, -9.0], [-9.0, -9.0, 9.0, 9.0]])[None, :, None])
        >>> [round(value, 4) for value in scores.compute()]  # two sure pixels of each class
        [0.0, 0.6931, 0.0]
    """

    prediction: Tensor
    entropy: Tensor
    density: Tensor

    def __init__(self, num_classes: int, *, pixels: int = 1000, temperature: float = 0.05) -> None:
        super().__init__()
        check_num_classes(num_classes)
        check_int("pixels", pixels, least=2, hint="; each is compared with all others")
        check_temperature(temperature)
        self.num_classes = num_classes
        self.pixels = pixels
        self.temperature = temperature
        self.register_buffer("prediction", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("entropy", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("density", torch.zeros(2, dtype=torch.int64))

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Add (N, C, H, W) logits of target images, of any size, without a host sync. Pixels with NaN do not count.

        Raises:
            TypeError: If `logits` is not floating.
            ValueError: If the shape, the number of classes or the device is wrong.
        """
        check_logits("logits", logits)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"`logits` have {logits.shape[1]} classes but `num_classes` is {self.num_classes}.")
        check_same_device(prediction=self.prediction, logits=logits)
        probs = at_least_float32(logits).softmax(1)
        entropy = torch.special.entr(probs).sum(1)
        known = ~entropy.isnan()
        self.prediction += _units(probs.where(known[:, None], 0).sum((0, 2, 3)))
        self.entropy += torch.stack([_units(entropy.where(known, 0).sum()), known.sum()])
        count = min(self.pixels, entropy.numel())
        if count > 1:
            index = _spread(entropy.numel(), count, logits.device)
            area = entropy[0].numel()
            chosen = probs.flatten(2)[index // area, :, index % area]
            self.density += _density(chosen, self.temperature)
        self._merged = None

    def compute(self) -> UnsupervisedQuality:
        """Compute the scores of everything added since the last `reset`; after `merge`, of all ranks."""
        state = self._totals()
        mean = state["prediction"] / state["prediction"].sum()  # here and below, 0 / 0 is NaN: no data
        entropy = float(state["entropy"][0] / UNIT / state["entropy"][1])
        return UnsupervisedQuality(
            entropy=entropy,
            information=float(torch.special.entr(mean).sum()) - entropy,
            neighborhood_density=float(state["density"][0] / UNIT / state["density"][1]),
        )

    @override
    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, pixels={self.pixels}, temperature={self.temperature}"


def _units(total: Tensor) -> Tensor:
    return (total * UNIT).round().long()


def _spread(total: int, count: int, device: torch.device) -> Tensor:
    """Choose `count` distinct indices below `total`, one in each of `count` equal parts.

    Multiples of the golden ratio give the position within a part, so that no row or column is favoured if the parts are
    as long as the rows. Integer arithmetic gives the same indices on every device.
    """
    edges = torch.arange(count + 1, device=device) * total // count
    shift = torch.arange(count, device=device) * 40503 % 65536  # 40503 / 65536 = 0.618
    return edges[:-1] + edges.diff() * shift // 65536


def _density(probs: Tensor, temperature: float) -> Tensor:
    """From probabilities (n, C): the sum of the entropies of the similarities, in units, and the number of pixels."""
    known = ~probs.isnan().any(1)
    directions = functional.normalize(probs.where(known[:, None], 0), dim=1)
    with no_autocast(probs.device):
        similarity = directions @ directions.T / temperature  # (n, n)
    similarity = similarity.where(known, -torch.inf).fill_diagonal_(-torch.inf)
    counted = known & (known.sum() > 1)  # a single pixel has nothing to be compared with
    entropy = torch.special.entr(similarity.softmax(1)).sum(1).where(counted, 0)
    return torch.stack([_units(entropy.sum()), counted.sum()])
