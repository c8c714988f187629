"""Workers under signals, with real processes: to one and to the group, at their start and later, forked and spawned."""

import _thread
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.utils.data._utils import signal_handling

from crossmix import _workers
from crossmix.engine import QuietLoader, quiet_worker
from runs import wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs process groups")
METHODS = ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))]

# A data set in a file of its own, so that spawned workers can import it: that takes a while, as it does in earnest.
DATA = """
    import os, sys, time
    if os.environ.get("SLOW") and "trainer" not in sys.argv:
        time.sleep(float(os.environ["SLOW"]))

    class Data:
        def __init__(self, folder, seconds=0.0):
            self.folder, self.seconds = folder, seconds
        def __len__(self):
            return 24
        def __getitem__(self, index):
            open(f"{self.folder}/pid-{os.getpid()}", "w").close()
            time.sleep(self.seconds)
            return index
"""

TRAINER = """
    import sys
    from data import Data
    from crossmix.engine import QuietLoader, StopRequest

    if __name__ == "__main__":
        _, _, method, folder = sys.argv
        stop = StopRequest().__enter__()
        print("ready", flush=True)
        loader = QuietLoader(Data(folder, 0.05), batch_size=2, num_workers=2, multiprocessing_context=method)
        seen = []
        for batch in loader:
            seen += batch.tolist()
            print("batch", flush=True)
        print(seen == list(range(24)), stop.agreed(), flush=True)
        sys.stdin.read()  # signals go on meanwhile
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script, in a process group of its own."""
    processes = []
    (tmp_path / "data.py").write_text(textwrap.dedent(DATA))

    def run(script: str, *arguments: str, slow: str = "") -> subprocess.Popen[str]:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(script))
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, str(path), "trainer", *arguments, str(tmp_path)]
        environment = {**os.environ, "SLOW": slow}
        processes.append(subprocess.Popen(command, **pipes, text=True, start_new_session=True, env=environment))
        return processes[-1]

    yield run
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("moment", "number"), [("start", signal.SIGTERM), ("later", signal.SIGINT)])
def test_loader__a_signal_to_the_group_ends_no_worker(
    start: Callable[..., subprocess.Popen[str]], method: str, number: signal.Signals, moment: str, tmp_path: Path
) -> None:
    process = start(TRAINER, method, slow="1" if moment == "start" else "")
    wait_for(process, "ready")
    if moment == "later":
        wait_for(process, "batch")
        for worker in workers(tmp_path):
            os.kill(worker, number)  # to each alone, too
    os.killpg(process.pid, number)
    for _ in range(10):  # also while they are being started; a second Ctrl-C would end the parent
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=120)
    assert output.split()[-2:] == ["True", "True"], errors
    assert process.returncode == 0, errors
    assert not re.sub(r".*resource_tracker.*\n +warnings\.warn.*\n", "", errors)  # of semaphores that went just before
    wait_until(lambda: not any(map(running, workers(tmp_path))))


LEFT_OVER = """
    import sys
    from data import Data
    from crossmix.engine import QuietLoader
    if __name__ == "__main__":
        _, _, method, folder = sys.argv
        batches = iter(QuietLoader(Data(folder), num_workers=1, multiprocessing_context=method))
        print(next(batches).item(), flush=True)
        if method == "fork":  # a worker that does not come back, which torch and multiprocessing then terminate
            again = iter(QuietLoader(Data(folder, 600.0), num_workers=1, multiprocessing_context=method))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_loader__one_that_is_not_finished_does_not_keep_its_process_from_ending(
    start: Callable[..., subprocess.Popen[str]], method: str, tmp_path: Path
) -> None:
    process = start(LEFT_OVER, method)
    output, errors = process.communicate(timeout=120)
    assert (output, errors, process.returncode) == ("0\n", "", 0)
    wait_until(lambda: not any(map(running, workers(tmp_path))))


POOL = """
    import multiprocessing, os, signal, sys, time
    from data import Data
    from crossmix._workers import QuietLoader, quiet_worker, started_quietly, terminate
    if __name__ == "__main__":
        _, _, method, folder = sys.argv
        heard = []
        signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
        context = multiprocessing.get_context(method)
        with started_quietly(context) as processes:
            os.kill(os.getpid(), signal.SIGTERM)  # a thread of a library may take it at once
            pool = context.Pool(2, initializer=quiet_worker)
        print(heard, flush=True)
        print(pool.map(abs, range(-8, 0), chunksize=1) == list(range(8, 0, -1)), flush=True)
        time.sleep(0.5)
        print(pool.map(abs, range(-8, 0), chunksize=1) == list(range(8, 0, -1)), flush=True)
        terminate(pool, processes)  # one worker may still be starting, with a signal to the group pending
        next(iter(QuietLoader(Data(folder, 600.0), num_workers=2, multiprocessing_context=method)))
"""


@pytest.mark.parametrize("method", METHODS)
def test_workers__go_on_through_a_signal_and_end_with_their_parent(
    start: Callable[..., subprocess.Popen[str]], method: str, tmp_path: Path
) -> None:
    process = start(POOL, method)
    wait_for(process, "[1]")  # this process has heard the signal when the workers have been started
    for _ in range(4):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    for _ in range(2):
        wait_for(process, "True")
    wait_until(lambda: len(workers(tmp_path)) == 2)  # which are busy
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(running, workers(tmp_path))))


def test_quiet_worker__outside_a_worker_changes_nothing() -> None:
    def state() -> tuple[object, ...]:
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        return handlers, threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, [])

    before = state()
    quiet_worker(0)
    assert state() == before


class Stubborn:
    """A process that dies at the given SIGTERM, or only by SIGKILL."""

    pid = 4321

    def __init__(self, dies_at: int = 1000) -> None:
        self.dies_at, self.asked = dies_at, 0
        self.killed = False

    def is_alive(self) -> bool:
        return self.asked < self.dies_at and not self.killed

    def terminate(self) -> None:
        self.asked += 1

    def join(self, _seconds: float) -> None:
        pass

    def kill(self) -> None:
        self.killed = True


def test_end__asks_again_and_kills_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    soon, never = Stubborn(dies_at=3), Stubborn()
    monkeypatch.setattr(_workers, "_started", {soon, never})
    _workers._end_all()
    assert (soon.asked, soon.killed) == (3, False)
    assert (never.asked, never.killed) == (50, True)


class Exited(BaseException):
    pass


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the sender of a signal is unknown")
@pytest.mark.parametrize(
    ("told", "end"),
    [
        ([(signal.SIGTERM, 1), (signal.SIGINT, Stubborn.pid), None, (signal.SIGTERM, Stubborn.pid)], (0, False)),
        ([None, "orphaned"], (1, True)),
    ],
    ids=["a signal of the parent alone", "the parent is gone"],
)
def test_watch__ends_a_worker_with(told: list[object], end: tuple[int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    parent, asked, ended = Stubborn(), [], []

    def next_signal(_signals: object, _seconds: float) -> types.SimpleNamespace | None:
        one = told.pop(0)
        if one == "orphaned":
            parent.killed, one = True, None
        return one and types.SimpleNamespace(si_signo=one[0], si_pid=one[1])

    def leave(code: int) -> None:
        ended.append((code, _workers._orphaned.is_set()))
        raise Exited

    monkeypatch.setattr(_workers, "_orphaned", threading.Event())
    monkeypatch.setattr(signal, "sigtimedwait", next_signal)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(_thread, "interrupt_main", asked.append)
    _workers._leave(signal.SIGTERM, None)  # ignored while there is a parent
    with pytest.raises(Exited):
        _workers._watch(parent)  # type: ignore[arg-type]
    assert (ended, told) == ([end], [])
    assert asked == [signal.SIGTERM] * end[1]  # the main thread gets the chance to clean up
    if end[1]:
        with pytest.raises(SystemExit):
            _workers._leave(signal.SIGTERM, None)


def test_watch__where_no_sender_is_known_ends_a_worker_without_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, asked, slept = Stubborn(dies_at=2), [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        parent.asked += 1

    def leave(code: int) -> None:
        raise Exited(code)

    for where, name, value in (
        (_workers, "_orphaned", threading.Event()), (_workers, "TELLS_SENDER", False), (os, "_exit", leave),
        (time, "sleep", sleep), (_thread, "interrupt_main", asked.append),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, value)
    with pytest.raises(Exited, match="1"):
        _workers._watch(parent)  # type: ignore[arg-type]
    assert asked == [signal.SIGINT]
    assert slept == [0.5, 0.5, 2]


@pytest.mark.parametrize("tells", [True, False])
def test_quiet_worker__in_a_worker_handles_signals_and_watches(tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    handled, masked, watched, parent = {}, [], [], Stubborn()
    for where, name, value in (
        (_workers, "TELLS_SENDER", tells),
        (_workers, "_watch", watched.append),
        (multiprocessing, "parent_process", lambda: parent),
        (signal, "signal", handled.__setitem__),
        (signal, "pthread_sigmask", lambda *call: masked.append(call)),
    ):
        monkeypatch.setattr(where, name, value)
    before = {*threading.enumerate()}
    quiet_worker(0)
    for thread in {*threading.enumerate()} - before:
        thread.join()
    assert set(handled.values()) == {_workers._leave}
    assert set(handled) == ({signal.SIGINT, signal.SIGTERM} if tells else {signal.SIGINT})
    assert masked == [(signal.SIG_BLOCK, _workers.SIGNALS)] * tells
    assert watched == [parent]


def test_loader__keeps_an_own_initializer(tmp_path: Path) -> None:
    def own(number: int) -> None:
        (tmp_path / f"started-{number}").touch()

    loader = QuietLoader(range(2), num_workers=1, worker_init_fn=own, multiprocessing_context="fork")
    assert [int(number) for number in loader] == [0, 1]
    assert (tmp_path / "started-0").exists()


def test_started_quietly__blocks_signals_where_they_can_be_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers: list[bool] = []
    monkeypatch.setattr(_workers.resource_tracker, "ensure_running", lambda: trackers.append(True))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for method in ("fork", "spawn"):
        with _workers.started_quietly(multiprocessing.get_context(method)) as processes:
            assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before | {signal.SIGTERM, signal.SIGINT}
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
        assert processes == set()
    assert trackers == [True]  # for spawn: a tracker that starts within the block unblocks them
    monkeypatch.delattr(signal, "pthread_sigmask")
    with _workers.started_quietly() as processes:
        assert processes == set()


EACH = """
    import signal, time
    from crossmix.datasets._parallel import each

    def slow(i):
        time.sleep(0.2)
        return i

    if __name__ == "__main__":
        stopped, results = [], []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        for _, result in each(slow, list(range(24)), "slow", workers=2):
            results.append(result)
            print("begun", flush=True)
        print(results == list(range(24)), stopped)
"""


@pytest.mark.slow
def test_each__workers_of_a_pool_leave_signals_to_their_parent(start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(EACH)
    wait_for(process, "begun")
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert printed.splitlines()[-1] == "True [1]"


# Ends while its loader is alive, as one in a cycle is.
ENDING = """
    import os, signal, subprocess, sys
    from data import Data
    from crossmix.engine import QuietLoader

    if __name__ == "__main__":
        batches = iter(QuietLoader(Data(sys.argv[3]), num_workers=1, multiprocessing_context=sys.argv[2]))
        next(batches)
        worker = str(batches._workers[0].pid)
        os.kill(int(worker), signal.SIGSTOP)
        subprocess.run(["kill", "-TERM", worker])  # waits in the worker, as one from a launcher may
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {worker}"], stdout=subprocess.DEVNULL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS[:2])
def test_workers__a_lost_signal_from_their_parent_is_repeated(
    start: Callable[..., subprocess.Popen[str]], method: str
) -> None:
    process = start(ENDING, method)
    assert process.wait(60) == 0


class Slow(list[int]):
    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        time.sleep(0.05)
        return index


@pytest.mark.parametrize("method", METHODS[:2])
def test_workers__a_dead_one_is_told_by_the_next_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # torch's handler is set once in a process
    batches = iter(QuietLoader(Slow(range(24)), num_workers=1, multiprocessing_context=method))
    monkeypatch.setattr(type(batches)._try_get_data, "__defaults__", (0.2,))  # looks after the worker every 5 seconds
    next(batches)
    for worker in multiprocessing.active_children():
        worker.kill()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:  # a step, in which nothing may be raised
        sum(range(1000))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(batches)
