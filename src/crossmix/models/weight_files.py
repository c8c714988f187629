"""Where weights come from: a table of published files, downloads, and files read without running what is in them."""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from crossmix.models._safetensors import is_safetensors, read_safetensors

__all__ = ["SOURCES", "WeightSource", "WeightsError", "read_weights"]


class WeightsError(ValueError):
    """Weights cannot be read or do not fit; the message names the file, what is wrong, and what to do."""


class WeightSource(NamedTuple):
    """A published file; see `SOURCES`."""

    url: str
    licence: str
    sha256: str | None
    note: str


_DEAD = "the host has not answered since about December 2021"

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
    "torchvision-v1": WeightSource(
        "https://download.pytorch.org/models/resnet101-63fe2227.pth", "BSD-3-Clause", "63fe2227", ""
    ),
    "torchvision-v2": WeightSource(
        "https://download.pytorch.org/models/resnet101-cd907fc2.pth", "BSD-3-Clause", "cd907fc2", ""
    ),
}
"""Published weights by short name. The checksums are the first digits of the sha256, which the files' names carry by
torch's convention; no checksum of the released DACS checkpoint is known."""


def read_weights(path_or_url: str | os.PathLike[str], sha256: str | None) -> tuple[Path, Mapping[str, Any]]:
    """Find a file, downloading it where it is a URL or a key of `SOURCES`, and return it and what it holds."""
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", sha256.lower()):
        raise ValueError(f"`sha256` must be 8 to 64 hexadecimal digits, got {sha256!r}.")
    source = SOURCES.get(str(path_or_url), WeightSource(str(path_or_url), "", None, ""))
    checksum = (sha256 or source.sha256 or "").lower()
    if urlsplit(source.url).scheme not in {"http", "https", "file"}:
        return Path(path_or_url), _read(Path(path_or_url), checksum)
    path = _downloaded(source, checksum)
    try:
        return path, _read(path, checksum)
    except WeightsError as error:
        path.unlink(missing_ok=True)  # so that the next call downloads it again
        raise WeightsError(f"{error} It came from {source.url}. {source.note}".strip()) from error.__cause__


def _downloaded(source: WeightSource, checksum: str) -> Path:
    """The file behind a URL, from torch.hub's folder where it was downloaded before."""
    name = Path(urlsplit(source.url).path).name or "weights"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / f"{hashlib.sha256(source.url.encode()).hexdigest()[:8]}-{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source.url, str(path), checksum or None, progress=False)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:  # RuntimeError: another checksum
            advice = source.note or "download it by hand and pass its path"
            raise WeightsError(f"{source.url}: it cannot be downloaded ({error}); {advice}.") from error
    return path


def _read(path: Path, checksum: str) -> Mapping[str, Any]:
    """What a file holds, or why it is not a file of weights."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such file; pass the path of weights, a URL, or one of {', '.join(map(repr, SOURCES))}."
        )
    if not path.is_file():
        raise WeightsError(f"{path}: expected a file of weights, got a folder; pass a file in it.")
    with path.open("rb") as file:
        start = file.read(64).lstrip()
        digest = hashlib.file_digest(file, "sha256").hexdigest() if checksum and not file.seek(0) else ""
    if not digest.startswith(checksum):
        raise WeightsError(f"{path}: expected the sha256 {checksum}, got {digest}; get the file again.")
    if not path.stat().st_size:
        raise WeightsError(f"{path}: expected weights, got an empty file; get it again.")
    if not is_safetensors(path) and start.startswith((b"<", b"version https://git-lfs")):
        kind = "an HTML page, as hosts send in place of a file" if start.startswith(b"<") else "a Git LFS pointer"
        raise WeightsError(f"{path}: expected weights, got {kind}; get the file itself.")
    try:
        flat = is_safetensors(path) or path.suffix == ".safetensors"
        contents: object = read_safetensors(path) if flat else _read_torch(path)
    except Exception as error:
        raise WeightsError(f"{path}: {_reason(error)}; nothing was loaded, get the file again.") from error
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{path}: expected a dict of tensors, got {type(contents).__name__}; save a state_dict.")
    return contents


def _read_torch(path: Path) -> object:
    """`torch.load`, which does not check the checksums in the file by itself."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"its part {damaged} does not match its checksum")
    contents: object = torch.load(path, map_location="cpu", weights_only=True)
    return contents


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without torch's advice to trust it."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        return f"it holds code or objects other than tensors ({refused[1]}), which were not run"
    text = "it is no pickle" if isinstance(error, pickle.UnpicklingError) else re.split(r"\.\s", str(error))[0]
    return f"it is truncated, damaged or no file of weights ({type(error).__name__}: {text})"
