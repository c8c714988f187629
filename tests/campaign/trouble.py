"""What stops the trainer, or should not: signals, dead workers and ranks, data that vanishes, full disks, odd clocks.

Each case ends as it should, says what it should, and goes on to the end of a run that was never disturbed.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from campaign.kills import flags, trained
from runs import FORKED, assert_same, changed, final, fork, log_of, metrics_of, steps_saved

TRIES = {"short": 1, "ci": 1, "nightly": 4}
"""How often each case is tried, at random moments."""
STEPS = 8
PATIENCE = 60
"""Seconds that any process may take to end, on a machine that is busy."""


class UndisturbedError(Exception):
    """The run had ended before anything could happen to it: to be tried again."""


class Trouble:
    """A place for runs, and what they are compared with."""

    def __init__(self, root: Path) -> None:
        self.root, self.rng = root, random.Random(0)  # noqa: S311
        self.slowest_stop, self.count = 0.0, 0
        self.options = changed(flags(root), **{"steps": str(STEPS), "save-every": "1000", "eval-every": "4"})
        self.whole = {ranks: root / f"whole-{ranks}" for ranks in (1, 2)}
        for ranks, out in self.whole.items():
            expect(ended(self.start(out, ranks=ranks)) == [0] * ranks, "the run that nothing happens to fails")
        self.printed()

    def start(
        self, out: Path, *more: str, ranks: int = 1, workers: int = 0, data: Path | None = None,
        run: Callable[..., None] = trained,
    ) -> list[BaseProcess]:  # fmt: skip
        """Begin to train in the background, or go on."""
        options = self.options if data is None else changed(self.options, gta5=str(data / "gta5"))
        resume = ["--resume"] if steps_saved(out) else []
        # The whole batch is that of one rank with the default of 2.
        options = [*options, "--workers", str(workers), "--batch", str(2 // ranks), "--out", str(out), *resume, *more]
        printed = self.root / "printed.txt"
        if ranks == 1:
            return [fork(run, options, printed)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = []
        for rank in range(ranks):
            with mock.patch.dict(os.environ, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}):
                processes.append(fork(run, options, printed))
        return processes

    def out(self) -> Path:
        """A folder for a run."""
        self.count += 1
        return self.root / f"run-{self.count}"

    def sometime(self, processes: list[BaseProcess], out: Path, first: int = 0) -> None:
        """Wait for any moment of a run, after its first step or so if need be."""
        wait_for_step(out, processes, self.rng.randint(first, STEPS - 1))
        processes[0].join(self.rng.random())
        if not processes[0].is_alive():
            raise UndisturbedError

    def end(self) -> str:
        """The last of what the trainer has printed."""
        file = self.root / "printed.txt"
        return file.read_text()[-400:].replace(str(self.root), "") if file.exists() else ""

    def printed(self, *words: str) -> str:
        """What the trainer has printed since the last time; it has to have these words."""
        file = self.root / "printed.txt"
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        for word in words:
            expect(word in text, f"it does not say {word!r}, but {text[-400:]!r}".replace(str(self.root), ""))
        return text

    def goes_on(self, out: Path, ranks: int = 1) -> None:
        """Resume, and compare the end with that of a run that nothing happened to."""
        expect(ended(self.start(out, ranks=ranks)) == [0] * ranks, f"it cannot be resumed: {self.end()}")
        whole = self.whole[ranks]
        try:
            assert_same(final(whole, STEPS), final(out, STEPS))
        except AssertionError as error:
            raise WrongError(f"other weights: {error}") from None
        expect(metrics_of(whole) == metrics_of(out), "other metrics")
        expect([line["step"] for line in log_of(out)] == list(range(1, STEPS + 1)), "a step is missing in the log")
        self.printed()


class WrongError(Exception):
    """Something that should not have happened."""


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise WrongError(otherwise)


def ended(processes: list[BaseProcess]) -> list[int | None]:
    """The exit codes, once all have ended; None for one that does not."""
    limit = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0, limit - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        gone(process)
    return codes


def gone(process: BaseProcess) -> None:
    """End a process and its workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()
    FORKED.remove(process)


def wait_for_step(out: Path, processes: list[BaseProcess], step: int) -> None:
    log = out / "log.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= step) and processes[0].is_alive():
        time.sleep(0.005)


def children(process: BaseProcess) -> list[int]:
    try:
        return [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


# ------------------------------------------------------------------------------------------------------------ cases


def signalled(trouble: Trouble, number: int, *, ranks: int = 1, to: tuple[int, ...] = (0,), workers: int = 0) -> None:
    out = trouble.out()
    processes = trouble.start(out, ranks=ranks, workers=workers)
    # Before the first step one that ends alone makes the others fail: there is nothing to save.
    trouble.sometime(processes, out, first=int(len(to) < ranks))
    sent = time.monotonic()
    for rank in to:
        os.kill(processes[rank].pid or 0, number)
    codes = ended(processes)
    trouble.slowest_stop = max(trouble.slowest_stop, time.monotonic() - sent)
    expect(codes == [0] * ranks, f"exit codes {codes}: {trouble.end()}")
    saved = steps_saved(out)
    if saved[-1:] != [STEPS]:
        trouble.printed(f"stopped after step {saved[-1]}, which is saved" if saved else "nothing was trained yet")
    trouble.goes_on(out, ranks)


def with_workers(trouble: Trouble) -> tuple[Path, list[BaseProcess], list[int]]:
    """A run at some moment, its processes, and the loader's workers."""
    out = trouble.out()
    processes = trouble.start(out, workers=2)
    trouble.sometime(processes, out)
    workers = children(processes[0])
    if not workers:
        raise UndisturbedError
    return out, processes, workers


def worker_killed(trouble: Trouble) -> None:
    out, processes, workers = with_workers(trouble)
    with contextlib.suppress(ProcessLookupError):
        os.kill(trouble.rng.choice(workers), signal.SIGKILL)
    ends_with_an_error(trouble, processes, out, "DataLoader worker", "--workers 0 reads in this process")
    trouble.goes_on(out)


def ends_with_an_error(trouble: Trouble, processes: list[BaseProcess], out: Path, *words: str) -> None:
    """The run ends with a sentence, not with a traceback, unless it was over already."""
    codes = ended(processes)
    if codes == [0] and steps_saved(out)[-1:] == [STEPS]:
        raise UndisturbedError
    expect(codes == [1], f"exit codes {codes}")
    expect("Traceback" not in trouble.printed("error: ", *words), "it prints a traceback")


def parent_killed(trouble: Trouble) -> None:
    """Its workers end too."""
    out, processes, workers = with_workers(trouble)
    os.kill(processes[0].pid or 0, signal.SIGKILL)
    processes[0].join()
    limit = time.monotonic() + PATIENCE
    while (alive := [worker for worker in workers if lives(worker)]) and time.monotonic() < limit:
        time.sleep(0.05)
    ended(processes)
    expect(not alive, f"{len(alive)} of {len(workers)} workers outlive a killed trainer")
    trouble.goes_on(out)


def lives(process: int) -> bool:
    """Whether a process is there, and is not only waiting for somebody to ask how it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def rank_killed(trouble: Trouble) -> None:
    """The other one notices."""
    out = trouble.out()
    processes = trouble.start(out, ranks=2)
    trouble.sometime(processes, out)
    os.kill(processes[trouble.rng.randrange(2)].pid or 0, signal.SIGKILL)
    codes = ended(processes)
    if 0 in codes:
        raise UndisturbedError
    expect(-signal.SIGKILL in codes and None not in codes, f"exit codes {codes}")
    trouble.goes_on(out, 2)


def data_vanishes(trouble: Trouble) -> None:
    out, data = trouble.out(), trouble.root / f"data-{trouble.count}"
    shutil.copytree(trouble.root / "gta5", data / "gta5")
    processes = trouble.start(out, data=data, workers=2 * trouble.rng.randrange(2))
    trouble.sometime(processes, out)
    data.rename(data.with_name("gone"))
    ends_with_an_error(trouble, processes, out, str(data), "no such f")  # file or folder
    shutil.rmtree(data.with_name("gone"))
    trouble.goes_on(out)


def data_turns_read_only(trouble: Trouble) -> None:
    """Nothing happens."""
    out, data = trouble.out(), trouble.root / f"data-{trouble.count}"
    shutil.copytree(trouble.root / "gta5", data / "gta5")
    processes = trouble.start(out, data=data)
    with contextlib.suppress(UndisturbedError):
        trouble.sometime(processes, out)
    with immutable(data):
        expect(ended(processes) == [0], f"it fails: {trouble.end()}")
        if trouble.rng.random() < 0.5:  # whose counts are kept beside the data otherwise
            counted = ended(trouble.start(trouble.out(), "--rare-classes", data=data))
            expect(counted == [0], f"with --rare-classes it fails: {trouble.end()}")
    trouble.goes_on(out)


def out_turns_read_only(trouble: Trouble) -> None:
    out = trouble.out()
    processes = trouble.start(out)
    wait_for_step(out, processes, 1)
    with immutable(out):
        ends_with_an_error(trouble, processes, out, "Operation not permitted; make its folder writable")
    trouble.goes_on(out)


@contextlib.contextmanager
def immutable(folder: Path) -> Iterator[None]:
    """A folder that root, who may write where permissions forbid it, cannot write to either."""
    tool("chattr", "-R", "+i", folder)
    try:
        yield
    finally:
        tool("chattr", "-R", "-i", folder)


def disk_full(trouble: Trouble) -> None:
    disk = Path(tempfile.mkdtemp(prefix="disk-", dir=trouble.root))
    tool("mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk)
    try:
        out = disk / "run"
        processes = trouble.start(out)
        with contextlib.suppress(UndisturbedError):
            trouble.sometime(processes, out)
        with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        try:
            ends_with_an_error(trouble, processes, out, "No space left on device", "free some space")
        finally:
            (disk / "others").unlink()
        trouble.goes_on(out)
    finally:
        tool("umount", disk)


class UntriedError(Exception):
    """This machine does not permit it."""


def tool(*command: object) -> None:
    if subprocess.run(list(map(str, command)), capture_output=True, check=False).returncode:
        raise UntriedError


def clock_jumps(trouble: Trouble) -> None:
    """By a day, back and forth, at every look."""
    out = trouble.out()
    expect(ended(trouble.start(out, workers=1, run=by_an_odd_clock)) == [0], f"it fails: {trouble.end()}")
    odd = [line for line in log_of(out) if not (0 < line["it_per_s"] < 1e6 and 0 <= line["data_wait"] <= 1)]
    expect(not odd, f"the log has {odd[:1]}")
    left = [
        float(line.split()[-2]) for line in trouble.printed().splitlines() if line.endswith(" s") and " left " in line
    ]
    expect(len(left) == STEPS and min(left) >= 0 and max(left) < 3600, f"it says that {left} seconds are left")
    trouble.goes_on(out)


def by_an_odd_clock(begun: Callable[[], object], options: list[str], printed: Path) -> None:
    real, looks = time.time_ns, Counter[str]()

    def odd() -> int:
        looks["all"] += 1
        return real() + (-1) ** looks["all"] * 86_400 * 10**9

    def odd_seconds() -> float:
        return odd() / 1e9

    with mock.patch.object(time, "time_ns", odd), mock.patch.object(time, "time", odd_seconds):
        trained(begun, options, printed)


def two_in_one_folder(trouble: Trouble) -> None:
    out = trouble.out()
    first = trouble.start(out)
    trouble.sometime(first, out)
    os.kill(first[0].pid or 0, signal.SIGSTOP)
    try:
        if not (out / ".lock.holder").exists():
            raise UndisturbedError
        expect(ended(trouble.start(out)) == [1], "the second run is not refused")
        trouble.printed("error: ", f"is in use by process {first[0].pid} on ")
    finally:
        os.kill(first[0].pid or 0, signal.SIGCONT)
        codes = ended(first)
    expect(codes == [0], f"the first run ends with {codes}")
    trouble.goes_on(out)


def by_signals() -> dict[str, Callable[[Trouble], None]]:
    """Both signals, to one process and to one or all of two."""

    def case(number: int, **how: Any) -> Callable[[Trouble], None]:
        return lambda trouble: signalled(trouble, number, **how)

    return {
        f"{signal.Signals(number).name} {to}": case(number, **how)
        for number in (signal.SIGTERM, signal.SIGINT)
        for to, how in {
            "to one process": {"workers": 2},
            "to both of two ranks": {"ranks": 2, "to": (0, 1)},
            "to the first of two ranks": {"ranks": 2, "to": (0,)},
            "to the second of two ranks": {"ranks": 2, "to": (1,)},
        }.items()
    }


CASES: dict[str, Callable[[Trouble], None]] = {
    **by_signals(),
    "killed worker": worker_killed,
    "killed trainer, with workers": parent_killed,
    "killed rank of two": rank_killed,
    "data that vanishes": data_vanishes,
    "data that turns read-only": data_turns_read_only,
    "output that turns read-only": out_turns_read_only,
    "full disk": disk_full,
    "clock that jumps": clock_jumps,
    "two runs in one folder": two_in_one_folder,
}


def run(profile: str) -> dict[str, Any]:
    """Each case a number of times, or CROSSMIX_TRIES."""
    import dacs_gta5  # noqa: F401 - here, so that no process has to load it

    torch.set_num_threads(1)
    tries = int(os.environ.get("CROSSMIX_TRIES", TRIES[profile]))
    tried: Counter[str] = Counter()
    untried: set[str] = set()
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        trouble = Trouble(Path(root))
        for name, case in CASES.items():
            for _ in range(5 * tries):
                if tried[name] == tries or name in untried:
                    break
                try:
                    case(trouble)
                    tried[name] += 1
                except UndisturbedError:
                    pass
                except UntriedError:
                    untried.add(name)
                except WrongError as error:
                    tried[name] += 1
                    wrong.setdefault(name, f"{error}, try {tried[name]}"[:500])
                trouble.printed()
                for process in list(FORKED):
                    gone(process)
                for folder in trouble.root.glob("run-*"):
                    shutil.rmtree(folder, ignore_errors=True)
            else:
                if tried[name] < tries:
                    wrong.setdefault(name, "nothing could be done to so short a run")
    signals = sum(tried[name] for name in by_signals())
    others = {name: tried[name] for name in CASES if name not in by_signals() and name not in untried}
    return {
        "signals": signals, "seconds of the slowest stop": round(trouble.slowest_stop, 1), **others,
        **({"not possible here": ", ".join(sorted(untried))} if untried else {}), "wrong": wrong,
    }  # fmt: skip
