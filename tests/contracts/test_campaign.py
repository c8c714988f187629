"""A minute part of each group of the campaign that is not made of tests, and that the groups find what is wrong."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from campaign import checkpoints, faults, labels, mutants, png
from campaign.mutations import mutations
from crossmix.datasets import _labels, _png
from crossmix.engine import checkpoints as engine


@pytest.mark.slow
def test_run__keeps_a_result_of_each_group(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(Path(checkpoints.__file__).with_name("run.py")), "--profile", "ci"]
    for groups in (["checkpoints"], ["corruptions"]):
        done = subprocess.run([*command, "--groups", *groups, "--out", str(out)], capture_output=True, check=True)
        assert done.stdout.startswith(f"{groups[0]}: ".encode())
    document = json.loads(out.read_text())
    assert list(document["groups"]) == ["checkpoints", "corruptions"]
    assert document["groups"]["checkpoints"]["figures"]["bit flips"] == 50
    assert str(Path.home()) not in out.read_text()


@pytest.mark.parametrize("group", ["checkpoints", "faults", "png", "labels"])
def test_groups__find_nothing(group: str) -> None:
    figures = importlib.import_module(f"campaign.{group}").run("short")
    assert figures.pop("wrong") == {}
    json.dumps(figures)


def test_checkpoints__notices_a_store_that_verifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_problem", lambda path: None)
    assert checkpoints.run("short")["wrong"]


def test_faults__notices_files_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "whole_file", lambda path, **_: path.open("wb"))
    assert faults.run("short")["wrong"]


def test_png__notices_a_decoder_that_is_wrong_or_verifies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "MUTANTS", 1)
    monkeypatch.setattr(_png, "_paeth", lambda left, up, corner: left)
    assert any("other pixels" in outcome for outcome in png.run("short")["wrong"])
    monkeypatch.undo()
    monkeypatch.setattr(_png, "_decoded", lambda path, header: np.zeros((header.height, header.width, 1), np.uint8))
    assert any("only Pillow refuses" in outcome for outcome in png.run("short")["wrong"])


def test_labels__notices_an_id_that_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "LAYOUTS", {"Synthia": labels.LAYOUTS["Synthia"]})
    monkeypatch.setattr(labels, "FORMS", ("grey",))
    monkeypatch.setattr(_labels, "KNOWN_SYNTHIA_IDS", frozenset(range(256)))
    assert labels.run("short")["wrong"]


def test_mutations__change_code_but_no_words_or_types() -> None:
    source = b"""
import warnings

SHARE: float = 0.5

@cached
def part(x: int = 1, *, mode: str = "all") -> int | None:
    \"\"\"Of 2.\"\"\"
    if x < 2 and not mode == "all":
        raise ValueError(f"{x} < 2", 3)
    warnings.warn("4", stacklevel=2)
    x += 5
    return max(x, -6, key=abs)
"""
    changed = {(source[one.start : one.end].decode(), one.new) for one in mutations(source)}
    assert changed == {
        ("0.5", "(1.0)"),
        ("cached", "(lambda plain: plain)"),
        ("1", "(2)"),
        ('"all"', "'allX'"),
        ("x < 2", "(x <= 2)"),
        ("2", "(3)"),
        ('x < 2 and not mode == "all"', "(x < 2 or not mode == 'all')"),
        ('x < 2 and not mode == "all"', "(not (x < 2 and (not mode == 'all')))"),
        ('not mode == "all"', "(mode == 'all')"),
        ('mode == "all"', "(mode != 'all')"),
        ('mode == "all"', "(mode == 'allX')"),
        ('raise ValueError(f"{x} < 2", 3)', "pass"),
        ('warnings.warn("4", stacklevel=2)', "pass"),
        ("x += 5", "pass"),
        ("x += 5", "x -= 5"),
        ("5", "(6)"),
        ("return max(x, -6, key=abs)", "return None"),
        ("max(x, -6, key=abs)", "(max(-6, x, key=abs))"),
        ("max(x, -6, key=abs)", "(max(x, -6))"),
        ("-6", "(6)"),
        ("6", "(7)"),
    }
    assert {one.lines for one in mutations(source) if one.new == "(2)"} == {range(8, 14)}


@pytest.mark.parametrize("killed", [0, 27, 30])
def test_wilson__ends_where_the_share_is_1_96_deviations_away(killed: int) -> None:
    for end in mutants.wilson(killed, 30):
        assert abs(killed / 30 - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 30), abs=1e-3)
