"""Find the part of a file that contains a network's weights, by names, allowing for prefixes and nesting."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from crossmix.models.weight_files import WeightsError, mappings

WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "Scale"}
"""Components of names that wrappers add (`Scale` is the multi-scale wrapper of the ImageNet file). They may also be
the network's own; its names decide."""
ENTRIES: dict[str | None, tuple[str, ...]] = {
    None: ("student", "model", "state_dict"),
    "student": ("student", "model"),
    "teacher": ("teacher", "ema_model"),
}
"""The keys under which an entry may be stored, in order of preference."""


class Place(NamedTuple):
    """A part of a file that may contain a network's weights."""

    path: tuple[str, ...]  # path to it: keys of mappings, then components of names
    keys: int  # how many of these are keys
    entry: int  # how many lead to the requested entry
    state: Mapping[str, Any]  # the mapping behind the keys
    matches: Mapping[str, list[str]]  # for each of the network's names, the matching names of `state`

    @property
    def name(self) -> str:
        """The path as an `entry`."""
        return ".".join(self.path)

    @property
    def prefix(self) -> str:
        """Prefix of the names of `state` in this part."""
        return "".join(f"{part}." for part in self.path[self.keys :])

    @property
    def scope(self) -> str:
        """Prefix of the names of `state` in the whole entry."""
        return "".join(f"{part}." for part in self.path[self.keys : self.entry])

    @property
    def is_guessed(self) -> bool:
        """Whether the path contains more than the entry and wrappers."""
        return not WRAPPERS.issuperset(self.path[self.entry :])


def find(contents: Mapping[str, Any], own: Mapping[str, Tensor], entry: str | None, path: Path) -> Place:
    """The part of a file that matches most of a network's names; among equals, the requested entry or the student."""
    everywhere = _places(contents, own)
    names = ENTRIES.get(entry, (entry or "",))
    ranked = []
    for place in everywhere:
        if entry in {None, "student"} and {"teacher", "ema_model"} & {*place.path}:
            continue
        rank, end = next(((i, end) for i, name in enumerate(names) if (end := _entry_end(place.path, name))), (None, 0))
        if rank is None and entry is None:
            rank = len(names) if place.path else -1  # any other part, or the whole file
        if rank is not None:
            ranked.append(((*_score(place, own), rank, end, len(place.path)), place._replace(entry=end)))
    ranked = [(key, place) for key, place in ranked if not place.is_guessed or 2 * len(place.matches) >= len(own)]
    if not ranked:
        return _without_match(contents, everywhere, own, entry, path)
    best, chosen = min(ranked, key=lambda pair: pair[0])
    rivals = _outermost([place for key, place in ranked if key[:-1] == best[:-1]])
    if len(rivals) > 1:
        listed = " or ".join(f"`entry={place.name!r}`" for place in rivals)
        raise WeightsError(f"{path}: {len(rivals)} parts of it match the model equally well; pass {listed}.")
    return chosen


def part_of(contents: Mapping[str, Any], own: Mapping[str, Tensor]) -> str:
    """The name of the largest part of a network all of whose tensors are in a file; empty if there is none."""
    starts = {name[: i + 1] for name in own for i, letter in enumerate(name) if letter == "."}
    for start in sorted(starts, key=len):
        part = {name.removeprefix(start): tensor for name, tensor in own.items() if name.startswith(start)}
        if 2 * len(part) >= len(own) and any(_score(place, part)[0] == -len(part) for place in _places(contents, part)):
            return start.removesuffix(".")
    return ""


def _places(contents: Mapping[str, Any], own: Iterable[str]) -> list[Place]:
    """All parts of a file that contain any of a network's names."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for name in own:
        parts = tuple(name.split("."))
        alike.setdefault(core(parts), []).append(parts)
    found = []
    for keys, state in mappings(contents):
        matches: dict[tuple[str, ...], dict[str, list[str]]] = {}
        for name in tensors(state):
            parts = tuple(name.split("."))
            for i in range(len(parts)):
                if same := _same(parts[i:], alike.get(core(parts[i:]), [])):
                    matches.setdefault(parts[:i], {}).setdefault(".".join(same), []).append(name)
        found += [Place(keys + prefix, len(keys), 0, state, names) for prefix, names in matches.items()]
    return found


def core(parts: Sequence[str]) -> tuple[str, ...]:
    """The components of a name that cannot come from a wrapper."""
    return tuple(part for part in parts if part not in WRAPPERS)


def _same(parts: Sequence[str], candidates: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    """Choose which of the network's names, equal up to wrapper components, matches a name of the file.

    It is the longest one contained in the file's name, so that the network's own component is not mistaken for a
    wrapper's. If none is contained, a single candidate still matches: then the network has one more wrapper.
    """
    contained = [own for own in candidates if _is_subsequence(own, parts)]
    return max(contained or (candidates if len(candidates) == 1 else []), key=len, default=None)


def _is_subsequence(some: Sequence[str], parts: Sequence[str]) -> bool:
    rest = iter(parts)
    return all(part in rest for part in some)  # `in` advances the iterator past the match


def _entry_end(path: tuple[str, ...], entry: str) -> int:
    """How many components of a path lead to an entry, at any depth and between wrappers; 0 if it is not in the path."""
    wanted = tuple(entry.split("."))
    spots = [i for i, part in enumerate(path) if part not in WRAPPERS or part in wanted]
    for i in range(len(spots) - len(wanted) + 1):
        run = spots[i : i + len(wanted)]
        if tuple(path[spot] for spot in run) == wanted:
            return run[-1] + 1
    return 0


def _score(place: Place, own: Mapping[str, Tensor]) -> tuple[int, int]:
    """How well a part matches, lower is better: minus the number of fitting tensors, then of matching names."""
    fitting = [name for name, names in place.matches.items() if fits(own[name], place.state[names[0]])]
    return -len(fitting), -len(place.matches)


def _outermost(places: Iterable[Place]) -> list[Place]:
    """The parts that are not inside another one."""
    found: list[Place] = []
    for place in sorted(places, key=lambda place: len(place.path)):
        if not any(place.path[: len(outer.path)] == outer.path for outer in found):
            found.append(place)
    return found


def _without_match(
    contents: Mapping[str, Any], everywhere: Sequence[Place], own: Mapping[str, Tensor], entry: str | None, path: Path
) -> Place:
    """The requested entry although nothing in it matches, for the report; or an error that names a matching part."""
    nested = list(mappings(contents))
    inside = [(keys, tuple(str(name).split(".")), state) for keys, state in nested for name in state]
    ends = (
        Place((keys + parts)[:end], min(end, len(keys)), end, state, {})
        for name in ENTRIES.get(entry, (entry or "",))
        for keys, parts, state in [*((keys, (), state) for keys, state in nested), *inside]
        if (end := _entry_end(keys + parts, name))
    )
    there = next(ends, None)
    best = min((_score(place, own) for place in everywhere), default=(0, 0))
    if 2 * -best[0] >= len(own):
        matching = _outermost([place for place in everywhere if _score(place, own) == best])
        listed = " or ".join(f"`entry={place.name!r}`" if place.path else "no `entry`" for place in matching)
        said = "nothing there matches the model" if there or entry is None else f"it has no entry {entry!r}"
        raise WeightsError(f"{path}: {said}, but {few(contents)}; pass {listed}, which matches the model.")
    if there is None and entry is not None:
        raise WeightsError(f"{path}: it has no entry {entry!r}, but {few(contents)}, and none matches the model.")
    return there or Place((), 0, 0, contents, {})


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state_dict, without extra state."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor) and not is_extra(name)}


def is_extra(name: object) -> bool:
    """Whether a name belongs to `get_extra_state`, such as the teacher's update count."""
    return not isinstance(name, str) or name.rpartition(".")[2] == "_extra_state"


def fits(own: Tensor, value: Tensor) -> bool:
    """Whether a value can be copied into a tensor of the network."""
    return own.shape == value.shape and own.is_floating_point() == value.is_floating_point()


def few(names: Iterable[object]) -> str:
    """The first three names, in parentheses, with the number of the others."""
    names = list(names)
    more = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"({', '.join(map(str, names[:3]))}{more})" if names else ""
