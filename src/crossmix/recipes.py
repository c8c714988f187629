"""The paper's and the released code's configurations of `SelfTraining`, by name.

Every difference between the two that concerns the algorithm is one field of `Recipe`, here and nowhere else.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from crossmix._checks import check_choice, check_fraction, check_num_classes
from crossmix.alignment import DistributionAlignment
from crossmix.augment import StrongAugment
from crossmix.losses import ConfidenceWeightedCE
from crossmix.mixing import ClassMix, CrossDomainMix
from crossmix.self_training import SelfTraining
from crossmix.teacher import MeanTeacher

__all__ = ["METHODS", "PAPER", "RELEASED", "Recipe", "self_training"]

Method = Literal["source", "pseudo-label", "classmix", "alignment", "dacs"]

METHODS: tuple[Method, ...] = ("source", "pseudo-label", "classmix", "alignment", "dacs")
"""The rows of the paper's Table 3."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices in which the released code and the paper's text differ, by the names of the constructor arguments.

    Attributes:
        weigh: Of `SelfTraining`: lambda on `"target"` pixels and 1 on source pixels, or on the whole `"mixed"` image.
        scope: Of `ConfidenceWeightedCE`, for mixed images: what lambda, the share of confident pixels, is taken over:
            `"batch"`, `"image"`, or, in neither, `"pixel"` or `"none"`.
        source_normalizer: `normalizer` of the source loss: the mean over `"valid"` pixels, `"all"` pixels, or by
            `"weights"`.
        include_ignored: Of `CrossDomainMix`: whether ignored source pixels can be drawn as a class.
        decay: Of `MeanTeacher`: share of the teacher that an update keeps; 0 makes it the network itself, as in
            Algorithm 1.
        mode: Of `MeanTeacher`: `"train"` for batch statistics, in both, or `"eval"`.
        flavor: Of `StrongAugment`: `"additive"` jitter, as in old kornia, or `"torchvision"`.
        same_on_batch: Of `StrongAugment`: one decision per batch to jitter or blur, or one per image.
        threshold: Of `ConfidenceWeightedCE`: the confidence from which a pixel counts for lambda; the same in both, and
            not stated in the paper.

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

    def __post_init__(self) -> None:
        """Refuse unknown values."""
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


RELEASED = Recipe(
    weigh="target",
    scope="batch",
    source_normalizer="valid",
    include_ignored=True,
    decay=0.99,
    flavor="additive",
    same_on_batch=True,
)
"""What the code behind the published 52.14 does."""

PAPER = Recipe(
    weigh="mixed",
    scope="image",
    source_normalizer="all",
    include_ignored=False,
    decay=0.0,
    flavor="torchvision",
    same_on_batch=False,
)
"""What the paper's text says."""


def self_training(
    student: nn.Module,
    num_classes: int,
    *,
    method: Method = "dacs",
    recipe: Literal["released", "paper"] | Recipe = "released",
    prior: Tensor | Sequence[float] | None = None,
    sync: bool = False,
    ignore_index: int = 255,
    upsample: bool = False,
    align_corners: bool = True,
    logits: Callable[[Any], Tensor] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **overrides: str | float | bool,
) -> SelfTraining:
    """Build a method of the paper's Table 3 in one of the two recipes.

    - `"source"`: source images alone, no augmentation (32.85 in the paper, GTA5 to Cityscapes).
    - `"pseudo-label"`: pseudo-labelled target images, augmented, nothing pasted (22.97).
    - `"classmix"`: naive ClassMix, target images mixed with each other (35.08).
    - `"alignment"`: naive ClassMix with distribution alignment (48.04).
    - `"dacs"`: source pasted onto target (52.14).

    Args:
        student: The network to train.
        num_classes: The number of classes C.
        method: One of `METHODS`.
        recipe: `"released"`, `"paper"`, or a `Recipe`.
        prior: (C,) class distribution for `"alignment"`. None leaves it uniform until
            `.align.update_prior(source_labels)` is called in the training loop; the paper's row takes the target's own
            distribution, an oracle.
        sync: Whether divisors, lambda and alignment averages are those of the batch over all ranks.
        ignore_index: The id of ignored pixels, in all parts.
        upsample: Whether the student may return logits smaller than the images; see `SelfTraining`.
        align_corners: Of that upsampling; see `SelfTraining`.
        logits: Takes the logits out of what the student returns; see `SelfTraining`.
        mean: Of `StrongAugment`, with `std`: what images are normalised by, where the data loader does it.
        std: Of `StrongAugment`.
        **overrides: Fields of `Recipe` by name, e.g. `scope="image"`.

    Returns:
        A `SelfTraining`; its student is `student` itself, not a copy.

    Raises:
        TypeError: If an override is no field of `Recipe`.
        ValueError: If a method, a recipe or a value is unknown, or `prior` is given to a method without alignment.

    Example:
        >>> training = self_training(nn.Conv2d(3, 19, 1), 19, recipe="paper", scope="batch")
        >>> training.weigh, training.criterion.scope
        ('mixed', 'batch')
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
    return SelfTraining(
        student,
        None if method == "source" else MeanTeacher(student, decay=choice.decay, mode=choice.mode),
        mix=mix,
        num_classes=num_classes,
        augment=StrongAugment(flavor=choice.flavor, same_on_batch=choice.same_on_batch, mean=mean, std=std),
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
    )


def _resolve(recipe: str | Recipe, overrides: dict[str, str | float | bool]) -> Recipe:
    if isinstance(recipe, str):
        check_choice("recipe", recipe, ("released", "paper"))
        recipe = RELEASED if recipe == "released" else PAPER
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a name or a Recipe, got {type(recipe).__name__}.")
    unknown = sorted(overrides.keys() - Recipe.__dataclass_fields__.keys())
    if unknown:
        fields = ", ".join(Recipe.__dataclass_fields__)
        raise TypeError(f"self_training() got an unknown option {unknown[0]!r}; the options are {fields}.")
    return replace(recipe, **overrides)  # type: ignore[arg-type]  # values are checked by Recipe itself
