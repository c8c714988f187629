"""Worker processes that ignore signals meant for their parent, and exit when it does."""

import _thread
import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.pool import Pool
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

Sample_co = TypeVar("Sample_co", covariant=True)
SIGNALS = {signal.SIGTERM, signal.SIGINT}
TELLS_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


def quiet_worker(_worker: int = 0) -> None:
    """Make a worker ignore SIGTERM and Ctrl-C, and exit once its parent process is gone.

    Otherwise a signal to the whole process group (from SLURM, systemd, a container, or Ctrl-C in a terminal) ends the
    workers before their parent can finish its step. Use it as `worker_init_fn` of data loaders and as `initializer` of
    pools, which then end by `close` and `join`; outside a worker it does nothing. SIGTERM sent by the parent itself
    still ends the worker. On macOS and Windows, where the sender of a signal is unknown, every SIGTERM does.
    `QuietLoader` also covers the seconds during which a worker is still starting.

    Args:
        _worker: The worker's number, unused.

    Example:
        >>> loader = DataLoader(range(2), num_workers=1, worker_init_fn=quiet_worker)
        >>> [int(number) for number in loader]
        [0, 1]
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, _leave)
    if TELLS_SENDER:
        signal.signal(signal.SIGTERM, _leave)  # for signals delivered to a library's thread, which does not block them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


class QuietLoader(DataLoader[Sample_co]):
    """A `DataLoader` whose workers ignore SIGTERM and Ctrl-C from the moment they start.

    Workers call `quiet_worker` unless you pass a `worker_init_fn`, which should then call it. If a worker dies, for
    example for lack of memory, the next batch raises a RuntimeError within seconds. (A plain DataLoader raises it from
    a SIGCHLD handler, which can interrupt a step or a save.) Everything else is as in DataLoader.

    Example:
        >>> [int(batch.sum()) for batch in QuietLoader(range(4), batch_size=2, num_workers=1)]
        [1, 5]
    """

    def __iter__(self) -> _BaseDataLoaderIter:
        """Start the workers, with SIGTERM and SIGINT blocked meanwhile."""
        with torch.device("cpu"):  # where the generator draws their seeds, whatever the default device
            return self._start()

    def _start(self) -> _BaseDataLoaderIter:
        if self.num_workers == 0:
            return super().__iter__()
        if self.worker_init_fn is None:
            self.worker_init_fn = quiet_worker
        number = getattr(signal, "SIGCHLD", signal.SIGTERM)  # Windows has no SIGCHLD and needs none
        before = signal.getsignal(number)
        with started_quietly(self.multiprocessing_context):
            batches = super().__iter__()
        if before is not None and signal.getsignal(number) is not before:  # torch set it, so this is the main thread
            signal.signal(number, before)
        return batches


@contextlib.contextmanager
def started_quietly(context: BaseContext | None = None) -> Iterator[set[BaseProcess]]:
    """Block SIGTERM and SIGINT while starting processes, which inherit the signal mask; yields them, known at the end.

    In the new processes both stay blocked until `quiet_worker` handles them. Processes of a fork server that was
    started earlier do not inherit the mask.
    """
    processes: set[BaseProcess] = set()
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield processes
        return
    older = multiprocessing.active_children()
    if (context or multiprocessing).get_start_method() != "fork":
        resource_tracker.ensure_running()  # started inside the block, it would unblock both signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield processes
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        processes.update(set(multiprocessing.active_children()) - set(older))
        _started.update(processes)


def terminate(pool: Pool, processes: set[BaseProcess]) -> None:
    """Terminate a pool of quiet workers, also one that is still starting and has a signal to the group pending."""
    again = threading.Timer(0.5, _end, (processes,))
    again.daemon = True
    again.start()
    pool.terminate()
    pool.join()
    again.cancel()


_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):  # pragma: no branch - Windows has none, and no forks
    os.register_at_fork(after_in_child=_started.clear)


@atexit.register
def _end_all() -> None:
    _end(set(_started))


def _end(processes: set[BaseProcess]) -> None:
    """Terminate workers, repeatedly: a SIGTERM sent while one is pending is lost, and joining would hang."""
    for process in processes:
        for _ in range(50):
            if not process.is_alive():
                break
            process.terminate()
            process.join(0.1)
        else:
            process.kill()


_orphaned = threading.Event()


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Ignore a signal, or exit with the usual cleanup if the parent process is gone."""
    if _orphaned.is_set():
        raise SystemExit(1)


def _watch(parent: BaseProcess) -> None:
    """Exit when the parent sends SIGTERM or is gone.

    Two tests for a dead parent, since neither suffices: `is_alive` reads a pipe that forked siblings keep open, and the
    parent process id does not change below a fork server.
    """
    starter = os.getppid()
    while parent.is_alive() and os.getppid() == starter:
        if not TELLS_SENDER:
            time.sleep(0.5)
            continue
        told = signal.sigtimedwait(SIGNALS, 0.5)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == parent.pid:
            os._exit(0)
    _orphaned.set()
    _thread.interrupt_main(signal.SIGTERM if TELLS_SENDER else signal.SIGINT)  # the main thread then calls `_leave`
    time.sleep(2)
    os._exit(1)  # in case the main thread hangs or is busy
