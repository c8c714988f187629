"""Every kind of file that weights come in, made here; and every kind of file that is none."""

import copy
import http.server
import io
import json
import logging
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from crossmix import MeanTeacher
from crossmix.models import (
    DeepLabV2,
    LoadReport,
    WeightsError,
    deeplab_v2_resnet101,
    deeplab_v2_tiny,
    load_weights,
    save_weights,
)
from crossmix.models.weight_files import SOURCES

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


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def inside(state: State) -> State:
    """What compiling submodules leaves in names."""
    return {name.replace("layer1.0.", "layer1._orig_mod.0.module."): value for name, value in state.items()}


SHAPES: dict[str, tuple[Callable[[State], object], str | None]] = {
    "plain": (lambda state: state, None),
    "ordered": (OrderedDict, None),
    "ours": (lambda state: {"step": 3, "student": state, "teacher": {}, "optimizer": {}}, None),
    "our student": (lambda state: {"step": 3, "student": state, "teacher": {}}, "student"),
    "our teacher": (
        lambda state: {"student": {}, "teacher": {**prefixed("module.", state), "_extra_state": torch.tensor(7)}},
        "teacher",
    ),
    "a training module": (lambda state: {**prefixed("student.", state), "teacher.module.x": torch.ones(1)}, "student"),
    "its teacher": (lambda state: {**prefixed("teacher.module.", state), "student.x": torch.ones(1)}, "teacher"),
    "released": (lambda state: {"iteration": 9, "config": {"a": [1]}, "model": state, "ema_model": {}}, None),
    "released student": (lambda state: {"model": state, "ema_model": {}}, "student"),
    "released teacher": (lambda state: {"model": {}, "ema_model": state}, "teacher"),
    "released by name": (lambda state: {"model": {}, "ema_model": state}, "ema_model"),
    "state_dict": (lambda state: {"epoch": 3, "state_dict": state}, None),
    "module.": (partial(prefixed, "module."), None),
    "_orig_mod.": (partial(prefixed, "_orig_mod."), None),
    "nested": (partial(prefixed, "module._orig_mod.module."), None),
    "nested the other way": (lambda state: {"model": prefixed("_orig_mod.module.", state)}, None),
    "inside": (inside, None),
    "Scale.": (partial(prefixed, "Scale."), None),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_load__every_tensor_of_every_kind_of_file(shape: str, tmp_path: Path, *, legacy: bool) -> None:
    wrap, entry = SHAPES[shape]
    want = snapshot(tiny(1))
    torch.save(wrap(want), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    model = tiny(2)
    report = load_weights(model, tmp_path / "x.pth", entry=entry)
    assert_equal(model, want)
    assert report == LoadReport(tuple(want), (), (), ())


compiled = partial(torch.compile, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda m: nn.DataParallel(compiled(m))])
def test_load__into_a_wrapped_model(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    source, model = tiny(1), tiny(2)
    path = save_weights(wrap(source), tmp_path / "x.pth")
    assert list(torch.load(path, weights_only=True)) == list(source.state_dict())
    wrapped = wrap(model)
    report = load_weights(wrapped, path)
    assert_equal(model, source.state_dict())
    assert report.matched == tuple(wrapped.state_dict())


def test_load__student_and_teacher_as_the_trainer_saves_them(tmp_path: Path) -> None:
    student = tiny(1)
    teacher = MeanTeacher(tiny(3), decay=0.9)
    teacher.update(student)
    torch.save({"step": 1, "student": student.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "x.pt")
    model = tiny(2)
    load_weights(model, tmp_path / "x.pt")
    assert_equal(model, student.state_dict())
    load_weights(model, tmp_path / "x.pt", entry="teacher")
    assert_equal(model, teacher.module.state_dict())


def test_load__resnet101_from_the_released_layout(tmp_path: Path) -> None:
    """632 names of the released checkpoint; and the 21-class file of before `num_batches_tracked`, without the head."""
    torch.manual_seed(0)
    source, model = randomised(deeplab_v2_resnet101(19), 1), deeplab_v2_resnet101(19)
    torch.save({"iteration": 1, "model": source.state_dict(), "ema_model": {}}, tmp_path / "dacs.pth")
    assert len(load_weights(model, tmp_path / "dacs.pth").matched) == 632
    assert_equal(model, source.state_dict())

    coco = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    for branch in range(4):
        coco[f"layer5.conv2d_list.{branch}.weight"] = torch.zeros(21, 2048, 3, 3)
        coco[f"layer5.conv2d_list.{branch}.bias"] = torch.zeros(21)
    torch.save(coco, tmp_path / "coco.pth", _use_new_zipfile_serialization=False)
    model = deeplab_v2_resnet101(19)
    before = snapshot(model)
    with pytest.raises(WeightsError, match=r"expected everything to match, got 520 matched .* 8 mism.*strict=False"):
        load_weights(model, tmp_path / "coco.pth")
    assert_equal(model, before)
    report = load_weights(model, tmp_path / "coco.pth", strict=False)
    assert (len(report.matched), len(report.missing), report.unexpected, len(report.mismatched)) == (520, 104, (), 8)
    for name, value in model.state_dict().items():
        is_new = name in report.matched
        assert is_new is not (name.startswith("layer5") or name.endswith("num_batches_tracked"))
        assert torch.equal(value, source.state_dict()[name] if is_new else before[name])


def test_load__missing_counters_are_tolerated_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = tiny(1), tiny(2)
    kept = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO):
        report = load_weights(model, tmp_path / "x.pth")
    assert set(report.missing) == set(source.state_dict()) - set(kept)
    assert report.matched == tuple(kept)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert str(report) in caplog.text


def without(state: State, *parts: str) -> State:
    return {name: value for name, value in state.items() if not name.startswith(parts)}


# What is wrong with it; what the file holds; whether strict=False takes it; a report's field and one of its names.
PARTLY: dict[str, tuple[Callable[[State], object], bool, str, str]] = {
    "no head": (lambda s: without(s, "layer5"), True, "missing", "layer5.conv2d_list.0.bias"),
    "more": (lambda s: {**s, "aux.weight": torch.ones(1)}, True, "unexpected", "aux.weight"),
    "not a tensor": (lambda s: {**s, "epoch": 3}, True, "unexpected", "epoch"),
    "another head": (lambda s: {**s, "layer5.conv2d_list.1.bias": torch.ones(21)}, True, "mismatched",
                     "layer5.conv2d_list.1.bias"),
    "no stage": (lambda s: without(s, "layer3"), False, "missing", "layer3.0.conv1.weight"),
    "another width": (lambda s: {**s, "layer1.0.bn1.bias": torch.ones(7)}, False, "mismatched", "layer1.0.bn1.bias"),
    "integers": (lambda s: {**s, "conv1.weight": torch.ones(16, 3, 7, 7).byte()}, False, "mismatched", "conv1.weight"),
    "a list": (lambda s: {**s, "conv1.weight": [1.0]}, False, "missing", "conv1.weight"),
    "only a head": (lambda s: {name: v for name, v in s.items() if "layer5" in name}, False, "missing", "conv1.weight"),
    "nothing of it": (lambda s: prefixed("net.", s), False, "unexpected", "net.conv1.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTLY)
def test_load__partly(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, tolerated, field, name = PARTLY[case]
    source, model = tiny(1), tiny(2)
    before = snapshot(model)
    path = tmp_path / "x.pth"
    torch.save(change(snapshot(source)), path)
    with pytest.raises(WeightsError, match=r"x\.pth: expected everything to match, got .*"):
        load_weights(model, path)
    assert_equal(model, before)
    if not tolerated:
        with pytest.raises(WeightsError, match=r"x\.pth: expected the whole backbone to match, got .*"):
            load_weights(model, path, strict=False)
        assert_equal(model, before)
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

    torch.save(network(4).state_dict(), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="the whole backbone"):
        load_weights(network(5), tmp_path / "x.pth", strict=False)
    report = load_weights(network(5), tmp_path / "x.pth", strict=False, head="classifier")
    assert report.mismatched == ("classifier.weight", "classifier.bias")


def test_load__entries(tmp_path: Path) -> None:
    model = tiny(2)
    path = tmp_path / "x.pth"
    torch.save({"net": model.state_dict(), "step": 3}, path)
    assert load_weights(model, path, entry="net").missing == ()
    with pytest.raises(WeightsError, match=r"x\.pth: it has no entry 'teacher', but \(net, step\)"):
        load_weights(model, path, entry="teacher")
    with pytest.raises(WeightsError, match=r"expected tensors, got none among \(net, step\); pass the right `entry`"):
        load_weights(model, path)
    torch.save({"conv1.weight": torch.ones(1), "module.conv1.weight": torch.ones(1)}, path)
    with pytest.raises(WeightsError, match=r"x\.pth: 'module.conv1.weight' and 'conv1.weight' are the same name"):
        load_weights(model, path)


# ------------------------------------------------------------------------------------------------ torchvision's ResNet


def torchvisions(state: State) -> State:
    """The names of torchvision's ResNet-101: ours but for the head."""
    return {**without(state, "layer5"), "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}


def test_torchvision__is_refused_or_converted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, model = tiny(1), tiny(2)
    path = tmp_path / "resnet.pth"
    state = torchvisions(snapshot(source))
    state["conv1.weight"] -= 1  # both signs, as weights have
    torch.save(state, path)
    before = snapshot(model)
    with pytest.raises(WeightsError, match="it looks like torchvision's ResNet-101, which `strict=False` converts"):
        load_weights(model, path)
    assert_equal(model, before)
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


def test_torchvision__is_nothing_that_has_the_head_or_is_for_another_network(tmp_path: Path) -> None:
    both = {**snapshot(tiny(1)), "fc.weight": torch.ones(1000, 2048)}
    torch.save(both, tmp_path / "both.pth")
    model = tiny(2)
    load_weights(model, tmp_path / "both.pth", strict=False)
    assert_equal(model, snapshot(tiny(1)))
    network = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 4, 1), fc=nn.Linear(4, 2)))
    source = randomised(copy.deepcopy(network), 1)
    load_weights(network, save_weights(source, tmp_path / "x.pth"))
    assert_equal(network, source.state_dict())


# ------------------------------------------------------------------------------------------------------- safetensors


def by_hand(tensors: State) -> bytes:
    """A safetensors file, from the format's description."""
    header: dict[str, object] = {}
    body = b""
    for name, value in tensors.items():
        raw = value.contiguous().numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_safetensors__are_read(name: str, tmp_path: Path) -> None:
    want = snapshot(tiny(1))
    (tmp_path / name).write_bytes(by_hand(prefixed("module.", want)))
    model = tiny(2)
    load_weights(model, tmp_path / name)
    assert_equal(model, want)


def test_safetensors__that_begin_like_a_page_are_read(tmp_path: Path) -> None:
    data = by_hand({"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length] + b" " * (ord("<") - length % 256 + 256)
    (tmp_path / "x.bin").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert (tmp_path / "x.bin").read_bytes()[:1] == b"<"
    model = nn.Linear(2, 1)
    load_weights(model, tmp_path / "x.bin")
    assert model.weight.tolist() == [[1.0, 1.0]]


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
    raw = path.read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0  # tensors begin aligned
    complex_ = nn.ParameterDict({"a": nn.Parameter(torch.ones(1, dtype=torch.complex64))})
    with pytest.raises(ValueError, match=r"`a` must have one of the dtypes .*, got torch\.complex64"):
        save_weights(complex_, path)
    assert path.read_bytes() == raw
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_safetensors__agree_with_the_reference(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    source = tiny(1)
    path = save_weights(source, tmp_path / "x.safetensors")
    assert_equal(source, {name: reference.load_file(path)[name] for name in source.state_dict()})
    reference.save_file(source.state_dict(), tmp_path / "y.safetensors")
    model = tiny(2)
    load_weights(model, tmp_path / "y.safetensors")
    assert_equal(model, source.state_dict())


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


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors__damaged_headers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(HEADERS[case]).to_bytes(8, "little") + HEADERS[case] + bytes(8))
    with pytest.raises(WeightsError, match=r"x\.safetensors: it is truncated, damaged or no file of weights"):
        load_weights(tiny(2), path)


# ------------------------------------------------------------------------------------------------------ bad files


class Malicious:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (self.command,)


def written(state: object, *, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def flipped(data: bytes) -> bytes:
    """One bit of a tensor another way: torch.load would not notice."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


BAD: dict[str, tuple[Callable[[State], bytes], str]] = {
    "empty": (lambda _: b"", "got an empty file"),
    "a page": (lambda _: b"\n<!DOCTYPE html><html>quota exceeded</html>", "got an HTML page"),
    "a pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "got a Git LFS pointer"),
    "text": (lambda _: b"hello world, no weights here", "it is truncated, damaged or no file of weights"),
    "zeros": (lambda _: bytes(4096), "it is truncated, damaged or no file of weights"),
    "truncated": (lambda s: written(s)[:-5000], "it is truncated, damaged or no file of weights"),
    "truncated early": (lambda s: written(s)[:100], "it is truncated, damaged or no file of weights"),
    "truncated, legacy": (lambda s: written(s, legacy=True)[:-5000], "it is truncated, damaged or no file of weights"),
    "corrupted": (lambda s: flipped(written(s)), "does not match its checksum"),
    "a list": (lambda s: written(list(s.values())), "expected a dict of tensors, got list"),
    "a tensor": (lambda _: written(torch.ones(3)), "expected a dict of tensors, got Tensor"),
    "a whole model": (lambda _: written(nn.Linear(1, 1)), "it holds code or objects other than tensors"),
    "another network": (lambda _: written(nn.Linear(1, 1).state_dict()), "expected everything to match, got 0 matched"),
}


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("default")  # torch.load may warn of strange pickles before it gives up
def test_bad_files__name_the_path_and_the_reason(case: str, name: str, tmp_path: Path) -> None:
    make, reason = BAD[case]
    model = tiny(2)
    before = snapshot(model)
    path = tmp_path / name
    path.write_bytes(make(snapshot(tiny(1))))
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    if name == "x.pth" or case in {"empty", "a page", "a pointer"}:
        assert reason in str(caught.value)
    assert "Re-running" not in str(caught.value)  # torch's advice to trust the file
    assert_equal(model, before)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.filterwarnings("default")
def test_bad_files__code_is_not_run(kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    state = {**snapshot(tiny(1)), "conv1.weight": Malicious(f"touch {trace}")}
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(state, protocol=2) if kind == "pickle" else written(state, legacy=kind == "legacy"))
    model = tiny(2)
    before = snapshot(model)
    for strict in (True, False):
        with pytest.raises(WeightsError, match=r"x\.pth: it .*"):
            load_weights(model, path, strict=strict)
    assert not trace.exists()
    assert_equal(model, before)


def test_bad_arguments(tmp_path: Path) -> None:
    model = tiny(2)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: no such file; pass the path of weights, .* 'coco'"):
        load_weights(model, tmp_path / "nowhere.pth")
    with pytest.raises(WeightsError, match="expected a file of weights, got a folder"):
        load_weights(model, tmp_path)
    path = save_weights(model, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="`sha256` must be 8 to 64 hexadecimal digits, got '12'"):
        load_weights(model, path, sha256="12")
    with pytest.raises(ValueError, match="`entry` must be None for safetensors"):
        save_weights(model, tmp_path / "x.safetensors", entry="model")
    with torch.device("meta"):
        nowhere = deeplab_v2_tiny(5)
    with pytest.raises(ValueError, match="`model` must have memory"):
        load_weights(nowhere, path)
    with pytest.raises(FileNotFoundError):
        save_weights(model, tmp_path / "none" / "x.pth")


def test_sha256__whole_or_its_beginning(tmp_path: Path) -> None:
    model = tiny(2)
    path = save_weights(model, tmp_path / "x.pth")
    digest = sha256(path.read_bytes()).hexdigest()
    for given in (digest, digest[:8], digest.upper()):
        load_weights(model, path, sha256=given)
    with pytest.raises(WeightsError, match=rf"x\.pth: expected the sha256 0{{8}}, got {digest}; get the file again"):
        load_weights(model, path, sha256="0" * 8)


# ------------------------------------------------------------------------------------------------------------- saving


def test_save__is_what_the_released_code_loads(tmp_path: Path) -> None:
    source = tiny(1)
    path = save_weights(nn.DataParallel(source), tmp_path / "x.pth", entry="model")
    saved = torch.load(path, weights_only=True)["model"]
    assert list(saved) == list(source.state_dict())
    model = tiny(2)
    assert str(model.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
    assert_equal(model, source.state_dict())
    assert all(value.device.type == "cpu" and not value.requires_grad for value in saved.values())


# ----------------------------------------------------------------------------------------------------------- download


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, list[str]]]:
    """A host on this machine, its folder, and what it was asked for."""
    asked: list[str] = []
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            asked.append(str(args[1]))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{host.server_port}", folder, asked
    host.shutdown()
    host.server_close()
    thread.join()


def test_url__is_downloaded_once_and_checked(server: tuple[str, Path, list[str]]) -> None:
    address, folder, asked = server
    source, model = tiny(1), tiny(2)
    digest = sha256(save_weights(source, folder / "x.pth").read_bytes()).hexdigest()
    for checksum in (None, digest, digest[:10]):
        load_weights(model, f"{address}/x.pth", sha256=checksum)
        assert_equal(model, source.state_dict())
    assert len([line for line in asked if "x.pth" in line]) == 1
    load_weights(tiny(3), (folder / "x.pth").as_uri())


def test_url__what_goes_wrong(server: tuple[str, Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder, _ = server
    model = tiny(2)
    before = snapshot(model)
    path = save_weights(tiny(1), folder / "x.pth")
    with pytest.raises(WeightsError, match=r"/x\.pth: it cannot be downloaded \(invalid hash value"):
        load_weights(model, f"{address}/x.pth", sha256="0" * 64)
    with pytest.raises(WeightsError, match=r"/y\.pth: it cannot be downloaded \(HTTP Error 404.*download it by hand"):
        load_weights(model, f"{address}/y.pth")
    (folder / "z.pth").write_bytes(b"<html>")
    with pytest.raises(WeightsError, match=r"got an HTML page.* It came from http://127.*/z\.pth"):
        load_weights(model, f"{address}/z.pth")
    (folder / "z.pth").write_bytes(path.read_bytes())
    assert_equal(model, before)
    load_weights(model, f"{address}/z.pth")  # the page was not kept
    monkeypatch.setitem(SOURCES, "coco", SOURCES["coco"]._replace(url=f"{address}/gone.pth"))
    with pytest.raises(WeightsError, match=r"has not answered since about December 2021; users .* pass its path"):
        load_weights(model, "coco")


def test_sources__say_what_is_known() -> None:
    assert set(SOURCES) == {"coco", "imagenet", "dacs-gta5", "torchvision-v1", "torchvision-v2"}
    for source in SOURCES.values():
        assert source.url.startswith("http")
        assert source.licence
        assert source.sha256 is None or source.sha256 in source.url
