"""What a run of the trainer would do, read and need, and what would stop it: found without training anything."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossmix.datasets import Cityscapes, DataError
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.models import DeepLabV2, WeightsError, deeplab_v2_resnet101, deeplab_v2_tiny, load_weights
from domains import Data, crop_size, open_data, too_small
from options import Config, Request, config_files

__all__ = ["empty_network", "has_begun", "plan", "problems"]


def plan(request: Request) -> dict[str, Any]:
    """Counts, evaluations, disk and memory, computed."""
    config = request.config
    with torch.device("meta"):
        network = empty_network(config).train()
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # each once, however often it is saved
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(torch.empty(config.batch, 3, *crop_size(config), device="meta"))
    weights = size_of(network)
    images: Any = "rendered by the demo"
    if not request.demo:
        try:
            images = dict(zip(Data._fields, map(len, open_data(config)), strict=True))
        except (DataError, OSError) as error:
            images = f"not there yet: {error}"
    return {
        "images": images,
        "evaluations": -(-config.steps // config.eval_every),
        "checkpoints_mb": round(checkpoints(config, network) / 1e6),
        "memory_mb_computed_fp32": round(
            ((copies(config) + 3) * weights + 2 * sum(storage.nbytes() for storage in saved.values())) / 1e6
        ),
    }


def size_of(network: nn.Module) -> int:
    """Bytes of its weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def copies(config: Config) -> int:
    """How often a run holds the weights: student, momentum, teacher."""
    return 2 if config.method == "source" else 3


def checkpoints(config: Config, network: nn.Module) -> int:
    """Bytes of the checkpoints of one training: the last two and the best."""
    return 3 * copies(config) * size_of(network)


def empty_network(config: Config) -> DeepLabV2:
    """The student, from random weights."""
    build = deeplab_v2_resnet101 if config.network == "resnet101" else deeplab_v2_tiny
    # The loss upsamples, in blocks.
    return build(len(CLASS_NAMES), aspp_branches=config.aspp_branches, upsample=False)


def problems(request: Request, folders: list[Path], world: int = 1) -> list[str]:
    """What would stop a run.

    Args:
        request: What was asked for.
        folders: Those of its trainings; none where they are still to be chosen.
        world: How many processes there are.
    """
    fresh = not (request.resume and all(map(has_begun, folders)))  # otherwise all comes from the checkpoints
    looks: list[Callable[[], Iterator[str]]] = [
        lambda: _of_packages(request),
        lambda: _of_folders(request, folders),
    ]
    if fresh and request.config.weights:
        looks.append(lambda: _of_weights(request.config))
    if not request.demo:
        looks.append(lambda: _of_data(request.config, world, fresh=fresh))
    found = []
    for look in looks:
        try:
            found += list(look())
        except (DataError, WeightsError, OSError) as error:
            found.append(str(error))
    return found


def has_begun(folder: Path) -> bool:
    """Whether a training has left something that would be lost, or gone on from."""
    return any(folder.glob("checkpoints/*.pt")) or (folder / "metrics.json").exists()


def _of_packages(request: Request) -> Iterator[str]:
    needs = {"filelock": "lock the folder of a run", "jinja2": "write the report", "matplotlib": "draw its curves"}
    for package, what in needs.items():
        if importlib.util.find_spec(package) is None:
            yield f"the package {package} is needed to {what}: pip install {package}."
    if request.config.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401, PLC0415 - an optional package
        except ImportError as error:
            yield f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard."


def _of_folders(request: Request, folders: list[Path]) -> Iterator[str]:
    out = request.out
    if (problem := unwritable(out or Path("runs"))) is not None:
        yield f"--out {out or 'runs'}: {problem}; give another --out."
        return
    if request.resume and out is not None:
        if not out.is_dir():
            yield f"--resume: there is no folder {out} to go on in; check --out, or leave --resume out to begin there."
        elif not config_files(out) and any(_visible(out)):
            yield (
                f"--resume: {out} is no folder of a run, it holds no config.json; check --out, or leave --resume out "
                "to begin there."
            )
        return
    for folder in filter(has_begun, folders):
        yield f"{folder} holds a run already; go on with --resume, or give another --out."
    with torch.device("meta"):
        needed = request.runs * len(request.methods) * checkpoints(request.config, empty_network(request.config)) / 1e6
    room = shutil.disk_usage(existing(out or Path("runs")))
    if room.free / 1e6 < needed and room.total:  # some file systems do not say
        yield (
            f"--out {out or 'runs'}: checkpoints will need {needed:.0f} MB, and only {room.free / 1e6:.0f} MB are "
            "free; make room, or give another --out."
        )


def existing(path: Path) -> Path:
    """A path, or the first above it that there is."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder that is there or will be made."""
    place = existing(folder)
    if not place.is_dir():
        return f"{place} is no folder"
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"


def _visible(out: Path) -> Iterator[Path]:
    """What is in a folder, but for what a run makes before it begins."""
    return (path for path in out.iterdir() if not path.name.startswith(".") and path.name != "data")


def _of_weights(config: Config) -> Iterator[str]:
    load_weights(empty_network(config), config.weights, strict=False)
    yield from ()


def _of_data(config: Config, world: int, *, fresh: bool) -> Iterator[str]:
    data = open_data(config)
    whole = config.batch * world
    for name, samples in (("source", data.source), ("target", data.target)):
        if len(samples) < whole:
            yield f"the {name} has {len(samples)} images, fewer than the {whole} of a batch."
        small = [] if config.pad else too_small(samples, crop_size(config))
        if len(small) > min(config.skip_files, len(samples) - 1):
            leave_out = f", leave them out with --skip-files {len(small)}" if len(small) < len(samples) else ""
            yield (
                f"--crop {config.crop} is larger than {len(small)} of {len(samples)} {name} images, such as "
                f"{small[0]}; crop smaller, pad with --pad{leave_out}, or give a larger --{name}-size."
            )
    if config.method == "alignment" and config.prior == "oracle" and fresh:
        Cityscapes(config.cityscapes, "train", images=False)
    for name, samples in zip(Data._fields, data, strict=True):
        try:
            samples[0]  # what is wrong with all of them is wrong with the first
        except ValueError as error:
            if name == "validation":
                raise
            if not config.skip_files:
                yield f"{error} Mend it, or leave it out with --skip-files 1."
    if config.cache and not Path(config.cache).is_dir() and (problem := unwritable(Path(config.cache))) is not None:
        yield f"--cache {config.cache}: {problem}; give one that is new, or a cache."
