"""`python -m crossmix.datasets`: what it says about good folders and bad ones, and the counts that it keeps."""

import json
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from checks import refusal
from crossmix.datasets import GTA5, Sample, SegmentationFolder, StreetScenes, class_counts, statistics
from crossmix.datasets.classes import CLASS_NAMES
from oracles import save
from runs import fork


@pytest.fixture
def gta5(tmp_path: Path) -> Path:
    StreetScenes(4).write(tmp_path / "g", layout="gta5")
    return tmp_path / "g"


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_check__good_folders(gta5: Path, tmp_path: Path, command: Callable[..., str], workers: str) -> None:
    StreetScenes(3, domain="target").write(tmp_path / "c", layout="cityscapes", split="train")
    StreetScenes(2, domain="target", seed=1).write(tmp_path / "c", layout="cityscapes", split="val")
    for folder, texts in (
        (gta5, ["GTA5: 4 images (the whole data set has 24966), 4 label maps of label ids, 4 pairs"]),
        (tmp_path / "c", [
            "Cityscapes train, gtFine: 3 images (the whole data set has 2975)",
            "Cityscapes val, gtFine: 2 images (the whole data set has 500)",
        ]),
    ):  # fmt: skip
        out = command(0, "check", folder, "--workers", workers)
        assert all(text in out for text in [*texts, "no problems"])


def test_check__lists_every_bad_file(gta5: Path, command: Callable[..., str]) -> None:
    images, labels = gta5 / "images", gta5 / "labels"
    (labels / "00001.png").unlink()
    (images / "00002.png").write_bytes((images / "00002.png").read_bytes()[:200])
    save(images / "00003.png", np.full((64, 128, 3), 7, np.uint8))
    save(labels / "00003.png", np.zeros((64, 126), np.uint8))
    save(labels / "00004.png", np.where(np.arange(64 * 128).reshape(64, 128) % 3, 18, 7).astype(np.uint8))
    save(labels / "00009.png", np.full((64, 128), 77, np.uint8))
    lines = command(1, "check", gta5).splitlines()
    for name, text in (
        ("images/00001.png", "has no label map"),
        ("labels/00009.png", "has no image"),
        ("images/00002.png", "cannot be decoded"),
        ("images/00003.png", "suspicious, every pixel has the same colour"),
        ("labels/00003.png", "suspicious, every pixel is ignored"),
        ("labels/00003.png", "is 64 x 126 but its image 64 x 128"),
        ("labels/00004.png", "suspicious, no id above 18"),
        ("labels/00009.png", "holds ids [77]"),
    ):
        assert sum(name in line and text in line for line in lines) == 1, (name, text)
    assert lines[-1] == "8 problems"


def test_check__reads_no_hidden_folder(gta5: Path, command: Callable[..., str]) -> None:
    for name in ("more", ".hidden"):
        shutil.copytree(gta5 / "labels", gta5 / name)
    out = command(1, "check", gta5)
    assert "more (read by no reader): 0 images" in out
    assert ".hidden" not in out


def test_check__synthia_saved_from_high_bytes(tmp_path: Path, command: Callable[..., str]) -> None:
    for i in range(2):
        save(tmp_path / "RGB" / f"{i}.png", np.arange(96, dtype=np.uint8).reshape(4, 8, 3))
        save(tmp_path / "GT" / "LABELS" / f"{i}.png", np.zeros((4, 8, 3), np.uint8))
    out = command(1, "check", tmp_path)
    assert "SYNTHIA: 2 images (the whole data set has 9400)" in out
    assert out.count("like files saved from the high bytes") == 2


def test_check__your_own(tmp_path: Path, command: Callable[..., str]) -> None:
    save(tmp_path / "1_img.png", np.arange(96, dtype=np.uint8).reshape(4, 8, 3))
    save(tmp_path / "1_ids.png", np.full((4, 8), 5, np.uint8))
    mapping = tmp_path / "mapping.json"
    mapping.write_text('{"5": 0}', encoding="utf-8")
    patterns = ["--images", str(tmp_path / "*_img.png"), "--labels", str(tmp_path / "*_ids.png")]
    command(0, "check", *patterns, "--mapping", mapping)
    mapping.write_text('{"4": 0}', encoding="utf-8")
    out = command(1, "check", *patterns, "--mapping", mapping)
    assert "holds [5], which the mapping does not list" in out
    assert out.splitlines()[-1] == "1 problem"
    for text in ("[1]", '{"5": 300}', "{", '{"a": 1}'):
        mapping.write_text(text, encoding="utf-8")
        assert "mapping.json" in command(2, "check", *patterns, "--mapping", mapping)
    command(2, "check", "--labels", tmp_path / "*_nothing.png")


def test_command__nothing_to_look_at(tmp_path: Path, command: Callable[..., str]) -> None:
    assert "is not laid out as GTA5 (images, labels), SYNTHIA" in command(2, "check", tmp_path)
    assert "no such folder" in command(2, "stats", tmp_path / "none")
    for arguments in (["check"], ["check", str(tmp_path), "--images", "x"]):
        with pytest.raises(SystemExit):
            command(2, *arguments)


def test_stats__prints_shares_and_keeps_the_counts(
    gta5: Path, command: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = command(0, "stats", gta5)
    data = GTA5(gta5)
    labels = torch.cat([data[i].label.flatten() for i in range(4)])
    for value, name in enumerate(CLASS_NAMES):
        count = int((labels == value).sum())
        share = f"{100 * count / int((labels != 255).sum()):.3f}%"
        maps = sum(bool((data[i].label == value).any()) for i in range(4))
        row = next(line.split() for line in first.splitlines() if line.strip().startswith(name))
        assert row[len(name.split()) :] == [str(count), share, str(maps)]
    assert command(0, "stats", gta5) == first
    assert len((gta5 / "crossmix-stats.jsonl").read_text("utf-8").splitlines()) == 4
    monkeypatch.setattr(sys, "argv", ["datasets", "stats", str(gta5)])
    monkeypatch.delitem(sys.modules, "crossmix.datasets.__main__")  # to be run again, as `python -m` does
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("crossmix.datasets", run_name="__main__", alter_sys=True)
    assert (ended.value.code, capsys.readouterr().out) == (0, first)


def counted(samples: Iterable[Sample]) -> Tensor:
    return torch.stack([torch.bincount(sample.label.flatten().long(), minlength=256) for sample in samples])


def test_class_counts__goes_on_where_it_stopped_and_counts_changed_files_again(gta5: Path, tmp_path: Path) -> None:
    data, cache = GTA5(gta5), tmp_path / "counts.jsonl"
    want = counted(data)
    assert torch.equal(class_counts(data), want)
    assert torch.equal(class_counts(data, cache=cache), want)
    lines = cache.read_bytes().splitlines(keepends=True)
    for kept in (0, 2):
        for more in (0, 1, 20, len(lines[kept]) - 1):  # killed while writing, in the first line or in a later one
            cache.write_bytes(b"".join(lines[:kept]) + lines[kept][:more])
            assert torch.equal(class_counts(data, cache=cache), want)
            assert {line.strip() for line in lines} <= set(cache.read_bytes().splitlines())
            size = cache.stat().st_size
            assert torch.equal(class_counts(data, cache=cache), want)
            assert cache.stat().st_size == size  # nothing was counted twice
    shutil.copy(gta5 / "labels" / "00002.png", gta5 / "labels" / "00001.png")
    assert torch.equal(class_counts(data, cache=cache)[0], want[1])


def test_class_counts__damaged_lines_are_not_taken(gta5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cache = GTA5(gta5), tmp_path / "counts.jsonl"
    want = class_counts(data, cache=cache)
    lines = cache.read_bytes().splitlines(keepends=True)
    read = []
    monkeypatch.setattr(statistics, "_count", lambda path, labelled: read.append(path.name) or {0: 7})
    assert torch.equal(class_counts(data, cache=cache), want)
    assert torch.equal(class_counts(GTA5(gta5, size=(8, 16)), cache=cache), want)  # of the maps as they are
    assert read == []
    entry = json.loads(lines[2])
    forged = json.dumps({**entry, "counts": {**entry["counts"], "0": 1}}).encode() + b"\n"
    for line in (
        forged,
        b"\xff\n",
        b"7\n",
        b"{}\n",
        b"[" * 100_000 + b"\n",
        b"\n",
        lines[2].replace(b"mtime", b"Mtime"),
    ):
        read.clear()
        cache.write_bytes(b"".join([*lines[:2], line, lines[3]]))
        got = class_counts(data, cache=cache)
        assert read == ["00003.png"]
        assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])
        assert got[2, 0] == got[2].sum() == 7


def test_class_counts__data_sets_and_mappings_share_a_file(gta5: Path, tmp_path: Path) -> None:
    cache = tmp_path / "counts.jsonl"
    folders = (gta5 / "images", gta5 / "labels")
    same, other = (SegmentationFolder(*folders, dict.fromkeys(range(35), value)) for value in (0, 1))
    every = [GTA5(gta5), same, other]
    for data in every * 2:
        assert torch.equal(class_counts(data, cache=cache), counted(data))
    whole = ConcatDataset([*every, Subset(every[0], [2, 2])])
    assert torch.equal(class_counts(whole, cache=cache), counted(whole))
    assert len(cache.read_bytes().splitlines()) == 12


def count(begun: Callable[[], object], root: Path, cache: Path, want: Tensor) -> None:
    begun()
    assert torch.equal(class_counts(GTA5(root), cache=cache), want)


def test_class_counts__processes_share_a_file(gta5: Path, tmp_path: Path) -> None:
    cache, want = tmp_path / "counts.jsonl", counted(GTA5(gta5))
    running = [fork(count, gta5, cache, want) for _ in range(2)]
    for process in running:
        process.join(300)
        assert process.exitcode == 0
    assert torch.equal(class_counts(GTA5(gta5), cache=cache), want)


class Left(Dataset[Sample]):
    """Labels that say which of two signals the process leaves to its parent."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> Sample:
        left = signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}
        return Sample(torch.zeros(3, 1, 1, dtype=torch.uint8), torch.full((1, 1), len(left), dtype=torch.uint8), str(i))


def test_class_counts__in_processes_of_any_data_set_that_leave_signals_to_their_parent() -> None:
    state = torch.get_rng_state()
    for data in (StreetScenes(5), [StreetScenes(3)[i] for i in range(3)]):
        assert torch.equal(class_counts(data, workers=2), counted(data[i] for i in range(len(data))))
    assert torch.equal(torch.get_rng_state(), state)
    bare = [StreetScenes(1)[0]._replace(label=None)]
    refusal(lambda: class_counts(bare, workers=1), "sample 0 of list has no label")
    assert class_counts(Left())[:, 0].tolist() == [1, 1]
    if hasattr(signal, "sigtimedwait"):  # else a process cannot know who sent a signal
        assert class_counts(Left(), workers=1)[:, 2].tolist() == [1, 1]


def test_class_counts__refuses(gta5: Path, tmp_path: Path) -> None:
    data, cache = GTA5(gta5), tmp_path / "counts.jsonl"
    refusal(lambda: class_counts(GTA5(gta5, labels=False)), "4 samples have no label map")
    for content in (b"{}\n", b"[\n", b"my notes", b"\xff"):  # somebody's file is not added to
        cache.write_bytes(content)
        refusal(lambda: class_counts(data, cache=cache), r"counts\.jsonl: is not a file of counts; pass another file")
        assert cache.read_bytes() == content
    refusal(lambda: class_counts(data, cache=tmp_path), "cannot be read")
    refusal(lambda: class_counts(data, cache=tmp_path / "no" / "folder.jsonl"), "cannot be written")
    (gta5 / "labels" / "00001.png").unlink()
    refusal(lambda: class_counts(data), r"00001\.png: no such file")


def test_check__real_folders(test_data: Path, command: Callable[..., str]) -> None:
    out = command(1, "check", test_data / "gta5")
    assert "has 1 images and no label maps" in out
    assert out.count("looks like train ids") == 4
    out = command(1, "check", test_data / "cityscapes")
    assert "Cityscapes train, gtFine: 8 images (the whole data set has 2975), 8 label maps of label ids, 8 pairs" in out
    assert out.splitlines()[-1] == "15 problems"  # label maps of val without images


def test_stats__a_part_without_label_maps_has_none(gta5: Path, command: Callable[..., str]) -> None:
    shutil.rmtree(gta5 / "labels")
    assert command(0, "stats", gta5) == ""
