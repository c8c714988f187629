"""Every kind of file that weights come in, made here; and every kind of file that is none."""

import argparse
import collections
import copy
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from attacks import Calls, bomb, packed, shared, written
from checks import WRAPS, compiled, refusal
from crossmix import ClassMix, MeanTeacher, SelfTraining
from crossmix.models import (
    DeepLabV2,
    LoadReport,
    WeightsError,
    deeplab_v2_resnet101,
    deeplab_v2_tiny,
    load_weights,
    save_weights,
    weight_files,
)
from crossmix.models.weight_files import SOURCES
from oracles import flipped

State = dict[str, Tensor]


def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Every tensor with values of its own, counters too."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        drawn = torch.rand(value.shape, generator=generator)
        value.copy_(drawn + 0.5 if value.is_floating_point() else (drawn * 1000).long())
    return model


def tiny(seed: int, num_classes: int = 5) -> DeepLabV2:
    return randomised(deeplab_v2_tiny(num_classes), seed)


def snapshot(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(model: nn.Module, want: State) -> None:
    got = model.state_dict()
    assert list(got) == list(want)
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


def saved(contents: object, path: Path, *, legacy: bool = False) -> Path:
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    return path


def tensors_in(path: Path) -> State:
    """What others read: torch, or the reference of safetensors."""
    return safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def refused(model: nn.Module, path: Path | str, message: str, **options: object) -> str:
    """What the error says; the model is as it was."""
    before = snapshot(model)
    with pytest.raises(WeightsError, match=message) as caught:
        load_weights(model, path, **options)
    assert_equal(model, before)
    return str(caught.value)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def without(state: State, *parts: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(parts)}


def inside(state: State) -> State:
    """What compiling submodules leaves in names."""
    return {name.replace("layer1.0.", "layer1._orig_mod.0.module."): value for name, value in state.items()}


def trained(prefix: str) -> Callable[[State, State], State]:
    return lambda s, t: {**prefixed(f"{prefix}student.", s), **prefixed(f"{prefix}teacher.module.", t)}


# Where student and teacher are; the entry that leads to the student.
PLACES: dict[str, tuple[Callable[[State, State], object], str | None]] = {
    "plain": (lambda s, t: s, None),
    "ordered": (lambda s, t: OrderedDict(s), None),
    "ours": (lambda s, t: {"step": 3, "student": s, "teacher": {}, "optimizer": {}}, None),
    "a training module": (trained(""), "student"),
    "in a checkpoint": (lambda s, t: {"epoch": 3, "state_dict": trained("_orig_mod.")(s, t)}, None),
    "in another module": (lambda s, t: {"state_dict": trained("training.")(s, t)}, "student"),
    "with wrappers inside": (
        lambda s, t: {**prefixed("student.module.", inside(s)), **prefixed("teacher.module._orig_mod.", t)}, "student",
    ),
    "wrapped by hand": (lambda s, t: trained("")(prefixed("net.", s), prefixed("net.", t)), "student"),
    "a training module as the model": (lambda s, t: {"model": trained("module.")(s, t)}, "student"),
    "released": (lambda s, t: {"iteration": 9, "config": {"a": [1]}, "model": s, "ema_model": {}}, None),
    "released student": (lambda s, t: {"model": s, "ema_model": {}}, "student"),
    "released teacher": (lambda s, t: {"model": {}, "ema_model": s}, "teacher"),
    "released by name": (lambda s, t: {"model": {}, "ema_model": s}, "ema_model"),
    "an average beside it": (lambda s, t: {"model": s, "ema_model": t, "optimizer": {"state": {0: t}}}, None),
    "state_dict": (lambda s, t: {"epoch": 3, "state_dict": s}, None),
    "module.": (lambda s, t: prefixed("module.", s), None),
    "_orig_mod.": (lambda s, t: prefixed("_orig_mod.", s), None),
    "nested": (lambda s, t: prefixed("module._orig_mod.module.", s), None),
    "nested the other way": (lambda s, t: {"model": prefixed("_orig_mod.module.", s)}, None),
    "inside": (lambda s, t: inside(s), None),
    "Scale.": (lambda s, t: prefixed("Scale.", s), None),
    "Lightning": (lambda s, t: {"state_dict": {**prefixed("model.", s), "loss.weight": torch.ones(5)}}, "model"),
    "Lightning by default": (lambda s, t: {"state_dict": {**prefixed("model.", s), "loss.w": torch.ones(5)}}, None),
    "Lightning compiled": (lambda s, t: {"state_dict": prefixed("model._orig_mod.", s)}, "model"),
    "Lightning's student": (lambda s, t: {"state_dict": prefixed("model.", s), "ema_model": t}, "student"),
    "another name": (lambda s, t: {"net": s, "step": 3}, None),
    "a prefix of all": (lambda s, t: prefixed("backbone.", s), None),
    "a longer one": (lambda s, t: {"checkpoint": {"weights": prefixed("module.network.net.", s)}}, None),
    "its end": (lambda s, t: {"checkpoint": {"weights": prefixed("module.network.net.", s)}}, "network.net"),
    "two of other names": (lambda s, t: {"first": s, "second": t}, "first"),
    "keys with dots": (lambda s, t: {"nets.first": s, "nets.second": t}, "nets.first"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_load__every_tensor_from_wherever_in_the_file(place: str, tmp_path: Path) -> None:
    make, entry = PLACES[place]
    student, teacher = snapshot(tiny(1)), snapshot(tiny(2))
    contents = make(student, teacher)
    for legacy in (False, True) if place in {"plain", "released", "a training module"} else (False,):
        path, model = saved(contents, tmp_path / "x.pth", legacy=legacy), tiny(3)
        assert load_weights(model, path, entry=entry) == LoadReport(tuple(student), (), (), ())
        assert_equal(model, student)
        if "teacher." in str(list(contents)):
            load_weights(model, path, entry="teacher")
            assert_equal(model, teacher)


AND_AVERAGES = {**WRAPS, "averaged": lambda network: AveragedModel(compiled(network)), "teacher": MeanTeacher}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("wrap", AND_AVERAGES)
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")  # of sharding on a CPU
def test_load__into_a_wrapped_model(wrap: str, name: str, tmp_path: Path) -> None:
    want = snapshot(tiny(1))
    path = save_weights(AND_AVERAGES[wrap](tiny(1)), tmp_path / name, entry="model" if name == "x.pth" else None)
    found = torch.load(path, weights_only=True)["model"] if name == "x.pth" else safetensors.torch.load_file(path)
    assert all(value.device.type == "cpu" and not value.requires_grad for value in found.values())
    bare = tiny(3)
    assert str(bare.load_state_dict(found, strict=True)) == "<All keys matched successfully>"
    assert_equal(bare, want)
    wrapped = AND_AVERAGES[wrap](tiny(2))
    report = load_weights(wrapped, path)
    assert (len(report.matched), *report[1:]) == (len(want), (), (), ())
    assert set(report.matched) <= set(wrapped.state_dict())
    bare = tiny(4)
    load_weights(bare, save_weights(wrapped, tmp_path / f"again-{name}"))
    assert_equal(bare, want)


class Confusing(nn.Module):
    """A network with parts that are called what wrappers call theirs."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.module = nn.ModuleDict({"fc": nn.Linear(2, 2), "_orig_mod": nn.Linear(2, 2)})
        self.Scale = nn.Linear(2, 2)
        self.model = nn.ParameterDict({"module": nn.Parameter(torch.zeros(2))})
        self.fc = nn.Sequential(self.fc)
        randomised(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.usefixtures("process_group")
def test_names__of_the_models_own_win(name: str, tmp_path: Path) -> None:
    want = snapshot(Confusing(1))

    def check(path: Path, into: Callable[[nn.Module], nn.Module] = lambda model: model) -> None:
        model = Confusing(2)
        assert len(load_weights(into(model), path).matched) == len(want)
        assert_equal(model, want)

    for wrap in (lambda model: model, nn.DataParallel, compiled, DistributedDataParallel):
        path = save_weights(wrap(Confusing(1)), tmp_path / name)
        assert set(tensors_in(path)) == set(want)
        for into in (lambda model: model, nn.DataParallel, compiled):
            check(path, into)
    inner = {name.replace("module.fc.", "module._orig_mod.fc.module."): value for name, value in want.items()}
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.module.", "Scale.", "net.", "module.net.module."):
        check(saved(prefixed(prefix, want), tmp_path / "prefixed.pth"))
    check(saved(prefixed("module.", inner), tmp_path / "inside.pth"))


def test_save__shared_strided_and_parametrized_tensors(tmp_path: Path) -> None:
    def network(seed: int) -> nn.Module:
        tied = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": weight_norm(nn.Conv2d(3, 4, 3))})
        tied["b"].weight = tied["a"].weight
        tied["norm"].to(memory_format=torch.channels_last)
        tied.register_buffer("slice", torch.zeros(1000)[:3])
        tied.register_buffer("view", torch.zeros(2, 3, 4).mT)
        tied.register_buffer("repeated", torch.zeros(1, 3).expand(4, 3).contiguous())
        return randomised(tied, seed)

    for name in ("x.pth", "x.safetensors"):
        source = network(1)
        path = save_weights(source, tmp_path / name)
        assert path.stat().st_size < 12_000  # not the thousand numbers that the slice is of
        assert set(tensors_in(path)) == set(source.state_dict())
        model = network(2)
        assert load_weights(model, path).missing == ()
        assert_equal(model, source.state_dict())
        assert model["a"].weight is model["b"].weight
    one = without(snapshot(network(1)), "b.weight")  # one name of the shared tensor: `safetensors.torch.save_model`
    model = network(2)
    assert load_weights(model, saved(one, tmp_path / "one.pth")).missing == ()
    assert torch.equal(model["b"].weight, one["a.weight"])
    both = saved({**one, "b.weight": one["a.weight"] + 1}, tmp_path / "both.pth")
    refused(model, both, r"'a\.weight' and 'b\.weight' differ, but are one tensor in the model")


def test_load__resnet101_from_the_released_layout(tmp_path: Path) -> None:
    """632 names of the released checkpoint; and the 21-class file of before `num_batches_tracked`, without the head."""
    torch.manual_seed(0)
    source, model = randomised(deeplab_v2_resnet101(19), 1), deeplab_v2_resnet101(19)
    state = source.state_dict()
    dacs = saved({"iteration": 1, "model": state, "ema_model": {}}, tmp_path / "dacs.pth")
    assert len(load_weights(model, dacs).matched) == 632
    assert_equal(model, state)

    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for branch in range(4):
        old[f"layer5.conv2d_list.{branch}.weight"] = torch.zeros(21, 2048, 3, 3)
        old[f"layer5.conv2d_list.{branch}.bias"] = torch.zeros(21)
    coco = saved(old, tmp_path / "coco.pth", legacy=True)
    model = randomised(model, 2)
    before = snapshot(model)
    refused(model, coco, r"expected everything to match, got 520 matched .* 8 mism.*strict=False")
    report = load_weights(model, coco, strict=False)
    assert (len(report.matched), len(report.missing), report.unexpected, len(report.mismatched)) == (520, 104, (), 8)
    for name, value in model.state_dict().items():
        is_new = name in report.matched
        assert is_new is not (name.startswith("layer5") or name.endswith("num_batches_tracked"))
        assert torch.equal(value, state[name] if is_new else before[name])


def test_load__missing_counters_are_tolerated_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = tiny(1), tiny(2)
    kept = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    with caplog.at_level(logging.INFO):
        report = load_weights(model, saved(kept, tmp_path / "x.pth"))
    assert set(report.missing) == set(source.state_dict()) - set(kept)
    assert report.matched == tuple(kept)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert str(report) in caplog.text


# What is wrong with it; what the file holds; whether strict=False takes it; a report's field and one of its names.
PARTLY: dict[str, tuple[Callable[[State], object], bool, str, str]] = {
    "no head": (lambda s: without(s, "layer5"), True, "missing", "layer5.conv2d_list.0.bias"),
    "more": (lambda s: {**s, "aux.weight": torch.ones(1)}, True, "unexpected", "aux.weight"),
    "not a tensor": (lambda s: {**s, "epoch": 3}, True, "unexpected", "epoch"),
    "another head": (lambda s: {**s, "layer5.conv2d_list.1.bias": torch.ones(21)}, True, "mismatched",
                     "layer5.conv2d_list.1.bias"),
    "no stage": (lambda s: without(s, "layer3"), False, "missing", "layer3.0.conv1.weight"),
    "no statistics": (lambda s: without(s, "layer2.0.bn1.running"), False, "missing", "layer2.0.bn1.running_mean"),
    "another width": (lambda s: {**s, "layer1.0.bn1.bias": torch.ones(7)}, False, "mismatched", "layer1.0.bn1.bias"),
    "integers": (lambda s: {**s, "conv1.weight": torch.ones(16, 3, 7, 7).byte()}, False, "mismatched", "conv1.weight"),
    "a list": (lambda s: {**s, "conv1.weight": [1.0]}, False, "missing", "conv1.weight"),
    "only a head": (lambda s: {name: v for name, v in s.items() if "layer5" in name}, False, "missing", "conv1.weight"),
    "nothing of it": (lambda s: {"net": torch.ones(3)}, False, "unexpected", "net"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTLY)
def test_load__partly(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, tolerated, field, name = PARTLY[case]
    source, model = tiny(1), tiny(2)
    before = snapshot(model)
    path = saved(change(snapshot(source)), tmp_path / "x.pth")
    message = refused(model, path, r"x\.pth: expected everything to match, got .*")
    if tolerated:
        assert f"pass `strict=False` to {'leave out the head' if 'head' in case else 'ignore'}" in message
    else:
        refused(model, path, r"x\.pth: expected the whole backbone to match, got .*", strict=False)
        return
    report = load_weights(model, path, strict=False)
    assert name in getattr(report, field)
    assert "WARNING" in caplog.text
    assert name.split(".")[0] in caplog.text
    for key, value in model.state_dict().items():
        left = key in report.missing + report.mismatched
        assert torch.equal(value, before[key] if left else source.state_dict()[key])


def test_load__head_of_another_name(tmp_path: Path) -> None:
    def network(classes: int) -> nn.Module:
        return nn.Sequential(OrderedDict(body=nn.Linear(3, 2), classifier=nn.Linear(2, classes)))

    path = saved(network(4).state_dict(), tmp_path / "x.pth")
    refused(network(5), path, "the whole backbone", strict=False)
    report = load_weights(network(5), path, strict=False, head="classifier")
    assert report.mismatched == ("classifier.weight", "classifier.bias")


def test_load__heads_of_another_name_are_named(tmp_path: Path) -> None:
    def network(seed: int, classes: int) -> nn.Module:
        head = nn.Sequential(OrderedDict(inner=nn.Linear(2, 2), last=nn.Linear(2, classes)))
        parts = OrderedDict(body=nn.Linear(3, 2), decode_head=head, auxiliary_head=copy.deepcopy(head))
        return randomised(nn.Sequential(parts), seed)

    source, model = network(1, 4), network(2, 5)
    path = saved(source.state_dict(), tmp_path / "x.pth")
    last = ("decode_head.last", "auxiliary_head.last")
    for options, want in (
        ({"strict": True}, last),
        ({"strict": False}, last),
        ({"strict": False, "head": "decode_head"}, ("decode_head", "auxiliary_head.last")),
        ({"strict": False, "head": ["auxiliary_head"]}, ("auxiliary_head", "decode_head.last")),
    ):
        also = r"`strict=False` and " if options["strict"] else ""
        advice = f"if it is a head that differs, pass {also}`head={want}`, else build"
        refused(model, path, re.escape(advice), **options)
        report = load_weights(network(2, 5), path, strict=False, head=want)
        assert report.mismatched == tuple(f"{name}.{kind}" for name in last for kind in ("weight", "bias"))
        assert "decode_head.inner.weight" in report.matched
    refused(tiny(2), saved(tiny(1, 4).state_dict(), tmp_path / "tiny.pth"), "pass `strict=False` to leave out the head")
    one = saved({**source.state_dict(), "body.bias": torch.ones(7)}, tmp_path / "one.pth")
    refused(source, one, re.escape("pass `strict=False` and `head='body'`, else build"))
    many = saved({name: value[:1] for name, value in source.state_dict().items()}, tmp_path / "many.pth")
    assert "head=" not in refused(source, many, "build the network that the weights were saved from")
    names = r"`head` must be the name of a submodule, or several names, got \[3\]"
    refusal(lambda: load_weights(model, path, head=[3]), names, TypeError)


def training(seed: int) -> SelfTraining:
    return SelfTraining(tiny(seed), MeanTeacher(tiny(seed + 1)), mix=ClassMix(5))


def parts_of(whole: SelfTraining) -> dict[str, object]:
    """As the trainer saves them."""
    return {"step": 1, "student": whole.student.state_dict(), "teacher": whole.teacher.state_dict()}


@pytest.mark.parametrize(
    "contents",
    [
        parts_of,
        lambda whole: compiled(whole).state_dict(),
        lambda whole: nn.DataParallel(whole).state_dict(),
        lambda whole: nn.DataParallel(compiled(whole)).state_dict(),
    ],
    ids=["parts", "compiled", "DataParallel", "both"],
)
def test_load__out_of_a_training_module(contents: Callable[[SelfTraining], object], tmp_path: Path) -> None:
    whole = training(1)
    student, teacher = snapshot(whole.student), snapshot(whole.teacher.module)
    if contents is not parts_of:
        whole.student = compiled(whole.student)
    path = saved(contents(whole), tmp_path / "x.pth")
    for entry, want in ((None, student), ("student", student), ("teacher", teacher)):
        model = tiny(5)
        load_weights(model, path, entry=entry)
        assert_equal(model, want)
    if contents is not parts_of:
        again = training(7)
        load_weights(again, path)  # the training module itself
        assert_equal(again.student, student)
        assert_equal(again.teacher.module, teacher)


@pytest.mark.parametrize("place", ["the whole file", "an entry", "a prefix"])
def test_load__into_a_network_around_it_says_which_part_to_pass(place: str, tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"net": tiny(2)})
            self.more = nn.Linear(2, 2)

    want, model = snapshot(tiny(1)), Around()
    contents = {"the whole file": want, "an entry": {"student": want}, "a prefix": prefixed("a.b.", want)}[place]
    path = saved(contents, tmp_path / "x.pth")
    refused(model, path, r"the weights of a part of it, load them into `model\.parts\.net`")
    load_weights(model.get_submodule("parts.net"), path)
    assert_equal(model.get_submodule("parts.net"), want)


@pytest.mark.parametrize(
    ("make", "entry", "level", "said"),
    [
        (lambda s: prefixed("net.", s), None, "WARNING", "loaded the part 'net'\n"),
        (lambda s: {"weights": s, "step": 3}, None, "WARNING", "loaded the part 'weights'\n"),
        (lambda s: {"weights": s}, "weights", "INFO", "loaded the part 'weights'\n"),
        (lambda s: {"state_dict": {**prefixed("model.", s), "loss.weight": torch.ones(1)}}, None,
         "INFO", "loaded the part 'state_dict.model'; ignored 1 other names (loss.weight)\n"),
    ],
    ids=["guessed", "nested", "asked for", "beside"],
)  # fmt: skip
def test_load__says_what_it_took(
    make: Callable[[State], object], entry: str | None, level: str, said: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO):
        load_weights(tiny(2), saved(make(snapshot(tiny(1))), tmp_path / "x.pth"), entry=entry)
    assert said in caplog.text
    assert [record.levelname for record in caplog.records] == [level, "INFO"]


def test_load__where_it_cannot_tell_the_advice_works(tmp_path: Path) -> None:
    first, second = snapshot(tiny(1)), snapshot(tiny(3))
    for contents, entry, message in (
        ({"a": first, "b": second}, None, "2 parts of it match the model"),
        ({**prefixed("x.a.", first), **prefixed("x.b.", second)}, None, "pass `entry='x.a'` or `entry='x.b'`"),
        ({"student": {**prefixed("a.", first), **prefixed("b.", second)}}, "student",
         "pass `entry='student.a'` or `entry='student.b'`"),
        ({"net": first, "step": 3}, "teacher", r"it has no entry 'teacher', but \(net, step\)"),
        (first, "student", r"it has no entry 'student', but .* pass no `entry`"),
        ({"model": {}, "ema_model": first}, None, "pass `entry='ema_model'`, which matches"),
        ({"student": nn.Linear(1, 1).state_dict(), "net": first}, "student",
         r"nothing there matches the model, but \(student, net\); pass `entry='net'`"),
        ({**prefixed("net.", first), "loss.weight": torch.ones(1)}, None,
         r"1 unexpected \(loss.weight\).* in its part 'net'.*; pass `entry='net'` to ignore"),
    ):  # fmt: skip
        path, model = saved(contents, tmp_path / "x.pth"), tiny(2)
        advised = re.search(r"`entry='([^']*)'`", refused(model, path, message, entry=entry))
        load_weights(model, path, entry=advised and advised[1])
        assert_equal(model, first)
    for contents, entry, message in (
        ({"net": nn.Linear(1, 1).state_dict()}, "teacher", r"no entry 'teacher', but \(net\), and none matches"),
        ({"net": {"step": 3}, "step": 3}, None, r"expected tensors, got \(net, step\)"),
        (without(first, "layer3"), None, "build the network that the weights were saved from"),
        ({"conv1.weight": torch.ones(1), "module.conv1.weight": torch.ones(1)}, None,
         "'conv1.weight' and 'module.conv1.weight' are the same name"),
    ):  # fmt: skip
        path = saved(contents, tmp_path / "x.pth")
        assert "strict=False" not in refused(tiny(2), path, message, entry=entry)  # it would not help


def torchvisions(state: State) -> State:
    """The names of torchvision's ResNet-101: ours but for the head."""
    return {**without(state, "layer5"), "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}


def test_torchvision__is_refused_or_converted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, state = tiny(2), torchvisions(snapshot(tiny(1)))
    state["conv1.weight"] -= 1  # both signs, as weights have
    path = saved(state, tmp_path / "resnet.pth")
    refused(model, path, "it looks like torchvision's ResNet-101, which `strict=False` converts")
    report = load_weights(model, path, strict=False)
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert all(name.startswith("layer5") for name in report.missing)
    assert "layer2.0 has its stride on the first convolution" in caplog.text
    for name in set(report.matched) - {"conv1.weight", "bn1.running_mean"}:
        assert torch.equal(model.state_dict()[name], state[name])

    images = torch.rand(2, 3, 24, 40, dtype=torch.float64)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()[..., None, None]
    stem = {name: state[name].double() for name in state if name.startswith(("conv1", "bn1"))}
    want = nn.functional.conv2d((images - mean) / deviation, stem["conv1.weight"], stride=2, padding=3)
    want = nn.functional.batch_norm(
        want, stem["bn1.running_mean"], stem["bn1.running_var"], stem["bn1.weight"], stem["bn1.bias"]
    )
    seen: list[Tensor] = []
    model.bn1.register_forward_hook(lambda *args: seen.append(args[2].clone()))  # ReLU works in place
    model.double().eval()(images)
    inner = (..., slice(3, -3), slice(3, -3))  # zero padding is another colour there
    torch.testing.assert_close(seen[0][inner], want[inner], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "backbone.", "module."])
@pytest.mark.parametrize("wrap", ["bare", "compiled", "teacher", "in another module"])
def test_torchvision__is_converted_whatever_is_around_it(wrap: str, prefix: str, tmp_path: Path) -> None:
    state = torchvisions(snapshot(tiny(1)))
    want = tiny(2)
    load_weights(want, saved(state, tmp_path / "plain.pth"), strict=False)
    assert not torch.equal(want.conv1.weight, state["conv1.weight"])
    inner = "net." if wrap == "in another module" else ""
    path = saved(prefixed(prefix + inner, state), tmp_path / "x.pth")
    network = tiny(2)
    if wrap == "in another module":
        load_weights(nn.ModuleDict({"net": network}), path, strict=False, head="net.layer5")
    elif wrap == "teacher":
        teacher = MeanTeacher(network)
        load_weights(teacher, path, strict=False)
        network = teacher.module
    else:
        load_weights(compiled(network) if wrap == "compiled" else network, path, strict=False)
    assert_equal(network, want.state_dict())


def test_torchvision__is_nothing_that_has_the_head_or_is_for_another_network(tmp_path: Path) -> None:
    both = saved({**snapshot(tiny(1)), "fc.weight": torch.ones(1000, 2048)}, tmp_path / "both.pth")
    model = tiny(2)
    load_weights(model, both, strict=False)
    assert_equal(model, snapshot(tiny(1)))
    around, other = (nn.ModuleDict({"net": tiny(seed), "fc": nn.Linear(4, 2)}) for seed in (1, 2))
    load_weights(other, save_weights(around, tmp_path / "around.pth"), strict=False, head="fc")
    assert_equal(other, around.state_dict())
    network = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 1), fc=nn.Linear(4, 2)))
    source = randomised(copy.deepcopy(network), 1)
    load_weights(network, save_weights(source, tmp_path / "x.pth"))
    assert_equal(network, source.state_dict())


# What a file calls torchvision's backbone, what else it has, and the entry that leads there.
TORCHVISION_FILES: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "a segmentation network": ("backbone.", ("classifier.0.convs.0.0.weight", "aux_classifier.0.weight"), None),
    "its backbone asked for": ("backbone.", ("classifier.4.weight",), "backbone"),
    "a query encoder": ("module.encoder_q.", ("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias"), None),
}


@pytest.mark.parametrize("case", TORCHVISION_FILES)
def test_torchvision__is_recognised_by_any_of_its_heads(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix, heads, entry = TORCHVISION_FILES[case]
    state, want, model = torchvisions(snapshot(tiny(1))), tiny(2), tiny(2)
    load_weights(want, saved(state, tmp_path / "plain.pth"), strict=False)
    caplog.clear()
    contents = {**prefixed(prefix, without(state, "fc")), **dict.fromkeys(heads, torch.ones(2))}
    load_weights(model, saved(contents, tmp_path / "x.pth"), strict=False, entry=entry)
    assert_equal(model, want.state_dict())
    assert f"recognised as torchvision's ResNet-101 by {heads[0]!r}" in caplog.text


def test_backbone__without_a_head_is_taken_with_a_warning_of_its_preprocessing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, model = without(snapshot(tiny(1)), "layer5"), tiny(2)
    for prefix, warns in (("", True), ("module.", True), ("Scale.", False)):
        caplog.clear()
        load_weights(model, saved(prefixed(prefix, backbone), tmp_path / "x.pth"), strict=False)
        assert torch.equal(model.conv1.weight, backbone["conv1.weight"])
        assert ("BGR in 0..255 minus the mean is assumed" in caplog.text) is warns
    caplog.clear()
    renamed = {**backbone, "classifier.conv2d_list.0.weight": torch.ones(2)}  # the head of a DeepLab-v2 all the same
    load_weights(model, saved(renamed, tmp_path / "x.pth"), strict=False)
    assert torch.equal(model.conv1.weight, backbone["conv1.weight"])
    assert "recognised" not in caplog.text


def by_hand(tensors: State, *, like_a_page: bool = False) -> bytes:
    """A safetensors file, from the format's description."""
    header: dict[str, object] = {}
    body = b""
    for name, value in tensors.items():
        raw = value.contiguous().numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    if like_a_page:  # the length of the header is the first byte of HTML
        text += b" " * (ord("<") - len(text) % 256 + 256)
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("x.safetensors", lambda state: by_hand(prefixed("module.", state))),
        ("x.bin", lambda state: by_hand(prefixed("module.", state))),
        ("x.bin", lambda state: by_hand(state, like_a_page=True)),
        ("x.safetensors", safetensors.torch.save),
        ("x.safetensors", lambda state: written(dict(state))),
    ],
    ids=["by hand", "of another name", "begins like a page", "the reference's", "torch's by their name"],
)
def test_safetensors__are_read(name: str, make: Callable[[State], bytes], tmp_path: Path) -> None:
    want, model = snapshot(tiny(1)), tiny(2)
    (tmp_path / name).write_bytes(make(want))
    load_weights(model, tmp_path / name)
    assert_equal(model, want)


def test_safetensors__round_trip_of_every_dtype_and_shape(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self, fill: float) -> None:
            super().__init__()
            for dtype in (
                torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                torch.int8, torch.uint8, torch.bool,
            ):  # fmt: skip
                for i, shape in enumerate([(), (3,), (0, 2), (2, 3, 4)]):
                    value = (torch.rand(shape) * fill).to(dtype)
                    self.register_buffer(f"{str(dtype)[6:]}_{i}", value.mT if value.ndim > 1 else value)

    source, other = Holder(9.0), Holder(0.0)
    path = save_weights(source, tmp_path / "x.safetensors")
    load_weights(other, path)
    assert_equal(other, source.state_dict())
    assert_equal(source, {name: tensors_in(path)[name] for name in source.state_dict()})  # the reference agrees
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # which transformers ask for
    raw = path.read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0  # tensors begin aligned
    complex_ = nn.ParameterDict({"a": nn.Parameter(torch.ones(1, dtype=torch.complex128))})
    none = r"safetensors has no dtype torch\.complex128 \(`a`\); use \.pth"
    refusal(lambda: save_weights(complex_, path), none, ValueError)
    assert path.read_bytes() == raw
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_safetensors__are_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_weights(tiny(1), tmp_path / "x.safetensors")
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for attempt in (lambda: load_weights(tiny(2), path), lambda: save_weights(tiny(2), path)):
        refusal(attempt, r"x\.safetensors: .* `pip install safetensors`", ImportError)
    assert path.read_bytes() == before
    load_weights(tiny(2), save_weights(tiny(1), tmp_path / "x.pth"))  # nothing else needs it


HEADERS = {
    "no JSON": b"{not json",
    "a list": b"[1, 2]",
    "too deep": b"[" * 100_000,
    "no description": b'{"a": 3}',
    "another dtype": b'{"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]}}',
    "past the end": b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    "backwards": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    "another size": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "a negative shape": b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    "a shape of words": b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
}


DAMAGED = "it is truncated, damaged or not a file of weights"
BAD: dict[str, tuple[Callable[[State], bytes], str]] = {
    "empty": (lambda _: b"", "got an empty file"),
    "a page": (lambda _: b"\n<!DOCTYPE html><html>quota exceeded</html>", "got an HTML page"),
    "a page with a brace": (lambda _: b"<script>{}</script>", "got an HTML page"),  # where safetensors have one
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "got a Git LFS pointer"),
    "text": (lambda _: b"hello world, no weights here", DAMAGED),
    "zeros": (lambda _: bytes(4096), DAMAGED),
    "truncated": (lambda s: written(s)[:-5000], DAMAGED),
    "truncated early": (lambda s: written(s)[:100], DAMAGED),
    "truncated, legacy": (lambda s: written(s, legacy=True)[:-5000], DAMAGED),
    "corrupted": (lambda s: flipped(written(s)), "does not match its checksum"),
    "a list": (lambda s: written(list(s.values())), "expected a dict of tensors, got list"),
    "a bomb": (lambda _: bomb(torch.zeros(10**6)), "its parts claim 4.00 MB, the file has "),
    "many paths": (lambda s: written({"student": shared(8, 30, s)}), "expected tensors, got more than 1000000 entries"),
    "a long name": (lambda s: written({".".join("a" * 3000): s["conv1.weight"]}), "got one of 3000 components"),
    "many paths to code": (lambda s: written({**shared(8, 30, s), "x": Calls(os.getpid)}), "posix.getpid"),
    "a tensor": (lambda _: written(torch.ones(3)), "expected a dict of tensors, got Tensor"),
    "a whole model": (lambda _: written(nn.Linear(1, 1)), "it holds code or objects other than tensors"),
    "an empty dict": (lambda _: written({}), "expected tensors, got an empty dict"),
    "another network": (lambda _: written(nn.Linear(1, 1).state_dict()), "expected everything to match, got 0 matched"),
    **{
        case: (lambda _, text=text: len(text).to_bytes(8, "little") + text + bytes(8), DAMAGED)
        for case, text in HEADERS.items()
    },
}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("default")  # torch.load may warn of strange pickles before it gives up
def test_bad_files__name_the_path_and_the_reason(case: str, name: str, tmp_path: Path) -> None:
    make, reason = BAD[case]
    path = tmp_path / name
    path.write_bytes(make(snapshot(tiny(1))))
    message = refused(tiny(2), path, re.escape(reason))
    assert str(path) in message
    assert "Re-running" not in message  # torch's advice to trust the file


@dataclasses.dataclass
class Options:
    """What people keep beside their weights."""

    lr: float = 0.1
    out: pathlib.Path = pathlib.Path("runs")


class Settings:
    """A mapping of its own, with a container inside, as OmegaConf has them."""

    def __init__(self) -> None:
        self.__dict__.update(content={"a": [1, 2]}, cache=collections.defaultdict(dict), parent=None, kind=dict)


OBJECTS: dict[str, tuple[object, str]] = {
    "a namespace": (argparse.Namespace(lr=0.1, out=pathlib.Path("x")), "argparse.Namespace, pathlib.PosixPath"),
    "numpy scalars": (
        [np.float64(0.5), np.int64(3)],
        "numpy._core.multiarray.scalar, numpy.dtype, numpy.dtypes.Float64DType, numpy.dtypes.Int64DType",
    ),
    "a dataclass": ([Options(), Options()], f"{__name__}.Options, pathlib.PosixPath"),
    "settings": (Settings(), f"{__name__}.Settings"),
    "a simple namespace": (types.SimpleNamespace(a=1), "types.SimpleNamespace"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", OBJECTS)
def test_objects__beside_the_weights_are_named_and_can_be_allowed(case: str, tmp_path: Path, *, legacy: bool) -> None:
    beside, names = OBJECTS[case]
    want, model = snapshot(tiny(1)), tiny(2)
    path = saved({"args": beside, "model": want}, tmp_path / "x.pth", legacy=legacy)
    allowed = set(torch.serialization.get_safe_globals())
    message = refused(model, path, re.escape(names))
    assert str(path) in message
    assert "download the file again" not in message
    assert "weights_only" not in message
    assert set(torch.serialization.get_safe_globals()) == allowed  # nothing more, on the way
    advised = re.search(r"`with torch\.serialization\.safe_globals\((\[.*\])\):`", message)
    assert advised is not None
    known = {module.__name__: module for module in (argparse, collections, np, pathlib, types, sys.modules[__name__])}
    with torch.serialization.safe_globals(eval(advised[1], {**known, "numpy": np})):  # noqa: S307
        load_weights(model, path)
    assert_equal(model, want)


def test_objects__of_another_numpy_and_partly_allowed(tmp_path: Path) -> None:
    model, scalar = nn.Linear(1, 1), np._core.multiarray.scalar
    contents = {"loss": np.float64(0.5), "model": nn.Linear(1, 1).state_dict()}
    path = saved(contents, tmp_path / "x.pth")
    with torch.serialization.safe_globals([scalar, np.dtype]):
        refused(model, path, r"safe_globals\(\[numpy\.dtypes\.Float64DType\]\)")
    old = written(contents, legacy=True).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    path.write_bytes(old)  # a file of numpy 1
    refused(model, path, r"\[\(numpy\._core\.multiarray\.scalar, 'numpy\.core\.multiarray\.scalar'\), numpy\.dtype, ")
    with torch.serialization.safe_globals([(scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Float64DType]):
        load_weights(model, path)


W = {"w": torch.ones(1)}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({**W, "count": collections.defaultdict(int, a=1)}, "Torch refuses them even if allowed"),
        (nn.Linear(1, 1), "The whole file is a pickled torch.nn.modules.linear.Linear: load it where its code is"),
        ({"model": nn.Linear(1, 1)}, "Without them it has no tensors: load it where its code is"),
        ({"model": W, "x": Calls(eval, "1 + 1")}, "It calls eval, which can run arbitrary code"),
        ({"model": W, "x": Calls(getattr, 1, "real")}, "It calls getattr, which can run"),
    ],
)
def test_objects__what_allowing_would_not_help_or_would_harm(contents: object, message: str, tmp_path: Path) -> None:
    assert "safe_globals" not in refused(nn.Linear(1, 1), saved(contents, tmp_path / "x.pth"), message)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("default")
def test_bad_files__code_is_not_run(kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = {**snapshot(tiny(1)), "conv1.weight": Calls(os.system, f"touch {trace}")}
    path = tmp_path / "x.pth"
    path.write_bytes(packed(state, kind))
    for strict in (True, False):
        refused(tiny(2), path, r"x\.pth: it .*", strict=strict)
    assert not trace.exists()


def test_bad_arguments(tmp_path: Path) -> None:
    model = tiny(2)
    path = save_weights(model, tmp_path / "x.pth")
    with torch.device("meta"):
        nowhere = deeplab_v2_tiny(5)
    both = saved({"student": model.state_dict(), "teacher": None}, tmp_path / "source.pt")
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: load_weights(model, tmp_path / "nowhere.pth"), FileNotFoundError,
         r"nowhere\.pth: no such file; pass the path of weights, .* 'coco'"),
        (lambda: load_weights(model, tmp_path), WeightsError, "expected a file of weights, got a folder"),
        (lambda: load_weights(model, path, sha256="12"), ValueError, "must be 8 to 64 hexadecimal digits, got '12'"),
        (lambda: save_weights(model, tmp_path / "x.safetensors", entry="model"), ValueError,
         "`entry` must be None for safetensors"),
        (lambda: load_weights(nowhere, path), ValueError, "`model` must have memory"),
        (lambda: load_weights(nn.LazyLinear(2), path), ValueError, "got meta or uninitialised tensors; .* run a batch"),
        (lambda: load_weights(model, both, entry="teacher"), WeightsError,
         "nothing there matches the model, .*; pass `entry='student'`, which matches"),
        (lambda: save_weights(model, tmp_path / "none" / "x.pth"), FileNotFoundError, "none"),
    ]  # fmt: skip
    for call, error, message in cases:
        refusal(call, message, error)


def test_zip__a_part_that_calls_itself_a_folder_is_not_read(tmp_path: Path) -> None:
    """Of one torch reads nothing, and leaves whatever was in memory."""
    model, path = nn.Linear(3, 2), saved(nn.Linear(3, 2).state_dict(), tmp_path / "x.pth")
    whole = path.read_bytes()
    for part in (b"/data/0", b"/data/1"):
        entry = whole.rindex(b"PK\1\2", 0, whole.rindex(part))  # of the directory
        name = whole[entry + 46 : whole.rindex(part)] + part
        for bit in range(32):
            path.write_bytes(flipped(whole, entry + 38 + bit // 8, 1 << bit % 8))
            refused(model, path, rf"its part {name.decode()} does not match its checksum")


def test_zip__packed_again_by_another_program_is_read(tmp_path: Path) -> None:
    """It writes permissions where torch writes nothing."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    torch.save(other.state_dict(), tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        new.mkdir("x/")
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    load_weights(model, tmp_path / "y.pth")
    assert_equal(model, other.state_dict())


def test_sha256__whole_or_its_beginning(tmp_path: Path) -> None:
    model = tiny(2)
    path = save_weights(model, tmp_path / "x.pth")
    digest = sha256(path.read_bytes()).hexdigest()
    for given in (digest, digest[:8], digest.upper()):
        load_weights(model, path, sha256=given)
    refused(model, path, rf"x\.pth: expected the sha256 0{{8}}, got {digest}; download the file", sha256="0" * 8)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_save__a_full_disk_is_named_with_the_space_needed(tmp_path: Path, name: str) -> None:
    path = save_weights(tiny(1), tmp_path / name)
    whole = path.read_bytes()
    path.with_name(f"{name}.tmp.{os.getpid()}").symlink_to("/dev/full")
    full = r"\d+ (k|M)B are needed.*free some space, existing files are untouched"
    with pytest.raises(OSError, match=full) as caught:
        save_weights(tiny(2), path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A folder, and the address of its files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder, address, download = tmp_path / "served", "http://served", torch.hub.download_url_to_file
    folder.mkdir()

    def read(url: str, *arguments: object, **options: object) -> None:
        download(url.replace(address, folder.as_uri()), *arguments, **options)

    monkeypatch.setattr(torch.hub, "download_url_to_file", read)
    return folder, address


def test_url__is_downloaded_once_and_checked(served: tuple[Path, str]) -> None:
    folder, address = served
    source, model = tiny(1), tiny(2)
    path = save_weights(source, folder / "x.pth")
    digest = sha256(path.read_bytes()).hexdigest()
    for checksum in (None, digest, digest[:10]):
        load_weights(model, f"{address}/x.pth", sha256=checksum)
        assert_equal(model, source.state_dict())
        path.unlink(missing_ok=True)


def test_url__of_a_file_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path, model = tmp_path / "latest one.pth", tiny(3)
    for seed in (1, 2):
        source = tiny(seed)
        save_weights(source, path)
        load_weights(model, path.as_uri())
        assert_equal(model, source.state_dict())
    path.write_bytes(b"<html>")
    refused(model, path.as_uri(), r"latest one\.pth: .*got an HTML page")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # which is nobody's copy to delete
    missing = (tmp_path / "none.pth").as_uri()
    refusal(lambda: load_weights(model, missing), r"/none\.pth: no such file", FileNotFoundError)


def test_url__what_goes_wrong(served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = served
    model, path = tiny(2), save_weights(tiny(1), folder / "x.pth")
    page, nothing = folder / "z.pth", f"{address}/y.pth"
    refused(model, f"{address}/x.pth", r"/x\.pth: it cannot be downloaded \(invalid hash value", sha256="0" * 64)
    refused(model, nothing, r"/y\.pth: it cannot be downloaded \(.*No such file.*; download it by hand")
    page.write_bytes(b"<html>")
    refused(model, f"{address}/z.pth", r"got an HTML page.* It came from http://.*/z\.pth")
    page.write_bytes(path.read_bytes())
    load_weights(model, f"{address}/z.pth")  # the page was not kept
    monkeypatch.setitem(SOURCES, "coco", SOURCES["coco"]._replace(url=nothing))
    refused(model, "coco", "has not answered since about December 2021; users .* pass its path")


def test_sources__say_what_is_known() -> None:
    assert set(SOURCES) == {"coco", "imagenet", "dacs-gta5", "torchvision-v1", "torchvision-v2"}
    for source in SOURCES.values():
        assert source.url.startswith("http")
        assert source.licence
        assert source.sha256 is None or source.sha256 in source.url


def test_advice__of_what_is_not_known_is_its_name() -> None:
    assert weight_files._dtype_class("f8") == "numpy.dtypes.Float64DType"
    assert weight_files._dtype_class("of another NumPy") == "numpy.dtype"
    assert weight_files._expression("collections.OrderedDict") == "collections.OrderedDict"
    assert weight_files._expression("of_others.Network") == "of_others.Network"
