"""Load and save weights: what a file holds is matched by name and shape, and whatever does not match is said."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from crossmix.models._safetensors import write_safetensors
from crossmix.models.deeplab_v2 import MEAN_BGR, DeepLabV2
from crossmix.models.weight_files import WeightsError, read_weights

__all__ = ["LoadReport", "load_weights", "save_weights"]

LOG = logging.getLogger(__name__)
WRAPPERS = {"module", "_orig_mod", "Scale"}
"""Parts of a name that DataParallel, `torch.compile` and the multi-scale wrapper of the ImageNet file put there."""
TORCHVISION = (
    "it was taken for torchvision's ResNet-101: the preprocessing is converted, but layer2.0 has its stride on the "
    "first convolution and the max-pooling rounds up, so its features are not torchvision's before training"
)


class LoadReport(NamedTuple):
    """What `load_weights` did, as names of tensors.

    Attributes:
        matched: The model's, now with the file's values.
        missing: The model's that the file does not have; they are as they were.
        unexpected: The file's that the model does not have.
        mismatched: The model's that the file has in another shape; they are as they were.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(f"{len(names)} {field} {_few(names)}".rstrip() for field, names in self._asdict().items())


def load_weights(
    model: nn.Module,
    path_or_url: str | os.PathLike[str],
    *,
    entry: str | None = None,
    strict: bool = True,
    sha256: str | None = None,
    head: str = "layer5",
) -> LoadReport:
    """Copy the weights of a file into a model, and report and log what matched.

    Reads files of `torch.save`, always with `weights_only=True`, and safetensors. `module.`, `_orig_mod.` and `Scale.`
    are ignored anywhere in a name, in the file and in the model. On any error the model is as it was.

    torchvision's ResNet-101, told by its `fc`, is another network: with `strict=False` the first convolution and its
    normalisation are converted to this library's preprocessing (exact in eval mode, image borders apart), but the
    stride of `layer2.0` stays on its first convolution and the max-pooling rounds up. A warning is logged.

    Args:
        model: A `crossmix.models.DeepLabV2`, or any network, wrapped or not.
        path_or_url: A file, an http(s) or file URL, downloaded once into torch.hub's folder, or a key of
            `crossmix.models.weight_files.SOURCES`: `"coco"`, `"imagenet"`, `"dacs-gta5"`, `"torchvision-v1"`,
            `"torchvision-v2"`.
        entry: Which part of a checkpoint. `"student"` is also the released code's `model`, `"teacher"` its `ema_model`.
            None takes `student`, `model` or `state_dict`, the first that is there, or the whole file.
        strict: Whether everything has to match but `num_batches_tracked`, which files of before 2018 lack. False allows
            another head and more in the file; the whole backbone has to match in either case.
        sha256: The file's checksum in hexadecimal, or its first digits, at least eight.
        head: Name of the submodule that is the head.

    Returns:
        What matched and what did not. It is logged too, as a warning where something of the model or the file is left.

    Raises:
        FileNotFoundError: If there is no such file.
        WeightsError: If it cannot be downloaded or read, holds code, or does not match as it has to.
        ValueError: If `sha256` is no checksum, or the model is on the meta device.

    Example:
        >>> import tempfile
        >>> from crossmix.models import deeplab_v2_tiny
        >>> path = save_weights(deeplab_v2_tiny(19), f"{tempfile.mkdtemp()}/weights.safetensors")
        >>> report = load_weights(deeplab_v2_tiny(5), path, strict=False)
        >>> len(report.matched), report.mismatched[:2]
        (102, ('layer5.conv2d_list.0.weight', 'layer5.conv2d_list.0.bias'))
    """
    path, contents = read_weights(path_or_url, sha256)
    return _load(model, _state(contents, entry, path), path, strict=strict, head=head)


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, entry: str | None = None) -> Path:
    """Write a model's weights, so that the released code's `load_state_dict` takes them.

    Names are without `module.` and `_orig_mod.`, values on the CPU. The file is written aside and renamed into place.

    Args:
        model: The model, wrapped or not.
        path: The file: safetensors where its name ends so, otherwise a dict of tensors by `torch.save`.
        entry: Wrap the dict into another under this name: `"model"` is what the released evaluation script looks for.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written; what was there is untouched.
        ValueError: If `entry` is given for safetensors, which are flat, or they know no such dtype.

    Example:
        >>> import tempfile
        >>> path = save_weights(nn.Linear(2, 1), f"{tempfile.mkdtemp()}/linear.pth", entry="model")
        >>> torch.load(path, weights_only=True)["model"].keys()
        dict_keys(['weight', 'bias'])
    """
    path = Path(path)
    flat = path.suffix == ".safetensors"
    if flat and entry is not None:
        raise ValueError(f"`entry` must be None for safetensors, which are flat, got {entry!r}; write a .pth file.")
    own = model.state_dict()
    state = {clean: own[name].detach().cpu().contiguous() for clean, name in _clean(_tensors(own)).items()}
    aside = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            if flat:
                write_safetensors(state, file)
            else:
                torch.save(state if entry is None else {entry: state}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def _state(contents: Mapping[str, Any], entry: str | None, path: Path) -> dict[str, Any]:
    """The state_dict in a checkpoint."""
    alias = {
        "": ("student", "model", "state_dict"),
        "student": ("student", "model"),
        "teacher": ("teacher", "ema_model"),
    }
    for name in alias.get(entry or "", (entry or "",)):
        if isinstance(contents.get(name), Mapping):
            return dict(contents[name])
        inside = {key: value for key, value in contents.items() if str(key).startswith(f"{name}.")}
        if entry is not None and inside:  # the state_dict of a module that has it as a submodule
            return {key.removeprefix(f"{name}."): value for key, value in inside.items()}
    if entry is not None:
        raise WeightsError(f"{path}: it has no entry {entry!r}, but {_few(contents)}; pass one of them as `entry`.")
    return dict(contents)


def _load(model: nn.Module, state: Mapping[str, Any], path: Path, *, strict: bool, head: str) -> LoadReport:
    """Match names and shapes, refuse what has to be refused, then copy."""
    own = _tensors(model.state_dict())
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("`model` must have memory, got tensors on the meta device; call `model.to_empty(...)` first.")
    ours = _clean(own)
    tensors = _tensors(state)
    if not tensors:
        raise WeightsError(f"{path}: expected tensors, got none among {_few(state)}; pass the right `entry`.")
    try:
        values = {clean: tensors[name] for clean, name in _clean(tensors).items()}
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error
    fitting = {clean for clean in ours if clean in values and _fits(own[ours[clean]], values[clean])}
    report = LoadReport(
        matched=tuple(name for clean, name in ours.items() if clean in fitting),
        missing=tuple(name for clean, name in ours.items() if clean not in values),
        unexpected=tuple(
            str(name) for name in state if not _is_extra(name) and (name not in tensors or _only(name) not in ours)
        ),
        mismatched=tuple(name for clean, name in ours.items() if clean in values and clean not in fitting),
    )
    torchvisions = _is_torchvisions(model, values, head)
    lacking = {name for name in report.missing if not name.endswith("num_batches_tracked")} | {*report.mismatched}
    needed = lacking if strict else lacking - {name for clean, name in ours.items() if clean.startswith(f"{head}.")}
    if not fitting or needed or (strict and report.unexpected):
        what = "everything" if strict else "the whole backbone"
        advice = "pass `strict=False` to leave out the head" if strict else "build the network that it was saved from"
        if torchvisions and strict:
            advice = "it looks like torchvision's ResNet-101, which `strict=False` converts as far as it can be"
        raise WeightsError(f"{path}: expected {what} to match, got {report}; the model is as it was; {advice}.")
    if torchvisions:
        values |= _preprocessing_converted(values)
    model.load_state_dict({ours[clean]: values[clean] for clean in fitting}, strict=False)
    LOG.log(logging.WARNING if lacking or report.unexpected else logging.INFO, "%s: %s", path, report)
    if torchvisions:
        LOG.warning("%s: %s", path, TORCHVISION)
    return report


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict, without the extra state that is no weight."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and not _is_extra(name)}


def _is_extra(name: object) -> bool:
    """Whether a name is that of `get_extra_state`, such as the teacher's count of updates: no weight."""
    return not isinstance(name, str) or name.rpartition(".")[2] == "_extra_state"


def _clean(names: Iterable[str]) -> dict[str, str]:
    """Map names without wrappers to the names themselves."""
    found: dict[str, str] = {}
    for name in names:
        if found.setdefault(_only(name), name) != name:
            raise ValueError(f"{name!r} and {found[_only(name)]!r} are the same name without {sorted(WRAPPERS)}.")
    return found


def _only(name: str) -> str:
    """A name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _fits(own: Tensor, value: Tensor) -> bool:
    return own.shape == value.shape and own.is_floating_point() == value.is_floating_point()


def _is_torchvisions(model: nn.Module, values: Mapping[str, Tensor], head: str) -> bool:
    """Whether a file has the classifier of torchvision's ResNet in place of the head of this library's network."""
    lacks_head = not any(clean.startswith(f"{head}.") for clean in values)
    return "fc.weight" in values and lacks_head and any(isinstance(module, DeepLabV2) for module in model.modules())


def _preprocessing_converted(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make the stem of torchvision's network, which sees (RGB - mean) / deviation, see BGR in 0..255 minus a mean."""
    weight = values["conv1.weight"]
    mean, deviation = weight.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    offset = (weight.new_tensor(MEAN_BGR[::-1])[:, None, None] / 255 - mean) / deviation  # of what is zero here
    return {
        "conv1.weight": (weight / (255 * deviation)).flip(1),
        "bn1.running_mean": values["bn1.running_mean"] - (weight * offset).sum((1, 2, 3)),
    }


def _few(names: Iterable[object]) -> str:
    """The first names of many, in parentheses."""
    names = list(names)
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"({', '.join(map(str, names[:3]))}{more})" if names else ""
