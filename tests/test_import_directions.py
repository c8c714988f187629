"""Which room may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "crossmix"
LEAVES = {"mixing", "augment", "teacher", "losses", "alignment"}

# Room (a module file or a folder): the rooms of crossmix that it may import.
ALLOWED: dict[str, set[str]] = {
    "_checks": set(),
    "_color": set(),  # the pixel operations of `augment`, and of no other room
    "_distributed": set(),
    "_files": set(),
    "_workers": set(),
    "_tensors": set(),
    "_cross_entropy": {"_tensors"},
    **{leaf: {"_checks", "_distributed", "_tensors"} for leaf in LEAVES},
    "augment": {"_checks", "_color", "_distributed", "_tensors"},
    "losses": {"_checks", "_distributed", "_tensors", "_cross_entropy"},
    "metrics": {"_checks", "_distributed", "_tensors"},
    "self_training": {"_checks", "_tensors", *LEAVES},
    "recipes": {"_checks", "self_training", *LEAVES},
    "functional": LEAVES,
    "models": {"_checks", "_files", "_tensors"},
    "datasets": {"_checks", "_files", "_tensors", "_workers"},
    "optim": set(),
    "engine": {"_files", "_workers"},
    "evaluation": {"_checks", "_distributed", "_tensors", "_workers", "metrics", "datasets.classes"},
    "diagnostics": {"_checks", "_distributed", "_tensors", "metrics", "datasets.classes"},
    "visualize": {"_checks", "_tensors", "metrics", "datasets.classes"},
    "__init__": {"functional", "recipes", "self_training", *LEAVES},
}
PUBLIC_ROOMS = {
    "functional",
    "recipes",
    "models",
    "datasets",
    "metrics",
    "evaluation",
    "diagnostics",
    "optim",
    "visualize",
    "engine",
    "",
}


def imports(path: Path) -> set[str]:
    """What a file imports of crossmix, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"crossmix.{alias.name}" for alias in node.names} if module == "crossmix" else {module}
    return {name.removeprefix("crossmix").removeprefix(".") for name in found if name.split(".")[0] == "crossmix"}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package(path: Path) -> None:
    here = room(path)
    for name in imports(path):
        inside = name.split(".")[0] == here
        allowed = name.split(".")[0] in ALLOWED[here] or name in ALLOWED[here]
        assert inside or allowed, f"{path.name} imports {name}"


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "docs"])
def test_outside__uses_public_names_only(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert not any(part.startswith("_") for part in parts), f"{path}: {name}"
            assert parts[0] in PUBLIC_ROOMS or parts[0][0].isupper(), f"{path}: {name}"


def test_rooms__every_one_is_in_the_table() -> None:
    assert {room(path) for path in PACKAGE.rglob("*.py")} == set(ALLOWED)
