"""DeepLab-v2: the published architecture, to the key."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from checks import refusal
from crossmix.models import DeepLabV2, deeplab_v2_resnet101, deeplab_v2_tiny
from crossmix.optim import parameter_groups, poly_lr


def published_keys(num_classes: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the released checkpoint, in its order."""

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", (channels,)
        yield f"{name}.num_batches_tracked", ()

    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    inputs = 64
    for stage, (blocks, planes) in enumerate(((3, 64), (4, 128), (23, 256), (3, 512)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield f"{name}.conv1.weight", (planes, inputs, 1, 1)
            yield from norm(f"{name}.bn1", planes)
            yield f"{name}.conv2.weight", (planes, planes, 3, 3)
            yield from norm(f"{name}.bn2", planes)
            yield f"{name}.conv3.weight", (4 * planes, planes, 1, 1)
            yield from norm(f"{name}.bn3", 4 * planes)
            if block == 0:
                yield f"{name}.downsample.0.weight", (4 * planes, inputs, 1, 1)
                yield from norm(f"{name}.downsample.1", 4 * planes)
            inputs = 4 * planes
    for branch in range(4):
        yield f"layer5.conv2d_list.{branch}.weight", (num_classes, 2048, 3, 3)
        yield f"layer5.conv2d_list.{branch}.bias", (num_classes,)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return deeplab_v2_resnet101(19)


@pytest.fixture(scope="module")
def bare() -> nn.Module:
    with torch.device("meta"):
        return deeplab_v2_resnet101(19)


def test_resnet101__keys_and_shapes_are_the_published_ones(network: nn.Module) -> None:
    got = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    assert got == list(published_keys(19))
    assert len(got) == 632
    assert sum(p.numel() for p in network.parameters()) == 43_901_068
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 43_795_724


@pytest.mark.parametrize(
    ("size", "features"),
    [((512, 512), (65, 65)), ((512, 1024), (65, 129)), ((720, 1280), (91, 161)), ((33, 47), (5, 7))],
)
def test_resnet101__feature_sizes(bare: nn.Module, size: tuple[int, int], features: tuple[int, int]) -> None:
    images = torch.empty(1, 3, *size, device="meta")
    assert bare.forward_features(images).shape == (1, 19, *features)
    assert bare(images).shape == (1, 19, *size)


def test_resnet101__initial_values_and_frozen_norms(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.weight.requires_grad
            assert not module.bias.requires_grad
        elif isinstance(module, nn.Conv2d) and module.weight.numel() > 1e5:
            assert abs(float(module.weight.detach().std()) - 0.01) < 2e-4


def restated(state: dict[str, Tensor], images: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """The logits of the published network at 1/8, written from its description on nothing but its tensors."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def conv(x: Tensor, name: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding = dilation * (weight.shape[-1] // 2)
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, dilation)

    blue_green_red = torch.stack([images[:, 2], images[:, 1], images[:, 0]], 1) * 255
    x = blue_green_red - torch.tensor([104.00698793, 116.66876762, 122.67891434], dtype=images.dtype)[:, None, None]
    x = F.relu(norm(conv(x, "conv1", stride=2), "bn1"))
    rows, columns = (-(-(size - 1) // 2) + 1 for size in x.shape[-2:])  # ceil((size + 2 - 3) / 2) + 1
    x = F.pad(x, (1, 2, 1, 2), value=-torch.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((-1, -2))[..., :rows, :columns]
    for stage, (blocks, stride, dilation) in enumerate(((3, 1, 1), (4, 2, 1), (23, 1, 2), (3, 1, 4)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            step = stride if block == 0 else 1
            y = F.relu(norm(conv(x, f"{name}.conv1", step), f"{name}.bn1"))
            y = F.relu(norm(conv(y, f"{name}.conv2", 1, dilation), f"{name}.bn2"))
            y = norm(conv(y, f"{name}.conv3"), f"{name}.bn3")
            if block == 0:
                x = norm(conv(x, f"{name}.downsample.0", step), f"{name}.downsample.1")
            x = F.relu(x + y)
    return sum(
        (conv(x, f"layer5.conv2d_list.{i}", 1, dilation) for i, dilation in enumerate(dilations)), torch.zeros(())
    )


@pytest.fixture(scope="module")
def in_use(network: DeepLabV2) -> DeepLabV2:
    """The values of a network in use: nothing is one or zero."""
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(network).eval()
    for name, value in model.state_dict().items():
        if value.ndim == 1 and not name.startswith("layer5"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.ndim == 4:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    return model


@pytest.mark.parametrize(("size", "branches"), [((65, 97), 4), ((64, 96), 2), ((50, 35), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
def test_resnet101__is_its_restatement(
    in_use: DeepLabV2, dtype: torch.dtype, branches: int, size: tuple[int, int]
) -> None:
    model = in_use if dtype is torch.float32 else copy.deepcopy(in_use).to(dtype)
    model.layer5.branches = branches
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        want = restated(model.state_dict(), images, (6, 12, 18, 24)[:branches])
        scale = want.abs().max()
        tolerance = 1e-5 if dtype is torch.float32 else 1e-10
        full = F.interpolate(want, size=size, mode="bilinear", align_corners=True)
        for got, wanted in ((model.forward_features(images), want), (model(images), full)):
            torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=tolerance)


def test_switches__idle_branches_frozen_norms_and_no_upsampling() -> None:
    network = deeplab_v2_tiny(5, aspp_branches=2, freeze_bn_affine=True, upsample=False).train()
    before, images = network.bn1.running_mean.clone(), torch.rand(2, 3, 32, 40)
    network(images).sum().backward()
    assert [conv.weight.grad is not None for conv in network.layer5.conv2d_list] == [True, True, False, False]
    assert all(p.requires_grad for p in network.layer5.parameters())
    assert "branches=2" in repr(network)
    assert network.bn1.weight.grad is None
    assert not torch.equal(before, network.bn1.running_mean)  # though the affine part is frozen
    torch.testing.assert_close(network.eval()(images), network.forward_features(images))


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 3, 1, 1), (2, 3, 7, 5)])
def test_forward__any_size(shape: tuple[int, ...]) -> None:
    assert deeplab_v2_tiny(5).eval()(torch.rand(shape)).shape == (shape[0], 5, *shape[2:])


def test_forward__formats_precisions_and_compile() -> None:
    torch.manual_seed(0)
    network = deeplab_v2_tiny(5).eval()
    images = torch.rand(2, 3, 16, 24)
    want = network(images)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images.to(memory_format=torch.channels_last)), want, rtol=1e-4, atol=1e-4)
    double = copy.deepcopy(network).double()(images.double())
    torch.testing.assert_close(double.float(), want, rtol=1e-3, atol=1e-3)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            half = network(images)
        assert half.dtype == dtype
        assert float((half.float() - want).detach().abs().max()) < 0.05 * float(want.detach().abs().max())
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_forward__exports() -> None:
    network, images = deeplab_v2_tiny(5).eval(), torch.rand(2, 3, 16, 24)
    exported = torch.export.export(network, (images,)).module()
    torch.testing.assert_close(exported(images), network(images), rtol=1e-4, atol=1e-4)


def test_bad_arguments() -> None:
    image = torch.zeros(1, 3, 32, 32)
    refusal(lambda: deeplab_v2_tiny(5, aspp_branches=5), r"`aspp_branches` must lie in 1..4, got 5", ValueError)
    refusal(lambda: deeplab_v2_tiny(0), "`num_classes` must be at least 1", ValueError)
    refusal(lambda: deeplab_v2_tiny(5)(image[:, [0, 0, 0, 0]]), "convert them to 3 channels", ValueError)
    refusal(lambda: deeplab_v2_tiny(5)(image.byte()), r"`.float\(\) / 255`", TypeError)


def test_parameter_groups__head_learns_ten_times_as_fast(network: nn.Module) -> None:
    backbone, head = parameter_groups(network, 2.5e-4)
    assert (backbone["lr"], head["lr"]) == (2.5e-4, 2.5e-3)
    assert len(backbone["params"]) == 104
    assert len(head["params"]) == 8
    assert {id(p) for p in head["params"]} == {id(p) for p in network.layer5.parameters()}
    message = "`head` must name a submodule of the model, got 'classifier'; it has conv1, bn1"
    refusal(lambda: parameter_groups(network, 0.1, head="classifier"), message, ValueError)


def test_poly_lr__is_the_schedule() -> None:
    for step in (0, 1, 125_000, 249_999):
        assert poly_lr(step, 250_000, 2.5e-4) == pytest.approx(2.5e-4 * (1 - step / 250_000) ** 0.9, rel=1e-12)
    for step, total, name in ((-1, 5, "step"), (6, 5, "step"), (0, 0, "steps")):
        with pytest.raises(ValueError, match=f"`{name}` must"):
            poly_lr(step, total, 1.0)
