"""Fixtures for data on disk; tests that need a GPU skip without one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
