"""Process many files in parallel, with progress."""

from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import TypeVar

from crossmix._progress import shown
from crossmix._workers import quiet_worker, started_quietly, terminate

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Sequence[Item], title: str, *, workers: int = 0
) -> Iterator[tuple[Item, Result]]:
    """Apply a function to every item, in order, and show progress on stderr (see `shown`)."""
    if workers:
        context = get_context("spawn")  # processes, since decoders hold the GIL
        with started_quietly(context) as processes:
            pool = context.Pool(min(workers, len(items)) or 1, initializer=quiet_worker)
        try:
            yield from zip(items, shown(pool.imap(work, items, chunksize=8), len(items), title, "file"), strict=True)
        finally:
            terminate(pool, processes)
    else:
        yield from zip(items, shown(map(work, items), len(items), title, "file"), strict=True)
