"""One training step of DACS and its relatives: Algorithm 1 of the paper, with every row of its ablation.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from crossmix._checks import check_choice, check_images, check_labels, check_same_device, check_same_shape, check_tensor
from crossmix._tensors import uniform
from crossmix.alignment import DistributionAlignment
from crossmix.augment import AugmentDraw, StrongAugment
from crossmix.losses import ConfidenceWeightedCE
from crossmix.mixing import ClassMix, CrossDomainMix, Mixed, mix
from crossmix.teacher import MeanTeacher, PseudoLabels, pseudo_label_from_probs

__all__ = ["SelfTraining", "SelfTrainingDraw", "SelfTrainingOutput"]


class _WeightedLoss(Protocol):
    """What `SelfTraining` asks of `criterion`: `ConfidenceWeightedCE`, or anything like it."""

    def weights(self, confidence: Tensor, /) -> Tensor:
        """Weigh target pixels by confidence, (N, H, W) to (N, H, W)."""

    def __call__(self, logits: Tensor, labels: Tensor, weights: Tensor, /) -> Tensor:
        """Return a scalar loss."""


class SelfTrainingDraw(NamedTuple):
    """Everything random in one step, as tensors with one row per mixed image.

    Attributes:
        scores: (N, C + 1) uniform numbers that draw the classes; None without a mix.
        augment: The draw of `StrongAugment`; None without one.
    """

    scores: Tensor | None
    augment: AugmentDraw | None

    def rows(self, rows: slice) -> "SelfTrainingDraw":
        """Take the part of some images: one rank's of a draw for the batch of all ranks.

        Args:
            rows: Which images.

        Returns:
            Their draw.
        """
        scores = None if self.scores is None else self.scores[rows]
        augment = None if self.augment is None else AugmentDraw(*(part[rows] for part in self.augment))
        return SelfTrainingDraw(scores, augment)


class SelfTrainingOutput(NamedTuple):
    """What one step computed.

    Attributes:
        loss: Scalar, source_loss + mixed_loss: call `.backward()` on it.
        source_loss: Scalar.
        mixed_loss: Scalar; 0 without a teacher.
        confidence: (N, H, W) of the teacher on the target images, after any alignment; None without a teacher.
        mixed: What the student saw and what it was compared with; None without a teacher.
    """

    loss: Tensor
    source_loss: Tensor
    mixed_loss: Tensor
    confidence: Tensor | None
    mixed: Mixed | None


class SelfTraining(nn.Module):
    """Train on labelled source images and on mixed images with pseudo-labels (Algorithm 1, Eq. (3)).

    loss = H(f(x_S), y_S) + sum over pixels of w CE(f(x_M), y_M) / number of pixels

    The student makes two forward passes, source then mixed, as in the released code: BatchNorm sees one domain at a
    time. `crossmix.recipes.self_training` builds this by the name of a method and of a recipe.

    Args:
        student: The network f that is trained; takes `images`, returns (N, C, H, W) logits.
        teacher: The `MeanTeacher` that labels target images. None trains on the source alone, whatever the other parts
            are: the baseline is one argument away.
        mix: `CrossDomainMix` (DACS), `ClassMix` (naive ClassMix) or None (pseudo-labelling: nothing is pasted).
        augment: Applied to the mixed images alone: a `StrongAugment`, or any callable on images (which gets no draw).
        criterion: Makes the weights of target pixels and the loss on mixed images; `ConfidenceWeightedCE()` by default.
        source_criterion: `source_criterion(logits, labels)`; cross-entropy averaged over valid pixels by default.
        align: A `DistributionAlignment` for the teacher's predictions. In training mode each step first moves its
            running average; labels and confidence then come from the aligned predictions.
        weigh: `"target"` puts the confidence weight on target pixels and 1 on source pixels (the released code),
            `"mixed"` puts it on the whole mixed image (the paper's lambda). A naive ClassMix has target pixels alone:
            each keeps the weight of the image it comes from, or with `"mixed"` the weight follows from the mixed
            confidence.
        upsample: Whether the networks may return logits smaller than the images. Pseudo-labels are then made from
            bilinearly upsampled ones, and the losses are `crossmix.functional.upsampled_cross_entropy`.

    Attributes:
        num_classes: The number of classes that the networks must return, taken from `mix` or `align`; None, where there
            is neither, accepts any.

    Raises:
        TypeError: If a part is of the wrong kind.
        ValueError: If `weigh` is unknown, or `mix` and `align` have different numbers of classes.

    Example:
        >>> from crossmix import CrossDomainMix, MeanTeacher, SelfTraining
        >>> student = nn.Conv2d(3, 19, 1)
        >>> training = SelfTraining(student, MeanTeacher(student), mix=CrossDomainMix(19))
        >>> source_images, target_images = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
        >>> output = training(source_images, torch.zeros(2, 8, 8, dtype=torch.uint8), target_images)
        >>> output.loss.backward()  # then optimizer.step(), then:
        >>> training.update()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: MeanTeacher | None,
        *,
        mix: CrossDomainMix | ClassMix | None,
        augment: Callable[[Tensor], Tensor] | None = None,
        criterion: _WeightedLoss | None = None,
        source_criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        align: DistributionAlignment | None = None,
        weigh: Literal["target", "mixed"] = "target",
        upsample: bool = False,
    ) -> None:
        super().__init__()
        _check_kind("student", student, nn.Module)
        _check_kind("teacher", teacher, MeanTeacher, type(None))
        _check_kind("mix", mix, CrossDomainMix, ClassMix, type(None))
        _check_kind("align", align, DistributionAlignment, type(None))
        for name, part in (("augment", augment), ("criterion", criterion), ("source_criterion", source_criterion)):
            if part is not None and not callable(part):
                raise TypeError(f"`{name}` must be callable, got {type(part).__name__}; pass a module or a function.")
        if criterion is not None and not callable(getattr(criterion, "weights", None)):
            raise TypeError(
                f"`criterion` must have a method `.weights(confidence)`, got {type(criterion).__name__} without one; "
                "pass a ConfidenceWeightedCE, or add the method."
            )
        check_choice("weigh", weigh, ("target", "mixed"))
        if mix is not None and align is not None and mix.num_classes != align.num_classes:
            raise ValueError(
                f"`mix` has num_classes={mix.num_classes} but `align` {align.num_classes}; make both with one number."
            )
        self.student = student
        self.teacher = teacher
        self.mix = mix
        self.augment = augment
        self.criterion = ConfidenceWeightedCE() if criterion is None else criterion
        if source_criterion is None:
            source_criterion = ConfidenceWeightedCE(normalizer="valid")  # without weights: the mean over valid pixels
        self.source_criterion = source_criterion
        self.align = align
        self.weigh = weigh
        self.upsample = upsample
        part = align if mix is None else mix
        self.num_classes = None if part is None else part.num_classes

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> SelfTrainingDraw:
        """Make everything random in a step beforehand.

        Nothing of it depends on the images, so a draw can be made for a global batch and its rows split over ranks, be
        held in static tensors for a CUDA graph, or be handed to a compiled function.

        Args:
            n: The number of mixed images.
            generator: Source of randomness, used on its own device; None uses the global one.
            device: Where the draw shall be; the generator's device, or torch's default one, when not given.

        Returns:
            The draw, for `forward(draw=...)`.
        """
        scores = augment = None
        if self.mix is not None:
            scores = uniform((n, self.mix.num_classes + 1), generator=generator, device=device)
        if isinstance(self.augment, StrongAugment):
            augment = self.augment.sample(n, generator=generator, device=device)
        return SelfTrainingDraw(scores, augment)

    def forward(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        *,
        target_weights: Tensor | None = None,
        generator: torch.Generator | None = None,
        draw: SelfTrainingDraw | None = None,
    ) -> SelfTrainingOutput:
        """Compute the loss of one step. State is left alone but for the student's BatchNorm and `align`.

        Args:
            source_images: (N, 3, H, W) floating in [0, 1].
            source_labels: (N, H, W) integer ground truth.
            target_images: (N, 3, H, W) floating in [0, 1]; with `CrossDomainMix` of the source's shape.
            target_weights: (N, H, W) or (N,) floating, multiplied into the weights of target pixels: 0 for padding or
                the ego-vehicle.
            generator: Source of randomness; None uses the global one. Cannot be traced by `torch.compile`: use `draw`.
            draw: What `sample` returned, to replay it.

        Returns:
            Losses, the teacher's confidence and the mixed batch.

        Raises:
            TypeError: If a dtype is wrong or a network does not return a tensor.
            ValueError: If shapes or devices disagree, or a network returns smaller logits without `upsample=True`.
        """
        self._check_batch(source_images, source_labels, target_images, target_weights)
        source_logits = self._logits("student", self.student, source_images)
        source_loss = self._loss(self.source_criterion, source_logits, source_labels)
        if self.teacher is None:
            nothing = torch.zeros_like(source_loss)
            return SelfTrainingOutput(source_loss, source_loss, nothing, None, None)
        if draw is None:
            draw = self.sample(len(target_images), generator=generator, device=target_images.device)
        self._check_draw(draw)
        pseudo_labels = self._pseudo_label(self.teacher, target_images)
        mixed = self._mix(
            source_images,
            source_labels,
            target_images,
            pseudo_labels,
            target_weights=target_weights,
            scores=draw.scores,
        )
        mixed = mixed._replace(images=self._augment(mixed.images, draw.augment))
        mixed_logits = self._logits("student", self.student, mixed.images)
        mixed_loss = self._loss(self.criterion, mixed_logits, mixed.labels, mixed.weights)
        return SelfTrainingOutput(source_loss + mixed_loss, source_loss, mixed_loss, pseudo_labels.confidence, mixed)

    def update(self) -> None:
        """Average the student into the teacher: call it after each optimizer step, and not after a skipped one."""
        if self.teacher is not None:
            self.teacher.update(self.student)

    def extra_repr(self) -> str:
        """Constructor arguments that are no modules, for `repr`."""
        return f"weigh={self.weigh!r}, upsample={self.upsample}"

    def _pseudo_label(self, teacher: MeanTeacher, target_images: Tensor) -> PseudoLabels:
        """Labels and confidence from the teacher's predictions, aligned where asked."""
        with torch.no_grad():
            logits = self._logits("teacher", teacher, target_images)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            if logits.shape[-2:] != target_images.shape[-2:]:
                logits = _upsampled(logits, target_images)
            probs = logits.softmax(1)
            if self.align is not None:
                if self.training:
                    self.align.update(probs)
                probs = self.align(probs)
            return pseudo_label_from_probs(probs)

    def _mix(
        self,
        source_images: Tensor,
        source_labels: Tensor,
        target_images: Tensor,
        pseudo_labels: PseudoLabels,
        *,
        target_weights: Tensor | None,
        scores: Tensor | None,
    ) -> Mixed:
        """The mixed batch of the method, weighed by confidence."""
        labels, confidence = pseudo_labels
        weights = self.criterion.weights(confidence)
        allowed = weights.new_ones(len(weights)) if target_weights is None else target_weights
        allowed = (allowed[:, None, None] if allowed.ndim == 1 else allowed).expand_as(weights)
        if self.mix is None:
            return Mixed(target_images, labels, weights * allowed, torch.zeros_like(labels, dtype=torch.bool))
        mixed: Mixed
        if isinstance(self.mix, CrossDomainMix):
            mixed = self.mix(source_images, source_labels, target_images, labels, weights * allowed, scores=scores)
            if self.weigh == "mixed":
                mixed = mixed._replace(weights=mix(weights, mixed.weights, mixed.mask))
            return mixed
        mixed = self.mix(target_images, labels, weights * allowed, scores=scores)
        if self.weigh == "mixed":
            weights = self.criterion.weights(mix(confidence, confidence.roll(-1, 0), mixed.mask))
            mixed = mixed._replace(weights=weights * mix(allowed, allowed.roll(-1, 0), mixed.mask))
        return mixed

    def _augment(self, images: Tensor, draw: AugmentDraw | None) -> Tensor:
        if self.augment is None:
            return images
        if isinstance(self.augment, StrongAugment):
            augmented: Tensor = self.augment(images, draw=draw)
            return augmented
        return self.augment(images)

    def _check_draw(self, draw: SelfTrainingDraw) -> None:
        """Refuse a draw that leaves something to chance: the modules would silently draw it themselves."""
        if self.mix is not None and draw.scores is None:
            raise ValueError("`draw.scores` must be given, since there is a `mix`; make the draw with `sample`.")
        if isinstance(self.augment, StrongAugment) and draw.augment is None:
            raise ValueError(
                "`draw.augment` must be given, since there is a `StrongAugment`; make the draw with `sample`."
            )

    def _loss(self, criterion: Callable[..., Tensor], logits: Tensor, labels: Tensor, *weights: Tensor) -> Tensor:
        if logits.shape[-2:] == labels.shape[-2:]:
            return criterion(logits, labels, *weights)
        if isinstance(criterion, ConfidenceWeightedCE):
            return criterion.upsampled(logits, labels, *weights)
        return criterion(_upsampled(logits, labels), labels, *weights)

    def _logits(self, name: str, network: Callable[[Tensor], object], images: Tensor) -> Tensor:
        """What a network returns for images, once it is known to be logits."""
        logits = network(images)
        if not isinstance(logits, Tensor):
            keys = f" with keys {', '.join(map(repr, logits))}" if isinstance(logits, Mapping) else ""
            raise TypeError(
                f"`{name}` must return logits as a tensor, got {type(logits).__name__}{keys}; "
                "return the logits from its forward, e.g. `output['out']` or `output.logits`."
            )
        if logits.ndim != 4 or len(logits) != len(images):
            raise ValueError(
                f"`{name}` must return logits of shape (N, C, H, W) with N = {len(images)}, got {tuple(logits.shape)}; "
                "return one map of class scores per image."
            )
        if logits.shape[-2:] != images.shape[-2:] and not self.upsample:
            raise ValueError(
                f"`{name}` returned logits of size {tuple(logits.shape[-2:])} for images of size "
                f"{tuple(images.shape[-2:])}; pass `upsample=True` to SelfTraining, or upsample in the network."
            )
        if self.num_classes is not None and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"`{name}` returned {logits.shape[1]} classes but SelfTraining was built with "
                f"num_classes={self.num_classes}; make both with one number."
            )
        return logits

    def _check_batch(
        self, source_images: Tensor, source_labels: Tensor, target_images: Tensor, target_weights: Tensor | None
    ) -> None:
        check_images("source_images", source_images)
        check_labels("source_labels", source_labels)
        check_images("target_images", target_images)
        n, _, height, width = source_images.shape
        check_same_shape("source_labels", source_labels.shape, "source_images", (n, height, width))
        if isinstance(self.mix, CrossDomainMix):
            check_same_shape("target_images", target_images.shape, "source_images", source_images.shape)
        if target_weights is not None:
            check_tensor("target_weights", target_weights)
            n, _, height, width = target_images.shape
            shapes = ((n, height, width), (n,))  # no set: a hashed size is compiled as a constant
            if tuple(target_weights.shape) not in shapes:
                raise ValueError(
                    f"`target_weights` must have shape (N, H, W) = {(n, height, width)} or (N,), "
                    f"got {tuple(target_weights.shape)}; crop them with the target images."
                )
            if not target_weights.is_floating_point():
                raise TypeError(
                    f"`target_weights` must be floating, got {target_weights.dtype}; convert with `.float()`."
                )
        check_same_device(
            source_images=source_images,
            source_labels=source_labels,
            target_images=target_images,
            target_weights=target_weights,
        )


def _upsampled(logits: Tensor, like: Tensor) -> Tensor:
    """Logits at the height and width of another tensor, at least in float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return functional.interpolate(logits, size=like.shape[-2:], mode="bilinear", align_corners=True)


def _check_kind(name: str, part: object, *kinds: type) -> None:
    if not isinstance(part, kinds):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise TypeError(f"`{name}` must be {names}, got {type(part).__name__}; build one and pass it.")
