"""Checks on the numbers that data sets are given."""

import operator

__all__ = ["check_count", "check_index", "check_size"]


def check_count(name: str, value: int, *, least: int = 0) -> int:
    """Refuse anything but a whole number of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__} {value!r}; pass a whole number.")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"`{name}` must {f'be at least {least}' if least else 'not be negative'}, got {number}.")
    return number


def check_size(size: object, *, least: int = 1) -> tuple[int, int] | None:
    """Refuse anything but None or (height, width), whole numbers of at least `least`."""
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
    """An index counted from the front.

    Raises:
        IndexError: If it is out of range, so that plain iteration ends.
        TypeError: If it is no whole number, such as a slice.
    """
    if not hasattr(index, "__index__"):
        raise TypeError(
            f"a data set is indexed by an int, got {type(index).__name__}; take several samples by "
            "torch.utils.data.Subset."
        )
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for {length} samples")
    return position % length
