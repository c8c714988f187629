"""Every code block of README and docs is executed; every shell line names files and flags that exist."""

import functools
import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from checks import needed
from crossmix.datasets import read_image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")] + [
    page for folder in ("docs", "docs/frameworks") for page in sorted((ROOT / folder).glob("*.md"))
]
NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.MULTILINE)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


SLOW = {"graphs.md", "rare_classes.md"}  # compile and train; what they show has tests of its own


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in SLOW))
        for page in PAGES
        if blocks(page, "python")
    ],
)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [name for line in NEEDS.findall(page.read_text(encoding="utf-8")) for name in line.split(", ")]
    for name in others:
        needed(name)
    monkeypatch.chdir(tmp_path)
    ours = [
        folder for folder in sys.path if Path(folder) != ROOT / "tests"
    ]  # transformers looks for a package `datasets`
    monkeypatch.setattr(sys, "path", ours)
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        if others:  # packages warn of what they find in each other
            warnings.simplefilter("ignore")
        for body in blocks(page, "python"):
            exec(compile(body, str(page), "exec"), names)  # noqa: S102 - our own pages
    for picture in tmp_path.glob("*.png"):  # the page shows what its code draws
        shown = page.parent / picture.name
        if shown.exists():
            assert (read_image(picture).int() - read_image(shown).int()).abs().max() <= 1, picture.name


def shell_lines() -> list[str]:
    bodies = [body.replace("\\\n", "") for page in PAGES for body in blocks(page, "bash")]
    return [line for body in bodies for line in body.splitlines() if line]


# In one process for all, since the imports take seconds.
HELP = """
import contextlib, io, json, runpy, sys
shown = []
for words in json.loads(sys.argv[1]):
    sys.argv, sys.path[0] = [words[-1], "--help"], "" if words[0] == "-m" else "examples"
    run = runpy.run_module if words[0] == "-m" else runpy.run_path
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            run(words[-1], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, words
    shown.append(printed.getvalue())
print(json.dumps(shown))
"""


@functools.cache
def flags() -> dict[tuple[str, ...], set[str]]:
    """The options that the help of each command names, whole."""
    every = sorted({command for line in shell_lines() for command, _ in commands(line)})
    helped = [sys.executable, "-c", HELP, json.dumps(every)]
    shown = json.loads(subprocess.run(helped, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    return {
        command: set(re.findall(r"(?<![\w-])--?\w[\w-]*", text)) for command, text in zip(every, shown, strict=True)
    }


def commands(line: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """What a shell line runs of ours, a script or a module, and the options it is given."""
    for command in line.split("&&"):
        words = shlex.split(command)
        for i, word in enumerate(words):
            given = [other.partition("=")[0] for other in words[i + 1 :] if other.startswith("-")]
            if word.endswith(".py"):
                yield (word,), given  # what stands before it are the launcher's options
            elif word.split(".")[0] in {"crossmix", "benchmarks"} and words[i - 1] == "-m":
                yield ("-m", word), given


@pytest.mark.parametrize("line", sorted(set(shell_lines())))
def test_shell_lines_name_what_exists(line: str) -> None:
    for command, given in commands(line):
        assert set(given) <= flags()[command], f"{' '.join(command)} has no such option"


def test_shell_lines__an_option_is_compared_whole() -> None:
    line = (
        "torchrun --x a && torchrun --y examples/dacs_gta5.py --meth dacs --out=runs && python -m crossmix.datasets -q"
    )
    assert list(commands(line)) == [
        (("examples/dacs_gta5.py",), ["--meth", "--out"]),
        (("-m", "crossmix.datasets"), ["-q"]),
    ]
    assert {"--method", "--out", "-h"} <= flags()[("examples/dacs_gta5.py",)]
    assert not {"--meth", "--ou", "-m"} & flags()[("examples/dacs_gta5.py",)]


def test_readme__two_commands_do_everything() -> None:
    lines = [line for body in blocks(ROOT / "README.md", "bash") for line in body.splitlines()]
    installs = [line for line in lines if line.startswith("python -m pip install")]
    assert installs == [
        'python -m pip install -e ".[train]" && python examples/dacs_gta5.py --demo',
        'python -m pip install -e ".[dev]" && python -m pytest',
    ]


def test_links_to_files_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
