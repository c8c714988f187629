"""A minute part of each group of the campaign that is not made of tests, and that the groups find what is wrong."""

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from campaign import checkpoints, faults, labels, mutants, png, security, soak, trouble
from campaign.mutations import mutations
from crossmix.datasets import GTA5, SegmentationFolder, _labels, _png
from crossmix.engine import FolderLock
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


@pytest.mark.parametrize("group", ["checkpoints", "faults", "png", "labels", "security"])
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


def test_security__notices_checkpoints_that_run_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_read", lambda path: torch.load(path, weights_only=False))
    attacks = [one for one in security.pickles() if one.name == "os.mkdir, zip, a checkpoint"]
    monkeypatch.setattr(security, "PAYLOADS", {"os.mkdir": security.PAYLOADS["os.mkdir"]})
    monkeypatch.setattr(security, "KINDS", {"pickle": lambda: iter(attacks)})
    assert security.run("short")["wrong"] == {"pickle: code was run": "os.mkdir, zip, a checkpoint"}


def test_security__notices_what_hangs_swallows_or_leads_outside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(security, "SECONDS", 1)

    def outcome(reader: Callable[[Path], object]) -> str:
        return security.outcome_of(security.Attack("", lambda folder: security.put(b"x", "x", folder), reader), 32)

    assert outcome(lambda path: time.sleep(10)) == "no end within 1 seconds"
    assert outcome(lambda path: len(bytes([1]) * 10**8)).startswith("it took ")
    assert outcome(lambda path: os._exit(3)) == "it ended with 3"
    assert outcome(lambda path: int("a")).startswith("ValueError: ")
    assert outcome(GTA5) == "refused"
    (tmp_path / "root" / "images").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(security.png(4, 4))
    (tmp_path / "root" / "images" / "1.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(RuntimeError, match="outside of the folder"):
        security.inside(lambda root, path: SegmentationFolder(root / "images"), tmp_path / "list.txt")


def test_soak__notices_what_rises_and_steps_that_are_lost(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 1, 200)
    level = list(300 + noise)
    assert abs(soak.rise(level)) < soak.LEVEL["memory"]
    assert soak.rise(list(level + np.linspace(0, 10, 200))) > soak.LEVEL["memory"]
    assert soak.rise([7.0] * 50) == 0
    assert soak.rise(([7.0] * 9 + [9.0]) * 10) == 0  # while it evaluates
    assert soak.rise([]) == soak.rise([1.0, 2.0]) == math.inf
    log, steps = tmp_path / "log.jsonl", list(range(1, soak.EVALUATED + 3))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"step-{steps[-1]:07d}.pt").touch()
    for found, evaluated, wrong in (
        (steps, 1, set()),
        (steps[:-1], 1, {"log"}),
        ([1, *steps], 2, {"log", "evaluations"}),
    ):
        log.write_text("".join(f'{{"step": {step}, "loss": 1}}\n' for step in found))
        evaluations = [{"step": soak.EVALUATED}] * evaluated
        (tmp_path / "metrics.json").write_text(json.dumps({"evaluations": evaluations}))
        assert soak.lost(tmp_path).keys() == wrong
        assert soak.newest(log) == found[-1]


@pytest.mark.slow
def test_soak__watches_the_trainer_over_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "RESTARTS", 1)
    monkeypatch.setenv("CROSSMIX_SOAK_MINUTES", "0.5")
    figures = soak.run("ci")
    assert not {"exit", "log", "evaluations"} & figures["wrong"].keys()
    assert figures["steps"] > 1
    assert figures["restarts"] == 1


@pytest.mark.parametrize(("last", "evaluated", "wrong"), [
    (100, [50, 100], False), (100, [50], False), (120, [50, 100], False), (120, [50], True), (100, [100], True),
])  # fmt: skip
def test_soak__misses_evaluations(
    last: int, evaluated: list[int], wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "EVALUATED", 50)
    monkeypatch.setattr(soak, "steps_saved", lambda _: [last])
    monkeypatch.setattr(soak, "log_of", lambda _: [{"step": step} for step in range(1, last + 1)])
    monkeypatch.setattr(soak, "metrics_of", lambda _: {"evaluations": [{"step": step} for step in evaluated]})
    assert ("evaluations" in soak.lost(Path())) is wrong


@pytest.mark.slow
def test_trouble__finds_nothing_and_notices_a_lock_that_locks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("killed trainer, with workers", "two runs in one folder")
    monkeypatch.setattr(trouble, "CASES", {name: trouble.CASES[name] for name in few})
    assert trouble.run("short")["wrong"] == {}
    monkeypatch.setattr(trouble, "CASES", {few[1]: trouble.CASES[few[1]]})
    monkeypatch.setattr(FolderLock, "_acquire", lambda *_: None)
    assert trouble.run("short")["wrong"].keys() == {few[1]}


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
