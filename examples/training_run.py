"""The state of one training and the files in its folder: checkpoints, log, metrics and report."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import crossmix
from crossmix import SelfTraining, SelfTrainingOutput
from crossmix.datasets import DataError, RareClassSampler, write_png
from crossmix.datasets.cache import CacheError
from crossmix.engine import CheckpointStore, FiniteGuard, NonFiniteError, Progress, RunLog, StopRequest, keyed_generator
from crossmix.visualize import gallery
from domains import (
    SOURCE,
    TARGET,
    Data,
    Identity,
    crop_size,
    differences,
    drawn_names,
    identity,
    loader,
    prepared,
    whole_batch,
)
from files import write_text
from networks import is_ours
from options import FREE, Config, size
from pictures import in_one_size, mixed_rows, predicted_rows, write_pictures
from processes import Ranks, reason
from scores import CHOSEN, TITLES, deciding_miou, information, markdown, paper_row, rows_by_class, shortfall, spread
from signals import Stopped

__all__ = [
    "Record", "Run", "conclude", "could_not_load", "crops", "drawn_rows", "finish", "goes_on", "keep_scores", "miou",
    "opened", "recorded", "save", "saved_at_any_end", "seed_network", "stopped",
]  # fmt: skip

STEP, NETWORK = 2, 3  # random streams of the steps, and of dropout in the networks, beside SOURCE and TARGET


@dataclass
class Run:
    """One training: its parts and its progress."""

    config: Config
    folder: Path
    ranks: Ranks
    data: Data
    classes: tuple[str, ...]  # names
    student: nn.Module
    training: SelfTraining
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: FiniteGuard
    rare: RareClassSampler | None  # samples the source's images, if requested
    identity: Identity = field(default_factory=dict)  # of the data
    samples: tuple[Any, Any] = ((), ())  # source and target as the crops are read from
    done: int = 0  # finished steps
    whole: bool = True  # False while a step is under way
    saved: int = 0  # step of the newest checkpoint
    skipped: int = 0  # steps undone before this process started
    metrics: dict[str, Any] = field(
        default_factory=lambda: {
            "evaluations": [], "last": None, "best": None, "best_unsupervised": None,
            "skipped_steps": 0, "skipped_files": [],
        }
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.stop = StopRequest(self.ranks.control)
        self.store = CheckpointStore(self.folder / "checkpoints")
        self.log = RunLog(self.folder / "log.jsonl")

    def due(self, every: int) -> bool:
        """Whether something done at this interval, and at the last step, is due now."""
        return self.done > 0 and (self.done % every == 0 or self.done == self.config.steps)


def crops(run: Run, stream: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Load batches of crops onto the device, images in [0, 1], from a step on."""
    config, ranks = run.config, run.ranks
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    files = run.data[stream].files
    for images, labels, absent in loader(
        config, run.samples[stream], stream, start, rank=ranks.rank, world=ranks.world, rare=run.rare
    ):
        left_out = {files[i].name for i in absent.tolist() if i >= 0}
        run.metrics["skipped_files"] = sorted(left_out | set(run.metrics["skipped_files"]))
        on_device = images.to(config.device, non_blocking=True).float() / 255
        yield on_device.contiguous(memory_format=layout), labels.to(config.device, non_blocking=True)


def drawn_rows(run: Run, number: int) -> Any:  # noqa: ANN401 - what `SelfTraining.sample` returns
    """Make the random draws of a batch, by its number, for all processes; return those for this one's rows."""
    batch, rank = run.config.batch, run.ranks.rank
    generator = keyed_generator(run.config.seed, STEP, number)
    n, shape = batch * run.ranks.world, crop_size(run.config)
    draw = run.training.sample(n, shape, generator=generator, device=run.config.device)
    return draw.rows(slice(batch * rank, batch * (rank + 1)))


def seed_network(run: Run) -> None:
    """Seed the global generators, which dropout draws from, by step and process: a resumed run draws the same."""
    seed, device = keyed_generator(run.config.seed, NETWORK, run.done, run.ranks.rank).initial_seed(), run.config.device
    torch.default_generator.manual_seed(seed)
    if device.startswith("cuda"):
        torch.cuda.manual_seed_all(seed)
    elif device != "cpu":
        torch.manual_seed(seed)  # which looks for every kind of device, for 0.3 ms


# ------------------------------------------------------------------------------------------------------- checkpoints


def state(run: Run) -> dict[str, Any]:
    """Collect the state of a run as plain tensors, numbers and strings."""
    teacher, align = run.training.teacher, run.training.align
    return {
        "step": run.done,
        "student": run.student.state_dict(),
        "teacher": None if teacher is None else teacher.state_dict(),
        "align": None if align is None else align.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "metrics": run.metrics,
        "config": {**asdict(run.config), "num_classes": len(run.classes)},
        "data": run.identity,
        "whole_batch": whole_batch(run.config, run.ranks.world),
        "versions": versions(),
    }


def save(run: Run, *, names: Collection[str] = ()) -> None:
    """Write a checkpoint, also by the names of what it is the best for, and the metrics."""
    run.guard.settle()  # the device may have undone a step without the host knowing yet
    count_skipped(run)
    if run.ranks.first:
        run.store.save(run.done, state(run), names=names)
        write_json(run.folder / "metrics.json", run.metrics)
    run.saved = run.done


@contextmanager
def saved_at_any_end(run: Run) -> Iterator[None]:
    """Save the last finished step however the `with` block ends, if the disk permits."""
    try:
        yield
    except NonFiniteError as error:  # the guard has restored the state before the step
        run.whole = True
        if error.step == run.done:  # that step is not finished
            run.skipped -= 1
        names = ", ".join(drawn_names(run.config, run.data, error.step, run.ranks.world, rare=run.rare))
        raise NonFiniteError(
            error.step, f"{error} --skip-steps {run.config.skip_steps + 1} undoes one more. Its samples: {names}."
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"{reason(error)} {fewer_workers(run)}.") from error
    finally:
        if run.whole and run.done > run.saved and run.ranks.first:
            with suppress(OSError):
                save(run)
                print(f"{run.folder}: {goes_on(run)}", flush=True)


def could_not_load(run: Run, failure: Exception) -> DataError:
    """Make the exception for a batch that could not be loaded."""
    if isinstance(failure, CacheError):  # the message says how to rebuild what is damaged
        return DataError(f"{reason(failure)} {goes_on(run).capitalize()}.")
    if isinstance(failure, RuntimeError):
        remedy = fewer_workers(run)
    elif run.config.skip_files < min(map(len, run.data[:2])):
        remedy = f"Repair it, or leave it out with --skip-files {run.config.skip_files + 1}"
    else:
        remedy = "Repair them"  # without the broken files nothing would be left
    return DataError(f"{reason(failure)} {remedy}; {goes_on(run)}.")


def fewer_workers(run: Run) -> str:
    """Suggest a remedy for a killed worker, which mostly ran out of memory."""
    return f"--workers 0 reads in this process, fewer than {run.config.workers} need less memory"


def goes_on(run: Run) -> str:
    """Say how to continue after an error."""
    if run.done == 0:
        return "nothing was trained yet"
    return f"step {run.saved} is saved, the same command with --resume and this --out continues"


def stopped(run: Run) -> Stopped:
    """Make the exception for a stop requested by a signal."""
    return Stopped(f" after step {run.done}, which is saved" if run.done else "")


def opened(run: Run, saved: dict[str, Any] | None, *, resume: bool) -> Run:
    """Restore a checkpoint, if there is one, and begin or continue the files and the data of the run."""
    run.identity = identity(run.data, run.classes)
    if saved is not None:
        restore(run, saved)
    elif resume and run.ranks.first:
        print(f"nothing was saved in {run.store.folder}: starting at step 0", flush=True)
    if run.ranks.first:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(run.folder / "config.json", {**asdict(run.config), "versions": versions()})
        run.log.cut(run.done)
    run.samples = prepared(run.config, run.data, progress=run.ranks.first)
    return run


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Load a checkpoint, which holds everything a run needs except its data."""
    refuse_another_run(run, saved)
    run.student.load_state_dict(saved["student"])
    for name, module in (("teacher", run.training.teacher), ("align", run.training.align)):
        if module is not None:
            module.load_state_dict(saved[name])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.done = run.saved = int(saved["step"])
    run.metrics |= saved["metrics"]
    run.skipped = run.metrics["skipped_steps"]
    run.guard.skip -= run.skipped
    run.guard.keep()
    best = [title for title in CHOSEN if (run.metrics[title] or {}).get("step") == run.done]
    if best:
        save(run, names=best)  # in case the last run was killed before it had written all of them
    if run.ranks.first:
        print(f"resumed at step {run.done}", flush=True)


def refuse_another_run(run: Run, saved: dict[str, Any]) -> None:
    """Exit if other options or other data would change the result, wherever the data is stored."""
    old, new = {**asdict(Config()), **saved["config"]}, asdict(run.config)
    changed = [f"{name} {old[name]!r} is now {new[name]!r}" for name in sorted(new.keys() - FREE)
               if new[name] != old[name]]  # fmt: skip
    if (whole := whole_batch(run.config, run.ranks.world)) != saved["whole_batch"]:
        changed.append(f"the batch of all processes {saved['whole_batch']} is now {whole}")
    if changed:
        raise SystemExit(
            f"error: cannot resume with other options: {', '.join(changed)}; give the old ones, or another --out."
        )
    other, mended = differences(saved["data"], run.identity, run.data) if "data" in saved else ([], [])
    if other:
        raise SystemExit(f"error: cannot resume on other data: {'; '.join(other)}. Give the old one, or another --out.")
    if mended and run.ranks.first:
        print(f"files of another size than before: {', '.join(mended)}", flush=True)
    if (undone := saved["metrics"].get("skipped_steps", 0)) > run.config.skip_steps:
        raise SystemExit(
            f"error: {undone} steps were undone so far, for a loss or gradient that was not finite; --skip-steps "
            f"{undone} allows that many."
        )


def count_skipped(run: Run) -> None:
    """Record how many of the finished steps were undone, as far as the host knows."""
    run.metrics["skipped_steps"] = run.skipped + run.guard.skipped


# --------------------------------------------------------------------------------------------------------------- log


class Record:
    """Logs to a file, the console and TensorBoard."""

    def __init__(self, run: Run) -> None:
        config, first = run.config, run.ranks.first
        self.progress = Progress(config.steps, start=run.done, title=config.method, shown=first)
        self.events: Any = None  # for TensorBoard
        if config.tensorboard and first:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package

            for old in run.folder.glob("report/events.out.tfevents.*"):
                old.unlink()
            self.events = SummaryWriter(str(run.folder / "report"))
            for line in run.log.read():  # so that a resumed run has every step, and none twice
                self.write_events(line)

    def step(self, run: Run, output: SelfTrainingOutput) -> None:
        """Log a step. Reading the losses waits for the device."""
        line = {
            "step": run.done,
            "loss": output.loss.item(),
            "source_loss": output.source_loss.item(),
            "mixed_loss": output.mixed_loss.item(),
            "lr": run.optimizer.param_groups[0]["lr"],
        }
        if run.training.consistency is not None:
            line["consistency_loss"] = output.consistency_loss.item()
        if output.confidence is not None and output.mixed is not None:
            line["confident"] = float((output.confidence >= run.config.threshold).float().mean())
            target = torch.logical_not(output.mixed.mask)
            line["lambda"] = float((output.mixed.weights * target).sum() / target.sum().clamp(min=1))
        count_skipped(run)
        line |= {key: run.metrics[key] for key in ("skipped_steps", "overflowed_steps") if run.metrics.get(key)}
        line |= self.progress.measured(run.done)
        if run.ranks.first:
            run.log.write(line)
            self.progress.show(line)
            if self.events is not None:
                self.write_events(line)

    def write_events(self, line: Mapping[str, float]) -> None:
        """Write a line of the log for TensorBoard, at once."""
        for name in line.keys() - {"step"}:
            self.events.add_scalar(name, line[name], line["step"])
        self.events.flush()


@contextmanager
def recorded(run: Run) -> Iterator[Record]:
    """Open the logs and close them at the end."""
    record = Record(run)
    try:
        yield record
    finally:
        record.progress.close()
        if record.events is not None:
            record.events.close()


# ------------------------------------------------------------------------------------------------------------ report


def miou(entry: Mapping[str, Any], config: Config) -> float | None:
    """Read the student's mean IoU, at the label size and over the classes that decide."""
    return deciding_miou(entry, evaluation=config.evaluation, synthia=bool(config.synthia))


def keep_scores(run: Run, entry: dict[str, Any]) -> list[str]:
    """Add an evaluation to the metrics; return the titles by which it is the best so far."""
    run.metrics["evaluations"].append(entry)
    run.metrics["last"] = entry

    def keep_if_better(title: str, score: Callable[[Mapping[str, Any]], float | None]) -> None:
        best = run.metrics[title]
        if best is None or (score(entry) or 0) > (score(best) or 0):
            run.metrics[title] = entry

    keep_if_better("best", lambda one: miou(one, run.config))
    keep_if_better("best_unsupervised", information)
    return [title for title in CHOSEN if run.metrics[title] is entry]


def finish(run: Run) -> None:
    """Write the report, and say which steps were undone and which files were left out; called by all processes."""
    mixed = last_mixed(run)
    if not run.ranks.first:
        return
    write_report(run, mixed)
    if steps := run.metrics["skipped_steps"]:
        print(f"{steps} of {run.done} steps were undone: the loss or a gradient was not finite", flush=True)
    if files := run.metrics["skipped_files"]:
        print(f"{len(files)} files were left out: {', '.join(files)}", flush=True)


def last_mixed(run: Run) -> list[list[Tensor]]:
    """Show this process's mixed images of the last step.

    All processes take part: on several GPUs the teacher's BatchNorm computes statistics of the whole batch, and waits
    for those that are missing.
    """
    config = run.config
    last = replace(run, config=replace(config, workers=0, resident=False), samples=run.data[:2])
    (source_images, source_labels), (target_images, _) = (
        next(crops(last, stream, config.steps - 1)) for stream in (SOURCE, TARGET)
    )
    draw = drawn_rows(run, (config.steps - 1) * config.accumulate)
    return mixed_rows(run.training, run.student, (source_images, source_labels, target_images), draw)


def write_report(run: Run, mixed: list[list[Tensor]]) -> None:
    """Write the report: its page, table and pictures, the last step's mixed images among them."""
    from report import run_page  # noqa: PLC0415 - needs an extra, which `problems` checked for

    config, folder = run.config, run.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "metrics.json", run.metrics)  # a run killed after its last step has them in its checkpoint
    write_text(folder / "table.md", shown({config.method: [run.metrics]}, config))
    validation = run.data.validation
    samples = (validation[i] for i in range(min(config.batch, len(validation))))
    predicted = predicted_rows(
        run.student, samples, size(config.target_size), config.device, align_corners=is_ours(config.network)
    )
    beside = in_one_size(predicted, crop_size(config))
    write_png(folder / "gallery.png", gallery([[*m, *p] for m, p in zip(mixed, beside, strict=False)]))
    write_pictures(folder / "pictures", {"mixed": mixed, "predicted": predicted})
    run_page(run.folder)


def conclude(
    results: dict[str, list[dict[str, Any]]], folders: dict[str, list[Path]], config: Config, report: Path
) -> None:
    """Print the table of all trainings; if there are several, write it and a page that compares them."""
    from report import comparison_page  # noqa: PLC0415 - needs an extra, which `problems` checked for

    print("\n" + shown(results, config))
    if sum(map(len, folders.values())) > 1:
        comparison_page(folders, report)
        write_text(report / "table.md", shown(results, config))
    print(f"report: {report / 'index.html'}")


def shown(results: dict[str, list[dict[str, Any]]], config: Config) -> str:
    """Format a table of each method's last scores, of its best step, and of the paper's rows if they compare."""
    source = "synthia" if config.synthia else "gta5"
    means = ("miou_16", "miou_13") if config.synthia else ("miou",)
    columns = {method: [run["last"]["student"][config.evaluation] for run in runs] for method, runs in results.items()}
    compared = results if config.network == "resnet101" and not config.source else ()
    rows = rows_by_class(columns, {f"{method} in the paper": paper_row(source, method) for method in compared}, means)
    for title, words in CHOSEN.items():
        values = [[run[title] and miou(run[title], config) for run in runs] for runs in results.values()]
        rows.append([f"{TITLES[means[0]]}, {words}", *map(spread, values), *("-" for _ in compared)])
    lost = [[shortfall(run, lambda entry: miou(entry, config)) for run in runs] for runs in results.values()]
    rows.append(["points below the best step", *map(spread, lost), *("-" for _ in compared)])
    labels = "their own size" if config.evaluation == "native" else config.evaluation
    paper = " The paper's numbers are on labels of 512x1024." if compared else ""
    return f"{markdown(rows)}\nIoU in percent, on labels of {labels}.{paper}\n"


def versions() -> dict[str, str]:
    """List the versions that results depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"crossmix": crossmix.__version__, "torch": str(torch.__version__), "gpu": gpu}


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that people can read too."""
    write_text(path, json.dumps(value, indent=2) + "\n")
