"""The cache of decoded samples: the same bytes, whatever happens while it is built, and nothing else ever."""

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from crossmix.datasets import GTA5, CachedSamples, Cityscapes, DataError, Sample, StreetScenes, write_png
from crossmix.datasets import _cache_folder as cache_folder
from crossmix.engine import FolderLock, KeyedCrops

SIZE = (48, 80)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "PER_SHARD", 4)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten GTA5 pairs."""
    root = tmp_path_factory.mktemp("gta5")
    StreetScenes(10, size=(60, 100)).write(root, layout="gta5")
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "gta5"))


def build(samples: GTA5 | Cityscapes, folder: Path, **options: int) -> CachedSamples:
    return CachedSamples(samples, folder, progress=False, **options)


def assert_equal(got: Sample, want: Sample) -> None:
    assert got.name == want.name
    assert got.image.dtype == torch.uint8
    assert torch.equal(got.image, want.image)
    assert (got.label is None) == (want.label is None)
    if got.label is not None and want.label is not None:
        assert got.label.dtype == torch.uint8
        assert torch.equal(got.label, want.label)


def contents(folder: Path) -> dict[str, bytes]:
    """All but the name of who held the folder last, which stays when that process is killed."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock.holder"}


def flip(path: Path, position: int, bits: int = 1) -> None:
    """Change one byte and nothing that the file system tells of the file."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_crops__equal_the_uncached_ones_on_a_thousand_draws(root: Path, tmp_path: Path) -> None:
    samples = GTA5(root, size=SIZE)
    cached = build(samples, tmp_path / "cache")
    memory = [samples[i] for i in range(len(samples))]
    plain, quick = (KeyedCrops(source, (24, 32), seed=3, stream=1) for source in (memory, cached))
    for draw in range(1000):
        for got, want in zip(quick[draw], plain[draw], strict=True):
            assert got.dtype == want.dtype
            assert got.numpy().tobytes() == want.numpy().tobytes()
            assert got.stride() == want.stride()


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("labels", [True, False])
def test_samples__equal_the_readers(tmp_path: Path, size: tuple[int, int] | None, labels: bool) -> None:
    StreetScenes(5, size=(32, 64)).write(tmp_path / "data", layout="cityscapes", split="train")
    samples = Cityscapes(tmp_path / "data", size=size, labels=labels)
    write_png(samples.files[3].image, StreetScenes(1, size=(40, 72))[0].image)  # items may differ in size
    if labels:
        write_png(samples.files[3].label or "", torch.full((40, 72), 7, dtype=torch.uint8))
    for _ in range(2):
        cached = build(samples, tmp_path / "cache")
        assert len(cached) == 5
        for got, want in zip(cached, samples, strict=True):
            assert_equal(got, want)
        assert_equal(cached[-1], samples[4])
        with pytest.raises(IndexError):
            cached[5]


def test_samples__real_images(test_data: Path, tmp_path: Path) -> None:
    for size in (None, (512, 1024)):
        samples = Cityscapes(test_data / "cityscapes", "train", size=size)
        cached = build(samples, tmp_path / str(size))
        for i in (0, len(samples) - 1):
            assert_equal(cached[i], samples[i])


def test_samples__are_writable_and_private(root: Path, tmp_path: Path) -> None:
    samples = GTA5(root)
    cached = build(samples, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    sample = cached[1]
    sample.image.zero_()
    assert sample.label is not None
    sample.label.fill_(3)
    assert_equal(cached[1], samples[1])
    assert contents(tmp_path / "cache") == before
    # A worker sends storages as a whole: one that reached over the shard would be sent for each sample.
    assert sample.image.untyped_storage().nbytes() == 4 * 60 * 100


def test_workers__make_the_same_bytes(root: Path, tmp_path: Path) -> None:
    samples = GTA5(root, size=SIZE)
    for workers in (0, 1, 2):
        build(samples, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader__workers_read_it(root: Path, tmp_path: Path, context: str) -> None:
    samples = GTA5(root, size=SIZE)
    cached = build(samples, tmp_path / "cache")
    loader = DataLoader(cached, batch_size=None, num_workers=2, multiprocessing_context=context)
    for got, want in zip(loader, samples, strict=True):
        assert_equal(got, want)


def test_pickle__checks_anew(root: Path, tmp_path: Path) -> None:
    cached = build(GTA5(root), tmp_path / "cache")
    assert cached[0].image.shape == (3, 60, 100)
    flip(tmp_path / "cache" / "shard-00000.bin", 5)
    with pytest.raises(DataError, match="damaged"):
        pickle.loads(pickle.dumps(cached))[0]


def test_build__leaves_the_global_generator_alone(root: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    build(GTA5(root), tmp_path / "cache", workers=1)
    assert torch.equal(before, torch.get_rng_state())


class Slow(GTA5):
    """A reader whose samples take a while."""

    pause = 0.02

    def __getitem__(self, index: int) -> Sample:
        time.sleep(self.pause)
        return super().__getitem__(index)

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "reader": "GTA5"}  # the same samples


def start(samples: GTA5, folder: Path, workers: int) -> multiprocessing.process.BaseProcess:
    """Build in another process."""

    def work() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: waiting for them would never end
        build(samples, folder, workers=workers)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess) -> None:
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def stamps(folder: Path, pattern: str = "*") -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


@pytest.mark.parametrize("workers", [0, 2])
def test_kill__at_any_moment_a_build_goes_on_and_ends_the_same(root: Path, tmp_path: Path, workers: int) -> None:
    build(GTA5(root, size=SIZE), tmp_path / "whole")
    samples, folder = Slow(root, size=SIZE), tmp_path / "cache"
    samples.pause = 0.15  # the kill comes before the end on a busy machine too
    moments: dict[str, Callable[[], object]] = {
        "locked": (folder / ".lock").exists,
        "planned": (folder / "manifest.json").exists,
        "in the first shard": lambda: stamps(folder, "*.bin.tmp.*").keys() - before.keys(),
        "a shard without a record, or just with it": lambda: stamps(folder, "*.bin"),
        "some shards": lambda: len(stamps(folder, "shard-*.json")) >= 2,
    }
    finished: dict[str, int] = {}
    for moment in moments.values():
        before = stamps(folder)
        process = start(samples, folder, workers)
        wait_until(moment)
        kill(process)
        assert finished.items() <= stamps(folder, "shard-*.json").items()  # what was finished is not built again
        finished = stamps(folder, "shard-*.json")
    assert finished
    cached = build(samples, folder)
    assert finished.items() <= stamps(folder).items()
    assert contents(folder) == contents(tmp_path / "whole")
    for got, want in zip(cached, GTA5(root, size=SIZE), strict=True):
        assert_equal(got, want)


@pytest.mark.parametrize("workers", [0, 2])
def test_kill__again_and_again_until_it_is_built(root: Path, tmp_path: Path, workers: int) -> None:
    samples, folder = Slow(root, size=SIZE), tmp_path / "cache"
    for i in range(60):
        process = start(samples, folder, workers)
        process.join(0.02 + 0.011 * i)
        process.kill()
        process.join(60)
        if process.exitcode == 0:  # it had ended before
            break
        assert process.exitcode == -signal.SIGKILL
    assert process.exitcode == 0
    build(GTA5(root, size=SIZE), tmp_path / "whole")
    build(samples, folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_kill__workers_end_too(root: Path, tmp_path: Path) -> None:
    samples, folder = Slow(root, size=SIZE), tmp_path / "cache"
    samples.pause = 0.2
    process = start(samples, folder, workers=2)
    wait_until(lambda: len(stamps(folder, "*.bin.tmp.*")) == 2)
    kill(process)
    wait_until(lambda: not stamps(folder, "*.tmp.*"))
    time.sleep(1)
    assert stamps(folder).keys() == {
        ".lock",
        ".lock.holder",
        "manifest.json",
    }  # or they would have gone on to the shards' ends


def test_kill__workers_that_are_left_do_no_harm(root: Path, tmp_path: Path) -> None:
    samples, folder = Slow(root, size=SIZE), tmp_path / "cache"
    samples.pause = 0.2
    process = start(samples, folder, workers=2)
    wait_until(lambda: len(stamps(folder, "*.bin.tmp.*")) == 2)
    kill(process)
    build(GTA5(root, size=SIZE), folder)  # they have not noticed yet
    before = stamps(folder)
    time.sleep(1)
    assert stamps(folder) == before
    assert not stamps(folder, "*.tmp.*")


@pytest.mark.parametrize("workers", [0, 1])
def test_lock__processes_at_once_build_one_cache(root: Path, tmp_path: Path, workers: int) -> None:
    samples, folder = Slow(root, size=SIZE), tmp_path / "cache"
    processes = [start(samples, folder, workers) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    build(GTA5(root, size=SIZE), tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_lock__waiting_is_told(root: Path, tmp_path: Path) -> None:
    build(GTA5(root), tmp_path / "whole")
    folder = tmp_path / "cache"
    folder.mkdir()
    code = f"""
from crossmix.datasets import GTA5, CachedSamples, _cache_folder
_cache_folder.PER_SHARD = 4
CachedSamples(GTA5({str(root)!r}), {str(folder)!r})
"""
    with contextlib.ExitStack() as stack:
        stack.enter_context(held := contextlib.ExitStack())
        held.enter_context(FolderLock(folder))
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            told = process.stderr.readline()
            assert told.startswith(f"{folder}: is in use by process {os.getpid()} on ")
            assert told.endswith("; waiting for it\n")
            for path in sorted((tmp_path / "whole").iterdir(), key=lambda path: path.suffix != ".bin"):
                if path.name != ".lock":  # whole files, as a build leaves them, those that say so last
                    shutil.copy2(path, tmp_path / "aside")
                    (tmp_path / "aside").replace(folder / path.name)
            held.close()
            assert not process.stderr.read()  # it built nothing
    assert process.returncode == 0


def test_lock__says_so_where_there_is_none(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    with pytest.warns(UserWarning, match=r"cache: its file system has no locks .* only one process uses this folder"):
        build(GTA5(root), tmp_path / "cache")


@pytest.mark.parametrize("kind", ["manifest.json", "shard-00001.json"])
def test_damage__every_flipped_byte_of_json_is_noticed_on_opening(root: Path, tmp_path: Path, kind: str) -> None:
    samples = GTA5(root, size=SIZE)
    build(samples, tmp_path / "cache")
    path = tmp_path / "cache" / kind
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        flip(path, position, 1 << position % 8)
        with pytest.raises(DataError, match=rf"{kind}: its contents do not match its sha256.*delete"):
            build(samples, tmp_path / "cache")
        path.write_bytes(whole)
    path.unlink()  # the way out that the message names
    build(samples, tmp_path / "cache")
    assert path.read_bytes() == whole


def test_damage__every_flipped_byte_of_pixels_is_noticed_on_reading(root: Path, tmp_path: Path) -> None:
    samples = GTA5(root, size=SIZE)
    build(samples, tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00001.bin"
    whole, item = path.read_bytes(), 4 * SIZE[0] * SIZE[1]
    for position in (0, item - 1, item, len(whole) // 2, len(whole) - 1, *range(7, len(whole), 4999)):
        flip(path, position, 1 << position % 8)
        cached = build(samples, tmp_path / "cache")
        for i in range(10):
            if i == 4 + position // item:
                with pytest.raises(DataError, match=r"shard-00001\.bin: the bytes of sample '\d+' are damaged; delete"):
                    cached[i]
            else:
                assert_equal(cached[i], samples[i])
        path.write_bytes(whole)
    flip(path, 17)
    path.with_suffix(".json").unlink()  # the way out that the message names
    build(samples, tmp_path / "cache")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("count", [-1, 1])
def test_damage__a_shard_of_another_length_is_noticed_on_opening(root: Path, tmp_path: Path, count: int) -> None:
    build(GTA5(root), tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00002.bin"
    data = path.read_bytes()
    path.write_bytes(data[:count] if count < 0 else data + b"\0")
    with pytest.raises(DataError, match=rf"shard-00002\.bin: expected {len(data)} bytes, got {len(data) + count}"):
        build(GTA5(root), tmp_path / "cache")


def test_damage__a_shard_cut_off_after_opening(root: Path, tmp_path: Path) -> None:
    cached = build(GTA5(root), tmp_path / "cache")
    path = tmp_path / "cache" / "shard-00000.bin"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"shard-00000\.bin: cannot be read"):
        cached[0]


def test_partial__lost_shards_are_built_again_and_only_they(root: Path, tmp_path: Path) -> None:
    samples = GTA5(root)
    build(samples, tmp_path / "cache")
    whole = contents(tmp_path / "cache")
    (tmp_path / "cache" / "shard-00001.bin").unlink()
    before = stamps(tmp_path / "cache")
    build(samples, tmp_path / "cache")
    assert contents(tmp_path / "cache") == whole
    new = {name for name, stamp in stamps(tmp_path / "cache").items() if before.get(name) != stamp}
    assert new == {"shard-00001.bin", "shard-00001.json"}


def test_partial__a_shard_of_another_cache_is_refused(root: Path, tmp_path: Path) -> None:
    build(GTA5(root), tmp_path / "cache")
    build(GTA5(root, size=SIZE), tmp_path / "other")
    for name in ("shard-00001.bin", "shard-00001.json"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "cache" / name)
    with pytest.raises(DataError, match=r"shard-00001\.json: belongs to another cache; delete"):
        build(GTA5(root), tmp_path / "cache")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("change", ["mtime", "size", "label"])
def test_stale__a_source_that_changed(root: Path, tmp_path: Path, change: str, complete: bool) -> None:
    samples = GTA5(root)
    build(samples, tmp_path / "cache")
    whole = contents(tmp_path / "cache")
    if not complete:
        (tmp_path / "cache" / "shard-00000.json").unlink()
    files = samples.files[5]
    path = files.label if change == "label" else files.image
    assert path is not None
    stat = path.stat()
    if change == "mtime":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=rf"{path}: has changed since it was cached .*; delete .*shard-00001\.json"):
        build(GTA5(root), tmp_path / "cache")
    assert (tmp_path / "cache" / "shard-00000.json").exists() is complete  # refused before building
    (tmp_path / "cache" / "shard-00001.json").unlink()  # the way out that the message names
    build(GTA5(root), tmp_path / "cache")
    now = contents(tmp_path / "cache")
    assert {name for name in whole if now[name] != whole[name]} == {"shard-00001.json"}


def test_stale__a_source_that_is_gone(root: Path, tmp_path: Path) -> None:
    samples = GTA5(root)
    build(samples, tmp_path / "cache")
    samples.files[9].image.unlink()
    with pytest.raises(DataError, match=r"00010\.png: cannot be read \(No such file"):
        build(samples, tmp_path / "cache")


def test_stale__other_parameters_or_files(root: Path, tmp_path: Path) -> None:
    build(GTA5(root, size=SIZE), tmp_path / "cache")
    with pytest.raises(DataError, match=r"its reader is .*\[48, 80\].*, this one's .*None.*; choose another folder"):
        build(GTA5(root), tmp_path / "cache")
    with pytest.raises(DataError, match=r"its reader is .*\[48, 80\].*, this one's .*\[80, 48\]"):
        build(GTA5(root, size=(80, 48)), tmp_path / "cache")
    for kind in ("images", "labels"):
        shutil.copy(root / kind / "00010.png", root / kind / "00011.png")
    with pytest.raises(DataError, match=r"has 10 samples, there are 11 now, and sample 10 was nothing, is \['00011'"):
        build(GTA5(root, size=SIZE), tmp_path / "cache")
    for name in ("00011.png", "00003.png"):
        for kind in ("images", "labels"):
            (root / kind / name).unlink()
    with pytest.raises(DataError, match=r"there are 9 now, and sample 2 was \['00003', .*, is \['00004'"):
        build(GTA5(root, size=SIZE), tmp_path / "cache")


def test_stale__labels_or_none(tmp_path: Path) -> None:
    StreetScenes(2, size=(32, 64)).write(tmp_path / "data", layout="cityscapes", split="train")
    build(Cityscapes(tmp_path / "data"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"sample 0 was .*labelIds\.png'\], is .*None\]"):
        build(Cityscapes(tmp_path / "data", labels=False), tmp_path / "cache")


def test_stale__another_format(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(GTA5(root), tmp_path / "cache")
    monkeypatch.setattr(cache_folder, "FORMAT", 2)
    with pytest.raises(DataError, match="its format is 1, this one's 2"):
        build(GTA5(root), tmp_path / "cache")


def test_moved__cache_and_sources_may_be(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = GTA5(root)
    want = [samples[i] for i in range(10)]
    build(samples, root / "cache")
    root.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(cache_folder.CacheFolder, "build", None)  # nothing may be built
    monkeypatch.chdir(tmp_path / "elsewhere")
    for here in (tmp_path / "elsewhere", Path()):
        for got, one in zip(build(GTA5(here), here / "cache"), want, strict=True):
            assert_equal(got, one)


@pytest.mark.parametrize("name", ["holiday.jpg", "shard-00000.tar", "x.tmp.1"])
def test_foreign__a_folder_that_holds_anything_else_is_left_alone(root: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("mine")
    with pytest.raises(DataError, match=rf"mine: holds '{name}', which is no file of a cache; choose a folder"):
        build(GTA5(root), folder)
    assert contents(folder) == {name: b"mine"}


def test_foreign__somebody_elses_manifest_is_left_alone(root: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "app"}))
    with pytest.raises(DataError, match=r"manifest\.json: its contents do not match .* if this folder is a cache"):
        build(GTA5(root), tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"name": "app"}


def test_foreign__a_file_where_the_folder_should_be(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(DataError, match=r"cache: is no folder that can be read \(Not a directory\)"):
        build(GTA5(root), tmp_path / "cache")


Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil's


def test_room__is_checked_to_the_byte_and_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = GTA5(root)
    need = 10 * 4 * 60 * 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, need - 1))
    with pytest.raises(DataError, match=r"cache: the cache needs 240\.00 kB more, 240\.00 kB are free; make room"):
        build(samples, tmp_path / "cache")
    assert contents(tmp_path / "cache") == {".lock": b""}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, need))
    CachedSamples(samples, tmp_path / "cache")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"{tmp_path / 'cache'}: the cache needs 240.00 kB more, 240.00 kB are free"
    assert told[-1].startswith(f"{tmp_path / 'cache'}: 10 of 10 cached, ")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.bin")) == need
    (tmp_path / "cache" / "shard-00002.json").unlink()  # the last two samples
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 2 * 4 * 60 * 100))
    build(samples, tmp_path / "cache")


def test_progress__a_bar_on_a_terminal(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    CachedSamples(GTA5(root), tmp_path / "cache")
    assert "caching in cache: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_write__a_full_disk_is_told_and_finished_shards_are_kept(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    samples = GTA5(root)
    synchronise, calls = os.fsync, []

    def fail_third(handle: int) -> None:
        calls.append(handle)
        if (
            len(calls) == 7
        ):  # manifest (in the main process), bytes and record of a shard, the next one's bytes; and folders
            raise OSError(28, "No space left on device")
        synchronise(handle)

    monkeypatch.setattr(os, "fsync", fail_third)
    with pytest.raises(
        DataError, match=r"shard-0000.\.bin: cannot be written: No space left on device \(.* are free\); make room"
    ):
        build(samples, tmp_path / "cache", workers=workers)
    monkeypatch.undo()
    monkeypatch.setattr(cache_folder, "PER_SHARD", 4)
    assert {"shard-00000.bin", "shard-00000.json"} <= contents(tmp_path / "cache").keys()
    assert not list((tmp_path / "cache").glob("*.tmp.*"))
    build(samples, tmp_path / "cache")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only__as_the_system_has_it(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o555)
    with pytest.raises(DataError, match=r"cannot be written \(Permission denied\)"):
        build(GTA5(root), folder)


def test_read_only__a_complete_cache_serves_and_another_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = GTA5(root)
    build(samples, tmp_path / "cache")
    opened = os.open

    def read_only(path: object, flags: int, *rest: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    assert_equal(build(samples, tmp_path / "cache")[2], samples[2])
    (tmp_path / "cache" / "shard-00000.json").unlink()
    with pytest.raises(DataError, match=r"is not a complete cache and cannot be written \(Permission denied\); choose"):
        build(samples, tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 1])
def test_build__a_broken_source_is_named_and_what_is_built_kept(root: Path, tmp_path: Path, workers: int) -> None:
    samples = GTA5(root)
    path = samples.files[6].image
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    with pytest.raises(DataError, match=rf"^{path}: "):
        build(samples, tmp_path / "cache", workers=workers)
    assert (tmp_path / "cache" / "shard-00000.json").exists()
    assert not (tmp_path / "cache" / "shard-00001.json").exists()
    path.write_bytes(whole)
    assert_equal(build(samples, tmp_path / "cache", workers=workers)[6], samples[6])


def test_build__a_reader_that_returns_something_else_is_refused(root: Path, tmp_path: Path) -> None:
    class Floats(GTA5):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return sample._replace(image=sample.image.float())

    with pytest.raises(DataError, match=r"00001: expected an image .*, got \(3, 60, 100\) torch\.float32, \(60, 100\)"):
        build(Floats(root), tmp_path / "cache")


def test_arguments(tmp_path: Path, root: Path) -> None:
    with pytest.raises(TypeError, match="must be a reader of image files such as GTA5, got StreetScenes"):
        CachedSamples(StreetScenes(2), tmp_path / "cache")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`workers` must not be negative, got -1"):
        build(GTA5(root), tmp_path / "cache", workers=-1)
    assert not (tmp_path / "cache").exists()
