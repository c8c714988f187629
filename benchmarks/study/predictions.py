"""The figure of predictions: rendered scenes that a network was trained on, and its label maps of photographs.

The photographs and their labels must not be distributed. `python -m benchmarks.publish --photographs CamVid --out FILE`
draws the figure with both.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.charts import Picture, pictures
from benchmarks.speed.common import RESULTS
from benchmarks.study.pairs import CAMVID_NAMES, Domains, load
from benchmarks.study.studies import METHODS
from benchmarks.study.trials import PICTURED, Job, evenly, pictured, write_stack
from crossmix.datasets import read_image
from crossmix.datasets.classes import CLASS_NAMES, PALETTE
from crossmix.visualize import colorize

PAIR = "streets-camvid"
FIGURE = f"{PAIR}-predictions.svg"
# A class of CamVid has the colour of the first class of Cityscapes that is part of it.
COLORS = {CAMVID_NAMES[name]: PALETTE[CLASS_NAMES.index(name)] for name in reversed(CAMVID_NAMES)}


def write_references(domains: Domains, out: Path) -> None:
    """Write what the figure shows beside the runs' label maps, which is the same for all runs."""
    out.mkdir(parents=True, exist_ok=True)
    scenes = evenly(domains.source, len(pictured(domains)))
    small = functional.interpolate(
        torch.stack([scene.image for scene in scenes]), scale_factor=0.5, mode="bilinear", antialias=True
    )
    write_stack(out / "scenes.png", small)
    labels = torch.stack([scene.label for scene in scenes if scene.label is not None])
    write_stack(out / "scene-labels.png", labels)


def shown() -> dict[str, Path]:
    """The label maps of the runs in the figure."""
    folder = RESULTS / "runs" / PAIR
    files = {name: folder / Job(PAIR, name, METHODS[name], 0, 0).file for name in ("source", "dacs")}
    return {name: path.with_suffix(".png") for name, path in files.items()}


def are_there() -> bool:
    return all(path.with_suffix(".json").exists() for path in shown().values())  # written after the label maps


def figure(camvid: str = "") -> str:
    """The figure of seed 0 as SVG; with photographs and true labels if their folder is given."""
    runs = shown()
    folder = runs["dacs"].parent
    document = json.loads(runs["dacs"].with_suffix(".json").read_text(encoding="utf-8"))
    names, classes = document["pictures"], document["options"]["pair"]["classes"]

    def maps(labels: Iterable[Tensor]) -> list[Picture]:
        colors = [COLORS[name] for name in classes]
        return [Picture(colorize(label, colors=colors), exact=True) for label in labels]

    def stored(path: Path) -> list[Picture]:
        return maps(stack(path, len(names))[:, 0])

    photographs = pictured(load(PAIR, camvid)) if camvid else []
    columns = {
        "rendered scene": [Picture(image) for image in stack(folder / "scenes.png", len(names))],
        "its labels": stored(folder / "scene-labels.png"),
        "photograph": [Picture(sample.image) for sample in photographs],
        **{f"{name}, prediction": stored(path) for name, path in runs.items()},
        "true labels": maps(sample.label for sample in photographs if sample.label is not None),
    }
    rows = [f"{name}\n{'at dusk' if i < PICTURED else 'by day'}" for i, name in enumerate(names)]
    legend = {name: COLORS[name] for name in classes} | {"unlabelled": (0, 0, 0)}
    return pictures(f"{PAIR}, seed 0", {title: column for title, column in columns.items() if column}, rows, legend)


def stack(path: Path, count: int) -> Tensor:
    """Read pictures that `write_stack` wrote, (N, 3, H, W) uint8."""
    image = read_image(path)
    return image.reshape(3, count, -1, image.shape[-1]).transpose(0, 1)
