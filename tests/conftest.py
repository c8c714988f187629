"""Fixtures for data on disk."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def test_data() -> Path:
    """Real images, where CROSSMIX_TEST_DATA says they are."""
    folder = os.environ.get("CROSSMIX_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CROSSMIX_TEST_DATA names no folder with real images")
    return Path(folder)
