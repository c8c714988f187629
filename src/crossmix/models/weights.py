"""Load and save weights. Tensors are matched by name and shape, and mismatches are reported."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from crossmix._files import whole_file, write_whole
from crossmix._wrappers import averaged, named_parts, plain_name
from crossmix.models._places import WRAPPERS, Place, few, find, fits, is_extra, part_of, tensors
from crossmix.models.deeplab_v2 import MEAN_BGR, DeepLabV2
from crossmix.models.weight_files import WeightsError, read_weights, safetensors_of

__all__ = ["LoadReport", "load_weights", "save_weights"]

LOG = logging.getLogger(__name__)
TORCHVISION = (
    "%s: it was recognised as torchvision's ResNet-101 by %r: the preprocessing is converted, but layer2.0 has its "
    "stride on the first convolution and the max-pooling rounds up, so its features differ from torchvision's before "
    "training"
)
UNKNOWN = (
    "%s: it is a backbone without a head that tells what images it was trained on; BGR in 0..255 minus the mean is "
    "assumed, as in the Caffe-trained files; if it is torchvision's, load the file with its `fc`, which is converted"
)
TORCHVISION_HEADS = {"fc", "classifier", "aux_classifier"}
"""Parts of the names of what torchvision's networks, and others trained on its preprocessing, have for `layer5`."""


class LoadReport(NamedTuple):
    """The result of `load_weights`, as names of tensors.

    Attributes:
        matched: Tensors of the model that were loaded.
        missing: Tensors of the model that the file lacks; unchanged.
        unexpected: Tensors of the file that the model lacks.
        mismatched: Tensors of the model that have another shape in the file; unchanged.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        return "; ".join(f"{len(names)} {field} {few(names)}".rstrip() for field, names in self._asdict().items())


def load_weights(
    model: nn.Module,
    path_or_url: str | os.PathLike[str],
    *,
    entry: str | None = None,
    strict: bool = True,
    sha256: str | None = None,
    head: str | Sequence[str] = "layer5",
) -> LoadReport:
    """Load weights from a file into a model; report and log what matched.

    Reads files of `torch.save`, always with `weights_only=True`, and safetensors files (with the package safetensors).
    On any error the model is unchanged.

    Wrappers around the model or its parts (DistributedDataParallel, `torch.compile`, ...) are recognised by type and
    ignored. Prefixes that wrappers add to names in the file (`module.`, `_orig_mod.`, `Scale.`, ...) are stripped where
    the rest is a name in the model. With any other prefix, such as `net.`, the part of the file that matches most names
    of the model is loaded, and a warning names it. If several parts match equally well, an error lists them, to be
    passed as `entry`.

    torchvision's ResNet-101, alone or in a segmentation network, is a different network. It is recognised by an `fc`,
    `classifier` or `aux_classifier` in place of `layer5`. With `strict=False` its first convolution and normalisation
    are converted to this library's preprocessing (exact in eval mode, except at image borders), but the stride of
    `layer2.0` stays on the first convolution and the max-pooling rounds up. A warning is logged. A backbone without any
    head is taken as it is, with a warning that its preprocessing is assumed.

    Args:
        model: A `crossmix.models.DeepLabV2`, or any network, wrapped or not.
        path_or_url: A file, or its file URL; an http(s) URL, downloaded once into torch.hub's folder; or a key of
            `crossmix.models.weight_files.SOURCES`: `"coco"`, `"imagenet"`, `"dacs-gta5"`, `"torchvision-v1"`,
            `"torchvision-v2"`.
        entry: The part of a checkpoint to load: a key or a prefix of names, at any depth. `"student"` also stands for
            the released code's `model`, `"teacher"` for its `ema_model`. None loads the whole file, `student`, `model`
            or `state_dict`, whichever matches first, or a part with another name that is not a teacher.
        strict: Whether everything has to match, except `num_batches_tracked`, which old files lack. False allows
            another head and additional tensors in the file; the whole backbone always has to match.
        sha256: The file's checksum in hexadecimal, or at least its first eight digits.
        head: Name of the submodule that is the head, or several: `("decode_head", "auxiliary_head")`.

    Returns:
        What matched and what did not. It is also logged, as a warning if anything did not match.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If it is a safetensors file, and the package is not installed.
        TypeError: If `head` is neither a name nor several.
        WeightsError: If it cannot be downloaded or read, contains objects other than tensors (the message says how to
            allow them), or does not match as required.
        ValueError: If `sha256` is not a checksum, or the model is on the meta device.

    Example:
        >>> import tempfile
        >>> from crossmix.models import deeplab_v2_tiny
        >>> path = save_weights(deeplab_v2_tiny(19), f"{tempfile.mkdtemp()}/weights.safetensors")
        >>> report = load_weights(deeplab_v2_tiny(5), path, strict=False)
        >>> len(report.matched), report.mismatched[:2]
        (102, ('layer5.conv2d_list.0.weight', 'layer5.conv2d_list.0.bias'))
    """
    heads = tuple(head) if isinstance(head, list | tuple) else (head,)
    if not all(isinstance(one, str) for one in heads):
        raise TypeError(f"`head` must be the name of a submodule, or several names, got {head!r}; pass strings.")
    path, contents = read_weights(path_or_url, sha256)
    return _load(model, contents, entry, path, strict=strict, heads=heads)


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, entry: str | None = None) -> Path:
    """Save a model's weights in a form that the released code's `load_state_dict` accepts.

    Names are those of the model without wrappers (as in `load_weights`, and averages such as `MeanTeacher`); tensors
    are on the CPU and share no memory. The file is written atomically. Sharded parameters (FSDP2) are gathered, so all
    ranks have to call.

    Args:
        model: The model, wrapped or not.
        path: The file: safetensors if the name ends in `.safetensors`, otherwise a dict of tensors by `torch.save`.
        entry: Nest the dict under this key; the released evaluation script expects `"model"`.

    Returns:
        The path of the file.

    Raises:
        ImportError: If it is a safetensors file, and the package is not installed.
        OSError: If writing fails; an existing file is untouched.
        ValueError: If `entry` is given for a safetensors file, which is flat, or safetensors lacks a dtype.

    Example:
        >>> import tempfile
        >>> path = save_weights(nn.Linear(2, 1), f"{tempfile.mkdtemp()}/linear.pth", entry="model")
        >>> torch.load(path, weights_only=True)["model"].keys()
        dict_keys(['weight', 'bias'])
    """
    path = Path(path)
    flat = path.suffix == ".safetensors"
    if flat and entry is not None:
        raise ValueError(f"`entry` must be None for safetensors files, which are flat, got {entry!r}; use .pth.")
    library = safetensors_of(path) if flat else None
    state = {name: _whole(tensor) for name, (_, tensor) in _named(model).items()}
    if library is None:
        with whole_file(path, needed=lambda: sum(tensor.nbytes for tensor in state.values())) as file:
            torch.save(state if entry is None else {entry: state}, file)
        return path
    try:
        content = library.save(state, {"format": "pt"})
    except KeyError as error:  # safetensors does not support a dtype
        name = next((name for name, tensor in state.items() if tensor.dtype == error.args[0]), "it")
        raise ValueError(f"safetensors has no dtype {error} (`{name}`); use .pth.") from error
    write_whole(path, content)
    return path


def _load(
    model: nn.Module,
    contents: Mapping[str, Any],
    entry: str | None,
    path: Path,
    *,
    strict: bool,
    heads: tuple[str, ...],
) -> LoadReport:
    """Match names and shapes, check the result, then copy."""
    ours = _named(model)
    own = {name: tensor for name, (_, tensor) in ours.items()}
    if any(tensor.is_meta or is_lazy(tensor) for tensor in own.values()):
        raise ValueError(
            "`model` must have memory, got meta or uninitialised tensors; call `model.to_empty(...)` or run a batch."
        )
    place = find(contents, own, entry, path)
    if clash := next((names for names in place.matches.values() if len(names) > 1), None):
        raise WeightsError(f"{path}: {clash[0]!r} and {clash[1]!r} are the same name without {sorted(WRAPPERS)}.")
    names = _with_shared(own, {name: theirs for name, (theirs,) in place.matches.items()}, place.state, path)
    values = {name: place.state[theirs] for name, theirs in names.items()}
    inside = [name for name in place.state if str(name).startswith(place.scope)]
    if not any(isinstance(place.state[name], Tensor) for name in inside):
        found = few(inside) or "an empty dict"
        raise WeightsError(f"{path}: expected tensors, got {found}; pass another `entry`, or another file.")
    used = {*names.values()}
    fit = {name for name, value in values.items() if fits(own[name], value)}
    report = LoadReport(
        matched=tuple(full for name, (full, _) in ours.items() if name in fit),
        missing=tuple(full for name, (full, _) in ours.items() if name not in values),
        unexpected=tuple(str(name) for name in inside if name not in used and not is_extra(name)),
        mismatched=tuple(full for name, (full, _) in ours.items() if name in values and name not in fit),
    )
    clean = {full: name for name, (full, _) in ours.items()}
    lacking = {name for name in own if name not in fit and not name.endswith("num_batches_tracked")}
    headless = _headless(model, values)
    unused = [str(name) for name in place.state if name not in used]
    if any("conv2d_list" in name for name in unused):  # DeepLab-v2's head by another name
        headless = []
    torchvision_name = next((name for name in unused if headless and TORCHVISION_HEADS & {*name.split(".")}), "")
    matching_part = "" if report.matched else part_of(contents, own)
    present = [head for head in heads if any(name.startswith(f"{head}.") for name in own)]
    outside = [name for name in own if name in lacking and not name.startswith(tuple(f"{head}." for head in present))]
    heads_hint = ""
    if report.matched and all(name in values for name in outside):  # of another shape
        heads_hint = _as_heads(present, outside)
    _check(
        report,
        place,
        lacking,
        path,
        strict=strict,
        backbone=bool(report.matched) and not outside,
        is_torchvision=bool(torchvision_name),
        matching_part=matching_part,
        heads_hint=heads_hint,
    )
    for start in headless if torchvision_name else ():
        values |= _preprocessing_converted(values, start)
    copied = {full: _as_sharded(values[clean[full]], own[clean[full]]) for full in report.matched}
    model.load_state_dict(copied, strict=False)  # not into `own`: the state_dict of FSDP holds copies
    _log(path, place, report, careful=bool(lacking or report.unexpected))
    if torchvision_name:
        LOG.warning(TORCHVISION, path, torchvision_name)
    elif headless and not any("Scale" in name.split(".") for name in used):  # a wrapper of Caffe-trained networks
        LOG.warning(UNKNOWN, path)
    return report


def _check(
    report: LoadReport,
    place: Place,
    lacking: set[str],
    path: Path,
    *,
    strict: bool,
    backbone: bool,
    is_torchvision: bool,
    matching_part: str,
    heads_hint: str,
) -> None:
    """Raise if the report violates `strict` or the backbone does not match, with advice."""
    if backbone and not (strict and (lacking or report.unexpected)):
        return
    if matching_part:
        advice = f"these are the weights of a part of it, load them into `model.{matching_part}`"
    elif not (strict and backbone):
        advice = "build the network that the weights were saved from"
        if heads_hint:
            arguments = f"`strict=False` and {heads_hint}" if strict else heads_hint
            advice = f"if it is a head that differs, pass {arguments}, else {advice}"
    elif is_torchvision:
        advice = "it looks like torchvision's ResNet-101, which `strict=False` converts as far as possible"
    elif lacking:
        advice = "pass `strict=False` to leave out the head"
    elif place.prefix and not any(name.startswith(place.prefix) for name in report.unexpected):
        advice = f"pass `entry={place.name!r}` to ignore the rest of the file"
    else:
        advice = "pass `strict=False` to ignore additional tensors in the file"
    what = "everything" if strict else "the whole backbone"
    where = f" in its part {place.name!r}" if place.path else ""
    raise WeightsError(f"{path}: expected {what} to match, got {report}{where}; the model is unchanged; {advice}.")


def _as_heads(heads: Sequence[str], outside: Sequence[str]) -> str:
    """The argument that leaves out tensors outside of the heads too; empty if they belong to many submodules."""
    others = [*dict.fromkeys(name.rpartition(".")[0] for name in outside)]
    if "" in others or not 1 <= len(others) <= 3:
        return ""
    names = (*heads, *others)
    return f"`head={names if len(names) > 1 else names[0]!r}`"


def _log(path: Path, place: Place, report: LoadReport, *, careful: bool) -> None:
    """Log what was loaded, and from which part of the file."""
    if place.path:
        beside = [str(name) for name in place.state if not str(name).startswith(place.scope or place.prefix)]
        left = f"; ignored {len(beside)} other names {few(beside)}" if beside else ""
        level = logging.WARNING if place.is_guessed else logging.INFO
        LOG.log(level, "%s: loaded the part %r%s", path, place.name, left)
    LOG.log(logging.WARNING if careful else logging.INFO, "%s: %s", path, report)


def _named(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """A model's tensors by their names without wrappers, each with its name in the state_dict."""
    named = {plain_name(model, name): (name, tensor) for name, tensor in tensors(model.state_dict()).items()}
    if averaged(model) is None:
        return named
    return {name.removeprefix("module."): found for name, found in named.items() if name.startswith("module.")}


def _with_shared(
    own: Mapping[str, Tensor], names: dict[str, str], state: Mapping[str, Any], path: Path
) -> dict[str, str]:
    """Complete the mapping from the network's to the file's names for shared tensors stored under only some names."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in own.items():
        if type(tensor) is Tensor and tensor.numel():
            groups.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    for group in groups.values():
        given = [names[name] for name in group if name in names]
        for theirs in given[1:]:
            one, other = state[given[0]], state[theirs]
            if one.shape != other.shape or not torch.equal(one, other.to(one.dtype)):
                raise WeightsError(f"{path}: {given[0]!r} and {theirs!r} differ, but are one tensor in the model.")
        names |= {name: given[0] for name in group if given and name not in names}
    return names


def _whole(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU, with the shards of all ranks gathered."""
    gather = getattr(tensor, "full_tensor", lambda: tensor)  # DTensors only
    return cast("Tensor", gather().detach().cpu().contiguous().clone())


def _as_sharded(value: Tensor, own: Tensor) -> Tensor:
    """Shard a tensor like the network's own, if that is a DTensor (FSDP2)."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None or not isinstance(own, tensor.DTensor):
        return value
    sharded: Tensor = tensor.distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return sharded


def _headless(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the DeepLabs in a model of which a file has the stem but not the head."""
    network = averaged(model)
    parts = named_parts(model if network is None else network)
    starts = [f"{name}." if name else "" for name, part in parts if isinstance(part, DeepLabV2)]
    headless = [start for start in starts if not any(name.startswith(f"{start}layer5.") for name in values)]
    return [start for start in headless if {f"{start}conv1.weight", f"{start}bn1.running_mean"} <= values.keys()]


def _preprocessing_converted(values: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Convert torchvision's stem from (RGB - mean) / deviation to BGR in 0..255 minus the Caffe mean."""
    weight = values[f"{start}conv1.weight"]
    mean, deviation = weight.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    offset = (weight.new_tensor(MEAN_BGR[::-1])[:, None, None] / 255 - mean) / deviation  # our 0 in torchvision's terms
    return {
        f"{start}conv1.weight": (weight / (255 * deviation)).flip(1),
        f"{start}bn1.running_mean": values[f"{start}bn1.running_mean"] - (weight * offset).sum((1, 2, 3)),
    }
