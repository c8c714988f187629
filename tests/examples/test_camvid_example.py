"""The other example runs on a folder of its layout."""

from pathlib import Path

import pytest
import torch

import camvid_day_to_dusk
from crossmix.datasets import write_png
from oracles import seeded
from runs import Capture, Patch


def test_camvid__trains_and_prints_both_columns(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    for k, folder in enumerate(("day", "dusk-train", "dusk-test")):
        for kind in ("images", "labels"):
            (tmp_path / folder / kind).mkdir(parents=True)
        for i in range(2):
            image = torch.randint(0, 256, (3, 120, 160), generator=seeded(10 * k + i), dtype=torch.uint8)
            label = torch.randint(0, 12, (120, 160), generator=seeded(10 * k + i + 5), dtype=torch.uint8)
            write_png(tmp_path / folder / "images" / f"{i}.png", image)
            write_png(tmp_path / folder / "labels" / f"{i}.png", label)
    images, labels = camvid_day_to_dusk.load(tmp_path / "day")
    assert images.shape == (2, 3, 120, 160)
    assert set(labels.unique().tolist()) == {*range(11), 255}
    monkeypatch.setattr(camvid_day_to_dusk, "SIZE", (40, 48))
    monkeypatch.setattr(camvid_day_to_dusk, "CROP", (32, 40))
    monkeypatch.setattr("sys.argv", ["camvid", str(tmp_path), "--seeds", "2", "--steps", "1"])
    camvid_day_to_dusk.main()
    printed = capsys.readouterr().out
    assert "source + jitter" in printed
    assert "dacs" in printed
    assert "mIoU" in printed.splitlines()[-1]
    assert "+-" in printed.splitlines()[-1]
    with pytest.raises(SystemExit, match=r"no images/\*\.png; expected CAMVID"):
        camvid_day_to_dusk.load(tmp_path / "night")
