"""The trainer's options: meaning, unit, default and permitted values.

An option takes its value from the command line, else from the file given by `--config`, else from the recipe, else from
the default below. Wherever a value comes from, `checked` validates it before anything is read or trained.
"""

# ruff: noqa: FBT003, RUF009 - the defaults are calls that make fields

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from crossmix import recipes
from networks import EXPECTED, PRECISIONS, is_name, is_ours

__all__ = [
    "FREE", "MIXING", "Config", "Kind", "Request", "argument", "config_files", "label_sizes", "read_options", "size",
    "size_name", "unusable",
]  # fmt: skip

LARGEST_COUNT = 10**9
SIZE = re.compile(r"({0})(x({0}))?".format(r"(?!0+(?:x|$))[0-9]{1,6}"))
SMALLEST_CROP = 8  # pixels per side


class Kind(NamedTuple):
    """The permitted values of an option."""

    type: type
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    unit: str = ""
    native: bool | None = None  # of a size: whether "native", the images' own, is permitted; else None
    network: bool = False  # names a network
    several: bool = False  # any number of the choices, separated by commas
    optional: bool = False  # None is permitted: `none` on the command line, null in a file

    def expected(self, got: object) -> str:
        """Describe the permitted values for an error message about another one."""
        number = "a finite number" if self.high is None else "a number"
        text = {bool: "true or false", str: "text", int: "a whole number", float: number}[self.type]
        above = self.high is not None and isinstance(got, int | float) and got > self.high
        if self.network:
            text = EXPECTED
        elif self.choices:
            text = f"{'any' if self.several else 'one'} of {', '.join(map(str, self.choices))}"
        elif self.native is not None:
            text = "a size such as 512x1024 or 512, in pixels" + (", or native" if self.native else "")
        elif self.high is not None and (above or self.high < LARGEST_COUNT):  # a huge one only if exceeded
            text += f" from {self.low} to {self.high}"
        elif self.low is not None:
            text += f" of at least {self.low:g}"
        return text + (", or none" if self.optional else "")

    def allows(self, value: object) -> bool:
        """Whether the value is permitted."""
        if value is None:
            return self.optional
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if self.type is str:
            return isinstance(value, str) and self._allows_text(value)
        if self.choices:
            return type(value) is self.type and value in self.choices
        if not isinstance(value, int if self.type is int else int | float) or not abs(value) <= sys.float_info.max:
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def _allows_text(self, text: str) -> bool:
        if self.several:
            return not text or set(text.split(",")) <= set(self.choices)
        if self.choices:
            return text in self.choices
        if self.network:
            return is_name(text)
        if self.native is not None:
            return bool(SIZE.fullmatch(text) or (self.native and text == "native"))
        return "\0" not in text


def option(default: Any, text: str, *, type: type | None = None, **kind: Any) -> Any:  # noqa: A002, ANN401
    """Make a field of `Config`; the other keywords are fields of `Kind`."""
    return field(default=default, metadata={"kind": Kind(type or default.__class__, **kind), "text": text})


def count(default: int, text: str, unit: str, *, low: int = 1, high: int = LARGEST_COUNT) -> Any:  # noqa: ANN401
    """Make a field that holds a whole number."""
    return option(default, text, unit=unit, low=low, high=high)


def part(name: str, text: str, **kind: Any) -> Any:  # noqa: ANN401
    """Make the field for an option of `recipes.Recipe`."""
    hint = get_type_hints(recipes.Recipe)[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    return option(getattr(recipes.RELEASED, name), text, choices=choices, **kind)


MIXING = ("classmix", "alignment", "dacs")
"""The methods that paste classes."""

GROUPS = {  # titles in --help, by the first option of each group
    "method": "what to train",
    "gta5": "data",
    "steps": "optimisation",
    "weigh": "algorithm, set by the recipe",
    "device": "hardware: results change only by rounding",
    "skip_files": "faults, evaluation, checkpoints and logging",
}


@dataclass(frozen=True)
class Config:
    """Every option of a run, resolved."""

    method: recipes.Method = option("dacs", "a row of the paper's Table 3", choices=recipes.METHODS)
    recipe: str = option("released", "the authors' code, the paper's text, or DAFormer with masked image consistency",
                         choices=("released", "paper", "mic"))  # fmt: skip
    network: str = option("resnet101", "DeepLab-v2 on resnet101 or tiny, or MODULE:FUNCTION, which gets the number of "
                          "classes", network=True)  # fmt: skip
    aspp_branches: int = option(2, "dilated branches in the head of DeepLab-v2", unit="branches", choices=(2, 4))
    head: str = option("", "comma-separated submodules of MODULE:FUNCTION that train at --head-factor", unit="names")
    weights: str = option("", "initial weights, a file or URL; the head need not match", unit="path")
    random_init: bool = option(False, "start from random weights instead of --weights")
    prior: str = option(
        "oracle", "class prior for --method alignment: the target's own, or the source's", choices=("oracle", "source")
    )
    seed: int = option(0, "random seed", unit="number", low=0, high=2**63 - 1)

    gta5: str = option("", "folder with images/ and labels/", unit="path")
    synthia: str = option("", "folder with RGB/ and GT/LABELS/, instead of GTA5", unit="path")
    cityscapes: str = option("", "folder with leftImg8bit/ and gtFine/", unit="path")
    source: str = option("", "folder with your own images/ and labels/, instead of the three above", unit="path")
    target: str = option("", "folder with your own images/, labelled or not; goes with --source", unit="path")
    classes: str = option("", "JSON file that defines the classes of --source and --target", unit="path")
    source_size: str = option("720x1280", "size to which source images are resized; SYNTHIA's is 760x1280",
                              unit="HxW in pixels", native=True)  # fmt: skip
    target_size: str = option("512x1024", "size to which target images are resized", unit="HxW in pixels", native=True)
    crop: str = option("512x512", "size of the random crops", unit="HxW in pixels", native=False)
    pad: bool = option(False, "pad images smaller than the crop with ignored pixels")
    batch: int = count(2, "source images per process and batch, and as many target images", "images", high=10_000)
    accumulate: int = count(1, "batches over which gradients are averaged before a step", "batches", high=10_000)
    rare_classes: bool = option(False, "sample source images with rare classes more often")
    rare_temperature: float = option(0.01, "temperature of --rare-classes; low favours them", unit="number", low=1e-6)
    rare_pixels: int = count(
        3000, "pixels of a class that make an image eligible; fewer for crops below 512x512", "pixels"
    )

    steps: int = count(250_000, "length of the training", "optimizer steps")
    optimizer: str = option("sgd", "optimizer", choices=("sgd", "adamw"))
    lr: float = option(2.5e-4, "initial learning rate of the backbone", unit="per step", low=0)
    head_factor: float = option(10.0, "learning rate of the head relative to the backbone's", unit="factor", low=0)
    warmup: int = count(0, "linear warm-up; that of a recipe is at most a tenth of --steps", "optimizer steps", low=0)
    power: float = option(0.9, "exponent of the polynomial decay of the learning rate", unit="exponent", low=0)
    weight_decay: float = option(5e-4, "weight decay: L2 for sgd, decoupled for adamw", unit="per step", low=0)
    no_decay: str = option("", "comma-separated kinds of parameters without weight decay", unit="names",
                           choices=("norm", "bias", "position"), several=True)  # fmt: skip
    momentum: float = option(0.9, "momentum of sgd", unit="share", low=0, high=1)
    nesterov: bool = option(False, "Nesterov momentum for sgd")
    repeated: bool = option(True, "update backbone parameters as often per step as the released code lists them (sgd)")

    weigh: str = part("weigh", "pixels that lambda weights: target pixels, or the whole mixed image")
    scope: str = part("scope", "pixels over which lambda, the share of confident pixels, is computed")
    source_normalizer: str = part("source_normalizer", "what the source loss is divided by")
    include_ignored: bool = part("include_ignored", "treat ignored source pixels as a class that can be pasted")
    rounding: str = option("ceil", "how half of an odd number of classes is pasted; the code of ClassMix rounds down",
                           choices=("ceil", "floor"))  # fmt: skip
    threshold: float = part("threshold", "confidence at which a pixel counts toward lambda", unit="probability", low=0,
                            high=1)  # fmt: skip
    decay: float = part("decay", "share of the teacher kept at each update", unit="share", low=0, high=1)
    mode: str = part("mode", "teacher's BatchNorm statistics: the batch's (train) or the running ones (eval)")
    flavor: str = part("flavor", "colour jitter: as in old kornia (additive), or as in torchvision")
    same_on_batch: bool = part("same_on_batch", "decide once per batch, not per image, whether to jitter and to blur")
    ignore_top: int = part("ignore_top", "rows at the top whose pseudo-labels get weight 0, at a height of 512",
                           unit="rows", low=0, high=511)  # fmt: skip
    ignore_bottom: int = part("ignore_bottom", "rows at the bottom, likewise", unit="rows", low=0, high=511)
    consistency: bool = option(False, "add a loss on partly hidden target images (masked image consistency)")
    consistency_block: int | None = part("consistency_block", "side of hidden blocks; none: 64, or 32 up to --crop 512",
                                         type=int, unit="pixels", low=1, high=LARGEST_COUNT, optional=True)  # fmt: skip
    consistency_ratio: float = part("consistency_ratio", "share of blocks that is hidden", unit="share", low=0, high=1)
    consistency_weight: float = part("consistency_weight", "weight of the consistency loss", unit="factor", low=0)
    consistency_running_stats: bool = part("consistency_running_stats", "let BatchNorm's running statistics follow the "
                                           "partly hidden images too, as the authors' code does")  # fmt: skip

    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "device to train on", unit="torch device")
    precision: str = option("fp32", "precision of the networks", choices=PRECISIONS)
    compile: bool = option(False, "compile student and teacher with torch.compile")
    channels_last: bool = option(False, "use the channels-last memory layout, faster on GPUs")
    deterministic: bool = option(False, "give the same bits in every run on a GPU too, at lower speed")
    workers: int = count(min(4, os.cpu_count() or 1), "data-loading processes per domain", "processes", low=0,
                         high=1024)  # fmt: skip
    cache: str = option("", "folder for decoded and resized images, filled on first use", unit="path")
    resident: bool = option(False, "keep both domains in the device's memory")

    skip_files: int = count(0, "images to leave out before it is an error: too small or, without --cache, unreadable",
                            "files", low=0)  # fmt: skip
    skip_steps: int = count(0, "steps with a non-finite loss or gradient to undo before it is an error", "steps", low=0)
    eval_split: str = option("val", "split of the target to evaluate on", unit="name")
    evaluation: str = option("512x1024", "label size that decides the best step", unit="HxW in pixels", native=True)
    eval_every: int = count(5000, "interval between evaluations", "steps")
    save_every: int = count(5000, "interval between checkpoints", "steps")
    log_every: int = count(100, "interval between log lines", "steps")
    tensorboard: bool = option(False, "also write TensorBoard event files to OUT/report")


OPTIONS: dict[str, Field[Any]] = {one.name: one for one in fields(Config)}

FREE = {
    "gta5", "synthia", "cityscapes", "source", "target", "classes", "weights", "random_init", "cache", "resident",
    "device", "workers", "compile", "channels_last", "deterministic", "skip_files", "skip_steps", "eval_every",
    "save_every", "log_every", "tensorboard", "batch",
}  # fmt: skip
"""Options that may change on resume, since they choose neither data nor arithmetic. The contents of the data and the
total batch over all processes are compared separately."""

PAPER_DATA, OWN_DATA = ("gta5", "synthia", "cityscapes"), ("source", "target", "classes")

ALTERNATIVES = {
    "gta5": ("synthia", *OWN_DATA),
    "synthia": ("gta5", *OWN_DATA),
    "source": PAPER_DATA,
    "weights": ("random_init",),
    "random_init": ("weights",),
}
"""Options from a file that a flag replaces."""

SIZES = {"source_size", "target_size", "evaluation"}
"""Options from a file that belong to its data: sizes of images, and of the labels scored."""


def _recipe(recipe: recipes.Recipe, **others: Any) -> dict[str, Any]:  # noqa: ANN401
    """Collect the options that a recipe sets, here and in the library."""
    named = {one.name: getattr(recipe, one.name) for one in fields(recipe) if one.name in OPTIONS}
    return {**named, "consistency": bool(recipe.consistency), **others}


ADAMW: dict[str, Any] = {"lr": 6e-5, "warmup": 1500, "power": 1.0, "weight_decay": 0.01, "no_decay": "norm"}
"""What goes with AdamW, in place of what goes with SGD; DAFormer's."""

RECIPES: dict[str, dict[str, Any]] = {
    "released": {},  # the defaults
    "paper": _recipe(
        recipes.PAPER, aspp_branches=4, source_size="760x1280", nesterov=True, repeated=False, evaluation="1024x2048"
    ),
    "mic": _recipe(
        recipes.MIC,
        aspp_branches=4,
        rare_classes=True,
        steps=40_000,
        optimizer="adamw",
        **ADAMW,
        repeated=False,
        evaluation="1024x2048",
    ),
}

# The demo scales the paper's setting down to a laptop. Sizes are those of the rendered images. Starting from random
# weights, a small network needs a higher learning rate and stays less confident (hardly a pixel would reach 0.968),
# and in so short a run a teacher that averages over a hundred steps would lag behind.
DEMO_OPTIONS = {
    "network": "tiny",
    "random_init": True,
    "crop": "64x128",
    "source_size": "native",
    "target_size": "native",
    "evaluation": "native",
    "batch": 4,
    "rare_pixels": 12,  # 3000, scaled from the area of GTA5's label maps to that of the rendered ones
    "steps": 1700,
    "threshold": 0.5,
    "repeated": False,
    "decay": 0.9,
    "workers": 0,
    "channels_last": True,  # a sixth faster on a CPU
    "eval_every": 850,
    "save_every": 850,
    "log_every": 50,
}
DEMO_LR = {"sgd": 0.002, "adamw": 0.0005}


class Request(NamedTuple):
    """What a command line asks for."""

    config: Config
    methods: tuple[recipes.Method, ...]
    runs: int
    demo: bool
    out: Path | None
    resume: bool
    dry_run: bool


def read_options(argv: Sequence[str] | None, description: str) -> Request:
    """Parse a command line; exit if an option is unknown, not permitted, or contradicts another one."""
    args = _parser(description).parse_args(argv)
    for name, value in vars(args).items():
        if value == [] or (isinstance(value, str) and "\0" in value):  # argparse makes a list of "--name=--"
            raise SystemExit(f"error: --{name.replace('_', '-')} must be text, got {value or '--'!r}.")
    given = {
        name: checked(name, _from_text(OPTIONS[name].metadata["kind"], value), "--" + name.replace("_", "-"))
        for name, value in vars(args).items()
        if name in OPTIONS
    }
    runs = _from_text(Kind(int), args.runs)
    if not Kind(int, low=1, high=10_000).allows(runs):
        raise SystemExit(f"error: --runs must be a whole number from 1 to 10000, got {runs!r}.")
    if args.resume and args.out is None:
        raise SystemExit("error: --resume needs --out DIR, the folder of the run to resume.")
    if args.out == "":
        raise SystemExit("error: --out must name a folder, got ''.")
    chosen = {} if args.config is None else _without_replaced(_from_file(Path(args.config)), given)
    _refuse_another_recipe(f"--config {args.config}", chosen, given, demo=args.demo)
    chosen |= given
    if args.resume and not chosen.keys() & {"weights", "random_init"}:  # then the run's own
        for path in config_files(Path(args.out))[:1]:
            before = _from_file(path)
            chosen |= {name: before[name] for name in ("weights", "random_init") if name in before}
    config = _resolved(chosen, demo=args.demo)
    _refuse_contradictions(config, given, demo=args.demo)
    both: tuple[recipes.Method, ...] = ("source", "dacs")
    methods = both if args.demo and "method" not in chosen else (config.method,)
    out = None if args.out is None else Path(args.out)
    return Request(config, methods, runs, args.demo, out, args.resume, args.dry_run)


def checked(name: str, value: object, where: str) -> Any:  # noqa: ANN401 - an option's value
    """Return a value in its normal form, or refuse it; `where` is what messages call it."""
    kind: Kind = OPTIONS[name].metadata["kind"]
    if not kind.allows(value):
        raise SystemExit(f"error: {where} must be {kind.expected(value)}, got {value!r}{_meant(value, kind.choices)}")
    if kind.native is not None:
        return size_name(size(str(value)))
    return None if value is None else kind.type(value)


def config_files(out: Path) -> list[Path]:
    """List the config.json of a run, or those of the seeds and methods below its folder."""
    patterns = ("config.json", "*/config.json", "*/*/config.json")
    return next((paths for pattern in patterns if (paths := sorted(out.glob(pattern)))), [])


def size(text: str) -> tuple[int, int] | None:
    """Parse '512x1024' as (512, 1024), '512' as a square, 'native' as None."""
    if text == "native":
        return None
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def size_name(value: tuple[int, int] | None) -> str:
    """Undo `size`; metrics.json uses these names."""
    return "native" if value is None else f"{value[0]}x{value[1]}"


def label_sizes(config: Config) -> list[tuple[int, int] | None]:
    """List the label sizes to score at: the images' size and twice that, or the labels' own."""
    image_size = size(config.target_size)
    return [None] if image_size is None else [image_size, (2 * image_size[0], 2 * image_size[1])]


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options]",
    )  # fmt: skip
    parser.add_argument("--demo", action="store_true",
                        help="render two small domains and train on them (default: off)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="output folder (default: runs/<time>-<method>)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --out (default: off)")
    parser.add_argument("--runs", default="1", metavar="N",
                        help="number of seeds, counted from --seed [seeds] (default: 1)")  # fmt: skip
    parser.add_argument("--config", metavar="FILE",
                        help="JSON file with options, such as a run's config.json (default: none)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="print options, plan and anything that would stop the run (default: off)")  # fmt: skip
    group: Any = parser
    for name, one in OPTIONS.items():
        group = parser.add_argument_group(GROUPS[name]) if name in GROUPS else group
        kind: Kind = one.metadata["kind"]
        flag = "--" + name.replace("_", "-")
        if kind.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=_help(one))
        else:
            metavar = "{" + ",".join(map(str, kind.choices)) + "}" if kind.choices else name.rpartition("_")[2].upper()
            group.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=_help(one))
    return parser


def _help(one: Field[Any]) -> str:
    """Compose an option's help from its text, its unit, its default and what the recipes set."""

    def shown(value: object) -> str:
        return ("on" if value else "off") if isinstance(value, bool) else "none" if value in {"", None} else f"{value}"

    unit = f" [{one.metadata['kind'].unit}]" if one.metadata["kind"].unit else ""
    others: dict[str, list[str]] = {}
    for recipe, values in RECIPES.items():
        if (value := values.get(one.name, one.default)) != one.default:
            others.setdefault(shown(value), []).append(recipe)
    default = shown(one.default) + "".join(
        f"; {value} by --recipe {' or '.join(names)}" for value, names in others.items()
    )
    return f"{one.metadata['text']}{unit} (default: {default})".replace("%", "%%")


def argument(convert: Callable[[str], Any] = str, words: str = "", **kind: Any) -> Callable[[str], Any]:  # noqa: ANN401
    """Make an argument's type for argparse; the keywords are fields of `Kind`, `words` what messages call it."""
    expected = Kind(**{"type": str} | kind)

    def parse(text: str) -> Any:  # noqa: ANN401
        value = _from_text(expected, text)
        if not expected.allows(value):
            raise argparse.ArgumentTypeError(f"expected {words or expected.expected(value)}, got {text!r}")
        return convert(text)

    return parse


def _from_text(kind: Kind, value: Any) -> Any:  # noqa: ANN401 - a flag's value
    """Convert a flag's text to a number or None where it is one."""
    if kind.optional and value == "none":
        return None
    try:
        return kind.type(value) if kind.type in {int, float} else value
    except ValueError:
        return value


def _from_file(path: Path) -> dict[str, Any]:
    """Read the options in a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"error: {path}: is not a JSON object of options ({error}).") from error
    if not isinstance(found, dict):
        raise SystemExit(f"error: {path}: is not a JSON object of options, but holds a {type(found).__name__}.")
    found.pop("versions", None)
    for name in found.keys() - OPTIONS.keys():
        raise SystemExit(f"error: {path}: unknown option {name!r}{_meant(name, tuple(OPTIONS))}")
    return {name: checked(name, value, f"{path}: {name!r}") for name, value in found.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of an option that is there twice, Python would silently keep the last value."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def _without_replaced(chosen: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Leave out the options from a file that flags replace, and those that follow from them."""
    gone: set[str] = set()
    for name, others in ALTERNATIVES.items():
        if given.get(name):
            gone |= set(others)
            replaced = {other for other in others if chosen.get(other)}
            if replaced & {"gta5", "synthia", "source"}:  # whose sizes would not fit
                gone |= {"source_size"} if {name, *replaced}.isdisjoint({"source"}) else SIZES
    if "optimizer" in chosen and given.get("optimizer", chosen["optimizer"]) != chosen["optimizer"]:
        gone |= {*ADAMW, "momentum", "nesterov", "repeated"}
    if "network" in given and is_ours(given["network"]) != is_ours(chosen.get("network", OPTIONS["network"].default)):
        gone |= {"aspp_branches", "head", "repeated"}
    return {name: value for name, value in chosen.items() if name not in gone}


def _refuse_another_recipe(file: str, chosen: dict[str, Any], given: dict[str, Any], *, demo: bool) -> None:
    """Exit if a file made with one recipe has options that differ from those of another one, given as a flag."""
    if "recipe" not in given or chosen.get("recipe", given["recipe"]) == given["recipe"]:
        return
    kept = {name for options in RECIPES.values() for name in options} & chosen.keys() - given.keys()
    want = _resolved({name: value for name, value in (chosen | given).items() if name not in kept}, demo=demo)
    differ = [
        f"{name} {chosen[name]!r} instead of {getattr(want, name)!r}"
        for name in sorted(kept)
        if chosen[name] != getattr(want, name)
    ]
    if differ:
        raise SystemExit(
            f"error: --recipe {given['recipe']} does not go with {file}, which is of --recipe {chosen['recipe']} and "
            f"has {', '.join(differ)}; leave out one of them, --recipe or --config."
        )


def _meant(value: object, names: Sequence[Any]) -> str:
    """End an error message, with a suggestion if a name is close."""
    near = difflib.get_close_matches(str(value), [str(name) for name in names], 1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _resolved(chosen: dict[str, Any], *, demo: bool) -> Config:
    """Apply what was chosen over the recipe over the defaults."""
    options = dict(RECIPES[chosen.get("recipe", "released")])
    optimizer = chosen.get("optimizer", options.get("optimizer", "sgd"))
    if chosen.get("synthia"):
        options |= {"source_size": "760x1280"}  # SYNTHIA's own size
    if chosen.get("source"):
        options |= {"source_size": "native", "target_size": "native"}
    if optimizer == "adamw":
        options |= {**ADAMW, "repeated": False, "nesterov": False}
    elif options.get("optimizer") == "adamw":
        options = {name: value for name, value in options.items() if name not in ADAMW}
    if not is_ours(chosen.get("network", "resnet101")):
        options |= {"repeated": False}
    if demo:
        options |= {**DEMO_OPTIONS, "lr": DEMO_LR[optimizer]}
        if chosen.get("weights"):
            options["random_init"] = False
    config = Config(**{**options, **chosen})
    return _fitted(config, chosen.keys() | (DEMO_OPTIONS.keys() if demo else set()))


def _fitted(config: Config, fixed: Collection[str]) -> Config:
    """Fit defaults to the length of the run and to the sizes of crops and images, except those of `fixed` options."""
    area = prod(size(config.crop) or ()) / 512**2
    sizes = label_sizes(config)
    fitted: dict[str, Any] = {
        "warmup": min(config.warmup, config.steps // 10),
        "rare_pixels": max(1, round(3000 * min(1, area))) if config.rare_classes else config.rare_pixels,
        "evaluation": size_name(sizes[0 if config.recipe == "released" else -1]),
    }
    return replace(config, **{name: value for name, value in fitted.items() if name not in fixed})


def _refuse_contradictions(config: Config, given: dict[str, Any], *, demo: bool) -> None:
    """Exit if options contradict each other, or one is missing."""
    problem = _data_problem(config, given, demo=demo)
    for found in () if problem else (_of_network(config), _of_training(config), _without_effect(config, given)):
        problem = problem or next((text for wrong, text in found if wrong), "")
    if problem := problem or unusable(config.device):
        raise SystemExit(f"error: {problem}.")


def _data_problem(config: Config, given: dict[str, Any], *, demo: bool) -> str:
    """Say what is contradictory or missing in the choice of data."""
    papers, own = ([name for name in names if getattr(config, name)] for names in (PAPER_DATA, OWN_DATA))
    if demo:
        named = [name for name in PAPER_DATA if given.get(name)] + own + (["synthia"] if config.synthia else [])
        return f"--demo renders its own data; leave out --{named[0]}" if named else ""
    if own and papers:
        return f"--{own[0]} takes the place of --{papers[0]}; give one of them"
    if own:
        missing = [f"--{name}" for name in OWN_DATA if name not in own]
        return f"--{own[0]} needs {' and '.join(missing)} too" if missing else ""
    if bool(config.gta5) == bool(config.synthia):
        return "give --gta5 DIR or --synthia DIR, or --source, --target and --classes, or --demo"
    return "" if config.cityscapes else "--cityscapes DIR is needed, or --demo"


Checks = Iterator[tuple[bool, str]]  # whether something is wrong, and what


def _of_network(config: Config) -> Checks:
    ours, initialised = is_ours(config.network), bool(config.weights or config.random_init)
    needed = (
        "give --weights FILE: the paper starts from weights trained on COCO, and ResNet-101 from random weights comes "
        "nowhere near its numbers; or --random-init to train from scratch"
    )
    yield bool(config.weights and config.random_init), "give --weights FILE or --random-init, not both"
    yield ours and not initialised, needed
    yield ours and bool(config.head), "--head is for --network MODULE:FUNCTION; the head of DeepLab-v2 is known"


def _of_training(config: Config) -> Checks:
    crop, scored = size(config.crop) or (0, 0), [size_name(one) for one in label_sizes(config)]
    sides = f"{SMALLEST_CROP}x{SMALLEST_CROP} at least, the stride of the network"
    yield min(crop) < SMALLEST_CROP, f"--crop must be {sides}, got {config.crop}"
    sizes = f"one of the scored sizes, {' or '.join(scored)}"
    yield config.evaluation not in scored, f"--evaluation must be {sizes}, got {config.evaluation!r}"
    yield config.nesterov and config.momentum == 0, "--nesterov needs --momentum above 0"
    for name in ("nesterov", "repeated"):
        yield getattr(config, name) and config.optimizer != "sgd", f"--{name} needs --optimizer sgd"
    alone = config.method in {"classmix", "alignment"} and config.batch == 1
    pasted = f"--method {config.method} pastes each image onto the next one of its process's batch, so a single one"
    remedy = "give --batch 2, on half as many processes or with half the --accumulate for the same total"
    yield alone, f"{pasted} onto itself; --batch must be at least 2, got 1: {remedy}"
    warmup, steps = config.warmup, config.steps
    yield warmup >= steps, f"--warmup must be less than --steps, got {warmup} of {steps}"
    top, bottom = config.ignore_top, config.ignore_bottom
    yield top + bottom >= 512, f"--ignore-top {top} and --ignore-bottom {bottom} must leave some of 512 rows"
    block, large = config.consistency_block, config.consistency and (config.consistency_block or 0) > min(crop)
    yield large, f"--consistency-block must fit into --crop {config.crop}, got {block}; give a smaller one, or none"


def _without_effect(config: Config, given: dict[str, Any]) -> Checks:
    """Find flags that would do nothing. In a file they are accepted: a run's own config.json has every option."""
    rare, consistency = (config.rare_classes, "--rare-classes"), (config.consistency, "--consistency")
    needed: dict[str, tuple[object, str]] = {
        "prior": (config.method == "alignment", "--method alignment"),
        "aspp_branches": (is_ours(config.network), "--network resnet101 or tiny"),
        "head_factor": (is_ours(config.network) or config.head, "--head"),
        "momentum": (config.optimizer == "sgd", "--optimizer sgd"),
        "rounding": (config.method in MIXING, f"--method {' or '.join(MIXING)}"),
        "no_decay": (config.weight_decay, "--weight-decay above 0"),
        **dict.fromkeys(("rare_temperature", "rare_pixels"), rare),
        **dict.fromkeys(
            ("consistency_block", "consistency_ratio", "consistency_weight", "consistency_running_stats"), consistency
        ),
    }
    for name, (used, other) in needed.items():
        flag = "--" + name.replace("_", "-")
        yield given.get(name) not in {None, ""} and not used, f"{flag} has no effect without {other}"


def unusable(device: str) -> str:
    """Say why a device cannot be trained on, if it cannot."""
    try:
        kind = torch.device(device)
        if kind.type == "cuda" and (kind.index or 0) < torch.cuda.device_count():
            return ""  # a closer look would take GPU memory in every process
        if kind.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, ImportError) as error:  # the last two where torch lacks what it needs
        first = re.split(r"\.\s|\n", str(error))[0].rstrip(".")  # of pages of advice, on other devices among them
        return f"--device {device} cannot be used: {first}; try --device cpu"
    return ""
