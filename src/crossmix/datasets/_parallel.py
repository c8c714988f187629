"""Work over many files in processes, with a progress bar."""

from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import TypeVar

from crossmix._progress import shown

__all__ = ["each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Sequence[Item], title: str, *, workers: int = 0
) -> Iterator[tuple[Item, Result]]:
    """Apply a function to every item, in order, and show how far it is on stderr.

    A bar on a terminal where tqdm is installed; otherwise a line for every tenth.
    """
    if workers:
        with get_context("spawn").Pool(min(workers, len(items)) or 1) as pool:  # decoders hold the interpreter's lock
            yield from zip(items, shown(pool.imap(work, items, chunksize=8), len(items), title, "file"), strict=True)
    else:
        yield from zip(items, shown(map(work, items), len(items), title, "file"), strict=True)
