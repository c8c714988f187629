"""Segment images into train ids, colour maps and overlays.

    python examples/predict.py --weights dacs.pth photo.jpg --out predicted             a released checkpoint
    python examples/predict.py --weights X.pt --entry teacher FOLDER --out predicted    a checkpoint of the trainer

For each image, including those in subfolders, OUT receives NAME_trainIds.png (one byte per pixel, the train id),
NAME_color.png (in the colours of Cityscapes) and NAME_overlay.png (half image, half colour), all in the image's own
size. Photographs are rotated according to their EXIF orientation; files that are neither PNG nor JPEG are left out and
listed. For the network, images are resized to the size used in training, 512 x 1024 for the published one; the logits
are then upsampled.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as tf

from crossmix.datasets import DataError, image_files, read_image, write_png
from crossmix.engine import Progress
from crossmix.models import DeepLabV2
from crossmix.visualize import colorize
from evaluate import ERRORS, add_network_options, load_network, set_precision, trained_size
from networks import AUTOCAST, small_logits
from pictures import CLASS_COLORS

SUFFIXES = {"ids": "_trainIds.png", "color": "_color.png", "overlay": "_overlay.png"}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        targets = planned(args.images, args.out, args.what)
        set_precision(args)
        model = load_network(args.weights, args.entry, network=args.network, aspp_branches=args.aspp_branches)
        if "size" not in args:
            args.size = trained_size(args.weights)
        predict_all(model.to(args.device), targets, args)
    except (*ERRORS, torch.OutOfMemoryError) as error:
        raise SystemExit(f"error: {error}") from error
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="PNG or JPEG")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--what", nargs="+", choices=SUFFIXES, default=tuple(SUFFIXES), help="kinds of results; default: all"
    )
    parser.add_argument("--entry", default="student", help="network in a checkpoint: student, teacher")
    add_network_options(parser, "--size")
    parser.add_argument("--skip", action="store_true", help="leave out images that cannot be read")
    return parser.parse_args(argv)


def planned(given: Sequence[Path], out: Path, what: Sequence[str]) -> dict[Path, Path]:
    """Choose the path of each image's results, without ending; refuse bad input before any image is read."""
    if out.exists() and not out.is_dir():
        raise DataError(f"--out {out}: is a file; name a folder.")
    targets: dict[Path, Path] = {}
    for path in given:
        if path.is_dir():
            if out.resolve().is_relative_to(path.resolve()):
                raise DataError(f"{out}: lies in {path}, whose images are the input; give an --out elsewhere.")
            images, left_out = image_files(path)
            if left_out:
                names = ", ".join(str(file.relative_to(path)) for file in left_out[:5])
                more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
                print(f"{path}: left out, being neither PNG nor JPEG: {names}{more}", file=sys.stderr)
            if not images:
                raise DataError(f"{path}: holds no PNG or JPEG images; check the folder.")
            targets.update((image, out / without_ending(image.relative_to(path))) for image in images)
        elif path.is_file():
            targets[path] = out / without_ending(Path(path.name))
        else:
            raise DataError(f"{path}: no such file or folder; check the path.")
    refuse_clashes(targets, what)
    return targets


def without_ending(path: Path) -> Path:
    """Turn `a/b.jpg` into `a/b`, but keep the number of `frame.0001`."""
    return path if path.suffix[1:].isdecimal() else path.with_suffix("")


def refuse_clashes(targets: dict[Path, Path], what: Sequence[str]) -> None:
    """Refuse to write a result over another one or over an image."""
    inputs = {image.resolve() for image in targets}
    taken: dict[Path, Path] = {}
    for image, target in targets.items():
        if other := taken.get(target):
            raise DataError(f"{other} and {image}: would both become {target}_*.png; predict them apart.")
        taken[target] = image
        for file in (Path(f"{target}{SUFFIXES[kind]}") for kind in what):
            if file.resolve() in inputs:
                raise DataError(f"{file}: is an input and would be written over; give another --out.")


def predict_all(model: nn.Module, targets: dict[Path, Path], args: argparse.Namespace) -> None:
    progress = Progress(len(targets), title="predict")
    every = 1 if sys.stderr.isatty() else -(-len(targets) // 20)
    skipped = 0
    for done, (path, target) in enumerate(targets.items(), 1):
        try:
            with progress.waiting():
                image = read_image(path)
        except DataError as error:
            if not args.skip:
                raise
            progress.say(f"skipped: {error}")
            skipped += 1
            continue
        write_results(target, image, predicted(model, image, args.size, args.precision), args.what)
        if done % every == 0 or done == len(targets):
            progress.show({"step": done, **progress.measured(done)})
    progress.close()
    if skipped == len(targets):
        raise DataError("none of the images could be read.")
    print(f"{len(targets) - skipped} of {len(targets)} images into {args.out}")


@torch.no_grad()
def predicted(model: nn.Module, image: Tensor, size: tuple[int, int] | None, precision: str = "fp32") -> Tensor:
    """Predict the train ids (H, W) of an image (3, H, W), both uint8, that the network, in eval mode, sees resized."""
    device = next(model.parameters()).device
    small = image[None] if size is None else tf.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    with torch.autocast(device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST):
        logits = small_logits(model)(small.to(device).float() / 255)
    return argmax_at(logits.float(), image.shape[1:], align_corners=isinstance(model, DeepLabV2)).cpu()


def argmax_at(logits: Tensor, size: tuple[int, ...], *, align_corners: bool = True) -> Tensor:
    """Upsample (1, C, h, w) logits and take the best class, one class at a time, as all would take gigabytes."""
    ids = torch.zeros(*size, dtype=torch.uint8, device=logits.device)
    best = torch.full_like(ids, -torch.inf, dtype=torch.float32)
    for k in range(logits.shape[1]):
        scores = tf.interpolate(logits[:, k : k + 1], size=size, mode="bilinear", align_corners=align_corners)[0, 0]
        ids.masked_fill_(scores > best, k)
        best = torch.maximum(best, scores)
    return ids


def write_results(target: Path, image: Tensor, ids: Tensor, what: Sequence[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    color = colorize(ids, colors=CLASS_COLORS)
    pictures = {"ids": ids, "color": color, "overlay": ((image.int() + color.int() + 1) // 2).to(torch.uint8)}
    for kind in what:
        write_png(f"{target}{SUFFIXES[kind]}", pictures[kind])


if __name__ == "__main__":
    sys.exit(main())
