"""The pure functions under the modules: no state, no loop over the batch, no host-device sync.

Everything here compiles with `torch.compile(fullgraph=True)`; `sample_classes` needs `scores` instead of a generator
for it, because a `torch.Generator` cannot be traced.
"""

from crossmix.alignment import align_distribution
from crossmix.losses import confidence_weight, upsampled_cross_entropy, weighted_cross_entropy
from crossmix.masking import block_mask, box_mask, cow_mask
from crossmix.mixing import class_mask, mix, sample_classes
from crossmix.teacher import ema_update_, pseudo_label, pseudo_label_from_probs

__all__ = [
    "align_distribution",
    "block_mask",
    "box_mask",
    "class_mask",
    "confidence_weight",
    "cow_mask",
    "ema_update_",
    "mix",
    "pseudo_label",
    "pseudo_label_from_probs",
    "sample_classes",
    "upsampled_cross_entropy",
    "weighted_cross_entropy",
]
