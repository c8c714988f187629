"""Published weights, downloads, and reading weight files without executing code from them."""

import builtins
import hashlib
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch

from crossmix._files import damaged_part

__all__ = ["SOURCES", "WeightSource", "WeightsError", "mappings", "read_weights", "safetensors_of"]

MOST = 1_000_000
"""Components of all names in a file's nested mappings. A mapping that is there many times makes many of few bytes."""

LONGEST = 50
"""Components of one name, of which every end is looked for in the network."""


class WeightsError(ValueError):
    """Weights cannot be read or do not match; the message names the file, the problem, and what to do."""


class WeightSource(NamedTuple):
    """A published file; see `SOURCES`."""

    url: str
    licence: str
    sha256: str | None
    note: str


_DEAD = "the host has not answered since about December 2021"
_TORCHVISION = "https://download.pytorch.org/models"

SOURCES = {
    "coco": WeightSource(
        "http://vllab1.ucmerced.edu/~whung/adv-semi-seg/resnet101COCO-41f33a49.pth",
        "not stated",
        "41f33a49",
        f"{_DEAD}; users of the released code name copies at https://drive.google.com/file/d/"
        "1gLiF0yKByduIyD7MEya-4ZI_yp5613Ot and https://drive.google.com/file/d/14j4RoLqnfGeKaBN7m11u8XUnuov6PgYp: "
        "get one with a browser and pass its path",
    ),
    "imagenet": WeightSource(
        "http://vllab.ucmerced.edu/ytsai/CVPR18/DeepLab_resnet_pretrained_init-f81d91e8.pth",
        "not stated",
        "f81d91e8",
        f"{_DEAD}; if you have a copy, pass its path",
    ),
    "dacs-gta5": WeightSource(
        "https://drive.google.com/uc?export=download&id=1oxdy5pknTiJ7my0zETG1Q52JN1Mn5KdH",
        "MIT, as the released code",
        None,
        "the host asks for a browser: open https://drive.google.com/file/d/1oxdy5pknTiJ7my0zETG1Q52JN1Mn5KdH "
        "and pass the path of the file",
    ),
    "torchvision-v1": WeightSource(f"{_TORCHVISION}/resnet101-63fe2227.pth", "BSD-3-Clause", "63fe2227", ""),
    "torchvision-v2": WeightSource(f"{_TORCHVISION}/resnet101-cd907fc2.pth", "BSD-3-Clause", "cd907fc2", ""),
}
"""Published weights by short name. The checksums are the first digits of the SHA-256, which by torch's convention are
part of the file name; none is known for the released DACS checkpoint."""


def read_weights(path_or_url: str | os.PathLike[str], sha256: str | None) -> tuple[Path, Mapping[str, Any]]:
    """Read a file, after downloading it if it is an http(s) URL or a key of `SOURCES`; return its path and contents."""
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", sha256.lower()):
        raise ValueError(f"`sha256` must be 8 to 64 hexadecimal digits, got {sha256!r}.")
    source = SOURCES.get(str(path_or_url), WeightSource(str(path_or_url), "", None, ""))
    checksum = (sha256 or source.sha256 or "").lower()
    address = urlsplit(source.url)
    if address.scheme not in {"http", "https"}:
        path = Path(url2pathname(address.path) if address.scheme == "file" else path_or_url)
        return path, _read(path, checksum)
    path = _downloaded(source, checksum)
    try:
        return path, _read(path, checksum)
    except WeightsError as error:
        path.unlink(missing_ok=True)  # the next call downloads it again
        raise WeightsError(f"{error} It came from {source.url}. {source.note}".strip()) from error.__cause__


def _downloaded(source: WeightSource, checksum: str) -> Path:
    """The file behind a URL, downloaded into torch.hub's folder unless it is there already."""
    name = Path(urlsplit(source.url).path).name or "weights"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{hashlib.sha256(source.url.encode()).hexdigest()[:8]}-{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source.url, str(path), checksum or None, progress=False)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:  # RuntimeError: wrong checksum
            advice = source.note or "download it by hand and pass its path"
            raise WeightsError(f"{source.url}: it cannot be downloaded ({error}); {advice}.") from error
    return path


def _read(path: Path, checksum: str) -> Mapping[str, Any]:
    """The contents of a file; raises if it is not a file of weights."""
    if not path.exists():
        known = ", ".join(map(repr, SOURCES))
        raise FileNotFoundError(f"{path}: no such file; pass the path of weights, a URL, or one of {known}.")
    if not path.is_file():
        raise WeightsError(f"{path}: expected a file of weights, got a folder; pass a file inside it.")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
        digest = hashlib.file_digest(file, "sha256").hexdigest() if checksum and not file.seek(0) else ""
    if not digest.startswith(checksum):
        raise WeightsError(f"{path}: expected the sha256 {checksum}, got {digest}; download the file again.")
    if not path.stat().st_size:
        raise WeightsError(f"{path}: expected weights, got an empty file; download it again.")
    flat = _is_safetensors(path)
    if not flat and start.startswith((b"<", b"version https://git-lfs")):
        kind = "an HTML page, which some hosts send instead" if start.startswith(b"<") else "a Git LFS pointer"
        raise WeightsError(f"{path}: expected weights, got {kind}; download the file itself.")
    by_name = path.suffix == ".safetensors" and not zipfile.is_zipfile(path)
    library = safetensors_of(path) if flat or by_name else None
    try:
        contents: object = _unpickled(path, verify=True) if library is None else library.load_file(path)
    except Exception as error:
        raise WeightsError(f"{path}: {_reason(path, error)}") from error
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path}: expected a dict of tensors, got {type(contents).__name__}; save a state_dict.")
    _refuse_endless_names(path, contents)
    return contents


def _refuse_endless_names(path: Path, contents: Mapping[Any, Any]) -> None:
    """Raise if names are so many or so long that looking for a network in them would take hours."""
    components = 0
    for name in _names(contents):
        found = str(name).count(".") + 1
        if found > LONGEST:
            raise WeightsError(f"{path}: expected names of tensors, got one of {found} components; use another file.")
        components += found
        if components > MOST:
            raise WeightsError(
                f"{path}: expected tensors, got more than {MOST} entries of dicts in dicts; use another file."
            )


def mappings(
    contents: Mapping[Any, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """A mapping and the mappings nested in it, with their keys."""
    yield keys, contents
    for key, value in contents.items():
        if isinstance(key, str) and isinstance(value, Mapping) and len(keys) < 8:
            yield from mappings(value, (*keys, *key.split(".")))


def _names(contents: Mapping[Any, Any]) -> Iterator[object]:
    """The names in a mapping and, before they are taken apart, in the mappings nested in it."""
    return (name for _, nested in mappings(contents) for name in nested)


def _unpickled(path: Path, *, verify: bool = False) -> object:
    """`torch.load` from an open file: given a path, it would decide by the suffix `.safetensors`.

    With `verify`, checksums are checked first, which `torch.load` does not do.
    """
    if verify and zipfile.is_zipfile(path) and (damaged := damaged_part(path)) is not None:
        raise ValueError(f"its part {damaged} does not match its checksum")
    with path.open("rb") as file:
        contents: object = torch.load(file, map_location="cpu", weights_only=True)
    return contents


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts like a safetensors file: a header length that fits into the file, then a brace."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= path.stat().st_size


def safetensors_of(path: Path) -> ModuleType:
    """Import safetensors lazily: it is an optional dependency."""
    try:
        import safetensors.torch  # noqa: PLC0415
    except ImportError as error:
        why = f"is a safetensors file, but the package safetensors cannot be imported ({error})"
        raise ImportError(f"{path}: {why}; install it with `pip install safetensors`.") from error
    return safetensors.torch


def _reason(path: Path, error: Exception) -> str:
    """Explain why a file cannot be read and what to do, without torch's advice to trust it."""
    if isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL \S|Can only build ", str(error)):
        return _objects(path, error)
    text = "it is not a pickle" if isinstance(error, pickle.UnpicklingError) else re.split(r"\.\s", str(error))[0]
    why = f"it is truncated, damaged or not a file of weights ({type(error).__name__}: {text})"
    return f"{why}; nothing was loaded, download the file again."


class _StandIn:
    """An inert replacement for an object that a file refers to."""

    calls: list[tuple[object, ...]]

    def __new__(cls, *args: object, **_: object) -> Self:
        cls.calls.append(args)
        return super().__new__(cls)

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _objects(path: Path, refusal: Exception) -> str:
    """Describe the objects in a file that are not tensors, and what to do about them.

    Torch names only the first unknown object. Replacing it by a stand-in reveals the next one, and so on, until the
    file can be read or fails for another reason. So the advice is known to work.
    """
    stand_ins: dict[str, type[_StandIn]] = {}
    contents: object = None
    last: Exception | None = refusal
    while last and (found := re.search(r"GLOBAL (\S+) was not an allowed", str(last))) and found[1] not in stand_ins:
        stand_ins[found[1]] = type(found[1], (_StandIn,), {"calls": []})
        allowed: list[Any] = [(kind, _qualified(name)) for name, kind in stand_ins.items()]
        with torch.serialization.safe_globals(allowed):
            try:
                contents, last = _unpickled(path), None
            except Exception as error:  # noqa: BLE001 - inspected by the loop condition
                last = error
    names = list(stand_ins)
    if dtype := stand_ins.get("numpy.dtype"):  # torch also requires the dtype classes, which the file does not name
        names += dict.fromkeys(_dtype_class(*call) for call in dtype.calls)
    if last and (found := re.search(r"(?:GLOBAL|Can only build .* got <class) '?([\w.]+)", str(last))):
        names.append(found[1])
    said = f"it holds code or objects other than tensors ({', '.join(names)}), which were not run; nothing was loaded"
    advice = "load it where its code is available and save the network's state_dict"
    if isinstance(contents, _StandIn):
        return f"{said}. The whole file is a pickled {type(contents).__name__}: {advice}."
    if last is None and not _holds_tensors(contents):
        return f"{said}. Without them it has no tensors: {advice}."
    if code := [name for name in names if "." not in name and not isinstance(vars(builtins).get(name), type)]:
        return f"{said}. It calls {', '.join(code)}, which can run arbitrary code: do not allow it, use another file."
    if last and not (last is refusal and "Can only build" in str(last)):
        return f"{said}. Torch refuses them even if allowed: save only the state_dict, where the file was made."
    listed = ", ".join(map(_expression, names))
    return (
        f"{said}. If you trust the file, allow them while loading it, `with torch.serialization.safe_globals("
        f"[{listed}]):`, or save only the state_dict, where the file was made."
    )


def _holds_tensors(value: object) -> bool:
    """Whether nested mappings contain a tensor."""
    nested = [one for _, one in islice(mappings(value), MOST)] if isinstance(value, Mapping) else [{"": value}]
    return any(isinstance(one, torch.Tensor) for part in nested for one in part.values())


def _dtype_class(code: object, *_: object) -> str:
    """The name of NumPy's class for a dtype, such as `numpy.dtypes.Float64DType` for `f8`."""
    try:
        kind = type(np.dtype(str(code)))
    except TypeError:
        kind = np.dtype
    return f"{kind.__module__}.{kind.__qualname__}"


def _qualified(name: str) -> str:
    """The qualified name; torch's message omits the module of builtins."""
    return name if "." in name else f"builtins.{name}"


def _expression(name: str) -> str:
    """The expression for `safe_globals`: the object, with its name in the file if that differs from its own."""
    module, _, attribute = _qualified(name).rpartition(".")
    renamed = re.sub(r"^numpy\._?core", "numpy._core" if "numpy._core" in sys.modules else "numpy.core", module)
    for place in dict.fromkeys((module, renamed)):  # NumPy 2 moved objects that files of NumPy 1 refer to
        found = vars(sys.modules[place]).get(attribute) if place in sys.modules else None
        if found is not None:
            own = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
            is_own = own == _qualified(name)
            return name.removeprefix("__main__.") if is_own else f"({place}.{attribute}, {name!r})"
    return name
