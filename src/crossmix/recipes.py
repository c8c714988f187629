"""Named configurations of `SelfTraining`: the released code, the paper, and masked image consistency (MIC).

Every difference between them that concerns the algorithm is one field of `Recipe`.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
DAFormer: Hoyer et al., CVPR 2022, https://arxiv.org/abs/2111.14887
Masked image consistency: Hoyer et al., CVPR 2023, https://arxiv.org/abs/2212.01322
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from crossmix._checks import (
    check_choice,
    check_fraction,
    check_ignored_rows,
    check_nonnegative,
    check_num_classes,
    check_pixels,
)
from crossmix.alignment import DistributionAlignment
from crossmix.augment import StrongAugment
from crossmix.losses import ConfidenceWeightedCE
from crossmix.masking import MaskedImages
from crossmix.mixing import ClassMix, CrossDomainMix
from crossmix.self_training import SelfTraining
from crossmix.teacher import MeanTeacher

__all__ = ["METHODS", "MIC", "PAPER", "RELEASED", "Recipe", "self_training"]

Method = Literal["source", "pseudo-label", "classmix", "alignment", "dacs"]

METHODS: tuple[Method, ...] = ("source", "pseudo-label", "classmix", "alignment", "dacs")
"""The rows of the paper's Table 3."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options in which the recipes differ, named as the constructor arguments that they set.

    Attributes:
        weigh: Of `SelfTraining`: lambda on `"target"` pixels and 1 on source pixels, or on the whole `"mixed"` image.
        scope: Of `ConfidenceWeightedCE`, for mixed images: what lambda, the share of confident pixels, is computed
            over: `"batch"` (released code) or `"image"` (paper); `"pixel"` and `"none"` are in no recipe.
        source_normalizer: `normalizer` of the source loss: the mean over `"valid"` pixels, `"all"` pixels, or by
            `"weights"`.
        include_ignored: Of `CrossDomainMix`: whether ignored source pixels can be drawn as a class.
        decay: Of `MeanTeacher`: share of the teacher that an update keeps; 0 makes it equal to the student, as in
            Algorithm 1.
        mode: Of `MeanTeacher`: `"train"` for batch statistics (all recipes), or `"eval"`.
        flavor: Of `StrongAugment`: `"additive"` jitter, as in old kornia, or `"torchvision"`.
        same_on_batch: Of `StrongAugment`: one decision to jitter or blur per batch, or one per image.
        threshold: Of `ConfidenceWeightedCE`: the confidence from which a pixel counts in lambda; the same in all
            recipes, and not stated in the paper.
        ignore_top: Of `SelfTraining`: rows of pseudo-labels that get weight 0, for a height of 512.
        ignore_bottom: Of `SelfTraining`, likewise.
        consistency: Of `SelfTraining`: a `MaskedImages` or None; True builds one from `consistency_block` and
            `consistency_ratio`, False means None. Its images are augmented like the mixed ones.
        consistency_block: `block` of that `MaskedImages`; None means 64, or 32 for crops up to 512.
        consistency_ratio: `ratio` of that `MaskedImages`.
        consistency_weight: Of `SelfTraining`.

    Example:
        >>> RELEASED.scope, PAPER.scope
        ('batch', 'image')
    """

    weigh: Literal["target", "mixed"]
    scope: Literal["batch", "image", "pixel", "none"]
    source_normalizer: Literal["valid", "all", "weights"]
    include_ignored: bool
    decay: float
    mode: Literal["train", "eval"] = "train"
    flavor: Literal["additive", "torchvision"]
    same_on_batch: bool
    threshold: float = 0.968
    ignore_top: int = 0
    ignore_bottom: int = 0
    consistency: MaskedImages | bool | None = None
    consistency_block: int | None = None
    consistency_ratio: float = 0.7
    consistency_weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("weigh", self.weigh, ("target", "mixed"))
        check_choice("scope", self.scope, ("batch", "image", "pixel", "none"))
        check_choice("source_normalizer", self.source_normalizer, ("valid", "all", "weights"))
        check_choice("mode", self.mode, ("train", "eval"))
        check_choice("flavor", self.flavor, ("additive", "torchvision"))
        check_fraction("threshold", self.threshold)
        check_fraction("decay", self.decay)
        for name in ("include_ignored", "same_on_batch"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {value!r}.")
        check_ignored_rows(self.ignore_top, self.ignore_bottom)
        if not (self.consistency is None or isinstance(self.consistency, bool | MaskedImages)):
            raise TypeError(f"`consistency` must be True, False, None or a MaskedImages, got {self.consistency!r}.")
        if self.consistency_block is not None:
            check_pixels("consistency_block", self.consistency_block)
        check_fraction("consistency_ratio", self.consistency_ratio)
        check_nonnegative("consistency_weight", self.consistency_weight)


RELEASED = Recipe(
    weigh="target",
    scope="batch",
    source_normalizer="valid",
    include_ignored=True,
    decay=0.99,
    flavor="additive",
    same_on_batch=True,
)
"""The behaviour of the code behind the published 52.14."""

PAPER = Recipe(
    weigh="mixed",
    scope="image",
    source_normalizer="all",
    include_ignored=False,
    decay=0.0,
    flavor="torchvision",
    same_on_batch=False,
)
"""The paper's text."""

MIC = Recipe(
    weigh="target",
    scope="batch",
    source_normalizer="valid",
    include_ignored=False,
    decay=0.999,
    flavor="torchvision",
    same_on_batch=False,
    ignore_top=15,
    ignore_bottom=120,
    consistency=True,
)
"""DAFormer's training with masked image consistency, the common baseline today, for any network.

Its sampler and optimizer belong to the training loop: see docs/recipes.md.
"""


def self_training(
    student: nn.Module,
    num_classes: int,
    *,
    method: Method = "dacs",
    recipe: Literal["released", "paper", "mic"] | Recipe = "released",
    prior: Tensor | Sequence[float] | None = None,
    sync: bool = False,
    ignore_index: int = 255,
    upsample: bool = False,
    align_corners: bool = True,
    logits: Callable[[Any], Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **overrides: str | float | bool | MaskedImages | None,
) -> SelfTraining:
    """Build one of the methods of the paper's Table 3, configured by a recipe.

    - `"source"`: source images only, no augmentation (32.85 in the paper, GTA5 to Cityscapes).
    - `"pseudo-label"`: pseudo-labelled target images, augmented, nothing pasted (22.97).
    - `"classmix"`: naive ClassMix, target images mixed with each other (35.08).
    - `"alignment"`: naive ClassMix with distribution alignment (48.04).
    - `"dacs"`: source pasted onto target (52.14).

    Args:
        student: The network to train.
        num_classes: The number of classes C.
        method: One of `METHODS`.
        recipe: `"released"`, `"paper"`, `"mic"`, or a `Recipe`.
        prior: (C,) class distribution for `"alignment"`. None starts uniform; call `.align.update_prior(source_labels)`
            in the training loop to estimate it. The paper uses the target's true distribution, an oracle.
        sync: Whether divisors, lambda and alignment averages are computed over the batch of all ranks.
        ignore_index: The id of ignored pixels, in all parts.
        upsample: Whether the student may return logits smaller than the images; see `SelfTraining`.
        align_corners: Convention of that upsampling; see `SelfTraining`.
        logits: Extracts the logits from the student's output; see `SelfTraining`.
        mean: Of `StrongAugment`, with `std`: the statistics by which the data loader normalises images, if it does.
            Hidden blocks are then filled with the normalised mean colour.
        std: Of `StrongAugment`.
        **overrides: Fields of `Recipe` by name, e.g. `scope="image"`, or `consistency=None` to drop that term.

    Returns:
        A `SelfTraining`; its student is `student` itself, not a copy.

    Raises:
        TypeError: If an override is not a field of `Recipe`, or a value has the wrong type.
        ValueError: If a method, a recipe or a value is unknown, `prior` is given for a method without alignment, or a
            `MaskedImages` for the method without a teacher.

    Example:
        >>> training = self_training(nn.Conv2d(3, 19, 1), 19, recipe="paper", scope="batch")
        >>> training.weigh, training.criterion.scope
        ('mixed', 'batch')
        >>> self_training(nn.Conv2d(3, 19, 1), 19, recipe="mic").consistency
        MaskedImages(block=None, ratio=0.7, fill=(0.485, 0.456, 0.406))
    """
    check_num_classes(num_classes)
    check_choice("method", method, METHODS)
    if prior is not None and method != "alignment":
        raise ValueError(f"`prior` belongs to method='alignment', got method={method!r}; leave it out.")
    choice = _resolve(recipe, overrides)
    mix: CrossDomainMix | ClassMix | None = None
    if method == "dacs":
        mix = CrossDomainMix(num_classes, ignore_index=ignore_index, include_ignored=choice.include_ignored)
    elif method in {"classmix", "alignment"}:
        mix = ClassMix(num_classes, ignore_index=ignore_index)

    def augment() -> StrongAugment:
        return StrongAugment(flavor=choice.flavor, same_on_batch=choice.same_on_batch, mean=mean, std=std)

    consistency = choice.consistency
    if isinstance(consistency, bool):  # the source-only baseline has no consistency term in any recipe
        consistency = _masked_images(choice, mean, std) if consistency and method != "source" else None
    return SelfTraining(
        student,
        None if method == "source" else MeanTeacher(student, decay=choice.decay, mode=choice.mode),
        mix=mix,
        num_classes=num_classes,
        augment=augment(),
        criterion=ConfidenceWeightedCE(
            choice.threshold, scope=choice.scope, ignore_index=ignore_index, normalizer="all", sync=sync
        ),
        source_criterion=ConfidenceWeightedCE(
            ignore_index=ignore_index, normalizer=choice.source_normalizer, sync=sync
        ),
        align=DistributionAlignment(num_classes, prior=prior, sync=sync) if method == "alignment" else None,
        weigh=choice.weigh,
        upsample=upsample,
        align_corners=align_corners,
        logits=logits,
        consistency=consistency,
        consistency_augment=None if consistency is None else augment(),
        consistency_weight=choice.consistency_weight,
        ignore_top=choice.ignore_top,
        ignore_bottom=choice.ignore_bottom,
    )


def _masked_images(choice: Recipe, mean: Sequence[float] | None, std: Sequence[float] | None) -> MaskedImages:
    """`MaskedImages` whose fill is normalised like the images."""
    masked = MaskedImages(choice.consistency_block, choice.consistency_ratio)
    if mean is None or std is None:
        return masked
    fill = [(value - m) / s for value, m, s in zip(masked.fill, mean, std, strict=True)]
    return MaskedImages(masked.block, masked.ratio, fill)


def _resolve(recipe: str | Recipe, overrides: dict[str, Any]) -> Recipe:
    if isinstance(recipe, str):
        named = {"released": RELEASED, "paper": PAPER, "mic": MIC}
        check_choice("recipe", recipe, tuple(named))
        recipe = named[recipe]
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a name or a Recipe, got {type(recipe).__name__}.")
    unknown = sorted(overrides.keys() - Recipe.__dataclass_fields__.keys())
    if unknown:
        fields = ", ".join(Recipe.__dataclass_fields__)
        raise TypeError(f"self_training() got an unknown option {unknown[0]!r}; the options are {fields}.")
    return replace(recipe, **overrides)  # values are checked by Recipe itself
