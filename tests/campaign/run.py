"""Run the campaign: hours of faults, damaged files and random calls, most of which the tests run in short.

    python tests/campaign/run.py --profile ci         some minutes
    python tests/campaign/run.py --profile nightly    the figures of docs/reliability.md

Every group runs in a process of its own, with limits on time and memory. A group that this commit has finished is not
repeated: delete the result file for that. The exit code is 1 if a group found anything.
"""

import argparse
import importlib
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:1] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "examples")]  # in place of this folder

import numpy as np

import crossmix
from benchmarks.speed.common import RESULTS, commit, machine, today
from crossmix._files import write_whole

PROFILES = ("ci", "nightly")
GROUPS = (
    "fuzz",
    "checkpoints",
    "faults",
    "png",
    "labels",
    "corruptions",
    "properties",
    "kills",
    "trouble",
    "soak",
    "security",
)
SECONDS = {"ci": 600, "nightly": 3600}
LONGER = {"properties": 2 * 3600, "soak": 3 * 3600}
"""Than that: seconds of a group by night."""
MEMORY = 8 << 30


def main() -> int:
    """Run the groups that are not finished, and say what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, required=True)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, metavar="NAME", help=", ".join(GROUPS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/reliability-PROFILE.json")
    parser.add_argument("--here", choices=GROUPS, help=argparse.SUPPRESS)  # one group, in this process
    args = parser.parse_args()
    if args.here:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        print(json.dumps(importlib.import_module(f"campaign.{args.here}").run(args.profile)))
        return 0
    out, bad = args.out or RESULTS / f"reliability-{args.profile}.json", False
    now = commit() or "+"
    for name in args.groups:
        result = finished(out, args.profile).get(name)
        if result is None or result["commit"] != now or now.endswith("+"):
            result = {"date": today(), "commit": now, **measured(name, args.profile)}
            keep(out, args.profile, name, result)
        print(said(name, result), flush=True)
        bad |= bool(result["wrong"])
    return int(bad)


def finished(out: Path, profile: str) -> dict[str, Any]:
    """The results so far by group."""
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    found: dict[str, Any] = document["groups"] if document.get("profile") == profile else {}
    return found


def measured(name: str, profile: str) -> dict[str, Any]:
    """A group's figures; a crash or an end by its limits is a finding too."""
    command = [sys.executable, __file__, "--profile", profile, "--here", name]
    begun, limit = time.monotonic(), LONGER.get(name, 0) if profile == "nightly" else 0
    limit = limit or SECONDS[profile]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"seconds": limit, "figures": {}, "wrong": {"end": "it took longer than its limit"}}
    seconds = round(time.monotonic() - begun)
    if done.returncode:
        return {"seconds": seconds, "figures": {}, "wrong": {"end": f"exit code {done.returncode}"}}
    figures = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": seconds, "wrong": figures.pop("wrong"), "figures": figures}


def keep(out: Path, profile: str, name: str, result: dict[str, Any]) -> None:
    """Add a result to the file."""
    versions = {"crossmix": crossmix.__version__, "numpy": np.__version__, "system": platform.system()}
    groups = {**finished(out, profile), name: result}
    ordered = {known: groups[known] for known in GROUPS if known in groups}
    document = {"profile": profile, "date": today(), "machine": {**machine("cpu"), **versions}, "groups": ordered}
    write_whole(out, (json.dumps(document, indent=1) + "\n").encode())


def said(name: str, result: dict[str, Any]) -> str:
    """A line about a group."""
    figures = ", ".join(f"{what} {count}" for what, count in result["figures"].items())
    wrong = "".join(f"; WRONG: {what}: {first}" for what, first in result["wrong"].items())
    return f"{name}: {result['seconds']} s: {figures}{wrong}"


if __name__ == "__main__":
    sys.exit(main())
