"""The smallest example learns, and runs on folders of one's own; every example has its line in their README."""

import re
from pathlib import Path

import pytest
import torch

import minimal
from crossmix.datasets import SegmentationFolder, StreetScenes, write_png
from crossmix.evaluation import evaluate
from runs import EXAMPLES

SIZE = (64, 128)


@pytest.mark.slow
def test_minimal__learns_the_unlabelled_domain() -> None:
    torch.manual_seed(0)
    network = minimal.small_network()
    minimal.train(network, StreetScenes(200, size=SIZE), StreetScenes(200, domain="target", size=SIZE), steps=200)
    scores = evaluate(network, StreetScenes(50, domain="target", size=SIZE, seed=1))["native"].compute()
    assert scores.mean > 0.2  # 0.30 with this seed; trained on the source alone, 0.12


@pytest.mark.parametrize("count", [1, 6])  # fewer than a batch, too
def test_minimal__runs_on_folders_as_its_docstring_says(tmp_path: Path, count: int) -> None:
    for domain, size in (("source", (80, 100)), ("target", (60, 140))):  # of other sizes than SIZE, and of each other
        for i, (image, label, _) in enumerate(StreetScenes(count, domain=domain, size=size)):  # type: ignore[arg-type]
            for kind, pixels in (("images", image), ("labels", label)):
                (tmp_path / domain / kind).mkdir(parents=True, exist_ok=True)
                write_png(tmp_path / domain / kind / f"{i}.png", pixels)
    torch.manual_seed(0)
    network = minimal.small_network()
    before = [parameter.clone() for parameter in network.parameters()]
    images, labels = tmp_path / "source" / "images", tmp_path / "source" / "labels"
    source = SegmentationFolder(images, labels, num_classes=minimal.NUM_CLASSES, size=minimal.SIZE)
    target = SegmentationFolder(tmp_path / "target" / "images", size=minimal.SIZE)
    minimal.train(network, source, target, steps=2)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert not all(torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


def test_readme__has_a_line_for_every_file() -> None:
    listed = re.findall(r"^\| \[`(.*)`\]\(\1\) \|", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert sorted(listed) == sorted(files)
