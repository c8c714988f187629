"""The cache of decoded samples: the reader's bytes or an error, whatever happens to files and processes."""

import errno
import itertools
import os
import pickle
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from checks import refusal
from crossmix.datasets import (
    GTA5,
    CachedSamples,
    Cityscapes,
    Sample,
    SegmentationFolder,
    StreetScenes,
    cache,
    write_png,
)
from crossmix.engine import FolderLock, KeyedCrops
from oracles import flipped
from runs import fork

SIZE = (48, 80)
FILES = ["samples-00000.bin", "samples-00001.bin", "samples-00002.bin"]  # of 4, 4 and 2 samples


@pytest.fixture(scope="module", autouse=True)
def small_files() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "PER_FILE", 4)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten GTA5 pairs."""
    root = tmp_path_factory.mktemp("gta5")
    StreetScenes(10, size=(60, 100)).write(root, layout="gta5")
    return root


@pytest.fixture(scope="module")
def samples(written: Path) -> GTA5:
    return GTA5(written, size=SIZE)


@pytest.fixture(scope="module")
def whole(samples: GTA5, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a cache of them holds that was built undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    build(samples, folder)
    return contents(folder)


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "gta5"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def build(samples: Any, folder: Path, **options: int) -> CachedSamples:
    return CachedSamples(samples, folder, progress=False, **options)


def assert_equal(got: Sample, want: Sample) -> None:
    assert got.name == want.name
    for one, other in zip(got[:2], want[:2], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)  # the dtype too


def contents(folder: Path) -> dict[str, bytes]:
    """All but the name of who held the folder last, which stays when that process is killed."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock.holder"}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.bin*")}


def start(work: Callable[[], object]) -> BaseProcess:
    return fork(lambda begun: (begun(), work()))


def test_crops__equal_the_uncached_ones_on_a_thousand_draws(samples: GTA5, folder: Path) -> None:
    memory = [samples[i] for i in range(len(samples))]
    plain, quick = (KeyedCrops(source, (24, 32), seed=3, stream=1) for source in (memory, build(samples, folder)))
    for draw in range(1000):
        for got, want in zip(quick[draw], plain[draw], strict=True):
            assert (got.dtype, got.stride()) == (want.dtype, want.stride())
            assert got.numpy().tobytes() == want.numpy().tobytes()


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize("labels", [True, False])
def test_samples__equal_the_readers(tmp_path: Path, folder: Path, size: tuple[int, int] | None, labels: bool) -> None:
    StreetScenes(5, size=(32, 64)).write(tmp_path / "data", layout="cityscapes", split="train")
    samples = Cityscapes(tmp_path / "data", size=size, labels=labels)
    write_png(samples.files[3].image, StreetScenes(1, size=(40, 72))[0].image)  # samples may differ in size
    if labels:
        write_png(samples.files[3].label, torch.full((40, 72), 7, dtype=torch.uint8))
    for _ in ("built", "opened"):
        cached = build(samples, folder)
        assert len(cached) == 5
        for got, want in zip(cached, samples, strict=True):
            assert_equal(got, want)
        assert_equal(cached[-1], samples[4])
        with pytest.raises(IndexError):
            cached[5]


def test_samples__are_writable_and_private(samples: GTA5, folder: Path) -> None:
    cached = build(samples, folder)
    before = contents(folder)
    sample = cached[1]
    sample.image.zero_()
    sample.label.fill_(3)
    assert_equal(cached[1], samples[1])
    assert contents(folder) == before
    # A worker sends storages as a whole: one that reached over the file would be sent for each sample.
    assert sample.image.untyped_storage().nbytes() == 4 * SIZE[0] * SIZE[1]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader__workers_read_it(samples: GTA5, folder: Path, context: str) -> None:
    loader = DataLoader(build(samples, folder), batch_size=None, num_workers=2, multiprocessing_context=context)
    for got, want in zip(loader, samples, strict=True):
        assert_equal(got, want)


def test_pickle__is_small_and_checks_anew(samples: GTA5, folder: Path) -> None:
    cached = build(samples, folder)
    assert_equal(cached[0], samples[0])
    pickled = pickle.dumps(cached)
    assert len(pickled) < 400 + 100 * len(cached)  # no pixels, no sources
    flip(folder / FILES[0], 5)
    refusal(lambda: pickle.loads(pickled)[0], "damaged")


@pytest.mark.parametrize("workers", [1, 2])
def test_workers__make_the_same_bytes_and_draw_nothing(
    samples: GTA5, whole: dict[str, bytes], folder: Path, workers: int
) -> None:
    before = torch.get_rng_state()
    build(samples, folder, workers=workers)
    assert contents(folder) == whole
    assert torch.equal(before, torch.get_rng_state())


def test_kill__at_every_step_ends_the_same(samples: GTA5, whole: dict[str, bytes], tmp_path: Path) -> None:
    survived = set()
    for steps in itertools.count():
        folder = tmp_path / f"killed after {steps}"
        process = start(partial(build_and_die, samples, folder, steps))
        process.join()
        if process.exitcode == 0:  # there are fewer steps
            break
        assert process.exitcode == -signal.SIGKILL
        finished = {name: stamp for name, stamp in stamps(folder).items() if name in FILES}
        build(samples, folder)
        assert finished.items() <= stamps(folder).items()  # what was finished is not built again
        assert contents(folder) == whole
        survived.add(len(finished))
    assert survived == {0, 1, 2, 3}
    assert steps > 30


def build_and_die(samples: GTA5, folder: Path, steps: int) -> None:
    """Build until so many things have been done to files in the folder, or samples read."""
    left = itertools.count(steps, -1)

    def step(*_: object) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        changes = {"open", "os.mkdir", "os.remove", "os.rename", "os.listdir", "os.scandir"}
        if event in changes and str(arguments[0]).startswith(str(folder)):
            step()

    sys.addaudithook(hook)
    fsync, read = os.fsync, GTA5.__getitem__
    os.fsync = lambda handle: (step(), fsync(handle))[1]  # type: ignore[assignment]
    GTA5.__getitem__ = lambda self, index: (step(), read(self, index))[1]  # type: ignore[method-assign]
    build(samples, folder)


class Held(GTA5):
    """A reader that tells when it is at a sample, and waits there until it is let go."""

    def __init__(self, root: Path, index: int | None = None) -> None:
        super().__init__(root, size=SIZE)
        self.index = index
        (self.told, self.tell), (self.wait, self.let_go) = os.pipe(), os.pipe()

    def __getitem__(self, index: int) -> Sample:
        if index == self.index or (self.index is None and get_worker_info()):
            os.write(self.tell, b".")
            os.read(self.wait, 1)
        return super().__getitem__(index)

    def fingerprint(self) -> dict[str, Any]:
        return {**super().fingerprint(), "reader": "GTA5"}  # the same samples


def test_kill__workers_end_too(samples: GTA5, whole: dict[str, bytes], folder: Path) -> None:
    held = Held(samples.root)
    process = start(lambda: build(held, folder, workers=2))
    os.close(held.tell)
    for _ in range(2):  # both are in the midst of a file
        assert os.read(held.told, 1) == b"."
    assert len(list(folder.glob("*.tmp.*"))) == 2
    process.kill()
    while os.read(held.told, 1):  # ends when nobody is left who could tell
        pass
    process.join()
    assert not list(folder.glob("*.bin"))
    build(samples, folder)
    assert contents(folder) == whole


def test_kill__a_worker_that_is_left_does_no_harm(samples: GTA5, whole: dict[str, bytes], folder: Path) -> None:
    folder.mkdir()
    held = Held(samples.root, 5)
    process = start(lambda: cache._Cache(held, folder)[1])
    assert os.read(held.told, 1) == b"."
    build(samples, folder)
    before = stamps(folder)
    os.write(held.let_go, b".")
    process.join()
    assert process.exitcode == 0
    assert stamps(folder) == before
    assert contents(folder) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_lock__processes_build_one_cache(samples: GTA5, whole: dict[str, bytes], folder: Path, workers: int) -> None:
    held = Held(samples.root, 0)
    processes = [start(lambda: build(held, folder, workers=workers)) for _ in range(3)]
    os.close(held.tell)
    os.write(held.let_go, b"." * 9)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(os.read(held.told, 9)) == 2  # the first sample was read to find out its size, and to be kept
    assert contents(folder) == whole


def hold(held: Callable[[], object], folder: Path) -> None:
    with FolderLock(folder):
        held()
        time.sleep(0.3)


def test_lock__waiting_is_reported(samples: GTA5, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = fork(hold, folder)
    CachedSamples(samples, folder)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith(f"{folder}: is in use by process {process.pid} on ")
    assert line.endswith("; waiting for it")


def test_lock__what_another_process_has_finished_meanwhile_is_taken(
    samples: GTA5, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = FolderLock.__enter__

    def after_another(lock: FolderLock) -> FolderLock:
        monkeypatch.undo()
        build(samples, folder)
        before.update(stamps(folder))
        return entered(lock)

    before: dict[str, tuple[int, int]] = {}
    monkeypatch.setattr(FolderLock, "__enter__", after_another)
    assert_equal(build(samples, folder)[0], samples[0])
    after = stamps(folder)
    assert {name: after[name] for name in FILES} == {name: before[name] for name in FILES}


Usage = namedtuple("Usage", "total used free")  # noqa: PYI024 - as shutil's


@pytest.mark.parametrize("size", [None, SIZE])
@pytest.mark.parametrize(
    ("read", "planes"),
    [
        (lambda root, size: GTA5(root, size=size), 4),
        (lambda root, size: GTA5(root, size=size, labels=False), 3),
        (lambda root, size: SegmentationFolder(root / "images", size=size), 4),  # it makes labels
    ],
    ids=["labelled", "unlabelled", "label made"],
)
def test_room__is_checked_to_the_byte_and_reported(
    written: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    read: Callable[[Path, tuple[int, int] | None], Any], planes: int, size: tuple[int, int] | None,
) -> None:  # fmt: skip
    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, count))

    samples = read(written, size)
    height, width = size or (60, 100)
    need = 10 * planes * height * width
    text = f"cache: the cache needs {need / 1000:.2f} kB more, {need / 1000:.2f} kB are free"
    free(need - 1)
    refusal(lambda: build(samples, folder), f"{text}; free some")
    assert contents(folder) == {".lock": b""}
    free(need)
    CachedSamples(samples, folder)
    assert capsys.readouterr().err == f"{folder.parent}/{text}\n"
    assert 0 < sum(path.stat().st_size for path in folder.glob("*.bin")) - need < 10_000  # the records
    (folder / FILES[2]).unlink()
    free(need // 5)  # two of ten samples
    build(samples, folder)


def test_progress__is_a_bar(
    written: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    CachedSamples(GTA5(written), folder)
    told = capsys.readouterr().err
    assert all(text in told for text in ("caching in cache: 100%", "10/10"))


@pytest.mark.parametrize("workers", [0, 1])
def test_write__a_full_disk_keeps_what_is_finished(
    written: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    calls = itertools.count()

    def fail_third(_: int) -> None:
        if next(calls) == 2:  # after the first file and its folder
            raise OSError(errno.ENOSPC, "No space left on device")

    full = rf"{FILES[1]}: cannot be written: No space left .* are free\); free some"
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail_third)
        refusal(lambda: build(GTA5(written), folder, workers=workers), full)
    there = contents(folder).keys() - {FILES[2]}  # which a worker may have begun before it is told to stop
    assert there == {".lock", FILES[0]}
    build(GTA5(written), folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_build__a_broken_source_is_named_and_what_is_finished_is_kept(root: Path, folder: Path, workers: int) -> None:
    samples = GTA5(root)
    path = samples.files[6].image
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    refusal(lambda: build(samples, folder, workers=workers), rf"^{path}: ")
    assert FILES[0] in contents(folder)
    assert FILES[1] not in contents(folder)
    path.write_bytes(whole)
    assert_equal(build(samples, folder, workers=workers)[6], samples[6])


class Floats(GTA5):
    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return sample._replace(image=sample.image.float())


def test_arguments(written: Path, folder: Path) -> None:
    gta5, bare = GTA5(written), GTA5(written, images=False)
    refusal(lambda: build(StreetScenes(2), folder), "a reader of image files such as GTA5, got StreetScenes", TypeError)
    bare_files = SimpleNamespace(files=gta5.files)
    refusal(lambda: build(bare_files, folder), "a reader of image files such as GTA5, got SimpleNamespace", TypeError)
    refusal(lambda: build(gta5, folder, workers=-1), "`workers` must not be negative, got -1", ValueError)
    refusal(lambda: build(bare, folder), "`samples` must have images", ValueError)
    assert not folder.exists()
    wrong = r"00001: expected uint8 .*, got \(3, 60, 100\) torch\.float32, \(60, 100\)"
    refusal(lambda: build(Floats(written), folder), wrong)
    (file := folder.with_name("file.bin")).touch()
    refusal(lambda: build(gta5, file), r"file\.bin: cannot be listed \(Not a directory\)")


def flip(path: Path, position: int, bits: int = 1) -> None:
    """Change one byte and nothing that the file system tells of the file."""
    stat = path.stat()
    path.write_bytes(flipped(path.read_bytes(), position, bits))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_damage__a_flipped_byte_is_noticed_before_it_is_used(samples: GTA5, folder: Path) -> None:
    build(samples, folder)
    path = folder / FILES[1]
    whole, item = path.read_bytes(), 4 * SIZE[0] * SIZE[1]
    pixels = 4 * item  # then the record, its length, and its sha256
    edges = {0, item - 1, item, pixels - 1, pixels, *range(len(whole) - 41, len(whole))}
    damaged = rf"{FILES[1]}: is cut off or damaged; delete {path} and open the cache"
    for position in edges | {*range(7, pixels, 4999)} | {*range(pixels, len(whole), 17)}:
        flip(path, position, 1 << position % 8)
        if position >= pixels:
            refusal(lambda: build(samples, folder), damaged)
        else:
            cached, broken = build(samples, folder), 4 + position // item
            refusal(partial(cached.__getitem__, broken), rf"{FILES[1]}: the bytes of sample '\d+' are damaged; delete")
            for i in {*range(10)} - {broken}:
                assert_equal(cached[i], samples[i])
        path.write_bytes(whole)


@pytest.mark.parametrize("length", [-1, 1, -(10**9)])
def test_damage__a_file_of_another_length(samples: GTA5, whole: dict[str, bytes], folder: Path, length: int) -> None:
    build(samples, folder)
    before = stamps(folder)
    path = folder / FILES[1]
    path.write_bytes(path.read_bytes() + b"\0" if length > 0 else path.read_bytes()[:length])
    refusal(lambda: build(samples, folder), rf"{FILES[1]}: is cut off or damaged; delete {path} and open the cache")
    path.unlink()
    build(samples, folder)
    assert contents(folder) == whole
    assert {name for name, stamp in stamps(folder).items() if before[name] != stamp} == {FILES[1]}


@pytest.mark.parametrize(("number", "rebuilt"), [(0, "4 samples"), (1, "4 samples"), (2, "1 sample")])
def test_damage__says_how_many_samples_are_rebuilt(root: Path, folder: Path, number: int, rebuilt: str) -> None:
    (root / "names.txt").write_text("\n".join(f"{i:05d}" for i in range(1, 10)))
    samples = GTA5(root, size=SIZE, names=root / "names.txt")
    cached, path = build(samples, folder), folder / FILES[number]
    advice = rf"; delete {path} and open the cache again, which rebuilds its {rebuilt}\."
    flip(path, 0)
    refusal(lambda: cached[4 * number], "are damaged" + advice)
    path.write_bytes(path.read_bytes()[:-1])
    refusal(lambda: build(samples, folder), "is cut off or damaged" + advice)
    path.unlink()
    refusal(lambda: cached[4 * number], advice)


def test_damage__a_file_cut_off_or_lost_after_opening(samples: GTA5, folder: Path) -> None:
    cached = build(samples, folder)
    path = folder / FILES[0]
    path.write_bytes(path.read_bytes()[:100])
    refusal(lambda: cached[0], rf"{FILES[0]}: cannot be read")
    path.unlink()
    refusal(lambda: cached[0], rf"{FILES[0]}: cannot be read")


def test_damage__a_file_that_may_not_be_read(samples: GTA5, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(samples, folder)
    opened = Path.open

    def refused(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == FILES[0]:
            raise PermissionError(errno.EACCES, "no permission", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    refusal(lambda: CachedSamples(samples, folder), rf"{FILES[0]}: cannot be read \(no permission\)")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("change", ["mtime", "size", "label"])
def test_stale__a_source_that_changed(root: Path, folder: Path, change: str, complete: bool) -> None:
    samples = GTA5(root)
    build(samples, folder)
    whole = contents(folder)
    if not complete:
        (folder / FILES[0]).unlink()
    path = samples.files[5].label if change == "label" else samples.files[5].image
    stat = path.stat()
    if change != "mtime":
        path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "mtime")))
    changed = rf"{path}: has changed since it was cached .*; delete .*{FILES[1]} and open"
    refusal(lambda: build(GTA5(root), folder), changed)
    assert (folder / FILES[0]).exists() is complete  # refused before building
    (folder / FILES[1]).unlink()
    build(GTA5(root), folder)
    assert contents(folder).keys() == whole.keys()


def test_stale__times_in_whole_seconds_are_those_of_a_copy(root: Path, folder: Path) -> None:
    """As `tar` leaves them, whichever of cache and sources it moved first."""
    paths = [path for files in GTA5(root).files for path in files[:2]]
    for before, after, same in ((7, 0, True), (0, 7, True), (7, 8, False), (0, 10**9, False), (7, -1, False)):
        shutil.rmtree(folder, ignore_errors=True)
        for path in paths:
            os.utime(path, ns=(0, 10**18 + before))
        build(GTA5(root), folder)
        for path in paths:
            os.utime(path, ns=(0, 10**18 + after))
        if same:
            build(GTA5(root), folder)
        else:
            refusal(lambda: build(GTA5(root), folder), "has changed since it was cached")
    for path in paths:
        os.utime(path, ns=(0, 10**18))
    build(GTA5(root), folder)
    paths[0].write_bytes(paths[0].read_bytes() + b"\0")
    os.utime(paths[0], ns=(0, 10**18))
    refusal(lambda: build(GTA5(root), folder), "has changed since it was cached")  # its size, too


def test_stale__several_files_are_told_at_once(root: Path, folder: Path) -> None:
    build(GTA5(root), folder)
    for path in (root / "images").iterdir():
        os.utime(path, ns=(0, 7))
    many = rf"has changed since .*; so have sources of 2 more files of the cache; delete {folder} to build it anew"
    refusal(lambda: build(GTA5(root), folder), many)
    shutil.rmtree(folder)
    build(GTA5(root), folder)


def more(root: Path) -> GTA5:
    for kind in ("images", "labels"):
        shutil.copy2(root / kind / "00010.png", root / kind / "00011.png")
    return GTA5(root, size=SIZE)


def others(root: Path) -> GTA5:
    more(root)
    for kind in ("images", "labels"):
        (root / kind / "00003.png").unlink()
    return GTA5(root, size=SIZE)


def gone(root: Path) -> GTA5:
    data = GTA5(root, size=SIZE)
    (root / "images" / "00003.png").unlink()
    return data


OTHER = "cache: is a cache of other samples: its"


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (lambda root: GTA5(root, size=SIZE[::-1]),
         rf"{OTHER} reader is .*\[48, 80\].*, not .*\[80, 48\].*; choose another"),
        (lambda root: GTA5(root, size=SIZE, labels=False),
         rf"{OTHER} sample 0 is .*'labels/00001\.png'\], not \['00001', "),
        (more, rf"{OTHER} number of samples is 10, not 11"),
        (others, rf"{OTHER} sample 2 is \['00003', .*\], not \['00004', .*\]"),
        (gone, r"images/00003\.png: cannot be read .*; restore the file"),
    ],
    ids=["size", "labels", "more", "others", "gone"],
)  # fmt: skip
def test_other__samples_are_refused(root: Path, folder: Path, now: Callable[[Path], GTA5], message: str) -> None:
    build(GTA5(root, size=SIZE), folder)
    samples = now(root)
    refusal(lambda: build(samples, folder), message)
    before = stamps(folder)
    refusal(lambda: CachedSamples.check(samples, folder), message)
    (folder / FILES[-1]).unlink()  # as if it were not complete
    before.pop(FILES[-1])
    refusal(lambda: CachedSamples.check(samples, folder), message)
    assert stamps(folder) == before


def test_check__takes_what_can_be_opened_and_builds_nothing(
    samples: GTA5, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not CachedSamples.check(samples, folder)
    assert not folder.exists()
    build(samples, folder)
    monkeypatch.setattr(cache._Cache, "build", None)
    assert CachedSamples.check(samples, folder)
    (folder / FILES[0]).unlink()
    assert not CachedSamples.check(samples, folder)
    refusal(lambda: CachedSamples.check(StreetScenes(2), folder), "a reader of image files such as GTA5", TypeError)


def test_other__format_is_refused(samples: GTA5, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(samples, folder)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    refusal(lambda: build(samples, folder), f"{OTHER} format is {cache.FORMAT - 1}, not {cache.FORMAT}")


@pytest.mark.parametrize("name", FILES[:2])
def test_other__a_file_of_another_cache_or_place(written: Path, tmp_path: Path, folder: Path, name: str) -> None:
    build(GTA5(written), folder)
    build(GTA5(written, size=SIZE), tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, folder / name)
    refusal(lambda: build(GTA5(written), folder), f"{OTHER} reader is")
    shutil.copy(folder / FILES[2], folder / name)
    refusal(lambda: build(GTA5(written), folder), rf"{OTHER} sample . is None, not")


def test_moved__cache_and_sources_may_be(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = list(GTA5(root))
    build(GTA5(root), root / "cache")
    root.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(cache._Cache, "build", None)  # nothing may be built
    monkeypatch.chdir(tmp_path / "elsewhere")
    for here in (tmp_path / "elsewhere", Path()):
        for got, one in zip(build(GTA5(here), here / "cache"), want, strict=True):
            assert_equal(got, one)


@pytest.mark.parametrize("name", ["holiday.jpg", "samples-00003.bin", "x.tmp.1", "manifest.json", "shard-00000.bin"])
def test_foreign__a_folder_that_holds_anything_else_is_left_alone(samples: GTA5, folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / name).write_text("mine")
    for use in (build, CachedSamples.check):
        refusal(lambda use=use: use(samples, folder), rf"cache: holds '{name}', which is not part of this cache; use")
    assert contents(folder) == {name: b"mine"}


def test_read_only__a_complete_cache_serves(samples: GTA5, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    build(samples, folder)

    def read_only(path: object, flags: int, *rest: int) -> int:  # for root, who may write anywhere
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    assert_equal(build(samples, folder)[2], samples[2])
    folder.chmod(0o755)
    (folder / FILES[0]).unlink()
    folder.chmod(0o555)
    incomplete = r"cache/\.lock: cannot be written: Permission denied\. The cache is incomplete"
    refusal(lambda: build(samples, folder), incomplete)
    folder.chmod(0o755)
