"""The trainer's options: help, one validator for flags and files, what a dry run finds, and optional packages."""

import contextlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from crossmix.datasets import StreetScenes
from runs import assert_same, changed, final, forget, poison

pytestmark = pytest.mark.usefixtures("no_charts")

# An option, what it must not be on a command line or in a file, and what it must not be in a file alone.
BAD = {
    "method": ["", "DACS", "mine"],
    "network": ["resnet50", "resnet"],
    "precision": ["float16", "fp64"],
    "prior": ["sourse"],
    "weigh": ["source"],
    "scope": ["images"],
    "crop": ["0x64", "64x0", "x64", "64x", "-1", "64x64x64", "64 x 64", "native", "1.5", "big", "", "٣٢"],
    "source_size": ["0", "nativ", "9999999x1"],
    "workers": ["-1", "two", "1e9", "100000"],
    "steps": ["0", "-5", "1e9x", "1.5", "nan", "10000000000000"],
    "batch": ["0"],
    "seed": ["-1", "99999999999999999999"],
    "lr": ["-1", "nan", "inf", "1e999", "fast"],
    "threshold": ["1.5", "-0.1", "nan"],
    "decay": ["1.01"],
    "momentum": ["2"],
    "aspp_branches": ["3", "2.0"],
    "device": ["foo", "cuda:99", "meta", ""],
    "evaluation": ["1x1"],
    "optimizer": ["adam", "SGD", ""],
    "warmup": ["-1", "1.5", "4"],
    "head_factor": ["-1", "inf"],
    "no_decay": ["norms", "norm bias", "norm,", "٣"],
    "ignore_top": ["-1", "512", "1.5"],
    "ignore_bottom": ["600"],
    "consistency_block": ["0", "-1", "1.5", "big", ""],
    "consistency_ratio": ["-0.1", "1.1", "nan"],
    "consistency_weight": ["-1", "inf", "nan"],
    "rare_temperature": ["0", "-1", "nan"],
    "rare_pixels": ["0", "1.5", "none"],
    "log_every": ["0"],
    "skip_files": ["-1"],
    "weights": ["a\0b"],
    "cache": ["\0"],
    "gta5": ["\0"],
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


def as_json(text: str) -> object:
    """What a file would hold in place of a flag's text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda part: part or "empty")
def test_bad_value__is_one_line_from_flag_and_file(
    trainer: ModuleType, folders: list[str], tmp_path: Path, name: str, value: str
) -> None:
    flag, out = f"--{name.replace('_', '-')}", tmp_path / "run"
    file = tmp_path / "options.json"
    file.write_text(json.dumps({name: as_json(value)}))  # NaN and Infinity are what Python's json writes
    rest = list(folders)
    if flag in rest:
        del rest[rest.index(flag) : rest.index(flag) + 2]
    for arguments in ([f"{flag}={value}"], ["--config", str(file)]):
        with pytest.raises(SystemExit) as ended:
            trainer.main([*rest, *arguments, "--out", str(out)])
        message = str(ended.value)
        assert message.startswith("error: "), message
        assert message.count("\n") == 0
        assert flag in message or repr(name) in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "7"), ("steps", 7.0), ("steps", True), ("steps", None), ("steps", [7]), ("lr", "0.1"), ("lr", True),
        ("lr", {}), ("seed", None), ("method", 1), ("method", None), ("method", ["dacs"]), ("compile", 1),
        ("compile", "true"), ("compile", None), ("crop", 64), ("crop", [64, 64]), ("gta5", None), ("gta5", 3),
        ("aspp_branches", "2"), ("aspp_branches", True), ("include_ignored", 0), ("device", None), ("lr", 10**400),
        ("steps", 10**400), ("consistency_block", "none"), ("consistency_block", True), ("consistency", None),
        ("consistency", "on"), ("no_decay", None), ("no_decay", ["norm"]), ("optimizer", None), ("rare_pixels", None),
    ],
)  # fmt: skip
def test_file__refuses_other_types(
    trainer: ModuleType, folders: list[str], tmp_path: Path, name: str, value: object
) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({name: value}))
    with pytest.raises(SystemExit, match=f"error: .*options.json: '{name}' must be .*, got "):
        trainer.main([*folders, "--config", str(file), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "7", '"steps"', "{", '{"steps": 1,}', "[" * 100_000, "\x00", '{"stepz": 1}']
)
def test_file__that_is_none_is_one_line(trainer: ModuleType, folders: list[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"error: .*options\.json: "):
        trainer.main([*folders, "--config", str(file)])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match=r"error: .*options\.json: is not a JSON object of options"):
        trainer.main([*folders, "--config", str(file)])


def test_file__a_runs_own_repeats_it(trainer: ModuleType, run: Callable[..., Path], tmp_path: Path) -> None:
    out = run("--recipe", "paper", "--source-size", "native", "--evaluation", "64x128", "--threshold", "0.3")
    assert trainer.main(["--config", str(out / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert_same(final(out), final(tmp_path / "again"))


def test_file__a_flag_takes_the_place_of_its_alternative(
    trainer: ModuleType, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"synthia": "s", "gta5": "", "weights": "w", "random_init": False, "cityscapes": "c"}))
    assert trainer.main([*folders, "--config", str(file), "--dry-run"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["synthia"], options["gta5"]) == ("", folders[1])
    assert (options["weights"], options["random_init"]) == ("", True)


@pytest.mark.parametrize(
    "flag", ["--seed=--", "--lr=--", "--gta5=--", "--out=--", "--config=--", "--out=a\0b", "--runs=--"]
)
def test_flag__that_is_no_text_is_one_line(trainer: ModuleType, folders: list[str], flag: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {flag.partition('=')[0]} must be text, got "):
        trainer.main([*folders, flag])


def test_contradictions__are_refused(trainer: ModuleType, folders: list[str]) -> None:
    for flags, message in (
        (["--demo", "--gta5", "x"], "--demo renders its own data; leave out --gta5"),
        ([*folders, "--nesterov", "--momentum", "0"], "--nesterov needs --momentum above 0"),
        ([*folders, "--weights", "w"], "or --random-init"),
        ([*folders[2:]], "give --gta5 DIR or --synthia DIR"),
        ([*folders, "--crop", "4x32"], "--crop must be 8x8 at least, the stride of the network, got 4x32"),
        ([*folders, "--out", ""], "--out must name a folder"),
        ([*folders, "--runs", "x"], "--runs must be a whole number from 1 to 10000, got 'x'"),
    ):
        with pytest.raises(SystemExit, match=message):
            trainer.main(flags)


def test_help__tells_text_unit_and_default_of_every_flag(trainer: ModuleType) -> None:
    import options

    actions = [one for one in options._parser("")._actions if one.dest != "help"]
    assert len(actions) > 50
    assert {one.dest for one in actions} >= set(trainer.Config.__dataclass_fields__)
    for one in actions:
        text = (one.help or "").replace("%%", "%")
        assert "(default: " in text, one.dest
        assert len(text.partition(" (default")[0]) >= 5, one.dest
        numeric = one.dest in options.OPTIONS and type(options.OPTIONS[one.dest].default) in {int, float}
        assert "[" in text or not numeric, f"{one.dest} has no unit"
    helps = {one.dest: one.help or "" for one in actions}
    assert "(default: batch; image by --recipe paper)" in helps["scope"]
    assert "(default: 0.99; 0.0 by --recipe paper; 0.999 by --recipe mic)" in helps["decay"]
    assert "(default: 2; 4 by --recipe paper or mic)" in helps["aspp_branches"]
    assert "(default: none)" in helps["consistency_block"]


def test_dry_run__finds_what_a_run_would(
    trainer: ModuleType, own_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weighted = [flag for flag in own_data if flag != "--random-init"]
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    (tmp_path / "file").touch()
    done = tmp_path / "done"
    assert trainer.main([*own_data, "--out", str(done)]) == 0
    for flags, message in (
        (changed(own_data, gta5=str(tmp_path / "nowhere")), "nowhere: has no images"),
        (changed(own_data, cityscapes=str(tmp_path)), "has no images"),
        ([*own_data, "--crop", "40x32"], r"00001\.png: 32x64"),
        ([*own_data, "--batch", "6"], "the target has 5 images, fewer than the 6 of a batch"),
        ([*own_data, "--eval-split", "none"], "split 'none' has no images"),
        ([*weighted, "--weights", str(tmp_path / "bad.pth")], r"bad\.pth"),
        ([*weighted, "--weights", str(tmp_path / "gone.pth")], r"gone\.pth"),
        ([*own_data, "--device", "foo"], "--device foo cannot be used"),
        ([*own_data, "--cache", str(tmp_path / "file")], "--cache .*file is not a folder"),
        ([*own_data, "--cache", str(tmp_path / "file" / "below")], "--cache .*file is not a folder"),
        ([*own_data, "--out", str(tmp_path / "file")], "--out .*file is not a folder"),
        ([*own_data, "--out", str(tmp_path / "file" / "below" / "run")], "--out .*file is not a folder"),
        (changed(own_data, gta5="x" * 5000), "File name too long"),
        ([*own_data, "--eval-split", "x" * 5000], "File name too long"),
        ([*own_data, "--out", str(done)], "done holds a run already"),
        ([*own_data, "--resume", "--out", str(tmp_path / "mistyped")], "no folder .*mistyped"),
    ):
        for dry in (["--dry-run"], []):
            out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
            with pytest.raises(SystemExit, match=f"error: .*{message}"):
                trainer.main([*flags, *out, *dry])
        assert not (tmp_path / "run").exists()
    shutil.copy(next((tmp_path / "data" / "cs").glob("leftImg8bit/*/*/*.png")), tmp_path / "x.png")
    StreetScenes(1, size=(20, 64)).write(tmp_path / "small", layout="gta5")
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / "small" / kind / "00001.png", tmp_path / "data" / "gta5" / kind / "00004.png")
    with pytest.raises(
        SystemExit, match=r"larger than 1 of 6 source images, such as .*00004\.png: 20x64.*--skip-files 1"
    ):
        trainer.main([*own_data, "--dry-run"])
    capsys.readouterr()
    for remedy in (["--skip-files", "1"], ["--pad"], ["--source-size", "32x64"]):
        assert trainer.main([*own_data, "--dry-run", *remedy]) == 0
    assert not (tmp_path / "run").exists()


def test_dry_run__finds_a_place_that_has_no_room_or_is_read_only(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*folders, "--out", str(tmp_path / "new" / "run")]
    assert trainer.main([*flags, "--dry-run"]) == 0
    usage = shutil.disk_usage(tmp_path)
    for free, runs, found in ((30_000_000, "1", False), (30_000_000, "2", True), (0, "1", True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        message = r"error: --out .*run: checkpoints will need \d\d MB, and only \d+ MB are free; make room"
        with pytest.raises(SystemExit, match=message) if found else contextlib.nullcontext():
            trainer.main([*flags, "--dry-run", "--runs", runs])
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may run this, can write anywhere
    for dry in (["--dry-run"], []):
        with pytest.raises(SystemExit, match=f"error: --out .*: {tmp_path} cannot be written to; give another"):
            trainer.main([*flags, *dry])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [["--dry-run"], ["--runs", "2"]], ids=" ".join)
def test_tensorboard__is_looked_for_before_anything_is_trained(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it cannot be imported
    with pytest.raises(SystemExit, match=r"error: --tensorboard needs the package tensorboard.*pip install"):
        trainer.main([*folders, "--tensorboard", "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard__events_are_live_and_a_resumed_run_doubles_none(
    trainer: ModuleType, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def steps(out: Path) -> list[int]:
        found = []
        for file in (out / "report").glob("events.out.tfevents.*"):  # each by itself: nothing is purged
            events = accumulator.EventAccumulator(str(file)).Reload()
            found += [event.step for event in events.Scalars("loss")]
        return found

    poison(trainer, monkeypatch, {3})
    with pytest.raises(SystemExit, match="step 3: the loss or a gradient is not finite"):
        run("--tensorboard", "--save-every", "2")
    assert steps(tmp_path / "run") == [1, 2, 3]  # without a run that has ended
    monkeypatch.undo()
    out = run("--tensorboard", "--save-every", "2", "--resume")
    assert steps(out) == [1, 2, 3, 4]
    late = run("--save-every", "2", out="late")
    forget(late)
    assert steps(run("--save-every", "2", "--resume", "--tensorboard", out="late")) == [1, 2, 3, 4]


def test_sizes__are_compared_as_sizes(run: Callable[..., Path]) -> None:
    out = run("--crop", "32")
    forget(out)
    run("--crop", "32x32", "--resume")


def test_numbers__may_lie_on_their_bounds(trainer: ModuleType, folders: list[str]) -> None:
    for flags in itertools.chain(
        (["--threshold", value] for value in ("0", "1")), (["--decay", value] for value in ("0", "1", "1e-3"))
    ):
        assert trainer.main([*folders, "--dry-run", *flags]) == 0
    assert torch.device("cpu") == torch.device(folders[folders.index("--device") + 1])
