"""Checks of numeric arguments of data sets."""

import operator

__all__ = ["check_count", "check_index", "check_size"]


def check_count(name: str, value: int, *, least: int = 0) -> int:
    """Refuse anything but an integer of at least `least`; return it as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__} {value!r}; pass an integer.")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"`{name}` must {f'be at least {least}' if least else 'not be negative'}, got {number}.")
    return number


def check_size(size: object, *, least: int = 1) -> tuple[int, int] | None:
    """Refuse anything but None or (height, width), integers of at least `least`."""
    if size is None:
        return None
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"`size` must be (height, width) in pixels, got {size!r}; pass a pair of ints.")
    if any(isinstance(side, bool) or not hasattr(side, "__index__") for side in size):
        raise TypeError(f"`size` must be (height, width) in whole pixels, got {tuple(size)}; pass a pair of ints.")
    height, width = map(operator.index, size)
    if min(height, width) < least:
        raise ValueError(f"`size` must be (height, width) of at least {least} pixels, got {(height, width)}.")
    return height, width


def check_index(index: int, length: int) -> int:
    """Return a non-negative index.

    Raises:
        IndexError: If it is out of range, which also ends plain iteration.
        TypeError: If it is not an integer, e.g. a slice.
    """
    if not hasattr(index, "__index__"):
        raise TypeError(
            f"a data set is indexed by an int, got {type(index).__name__}; select several samples with "
            "torch.utils.data.Subset."
        )
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for {length} samples")
    return position % length
