"""The trainer's options: help, one validator for flags and files, what a dry run finds, and optional packages."""

import contextlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import domains
from crossmix import recipes
from crossmix.datasets import GTA5, CachedSamples, SegmentationFolder, StreetScenes, class_counts
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.models import deeplab_v2_tiny
from options import unusable
from runs import Capture, Patch, Run, assert_same, changed, final, poison, resolved

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")
BASE = ("--gta5", "a", "--cityscapes", "b", "--random-init")
MIC = ("--recipe", "mic")

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
    "text",
    [
        "", "[]", "null", "7", '"steps"', "{", '{"steps": 1,}', "[" * 100_000, "\x00", '{"stepz": 1}',
        '{"lr": 1, "lr": 2}',
    ],
)  # fmt: skip
def test_file__that_is_none_is_one_line(trainer: ModuleType, folders: list[str], tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"error: .*options\.json: "):
        trainer.main([*folders, "--config", str(file)])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit, match=r"error: .*options\.json: is not a JSON object of options"):
        trainer.main([*folders, "--config", str(file)])


OWN = [
    ("--recipe", "paper", "--source-size", "native", "--evaluation", "64x128", "--threshold", "0.3"),
    (*MIC, "--consistency-weight", "0.5"),  # its file has a momentum, which alone is refused beside adamw
]


@pytest.mark.parametrize("flags", OWN)
def test_file__a_runs_own_repeats_it(trainer: ModuleType, whole: Run, tmp_path: Path, flags: tuple[str, ...]) -> None:
    file, again = whole(*flags) / "config.json", tmp_path / "again"
    assert trainer.main(["--config", str(file), "--out", str(again)]) == 0
    assert_same(final(whole(*flags)), final(again))
    assert json.loads((again / "config.json").read_text()) == json.loads(file.read_text())


def test_file__a_flag_takes_the_place_of_its_alternative(
    trainer: ModuleType, folders: list[str], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"synthia": "s", "gta5": "", "weights": "w", "random_init": False, "cityscapes": "c"}))
    assert trainer.main([*folders, "--config", str(file), "--dry-run"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["synthia"], options["gta5"]) == ("", folders[1])
    assert (options["weights"], options["random_init"]) == ("", True)


def test_file__of_another_recipe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(resolved(*BASE)))
    with pytest.raises(SystemExit) as ended:
        resolved("--config", str(file), "--recipe", "paper")
    message = str(ended.value)
    assert message.startswith(f"error: --recipe paper does not go with --config {file}, which is of --recipe released")
    released, paper = resolved(*BASE), resolved(*BASE, "--recipe", "paper")
    for name in released.keys() - {"recipe"}:
        differs = f"{name} {released[name]!r} instead of {paper[name]!r}"
        assert (differs in message) == (released[name] != paper[name]), name
    assert message.endswith("; leave out one of them, --recipe or --config.")
    assert resolved("--config", str(file), "--recipe", "released") == released
    flags = [flag for name in paper if paper[name] != released[name] for flag in as_flag(name, paper[name])]
    assert resolved("--config", str(file), *flags) == paper
    file.write_text(json.dumps({"decay": 0.5}))  # of no recipe: its options go over those of any
    assert resolved(*BASE, "--config", str(file), "--recipe", "paper") == {**paper, "decay": 0.5}


def test_file__sizes_follow_the_data_of_a_flag(tmp_path: Path) -> None:
    file, rest = tmp_path / "config.json", ("--cityscapes", "b", "--random-init")
    own = ("--source", "s", "--target", "t", "--classes", "c", "--random-init")
    every = [("--gta5", "a", *rest), ("--synthia", "a", *rest), own]
    for old in every:
        file.write_text(json.dumps(resolved(*old)))
        for new in every:
            assert resolved("--config", str(file), *new) == resolved(*new)
            given = resolved("--config", str(file), *new, "--source-size", "99x99")
            assert given == {**resolved(*new), "source_size": "99x99"}
    file.write_text(json.dumps({**resolved(*every[0]), "source_size": "360x640"}))
    assert resolved("--config", str(file), "--gta5", "elsewhere")["source_size"] == "360x640"


def test_file__a_network_of_the_other_kind_takes_none_of_its_options(tmp_path: Path) -> None:
    file, data = tmp_path / "config.json", ("--gta5", "a", "--cityscapes", "b")
    ours, foreign = (*data, "--random-init"), (*data, "--network", "mine:net", "--head", "last")
    for old, new in ((ours, foreign), (foreign, (*ours, "--network", "tiny"))):
        file.write_text(json.dumps(resolved(*old)))
        got, want = resolved("--config", str(file), *new), resolved(*new)
        assert {name: got[name] for name in ("repeated", "head", "aspp_branches")} == {
            name: want[name] for name in ("repeated", "head", "aspp_branches")
        }
    assert resolved("--config", str(file), "--network", "mine:other")["head"] == "last"


def test_resident__what_does_not_fit_is_found_before_anything_is_read(
    trainer: ModuleType, own_data: list[str], monkeypatch: Patch
) -> None:
    flags = [*own_data, "--resident", "--source-size", "32x64"]
    needed = 32 * 64 * (6 * 4 + 5 * 3)  # labels of the source are read too
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for free in (needed, needed - 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 2 * free))
        with pytest.raises(SystemExit, match="error: --resident: both") if free < needed else contextlib.nullcontext():
            trainer.main([*changed(flags, device="cuda"), "--dry-run"])

    def full(*_: object) -> None:
        raise ValueError("cuda: has 1.0 GiB free, but 6 samples need 2.0 GiB; read them from a cache.")

    monkeypatch.setattr(domains, "resident", full)
    with pytest.raises(SystemExit, match=r"error: --resident: cuda: has 1\.0 GiB free"):
        trainer.main([*flags, "--steps", "1"])


@pytest.mark.parametrize(
    "flag", ["--seed=--", "--lr=--", "--gta5=--", "--out=--", "--config=--", "--out=a\0b", "--runs=--"]
)
def test_flag__that_is_no_text_is_one_line(trainer: ModuleType, folders: list[str], flag: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {flag.partition('=')[0]} must be text, got "):
        trainer.main([*folders, flag])


ADAMW = ("--optimizer", "adamw")
REFUSED = [  # flags beside good ones, and the beginning of the message
    (["--nesterov", "--momentum", "0"], "--nesterov needs --momentum above 0"),
    ([*ADAMW, "--nesterov"], "--nesterov needs --optimizer sgd"),
    ([*ADAMW, "--repeated"], "--repeated needs --optimizer sgd"),
    (["--weights", "w"], "give --weights FILE or --random-init, not both"),
    (["--synthia", "s"], "give --gta5 DIR or --synthia DIR"),
    (["--demo"], "--demo renders its own data; leave out --gta5"),
    (["--crop", "4x32"], "--crop must be 8x8 at least, the stride of the network, got 4x32"),
    (["--evaluation", "1x1"], "--evaluation must be one of the scored sizes, 32x64 or 64x128, got '1x1'"),
    (["--ignore-top", "400", "--ignore-bottom", "112"], "--ignore-top 400 and --ignore-bottom 112 must leave some"),
    (["--warmup", "4"], "--warmup must be less than --steps, got 4 of 4"),
    (["--method", "classmix", "--batch", "1"], "--method classmix pastes .* itself; --batch must be at least 2, got 1"),
    (["--method", "alignment", "--batch", "1", "--accumulate", "2"], "--method alignment pastes each image"),
    (["--consistency", "--consistency-block", "33"], "--consistency-block must fit into --crop 32x32, got 33"),
    (["--head", "layer5"], "--head is for --network MODULE:FUNCTION"),
    (["--runs", "x"], "--runs must be a whole number from 1 to 10000, got 'x'"),
    (["--runs", "0"], "--runs must be a whole number from 1 to 10000, got 0"),
    (["--out", ""], "--out must name a folder"),
    (["--resume"], "--resume needs --out DIR"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--steps", "0"], "--steps must be a whole number of at least 1, got 0"),
    (["--no-decay", "norms"], "--no-decay must be any of norm, bias, position, got 'norms'; did you mean 'norm'"),
    (["--steps", "1000000001"], "--steps must be a whole number from 1 to 1000000000, got 1000000001"),
    (["--seed", str(2**63)], f"--seed must be a whole number from 0 to {2**63 - 1}, got {2**63}"),
    (["--lr", "inf"], "--lr must be a finite number of at least 0, got inf"),
    (["--rare-temperature", "0"], "--rare-temperature must be a finite number of at least 1e-06"),
    (["--consistency-block", "0"], "--consistency-block must be a whole number of at least 1, or none"),
    (["--consistency-ratio", "1.1"], "--consistency-ratio must be a number from 0 to 1"),
    (["--prior", "source"], "--prior has no effect without --method alignment"),
    ([*ADAMW, "--momentum", "0.9"], "--momentum has no effect without --optimizer sgd"),
    ([*MIC, "--momentum", "0.5"], "--momentum has no effect without --optimizer sgd"),
    (["--no-decay", "norm", "--weight-decay", "0"], "--no-decay has no effect without --weight-decay above 0"),
    (["--rare-pixels", "30"], "--rare-pixels has no effect without --rare-classes"),
    ([*MIC, "--no-rare-classes", "--rare-temperature", "1"], "--rare-temperature has no effect without --rare-c"),
    (["--consistency-block", "8"], "--consistency-block has no effect without --consistency"),
    (["--consistency-ratio", "0.5"], "--consistency-ratio has no effect without --consistency"),
    ([*MIC, "--no-consistency", "--consistency-weight", "2"], "--consistency-weight has no effect without --consis"),
    (["--no-consistency-running-stats"], "--consistency-running-stats has no effect without --consistency"),
    (["--network", "m:f", "--aspp-branches", "4"], "--aspp-branches has no effect without --network resnet101 or"),
    (["--network", "m:f", "--head-factor", "2"], "--head-factor has no effect without --head"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_flags__are_refused_before_anything_is_read(
    trainer: ModuleType, folders: list[str], flags: list[str], message: str
) -> None:
    unread = changed(folders, gta5="nowhere", cityscapes="nowhere")
    with pytest.raises(SystemExit, match=f"^error: {message}") as ended:
        trainer.main([*unread, *flags])
    assert str(ended.value).count("\n") == 0


@pytest.mark.parametrize(
    "said", ["Could not run it. This could be because of pages", "Could not run it\nbecause of pages"]
)
def test_device__that_cannot_be_used_is_told_in_one_sentence(monkeypatch: Patch, said: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise NotImplementedError(said)  # as torch does, with all the devices that it knows

    monkeypatch.setattr(torch, "empty", fail)
    assert unusable("mps") == "--device mps cannot be used: Could not run it; try --device cpu"


@pytest.mark.parametrize("device", ["hpu", "privateuseone"])
def test_device__of_a_module_that_is_not_there_is_told(device: str) -> None:
    assert unusable(device) == f"--device {device} cannot be used: No module named 'torch.{device}'; try --device cpu"


def test_flags__may_lie_on_bounds_and_have_an_effect(folders: list[str]) -> None:
    for flags in (
        "--no-decay norm,bias", "--no-decay=", "--consistency-block none", "--threshold 0", "--threshold 1",
        "--decay 0", "--decay 1", "--decay 1e-3", "--optimizer adamw --no-nesterov",
        "--method alignment --prior source", "--method pseudo-label --batch 1",
        "--rare-classes --rare-pixels 1 --rare-temperature 9",
        "--network m:f --head h --head-factor 2",
        "--recipe mic --consistency-block 8 --consistency-ratio 0 --consistency-weight 2", "--crop 32x000032",
    ):  # fmt: skip
        resolved(*folders, *flags.split())


def test_data__is_chosen_once(trainer: ModuleType) -> None:
    for flags, message in (
        ([], "give --gta5 DIR or --synthia DIR, or --source, --target and --classes, or --demo"),
        (["--gta5", "a"], "--cityscapes DIR is needed, or --demo"),
        (["--gta5", "a", "--cityscapes", "b"], "comes nowhere near its numbers; or --random-init"),
    ):
        with pytest.raises(SystemExit, match=message):
            trainer.main(["--dry-run", *flags])


def test_options__flags_over_file_over_recipe(tmp_path: Path) -> None:
    base = (*BASE, "--network", "tiny")
    released, paper = resolved(*base), resolved(*base, "--recipe", "paper")
    switches = {name for name in released if released[name] != paper[name]}
    assert switches == {
        "recipe", "weigh", "scope", "source_normalizer", "include_ignored", "decay", "flavor", "same_on_batch",
        "aspp_branches", "nesterov", "repeated", "source_size", "evaluation",
    }  # fmt: skip
    for name in switches - {"recipe"}:  # each is one flag
        assert resolved(*base, *as_flag(name, paper[name]))[name] == paper[name]
    file = tmp_path / "c.json"
    chosen = {"recipe": "paper", "decay": 0.99, "steps": 7, "gta5": "a", "cityscapes": "b", "random_init": True}
    file.write_text(json.dumps(chosen))
    mixed = resolved("--config", str(file), "--steps", "9")
    assert (mixed["scope"], mixed["decay"], mixed["steps"]) == ("image", 0.99, 9)
    for text, message in (
        ('{"lambda": 1}', "unknown option 'lambda'"), ('{"tresh": 1}', "'tresh'; did you mean 'threshold'")
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(SystemExit, match=message):
            resolved("--config", str(file))


def as_flag(name: str, value: object) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-")]
    return [f"{flag}={'none' if value is None else value}"]


SETTINGS: dict[tuple[str, ...], dict[str, Any]] = {
    (): {
        "steps": 250_000, "batch": 2, "crop": "512x512", "lr": 2.5e-4, "momentum": 0.9, "weight_decay": 5e-4,
        "power": 0.9, "eval_every": 5000, "network": "resnet101", "aspp_branches": 2, "nesterov": False,
        "threshold": 0.968, "source_size": "720x1280", "target_size": "512x1024", "method": "dacs",
        "recipe": "released",
    },
    MIC: {
        "weigh": "target", "scope": "batch", "source_normalizer": "valid", "include_ignored": False, "decay": 0.999,
        "mode": "train", "flavor": "torchvision", "same_on_batch": False, "ignore_top": 15, "ignore_bottom": 120,
        "consistency": True, "consistency_block": None, "consistency_ratio": 0.7, "consistency_weight": 1.0,
        "rare_classes": True, "rare_temperature": 0.01, "rare_pixels": 3000, "optimizer": "adamw", "lr": 6e-5,
        "warmup": 1500, "power": 1.0, "head_factor": 10.0, "no_decay": "norm", "aspp_branches": 4, "repeated": False,
        "nesterov": False, "steps": 40_000, "source_size": "720x1280", "evaluation": "1024x2048",
    },
}  # fmt: skip


@pytest.mark.parametrize(("flags", "want"), SETTINGS.items(), ids=["the paper's run", "mic"])
def test_recipe__has_the_settings_of_its_row(flags: tuple[str, ...], want: dict[str, Any]) -> None:
    config = resolved(*BASE, *flags)
    assert {name: config[name] for name in want} == want
    for name, value in want.items():  # each is a flag
        assert resolved(*BASE, *flags, *as_flag(name, value))[name] == value


@pytest.mark.parametrize("name", ["released", "paper", "mic"])
def test_recipe__every_field_is_an_option_with_the_recipes_value(name: str) -> None:
    config = resolved(*BASE, "--recipe", name)
    for field, want in asdict(getattr(recipes, name.upper())).items():
        assert config[field] == (bool(want) if field == "consistency" else want), field


@pytest.mark.parametrize("method", recipes.METHODS)
@pytest.mark.parametrize("recipe", ["released", "paper", "mic"])
def test_recipe__builds_what_the_library_builds(
    trainer: ModuleType, folders: list[str], recipe: str, method: Any
) -> None:
    prior = ["--prior", "source"] * (method == "alignment")
    flags = [*folders, "--recipe", recipe, "--method", method, *prior, "--source-size", "native"]
    config = trainer.Config(**resolved(*flags))
    built = trainer.build_training(deeplab_v2_tiny(), config, trainer.Ranks(), fresh=True)
    ours = recipes.self_training(deeplab_v2_tiny(), 19, method=method, recipe=recipe, upsample=True)  # type: ignore[arg-type]
    assert repr(built) == repr(ours)


@pytest.mark.parametrize("rounding", ["ceil", "floor"])
def test_rounding__reaches_the_mix(trainer: ModuleType, folders: list[str], rounding: str) -> None:
    for method in ("classmix", "alignment", "dacs"):
        flags = [*folders, "--method", method, "--rounding", rounding, *["--prior", "source"] * (method == "alignment")]
        config = trainer.Config(**resolved(*flags))
        assert trainer.build_training(deeplab_v2_tiny(), config, trainer.Ranks(), fresh=True).mix.rounding == rounding
    with pytest.raises(SystemExit, match="--rounding has no effect without --method classmix or alignment or dacs"):
        resolved(*folders, "--method", "pseudo-label", "--rounding", rounding)


def test_defaults__fit_the_run_unless_given() -> None:
    for steps, warmup in ((40_000, 1500), (15_000, 1500), (1700, 170), (40, 4), (4, 0), (1, 0)):
        assert resolved(*BASE, *MIC, "--steps", str(steps))["warmup"] == warmup
    assert resolved(*BASE, *MIC, "--steps", "100", "--warmup", "60")["warmup"] == 60
    for crop, pixels in (("512x512", 3000), ("1024x1024", 3000), ("256x256", 750), ("32x32", 12), ("8x8", 1)):
        assert resolved(*BASE, *MIC, "--crop", crop)["rare_pixels"] == pixels
    assert resolved(*BASE, *MIC, "--crop", "32x32", "--rare-pixels", "7")["rare_pixels"] == 7
    assert resolved(*BASE, "--crop", "32x32")["rare_pixels"] == 3000  # unused
    for recipe, size in (("released", "256x512"), ("paper", "512x1024"), ("mic", "512x1024")):
        for target, want in (("256x512", size), ("native", "native")):
            assert resolved(*BASE, "--recipe", recipe, "--target-size", target)["evaluation"] == want


def test_optimizer__brings_its_own_rates(tmp_path: Path) -> None:
    names = ("lr", "warmup", "power", "weight_decay", "no_decay", "nesterov", "repeated", "head_factor")
    adamw = (6e-5, 1500, 1.0, 0.01, "norm", False, False, 10.0)
    sgd = (2.5e-4, 0, 0.9, 5e-4, "", False, False, 10.0)

    def rates(*flags: str) -> tuple[Any, ...]:
        return tuple(resolved(*flags)[name] for name in names)

    for recipe in ("released", "paper", "mic"):
        assert rates(*BASE, "--recipe", recipe, *ADAMW) == adamw
        assert rates(*BASE, "--recipe", recipe, *ADAMW, "--lr", "1", "--no-decay=") == (
            1.0,
            *adamw[1:4],
            "",
            *adamw[5:],
        )
    assert rates(*BASE, *MIC, "--optimizer", "sgd") == sgd
    file = tmp_path / "config.json"
    for one, other in (("sgd", "adamw"), ("adamw", "sgd")):
        file.write_text(json.dumps(resolved(*BASE, "--optimizer", one)))
        assert rates("--config", str(file), "--optimizer", other) == rates(*BASE, "--optimizer", other)
    file.write_text(json.dumps({"lr": 0.5}))  # which says nothing of its optimizer
    assert rates(*BASE, "--config", str(file), *ADAMW) == (0.5, *adamw[1:])


def test_demo__settings_of_both_optimizers() -> None:
    names = ("optimizer", "warmup", "rare_classes", "consistency", "rare_pixels", "decay", "ignore_bottom", "steps")
    sgd, mic = ([resolved("--demo", *flags)[name] for name in names] for flags in ((), MIC))
    assert sgd == ["sgd", 0, False, False, 12, 0.9, 0, 1700]
    assert mic == ["adamw", 170, True, True, 12, 0.9, 120, 1700]


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


def test_dry_run__says_what_is_there_and_what_it_takes(
    trainer: ModuleType, folders: list[str], own_data: list[str], tmp_path: Path, capsys: Capture
) -> None:
    def plan(*flags: str) -> Any:
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            trainer.main([*flags, "--dry-run"])
        return json.loads(capsys.readouterr().out)["plan"]

    found = plan(*folders)
    assert found["images"] == {"source": 6, "target": 5, "validation": 3}
    assert found["evaluations"] == 2
    assert found["source_images_per_step"] == 2
    assert "rare_classes" not in found
    found = plan(*BASE)
    assert "a: has no images (there is no such folder)" in found["images"]
    assert 2000 < found["checkpoints_mb"] < 2200  # twelve times 175 MB
    assert 4000 < found["memory_mb_computed_fp32"] < 11_000  # the paper's card has 11 GB
    file = tmp_path / "data" / "gta5" / "crossmix-stats.jsonl"
    flags = (*own_data, "--rare-classes", "--rare-pixels", "100")
    assert plan(*flags)["rare_classes"] == {"counts": str(file), "images_to_count": 6}
    assert not file.exists()
    counts = class_counts(GTA5(own_data[1]), cache=file)
    want = dict(zip(CLASS_NAMES, (counts >= 100).sum(0).tolist(), strict=False))
    assert 0 < sum(want.values()) < 6 * 19
    assert plan(*flags)["rare_classes"] == {"counts": str(file), "images_to_count": 0, "images_with_rare_pixels": want}
    with pytest.raises(SystemExit, match=r"error: --rare-pixels 3000: `min_pixels` must be reached by some class"):
        trainer.main([*own_data, "--rare-classes", "--rare-pixels", "3000", "--dry-run"])
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:4]))  # as if the count had been interrupted
    assert plan(*flags)["rare_classes"]["images_to_count"] == 2
    file.write_text("something else")
    assert "is not a file of counts" in plan(*flags)["rare_classes"]
    assert plan("--demo", "--rare-classes")["rare_classes"]["images_to_count"].startswith("all that the demo renders")


def test_plan__memory_includes_what_the_guard_keeps(trainer: ModuleType) -> None:
    """A copy of everything that moves, which is what a checkpoint holds, and on a GPU two."""
    import plan

    on_cpu, on_gpu = (plan.costs(trainer.Config(device=device)) for device in ("cpu", "cuda:1"))
    kept = on_cpu["checkpoints_mb"] / plan.KEPT
    assert kept > 500
    assert on_gpu["memory_mb_computed_fp32"] - on_cpu["memory_mb_computed_fp32"] == pytest.approx(kept, abs=2)


def test_batch__of_a_step_is_said_where_it_is_more_than_that_of_a_process(
    trainer: ModuleType, folders: list[str], run: Run, monkeypatch: Patch, capsys: Capture
) -> None:
    run("--steps", "1", "--batch", "1", "--accumulate", "2")
    said = "1 steps on cpu of 2 source and 2 target images (1 processes x --batch 1 x --accumulate 2), into"
    assert f"dacs, seed 0: {said}" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert trainer.main([*folders, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        assert printed == "" if rank == "1" else json.loads(printed)["plan"]["source_images_per_step"] == 4
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="the target has 5 images, fewer than the 6 of a batch"):
        trainer.main([*folders, "--batch", "3", "--dry-run"])


def test_dry_run__finds_what_a_run_would(trainer: ModuleType, own_data: list[str], died: Run, tmp_path: Path) -> None:
    weighted = [flag for flag in own_data if flag != "--random-init"]
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    (tmp_path / "file").touch()
    done, seeds, models = died(out="done"), tmp_path / "seeds", tmp_path / "models"
    shutil.copytree(done, seeds / "seed-0")
    for report in (done, seeds):
        (report / "report").mkdir(exist_ok=True)
        (report / "report" / "index.html").touch()
    (models / "mine").mkdir(parents=True)
    (models / "mine" / "config.json").write_text("{}")
    assert trainer.main([*own_data, "--out", str(models), "--dry-run"]) == 0
    StreetScenes(1, size=(32, 64)).write(tmp_path / "one", layout="gta5")
    for kind, other in (("sized", GTA5(own_data[1], size=(16, 32))), ("fewer", GTA5(tmp_path / "one"))):
        CachedSamples(other, tmp_path / kind / "source", progress=False)
    for flags, message in (
        (
            changed(own_data, gta5=str(tmp_path / "nowhere")),
            r"nowhere: has no images \(there is no such folder\); expected",
        ),
        (changed(own_data, gta5=own_data[3]), r"has no images \(it looks like Cityscapes\)"),
        (changed(own_data, cityscapes=str(tmp_path)), "has no images"),
        (
            [*own_data, "--crop", "40x32"],
            r"--crop 40x32 is larger than 6 of 6 source images, such as .*00001\.png: 32x64; crop",
        ),
        ([*own_data, "--batch", "6"], "the target has 5 images, fewer than the 6 of a batch"),
        ([*own_data, "--eval-split", "none"], "split 'none' has no images"),
        ([*weighted, "--weights", str(tmp_path / "bad.pth")], r"bad\.pth"),
        ([*weighted, "--weights", str(tmp_path / "gone.pth")], r"gone\.pth"),
        ([*own_data, "--batch", "7"], "the source has 6 images, fewer than the 7 of a batch"),
        ([*own_data, "--cache", str(tmp_path / "file")], "--cache .*file is not a folder"),
        ([*own_data, "--cache", str(tmp_path / "file" / "below")], "--cache .*file is not a folder"),
        ([*own_data, "--cache", str(tmp_path / "sized")], r"sized.source: is a cache of other samples: its reader is"),
        ([*own_data, "--cache", str(tmp_path / "fewer")], "fewer.source: is a cache of other samples: its number of"),
        ([*own_data, "--out", str(tmp_path / "file")], "--out .*file is not a folder"),
        ([*own_data, "--out", str(tmp_path / "file" / "below" / "run")], "--out .*file is not a folder"),
        (changed(own_data, gta5="x" * 5000), "File name too long"),
        ([*own_data, "--eval-split", "x" * 5000], "File name too long"),
        ([*own_data, "--out", str(done)], "done holds a run already"),
        ([*own_data, "--out", str(done), "--runs", "2"], "done holds .*done of another command"),
        ([*own_data, "--out", str(seeds)], "seeds holds .*seed-0 of another command"),
        ([*own_data, "--resume", "--out", str(tmp_path / "mistyped")], "no folder .*mistyped"),
    ):
        for dry in ([], ["--dry-run"]) if {"--batch", "--cache", "--out"} & {*flags} else ([],):  # which look alike
            out = [] if "--out" in flags else ["--out", str(tmp_path / "run")]
            with pytest.raises(SystemExit, match=f"error: .*{message}"):
                trainer.main([*flags, *out, *dry])
        assert not (tmp_path / "run").exists()
    StreetScenes(1, size=(20, 64)).write(tmp_path / "small", layout="gta5")
    for kind in ("images", "labels"):
        shutil.copy(tmp_path / "small" / kind / "00001.png", tmp_path / "data" / "gta5" / kind / "00004.png")
    with pytest.raises(
        SystemExit, match=r"larger than 1 of 6 source images, such as .*00004\.png: 20x64.*--skip-files 1"
    ):
        trainer.main([*own_data, "--dry-run"])
    for remedy in (["--skip-files", "1"], ["--pad"], ["--source-size", "32x64"]):
        assert trainer.main([*own_data, "--dry-run", *remedy]) == 0
    assert not (tmp_path / "run").exists()


def test_dry_run__lists_every_error(trainer: ModuleType, own_data: list[str], tmp_path: Path) -> None:
    CachedSamples(GTA5(own_data[1], size=(16, 32)), tmp_path / "cache" / "source", progress=False)
    shutil.rmtree(tmp_path / "data" / "cs" / "gtFine" / "train")
    few = "(?s)error: the source has 6 images, fewer than the 7 of a batch.*the target has 5"
    with pytest.raises(SystemExit, match=rf"{few}.*cache.source: is a cache of other samples"):
        trainer.main([*own_data, "--batch", "7", "--cache", str(tmp_path / "cache"), "--dry-run"])
    with pytest.raises(SystemExit, match=f"{few}.*'train' has no label maps"):
        trainer.main([*own_data, "--batch", "7", "--method", "alignment", "--dry-run"])


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_too_small__as_the_reader_shows_images(tmp_path: Path, monkeypatch: Patch, kind: str) -> None:
    turned, wrong = Image.Exif(), Image.Exif()
    turned[0x0112], wrong[0x0112] = 6, 9  # 9 is none, and turns nothing
    for name, (height, width), given in (
        ("fits", (40, 48), {}),
        ("large", (44, 44), {}),
        ("small", (40, 24), {}),
        ("fits turned", (48, 40), {"exif": turned}),
        ("small turned", (24, 40), {"exif": turned}),
        ("fits unturned", (40, 48), {"exif": wrong}),
    ):
        Image.new("RGB", (width, height)).save(tmp_path / f"{name}.{kind}", **given)
    (tmp_path / f"broken.{kind}").write_bytes((tmp_path / f"fits.{kind}").read_bytes()[:20])  # reading it says so
    monkeypatch.setitem(sys.modules, "PIL", None)  # Pillow may be missing
    small = [f"{tmp_path / 'small'}.{kind}: 40x24", f"{tmp_path / 'small turned'}.{kind}: 40x24"]
    asked, size = set(), domains.image_size
    monkeypatch.setattr(domains, "image_size", lambda path: asked.add(path.stem) or size(path))
    assert sorted(domains.too_small(SegmentationFolder(tmp_path), (40, 44))) == sorted(small)
    assert ("large" in asked) == (kind == "jpg")  # a PNG that fits either way up is not read to its end


def test_dry_run__finds_a_place_that_has_no_room_or_is_read_only(
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: Patch
) -> None:
    flags = [*folders, "--out", str(tmp_path / "new" / "run")]
    assert trainer.main([*flags, "--dry-run"]) == 0
    usage = shutil.disk_usage(tmp_path)
    each = 3 * sum(tensor.nbytes for tensor in deeplab_v2_tiny(19, aspp_branches=2).state_dict().values())
    for free, runs, found in ((6 * each, "1", False), (6 * each - 1, "1", True), (6 * each, "2", True), (0, "1", True)):
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
    trainer: ModuleType, folders: list[str], tmp_path: Path, monkeypatch: Patch, flags: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it cannot be imported
    with pytest.raises(SystemExit, match=r"error: --tensorboard needs the package tensorboard.*pip install"):
        trainer.main([*folders, "--tensorboard", "--out", str(tmp_path / "run"), *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard__events_are_live_and_a_resumed_run_doubles_none(
    trainer: ModuleType, run: Run, died: Run, tmp_path: Path,
    monkeypatch: Patch,
) -> None:  # fmt: skip
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def steps(out: Path) -> list[int]:
        found = []
        for file in (out / "report").glob("events.out.tfevents.*"):  # each by itself: nothing is purged
            events = accumulator.EventAccumulator(str(file)).Reload()
            found += [event.step for event in events.Scalars("loss")]
        return found

    poison(trainer, monkeypatch, {3})
    with pytest.raises(SystemExit, match="step 3: the loss or a gradient is not finite"):
        run("--tensorboard")
    assert steps(tmp_path / "run") == [1, 2, 3]  # without a run that has ended
    monkeypatch.undo()
    out = run("--tensorboard", "--resume")
    assert steps(out) == [1, 2, 3, 4]
    died(out="late")
    assert steps(run("--resume", "--tensorboard", out="late")) == [1, 2, 3, 4]
