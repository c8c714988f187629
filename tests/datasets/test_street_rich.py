"""The rich look of StreetScenes; and that the flat one, on which published figures stand, has not moved by a bit."""

import hashlib

import pytest
import torch

from crossmix.datasets import StreetScenes
from crossmix.datasets.classes import CLASS_NAMES

# SHA-256 of the images and labels 0, 1, 7 and 999, by (domain, size, seed); from the version without `style`.
FLAT = {
    ("source", (16, 16), 0): "0673ea955aa5f1b3",
    ("source", (64, 128), 3): "95eec8093736daa0",
    ("source", (37, 53), 0): "3b3f1124a4ce9714",
    ("source", (160, 213), 0): "34095311e66fe63c",
    ("target", (16, 16), 3): "04bc725447605b60",
    ("target", (64, 128), 0): "a0d0a3001b9d6179",
    ("target", (37, 53), 3): "0f48231c040a93e7",
    ("target", (160, 213), 3): "d938d75e089a7c9a",
}


@pytest.mark.parametrize(("domain", "size", "seed"), FLAT)
def test_flat__is_as_before_there_were_styles(domain: str, size: tuple[int, int], seed: int) -> None:
    for given in ({}, {"style": "flat"}):
        scenes = StreetScenes(1000, domain=domain, size=size, seed=seed, **given)
        found = hashlib.sha256()
        for i in (0, 1, 7, 999):
            found.update(scenes[i].image.numpy().tobytes())
            found.update(scenes[i].label.numpy().tobytes())
        assert found.hexdigest().startswith(FLAT[domain, size, seed])


def test_rich__is_a_pure_function_of_seed_and_index() -> None:
    scenes = StreetScenes(20, style="rich", size=(48, 64), seed=4)
    forward = [scenes[i] for i in range(20)]
    for i in reversed(range(20)):
        again = StreetScenes(30, style="rich", size=(48, 64), seed=4)[i]
        assert torch.equal(again.image, forward[i].image)
        assert torch.equal(again.label, forward[i].label)
    for other in (StreetScenes(20, style="rich", size=(48, 64), seed=5), StreetScenes(20, size=(48, 64), seed=4)):
        assert not any(torch.equal(other[i].label, forward[i].label) for i in range(20))


@pytest.mark.filterwarnings("error")  # such as NumPy's about overflow
@pytest.mark.parametrize("size", [(16, 16), (33, 57), (57, 33), (16, 300), (300, 16), (240, 320)])
def test_rich__any_size(size: tuple[int, int]) -> None:
    scenes = StreetScenes(10, style="rich", size=size)
    for i in range(10):
        assert scenes[i].image.shape == (3, *size)
        assert scenes[i].label.shape == size
        assert scenes[i].image.dtype == scenes[i].label.dtype == torch.uint8


def test_rich__a_street_with_all_classes() -> None:
    scenes = StreetScenes(200, style="rich", size=(80, 107))
    labels = torch.stack([scenes[i].label for i in range(200)])
    counts = torch.bincount(labels.flatten().long(), minlength=19)
    assert counts.shape == (19,)  # nothing is ignored
    share = dict(zip(CLASS_NAMES, (counts / counts.sum()).tolist(), strict=True))
    assert min(share.values()) > 0.0005
    for name, low, high in (
        ("road", 0.25, 0.4), ("building", 0.15, 0.3), ("sky", 0.1, 0.25), ("vegetation", 0.05, 0.2), ("car", 0.03, 0.1),
    ):  # fmt: skip
        assert low < share[name] < high, name
    rows = torch.arange(80.0)
    height = {i: ((labels == i).sum((0, 2)) * rows).sum() / counts[i] for i in (0, 2, 10)}
    assert height[10] < height[2] < height[0]  # sky above houses above road
    assert (labels[:, -1] == 10).float().mean() < 0.001  # no sky at the feet


def test_rich__differs_more_in_light_than_flat() -> None:
    def spread(style: str) -> float:
        scenes = StreetScenes(40, size=(80, 107), style=style)
        return float(torch.stack([scenes[i].image.float().mean() for i in range(40)]).std())

    assert spread("rich") > 1.5 * spread("flat")


def test_style__refused() -> None:
    with pytest.raises(ValueError, match="`style` must be one of 'flat', 'rich'"):
        StreetScenes(1, style="Rich")
    with pytest.raises(ValueError, match="`style` 'rich' is a look of the source"):
        StreetScenes(1, style="rich", domain="target")
