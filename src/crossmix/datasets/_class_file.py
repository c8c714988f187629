"""Read a user's class names and label mapping from a JSON file."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from crossmix.datasets._labels import Key, custom_format
from crossmix.datasets.classes import IGNORED
from crossmix.datasets.sample import DataError

FORMS = 'a list of names, an object from ids or colours to train ids, or {"classes": [names], "mapping": {...}}'


class Classes(NamedTuple):
    """The classes of a data set.

    Attributes:
        names: Class names in the order of train ids.
        mapping: From the ids or (R, G, B) colours in label maps to train ids, with 255 for ignored; None if the maps
            contain train ids.
    """

    names: tuple[str, ...]
    mapping: dict[int | tuple[int, int, int], int] | None


def read_classes(path: str | Path) -> Classes:
    """Read the classes of your own data from a JSON file.

    The file has one of three forms:

    - `["road", "car"]`, names: label maps contain train ids, here 0 and 1, and 255 for ignored pixels;
    - `{"7": 0, "26": 1, "0": 255}`, from ids to train ids, or from colours such as `"#804080"` or `"128, 64, 128"`;
    - `{"classes": ["road", "car"], "mapping": {"7": "road", "26": "car", "0": 255}}`, both, with train ids or names.

    Args:
        path: The file.

    Returns:
        Names and mapping, for `SegmentationFolder(..., mapping, num_classes=len(names))`.

    Raises:
        DataError: If the file cannot be read or has another form.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "classes.json"
        >>> path.write_text('{"classes": ["road", "car"], "mapping": {"#804080": "road", "0, 0, 142": "car"}}')
        80
        >>> read_classes(path)
        Classes(names=('road', 'car'), mapping={(128, 64, 128): 0, (0, 0, 142): 1})
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_repetition)
        classes = _parsed(content)
        if not 1 <= len(classes.names) <= IGNORED:
            raise ValueError(f"there must be 1 to {IGNORED} classes, got {len(classes.names)}")
        custom_format(classes.mapping, "raise", len(classes.names))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: is not a file of classes ({str(error).rstrip('.')}); expected {FORMS}.") from error
    return classes


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; Python would silently keep the last value of a repeated key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _parsed(content: object) -> Classes:
    if isinstance(content, list):
        return Classes(_names(content), None)
    if not isinstance(content, dict):
        raise TypeError(f"it holds {type(content).__name__}")
    if "classes" in content:
        if unknown := content.keys() - {"classes", "mapping"}:
            raise ValueError(f"it has {sorted(unknown)} beside classes and mapping")
        names = _names(content["classes"])
        return Classes(names, _mapping(content["mapping"], names) if "mapping" in content else None)
    mapping = _mapping(content, ())
    count = max((value for value in mapping.values() if value != IGNORED), default=-1) + 1
    return Classes(tuple(map(str, range(count))), mapping)


def _names(content: object) -> tuple[str, ...]:
    if not (isinstance(content, list) and all(isinstance(name, str) for name in content)):
        raise TypeError("names must be a list of texts")
    if len(set(content)) < len(content):
        raise ValueError("a name is there twice")
    return tuple(content)


def _mapping(content: object, names: tuple[str, ...]) -> dict[Key, int]:
    if not isinstance(content, Mapping):
        raise TypeError("a mapping must be an object from ids or colours to train ids")
    mapping = {_key(key): names.index(value) if value in names else value for key, value in content.items()}
    if len(mapping) < len(content):
        raise ValueError("an id or a colour is there twice")
    if wrong := [value for value in mapping.values() if isinstance(value, bool) or not isinstance(value, int)]:
        raise TypeError(f"{wrong[0]!r} is neither a train id nor a name")
    return mapping


def _key(text: str) -> Key:
    """'7' as an id; '#804080', '128, 64, 128' or '(128, 64, 128)' as a colour."""
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        red, green, blue = bytes.fromhex(text[1:])
        return red, green, blue
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if re.fullmatch(r"\s*\d+\s*", text):
        return numbers[0]
    if re.fullmatch(r"\s*[(\[]?\s*\d+\s*,\s*\d+\s*,\s*\d+\s*[)\]]?\s*", text):
        return numbers[0], numbers[1], numbers[2]
    raise ValueError(f"{text!r} is neither an id nor a colour")
