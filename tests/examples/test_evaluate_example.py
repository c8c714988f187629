"""The evaluation script, on a small network and a rendered data set; and the paper's tables."""

import contextlib
import json
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import evaluate
import networks
import predict
import scores
from checks import refusal
from crossmix import MeanTeacher, evaluation
from crossmix.datasets import Cityscapes, StreetScenes
from crossmix.datasets.classes import CLASS_NAMES, CLASSES_13, CLASSES_16
from crossmix.models import WeightsError, deeplab_v2_tiny, save_weights
from runs import Capture, Patch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    StreetScenes(3, domain="target").write(tmp_path / "c", layout="cityscapes", split="val")
    return tmp_path / "c"


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_precision__is_that_of_the_trainer(
    trainer: ModuleType, folder: Path, tmp_path: Path, precision: str, *, rounded: bool
) -> None:
    networks.set_float32_products("fp32" if rounded else "tf32")
    found = []

    def note(*_: object) -> None:
        found.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    path = str(save_weights(deeplab_v2_tiny(19, aspp_branches=2), tmp_path / "x.safetensors"))
    arguments = ["--weights", path, "--network", "tiny", "--device", "cpu", "--precision", precision]
    with contextlib.ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_pre_hook(note).remove)
        data = ["--cityscapes", str(folder), "--image-size", "32x64", "--workers", "0"]
        assert evaluate.main([*arguments, *data]) == 0
        image = next(folder.glob("leftImg8bit/val/*/*.png"))
        assert predict.main([str(image), *arguments, "--size", "32x64", "--out", str(tmp_path / "out")]) == 0
    assert set(found) == {(rounded, rounded)}
    networks.set_float32_products("fp32" if rounded else "tf32")
    trainer.set_up_arithmetic(trainer.Config(precision=precision, device="cpu"))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (rounded, rounded)


@pytest.mark.parametrize("method", ["a file of weights", "a run of the trainer"])
def test_evaluate__prints_and_writes_both_sizes(method: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    torch.manual_seed(0)
    student, teacher = (deeplab_v2_tiny(19, aspp_branches=2).eval() for _ in range(2))
    out = tmp_path / "scores.json"
    arguments = ["--cityscapes", str(folder), "--image-size", "32x64", "--workers", "0", "--out", str(out)]
    if method == "a file of weights":
        path = save_weights(student, tmp_path / "x.safetensors")
        arguments += ["--network", "tiny"]
        want = {"student": student}
    else:
        path = tmp_path / "copied.pt"
        config = {"network": "tiny", "aspp_branches": 2, "target_size": "32x64", "cityscapes": "elsewhere"}
        states = {"student": student.state_dict(), "teacher": MeanTeacher(teacher).state_dict()}
        torch.save({**states, "step": 1, "config": config, "versions": {"torch": "2.13"}}, path)
        arguments = [part for part in arguments if part not in {"--image-size", "32x64"}]
        arguments += ["--entry", "student", "teacher"]
        want = {"student": student, "teacher": teacher}
    assert evaluate.main(["--weights", str(path), *arguments]) == 0
    document = json.loads(out.read_text("utf-8"))
    printed = capsys.readouterr().out
    assert list(document["scores"]) == list(want)
    for entry, model in want.items():
        sizes = [(32, 64), (64, 128)]
        matrices = evaluation.evaluate(
            model, Cityscapes(folder, "val"), image_size=(32, 64), label_sizes=sizes, forward=model.forward_features
        )
        for key, matrix in matrices.items():
            assert document["scores"][entry][key]["miou"] == matrix.compute().mean
            assert document["scores"][entry][key]["miou_13"] == matrix.compute(CLASSES_13).mean
            assert f"{100 * matrix.compute().mean:.2f}" in printed
            assert f"{entry} {key}" in printed
    assert "52.14" in printed.splitlines()[-3]
    assert "| road |" in printed


def test_evaluate__bad_input_is_one_line(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "x.pth").write_bytes(b"<html>")
    for weights, data, message in (
        (tmp_path / "none.pth", folder, "no such file"),
        (tmp_path / "x.pth", folder, "an HTML page"),
        (save_weights(deeplab_v2_tiny(19), tmp_path / "y.pth"), tmp_path, "has no images"),
        (save_weights(deeplab_v2_tiny(5), tmp_path / "z.pth"), folder, "expected everything to match"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main(["--weights", str(weights), "--cityscapes", str(data), "--network", "tiny", "--workers", "0"])
    good = ["--cityscapes", str(folder), "--network", "tiny", "--workers", "0", "--weights"]
    for flag, value in (
        ("--image-size", "0x4"),
        ("--image-size", "32x"),
        ("--workers", "-1"),
        ("--paper", "gta5/none"),
        ("--device", "nowhere"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*good, str(tmp_path / "y.pth"), flag, value])
        assert f"argument {flag}: " in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"error: .*file"):  # before it scores anything
        evaluate.main([*good, str(tmp_path / "none.pth"), "--out", str(tmp_path / "file" / "x.json")])
    with pytest.raises(SystemExit, match=f"^error: --out {tmp_path}: is a folder; name a file"):  # likewise
        evaluate.main([*good, str(tmp_path / "none.pth"), "--out", str(tmp_path)])
    torch.save({"student": deeplab_v2_tiny(19).state_dict(), "config": {"target_size": "big"}}, tmp_path / "big.pt")
    with pytest.raises(SystemExit, match="expected HxW in pixels, such as 512x1024, or native, got 'big'"):
        evaluate.main([*good, str(tmp_path / "big.pt")])
    with pytest.raises(SystemExit, match=r"y\.pth: .* It was taken for resnet101: is it another --network\?"):
        evaluate.main(["--cityscapes", str(folder), "--weights", str(tmp_path / "y.pth"), "--workers", "0"])
    torch.save({"student": deeplab_v2_tiny(5).state_dict(), "config": {"num_classes": 5}}, tmp_path / "five.pt")
    with pytest.raises(SystemExit, match=r"five\.pt: has 5 classes, but Cityscapes 19"):
        evaluate.main([*good, str(tmp_path / "five.pt")])


def test_load_network__from_inside_the_checkpoint_unless_flags_say_else(tmp_path: Path) -> None:
    source = deeplab_v2_tiny(7, aspp_branches=4).eval()
    config = {"network": "tiny", "aspp_branches": 4, "num_classes": 7}
    torch.save({"student": source.state_dict(), "config": config}, tmp_path / "x.pt")
    for flags, branches in (({}, 4), ({"aspp_branches": 2}, 2), ({"network": "tiny"}, 4)):
        network = evaluate.load_network(str(tmp_path / "x.pt"), "student", **flags)
        assert (network.num_classes, network.layer5.branches, network.training) == (7, branches, False)
        assert all(map(torch.equal, network.state_dict().values(), source.state_dict().values()))
    with pytest.raises(WeightsError, match=r"x\.pt: expected everything to match|the whole backbone"):
        evaluate.load_network(str(tmp_path / "x.pt"), "student", network="resnet101")
    torch.save({"student": source.state_dict(), "config": {"network": "my:net"}}, tmp_path / "y.pt")
    with pytest.raises(WeightsError, match=r"y\.pt: was trained on the network 'my:net', which this script does not"):
        evaluate.load_network(str(tmp_path / "y.pt"), "student")


def test_load_network__reads_the_options_in_a_checkpoint_once(tmp_path: Path, monkeypatch: Patch) -> None:
    path = str(tmp_path / "x.pt")
    torch.save({"student": deeplab_v2_tiny(7).state_dict(), "config": {"network": "tiny", "num_classes": 7}}, path)
    read = Mock(wraps=evaluate.read_weights)
    monkeypatch.setattr(evaluate, "read_weights", read)
    evaluate.load_network(path, "student", aspp_branches=4)
    assert (evaluate.trained_row(path), evaluate.trained_size(path)) == ("gta5/dacs", (512, 1024))
    assert read.call_count == 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("network", ["tiny"], "text"),
        ("num_classes", None, "a whole number from 1 to 255"),
        ("num_classes", 10**9, "a whole number from 1 to 255"),
        ("aspp_branches", "4", "a whole number from 1 to 4"),
        ("target_size", 512, "text"),
    ],
)
def test_load_network__options_of_others_in_a_checkpoint_are_refused(
    tmp_path: Path, name: str, value: object, expected: str
) -> None:
    path, source = tmp_path / "x.pt", deeplab_v2_tiny(19)
    torch.save({"student": source.state_dict(), "config": {"network": "tiny", name: value}}, path)
    refusal(
        lambda: (evaluate.load_network(str(path), "student"), evaluate.trained_size(str(path))),
        rf"x\.pt: its option '{name}' must be {expected}, got ",
        WeightsError,
    )


def test_evaluate__a_full_disk_costs_no_scores(folder: Path, tmp_path: Path, small_disk: Path, capsys: Capture) -> None:
    path = save_weights(deeplab_v2_tiny(19, aspp_branches=2), tmp_path / "x.pth")
    arguments = ["--weights", str(path), "--cityscapes", str(folder), "--network", "tiny", "--image-size", "32x64"]
    (small_disk / "others").write_bytes(bytes(2**20))
    with pytest.raises(SystemExit, match=r"No space left.*free some space.*scores\.json"):
        evaluate.main([*arguments, "--workers", "0", "--out", str(small_disk / "scores.json")])
    assert "| student 32x64 |" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate__under_torchrun(folder: Path, tmp_path: Path) -> None:
    path = save_weights(deeplab_v2_tiny(19, aspp_branches=2), tmp_path / "x.pth")
    outputs = []
    script = [evaluate.__file__, "--weights", str(path), "--cityscapes", str(folder), "--network", "tiny"]
    script += ["--image-size", "native", "--device", "cpu", "--workers", "0"]
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        done = subprocess.run([sys.executable, *launcher, *script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert "student native" in outputs[0]


@pytest.mark.parametrize(
    ("config", "row", "shown"),
    [
        ({}, "paper, gta5/dacs", "52.14"),
        ({"gta5": "g", "method": "classmix"}, "paper, gta5/classmix", "35.08"),
        ({"synthia": "s", "gta5": "", "method": "source"}, "paper, synthia/source", "33.65"),
        ({"source": "own", "method": "source"}, "", ""),
    ],
)
def test_evaluate__takes_row_and_precision_from_the_run(
    config: dict[str, str], row: str, shown: str, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    path, seen = tmp_path / "x.pt", []
    networks.set_float32_products("fp32")
    config = {"network": "tiny", "target_size": "32x64", "precision": "tf32", **config}
    torch.save({"student": deeplab_v2_tiny(19, aspp_branches=2).state_dict(), "config": config}, path)
    chosen = networks.set_float32_products
    monkeypatch.setattr(evaluate, "set_float32_products", lambda precision: (seen.append(precision), chosen("fp32")))
    arguments = ["--weights", str(path), "--cityscapes", str(folder), "--workers", "0"]
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert (row or "| class | student 32x64 | student 64x128 |\n") in printed.splitlines(keepends=True)[0]
    assert shown in printed
    assert evaluate.main([*arguments, "--precision", "bf16", "--paper", "gta5/alignment"]) == 0
    assert "paper, gta5/alignment" in capsys.readouterr().out
    for device in ("cpu", "cuda:1"):
        evaluate.set_precision(Namespace(weights=str(path), device=device, precision=None))
    assert seen == ["fp32", "bf16", "fp32", "tf32"]


OTHERS = ({"method": "mine"}, {"method": None, "precision": 16}, {"source": {"type": "GTA"}, "precision": "16-mixed"})


@pytest.mark.parametrize("options", OTHERS)
def test_evaluate__options_of_others_cost_only_the_column(
    options: dict[str, Any], folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    path, student = tmp_path / "x.pt", deeplab_v2_tiny(19, aspp_branches=2).state_dict()
    torch.save({"student": student, "config": {"network": "tiny", "target_size": "32x64", **options}}, path)
    assert evaluate.main(["--weights", str(path), "--cityscapes", str(folder), "--workers", "0"]) == 0
    assert ("paper" in capsys.readouterr().out) == ("method" not in options)


def test_paper_tables__rows_average_to_their_means() -> None:
    tables = scores.paper_tables()
    checked = 0
    for name in ("table 1", "table 3"):
        for row in tables[name]["rows"]:
            assert tuple(row["per_class"]) == CLASS_NAMES
            values = list(row["per_class"].values())
            if None not in values:
                assert abs(statistics.mean(values) - row["miou"]) < 0.11, row["method"]
                checked += 1
    sixteen = [CLASS_NAMES[i] for i in CLASSES_16]
    for row in tables["table 2"]["rows"]:
        assert list(row["per_class"]) == sixteen
        thirteen = [row["per_class"][CLASS_NAMES[i]] for i in CLASSES_13]
        assert abs(statistics.mean(thirteen) - row["miou_13"]) < 0.11, row["method"]
        checked += 1
    assert checked == 18 + 16 + 5
    assert scores.paper_row("gta5", "alignment")["miou"] == 48.04
    assert scores.paper_row("synthia", "dacs")["miou_13"] == 54.81
    assert scores.paper_row("synthia", "classmix") == {"per_class": {}}
