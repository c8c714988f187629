"""How far a loop is, on stderr."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

try:
    from tqdm import tqdm
except ImportError:  # the bar is an extra
    tqdm = None

__all__ = ["shown"]

Item = TypeVar("Item")


def shown(items: Iterable[Item], total: int | None, title: str, unit: str) -> Iterator[Item]:
    """Yield the items, and show how many were asked for of how many, where that is known.

    A bar on a terminal where tqdm is installed; otherwise a line for every tenth of a hundred or more, or for every
    hundred.
    """
    if tqdm is not None and sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=title, unit=unit)
        return
    every = 100 if total is None else total // 10 if total >= 100 else None
    for done, item in enumerate(items, 1):
        yield item
        if every is not None and done % every == 0:
            sys.stderr.write(f"{title}: {done}{'' if total is None else f' of {total}'}\n")
