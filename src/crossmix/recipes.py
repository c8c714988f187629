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
    check_bool,
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
        consistency: Of `SelfTraining`: a `MaskedImages`, another function of images, or None; True builds a
            `MaskedImages` from `consistency_block` and `consistency_ratio`, False means None. Its images are augmented
            like the mixed ones.
        consistency_block: `block` of that `MaskedImages`; None means 64, or 32 for crops up to 512.
        consistency_ratio: `ratio` of that `MaskedImages`.
        consistency_weight: Of `SelfTraining`.
        consistency_running_stats: Of `SelfTraining`: whether BatchNorm's running statistics follow hidden images too.

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
    consistency: Callable[[Tensor], Tensor] | bool | None = None
    consistency_block: int | None = None
    consistency_ratio: float = 0.7
    consistency_weight: float = 1.0
    consistency_running_stats: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("weigh", self.weigh, ("target", "mixed"))
        check_choice("scope", self.scope, ("batch", "image", "pixel", "none"))
        check_choice("source_normalizer", self.source_normalizer, ("valid", "all", "weights"))
        check_choice("mode", self.mode, ("train", "eval"))
        check_choice("flavor", self.flavor, ("additive", "torchvision"))
        check_fraction("threshold", self.threshold)
        check_fraction("decay", self.decay)
        check_bool("include_ignored", self.include_ignored)
        check_bool("same_on_batch", self.same_on_batch)
        check_ignored_rows(self.ignore_top, self.ignore_bottom)
        if not (self.consistency is None or isinstance(self.consistency, bool) or callable(self.consistency)):
            raise TypeError(
                "`consistency` must be True, False, None, a MaskedImages or another function of images, got "
                f"{self.consistency!r}."
            )
        if self.consistency_block is not None:
            check_pixels("consistency_block", self.consistency_block)
        check_fraction("consistency_ratio", self.consistency_ratio)
        check_nonnegative("consistency_weight", self.consistency_weight)
        check_bool("consistency_running_stats", self.consistency_running_stats)


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

MIC = replace(
    RELEASED,
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
    **overrides: Any,  # noqa: ANN401 - each of its own type
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
        mean: Of `StrongAugment` and `SelfTraining`, with `std`: the statistics by which the data loader normalises
            images, if it does. Hidden blocks are then filled with the normalised mean colour, as they are where only a
            `StrongAugment` of yours, given as `augment` or `consistency_augment`, has a mean.
        std: Given with `mean`.
        **overrides: Any other argument of the parts by its name:

            - fields of `Recipe`, such as `scope="image"`, or `consistency=None` to drop that term;
            - of the mix: `ratio`, `rounding`, `whole_batch`, `class_weights` (odds of the draw), `masks`;
            - of `MeanTeacher`: `warmup`, `buffers`, `network`, `start`;
            - of `StrongAugment`: `brightness`, `contrast`, `saturation`, `hue`, `jitter_p`, `blur_p`, `blur_sigma`;
            - of the loss on mixed images: `normalizer`; of both losses: `label_smoothing`;
            - of `DistributionAlignment`: `momentum`;
            - of `SelfTraining`, your own parts in place of those built here: `mix`, `teacher`, `augment`
              (also used for the images of the consistency term), `consistency_augment`, `criterion`,
              `source_criterion`, `align`.

    Returns:
        A `SelfTraining`; its student is `student` itself, not a copy.

    Raises:
        TypeError: If an option does not exist, or a value has the wrong type.
        ValueError: If a method, a recipe or a value is unknown; an option has no effect, because the method lacks that
            part or the part is given (fields of `Recipe` fit every method); or a consistency term of your own, or
            `teacher=None`, leaves that term without a teacher (`consistency=True` adds none to `"source"`).

    Example:
        >>> training = self_training(nn.Conv2d(3, 19, 1), 19, recipe="paper", scope="batch")
        >>> training.weigh, training.criterion.scope
        ('mixed', 'batch')
        >>> self_training(nn.Conv2d(3, 19, 1), 19, recipe="mic").consistency
        MaskedImages(block=None, ratio=0.7, fill=(0.485, 0.456, 0.406))
        >>> self_training(nn.Conv2d(3, 19, 1), 19, rounding="floor", augment=None).mix.rounding
        'floor'
    """
    check_num_classes(num_classes)
    check_choice("method", method, METHODS)
    if prior is not None and method != "alignment":
        raise ValueError(f"`prior` belongs to method='alignment', got method={method!r}; leave it out.")
    choice, options, given = _resolve(recipe, overrides)
    _refuse_unused(method, choice, options, given, prior)
    if sync:
        _refuse_unsynced(given)
    mix: CrossDomainMix | ClassMix | None = None
    if method == "dacs":
        mix = CrossDomainMix(
            num_classes, ignore_index=ignore_index, include_ignored=choice.include_ignored, **options["mix"]
        )
    elif method in {"classmix", "alignment"}:
        mix = ClassMix(num_classes, ignore_index=ignore_index, **options["mix"])
    teacher = align = None
    if method != "source" and "teacher" not in given:
        teacher = MeanTeacher(student, decay=choice.decay, mode=choice.mode, **options["teacher"])
    if method == "alignment":
        align = DistributionAlignment(
            num_classes, prior=prior, sync=sync, ignore_index=ignore_index, **options["align"]
        )
    criterion = ConfidenceWeightedCE(
        choice.threshold, scope=choice.scope, ignore_index=ignore_index, sync=sync, **options["criterion"]
    )
    source_criterion = ConfidenceWeightedCE(
        ignore_index=ignore_index, normalizer=choice.source_normalizer, sync=sync, **options["source_criterion"]
    )

    def augment() -> StrongAugment:
        jitter = {"flavor": choice.flavor, "same_on_batch": choice.same_on_batch, **options["augment"]}
        return StrongAugment(**jitter, mean=mean, std=std)

    parts: dict[str, Any] = {"mix": mix, "teacher": teacher, "augment": augment(), "align": align}
    parts |= {"criterion": criterion, "source_criterion": source_criterion, **given}
    consistency = choice.consistency
    if isinstance(consistency, bool):  # the source-only baseline has no consistency term in any recipe
        consistency = _masked_images(choice, mean, std, given) if consistency and method != "source" else None
    if consistency is not None:
        parts = {"consistency_augment": given["augment"] if "augment" in given else augment(), **parts}
    return SelfTraining(
        student,
        parts.pop("teacher"),
        **parts,
        num_classes=num_classes,
        weigh=choice.weigh,
        upsample=upsample,
        align_corners=align_corners,
        logits=logits,
        consistency=consistency,
        consistency_weight=choice.consistency_weight,
        consistency_running_stats=choice.consistency_running_stats,
        ignore_top=choice.ignore_top,
        ignore_bottom=choice.ignore_bottom,
        mean=mean,
        std=std,
    )


def _masked_images(
    choice: Recipe, mean: Sequence[float] | None, std: Sequence[float] | None, given: dict[str, Any]
) -> MaskedImages:
    """`MaskedImages` whose fill is normalised like the images, as `mean` and `std` or a given augmentation say."""
    masked = MaskedImages(choice.consistency_block, choice.consistency_ratio)
    for name in ("augment", "consistency_augment"):
        part = getattr(given.get(name), "_orig_mod", given.get(name))  # inside a compiled module
        if mean is None and isinstance(part, StrongAugment):
            mean, std = part.mean, part.std
    if mean is not None and std is not None:
        masked.fill = tuple((value - m) / s for value, m, s in zip(masked.fill, mean, std, strict=True))
    return masked


# Options by the part of `SelfTraining` that they configure, which the user may pass instead: first those in which the
# recipes differ, then all others.
_FIELDS = {
    "mix": ("include_ignored",),
    "teacher": ("decay", "mode"),
    "augment": ("flavor", "same_on_batch"),
    "criterion": ("threshold", "scope"),
    "source_criterion": ("source_normalizer",),
}
_OPTIONS: dict[str, tuple[str, ...]] = {
    "mix": ("ratio", "rounding", "whole_batch", "class_weights", "masks"),
    "teacher": ("warmup", "buffers", "network", "start"),
    "augment": ("brightness", "contrast", "saturation", "hue", "jitter_p", "blur_p", "blur_sigma"),
    "consistency_augment": (),
    "criterion": ("normalizer", "label_smoothing"),
    "source_criterion": ("label_smoothing",),
    "align": ("momentum",),
}
_ARGUMENTS = ("prior", "sync", "ignore_index", "upsample", "align_corners", "logits", "mean", "std")


def _resolve(
    recipe: str | Recipe, overrides: dict[str, Any]
) -> tuple[Recipe, dict[str, dict[str, Any]], dict[str, Any]]:
    """The recipe with overridden fields, the other options of each part, and the parts given by the user."""
    if isinstance(recipe, str):
        named = {"released": RELEASED, "paper": PAPER, "mic": MIC}
        check_choice("recipe", recipe, tuple(named))
        recipe = named[recipe]
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a name or a Recipe, got {type(recipe).__name__}.")
    known = [*Recipe.__dataclass_fields__, *dict.fromkeys(name for names in _OPTIONS.values() for name in names)]
    known += [*_OPTIONS, *_ARGUMENTS]
    if unknown := sorted(overrides.keys() - set(known)):
        per_batch = "; it is given with each batch, when the result is called" if unknown[0] == "target_weights" else ""
        raise TypeError(
            f"self_training() got an unknown option {unknown[0]!r}{per_batch}; the options are {', '.join(known)}."
        )
    given = {part: overrides[part] for part in _OPTIONS if part in overrides}
    for part in given:
        if used := [name for name in (*_FIELDS.get(part, ()), *_OPTIONS[part]) if name in overrides]:
            raise ValueError(f"`{used[0]}` must be left out if `{part}` is given; set it there.")
    if callable(overrides.get("consistency", recipe.consistency)):
        for name in ("consistency_block", "consistency_ratio"):
            if name in overrides:
                raise ValueError(f"`{name}` must be left out if `consistency` is a module or function; set it there.")
    options = {part: {name: overrides[name] for name in names if name in overrides} for part, names in _OPTIONS.items()}
    fields = {name: value for name, value in overrides.items() if name in Recipe.__dataclass_fields__}
    return replace(recipe, **fields), options, given  # values are checked by Recipe, and by the parts


def _refuse_unsynced(given: dict[str, Any]) -> None:
    """Refuse parts whose sums would be those of one rank."""
    for name in ("criterion", "source_criterion", "align"):
        if getattr(given.get(name), "sync", True) is False:
            raise ValueError(f"`{name}` must be built with sync=True if `sync` is True, got sync=False.")


def _refuse_unused(
    method: str,
    choice: Recipe,
    options: dict[str, dict[str, Any]],
    given: dict[str, Any],
    prior: Tensor | Sequence[float] | None,
) -> None:
    """Refuse options without effect: those of parts that the method lacks, or that the user gives."""
    if prior is not None and "align" in given:
        raise ValueError("`prior` must be left out if `align` is given; set it there.")
    if method == "source" and given.get("teacher") is not None:
        raise ValueError("`teacher` must be left out for method='source', which has none; use method='pseudo-label'.")
    missing = {
        "source": ("mix", "teacher", "augment", "criterion", "align"),
        "pseudo-label": ("mix", "align"),
        "alignment": (),
    }.get(method, ("align",))
    has_effect = {name for part, names in options.items() if part not in missing for name in names}
    for part in missing:
        if unused := [name for name in options[part] if name not in has_effect]:
            raise ValueError(f"`{unused[0]}` must be left out for method={method!r}, where it has no effect.")
    if method != "source" and given.get("consistency_augment") is not None and choice.consistency in (None, False):
        raise ValueError("`consistency_augment` must be left out if there is no `consistency`; pass both.")
    if options["mix"].get("masks") is not None:
        for name in ("ratio", "rounding", "whole_batch"):  # `class_weights` are refused by the mix
            if name in options["mix"]:
                raise ValueError(f"`{name}` must be left out if `masks` is given, which replace the drawn classes.")
