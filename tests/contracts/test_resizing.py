"""One nearest-neighbour resize of label maps: whatever resizes them takes the pixels that Pillow takes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import camvid_day_to_dusk
import pictures
from checks import examples
from crossmix.datasets import Sample, SegmentationFolder, write_png
from crossmix.evaluation import evaluate, resize_labels
from crossmix.visualize import colorize

Size = tuple[int, int]


def by_pillow(labels: Tensor, size: Size) -> Tensor:
    image = Image.fromarray(labels.numpy().astype(np.int32))
    return torch.from_numpy(np.array(image.resize((size[1], size[0]), Image.Resampling.NEAREST))).long()


def places(old: Size) -> Tensor:
    """A map in which every pixel has a number of its own."""
    return torch.arange(old[0] * old[1]).reshape(old)


sides = st.integers(1, 400)


@given(sides, sides, st.sampled_from(["rows", "columns"]))
@settings(max_examples=examples(300), deadline=None)
def test_resize_labels__is_pillows(old: int, new: int, axis: str) -> None:
    before, after = ((old, 1), (new, 1)) if axis == "rows" else ((1, old), (1, new))
    assert torch.equal(resize_labels(places(before), after), by_pillow(places(before), after))


@given(st.integers(1, 14), st.integers(1, 14), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=examples(30), deadline=None)
def test_evaluate__scores_the_pixels_that_pillow_takes(height: int, width: int, rows: int, columns: int) -> None:
    """Every pixel is a class of its own, so the matrix says which were scored, and how often."""
    labels = places((height, width))
    network = nn.Conv2d(3, labels.numel(), 1)
    data = [(torch.zeros(3, 2, 2), labels)]
    matrices = evaluate(
        network, data, num_classes=labels.numel(), label_sizes=[(rows, columns)], ignore_index=labels.numel()
    )
    scored = next(iter(matrices.values())).counts.sum(1)
    want = by_pillow(labels, (rows, columns)).flatten().bincount(minlength=labels.numel())
    assert torch.equal(scored, want)


@pytest.mark.parametrize(("old", "new"), [((7, 9), (3, 4)), ((6, 4), (9, 7)), ((4, 6), (42, 21)), ((30, 41), (11, 13))])
def test_pictures_readers_and_examples__take_the_pixels_that_pillow_takes(
    old: Size, new: Size, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = (places(old) * 7 % 11).to(torch.uint8)
    want = by_pillow(labels, new)

    sample = Sample(torch.zeros(3, *old, dtype=torch.uint8), labels, "a")
    row = pictures.predicted_rows(nn.Conv2d(3, 19, 1), [sample], new, "cpu")[0]
    assert torch.equal(row[2], colorize(want))

    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    write_png(tmp_path / "images" / "a.png", sample.image)
    write_png(tmp_path / "labels" / "a.png", labels)
    read = SegmentationFolder(tmp_path / "images", tmp_path / "labels", size=new)[0]
    assert torch.equal(read.label.long(), want)

    monkeypatch.setattr(camvid_day_to_dusk, "SIZE", new)
    Image.fromarray(labels.numpy()).convert("RGB").save(tmp_path / "labels" / "a.png")
    assert torch.equal(camvid_day_to_dusk.load(tmp_path)[1][0].long(), want)


@pytest.mark.parametrize(
    ("size", "seen", "shown"),
    [((20, 48), (20, 48), (20, 48)), (None, (8, 32), (8, 32)), ((16, 2048), (16, 2048), (8, 1024))],
)
def test_pictures__are_predicted_as_the_network_is_evaluated(size: Size | None, seen: Size, shown: Size) -> None:
    sizes: list[Size] = []
    network = nn.Conv2d(3, 19, 3, stride=2).train()
    network.register_forward_pre_hook(lambda _, images: sizes.append(tuple(images[0].shape[2:])))
    sample = Sample(torch.zeros(3, 8, 32, dtype=torch.uint8), torch.zeros(8, 32, dtype=torch.uint8), "a")
    rows = pictures.predicted_rows(network, [sample], size, "cpu")
    assert (sizes, network.training) == ([seen], True)
    assert [tuple(picture.shape) for picture in rows[0]] == [(3, *shown)] * 3
    beside = pictures.in_one_size(rows, (4, 4))
    assert [tuple(picture.shape) for picture in beside[0]] == [(3, 4, 4)] * 3


def test_resize_labels__refuses() -> None:
    for labels in (torch.zeros(4), torch.zeros(0, 4)):
        with pytest.raises(ValueError, match=r"`labels` must have shape \(..., H, W\)"):
            resize_labels(labels, (2, 2))
    with pytest.raises(ValueError, match="`size` must be positive"):
        resize_labels(torch.zeros(4, 4), (0, 2))
    for size in ((2,), 2):
        with pytest.raises(TypeError, match=r"`size` must be \(height, width\)"):
            resize_labels(torch.zeros(4, 4), size)
    with pytest.raises(TypeError, match="`labels` must be a torch"):
        resize_labels(np.zeros((2, 2)), (1, 1))
