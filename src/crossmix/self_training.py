"""One training step of DACS and its relatives: Algorithm 1 of the paper, with every row of its ablation.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
Masked image consistency: Hoyer et al., CVPR 2023, https://arxiv.org/abs/2212.01322
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from crossmix._checks import (
    check_bool,
    check_choice,
    check_ignored_rows,
    check_images,
    check_labels,
    check_module,
    check_nonnegative,
    check_num_classes,
    check_range,
    check_same_device,
    check_same_shape,
    check_weights,
)
from crossmix._norms import run_keeping_statistics
from crossmix._parts import (
    MixCall,
    agreed_ignore_index,
    agreed_num_classes,
    check_fill,
    check_part,
    checked_images,
    checked_logits,
    checked_loss,
    checked_mixed,
    checked_weights,
    how_to_call,
    is_a,
    is_drawn,
    labels_for,
    same_normalisation,
)
from crossmix._tensors import Device, uniform, upsample, weight_maps
from crossmix.augment import StrongAugment
from crossmix.losses import ConfidenceWeightedCE
from crossmix.masking import MaskedImages
from crossmix.mixing import Mixed, mix
from crossmix.teacher import PseudoLabels, pseudo_label_from_probs

__all__ = [
    "Alignment",
    "AveragedModel",
    "DrawnAugment",
    "MixedCriterion",
    "SelfTraining",
    "SelfTrainingDraw",
    "SelfTrainingOutput",
    "SourceOntoTarget",
    "TargetOntoTarget",
    "Teacher",
]


class SourceOntoTarget(Protocol):
    """A `mix` called with five arguments: `CrossDomainMix`, or anything with the same call."""

    def __call__(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        target_labels: Tensor,
        target_weights: Tensor,
        /,
    ) -> Mixed:
        """Mix a source batch with a target batch with (N, H, W) weights; the result has the target's shapes."""


class TargetOntoTarget(Protocol):
    """A `mix` called with three arguments: `ClassMix`, or anything with the same call."""

    def __call__(self, images: Tensor, labels: Tensor, weights: Tensor, /) -> Mixed:
        """Mix a target batch with itself: image i where the mask is true, image (i + 1) mod N elsewhere."""


class Teacher(Protocol):
    """The network that produces pseudo-labels: `MeanTeacher`, `timm.utils.ModelEmaV3`, or anything like them."""

    def __call__(self, images: Tensor, /) -> object:
        """Return the same kind of output as the student. Called without gradient."""

    def update(self, student: nn.Module, /) -> object:
        """Follow the student; called after each optimizer step."""


class AveragedModel(Protocol):
    """A `Teacher` whose update has the name used by `torch.optim.swa_utils.AveragedModel`."""

    def __call__(self, images: Tensor, /) -> object:
        """Return the same kind of output as the student. Called without gradient."""

    def update_parameters(self, student: nn.Module, /) -> object:
        """Follow the student; called after each optimizer step."""


class Alignment(Protocol):
    """A correction of the teacher's predictions: `DistributionAlignment`, or anything like it."""

    def __call__(self, probs: Tensor, /) -> Tensor:
        """Align (N, C, H, W) probabilities."""

    def update(self, probs: Tensor, /) -> object:
        """Update running averages; called in training mode, before the same probabilities are aligned."""


class MixedCriterion(Protocol):
    """The weights of target pixels and the loss on mixed images: `ConfidenceWeightedCE`, or anything like it."""

    def weights(self, confidence: Tensor, /) -> Tensor:
        """Weigh target pixels by their confidence (N, H, W): as (N, H, W), (N,) per image, or one scalar."""

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor, /) -> Tensor:
        """Return a scalar loss."""


class DrawnAugment(Protocol):
    """An `augment` that is replayed: `StrongAugment`, `crossmix.integrations.SeededAugment`, or anything like them."""

    def sample(
        self, n: int, /, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, ...] | Tensor:
        """Draw all randomness for n images as a tensor, or a tuple of tensors, with a row per image."""

    def __call__(self, images: Tensor, /, *, draw: Any) -> Tensor:  # noqa: ANN401 - what its `sample` returns
        """Augment images as drawn, each by its own row."""


class SelfTrainingDraw(NamedTuple):
    """All randomness of one step, as tensors with one row per mixed image.

    Attributes:
        scores: Random numbers for the masks: (N, C + 1) uniform numbers for classes, or the result of the mix's
            `sample_scores`; None if the mix takes no scores.
        augment: The draw of `StrongAugment`, or of another `DrawnAugment`; None without one.
        consistency: The scores of `MaskedImages`; None without one.
        consistency_augment: As `augment`, for the images of the consistency term.
    """

    scores: Tensor | None
    augment: tuple[Tensor, ...] | Tensor | None
    consistency: Tensor | None = None
    consistency_augment: tuple[Tensor, ...] | Tensor | None = None

    def rows(self, rows: slice) -> "SelfTrainingDraw":
        """Select the draw of some images, e.g. one rank's share of a global batch."""

        def of_rows(part: Any) -> Any:  # noqa: ANN401 - a tensor, a tuple of tensors, named or not, or None
            if isinstance(part, tuple):
                return getattr(type(part), "_make", tuple)(map(of_rows, part))
            return None if part is None else part[rows]

        return SelfTrainingDraw(*map(of_rows, self))


class SelfTrainingOutput(NamedTuple):
    """The result of one step.

    Attributes:
        loss: Scalar, source_loss + mixed_loss + consistency_loss; call `.backward()` on it.
        source_loss: Scalar.
        mixed_loss: Scalar; 0 without a teacher.
        confidence: (N, H, W), the teacher's on the target images, after any alignment; None without a teacher.
        mixed: The mixed images as the student saw them, with their labels and weights; None without a teacher.
        consistency_loss: Scalar, including `consistency_weight`; 0 without `consistency`.
        target_weight: Scalar, the mean weight of target pixels before pasting: lambda, combined with `target_weights`,
            `ignore_top` and `ignore_bottom`; None without a teacher.
    """

    loss: Tensor
    source_loss: Tensor
    mixed_loss: Tensor
    confidence: Tensor | None
    mixed: Mixed | None
    consistency_loss: Tensor
    target_weight: Tensor | None


class _Batch(NamedTuple):
    source_images: Tensor
    source_labels: Tensor
    target_images: Tensor
    target_weights: Tensor | None


class _Target(NamedTuple):
    """Pseudo-labels of the target images and the weights of their pixels."""

    pseudo: PseudoLabels
    weights: Tensor  # (N, H, W), from confidence
    allowed: Tensor  # (N, H, W), from `target_weights` and ignored rows


class SelfTraining(nn.Module):
    """Train on labelled source images and on mixed images with pseudo-labels (Algorithm 1, Eq. (3)).

    loss = H(f(x_S), y_S) + sum over pixels of w CE(f(x_M), y_M) / number of pixels

    The student makes two forward passes, source then mixed, as in the released code, so that BatchNorm sees one domain
    at a time. With `consistency` it makes a third, on partly hidden target images (masked image consistency).
    `crossmix.recipes.self_training` builds this module by the names of a method and a recipe.

    The protocols in this module state what is required of each part. All parts with an `ignore_index` or `num_classes`
    attribute must agree on it; the default losses adopt that value.

    Args:
        student: The network f to train; takes `images`, returns (N, C, H, W) logits.
        teacher: The network that labels target images: a `MeanTeacher`, or any callable on images with a method
            `update(student)` or `update_parameters(student)`. `.train()` and `.eval()` do not reach it: it keeps its
            mode. None gives the source-only baseline, whatever the other parts are.
        mix: `CrossDomainMix` (DACS), `ClassMix` (naive ClassMix), your own, or None (pseudo-labelling, without
            pasting). A callable of five arguments (`SourceOntoTarget`) pastes source onto target; one of three
            (`TargetOntoTarget`) mixes the target with itself. If it accepts the keyword `scores`, it gets the draw: the
            result of its own `sample_scores(n, size, generator=, device=)` or, without that method, (N, C + 1) uniform
            numbers. Otherwise it gets `generator` if it accepts that, and is not replayed by `draw`.
        num_classes: The number of classes C that the networks must return; by default that of the parts.
        augment: Applied only to the mixed images: a `StrongAugment`, another `DrawnAugment`, or any callable on images,
            which gets no draw and no generator. It must not move pixels, since labels and weights are not transformed.
        criterion: Computes the weights of target pixels and the loss on mixed images; `ConfidenceWeightedCE()` by
            default.
        source_criterion: `source_criterion(logits, labels)`; cross-entropy averaged over valid pixels by default. Other
            criteria than ours get int64 labels. If they have a negative `ignore_index`, such as the -100 of
            `nn.CrossEntropyLoss`, it replaces the labels of ignored pixels and of ids that are not classes.
        align: A `DistributionAlignment` for the teacher's predictions, or anything like it. In training mode each step
            first updates its running average; labels and confidence then come from the aligned predictions.
        weigh: `"target"` applies the confidence weight to target pixels and 1 to source pixels (the released code),
            `"mixed"` applies it to the whole mixed image (the paper's lambda). Naive ClassMix has only target pixels:
            each keeps the weight of its own image, or with `"mixed"` the weight is computed from the mixed confidence.
        upsample: Whether the networks may return logits smaller than the images. Pseudo-labels are then computed from
            bilinearly upsampled logits, and the losses are `crossmix.functional.upsampled_cross_entropy`.
        align_corners: Convention of that upsampling: True as in DeepLab and the released code, False as in
            transformers, mmsegmentation and DAFormer.
        logits: Extracts the logits from the networks' output if that is not a tensor: `lambda out: out.logits`.
        consistency: Adds a loss on partly hidden target images, with the same pseudo-labels and weights as the mixed
            loss (the teacher runs only once): a `MaskedImages`, or any callable on images, which gets no draw and must
            not move pixels. The loss is `criterion`.
        consistency_augment: Applied to these images before hiding, as `augment` to the mixed ones; not used without
            `consistency`.
        consistency_weight: Factor of that loss.
        consistency_running_stats: Whether the running statistics of the student's norms (BatchNorm, and others derived
            from torch's) also follow the partly hidden images, as in the authors' code. False leaves them to the source
            and mixed images; the losses and gradients are the same. With activation checkpointing, which repeats the
            pass, the statistics follow these images all the same.
        ignore_top: Rows at the top of target images (sky) whose pseudo-labels get weight 0, given for a height of 512
            and scaled to that of the images. Like pixels with `target_weights` 0, they still count in lambda, as in
            DAFormer's code.
        ignore_bottom: As `ignore_top`, at the bottom (the car's own bonnet).
        mean: Mean per channel if the data loader normalises images as (x - mean) / std, for the check of their range.
            By default that of a `StrongAugment` among the parts.
        std: Standard deviation per channel; required with `mean`.

    Attributes:
        num_classes: The number of classes that the networks must return; None (unknown) accepts any.
        ignore_index: The id of ignored pixels in all parts; 255 if none of them has one.

    Raises:
        TypeError: If a part lacks what is required of it.
        ValueError: If `weigh` is unknown, a number is out of range, `consistency` is given without a teacher, or parts
            disagree on `num_classes` or `ignore_index`.

    Example:
        >>> from crossmix import CrossDomainMix, MeanTeacher, SelfTraining
        >>> student = nn.Conv2d(3, 19, 1)
        >>> training = SelfTraining(student, MeanTeacher(student), mix=CrossDomainMix(19))
        >>> source_images, target_images = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        >>> output = training(source_images, torch.zeros(2, 8, 8, dtype=torch.uint8), target_images)
        >>> output.loss.backward()  # then optimizer.step(), then:
        >>> training.update()
    """

    # Typed Any, so that attributes beyond the protocols stay accessible, e.g. `training.teacher.module`.
    teacher: Any
    mix: Any
    augment: Any
    consistency_augment: Any
    criterion: Any
    align: Any
    _mix_call: MixCall | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    _drawn: Mapping[str, bool] = {}  # whether an augmentation is a `DrawnAugment`

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | AveragedModel | None,
        *,
        mix: SourceOntoTarget | TargetOntoTarget | None,
        num_classes: int | None = None,
        augment: Callable[[Tensor], Tensor] | None = None,
        criterion: MixedCriterion | None = None,
        source_criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        align: Alignment | None = None,
        weigh: Literal["target", "mixed"] = "target",
        upsample: bool = False,
        align_corners: bool = True,
        logits: Callable[[Any], Tensor] | None = None,
        consistency: Callable[[Tensor], Tensor] | None = None,
        consistency_augment: Callable[[Tensor], Tensor] | None = None,
        consistency_weight: float = 1.0,
        consistency_running_stats: bool = True,
        ignore_top: int = 0,
        ignore_bottom: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_module("student", student)
        check_part("teacher", teacher, "MeanTeacher", "update(student)", "update_parameters(student)")
        check_part("mix", mix, "CrossDomainMix")
        check_part("augment", augment, "StrongAugment")
        check_part("criterion", criterion, "ConfidenceWeightedCE", "weights(confidence)")
        check_part("source_criterion", source_criterion, "ConfidenceWeightedCE")
        check_part("align", align, "DistributionAlignment", "update(probs)")
        check_part("logits", logits, "nn.Identity")
        check_part("consistency", consistency, "MaskedImages")
        check_part("consistency_augment", consistency_augment, "StrongAugment")
        if consistency is not None and teacher is None:
            raise ValueError("`consistency` needs the pseudo-labels of a `teacher`, got none; pass a MeanTeacher.")
        check_nonnegative("consistency_weight", consistency_weight)
        check_bool("consistency_running_stats", consistency_running_stats)
        check_bool("upsample", upsample)
        check_bool("align_corners", align_corners)
        check_ignored_rows(ignore_top, ignore_bottom)
        check_choice("weigh", weigh, ("target", "mixed"))
        if num_classes is not None:
            check_num_classes(num_classes)
        parts = {"mix": mix, "align": align, "criterion": criterion, "source_criterion": source_criterion}
        self.num_classes: int | None = agreed_num_classes(num_classes, parts)
        self.ignore_index: int = agreed_ignore_index(parts)
        self.student = student
        self.teacher = teacher
        self.mix = mix
        self.augment = augment
        if criterion is None:
            criterion = ConfidenceWeightedCE(ignore_index=self.ignore_index)
        self.criterion = criterion
        if source_criterion is None:
            source_criterion = ConfidenceWeightedCE(ignore_index=self.ignore_index, normalizer="valid")
        self.source_criterion = source_criterion
        self.align = align
        self.weigh = weigh
        self.upsample = upsample
        self.align_corners = align_corners
        self.logits = logits
        self.consistency = consistency
        self.consistency_augment = consistency_augment
        self.consistency_weight = consistency_weight
        self.consistency_running_stats = consistency_running_stats
        self.ignore_top = ignore_top
        self.ignore_bottom = ignore_bottom
        self.mean, self.std = same_normalisation(mean, std, augment=augment, consistency_augment=consistency_augment)
        check_fill(consistency, *self._normalised())
        self._mix_keyword()

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401 - whatever a module may hold
        """Set an attribute. The signatures of parts are inspected here, because torch.compile cannot trace that."""
        if name == "mix":
            self._mix_call = None if value is None else how_to_call(value)
        if name in {"augment", "consistency_augment"}:
            self._drawn = {**self._drawn, name: is_drawn(value)}
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> "SelfTraining":
        """Set the mode of all parts except the teacher, which keeps its own."""
        self.training = mode
        for name, part in self.named_children():
            if name != "teacher":
                part.train(mode)
        return self

    def sample(
        self, n: int, size: tuple[int, int] | None = None, *, generator: Generator | None = None, device: Device = None
    ) -> SelfTrainingDraw:
        """Draw all randomness of a step in advance.

        The draw does not depend on the images, so it can be made for a global batch and split over ranks, be kept in
        static tensors for a CUDA graph, or be passed to a compiled function. What parts of your own draw internally is
        not in it. Without a teacher it is empty.

        Args:
            n: The number of target images, and so of mixed images.
            size: Their height and width, for parts whose draw depends on it: `MaskedImages` and some masks.
            generator: Source of randomness, used on its own device; None uses the global one.
            device: Device of the result; by default the generator's device, or torch's default one.

        Returns:
            The draw, for `draw=` of `forward` and `terms`.

        Raises:
            TypeError: If `generator` is no torch.Generator.
            ValueError: If a part needs `size` and it is not given.
        """
        scores = augment = consistency = consistency_augment = None
        if self.teacher is None:
            return SelfTrainingDraw(scores, augment)
        if self._mix_keyword() == "scores":
            if hasattr(self.mix, "sample_scores"):
                scores = self.mix.sample_scores(n, size, generator=generator, device=device)
            else:
                columns = self.num_classes + 1  # type: ignore[operator]  # known, or the mix would get no scores
                scores = uniform((n, columns), generator=generator, device=device)
        if self._drawn["augment"]:
            augment = self.augment.sample(n, generator=generator, device=device)
        if is_a(self.consistency, MaskedImages):
            if size is None:
                raise ValueError(
                    "`size` must be given, since the blocks of `consistency` depend on it; pass (height, width)."
                )
            consistency = self.consistency.sample(n, size, generator=generator, device=device)
        if self.consistency is not None and self._drawn["consistency_augment"]:
            consistency_augment = self.consistency_augment.sample(n, generator=generator, device=device)
        return SelfTrainingDraw(scores, augment, consistency, consistency_augment)

    def forward(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        *,
        target_weights: Tensor | None = None,
        generator: Generator | None = None,
        draw: SelfTrainingDraw | None = None,
    ) -> SelfTrainingOutput:
        """Compute the loss of one step. Changes no state except the student's BatchNorm statistics and `align`.

        Args:
            source_images: (N, 3, H, W) floating in [0, 1], or normalised by `mean` and `std`.
            source_labels: (N, H, W) integer ground truth.
            target_images: (N, 3, H, W), in the same range; of the same shape if the source is pasted onto them.
            target_weights: (N, H, W) or (N,) floating, multiplied into the weights of target pixels: 0 for padding or
                the ego-vehicle. Such pixels still count in lambda.
            generator: Source of randomness; None uses the global one. `torch.compile` cannot trace it: use `draw`.
            draw: A draw from `sample`, to replay it.

        Returns:
            The loss, its terms, and what they were computed from.

        Raises:
            TypeError: If a dtype is wrong, or a part returns the wrong type.
            ValueError: If shapes or devices disagree, images are far out of range (checked on the CPU only), or a
                network returns smaller logits without `upsample=True`.
        """
        batch = _Batch(source_images, source_labels, target_images, target_weights)
        self._check_batch(batch)
        self._check_draw(draw)
        source_loss = self._source_loss(batch)
        nothing = torch.zeros_like(source_loss)
        if self.teacher is None:
            return SelfTrainingOutput(source_loss, source_loss, nothing, None, None, nothing, None)
        draw = self._draw(batch, generator, draw)
        target = self._target(batch)
        mixed = self._mixed(batch, target, generator, draw)
        mixed_loss = self._mixed_loss(mixed)
        loss, hidden_loss = source_loss + mixed_loss, nothing
        if self.consistency is not None:
            hidden_loss = self._consistency_loss(batch, target, draw)
            loss = loss + hidden_loss
        weight = (target.weights * target.allowed).sum() / max(target.weights.numel(), 1)
        confidence = target.pseudo.confidence
        return SelfTrainingOutput(loss, source_loss, mixed_loss, confidence, mixed, hidden_loss, weight)

    def terms(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        *,
        target_weights: Tensor | None = None,
        generator: Generator | None = None,
        draw: SelfTrainingDraw | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Compute the terms of the loss of one step one by one; `forward` returns their sum.

        Backpropagating each term before the next is computed gives the same gradients in less memory.

            for name, loss in training.terms(source_images, source_labels, target_images):
                loss.backward()

        The arguments and errors are those of `forward`.

        Returns:
            An iterator over `("source_loss", loss)` and, with a teacher, `("mixed_loss", loss)` and, with
            `consistency`, `("consistency_loss", loss)`, named as in `SelfTrainingOutput`. Each is computed when the
            iterator reaches it.
        """
        batch = _Batch(source_images, source_labels, target_images, target_weights)
        self._check_batch(batch)  # here, so that errors are raised by the call rather than by an iteration
        self._check_draw(draw)

        def one_by_one() -> Iterator[tuple[str, Tensor]]:
            yield "source_loss", self._source_loss(batch)
            if self.teacher is None:
                return
            drawn = self._draw(batch, generator, draw)
            target = self._target(batch)
            yield "mixed_loss", self._mixed_loss(self._mixed(batch, target, generator, drawn))
            if self.consistency is not None:
                yield "consistency_loss", self._consistency_loss(batch, target, drawn)

        return one_by_one()

    def update(self) -> None:
        """Update the teacher with the student. Call this after each optimizer step, except after skipped ones."""
        if self.teacher is not None:
            update = getattr(self.teacher, "update", None) or self.teacher.update_parameters
            update(self.student)

    def extra_repr(self) -> str:
        """Constructor arguments that are not modules, for `repr`."""
        return (
            f"weigh={self.weigh!r}, upsample={self.upsample}, align_corners={self.align_corners}, "
            f"num_classes={self.num_classes}, ignore_index={self.ignore_index}, "
            f"consistency_weight={self.consistency_weight}, "
            f"consistency_running_stats={self.consistency_running_stats}, ignore_top={self.ignore_top}, "
            f"ignore_bottom={self.ignore_bottom}, mean={self.mean}, std={self.std}"
        )

    def _source_loss(self, batch: _Batch) -> Tensor:
        logits = self._logits("student", self.student, batch.source_images)
        return self._loss("source_criterion", logits, batch.source_labels)

    def _mixed_loss(self, mixed: Mixed) -> Tensor:
        logits = self._logits("student", self.student, mixed.images)
        return self._loss("criterion", logits, mixed.labels, mixed.weights)

    def _consistency_loss(self, batch: _Batch, target: _Target, draw: SelfTrainingDraw) -> Tensor:
        images = self._changed("consistency_augment", batch.target_images, draw.consistency_augment)
        images = self._changed("consistency", images, draw.consistency)
        keep = not self.consistency_running_stats
        network = partial(run_keeping_statistics, self.student) if keep else self.student
        logits = self._logits("student", network, images)
        loss = self._loss("criterion", logits, target.pseudo.labels, target.weights * target.allowed)
        return self.consistency_weight * loss

    def _draw(self, batch: _Batch, generator: Generator | None, draw: SelfTrainingDraw | None) -> SelfTrainingDraw:
        """The draw that is given, or a fresh one."""
        if draw is not None:
            return draw
        images = batch.target_images
        size = (images.shape[-2], images.shape[-1])
        return self.sample(len(images), size, generator=generator, device=images.device)

    def _target(self, batch: _Batch) -> _Target:
        """One pass of the teacher, and the weights that follow from it."""
        pseudo = self._pseudo_label(batch.target_images)
        weights = self._weights(pseudo.confidence)
        allowed = weights.new_ones(len(weights)) if batch.target_weights is None else batch.target_weights
        return _Target(pseudo, weights, self._without_ignored_rows(weight_maps(allowed, weights)))

    def _without_ignored_rows(self, weights: Tensor) -> Tensor:
        """Set the weights of the ignored rows to 0; their number is scaled from a height of 512 and rounded."""
        if self.ignore_top == self.ignore_bottom == 0:
            return weights
        height = weights.shape[1]
        top, bottom = ((rows * height + 256) // 512 for rows in (self.ignore_top, self.ignore_bottom))
        row = torch.arange(height, device=weights.device)[:, None]
        return torch.where((row >= top) & (row < height - bottom), weights, 0.0)

    def _mixed(self, batch: _Batch, target: _Target, generator: Generator | None, draw: SelfTrainingDraw) -> Mixed:
        """The mixed batch as the student sees it, after augmentation."""
        keyword = self._mix_keyword()
        randomness = {"scores": draw.scores, "generator": generator}
        mixed = self._mix(batch, target, {keyword: randomness[keyword]} if keyword else {})
        return mixed._replace(images=self._changed("augment", mixed.images, draw.augment))

    def _pseudo_label(self, target_images: Tensor) -> PseudoLabels:
        """Labels and confidence from the teacher's predictions, after any alignment."""
        with torch.no_grad():
            logits = self._logits("teacher", self.teacher, target_images)
            probs = upsample(logits, target_images.shape[-2:], align_corners=self.align_corners).softmax(1)
            if self.align is not None:
                if self.training:
                    self.align.update(probs)
                probs = self.align(probs)
            return pseudo_label_from_probs(probs)

    def _mix(self, batch: _Batch, target: _Target, keywords: Mapping[str, object]) -> Mixed:
        """The mixed batch before augmentation, with its weights."""
        (labels, confidence), weights, allowed = target
        images = batch.target_images
        if self._mix_call is None:
            return Mixed(images, labels, weights * allowed, torch.zeros_like(labels, dtype=torch.bool))
        if self._mix_call.onto_target:
            mixed = self.mix(batch.source_images, batch.source_labels, images, labels, weights * allowed, **keywords)
            mixed = checked_mixed(mixed, images, *self._normalised())
            if self.weigh == "mixed":
                mixed = mixed._replace(weights=mix(weights, mixed.weights, mixed.mask))
            return mixed
        mixed = self.mix(images, labels, weights * allowed, **keywords)
        mixed = checked_mixed(mixed, images, *self._normalised())
        if self.weigh == "mixed":
            confidence = mix(confidence, confidence.roll(-1, 0), mixed.mask)
            mixed = mixed._replace(weights=self._weights(confidence) * mix(allowed, allowed.roll(-1, 0), mixed.mask))
        return mixed

    def _weights(self, confidence: Tensor) -> Tensor:
        """The criterion's weights of target pixels, (N, H, W)."""
        return weight_maps(checked_weights(self.criterion.weights(confidence), confidence), confidence)

    def _mix_keyword(self) -> str:
        """The keyword that passes randomness to the mix: `scores`, `generator`, or "" for neither."""
        if self._mix_call is None:
            return ""
        has_scores = self.num_classes is not None or hasattr(self.mix, "sample_scores")
        for keyword in self._mix_call.keywords:
            if keyword != "scores" or has_scores:
                return keyword
        hint = "pass `num_classes=` to SelfTraining"
        raise ValueError(f"`mix` must be given `scores`, but the number of classes is unknown; {hint}.")

    def _changed(self, name: str, images: Tensor, draw: Any) -> Tensor:  # noqa: ANN401 - depends on the part
        """Apply the part `name` to images and check the result."""
        part = getattr(self, name)
        if part is None:
            return images
        changed: Tensor
        for kind, keyword in ((StrongAugment, "draw"), (MaskedImages, "scores")):
            if is_a(part, kind):
                changed = part(images, **{keyword: draw})
                return changed
        changed = part(images, draw=draw) if self._drawn.get(name) else part(images)
        return checked_images(name, changed, images, *self._normalised())

    def _check_draw(self, draw: SelfTrainingDraw | None) -> None:
        """Refuse an incomplete draw: the modules would silently draw the rest themselves."""
        if draw is None or self.teacher is None:
            return
        if not isinstance(draw, SelfTrainingDraw):
            raise TypeError(f"`draw` must be a SelfTrainingDraw, got {type(draw).__name__}; make it with `sample`.")
        hidden = self.consistency is not None
        needed = {
            "scores": ("a `mix`", self._mix_keyword() == "scores"),
            "augment": ("a `StrongAugment` or the like", self._drawn["augment"]),
            "consistency": ("a `MaskedImages`", is_a(self.consistency, MaskedImages)),
            "consistency_augment": ("a `StrongAugment` or the like", hidden and self._drawn["consistency_augment"]),
        }
        for name, (part, is_there) in needed.items():
            if is_there and getattr(draw, name) is None:
                raise ValueError(f"`draw.{name}` must be given, since there is {part}; make the draw with `sample`.")

    def _loss(self, name: str, logits: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
        """Apply the criterion `name` to logits, which may be smaller than the labels."""
        criterion = getattr(self, name)
        small = logits.shape[-2:] != labels.shape[-2:]
        if isinstance(criterion, ConfidenceWeightedCE):
            if small:
                return criterion.upsampled(logits, labels, *weights, align_corners=self.align_corners)
        else:
            if small:
                logits = upsample(logits, labels.shape[-2:], align_corners=self.align_corners)
            labels = labels_for(criterion, labels, logits.shape[1], self.ignore_index)
        return checked_loss(name, criterion(logits, labels, *weights))

    def _logits(self, name: str, network: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Run a network on images and check that it returns logits."""
        logits = network(images)
        if self.logits is not None:
            logits = self.logits(logits)
        return checked_logits(name, logits, images, num_classes=self.num_classes, upsample=self.upsample)

    def _check_batch(self, batch: _Batch) -> None:
        source_images, source_labels, target_images, target_weights = batch
        check_images("source_images", source_images)
        check_labels("source_labels", source_labels)
        check_images("target_images", target_images)
        n, _, height, width = source_images.shape
        check_same_shape("source_labels", source_labels.shape, "source_images", (n, height, width))
        if self._mix_call is not None and self._mix_call.onto_target:
            check_same_shape("target_images", target_images.shape, "source_images", source_images.shape)
        if target_weights is not None:
            n, _, height, width = target_images.shape
            check_weights("target_weights", target_weights, (n, height, width))
        check_same_device(**batch._asdict())
        mean, std = self._normalised()
        check_range("source_images", source_images, mean=mean, std=std)
        check_range("target_images", target_images, mean=mean, std=std)

    def _normalised(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and std of the images' normalisation, or None."""
        augments = [part for part in (self.augment, self.consistency_augment) if is_a(part, StrongAugment)]
        return (augments[0].mean, augments[0].std) if augments else (self.mean, self.std)
