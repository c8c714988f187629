"""What a run of the trainer would do, read and need, and what would stop it: found without training anything."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossmix.datasets import DataError
from crossmix.models import WeightsError, load_weights
from crossmix.optim import parameter_groups
from domains import Data, class_names, crop_size, open_data, target_labels, too_small
from networks import is_ours, new_network, tried
from options import Config, Request, config_files, size

__all__ = ["empty_network", "has_begun", "head_of", "plan", "problems"]


def plan(request: Request) -> dict[str, Any]:
    """Counts, evaluations, disk and memory, computed."""
    config = request.config
    images: Any = "rendered by the demo"
    if not request.demo:
        try:
            images = dict(zip(Data._fields, map(len, open_data(config)), strict=True))
        except (DataError, OSError) as error:
            images = f"not there yet: {error}"
    try:
        takes = costs(config)
    except (ValueError, OSError) as error:
        takes = {"network": f"not there yet: {error}"}
    return {"images": images, "evaluations": -(-config.steps // config.eval_every), **takes}


def costs(config: Config) -> dict[str, Any]:
    """Disk and memory, computed from shapes alone."""
    network = empty_network(config, meta=True).train()
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # each once, however often it is saved
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.empty(config.batch, 3, *crop_size(config), device="meta"))
        memory: Any = (copies(config) + 3) * size_of(network) + 2 * sum(storage.nbytes() for storage in saved.values())
    except Exception:  # not everybody's network can do without numbers
        if is_ours(config.network):
            raise
        memory = None
    return {
        "checkpoints_mb": round(checkpoints(config, network) / 1e6),
        "memory_mb_computed_fp32": "unknown" if memory is None else round(memory / 1e6),
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


def empty_network(config: Config, *, meta: bool = False) -> nn.Module:
    """The student as it is built, whose small logits the loss upsamples, in blocks; without numbers if on `meta`."""
    with torch.device("meta") if meta and is_ours(config.network) else nullcontext():
        network = new_network(config.network, len(class_names(config)), aspp_branches=config.aspp_branches)
    return network.to("meta") if meta else network


def head_of(config: Config) -> str | list[str] | None:
    """What learns ten times as fast."""
    return "layer5" if is_ours(config.network) else config.head.split(",") if config.head else None


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
    if not is_ours(request.config.network):
        looks.append(lambda: _of_network(request))
    found: list[str] = []
    for look in looks:
        try:
            found += list(look())
        except (ValueError, WeightsError, OSError) as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


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
    network = empty_network(request.config, meta=True)
    needed = request.runs * len(request.methods) * checkpoints(request.config, network) / 1e6
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


def _of_network(request: Request) -> Iterator[str]:
    """Whether somebody's network trains on crops, and sees what it will be evaluated on."""
    config = request.config
    network, classes = empty_network(config), len(class_names(config))
    parameter_groups(network, config.lr, head=head_of(config))
    tried(network, config.network, classes, crop_size(config), config.device, train=True)
    whole = size(config.target_size)
    if whole is None and not request.demo:
        _, height, width = open_data(config).validation[0].image.shape
        whole = height, width
    if whole is not None:
        tried(network, config.network, classes, whole, config.device, train=False)
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
        target_labels(config)
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
