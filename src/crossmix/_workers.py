"""Worker processes that leave signals to the process they work for, and end with it."""

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
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

__all__ = ["QuietLoader", "quiet_worker", "started_quietly"]

Sample_co = TypeVar("Sample_co", covariant=True)
SIGNALS = {signal.SIGTERM, signal.SIGINT}
TELLS_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS and Windows


def quiet_worker(_worker: int = 0) -> None:
    """Leave SIGTERM and Ctrl-C to the parent process, and end when it is gone, however it went.

    A signal to a whole process group (SLURM, systemd, containers, Ctrl-C in a terminal) would otherwise end the workers
    before their parent can finish its step. A `worker_init_fn` for loaders and an `initializer` for pools, whatever
    their start method; outside a worker it does nothing. SIGTERM from the parent itself ends the worker, as before. On
    macOS and Windows, where a process cannot know who sent a signal, SIGTERM ends it always.

    `QuietLoader` is this and more: it has signals wait that come while a worker is starting, which can take seconds.

    Args:
        _worker: The worker's number, which makes no difference.

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
        signal.signal(signal.SIGTERM, _leave)  # where a library's thread takes it, which was there before this block
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


class QuietLoader(DataLoader[Sample_co]):
    """A `DataLoader` whose workers leave SIGTERM and Ctrl-C to this process from their first moment on.

    Without a `worker_init_fn` the workers call `quiet_worker`; one of your own calls it itself. When a worker dies, as
    for want of memory, the next batch raises a RuntimeError within seconds. (Torch has SIGCHLD raise it wherever this
    process is, in the midst of a step or of a save too; so it does here once a plain DataLoader has started workers.)
    Everything else is a DataLoader's.

    Example:
        >>> [int(batch.sum()) for batch in QuietLoader(range(4), batch_size=2, num_workers=1)]
        [1, 5]
    """

    def __iter__(self) -> _BaseDataLoaderIter:
        """Start the workers, with signals to this process waiting meanwhile."""
        if self.num_workers == 0:
            return super().__iter__()
        if self.worker_init_fn is None:
            self.worker_init_fn = quiet_worker
        number = getattr(signal, "SIGCHLD", signal.SIGTERM)  # there is none on Windows, and none is missed
        before = signal.getsignal(number)
        with started_quietly(self.multiprocessing_context):
            batches = super().__iter__()
        if before is not None and signal.getsignal(number) is not before:  # so this is the main thread
            signal.signal(number, before)
        return batches


@contextlib.contextmanager
def started_quietly(context: BaseContext | None = None) -> Iterator[None]:
    """Have SIGTERM and Ctrl-C wait until processes have been started, which inherit that.

    In those processes they wait on, for `quiet_worker` to drop them. A fork server that something else has started
    before is not reached.

    Args:
        context: Of multiprocessing, which starts the processes; None is its default one.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    older = multiprocessing.active_children()
    if (context or multiprocessing).get_start_method() != "fork":
        resource_tracker.ensure_running()  # which otherwise unblocks both, starting amid the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _started.update(set(multiprocessing.active_children()) - set(older))


_started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_started.clear)


@atexit.register
def _end_all() -> None:
    """Say it until it is heard: a SIGTERM that finds another one waiting is lost, and would be waited for, for ever."""
    for process in list(_started):
        for _ in range(50):
            if not process.is_alive():
                break
            process.terminate()
            process.join(0.1)
        else:
            process.kill()


_orphaned = threading.Event()


def _leave(_number: int, _frame: FrameType | None) -> None:
    """The parent has it too; without one this is the end, by way of what cleans up half-written files."""
    if _orphaned.is_set():
        raise SystemExit(1)


def _watch(parent: BaseProcess) -> None:
    """End this process when its parent says so, or is gone.

    That a parent is gone shows by a pipe, which younger workers keep open too if they were forked; and by this process
    being given to another, which does not show below a fork server.
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
    _thread.interrupt_main(signal.SIGTERM if TELLS_SENDER else signal.SIGINT)  # has the main thread call `_leave`
    time.sleep(2)
    os._exit(1)  # it may be waiting for ever, or busy
