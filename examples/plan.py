"""Plan a run of the trainer without training: what it needs, and what would stop it."""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import domains
from crossmix.datasets import DataError, class_counts
from crossmix.models import WeightsError, load_weights
from crossmix.optim import parameter_groups
from networks import is_ours, new_network, tried
from options import Config, Request, config_files, size

__all__ = ["empty_network", "has_begun", "head_of", "plan", "problems"]

STEP = r"checkpoints/step-\d+\.pt"  # what `CheckpointStore` resumes from
KEPT = 4  # checkpoints of a training: the last two, the best and the label-free one


def plan(request: Request, world: int = 1) -> dict[str, Any]:
    """Compute the number of images and evaluations, and the disk space and memory that each process needs."""
    config = request.config

    def found(look: Callable[[], Any]) -> Any:  # noqa: ANN401 - part of the plan
        try:
            return look()
        except (ValueError, OSError) as error:
            return f"not there yet: {error}"

    def images() -> dict[str, int]:
        return dict(zip(domains.Data._fields, map(len, domains.open_data(config)), strict=True))

    takes = found(lambda: costs(config))
    return {
        "images": "rendered by the demo" if request.demo else found(images),
        **({"rare_classes": found(lambda: rare_classes(request))} if config.rare_classes else {}),
        "source_images_per_step": domains.whole_batch(config, world),
        "evaluations": -(-config.steps // config.eval_every),
        **(takes if isinstance(takes, dict) else {"network": takes}),
    }


def rare_classes(request: Request) -> dict[str, Any]:
    """Say which label maps a run would count for rare-class sampling and, if none is left, what the counts are."""
    config, out = request.config, request.out or Path("OUT")
    if request.demo:
        return {"images_to_count": "all that the demo renders, unless they are counted already"}
    data = domains.open_data(config)
    file, left = domains.counts_file(config, out), domains.to_count(config, data, out)
    if left:
        return {"counts": str(file), "images_to_count": left}
    enough = (class_counts(data.source, cache=file) >= config.rare_pixels).sum(0).tolist()
    images = dict(zip(domains.class_names(config), enough, strict=False))
    return {"counts": str(file), "images_to_count": 0, "images_with_rare_pixels": images}


def costs(config: Config) -> dict[str, Any]:
    """Compute disk space and memory from shapes alone."""
    network = empty_network(config, meta=True).train()
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # once, however often autograd saves it
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.empty(config.batch, 3, *domains.crop_size(config), device="meta"))
        graphs = 1 if config.method == "source" else 3 if config.consistency else 2
        graph = sum(one.nbytes() for one in saved.values())
        memory: Any = in_training(config) * size_of(network) + graphs * graph
    except Exception:  # some networks cannot run without data
        if is_ours(config.network):
            raise
        memory = None
    return {
        "checkpoints_mb": round(KEPT * checkpoint(config, network) / 1e6),
        "memory_mb_computed_fp32": "unknown" if memory is None else round(memory / 1e6),
    }


def size_of(network: nn.Module) -> int:
    """Count the bytes of weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def copies(config: Config) -> int:
    """Count the tensors per weight: student, state of the optimizer, teacher."""
    return 1 + {"sgd": 1, "adamw": 2}[config.optimizer] + (config.method != "source")


def in_training(config: Config) -> int:
    """Count the tensors per weight while training: also the copies that `FiniteGuard` keeps, and the gradient."""
    kept = 2 if config.device.startswith("cuda") else 1
    return copies(config) * (1 + kept) + 1


def checkpoint(config: Config, network: nn.Module) -> int:
    """Count the bytes of a checkpoint."""
    return copies(config) * size_of(network)


def empty_network(config: Config, *, meta: bool = False) -> nn.Module:
    """Build the student, whose logits are small: the loss upsamples them. On `meta` it holds no data."""
    with torch.device("meta") if meta and is_ours(config.network) else nullcontext():
        network = new_network(config.network, len(domains.class_names(config)), aspp_branches=config.aspp_branches)
    return network.to("meta") if meta else network


def head_of(config: Config) -> str | list[str] | None:
    """Name the head, whose learning rate is multiplied by `head_factor`."""
    return "layer5" if is_ours(config.network) else config.head.split(",") if config.head else None


def problems(request: Request, folders: list[Path], world: int = 1) -> list[str]:
    """List what would stop a run of `world` processes into the folders of its trainings, none if not chosen yet."""
    fresh = not (request.resume and all(map(has_begun, folders)))  # otherwise everything is in the checkpoints
    config = request.config
    looks: list[Callable[[], Any]] = [lambda: _of_packages(request), lambda: _of_folders(request, folders)]
    if fresh and config.weights:
        looks.append(lambda: load_weights(empty_network(config), config.weights, strict=False))
    if not request.demo:
        looks.append(lambda: _of_data(request, world, fresh=fresh))
    if not is_ours(config.network):
        looks.append(lambda: _try_network(request, world))
    found: list[str] = []
    for look in looks:
        try:
            result = look()
            found.extend(result if isinstance(result, Iterator) else ())  # keeps what came before an error
        except (ValueError, WeightsError, OSError) as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def has_begun(folder: Path) -> bool:
    """Whether a training has left results that could be lost or resumed."""
    return bool(_results(folder))


def _results(folder: Path) -> list[str]:
    """List what a training has left that could be lost or resumed, by path inside its folder."""
    found = [*sorted(folder.glob("checkpoints/*.pt")), *folder.glob("metrics.json")]
    return [path.relative_to(folder).as_posix() for path in found]


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
        yield from _of_resumed(out, folders)
        return
    for folder in filter(has_begun, folders):
        yield f"{folder} holds a run already; resume it with --resume, or give another --out."
    others = [] if out is None else [path.parent for path in config_files(out) if path.parent not in folders]
    if out is not None and any(map(has_begun, others)) and (out / "report" / "index.html").exists():
        held = ", ".join(map(str, others))
        yield f"--out {out} holds {held} of another command, whose report would be replaced; give another --out."
    # Until the old ones are deleted, the new checkpoint and the new best ones lie beside them.
    kept, written = KEPT * request.runs * len(request.methods), 2
    needed = (kept + written) * checkpoint(request.config, empty_network(request.config, meta=True)) / 1e6
    room = shutil.disk_usage(existing(out or Path("runs")))
    if room.free / 1e6 < needed and room.total:  # 0 on file systems that do not say
        yield (
            f"--out {out or 'runs'}: checkpoints will need {needed:.0f} MB, and only {room.free / 1e6:.0f} MB are "
            "free; make room, or give another --out."
        )


def _of_resumed(out: Path, folders: list[Path]) -> Iterator[str]:
    if not out.is_dir():
        yield f"--resume: there is no folder {out} to resume; check --out, or leave out --resume to start there."
        return
    begun = config_files(out)
    if not begun and any(_visible(out)):
        start = "give another" if any(map(has_begun, folders)) else "leave out --resume to start there"
        yield f"--resume: {out} is not the folder of a run, it holds no config.json; check --out, or {start}."
        return
    if folders and begun and not {path.parent for path in begun} & set(folders):
        held = ", ".join(str(path.parent) for path in begun)
        yield (
            f"--resume: this command has no run in {out}, which holds {held}; repeat the command that began these, "
            "with its --runs, --seed or --demo, or give another --out."
        )
        return
    for folder in folders:  # without a step to resume from, a training starts at 0 and replaces what is there
        if (results := _results(folder)) and not any(re.fullmatch(STEP, name) for name in results):
            yield (
                f"--resume: {folder} holds {', '.join(results)}, but no checkpoints/step-*.pt to resume from; give "
                "another --out, or delete them to start at step 0."
            )


def existing(path: Path) -> Path:
    """Return the path or its nearest existing parent."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def unwritable(folder: Path) -> str | None:
    """Say why nothing can be written to a folder, existing or not."""
    place = existing(folder)
    if not place.is_dir():
        return f"{place} is not a folder"
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"


def _visible(out: Path) -> Iterator[Path]:
    """List the contents of a folder, except what a run creates before its config.json."""
    return (
        path for path in out.iterdir() if not path.name.startswith(".") and path.name not in {"data", domains.COUNTS}
    )


def _try_network(request: Request, world: int) -> None:
    """Try your own network on crops and on images as they will be evaluated.

    With several processes only the first tries: layers that synchronise in training would wait for the others.
    """
    config = request.config
    network, classes = empty_network(config), len(domains.class_names(config))
    parameter_groups(network, config.lr, head=head_of(config))
    tried(network, config.network, classes, domains.crop_size(config), config.device, train=world == 1)
    whole = size(config.target_size)
    if whole is None and not request.demo:
        _, height, width = domains.open_data(config).validation[0].image.shape
        whole = height, width
    if whole is not None:
        tried(network, config.network, classes, whole, config.device, train=False)


def _of_data(request: Request, world: int, *, fresh: bool) -> Iterator[str]:
    config, out = request.config, request.out or Path("OUT")
    data = domains.open_data(config)
    whole = config.batch * world
    for name, samples in (("source", data.source), ("target", data.target)):
        if len(samples) < whole:
            yield f"the {name} has {len(samples)} images, fewer than the {whole} of a batch."
        small = [] if config.pad else domains.too_small(samples, domains.crop_size(config))
        if len(small) > min(config.skip_files, len(samples) - 1):
            leave_out = f", leave them out with --skip-files {len(small)}" if len(small) < len(samples) else ""
            yield (
                f"--crop {config.crop} is larger than {len(small)} of {len(samples)} {name} images, such as "
                f"{small[0]}; crop smaller, pad with --pad{leave_out}, or give a larger --{name}-size."
            )
    if config.method == "alignment" and config.prior == "oracle" and fresh:
        domains.target_labels(config)
    if config.rare_classes and domains.to_count(config, data, out) == 0:
        domains.rare_class_sampler(config, data, out)  # quick, as everything is counted; it refuses too few pixels
    if config.resident and torch.device(config.device).type == "cuda" and (needed := domains.resident_bytes(data)):
        free, _ = torch.cuda.mem_get_info(config.device)
        if needed > free:
            yield (
                f"--resident: both domains need {needed / 2**30:.1f} GiB, and {config.device} has "
                f"{free / 2**30:.1f} GiB free; leave it out, and read from a --cache on disk."
            )
    yield from _of_samples(config, data)
    place = Path(config.cache)
    if config.cache and not place.is_dir() and (problem := unwritable(place)) is not None:
        yield f"--cache {config.cache}: {problem}; give one that is new, or a cache."


def _of_samples(config: Config, data: domains.Data) -> Iterator[str]:
    """Check the caches, and read the first sample of each part that is in none, which finds what is wrong with all."""
    for name, samples in zip(domains.Data._fields, data, strict=True):
        to_cache = bool(config.cache) and name != "validation"
        try:
            if to_cache and Path(config.cache).is_dir() and domains.is_cached(config, samples, name):
                continue
        except DataError as error:
            yield str(error)
            continue
        try:
            with domains.every_image_needed(config) if to_cache else nullcontext():
                samples[0]
        except ValueError as error:
            if name == "validation" or (to_cache and config.skip_files):
                yield str(error)
            elif not config.skip_files:
                leave_out = "" if to_cache else ", or leave it out with --skip-files 1"
                yield f"{error} Repair it{leave_out}."
