"""Cross-domain mixed sampling and self-training for semantic segmentation.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

from crossmix import functional, recipes
from crossmix.alignment import DistributionAlignment
from crossmix.augment import StrongAugment
from crossmix.losses import ConfidenceWeightedCE
from crossmix.masking import BoxMasks, CowMasks, MaskedImages
from crossmix.mixing import ClassMix, CrossDomainMix, Mixed
from crossmix.self_training import SelfTraining, SelfTrainingOutput
from crossmix.teacher import MeanTeacher, PseudoLabels

__version__ = "0.1.0"

__all__ = [
    "BoxMasks",
    "ClassMix",
    "ConfidenceWeightedCE",
    "CowMasks",
    "CrossDomainMix",
    "DistributionAlignment",
    "MaskedImages",
    "MeanTeacher",
    "Mixed",
    "PseudoLabels",
    "SelfTraining",
    "SelfTrainingOutput",
    "StrongAugment",
    "functional",
    "recipes",
]
