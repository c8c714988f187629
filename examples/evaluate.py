"""Score weights on Cityscapes as the published numbers were scored, at both label sizes in one pass.

    python examples/evaluate.py --weights dacs.pth --cityscapes DIR                   a released checkpoint
    python examples/evaluate.py --weights X.pt --cityscapes DIR                       one of the trainer's
    torchrun --nproc_per_node 4 examples/evaluate.py ...                              images shared out over GPUs

Images are resized to 512 x 1024, or as a run of the trainer resized them. The released code scores on labels of that
size; the standard protocol, and the numbers of other papers, on the labels' own 1024 x 2048, with the 1/8 logits
upsampled straight to it. The means over 19, 16 and 13 classes come from the same counts.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from crossmix.datasets import Cityscapes, DataError
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.evaluation import evaluate
from crossmix.models import DeepLabV2, WeightsError, deeplab_v2_resnet101, deeplab_v2_tiny, load_weights
from crossmix.models.weight_files import read_weights
from scores import TITLES, markdown, paper_row, rows_by_class, summary

NETWORKS = {"resnet101": deeplab_v2_resnet101, "tiny": deeplab_v2_tiny}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse(argv)
    ranks = "RANK" in os.environ
    if ranks:
        dist.init_process_group()
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        scores = {entry: score(entry, args, ranks=ranks) for entry in args.entry}
    except (DataError, WeightsError, FileNotFoundError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    finally:
        if ranks:
            dist.destroy_process_group()
    if int(os.environ.get("RANK", "0")) == 0:
        print(table(scores, args.paper), end="")
        if args.out:
            document = {"weights": args.weights, "split": args.split, "torch": str(torch.__version__), "scores": scores}
            Path(args.out).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a file or URL")
    parser.add_argument("--cityscapes", required=True, help="folder with leftImg8bit/ and gtFine/")
    parser.add_argument("--entry", nargs="+", default=["student"], help="parts of a checkpoint: student, teacher")
    parser.add_argument("--split", default="val")
    parser.add_argument("--network", choices=tuple(NETWORKS), help="default: the run's, or resnet101")
    parser.add_argument("--aspp-branches", type=int, choices=(2, 4), help="default: the run's, or 2 as released")
    parser.add_argument(
        "--image-size", help="HxW that images are resized to, or native; default: the run's, or 512x1024"
    )
    parser.add_argument("--paper", default="gta5/dacs", help="row to print beside: gta5/METHOD or synthia/METHOD")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read images")
    parser.add_argument("--out", help="JSON file for the scores")
    return parser.parse_args(argv)


def load_network(
    weights: str, entry: str, *, network: str | None = None, aspp_branches: int | None = None
) -> DeepLabV2:
    """The network that a file was saved from, with its weights, on the CPU in eval mode.

    A checkpoint of the trainer holds what the run was told; of any other file the arguments say it.
    """
    config = saved_config(weights)
    name, classes = network or config.get("network", "resnet101"), config.get("num_classes", len(CLASS_NAMES))
    if name not in NETWORKS:
        raise WeightsError(f"{weights}: was trained on the network {name!r}, which this script does not build.")
    branches = aspp_branches or config.get("aspp_branches", 2)
    model = NETWORKS[name](classes, aspp_branches=branches)
    report = load_weights(model, weights, entry=None if entry == "student" else entry, strict=False)
    lacking = [name for name in (*report.missing, *report.mismatched) if not name.endswith("num_batches_tracked")]
    if lacking:
        raise WeightsError(f"{weights}: expected everything to match a network of {classes} classes, got {report}.")
    return model.eval()


def saved_config(weights: str) -> Mapping[str, Any]:
    """What a run of the trainer was told, from inside its checkpoint; nothing for other files."""
    config = read_weights(weights, None)[1].get("config")
    return config if isinstance(config, Mapping) else {}


def image_size(text: str) -> tuple[int, int] | None:
    """'512x1024' as (512, 1024), '512' as a square, 'native' as None."""
    if text == "native":
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal() and int(height) * int(width or height)):
        raise WeightsError(f"expected a size such as 512x1024, or native, got {text!r}.")
    return int(height), int(width or height)


def score(entry: str, args: argparse.Namespace, *, ranks: bool) -> dict[str, Any]:
    """Scores by label size."""
    model = load_network(args.weights, entry, network=args.network, aspp_branches=args.aspp_branches)
    if model.num_classes != len(CLASS_NAMES):
        raise WeightsError(f"{args.weights}: has {model.num_classes} classes, but Cityscapes {len(CLASS_NAMES)}.")
    size = image_size(args.image_size or saved_config(args.weights).get("target_size", "512x1024"))
    matrices = evaluate(
        model.to(args.device),
        Cityscapes(args.cityscapes, args.split),
        image_size=size,
        label_sizes=[None] if size is None else [size, (2 * size[0], 2 * size[1])],
        forward=model.forward_features,
        dtype={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision],
        workers=args.workers,
        sync=ranks,
    )
    return {size: summary(matrix) for size, matrix in matrices.items()}


def table(scores: dict[str, dict[str, Any]], paper: str) -> str:
    """IoU in percent by class, a column for each entry and label size, and the paper's row last."""
    columns = {f"{entry} {size}": [values] for entry, by_size in scores.items() for size, values in by_size.items()}
    source, _, method = paper.partition("/")
    return markdown(rows_by_class(columns, {f"paper, {paper}": paper_row(source, method)}, TITLES))


if __name__ == "__main__":
    sys.exit(main())
