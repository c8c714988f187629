"""Every code block of README and docs is executed; every shell line names files and flags that exist."""

import contextlib
import functools
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checks import needed
from crossmix.datasets import read_image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md")] + [
    page for folder in ("docs", "docs/frameworks", "docs/tutorials") for page in sorted((ROOT / folder).glob("*.md"))
]
NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.MULTILINE)
TRAINS = "<!-- trains -->"  # what the page prints and draws depends on how the machine rounds
NUMBER = re.compile(r"\d+(?:\.\d+)?")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


SLOW = {"graphs.md", "rare_classes.md", "training_step.md", "adaptation.md", "pseudo_labels.md"}  # compile and train


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
    trains = TRAINS in page.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        if others:  # packages warn of what they find in each other
            warnings.simplefilter("ignore")
        for body, shown in blocks_and_outputs(page):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(body, str(page), "exec"), names)  # noqa: S102 - our own pages
            if shown or page.parent.name == "tutorials":  # which show all that they print
                check_output(printed.getvalue(), shown, trains=trains)
    for picture in tmp_path.glob("*.png"):  # the page shows what its code draws
        if (page.parent / picture.name).exists():
            check_picture(read_image(picture), read_image(page.parent / picture.name), trains=trains)


def blocks_and_outputs(page: Path) -> Iterator[tuple[str, str]]:
    """Each Python block, and what the page says that it prints: the block of output that comes next, if any."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    for (kind, body), (following, shown) in itertools.pairwise([*found, ("", "")]):
        if kind == "python":
            yield body, shown if following == "output" else ""


def check_output(printed: str, shown: str, *, trains: bool) -> None:
    """The same text, in which `...` stands for anything; after training, numbers are only close."""
    if not trains:
        assert re.fullmatch(re.escape(shown).replace(re.escape("..."), ".*"), printed), printed
        return
    assert NUMBER.sub("", printed).split() == NUMBER.sub("", shown).split(), printed
    for text, number in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
        unit = 0.05 if "." in text else 3
        assert float(number) == pytest.approx(float(text), rel=0.2, abs=unit), printed


def check_picture(drawn: Tensor, shown: Tensor, *, trains: bool) -> None:
    """The same pixels; after training, nearly the same in nearly all places."""
    rounding, share = (32, 0.05) if trains else (1, 0)
    different = ((drawn.int() - shown.int()).abs() > rounding).any(0)
    assert different.float().mean() <= share


@pytest.mark.parametrize(
    ("printed", "shown", "trains", "same"),
    [
        ("mIoU 24.3\n", "mIoU 24.3\n", False, True),
        ("mIoU 24.4\n", "mIoU 24.3\n", False, False),
        ("a.png: cut (in two)\n", "a.png: cut (...)\n", False, True),
        ("b.png: cut (in two)\n", "a.png: cut (...)\n", False, False),
        ("mIoU  9.8 at 50\n", "mIoU 10.1 at 50\n", True, True),
        ("mIoU 14.0\n", "mIoU 10.1\n", True, False),
        ("recall 0.94\n", "recall 0.99\n", True, True),
        ("recall 0.10\n", "recall 0.04\n", True, False),
        ("lost 6\n", "lost 3\n", True, True),
        ("lost 7\n", "lost 3\n", True, False),
        ("source 10.1\n", "DACS 10.1\n", True, False),
        ("1.0 2.0\n", "1.0\n", True, False),
        ("", "1\n", False, False),
    ],
)
def test_outputs_are_compared(printed: str, shown: str, trains: bool, same: bool) -> None:
    with contextlib.nullcontext() if same else pytest.raises((AssertionError, ValueError)):
        check_output(printed, shown, trains=trains)


def test_pictures_are_compared() -> None:
    picture = torch.zeros(3, 10, 10, dtype=torch.uint8)
    check_picture(picture + 1, picture, trains=False)
    check_picture(picture + 32, picture, trains=True)
    changed = picture.clone()
    changed[0, 0, :5] = 33  # 5 % of the pixels, in one channel
    check_picture(changed, picture, trains=True)
    with pytest.raises(AssertionError):
        check_picture(changed, picture, trains=False)
    changed[2, 1, 0] = 33
    with pytest.raises(AssertionError):
        check_picture(changed, picture, trains=True)


def test_tutorials__show_small_pictures_that_they_draw() -> None:
    folder, shown = ROOT / "docs" / "tutorials", set()
    for page in folder.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        pictures = re.findall(r"!\[.+\]\((.+)\)", text)
        assert all(f'write_png("{picture}"' in text for picture in pictures)
        shown |= {folder / picture for picture in pictures}
    assert shown == set(folder.glob("*.png"))
    assert max(picture.stat().st_size for picture in shown) < 60_000


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
