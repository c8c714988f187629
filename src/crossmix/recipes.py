"""The paper's and the released code's configurations of `SelfTraining`, by name.

Every difference between the two that concerns the algorithm is one field of `Recipe`, here and nowhere else.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
    """The choices in which the released code and the paper's text differ.

    Attributes:
        mixed_loss_weights: `"target"`: lambda on target pixels and 1 on source pixels; `"mixed"`: lambda on the whole
            mixed image.
        lambda_scope: What lambda, the share of confident pixels, is taken over: `"batch"`, `"image"`, or, in neither,
            `"pixel"` or `"none"`.
        source_loss_mean: Whether the source loss is averaged over `"valid"` pixels or `"all"` of them.
        classes_drawn: Whether ignored source pixels can be drawn as a class: `"with-ignored"`, or `"labelled"` for
            never.
        teacher: `"ema"`: an average of the student with a ramp, running on batch statistics; `"network"`:
            the network itself, as Algorithm 1 has it.
        jitter: `"additive"`: old kornia's, with one decision per batch to jitter or blur; `"torchvision"`: today's
            usual one, decided per image.
        threshold: Confidence from which a pixel counts for lambda; the same in both, and not stated in the paper.
        decay: Share of an `"ema"` teacher that a step keeps, once the ramp is over; the same in both.

    Example:
        >>> RELEASED.lambda_scope, PAPER.lambda_scope
        ('batch', 'image')
    """

    mixed_loss_weights: Literal["target", "mixed"]
    lambda_scope: Literal["batch", "image", "pixel", "none"]
    source_loss_mean: Literal["valid", "all"]
    classes_drawn: Literal["with-ignored", "labelled"]
    teacher: Literal["ema", "network"]
    jitter: Literal["additive", "torchvision"]
    threshold: float = 0.968
    decay: float = 0.99

    def __post_init__(self) -> None:
        """Refuse unknown values."""
        check_choice("mixed_loss_weights", self.mixed_loss_weights, ("target", "mixed"))
        check_choice("lambda_scope", self.lambda_scope, ("batch", "image", "pixel", "none"))
        check_choice("source_loss_mean", self.source_loss_mean, ("valid", "all"))
        check_choice("classes_drawn", self.classes_drawn, ("with-ignored", "labelled"))
        check_choice("teacher", self.teacher, ("ema", "network"))
        check_choice("jitter", self.jitter, ("additive", "torchvision"))
        check_fraction("threshold", self.threshold)
        check_fraction("decay", self.decay)


RELEASED = Recipe(
    mixed_loss_weights="target",
    lambda_scope="batch",
    source_loss_mean="valid",
    classes_drawn="with-ignored",
    teacher="ema",
    jitter="additive",
)
"""What the code behind the published 52.14 does."""

PAPER = Recipe(
    mixed_loss_weights="mixed",
    lambda_scope="image",
    source_loss_mean="all",
    classes_drawn="labelled",
    teacher="network",
    jitter="torchvision",
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
    upsample: bool = False,
    **overrides: str | float,
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
        upsample: Whether the student may return logits smaller than the images; see `SelfTraining`.
        **overrides: Fields of `Recipe` by name, e.g. `lambda_scope="image"`.

    Returns:
        A `SelfTraining`; its student is `student` itself, not a copy.

    Raises:
        TypeError: If an override is no field of `Recipe`.
        ValueError: If a method, a recipe or a value is unknown, or `prior` is given to a method without alignment.

    Example:
        >>> training = self_training(nn.Conv2d(3, 19, 1), 19, recipe="paper", lambda_scope="batch")
        >>> training.weigh, training.criterion.scope
        ('mixed', 'batch')
    """
    check_num_classes(num_classes)
    check_choice("method", method, METHODS)
    if prior is not None and method != "alignment":
        raise ValueError(f"`prior` belongs to method='alignment', got method={method!r}; leave it out.")
    choice = _resolve(recipe, overrides)
    criterion = ConfidenceWeightedCE(choice.threshold, scope=choice.lambda_scope, normalizer="all", sync=sync)
    source_criterion = ConfidenceWeightedCE(normalizer=choice.source_loss_mean, sync=sync)
    if method == "source":
        training = SelfTraining(
            student, None, mix=None, criterion=criterion, source_criterion=source_criterion, upsample=upsample
        )
        training.num_classes = num_classes
        return training
    mix: CrossDomainMix | ClassMix | None = None
    if method == "dacs":
        mix = CrossDomainMix(num_classes, include_ignored=choice.classes_drawn == "with-ignored")
    elif method in {"classmix", "alignment"}:
        mix = ClassMix(num_classes)
    align = DistributionAlignment(num_classes, prior=prior, sync=sync) if method == "alignment" else None
    training = SelfTraining(
        student,
        MeanTeacher(student, decay=choice.decay if choice.teacher == "ema" else 0.0, mode="train"),
        mix=mix,
        augment=StrongAugment(flavor=choice.jitter, same_on_batch=choice.jitter == "additive"),
        criterion=criterion,
        source_criterion=source_criterion,
        align=align,
        weigh=choice.mixed_loss_weights,
        upsample=upsample,
    )
    training.num_classes = num_classes  # pseudo-labelling has no part that knows it
    return training


def _resolve(recipe: str | Recipe, overrides: dict[str, str | float]) -> Recipe:
    if isinstance(recipe, str):
        check_choice("recipe", recipe, ("released", "paper"))
        recipe = RELEASED if recipe == "released" else PAPER
    unknown = sorted(overrides.keys() - Recipe.__dataclass_fields__.keys())
    if unknown:
        fields = ", ".join(Recipe.__dataclass_fields__)
        raise TypeError(f"self_training() got an unknown option {unknown[0]!r}; the options are {fields}.")
    return replace(recipe, **overrides)  # type: ignore[arg-type]  # values are checked by Recipe itself
