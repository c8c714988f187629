"""Keyed sampling, the checkpoint store and the run log."""

import errno
import hashlib
import itertools
import os
import pickle
import shutil
import signal
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from attacks import Calls, bomb, written
from checks import refusal
from crossmix.datasets import DataError, Sample
from crossmix.engine import CheckpointError, CheckpointStore, KeyedCrops, RunLog, keyed_generator, resident
from oracles import flipped
from runs import fork


def items(n: int, height: int = 6, width: int = 9) -> list[Sample]:
    """Images whose pixels say which image, row and column they are."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [
        Sample(
            torch.stack([torch.full_like(rows, i), rows, columns]).to(torch.uint8),
            (rows * width + columns).to(torch.uint8),
            f"item{i}",
        )
        for i in range(n)
    ]


def test_keyed_generator__same_key_same_numbers_other_key_others() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**40, 3)]
    draws = [torch.rand(8, generator=keyed_generator(*key)) for key in keys]
    for i, key in enumerate(keys):
        assert torch.equal(draws[i], torch.rand(8, generator=keyed_generator(*key)))
        for other in draws[:i]:
            assert not torch.equal(draws[i], other)
    for key in ((), (-1,), (0, -2)):
        refusal(partial(keyed_generator, *key), "non-negative integers", ValueError)


@given(st.integers(1, 7), st.integers(0, 5), st.integers(0, 3))
def test_keyed_crops__each_pass_takes_every_sample_once(n: int, seed: int, epoch: int) -> None:
    crops = KeyedCrops(items(n), (2, 3), seed=seed, stream=1)
    assert sorted(crops.index(epoch * n + k) for k in range(n)) == list(range(n))


@pytest.mark.parametrize("pad", [False, True])
def test_keyed_crops__refuse_a_label_map_of_another_size(pad: bool) -> None:
    wrong = items(1)[0]._replace(label=torch.zeros(5, 9, dtype=torch.uint8))
    with pytest.raises(DataError, match="item0: its label map is 5 x 9 but its image 6 x 9"):
        KeyedCrops([wrong], (2, 3), seed=0, stream=0, pad=pad)[0]


def test_keyed_crops__files_of_another_kind_are_left_alone() -> None:
    class Theirs:
        files = ("0.png", "1.png")
        ignore_index = -100  # of a loss

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Sample:
            return items(2)[index]

    assert KeyedCrops(Theirs(), (4, 3), seed=0, stream=0)[0][0].shape == (3, 4, 3)
    assert KeyedCrops(Theirs(), (4, 3), seed=0, stream=0).ignore_index == 255
    with pytest.raises(DataError, match=r"item[01]: the image is 6 x 9, smaller than the crop of 7 x 3"):
        KeyedCrops(Theirs(), (7, 3), seed=0, stream=0)[0]


def test_keyed_crops__image_and_label_are_cut_together() -> None:
    samples, seen = items(5), set()
    crops = KeyedCrops(samples, (4, 3), seed=3, stream=0)
    for draw in range(200):
        image, label = crops[draw]
        top, left = int(image[1, 0, 0]), int(image[2, 0, 0])
        seen.add((top, left))
        whole = samples[int(image[0, 0, 0])]
        assert torch.equal(image, whole.image[:, top : top + 4, left : left + 3])
        assert torch.equal(label, whole.label[top : top + 4, left : left + 3])
    assert seen == {(top, left) for top in range(3) for left in range(7)}  # every position occurs


def test_keyed_crops__order_workers_and_restarts_change_nothing() -> None:
    crops, state = KeyedCrops(items(5), (2, 2), seed=0, stream=0), torch.get_rng_state()
    want = [crops[draw] for draw in range(40)]
    assert torch.equal(state, torch.get_rng_state())
    backwards = [pickle.loads(pickle.dumps(crops))[draw] for draw in reversed(range(40))][::-1]
    workers = list(DataLoader(crops, batch_size=None, sampler=range(16, 40), num_workers=2))
    for one, other in zip([*want, *want[16:]], [*backwards, *workers], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_keyed_crops__streams_seeds_and_passes_differ() -> None:
    def order(seed: int, stream: int) -> list[int]:
        crops = KeyedCrops(items(20), (2, 2), seed=seed, stream=stream)
        return [crops.index(draw) for draw in range(40)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0][:20] != orders[0][20:]


class Broken(list[Sample]):
    """Samples of which some cannot be read."""

    bad: tuple[int, ...] = ()

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if index in self.bad:
            raise ValueError(f"file{index}.png: is cut off.")
        return super().__getitem__(index)


def test_keyed_crops__broken_samples_are_errors_or_left_out_up_to_a_cap(caplog: pytest.LogCaptureFixture) -> None:
    samples = Broken(items(6))
    samples.bad = (1, 4)

    def crops(of: list[Sample] = samples, skip: int = 0) -> KeyedCrops:
        return KeyedCrops(of, (2, 2), seed=0, stream=0, skip=skip)

    def read_all(made: KeyedCrops) -> list[tuple[Tensor, Tensor]]:
        return [made[draw] for draw in range(60)]

    refusal(lambda: read_all(crops()), r"file[14]\.png: is cut off\.$", ValueError)
    lenient, whole = crops(skip=2), crops(items(6))
    found = read_all(lenient)
    for draw, (image, _) in enumerate(found):
        assert int(image[0, 0, 0]) not in samples.bad
        if whole.index(draw) not in samples.bad:
            assert torch.equal(image, whole[draw][0])
    assert set(lenient.skipped) == {1, 4}
    told = [f"skipped: file{number}.png: is cut off." for number in (1, 4)]
    assert sorted(record.message for record in caplog.records) == told
    again = crops(skip=2)
    for draw in reversed(range(60)):  # what was met before changes nothing
        assert torch.equal(again[draw][0], found[draw][0])
    cap = r"is cut off\. This is one more than the 1 broken samples that `skip` allows"
    refusal(lambda: read_all(crops(skip=1)), cap, ValueError)
    refusal(lambda: crops(skip=-1), "`skip` must not be negative", ValueError)
    samples.bad = tuple(range(6))  # and it does not search for ever
    refusal(lambda: crops(skip=100)[0], "one more than the 5 broken samples", ValueError)


def test_resident__crops_are_those_of_the_data_set() -> None:
    samples = [*items(4), items(1)[0]._replace(label=None)]
    kept = resident(samples, "cpu")
    assert [item.name for item in kept] == [item.name for item in samples]
    one, other = (KeyedCrops(data, (2, 3), seed=1, stream=0) for data in (kept, samples))
    for draw in range(30):
        for got, want in zip(one[draw], other[draw], strict=True):
            assert torch.equal(got, want)
        if one.index(draw) == 4:  # it has no label
            assert torch.equal(one[draw][1], torch.full((2, 3), 255, dtype=torch.uint8))


@pytest.mark.gpu
def test_resident__on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = resident(items(3), "cuda")
    image, label = KeyedCrops(kept, (2, 3), seed=1, stream=0)[5]
    assert image.is_cuda
    assert label.is_cuda
    assert torch.equal(image.cpu(), KeyedCrops(items(3), (2, 3), seed=1, stream=0)[5][0])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 100))
    with pytest.raises(ValueError, match="read them from a cache on disk instead"):
        resident(items(3), "cuda")


def state(step: int) -> dict[str, object]:
    return {"step": step, "student": {"weight": torch.arange(50.0) + step}}


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def step_of(loaded: dict[str, Any] | None) -> int:
    """Which step was loaded, and is whole."""
    assert loaded is not None
    step: int = loaded["step"]
    assert torch.equal(loaded["student"]["weight"], torch.arange(50.0) + step)
    return step


def with_hashes(*names: str) -> set[str]:
    return {name + end for name in names for end in ("", ".sha256")}


def test_checkpoints__newest_and_best_come_back_whole(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "deep" / "checkpoints")
    assert store.load_newest() is None
    assert store.load_best() is None
    for step in (1, 2, 10):
        path = store.save(step, state(step), best=step == 2)
    assert (step_of(store.load_newest()), step_of(store.load_best())) == (10, 2)
    assert path.with_name(path.name + ".sha256").read_text().strip() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.load(store.folder / "best.pt", weights_only=True)["step"] == 2
    assert set(contents(store.folder)) == with_hashes("best.pt", "step-0000002.pt", "step-0000010.pt")


def other_hash(path: Path, text: bytes) -> None:
    path.with_name(path.name + ".sha256").write_bytes(text)


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "flip": lambda path, data: path.write_bytes(flipped(data)),
    "truncate": lambda path, data: path.write_bytes(data[:-10]),
    "empty": lambda path, data: path.write_bytes(b""),
    "other hash": lambda path, data: other_hash(path, b"0" * 64 + b"\n"),
    "no hash": lambda path, data: other_hash(path, b"\xff\xfe"),
}


def damage(path: Path, how: str) -> None:
    DAMAGES[how](path, path.read_bytes())


def test_checkpoints__one_that_cannot_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state(1))
    newest, opened = store.save(2, state(2)), Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == newest:
            raise PermissionError(errno.EACCES, "no permission", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.warns(
        UserWarning, match=r"step-0000002\.pt: it cannot be read \(no permission\); loading step-0000001"
    ):
        assert step_of(store.load_newest()) == 1


@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoints__a_damaged_one_is_never_loaded(tmp_path: Path, how: str) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state(1), best=True)
    damage(store.save(2, state(2)), how)
    with pytest.warns(UserWarning, match=r"step-0000002\.pt: its .*; loading step-0000001\.pt instead"):
        assert step_of(store.load_newest()) == 1
    (tmp_path / "step-0000001.pt").write_bytes(b"x")
    refusal(store.load_newest, "No checkpoint can be read", CheckpointError)
    damage(store.best, how)
    refusal(store.load_best, r"best\.pt: its .*; the next best checkpoint replaces it", CheckpointError)
    store.save(3, state(3), best=True)
    assert step_of(store.load_best()) == 3


def test_checkpoints__named_ones_stay_until_another_one_has_the_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / "best_density.pt.tmp.7").touch()  # of a killed writer
    for step, names in ((1, ["best", "best_density"]), (2, []), (3, ["best"]), (4, [])):
        store.save(step, state(step), names=names)
    found = {path.stem: torch.load(path, weights_only=True)["step"] for path in tmp_path.glob("*.pt")}
    assert found == {"step-0000003": 3, "step-0000004": 4, "best": 3, "best_density": 1}
    assert len(list(tmp_path.iterdir())) == 2 * len(found)
    for name in ("bester", "best-density", "last", "../best", "best_"):
        with pytest.raises(ValueError, match=f"`names` must be 'best' or have the form 'best_<measure>', got {name!r}"):
            store.save(5, state(5), names=[name])


@pytest.mark.parametrize("keep", [2, 3])
@pytest.mark.parametrize("how", DAMAGES)
def test_checkpoints__a_damaged_one_takes_nobody_s_place(tmp_path: Path, how: str, keep: int) -> None:
    store = CheckpointStore(tmp_path, keep=keep)
    for step in range(1, keep + 1):
        path = store.save(step, state(step))
    damage(path, how)
    damage(store.save(keep + 1, state(keep + 1)), how)
    for last in range(keep - 1, 0, -1):  # every whole one is still there
        with pytest.warns(UserWarning, match=f"loading step-{last:07d}.pt instead"):
            assert step_of(store.load_newest()) == last
        (tmp_path / f"step-{last:07d}.pt").write_bytes(b"")
    for step in range(10, 10 + keep):
        store.save(step, state(step))
    assert set(contents(tmp_path)) == with_hashes(*(f"step-{step:07d}.pt" for step in range(10, 10 + keep)))


def test_checkpoints__copied_elsewhere_they_are_verified(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    store.save(1, state(1), best=True)
    copies = CheckpointStore(shutil.copytree(store.folder, tmp_path / "copy"))
    assert step_of(copies.load_newest()) == step_of(copies.load_best()) == 1
    for path in copies.folder.glob("*.sha256"):  # the checkpoint alone was copied
        path.unlink()
    assert step_of(copies.load_newest()) == step_of(copies.load_best()) == 1
    whole = copies.best.read_bytes()
    for cut in (0, 10, len(whole) - 10):
        copies.best.write_bytes(whole[:cut])
        refusal(copies.load_best, r"best\.pt: its sha256 file is missing, and it is cut off", CheckpointError)


FOREIGN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (
        lambda trace: written({"step": Calls(os.system, f"touch {trace}")}),
        "it holds code or objects other than",
    ),
    "a bomb": (lambda _: bomb(torch.zeros(10**6)), r"BadZipFile: its parts claim 4\.00 MB, the file has"),
    "no zip": (lambda _: written({"step": 1}, legacy=True), "BadZipFile: File is not a zip file"),
    "a list": (lambda _: written([1, 2]), "it is not a checkpoint .a list, not a dict"),
    "a text": (lambda _: written("all is well"), "it is not a checkpoint .a str, not a dict"),
    "nothing": (lambda _: written(None), "it is not a checkpoint .a NoneType, not a dict"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints__with_the_hash_of_whoever_wrote_them_are_not_trusted(tmp_path: Path, kind: str) -> None:
    make, reason = FOREIGN[kind]
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(1, state(1), best=True)
    for path in (store.save(2, state(2)), store.best):
        path.write_bytes(make(tmp_path / "trace"))
        other_hash(path, hashlib.sha256(path.read_bytes()).hexdigest().encode())
    with pytest.warns(UserWarning, match=rf"step-0000002\.pt: .*{reason}.*; loading step-0000001\.pt instead") as told:
        assert step_of(store.load_newest()) == 1
    assert "trust" not in str(told[0].message)  # torch's advice
    refusal(store.load_best, rf"best\.pt: .*{reason}.*; the next best", CheckpointError)
    assert not (tmp_path / "trace").exists()


def test_checkpoints__a_shortage_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, state(step))
    whole = (tmp_path / "step-0000002.pt").read_bytes()
    for error, raised in (
        (MemoryError(), CheckpointError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), CheckpointError),
        (OSError(errno.EMFILE, "Too many open files"), OSError),
    ):
        monkeypatch.setattr(torch, "load", Mock(side_effect=error))
        refusal(store.load_newest, "memory|Too many open files", raised)
    assert (tmp_path / "step-0000002.pt").read_bytes() == whole


@pytest.mark.slow
def test_checkpoints__no_flipped_bit_of_a_lone_copy_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state(1), best=True)
    (tmp_path / "best.pt.sha256").unlink()
    whole, noticed = store.best.read_bytes(), 0
    directory = whole.index(b"PK\x01\x02")  # which has no checksum
    for place in range(len(whole)):
        for bit in range(8) if place >= directory else (place % 8,):
            store.best.write_bytes(flipped(whole, place, 1 << bit))
            try:
                assert step_of(store.load_best()) == 1  # it was in a padding, or a date
            except CheckpointError:
                noticed += 1
    assert noticed > directory // 2


def test_checkpoints__a_failed_save_leaves_the_earlier_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state(1), best=True)
    before = contents(tmp_path)
    with pytest.raises(Exception, match="pickle"):
        store.save(2, {"bad": lambda: None}, best=True)
    assert contents(tmp_path) == before
    refusal(lambda: CheckpointStore(tmp_path, keep=1), "at least 2", ValueError)
    refusal(lambda: CheckpointStore(tmp_path, keep=2.5), "an int, got float", TypeError)  # type: ignore[arg-type]
    refusal(lambda: store.save(-1, state(1)), "`step` must be at least 0, got -1", ValueError)


def test_checkpoints__one_before_a_valid_one_is_refused(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(10, state(10))
    newest, before = store.save(20, state(20)), contents(tmp_path)
    refusal(lambda: store.save(15, state(15)), r"must not be before .*, got 15, but there is .*0000020\.pt", ValueError)
    assert contents(tmp_path) == before
    store.save(20, state(20), best=True)  # once more
    damage(newest, "flip")
    store.save(15, state(15))
    with pytest.warns(UserWarning, match=r"step-0000020\.pt: its contents do not match"):
        assert step_of(store.load_newest()) == 15


def test_checkpoints__threads_take_turns(tmp_path: Path) -> None:
    stores = [CheckpointStore(tmp_path, keep=2), pickle.loads(pickle.dumps(CheckpointStore(tmp_path)))]
    with ThreadPoolExecutor(4) as pool:
        saved = [pool.submit(stores[k % 2].save, 7, {"step": 7, "weight": torch.ones(50_000)}) for k in range(20)]
        assert {one.result().name for one in saved} == {"step-0000007.pt"}
    assert set(contents(tmp_path)) == with_hashes("step-0000007.pt")


def test_checkpoints__a_signal_may_save_in_the_midst_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sync = CheckpointStore(tmp_path), os.fsync

    def save_and_end(*_: object) -> None:
        store.save(2, state(2))
        raise SystemExit(0)

    def interrupted(_: int) -> None:
        monkeypatch.setattr(os, "fsync", sync)
        signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, save_and_end)
    monkeypatch.setattr(os, "fsync", interrupted)
    try:
        with pytest.raises(SystemExit):
            store.save(np.int64(1), state(1))  # type: ignore[arg-type]  # an int of another kind
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert step_of(store.load_newest()) == 2


def test_checkpoints__what_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(1, state(1))
    before = contents(tmp_path)
    refusal(lambda: store.save(2, {"options": Namespace(lr=1)}), "got objects of argparse.Namespace, which", TypeError)
    assert contents(tmp_path) == before
    with torch.serialization.safe_globals([Namespace]):
        store.save(3, {"options": Namespace(lr=1)})
        assert store.load_newest() == {"options": Namespace(lr=1)}


def test_checkpoints__a_full_disk_is_named_with_the_file_and_the_space(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    store.save(1, state(1), best=True)
    before = contents(small_disk)
    with pytest.raises(OSError, match=r"2\.00 MB are needed, \d.* are free") as caught:
        store.save(2, {"step": 2, "student": {"weight": torch.zeros(500_000)}})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(small_disk / "step-0000002.pt"))
    assert contents(small_disk) == before
    half = {"step": 2, "student": {"weight": torch.zeros(150_000)}}
    with pytest.raises(OSError, match=r"0\.60 MB|601\.\d\d kB are needed") as caught:
        store.save(2, half, best=True)  # there is room for one, not for the best as well
    assert caught.value.filename == str(store.best)
    newest = store.load_newest()
    assert newest is not None
    assert (newest["step"], step_of(store.load_best())) == (2, 1)


def save_and_die(begun: Callable[[], object], folder: Path, moment: int) -> None:
    """Before the first rename, after it, before the second one, and so on."""
    begun()
    store = CheckpointStore(folder)
    store.save(1, state(1), best=True)
    store.save(2, state(2))
    real, moments = Path.replace, itertools.count(1)

    def reached() -> None:
        if next(moments) == moment:
            os._exit(9)

    def replace(path: Path, target: Path) -> Path:
        reached()
        moved = real(path, target)
        reached()
        return moved

    Path.replace = replace  # type: ignore[method-assign]
    store.save(2, {**state(2), "again": True}, best=True)


@pytest.mark.parametrize("moment", range(1, 9))
def test_checkpoints__a_kill_at_any_moment_leaves_whole_ones(tmp_path: Path, moment: int) -> None:
    process = fork(save_and_die, tmp_path, moment)
    process.join()
    assert process.exitcode == 9
    store = CheckpointStore(tmp_path)
    assert step_of(store.load_newest()) == 2  # without a warning
    assert step_of(store.load_best()) in {1, 2}
    store.save(3, state(3), best=True)
    assert set(contents(tmp_path)) == with_hashes("best.pt", "step-0000002.pt", "step-0000003.pt")


def test_checkpoints__what_killed_writers_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    left = ["step-0000007.pt.tmp.123", "best.pt.tmp.4", "best.pt.sha256.tmp.4", "step-0000009.pt.sha256"]
    mine = ["notes.tmp.1", "step-7.pt.tmp.old", "best.pt.tmp.d", "model.pt.sha256"]
    for name in [*left, *mine]:
        (tmp_path / name).touch()
    CheckpointStore(tmp_path).save(1, state(1))
    assert set(contents(tmp_path)) == {*mine} | with_hashes("step-0000001.pt")


def test_run_log__torn_and_damaged_lines_are_left_out_and_later_ones_cut(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "new" / "log.jsonl")
    assert log.read() == []
    log.cut(0)  # of a training that had not begun
    written = [{"step": step, "loss": step / 2} for step in range(1, 6)]
    for record in written:
        log.write(record)
    with log.path.open("ab") as file:
        file.write(b'{"step": 6, "lo')  # a crash in the middle of a line
    assert log.read() == written
    log.cut(3)
    for line in (b'{"step": 2, \xff', b"\x00\x00", b"[1]", b"7", b"{}", b"[" * 100_000, b""):
        with log.path.open("ab") as file:
            file.write(line + b"\n")
    log.write({"step": 4, "loss": 0.0})
    with pytest.warns(UserWarning, match=r"log\.jsonl: line [4-9] is damaged") as told:
        log.cut(5)
    assert len(told) == 6
    assert log.read() == [*written[:3], {"step": 4, "loss": 0.0}]


def test_run_log__a_record_after_a_torn_line_is_kept(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write({"step": 1})
    with log.path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    log.write({"step": 3})
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        log.cut(3)
    assert log.read() == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("record", [{}, {"step": None}, {"step": 1.5}, {"step": "1"}])
def test_run_log__a_record_without_a_step_is_refused(record: dict[str, object], tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    refusal(lambda: log.write(record), "`record` must have an integer `step`", ValueError)
    assert not log.path.exists()


def test_run_log__a_full_disk_names_the_file(small_disk: Path) -> None:
    log = RunLog(small_disk / "log.jsonl")
    log.write({"step": 1})
    with pytest.raises(OSError, match=r"2\.00 MB are needed") as caught:
        log.write({"step": 2, "text": "x" * 2_000_000})
    assert caught.value.filename == str(log.path)
    assert [record["step"] for record in log.read()] == [1]
    log.cut(1)
    assert log.path.read_text() == '{"step": 1}\n'
