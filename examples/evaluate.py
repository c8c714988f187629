"""Score weights on Cityscapes as the published numbers were scored, at both label sizes in one pass.

    python examples/evaluate.py --weights dacs.pth --cityscapes DIR    a released checkpoint
    python examples/evaluate.py --weights X.pt --cityscapes DIR        a checkpoint of the trainer
    torchrun --nproc_per_node 4 examples/evaluate.py ...               images distributed over several GPUs

Images are resized to 512 x 1024, or as in the trainer's run. The released code scores on labels of that size; the
standard protocol, used by other papers, scores on the original 1024 x 2048, with the 1/8 logits upsampled straight to
it. Images resized to another size are scored on labels of that size and of twice that. The means over 19, 16 and 13
classes come from the same counts.
"""

import argparse
import functools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossmix.datasets import Cityscapes, DataError
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.evaluation import evaluate
from crossmix.models import DeepLabV2, WeightsError, load_weights
from crossmix.models.weight_files import read_weights
from crossmix.recipes import METHODS
from files import write_text
from networks import (
    AUTOCAST,
    EXPECTED,
    NETWORKS,
    PRECISIONS,
    NetworkError,
    is_name,
    is_ours,
    new_network,
    set_float32_products,
    small_logits,
)
from options import argument, size, unusable
from processes import Ranks, leave, start_ranks
from scores import TITLES, markdown, paper_row, rows_by_class, summary

ERRORS = (DataError, WeightsError, NetworkError, OSError, ImportError, argparse.ArgumentTypeError)
image_size = argument(size, "HxW in pixels, such as 512x1024, or native", native=True)
number = argument(int, type=int, low=0)
LARGEST = {"num_classes": 255, "aspp_branches": 4}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with ExitStack() as stack:
        ranks = start_ranks(args.device, stack)
        if ranks.control is not None and args.device.startswith("cuda"):
            args.device = "cuda"  # each rank has made another GPU its current one
        try:
            if args.out:
                if Path(args.out).is_dir():
                    raise DataError(f"--out {args.out}: is a folder; name a file.")
                Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            set_precision(args)
            paper = args.paper or trained_row(args.weights)
            scores = {entry: score(entry, args, ranks) for entry in args.entry}
            if ranks.first:
                print(table(scores, paper), end="", flush=True)  # first, lest a full disk lose it
                if args.out:
                    document = {
                        "weights": args.weights, "split": args.split, "torch": str(torch.__version__), "scores": scores,
                    }  # fmt: skip
                    write_text(Path(args.out), json.dumps(document, indent=2) + "\n")
        except ERRORS as error:
            raise SystemExit(f"error: {error}") from error
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cityscapes", required=True, help="folder with leftImg8bit/ and gtFine/")
    parser.add_argument("--entry", nargs="+", default=["student"], help="networks in a checkpoint: student, teacher")
    parser.add_argument("--split", default="val")
    add_network_options(parser, "--image-size")
    rows = [f"{source}/{method}" for source in ("gta5", "synthia") for method in METHODS]
    parser.add_argument(
        "--paper", choices=rows, metavar="ROW",
        help=f"row of the paper to print alongside: {', '.join(rows)}; default: the run's, or gta5/dacs",
    )  # fmt: skip
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--workers", type=number, default=workers, help="processes that load images")
    parser.add_argument("--out", help="JSON file for the scores")
    return parser.parse_args(argv)


def add_network_options(parser: argparse.ArgumentParser, size_flag: str) -> None:
    """Add the options that say which network runs, and how. Without a flag, `size` is absent."""
    parser.add_argument(
        "--weights", required=True, help="a file, such as a run's checkpoints/best.pt or best_unsupervised.pt, or URL"
    )
    parser.add_argument("--network", type=argument(network=True), help=f"{EXPECTED}; default: the run's, or resnet101")
    parser.add_argument("--aspp-branches", type=int, choices=(2, 4), help="default: the run's, or 2 as released")
    parser.add_argument(
        size_flag, dest="size", metavar="HxW", type=image_size, default=argparse.SUPPRESS,
        help="size to which images are resized, or native; default: the run's, or 512x1024",
    )  # fmt: skip
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32, or the run's on a GPU")


def load_network(
    weights: str, entry: str, *, network: str | None = None, aspp_branches: int | None = None
) -> nn.Module:
    """Build the network that a file was saved from, with its weights, on the CPU in eval mode.

    A checkpoint of the trainer holds the options of its run; for other files the arguments say what to build. A
    function that only the file names is not called, since the file's author would then choose what code runs.
    """
    config = saved_config(weights)
    name, classes = network or option(weights, "network", "resnet101"), saved_classes(weights)
    if not is_ours(name) and network is None:
        hint = f"; if you trust it, add --network {name}" if is_name(str(name)) else ""
        raise WeightsError(
            f"{weights}: was trained on the network {name!r}, which this script does not build by itself{hint}."
        )
    if aspp_branches and not is_ours(name):
        raise NetworkError(f"--aspp-branches has no effect without --network {' or '.join(NETWORKS)}, got {name}.")
    branches = aspp_branches or option(weights, "aspp_branches", 2)
    model = new_network(name, classes, aspp_branches=branches, upsample=True)
    try:
        report = load_weights(model, weights, entry=None if entry == "student" else entry, strict=False)
    except WeightsError as error:
        if network or "network" in config:
            raise
        raise WeightsError(f"{error} It was taken for {name}: is it another --network?") from error
    lacking = [name for name in (*report.missing, *report.mismatched) if not name.endswith("num_batches_tracked")]
    if lacking:
        raise WeightsError(f"{weights}: expected everything to match a network of {classes} classes, got {report}.")
    return model.eval()


@functools.cache  # every option is looked up here, and the file may have hundreds of MB
def saved_config(weights: str) -> Mapping[str, Any]:
    """Read the options of the trainer from its checkpoint; empty for other files."""
    config = read_weights(weights, None)[1].get("config")
    return config if isinstance(config, Mapping) else {}


def trained_size(weights: str) -> tuple[int, int] | None:
    """Read the size to which a run resized its target images."""
    found: tuple[int, int] | None = image_size(option(weights, "target_size", "512x1024"))
    return found


def set_precision(args: argparse.Namespace) -> None:
    """Compute in the precision that is asked for; else on a GPU in that of the run. CPUs are slow at lower ones."""
    on_gpu = args.device.startswith("cuda")
    args.precision = args.precision or (known(args.weights, "precision", PRECISIONS) if on_gpu else None) or "fp32"
    set_float32_products(args.precision)


def trained_row(weights: str) -> str | None:
    """Name the row of the paper that a run's data and method correspond to; None for other data or methods."""
    config = saved_config(weights)
    if "method" not in config:
        return "gta5/dacs"
    method = known(weights, "method", METHODS)
    if method is None or config.get("source"):
        return None
    return f"{'synthia' if config.get('synthia') else 'gta5'}/{method}"


def known(weights: str, name: str, choices: Sequence[str]) -> str | None:
    """Read an option of a run that is one of a few words; None if the file, which may be anybody's, has another."""
    found = saved_config(weights).get(name)
    return found if isinstance(found, str) and found in choices else None


def saved_classes(weights: str) -> int:
    """Read the number of classes of a run."""
    found: int = option(weights, "num_classes", len(CLASS_NAMES))
    return found


def option(weights: str, name: str, default: str | int) -> Any:  # noqa: ANN401 - of the default's type
    """Read an option of the trainer from its checkpoint, which may be anybody's."""
    value: Any = saved_config(weights).get(name, default)
    if type(value) is not type(default) or (isinstance(value, int) and not 1 <= value <= LARGEST[name]):
        expected = "text" if isinstance(default, str) else f"a whole number from 1 to {LARGEST[name]}"
        raise WeightsError(
            f"{weights}: its option {name!r} must be {expected}, got {str(value)[:80]!r}; use another file."
        )
    return value


def usable_device(text: str) -> str:
    if problem := unusable(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def score(entry: str, args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Score one network of a file; return its scores by label size."""
    model = load_network(args.weights, entry, network=args.network, aspp_branches=args.aspp_branches)
    if (classes := saved_classes(args.weights)) != len(CLASS_NAMES):
        raise WeightsError(f"{args.weights}: has {classes} classes, but Cityscapes {len(CLASS_NAMES)}.")
    shape = args.size if "size" in args else trained_size(args.weights)
    matrices = evaluate(
        model.to(args.device),
        Cityscapes(args.cityscapes, args.split),
        image_size=shape,
        label_sizes=[None] if shape is None else [shape, (2 * shape[0], 2 * shape[1])],
        forward=small_logits(model),
        align_corners=isinstance(model, DeepLabV2),
        dtype=AUTOCAST.get(args.precision),
        workers=args.workers,
        sync=ranks.world > 1,
    )
    return {name: summary(matrix) for name, matrix in matrices.items()}


def table(scores: dict[str, dict[str, Any]], paper: str | None) -> str:
    """Format IoU in percent by class, with a column for each entry and label size, and one for a row of the paper."""
    columns = {f"{entry} {name}": [values] for entry, by_size in scores.items() for name, values in by_size.items()}
    beside = {} if paper is None else {f"paper, {paper}": paper_row(*paper.split("/"))}
    return markdown(rows_by_class(columns, beside, TITLES))


if __name__ == "__main__":
    leave(main)
