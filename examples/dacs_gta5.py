"""Train DeepLab-v2 from GTA5 or SYNTHIA to Cityscapes by DACS, as the paper does, or by a method it compares with.

    python examples/dacs_gta5.py --demo                                        minutes on a laptop
    python examples/dacs_gta5.py --gta5 DIR --cityscapes DIR --weights FILE    the paper's main row
    python examples/dacs_gta5.py --synthia DIR --cityscapes DIR ...            its Table 2
    python examples/dacs_gta5.py --source DIR --target DIR --classes FILE ...  your own images
    torchrun --nproc_per_node 4 examples/dacs_gta5.py ...                      several GPUs
    python examples/dacs_gta5.py ... --out runs/dacs --resume                  go on where a run stopped

The demo renders a small pair of domains (`crossmix.datasets.StreetScenes`), writes it to disk in the folder layouts of
GTA5 and Cityscapes, trains a small DeepLab-v2 from scratch on the source alone and by DACS, and prints both rows.

OUT holds config.json (every option as it was), log.jsonl (one object per logged step), metrics.json (every evaluation),
checkpoints/ and report/. Data and randomness are a pure function of (seed, step), so a resumed run equals one that
never stopped, bit for bit on a CPU with as many threads. SIGTERM and Ctrl-C finish the step, save, and exit with 0.

DACS: Tranheden et al., WACV 2021, https://arxiv.org/abs/2007.08702
"""

from signals import Stopped, end_early, end_undisturbed, ended_by_signals

if __name__ == "__main__":
    end_early()  # the imports take seconds

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crossmix import SelfTraining, SelfTrainingOutput, recipes
from crossmix.datasets import DataError, class_counts
from crossmix.engine import (
    BusyError,
    CheckpointError,
    CheckpointStore,
    FiniteGuard,
    FolderLock,
    NonFiniteError,
    keyed_generator,
)
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from crossmix.models import DeepLabV2, WeightsError, load_weights
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr
from domains import (
    SOURCE,
    TARGET,
    Batch,
    class_names,
    identity,
    open_data,
    prepared,
    target_labels,
    with_rendered_data,
)
from networks import NetworkError, is_ours
from options import Config, Request, label_sizes, read_options, size, size_name
from plan import empty_network, has_begun, head_of, plan, problems
from processes import Ranks, reason, start_ranks
from scores import percent, summary
from training_run import (
    STEP,
    Record,
    Run,
    conclude,
    crops,
    fewer_workers,
    goes_on,
    miou,
    recorded,
    restore,
    save,
    saved_at_any_end,
    stopped,
    versions,
    what_was_skipped,
    write_json,
    write_report,
)

ERRORS = (DataError, WeightsError, NetworkError, NonFiniteError, BusyError, CheckpointError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    request = read_options(argv, __doc__ or "")
    if request.dry_run:
        print(json.dumps({"options": asdict(request.config), "plan": plan(request)}, indent=2), flush=True)
        refuse(problems(request, [folder for _, folder in trainings(request, request.out)] if request.out else []))
        return 0
    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        ranks, out = Ranks(), request.out
        try:
            ranks = start_ranks(request.config.device, stack)
            out = ranks.once(lambda: begin(request, ranks, stack))
            if request.demo:
                request = request._replace(config=ranks.once(lambda: with_rendered_data(request.config, out / "data")))
            run_all(request, out, ranks)
        except Stopped as stopped:
            end_undisturbed()
            begun = out is not None and any(has_begun(folder) for _, folder in trainings(request, out))
            how = f"the same command with --resume --out {out} goes on" if begun else "nothing was trained yet"
            if ranks.first:
                print(f"stopped{stopped}; {how}")
        except ERRORS as error:
            raise SystemExit(f"error: {reason(error)}") from error
    return 0


def begin(request: Request, ranks: Ranks, stack: ExitStack) -> Path:
    """Look for all that would stop the run, then take its folder, which is held until the stack is left."""
    folders = [folder for _, folder in trainings(request, request.out)] if request.out else []
    refuse(problems(request, folders, ranks.world))
    out = request.out or new_folder("demo" if request.demo else request.config.method)
    stack.enter_context(FolderLock(out))
    return out


def refuse(found: list[str]) -> None:
    """End with what would stop the run, if anything."""
    if found:
        raise SystemExit("\n".join(f"error: {problem}" for problem in found))


def new_folder(title: str) -> Path:
    """A folder that no other job has, not even one that began in the same second."""
    name = time.strftime(f"%Y%m%d-%H%M%S-{title}")
    for number in count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def trainings(request: Request, out: Path) -> Iterator[tuple[Config, Path]]:
    """Every seed and method that was asked for, with its folder."""
    for seed in range(request.config.seed, request.config.seed + request.runs):
        for method in request.methods:
            folder = out / f"seed-{seed}" if request.runs > 1 else out
            yield (
                replace(request.config, method=method, seed=seed),
                folder / method if len(request.methods) > 1 else folder,
            )


def run_all(request: Request, out: Path, ranks: Ranks) -> None:
    """Train everything that was asked for, and set it side by side."""
    results: dict[str, list[dict[str, Any]]] = {}
    folders: dict[str, list[Path]] = {}
    for config, folder in trainings(request, out):
        if ranks.first:
            print(
                f"{config.method}, seed {config.seed}: {config.steps} steps on {config.device}, into {folder}",
                flush=True,
            )
        results.setdefault(config.method, []).append(train(config, folder, ranks, resume=request.resume))
        folders.setdefault(config.method, []).append(folder)
    if ranks.first:
        conclude(results, folders, request.config, out / "report")


# ---------------------------------------------------------------------------------------------------- the algorithm


def train(config: Config, folder: Path, ranks: Ranks, *, resume: bool = False) -> dict[str, Any]:
    """Train one method; return what metrics.json holds."""
    set_up_arithmetic(config)
    run = build(config, folder, ranks, resume=resume)
    batches = zip(crops(run, SOURCE, run.done), crops(run, TARGET, run.done), strict=True)
    with run.stop, recorded(run) as record, saved_at_any_end(run):
        evaluate_if_due(run, record)  # where a run ended before it could
        while run.done < config.steps:
            for group in run.optimizer.param_groups:
                group["lr"] = poly_lr(run.done, config.steps, group["initial_lr"], power=config.power)
            parts = fetch(run, batches, record)
            run.whole = False
            output = train_step(run, parts)
            run.whole, run.done = True, run.done + 1
            if run.due(config.log_every):
                record.step(run, output)
            if run.due(config.save_every) or run.due(config.eval_every):
                save(run)
            evaluate_if_due(run, record)
        if run.stop.agreed():
            raise stopped(run)
    if ranks.first:
        write_report(run)
        print(what_was_skipped(run), end="", flush=True)
    return run.metrics


def train_step(run: Run, parts: list[Batch]) -> SelfTrainingOutput:
    """One iteration of Algorithm 1, on the rows of the whole batch that are this process's."""
    config, training, scaler = run.config, run.training, run.scaler
    run.optimizer.zero_grad(set_to_none=True)
    losses = []
    for number, batch in enumerate(parts, run.done * config.accumulate):
        (source_images, source_labels), (target_images, target_labels) = batch
        generator = keyed_generator(config.seed, STEP, number)
        draw = training.sample(config.batch * run.ranks.world, generator=generator, device=config.device)
        if training.align is not None and config.prior == "source":
            training.align.update_prior(source_labels)
        with autocast(config):
            output: SelfTrainingOutput = training(
                source_images, source_labels, target_images,
                target_weights=(target_labels != 255).float() if config.pad else None,
                draw=draw.rows(own_rows(config, run.ranks)),
            )  # fmt: skip
        scaler.scale(output.loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        losses.append(output.loss.detach())
    run.guard.check(torch.stack(losses).sum(), run.done, gradients=not scaler.is_enabled())
    scale = scaler.get_scale()
    scaler.step(run.optimizer)
    scaler.update()
    share_buffers(run.student, run.ranks)
    if scaler.get_scale() >= scale:
        training.update()
    else:  # the scaler left the step out, as it does until it has found its scale
        run.metrics["overflowed_steps"] = run.metrics.get("overflowed_steps", 0) + 1
    run.guard.restore()
    return output


def fetch(run: Run, batches: Iterator[Batch], record: Record) -> list[Batch]:
    """The batches of the next step. Where a process was asked to stop, or cannot read its own, all save and stop."""
    parts, failure = [], None
    try:
        with record.progress.waiting():
            parts = [next(batches) for _ in range(run.config.accumulate)]
    except (ValueError, OSError, RuntimeError) as error:
        failure = None if run.stop.requested else error  # a signal may have ended a worker too
        run.stop.requested = True
    if not run.stop.agreed():
        return parts
    if run.done > run.saved:
        save(run)
    if failure is None:
        raise stopped(run)
    if isinstance(failure, RuntimeError):
        remedy = fewer_workers(run)
    elif run.config.skip_files < min(map(len, run.data[:2])):
        remedy = f"Mend it, or leave it out with --skip-files {run.config.skip_files + 1}"
    else:
        remedy = "Mend them"  # so many are broken that nothing is left
    raise DataError(f"{reason(failure)} {remedy}; {goes_on(run)}.") from failure


# ------------------------------------------------------------------------------------------------------------- parts


def build(config: Config, folder: Path, ranks: Ranks, *, resume: bool) -> Run:
    """Everything that a run works with, from its options alone, or as its newest checkpoint has it."""
    torch.manual_seed(config.seed)  # the network's initial weights; all else is keyed
    data, classes = open_data(config), class_names(config)
    saved = CheckpointStore(folder / "checkpoints").load_newest() if resume else None
    student = build_network(config, ranks, fresh=saved is None)
    training = build_training(student, config, ranks, fresh=saved is None)
    scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "fp16")
    optimizer = build_optimizer(student, config)
    guard = FiniteGuard(training.children(), optimizer, skip=config.skip_steps)
    run = Run(
        config, folder, ranks, data, classes, identity(data, classes), student, training, optimizer, scaler, guard
    )
    if saved is not None:
        restore(run, saved)
    elif resume and ranks.first:
        print(f"nothing was saved in {run.store.folder}: starting at step 0", flush=True)
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {**asdict(config), "versions": versions()})
        run.log.cut(run.done)
    run.samples = prepared(config, data, progress=ranks.first)
    return run


def own_rows(config: Config, ranks: Ranks) -> slice:
    """Which images of the batch of all processes are this one's."""
    return slice(config.batch * ranks.rank, config.batch * (ranks.rank + 1))


def set_up_arithmetic(config: Config) -> None:
    """How exact float32 products are on a GPU, and whether every run gives the same bits there."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.precision == "tf32"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA's matrix products ask for
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    torch.backends.cudnn.benchmark = config.device.startswith("cuda") and not config.deterministic


def autocast(config: Config) -> torch.autocast:
    """Half precision where asked; softmax, losses and averages are in float32 all the same."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(config.device).type, dtype, enabled=config.precision in {"bf16", "fp16"})


def build_network(config: Config, ranks: Ranks, *, fresh: bool) -> nn.Module:
    """DeepLab-v2 or another network; a fresh one from the given weights or from its own."""
    network = empty_network(config)
    if config.weights and fresh:
        report = load_weights(network, config.weights, strict=False)  # COCO and ImageNet files have another head
        if ranks.first:
            taken, other = len(report.matched), len(report.mismatched)
            print(f"{config.weights}: {taken} tensors taken, {other} of another shape", flush=True)
    if config.device.startswith("cuda") and ranks.world > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return network.to(config.device, memory_format=layout)  # type: ignore[call-overload, no-any-return]


def build_training(student: nn.Module, config: Config, ranks: Ranks, *, fresh: bool) -> SelfTraining:
    """The method in the recipe, with every switch where the configuration has it."""
    prior = None
    if config.method == "alignment" and config.prior == "oracle" and fresh:
        counts = class_counts(target_labels(config), workers=config.workers)
        prior = counts.sum(0)[: len(class_names(config))].double()
    training = recipes.self_training(
        student,
        len(class_names(config)),
        method=config.method,
        **{field.name: getattr(config, field.name) for field in fields(recipes.Recipe) if hasattr(config, field.name)},
        prior=prior,
        sync=ranks.world > 1,
        upsample=True,
        align_corners=is_ours(config.network),
    )
    if config.compile:
        student.compile()
        if training.teacher is not None:
            training.teacher.module.compile()
    if ranks.world > 1:  # two of four branches get no gradient; buffers are shared after the step
        training.student = DistributedDataParallel(
            student,
            broadcast_buffers=False,
            find_unused_parameters=config.aspp_branches < 4 or not is_ours(config.network),
        )
    return training.to(config.device).train()


def share_buffers(student: nn.Module, ranks: Ranks) -> None:
    """BatchNorm's running statistics of the first process for all; on GPUs they are equal already."""
    buffers = [buffer for buffer in student.buffers() if buffer.is_floating_point()]
    if ranks.world > 1 and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(flat, 0)
        shared = torch.split(flat, [buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(shared, buffers, strict=True)])


def build_optimizer(student: nn.Module, config: Config) -> torch.optim.SGD:
    """SGD with ten times the learning rate in the head, and the released code's repeated updates where asked."""
    optimizer = RepeatedSGD if config.repeated else torch.optim.SGD
    return optimizer(
        parameter_groups(student, config.lr, head=head_of(config), repeated=config.repeated),
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


# -------------------------------------------------------------------------------------------------------- evaluation


def evaluate_if_due(run: Run, record: Record) -> None:
    """Evaluate student and teacher on all of the validation images, and keep last and best apart."""
    last = run.metrics["last"]
    if not run.due(run.config.eval_every) or (last is not None and last["step"] == run.done):
        return
    try:
        entry: dict[str, Any] = {"step": run.done, "student": scores(run, run.student)}
        if run.training.teacher is not None:
            entry["teacher"] = scores(run, run.training.teacher.module)
    except (ValueError, OSError) as error:
        raise DataError(f"{reason(error)} Mend it; {goes_on(run)}.") from error
    run.metrics["evaluations"].append(entry)
    run.metrics["last"] = entry
    now, best = miou(entry, run.config), run.metrics["best"]
    if better := best is None or (now or 0) > (miou(best, run.config) or 0):
        run.metrics["best"] = entry
    save(run, best=better)
    words = "no pixel of the validation images counts" if now is None else f"student mIoU {percent(now)} %"
    record.progress.say(f"step {run.done}: {words}")


def scores(run: Run, network: nn.Module) -> dict[str, Any]:
    """Scores at half and at full resolution, or at the images' own in the demo."""
    config = run.config
    if run.data.validation.files[0].label is None:  # as of one's own target, which nobody has labelled
        nothing = summary(ConfusionMatrix(len(run.classes)), run.classes)
        return {size_name(one): nothing for one in label_sizes(config)}
    forward: Any = network.forward_features if isinstance(network, DeepLabV2) else network
    matrices = evaluate(
        network,
        run.data.validation,
        num_classes=len(run.classes),
        image_size=size(config.target_size),
        label_sizes=label_sizes(config),
        forward=interruptible(run, forward),
        align_corners=is_ours(config.network),
        device=config.device,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision),
        workers=config.workers,
        sync=run.ranks.world > 1,
    )
    return {key: summary(matrix, run.classes) for key, matrix in matrices.items()}


def interruptible(run: Run, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same, but that all processes ask before each image whether to stop; not before one that only some have."""
    left = len(run.data.validation) // run.ranks.world

    def asked(images: Tensor) -> Tensor:
        nonlocal left
        if left > 0 and run.stop.agreed():
            raise stopped(run)
        left -= 1
        return forward(images)

    return asked


if __name__ == "__main__":
    sys.exit(main())
