"""Fixtures for data on disk and for the trainer; tests that need a GPU skip without one."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of tests are small: on shared cores threads wait for each other

import pytest
import torch
import torch.distributed as dist

from crossmix import _checks
from crossmix.datasets import StreetScenes
from crossmix.datasets.__main__ import main
from runs import FORKED, changed, forget

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds; torch waits as long for workers after an error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow"):  # what they cover others do too, and tracing them takes half as long again
            item.add_marker("no_cover")


@pytest.fixture(autouse=True)
def _child_handler() -> Iterator[None]:
    """A DataLoader with workers leaves a handler that raises when a worker of any later one dies."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    while FORKED:
        FORKED.pop().kill()
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def test_data() -> Path:
    """Real images, where CROSSMIX_TEST_DATA says they are."""
    folder = os.environ.get("CROSSMIX_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CROSSMIX_TEST_DATA names no folder with real images")
    return Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command of data sets prints when it ends with a code; its error, where it cannot begin."""

    def run(code: int, *arguments: object) -> str:
        assert main(list(map(str, arguments))) == code
        printed = capsys.readouterr()
        return printed.err if code == 2 else printed.out

    return run


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the processes that tests start have: sums over several threads round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU images are looked at; here it stands for a GPU, where they are not."""
    can_look = _checks.can_look
    monkeypatch.setattr(_checks, "can_look", lambda tensor: tensor.device.type != "cpu" and can_look(tensor))


@pytest.fixture(scope="session")
def trainer() -> ModuleType:
    import dacs_gta5

    return dacs_gta5


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Small folders in the official layouts, and the flags that train on them in a second."""
    root = tmp_path_factory.mktemp("data")
    size = (32, 64)
    StreetScenes(6, size=size).write(root / "gta5", layout="gta5")
    StreetScenes(5, domain="target", size=size).write(root / "cs", layout="cityscapes")
    StreetScenes(3, domain="target", size=size, seed=1).write(root / "cs", layout="cityscapes", split="val")
    return [
        "--gta5", str(root / "gta5"), "--cityscapes", str(root / "cs"), "--random-init", "--network", "tiny",
        "--source-size", "native", "--target-size", "32x64", "--evaluation", "32x64", "--crop", "32", "--steps", "4",
        "--workers", "0", "--device", "cpu", "--save-every", "2", "--eval-every", "2", "--log-every", "1",
    ]  # fmt: skip


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without charts, which take most of a short run's time and have tests of their own."""
    import report

    monkeypatch.setattr(report, "drawn", lambda *_: "")


@pytest.fixture(scope="session")
def whole(trainer: ModuleType, folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs that were never stopped, each made once, without charts; not to be written to."""
    import report

    made: dict[tuple[str, ...], Path] = {}

    def go(*flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("whole") / "run"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(report, "drawn", lambda *_: "")
                assert trainer.main([*folders, *flags, "--out", str(made[flags])]) == 0
        return made[flags]

    return go


@pytest.fixture
def died(whole: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies of such runs, as if they had been killed before a step was saved."""

    def go(*flags: str, out: str = "run", step: int = 4) -> Path:
        shutil.copytree(whole(*flags), tmp_path / out)
        forget(tmp_path / out, step)
        return tmp_path / out

    return go


@pytest.fixture
def own_data(folders: list[str], tmp_path: Path) -> list[str]:
    """The flags, on data that a test may break."""
    for name, folder in (("gta5", folders[1]), ("cs", folders[3])):
        shutil.copytree(folder, tmp_path / "data" / name, ignore=shutil.ignore_patterns("*.jsonl"))
    return changed(folders, gta5=str(tmp_path / "data" / "gta5"), cityscapes=str(tmp_path / "data" / "cs"))


@pytest.fixture
def run(trainer: ModuleType, folders: list[str], tmp_path: Path) -> Callable[..., Path]:
    def go(*flags: str, out: str = "run") -> Path:
        assert trainer.main([*folders, "--out", str(tmp_path / out), *flags]) == 0
        return tmp_path / out

    return go
