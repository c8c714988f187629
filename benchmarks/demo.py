"""The trainer's demo for several seeds: source-only and DACS on StreetScenes, and how long it takes.

python benchmarks/demo.py --save
"""

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import RESULTS, machine

TRAINER = Path(__file__).parent.parent / "examples" / "dacs_gta5.py"


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            command = [sys.executable, str(TRAINER), "--demo", "--seed", str(seed), "--out", folder]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own script
            run = {"seed": seed, "seconds": round(time.perf_counter() - begin, 1)}
            for method in ("source", "dacs"):
                metrics = json.loads((Path(folder) / method / "metrics.json").read_text(encoding="utf-8"))
                run[method] = metrics["last"]["student"]["native"]
        runs.append(run)
        source, dacs = (100 * run[method]["miou"] for method in ("source", "dacs"))
        print(f"seed {seed}: source {source:.2f} %, DACS {dacs:.2f} %, {run['seconds']} s", flush=True)
    if args.save:
        document = {
            "suite": "demo",
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
            "machine": {**machine("cpu"), "threads": torch.get_num_threads()},
            "runs": runs,
        }
        (RESULTS / "demo--cpu.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
