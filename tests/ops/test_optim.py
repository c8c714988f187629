"""The optimiser of the released code, against the sequence of updates that it stands for; groups; the schedule."""

import copy
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from checks import WRAPS, channels_last, compiled, strided, transposed
from crossmix.models import deeplab_v2_resnet101, deeplab_v2_tiny
from crossmix.optim import RepeatedSGD, parameter_groups, poly_lr

MU, DECAY = 0.9, 5e-4


def touch(p: Tensor, v: Tensor, g: Tensor, lr: float, *, nesterov: bool) -> None:
    """One plain SGD update, written out."""
    d = g + DECAY * p
    v.copy_(MU * v + d)
    p.sub_(lr * (d + MU * v if nesterov else v))


def released_listing(model: nn.Module) -> list[nn.Parameter]:
    """The backbone as the released code walks it: each stage's modules, and every parameter below each of them."""
    listed = []
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
        for module in model.get_submodule(name).modules():
            listed += [parameter for parameter in module.parameters() if parameter.requires_grad]
    return listed


def released_sgd(model: nn.Module) -> RepeatedSGD:
    return RepeatedSGD(parameter_groups(model, 0.1, repeated=True), momentum=MU, weight_decay=DECAY)


def fill_gradients(params: Iterable[Tensor], generator: torch.Generator) -> None:
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.device("meta"):
        return deeplab_v2_resnet101(19)


def test_groups__list_the_backbone_as_the_released_code(network: nn.Module) -> None:
    backbone, head = parameter_groups(network, 2.5e-4, repeated=True)
    listed = [id(p) for p in backbone["params"]]
    assert listed == [id(p) for p in released_listing(network)]
    assert (len(listed), len(head["params"])) == (314, 8)
    assert [id(p) for p in parameter_groups(network, 1.0)[0]["params"]] == list(dict.fromkeys(listed))


def test_repeats__are_one_three_and_four_in_resnet101_and_one_more_in_a_container(network: nn.Module) -> None:
    optimizer = RepeatedSGD(parameter_groups(network, 2.5e-4, repeated=True), momentum=MU)
    names = {id(p): name for name, p in network.named_parameters()}
    group, head = optimizer.param_groups
    for parameter, repeats in zip(group["params"], group["repeats"], strict=True):
        name = names[id(parameter)]
        assert repeats == (1 if name == "conv1.weight" else 4 if "downsample" in name else 3), name
    assert [group["repeats"].count(k) for k in (1, 3, 4)] == [1, 99, 4]
    assert head["repeats"] == [1] * 8
    around = RepeatedSGD(parameter_groups(nn.Sequential(nn.Identity(), network), 1.0, head="1.layer5", repeated=True))
    assert around.param_groups[0]["repeats"] == [count + 1 for count in group["repeats"]]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of sharding on a CPU
def test_groups__of_a_wrapped_network_are_those_of_the_bare_one(wrap: str) -> None:
    def named(network: nn.Module, head: str | nn.Module) -> list[list[str]]:
        added = r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # no part of DeepLab's names
        names = {id(p): re.sub(added, "", name) for name, p in network.named_parameters()}
        options = {"head": head, "no_decay": ["bias"]}
        groups = [g for repeated in (False, True) for g in parameter_groups(network, 0.1, repeated=repeated, **options)]
        return [[names[id(p)] for p in group["params"]] for group in groups]

    network = deeplab_v2_tiny(5)
    want = named(network, "layer5")
    wrapped = WRAPS[wrap](network)
    [(in_names, _)] = [item for item in wrapped.named_modules() if item[1] is network.layer5]
    for head in ("layer5", network.layer5, in_names):
        assert named(wrapped, head) == want


@pytest.mark.parametrize("own", ["module", "_orig_mod"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda network: compiled(nn.DataParallel(network))])
def test_groups__a_head_of_a_wrappers_name(own: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    network = nn.ModuleDict({own: nn.Linear(2, 2), "body": nn.Linear(2, 2)})
    wrapped = wrap(network)
    for head in (own, network[own]):
        backbone, in_head = parameter_groups(wrapped, 0.1, head=head)
        assert set(backbone["params"]) == set(network["body"].parameters())
        assert set(in_head["params"]) == set(network[own].parameters())


def test_groups__any_network_and_kinds_without_decay() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4))
            self.position_embeddings = nn.Embedding(3, 4)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(5))
            self.decomposition = nn.Linear(4, 4, bias=False)
            self.attention = nn.MultiheadAttention(4, 1)
            self.norm = nn.LayerNorm(4)
            self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    class RMSNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(4))

    class Activated(nn.BatchNorm2d):
        """Another name for a normalisation layer, as in timm."""

    network = nn.ModuleDict({
        "body": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block(), RMSNorm2d(), Activated(4)),
        "classifier": nn.Sequential(nn.GroupNorm(1, 4), nn.Conv2d(4, 5, 1)),
        "auxiliary": nn.Conv2d(4, 5, 1),
    })  # fmt: skip
    names = {id(p): name for name, p in network.named_parameters()}
    norms = {"body.1.weight", "body.1.bias", "body.2.norm.weight", "body.2.norm.bias", "body.3.scale",
             "body.4.weight", "body.4.bias", "classifier.0.weight", "classifier.0.bias"}  # fmt: skip
    positions = {"body.2.pos_embed", "body.2.position_embeddings.weight", "body.2.relative_position_bias_table"}
    biases = {name for name in names.values() if "bias" in name}
    assert "body.2.attention.in_proj_bias" in biases
    heads = {name for name in names.values() if name.startswith(("classifier.", "auxiliary."))}
    trained = set(names.values()) - {"body.2.frozen"}
    for kinds, free in (
        ((), set()),
        (("norm",), norms),
        (("bias",), biases),
        (("position",), positions),
        (("norm", "bias", "position"), norms | biases | positions),
    ):
        for head in (["classifier", "auxiliary"], [network["classifier"], "auxiliary"]):
            groups = parameter_groups(network, 6e-5, head=head, head_factor=4.0, no_decay=kinds)
            got = {(g["lr"], g.get("weight_decay")): {names[id(p)] for p in g["params"]} for g in groups}
            want = {
                (6e-5, None): trained - heads - free,
                (4.0 * 6e-5, None): heads - free,
                (6e-5, 0.0): free - heads,
                (4.0 * 6e-5, 0.0): free & heads,
            }
            assert got == {key: value for key, value in want.items() if value}
            assert all(group["lr"] == group["initial_lr"] for group in groups)
            assert sum(len(group["params"]) for group in groups) == len(trained)
    optimizer = torch.optim.AdamW(parameter_groups(network, 1.0, head=None, no_decay="norm"), weight_decay=0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_groups__a_shared_parameter_is_in_one() -> None:
    network = nn.ModuleDict({"body": nn.Linear(2, 2), "tied": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    network["head"].weight = network["tied"].weight = network["body"].weight
    network["tied"].bias = network["body"].bias
    network["again"] = network["body"]  # a shared module counts once
    for repeated in (False, True):
        backbone, head = parameter_groups(network, 0.1, head="head", repeated=repeated)
        assert {id(p) for p in backbone["params"]} == {id(network["body"].bias)}
        assert [id(p) for p in head["params"]] == [id(network["body"].weight), id(network["head"].bias)]
        assert len(backbone["params"]) == 1 + repeated  # once for each module around it


@pytest.mark.parametrize("nesterov", [False, True])
def test_step__is_the_sequence_of_its_repetitions(*, nesterov: bool) -> None:
    torch.manual_seed(0)
    model = deeplab_v2_tiny(5, aspp_branches=2, freeze_bn_affine=True).double()
    optimizer = RepeatedSGD(
        parameter_groups(model, 0.01, repeated=True), momentum=MU, weight_decay=DECAY, nesterov=nesterov
    )
    listed = [(p, 0.01) for p in released_listing(model)] + [(p, 0.1) for p in model.layer5.parameters()]
    want = {p: p.detach().clone() for p, _ in listed}
    velocity = {p: torch.zeros_like(p) for p, _ in listed}
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        fill_gradients(want, generator)
        decay = 0.95**step
        for group in optimizer.param_groups:
            group["lr"] = decay * group["initial_lr"]
        for p, lr in listed:
            touch(want[p], velocity[p], p.grad, decay * lr, nesterov=nesterov)
        optimizer.step()
    for p, value in want.items():
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-10)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], velocity[p], rtol=0, atol=1e-10)


def test_step__equals_torch_where_nothing_is_repeated() -> None:
    torch.manual_seed(0)
    one, two = deeplab_v2_tiny(5), deeplab_v2_tiny(5)
    two.load_state_dict(one.state_dict())
    ours = RepeatedSGD(parameter_groups(one, 0.1), momentum=MU, weight_decay=DECAY, nesterov=True)
    torchs = torch.optim.SGD(parameter_groups(two, 0.1), 0.1, MU, 0, DECAY, nesterov=True, fused=True)
    for seed in range(3):
        for model in (one, two):
            fill_gradients(model.parameters(), torch.Generator().manual_seed(seed))
        ours.step()
        torchs.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_step__is_not_what_torch_makes_of_repeated_parameters() -> None:
    """The reason for the class: with torch's own SGD the first step already differs, in either implementation."""
    results = []
    for foreach in (None, False, True):
        weight = nn.Parameter(torch.zeros(1))
        weight.grad = torch.ones(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the duplicates
            build = RepeatedSGD if foreach is None else torch.optim.SGD
            optimizer = build([weight] * 3, lr=0.1, momentum=MU, **({} if foreach is None else {"foreach": foreach}))
        optimizer.step()
        results.append(weight.item())
    assert results[0] == pytest.approx(-0.561)
    assert results[0] not in [pytest.approx(result, rel=0.1) for result in results[1:]]


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of sharding on a CPU
def test_step__of_a_sharded_network_is_that_of_the_bare_one() -> None:
    torch.manual_seed(0)
    bare = deeplab_v2_tiny(5).double()  # float32 rounds to a per cent of difference on some CPUs
    shards = WRAPS["FSDP2 parts"](copy.deepcopy(bare))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    for model in (bare, shards):
        optimizer = released_sgd(model)
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    for p, q in zip(bare.parameters(), shards.parameters(), strict=True):
        torch.testing.assert_close(p, q.full_tensor(), rtol=1e-9, atol=1e-12)


def test_step__skips_what_has_no_gradient() -> None:
    model = deeplab_v2_tiny(5, aspp_branches=2)
    optimizer = released_sgd(model)
    idle = copy.deepcopy(model.layer5.conv2d_list[2:])
    optimizer.step()  # no gradient anywhere
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    for p, q in zip(idle.parameters(), model.layer5.conv2d_list[2:].parameters(), strict=True):
        assert torch.equal(p, q)
        assert q not in optimizer.state
    model.layer5.branches = 4  # a parameter that gets its first gradient later
    model(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert all(p in optimizer.state for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("momentum", [0.0, MU])
def test_step__any_memory_layout(momentum: float) -> None:
    values, grads = torch.rand(6, 4, 3, 3), torch.rand(2, 6, 4, 3, 3)
    layouts = (Tensor.clone, channels_last, transposed, strided)
    want = None
    for of_parameter, of_gradient in itertools.product(layouts, layouts):
        weight = nn.Parameter(of_parameter(values.clone()))
        optimizer = RepeatedSGD([weight] * 3, 0.1, momentum=momentum, weight_decay=0.01)
        for grad in grads:
            weight.grad = of_gradient(grad)
            optimizer.step()
        want = weight.detach().clone() if want is None else want
        torch.testing.assert_close(weight.detach(), want, rtol=1e-6, atol=1e-6)


def test_step__sparse_gradients_and_other_dtypes() -> None:
    dense = nn.Parameter(torch.ones(4, 2))
    sparse = nn.Parameter(torch.ones(4, 2))
    dense.grad = torch.tensor([[0.0, 0], [1, 1], [0, 0], [2, 2]])
    sparse.grad = dense.grad.to_sparse(1)
    for weight in (dense, sparse):
        RepeatedSGD([weight] * 2, 0.1).step()
    assert torch.equal(dense, sparse)
    for dtype in (torch.float16, torch.bfloat16, torch.complex64):
        weight = nn.Parameter(torch.ones(3, dtype=dtype))
        weight.grad = torch.ones(3, dtype=dtype)
        RepeatedSGD([weight] * 3, 0.5, momentum=0.5).step()
        assert weight.detach().real.tolist() == pytest.approx([1 - 0.5 * (1 + 1.5 + 1.75)] * 3)


def test_step__runs_a_closure_with_gradients_and_keeps_gradients_as_they_are() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = RepeatedSGD([weight, weight], lr=0.1, weight_decay=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 2.0
    torch.testing.assert_close(weight.grad, torch.full((2,), 2.0))
    torch.testing.assert_close(weight.detach(), torch.full((2,), (1 - 0.25) - 0.1 * (2 + 0.375)))


def test_state_dict__round_trip_continues_the_trajectory() -> None:
    torch.manual_seed(0)
    one = deeplab_v2_tiny(5)
    first = released_sgd(one)
    fill_gradients(one.parameters(), torch.Generator().manual_seed(0))
    first.step()
    two = copy.deepcopy(one)
    second, file = released_sgd(two), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.state_dict()["param_groups"] == first.state_dict()["param_groups"]
    for model, optimizer in ((one, first), (two, second)):
        fill_gradients(model.parameters(), torch.Generator().manual_seed(9))
        optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def released_state(model: nn.Module) -> tuple[dict[str, object], dict[nn.Parameter, Tensor]]:
    """What torch saves for the released code's optimizer: ids repeated, options of a torch of 2020."""
    listed, head = released_listing(model), list(model.layer5.parameters())
    buffers = {p: torch.rand_like(p) for p in (*listed, *head)}
    ids: dict[nn.Parameter, int] = {}
    for i, p in enumerate((*listed, *head)):
        ids.setdefault(p, i)
    options = {"lr": 1e-4, "momentum": MU, "dampening": 0, "weight_decay": DECAY, "nesterov": False}
    groups = [{**options, "params": [ids[p] for p in group]} for group in (listed, head)]
    return {"state": {ids[p]: {"momentum_buffer": v} for p, v in buffers.items()}, "param_groups": groups}, buffers


def test_load_state_dict__understands_a_released_checkpoint() -> None:
    model = deeplab_v2_tiny(5)
    state, buffers = released_state(model)
    before = copy.deepcopy(state)
    optimizer = RepeatedSGD(parameter_groups(model, 0.1, repeated=True))
    optimizer.load_state_dict(state)
    assert len(state["param_groups"][0]["params"]) == len(before["param_groups"][0]["params"])
    for p, v in buffers.items():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], v)
    assert optimizer.param_groups[0]["momentum"] == MU
    fill_gradients(model.parameters(), torch.Generator().manual_seed(0))
    velocity = {p: v.clone() for p, v in buffers.items()}  # the loaded ones may share memory
    p, want = model.layer2[0].conv1.weight, model.layer2[0].conv1.weight.detach().clone()
    for _ in range(3):
        touch(want, velocity[p], p.grad, 1e-4, nesterov=False)
    optimizer.step()
    torch.testing.assert_close(p.detach(), want)


def test_load_state_dict__refuses_other_counts() -> None:
    model = deeplab_v2_tiny(5, freeze_bn_affine=True)
    state, _ = released_state(model)
    plain = RepeatedSGD(parameter_groups(model, 0.1))
    with pytest.raises(
        ValueError, match=r"expected 17 x1, got 1 x1, 12 x3, 4 x4; build .* `parameter_groups\(\.\.\., repeated=True"
    ):
        plain.load_state_dict(state)
    repeated = RepeatedSGD(parameter_groups(model, 0.1, repeated=True))
    with pytest.raises(ValueError, match=r"got 17 x1; build the groups with .* repeated=False"):
        repeated.load_state_dict(torch.optim.SGD(parameter_groups(model, 0.1), 0.1).state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        repeated.load_state_dict(RepeatedSGD(released_listing(model), 0.1).state_dict())


def test_groups__can_be_passed_on_with_their_counts() -> None:
    weight, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    first = RepeatedSGD([weight, other, weight], 0.1)
    second = RepeatedSGD(first.param_groups)
    assert second.param_groups[0]["repeats"] == [2, 1]
    named = RepeatedSGD([("a", weight), ("a", weight), ("b", other)], 0.1)
    assert named.param_groups[0]["repeats"] == [2, 1]
    first.add_param_group({"params": nn.Parameter(torch.ones(1))})
    assert first.param_groups[1]["repeats"] == [1]


def test_poly_lr__warms_up_linearly_below_the_decay() -> None:
    for step in range(0, 101, 5):
        decayed = 6e-5 * (1 - step / 100) ** 1.0
        ramp = min(1.0, 0.1 + 0.9 * step / 40)
        assert poly_lr(step, 100, 6e-5, power=1.0, warmup=40, warmup_ratio=0.1) == pytest.approx(
            decayed * ramp, rel=1e-12
        )
    assert poly_lr(0, 40_000, 6e-5, power=1.0, warmup=1500) == pytest.approx(6e-11, rel=1e-12)
    assert poly_lr(step=3, steps=9, lr=1.0) == poly_lr(3, 9, 1.0, warmup=3)  # it is over
