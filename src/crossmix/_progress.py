"""Progress of a loop, shown on stderr."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from tqdm import tqdm
except ImportError:  # optional dependency
    tqdm = None

Item = TypeVar("Item")


def shown(items: Iterable[Item], total: int | None, title: str, unit: str) -> Iterator[Item]:
    """Yield the items and show progress.

    On a terminal with tqdm installed this is a bar. Otherwise a line is printed after every tenth of the items if there
    are at least 100, or after every 100 items if the total is unknown.
    """
    if tqdm is not None and sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, unit=unit)
        return
    every = 100 if total is None else total // 10 if total >= 100 else None
    for done, item in enumerate(items, 1):
        yield item
        if every is not None and done % every == 0:
            sys.stderr.write(f"{title}: {done}{'' if total is None else f' of {total}'}\n")
