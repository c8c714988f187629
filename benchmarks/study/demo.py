"""The trainer's demo with several seeds: scores of source-only training and DACS on StreetScenes, and run times."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.common import ROOT, machine


def run(seeds: int) -> dict[str, Any]:
    runs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            command = [sys.executable, str(ROOT / "examples" / "dacs_gta5.py"), "--demo"]
            subprocess.run(  # noqa: S603 - our own script
                [*command, "--seed", str(seed), "--out", folder], check=True, stdout=subprocess.DEVNULL
            )
            entry: dict[str, Any] = {"seed": seed, "seconds": round(time.perf_counter() - begin, 1)}
            for method in ("source", "dacs"):
                metrics = json.loads((Path(folder) / method / "metrics.json").read_text(encoding="utf-8"))
                entry[method] = metrics["last"]["student"]["native"]
        runs.append(entry)
        source, dacs = (100 * entry[method]["miou"] for method in ("source", "dacs"))
        print(f"seed {seed}: source {source:.2f} %, DACS {dacs:.2f} %, {entry['seconds']} s", flush=True)
    return {"machine": {**machine("cpu"), "threads": torch.get_num_threads()}, "runs": runs}
