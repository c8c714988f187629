"""Which room may import which, and what the package may import of others."""

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "crossmix"
LEAVES = {"mixing", "augment", "masking", "teacher", "losses", "alignment"}

# Room (a module file or a folder): the rooms of crossmix that it may import.
ALLOWED: dict[str, set[str]] = {
    "_averaging": set(),
    "_checks": set(),
    "_class_codes": set(),  # the forms of a label map in `mixing`, and of no other room
    "_class_weights": {"_checks"},  # of `mixing` and `losses`
    "_color": set(),  # the pixel operations of `augment`, and of no other room
    "_compiled": set(),  # forms of `mixing` and `augment` for the compiler
    "_distributed": set(),
    "_files": set(),
    "_workers": set(),
    "_keyed": set(),
    "_progress": set(),
    "_tensors": set(),
    "_wrappers": set(),
    "_cross_entropy": {"_tensors"},
    "_network_state": {"_averaging", "_wrappers"},
    "_network_copy": {"_averaging", "_network_state", "_wrappers"},  # of `teacher`, and of no other room
    "_soft_labels": {"_tensors"},
    **{leaf: {"_checks", "_distributed", "_tensors"} for leaf in LEAVES},
    "augment": {"_checks", "_color", "_compiled", "_distributed", "_tensors"},
    "masking": {"_checks", "_tensors"},
    "mixing": {"_checks", "_class_codes", "_class_weights", "_compiled", "_tensors"},
    "losses": {"_checks", "_class_weights", "_cross_entropy", "_distributed", "_soft_labels", "_tensors"},
    "teacher": {"_averaging", "_checks", "_network_copy", "_network_state", "_norms", "_tensors", "_wrappers"},
    "metrics": {"_checks", "_distributed", "_tensors"},
    "_norms": {"_wrappers"},
    "_parts": {"_checks", "_tensors", "augment", "losses", "masking", "mixing"},  # of `self_training` alone
    "self_training": {"_checks", "_norms", "_parts", "_tensors", *LEAVES},
    "recipes": {"_checks", "self_training", *LEAVES},
    "functional": LEAVES,
    "models": {"_checks", "_files", "_tensors", "_wrappers"},
    "datasets": {"_checks", "_files", "_keyed", "_progress", "_tensors", "_workers"},
    "optim": {"_checks", "_wrappers"},
    "engine": {"_checks", "_files", "_keyed", "_workers", "datasets.sample", "datasets.sampling"},
    "evaluation": {
        "_checks",
        "_distributed",
        "_progress",
        "_tensors",
        "_workers",
        "_wrappers",
        "metrics",
        "datasets.classes",
    },
    "diagnostics": {"_checks", "_distributed", "_tensors", "metrics", "datasets.classes"},
    "visualize": {"_checks", "_tensors", "metrics", "datasets.classes"},
    "integrations": {"_checks", "_tensors", "metrics"},
    "__init__": {"functional", "recipes", "self_training", *LEAVES},
}
PUBLIC_ROOMS = {
    "functional", "recipes", "models", "datasets", "metrics", "evaluation", "diagnostics", "optim", "visualize",
    "engine", "integrations", "",
}  # fmt: skip


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """What a file imports of crossmix, without the package's name."""
    found = set()
    for node in parsed(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"crossmix.{alias.name}" for alias in node.names} if module == "crossmix" else {module}
    return {name.removeprefix("crossmix").removeprefix(".") for name in found if name.split(".")[0] == "crossmix"}


def modules(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in it."""
    names = {alias.name for node in parsed(path) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in parsed(path) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


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
    assert not any(isinstance(node, ast.Assert) for node in parsed(path)), "python -O would leave a check out"


@pytest.mark.parametrize("folder", ["examples", "benchmarks", "docs"])
def test_outside__uses_public_names_only(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert not any(part.startswith("_") for part in parts), f"{path}: {name}"
            assert parts[0] in PUBLIC_ROOMS or parts[0][0].isupper(), f"{path}: {name}"


def test_tests__import_no_other_test_file() -> None:
    """What tests share is in conftest.py, oracles.py, checks.py and runs.py."""
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"conftest"}
    for path in (ROOT / "tests").rglob("*.py"):
        assert not modules(path) & (files | {"tests"}), path


def test_rooms__every_one_is_in_the_table() -> None:
    assert {room(path) for path in PACKAGE.rglob("*.py")} == set(ALLOWED)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> tuple[set[str], set[str]]:
    """The distributions that pyproject.toml names: those that are always there, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}

    extras = [names(requirements) for requirements in project["optional-dependencies"].values()]
    return names(project["dependencies"]), set().union(*extras) - {"crossmix"}


def test_dependencies__what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    core, extras = declared()
    distributions = packages_distributions()
    ours = sys.stdlib_module_names | {"crossmix"}
    imported = {module: path.name for path in PACKAGE.rglob("*.py") for module in modules(path) - ours}
    used = {normal(distributions.get(module, [module])[0]): f"{module} in {name}" for module, name in imported.items()}
    assert not used.keys() - core - extras, {used[name] for name in used.keys() - core - extras}
    assert core <= used.keys(), f"declared and never imported: {core - used.keys()}"


# What `import crossmix` brings in; then all modules. Neither may touch global state or warn.
IMPORT = """
import importlib, json, logging, os, random, sys, warnings
import numpy, torch
absent, names = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(absent))
warnings.simplefilter("error")
def state():
    return (torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(), torch.get_default_dtype(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), dict(os.environ),
            list(logging.getLogger().handlers), logging.getLogger().level, list(warnings.filters),
            torch.is_grad_enabled())
before, modules = state(), set(sys.modules)
import crossmix
print(*(set(sys.modules) - modules))
for name in names: importlib.import_module(name)
assert state() == before
"""


def test_import__without_the_extras_touches_no_global_state_warns_of_nothing_and_brings_in_little() -> None:
    """As after a plain `pip install crossmix`: what belongs to an extra alone cannot be imported."""
    core, extras = declared()
    distributions = packages_distributions().items()
    absent = [module for module, names in distributions if {normal(name) for name in names} <= extras - core]
    paths = [path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py")]
    left_out = {"__main__", *extras}  # an adapter is named after what it is for
    every = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.stem not in left_out]
    command = [sys.executable, "-c", IMPORT, json.dumps([absent, every])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outside = {name.split(".")[0] for name in result.stdout.split()} - {"crossmix", "torch"}
    assert not outside - sys.stdlib_module_names, outside
