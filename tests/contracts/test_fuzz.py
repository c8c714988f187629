"""A short run of the campaign's random calls; the long one is `tests/campaign/run.py`."""

import warnings

import pytest

from campaign.fuzz import CALLS, fuzz


@pytest.mark.parametrize("name", CALLS)
def test_only_type_errors_and_value_errors_come_out(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about odd inputs
        found = fuzz(name, 60)
    assert not found["wrong"]
    assert {"accepted", "TypeError"} <= set(found["outcomes"])
