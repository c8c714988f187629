"""The properties that the tests state, on many more random examples than the tests try."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

EXAMPLES = {"ci": 500, "nightly": 10_000}
TESTS = Path(__file__).parents[1]
FOLDERS = ("ops", "datasets/test_rare_classes.py", "contracts/test_resizing.py")


def run(profile: str) -> dict[str, Any]:
    """All tests of hypothesis, each with other examples every time; CROSSMIX_EXAMPLES is another number of them."""
    examples = int(os.environ.get("CROSSMIX_EXAMPLES", EXAMPLES[profile]))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-o", "faulthandler_timeout=0"]  # that of the tests is for fewer examples
    done = subprocess.run(
        [*command, *(str(TESTS / folder) for folder in FOLDERS)],
        env={**os.environ, "CROSSMIX_EXAMPLES": str(examples)},
        cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    counts = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = {line.partition(" - ")[0]: line for line in done.stdout.splitlines() if line.startswith("FAILED")}
    if done.returncode and not failed:
        failed["pytest"] = (done.stdout + done.stderr)[-400:]
    return {"examples of each": examples, "properties": counts.get("passed", 0), "wrong": failed}
