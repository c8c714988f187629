"""A minute part of each group of the campaign that is not made of tests, and that the groups find what is wrong."""

import importlib
import json

import numpy as np
import pytest

from campaign import checkpoints, faults, labels, png
from crossmix.datasets import _labels, _png
from crossmix.engine import checkpoints as engine


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
