"""Check a data set before training on it.

    python -m crossmix.datasets check ROOT     identify the data set and list bad, missing or suspicious files
    python -m crossmix.datasets stats ROOT     count the pixels of every class

ROOT is GTA5, SYNTHIA-RAND-CITYSCAPES or Cityscapes as unpacked. For your own data, pass --classes, a JSON file, with
ROOT, a folder that contains `images` and `labels`, or with --images and --labels, each a folder or a pattern. The file
contains one of

    ["road", "car"]                            names; label maps contain 0 and 1, and 255 for ignored pixels
    {"7": 0, "26": 1, "0": 255}                from ids to train ids; unlisted ids are errors
    {"#804080": 0, "0, 0, 142": 1}             from colours to train ids
    {"classes": [...], "mapping": {...}}       both, with train ids or names in the mapping

Exit code: 0 if everything is fine, 1 if files are listed, 2 if there is nothing to check.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from crossmix.datasets._check import Part, others, part, parts, problems
from crossmix.datasets._class_file import read_classes
from crossmix.datasets._labels import custom_format
from crossmix.datasets._listing import Found, described
from crossmix.datasets.classes import CLASS_NAMES, IGNORED
from crossmix.datasets.sample import DataError
from crossmix.datasets.segmentation_folder import found
from crossmix.datasets.statistics import count_files


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crossmix.datasets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("check", "stats"))
    parser.add_argument("root", nargs="?", type=Path, metavar="ROOT")
    parser.add_argument("--images", type=Path, help="folder or pattern of images, instead of ROOT")
    parser.add_argument("--labels", type=Path, help="folder or pattern of label maps, instead of ROOT")
    parser.add_argument("--classes", "--mapping", type=Path, help="JSON file with your own classes, see above")
    parser.add_argument("--crop", type=_size, help="HxW in pixels: check also lists smaller images")
    parser.add_argument("--workers", type=_count, default=0, help="number of decoding processes (default: 0, none)")
    parser.add_argument("--out", type=Path, help="file for the counts (default: ROOT/crossmix-stats.jsonl)")
    args = parser.parse_args(argv)
    if (args.root is None) == (args.images is None and args.labels is None):
        parser.error("pass either ROOT, or --images and --labels")
    try:
        own = args.root is None or args.classes is not None
        chosen = [_own(args)] if own else parts(args.root)
        listed = check(chosen, args) if args.command == "check" else stats(chosen, args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if listed else 0


def check(chosen: list[Part], args: argparse.Namespace) -> int:
    """Print what every part is and its problems; return the number of problems."""
    lines = 0
    for one in chosen:
        whole = f" (the whole data set has {one.expected})" if one.expected is not None else ""
        print(
            f"{one.title}: {len(one.images)} images{whole}, {len(one.labels)} label maps of {one.labelled.name}, "
            f"{len(one.images.keys() & one.labels.keys())} pairs",
            flush=True,
        )
        if text := others(one):
            print(f"  (other files, ignored: {text})", flush=True)
        for line in problems(one, crop=args.crop, workers=args.workers):
            print(f"  {line}", flush=True)
            lines += 1
    print(f"{lines or 'no'} problem{'s' * (lines != 1)}")
    return lines


def stats(chosen: list[Part], args: argparse.Namespace) -> int:
    """Print how often every class occurs, and which files were ignored."""
    names = CLASS_NAMES if args.classes is None else read_classes(args.classes).names
    for one in chosen:
        if not one.labels:
            continue
        cache = args.out or (None if args.root is None else args.root / "crossmix-stats.jsonl")
        counts = count_files(sorted(one.labels.values()), one.labelled, cache, workers=args.workers)
        pixels, maps = counts.sum(0), (counts > 0).sum(0)
        labelled = int(pixels[:IGNORED].sum())
        print(f"{one.title}: {len(counts)} label maps, {int(pixels.sum())} pixels, {int(pixels[IGNORED])} ignored")
        if one.left_out:
            print(f" {described(one.left_out)}")
        print(f"  {'class':<16}{'pixels':>16}{'share':>9}{'maps':>8}")
        for value in range(IGNORED):
            if value < len(names) or pixels[value]:
                name = names[value] if value < len(names) else str(value)
                share = 100 * int(pixels[value]) / max(labelled, 1)
                print(f"  {name:<16}{int(pixels[value]):>16}{share:>8.3f}%{int(maps[value]):>8}")
    return 0


def _own(args: argparse.Namespace) -> Part:
    """The part described by ROOT, or --images and --labels, and --classes."""
    names, mapping = (None, None) if args.classes is None else read_classes(args.classes)
    files = found(args.root or args.images, args.labels)
    root = args.root or args.images or args.labels
    places = (("images", args.images or root), ("label maps", args.labels or root))
    for (kind, where), one in zip(places, files, strict=True):
        if one is not None and not one.files:
            left_out = described(one.left_out)
            raise DataError(f"{where}: has no {kind}, PNG or JPEG{left_out}; pass folders, or patterns in quotes.")
    of_images, of_labels = (one or Found({}) for one in files)
    labelled = custom_format(mapping, "raise", None if names is None else len(names))
    return part("your own", of_images, of_labels, labelled)._replace(any_kind=True)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """'512x1024' as (512, 1024), '512' as (512, 512)."""
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HxW in pixels, such as 512x1024, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


if __name__ == "__main__":
    sys.exit(main())
