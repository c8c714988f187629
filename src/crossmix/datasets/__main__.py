"""Look at a data set before training on it.

    python -m crossmix.datasets check ROOT     say what it is, and list every bad, missing or suspicious file
    python -m crossmix.datasets stats ROOT     count the pixels of every class

ROOT is GTA5, SYNTHIA-RAND-CITYSCAPES or Cityscapes as unpacked. For data of your own give --images and --labels, each a
folder or a pattern, and --mapping, a JSON file from ids to train ids.

The exit code is 0 where all is well, 1 where files are listed, 2 where there is nothing to look at.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from crossmix.datasets._check import problems
from crossmix.datasets._labels import custom_format
from crossmix.datasets._layouts import Part, parts
from crossmix.datasets.classes import CLASS_NAMES, IGNORED
from crossmix.datasets.sample import DataError
from crossmix.datasets.segmentation_folder import found
from crossmix.datasets.statistics import count_files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crossmix.datasets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("check", "stats"))
    parser.add_argument("root", nargs="?", type=Path, metavar="ROOT")
    parser.add_argument("--images", help="folder or pattern of images, in place of ROOT")
    parser.add_argument("--labels", help="folder or pattern of label maps, in place of ROOT")
    parser.add_argument("--mapping", type=Path, help="JSON object from ids to train ids; ids it lacks are errors")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: this one)")
    parser.add_argument("--out", type=Path, help="file that keeps the counts (default: ROOT/crossmix-stats.jsonl)")
    args = parser.parse_args(argv)
    if (args.root is None) == (args.images is None and args.labels is None):
        parser.error("give either ROOT, or --images and --labels")
    try:
        chosen = parts(args.root) if args.root is not None else [_own(args)]
        listed = check(chosen, args.workers) if args.command == "check" else stats(chosen, args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if listed else 0


def check(chosen: list[Part], workers: int) -> int:
    """Print what every part is and what is wrong with it; return how many lines that took."""
    lines = 0
    for part in chosen:
        whole = f" (the whole data set has {part.expected})" if part.expected is not None else ""
        print(
            f"{part.title}: {len(part.images)} images{whole}, {len(part.labels)} label maps of {part.labelled.name}, "
            f"{len(part.images.keys() & part.labels.keys())} pairs",
            flush=True,
        )
        for line in problems(part, workers=workers):
            print(f"  {line}", flush=True)
            lines += 1
    print(f"{lines} problems" if lines else "no problems")
    return lines


def stats(chosen: list[Part], args: argparse.Namespace) -> int:
    """Print how often every class occurs."""
    for part in chosen:
        if not part.labels:
            continue
        cache = args.out or (None if args.root is None else args.root / "crossmix-stats.jsonl")
        counts = count_files(sorted(part.labels.values()), part.labelled, cache, workers=args.workers)
        pixels, maps = counts.sum(0), (counts > 0).sum(0)
        labelled = int(pixels[:IGNORED].sum())
        print(f"{part.title}: {len(counts)} label maps, {int(pixels.sum())} pixels, {int(pixels[IGNORED])} ignored")
        print(f"  {'class':<16}{'pixels':>16}{'share':>9}{'maps':>8}")
        for value in range(IGNORED):
            if value < len(CLASS_NAMES) or pixels[value]:
                name = CLASS_NAMES[value] if value < len(CLASS_NAMES) else str(value)
                share = 100 * int(pixels[value]) / max(labelled, 1)
                print(f"  {name:<16}{int(pixels[value]):>16}{share:>8.3f}%{int(maps[value]):>8}")
    return 0


def _own(args: argparse.Namespace) -> Part:
    """The part that --images, --labels and --mapping describe."""
    mapping: dict[int | tuple[int, int, int], int] | None = None
    if args.mapping is not None:
        try:
            mapping = {int(key): int(value) for key, value in json.loads(args.mapping.read_text("utf-8")).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{args.mapping}: is no JSON object from ids to train ids ({error}).") from error
    images, labels = ({} if where is None else found(Path(where)) for where in (args.images, args.labels))
    if not images and not labels:
        raise DataError("no PNG file was found by --images or --labels; pass folders, or patterns in quotes.")
    try:
        return Part("your own", images, labels, custom_format(mapping, "raise"))
    except ValueError as error:
        raise DataError(f"{args.mapping}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
