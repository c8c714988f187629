"""Checks of numeric arguments of data sets."""

import operator

from crossmix import _checks


def check_count(name: str, value: int, *, least: int = 0) -> int:
    """Refuse anything but an integer of at least `least`; return it as an int."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__} {value!r}; pass an integer.")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"`{name}` must {f'be at least {least}' if least else 'not be negative'}, got {number}.")
    return number


def check_size(size: object) -> tuple[int, int] | None:
    """Refuse anything but None or (height, width), positive integers."""
    return None if size is None else _checks.check_size("size", size)


def check_index(index: int, length: int) -> int:
    """Return a non-negative index. The IndexError of one out of range also ends plain iteration."""
    if not hasattr(index, "__index__"):
        kind = type(index).__name__
        raise TypeError(f"a data set is indexed by an int, got {kind}; select several with torch.utils.data.Subset.")
    position = operator.index(index)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for {length} samples")
    return position % length
