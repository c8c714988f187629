"""States of released versions load, and go on to the same numbers."""

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import crossmix
from old_states import PARTS, STATES, data
from runs import Patch, final, log_of

FILES = sorted(STATES.glob("*.pt"))


def assert_close(got: Any, want: Any) -> None:
    if isinstance(want, list):
        assert len(got) == len(want)
        for one, two in zip(got, want, strict=True):
            assert_close(one, two)
    elif isinstance(want, Tensor):
        torch.testing.assert_close(got, want, equal_nan=True)
    else:
        assert got == pytest.approx(want, rel=1e-6) or (math.isnan(got) and math.isnan(want))


def read(path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)[name]
    return found


def test_states__are_there_for_this_version_and_small() -> None:
    assert STATES / f"{crossmix.__version__}.pt" in FILES
    assert sum(path.stat().st_size for path in FILES) < 60_000 * len(FILES)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_states__of_parts_load_and_give_the_same_numbers(path: Path, name: str) -> None:
    part, kept = PARTS[name], read(path, name)
    one = part.build()
    one.load_state_dict(kept["state"])
    assert_close(part.numbers(one), kept["numbers"])
    with pytest.raises(AssertionError):  # the state decides
        assert_close(part.numbers(part.build()), kept["numbers"])


@pytest.mark.usefixtures("one_thread", "no_charts")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_states__of_the_trainer_are_resumed(
    path: Path, trainer: ModuleType, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    kept = read(path, "the trainer")
    torch.save(kept["state"], tmp_path / "run" / "checkpoints" / "step-0000002.pt")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert trainer.main([*data(Path()), "--out", "run", "--resume"]) == 0
    end = final(tmp_path / "run")["student"]
    assert end.keys() == kept["numbers"].keys()
    for name, value in kept["numbers"].items():
        torch.testing.assert_close(end[name], value, msg=name)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [3, 4]
