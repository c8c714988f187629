"""The trainer's options: what each is, its unit, its default, and what it may be.

A value is what a flag says, or else a file (`--config`), or else the recipe, or else the default here. Wherever it
comes from, `checked` looks at it, before anything is read or trained.
"""

# ruff: noqa: RUF009 - the defaults are calls that make fields

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import torch

from crossmix import recipes
from networks import EXPECTED, is_name, is_ours

__all__ = ["FREE", "Config", "Request", "config_files", "label_sizes", "read_options", "size", "size_name"]

MOST = 10**9  # of any count
SMALLEST = 8  # side of a crop, in pixels


class Kind(NamedTuple):
    """What a value may be."""

    type: type
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    unit: str = ""
    native: bool | None = None  # of sizes: whether the images' own will do; None where the value is no size
    network: bool = False  # whether it names a network

    def expected(self) -> str:
        """The words for it."""
        if self.type is bool:
            return "true or false"
        if self.network or self.choices:
            return EXPECTED if self.network else "one of " + ", ".join(map(str, self.choices))
        if self.native is not None:
            return "a size such as 512x1024 or 512, in pixels" + (", or native" if self.native else "")
        if self.type is str:
            return "a text"
        words = "a whole number" if self.type is int else "a number"
        if self.high is not None and self.high < MOST:
            return f"{words} from {self.low:g} to {self.high:g}"
        return words if self.low is None else f"{words} of at least {self.low:g}"

    def allows(self, value: object) -> bool:
        """Whether a value is one."""
        if self.type is bool or isinstance(value, bool):
            return self.type is bool and isinstance(value, bool)
        if self.choices:
            return type(value) is self.type and value in self.choices
        if self.network:
            return isinstance(value, str) and is_name(value)
        if self.type is str:
            return isinstance(value, str) and "\0" not in value and (self.native is None or self._is_size(value))
        if not isinstance(value, int if self.type is int else int | float) or not abs(value) <= sys.float_info.max:
            return False
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def _is_size(self, text: str) -> bool:
        sides = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
        return bool(self.native and text == "native") or (
            sides is not None and all(int(side) > 0 for side in sides.groups() if side is not None)
        )


def option(default: Any, text: str, **kind: Any) -> Any:  # noqa: ANN401 - the type of the field
    """A field of `Config`; `kind` are fields of `Kind`."""
    return field(default=default, metadata={"kind": Kind(type(default), **kind), "text": text})


def count(default: int, text: str, unit: str, *, low: int = 1, high: int = MOST) -> Any:  # noqa: ANN401
    """A field that holds a whole number."""
    return option(default, text, unit=unit, low=low, high=high)


def part(name: str, text: str, **kind: Any) -> Any:  # noqa: ANN401
    """A field that is one of the recipe's."""
    choices = get_args(get_type_hints(recipes.Recipe)[name])
    return option(getattr(recipes.RELEASED, name), text, choices=choices, **kind)


GROUPS = {  # by the first option of each
    "method": "what is trained",
    "gta5": "data",
    "steps": "optimization",
    "weigh": "what the recipe sets",
    "device": "machine: changes no result but by rounding",
    "skip_files": "what may go wrong, saving and reporting",
}


@dataclass(frozen=True)
class Config:
    """Every option of a run, resolved."""

    method: recipes.Method = option("dacs", "a row of the paper's Table 3", choices=recipes.METHODS)
    recipe: str = option("released", "what the authors' code does, or the paper's text", choices=("released", "paper"))
    network: str = option(
        "resnet101",
        "DeepLab-v2 on resnet101 or tiny, or MODULE:FUNCTION: whatever that returns for the number of classes",
        network=True,
    )
    head: str = option("", "modules of MODULE:FUNCTION, by commas, that learn ten times as fast", unit="names")
    weights: str = option("", "initial weights, a file or URL; the head may be another one", unit="path")
    random_init: bool = option(False, "start from random weights, without --weights")  # noqa: FBT003
    prior: str = option(
        "oracle", "class prior of method alignment: the target's own, or the source's", choices=("oracle", "source")
    )
    seed: int = option(0, "of all randomness", unit="number", low=0, high=2**63 - 1)

    gta5: str = option("", "folder with images/ and labels/", unit="path")
    synthia: str = option("", "folder with RGB/ and GT/LABELS/, in place of GTA5", unit="path")
    cityscapes: str = option("", "folder with leftImg8bit/ and gtFine/", unit="path")
    source: str = option("", "folder with your own images/ and labels/, in place of all three", unit="path")
    target: str = option("", "folder with your own images/, unlabelled or not, for --source", unit="path")
    classes: str = option("", "JSON file with the classes of --source and --target", unit="path")
    eval_split: str = option("val", "folder of the target that is evaluated on", unit="name")
    crop: str = option("512x512", "what is cut from each image", unit="HxW in pixels", native=False)
    pad: bool = option(False, "pad images smaller than the crop with ignored pixels")  # noqa: FBT003
    target_size: str = option(
        "512x1024", "target images are resized to this, to train and to evaluate", unit="HxW in pixels", native=True
    )
    batch: int = count(2, "source images, and as many target images, of each process", "images", high=10_000)
    accumulate: int = count(1, "batches whose gradients are averaged for a step", "batches", high=10_000)

    steps: int = count(250_000, "length of the training", "optimizer steps")
    lr: float = option(2.5e-4, "learning rate of the backbone; the head's is ten times it", unit="per step", low=0)
    weight_decay: float = option(5e-4, "of SGD", unit="per step", low=0)
    momentum: float = option(0.9, "of SGD", unit="share", low=0, high=1)
    power: float = option(0.9, "exponent of the polynomial decay of the learning rate", unit="exponent", low=0)

    weigh: str = part("weigh", "pixels that lambda weighs: the target's, or the whole mixed image's")
    scope: str = part("scope", "what lambda, the share of confident pixels, is taken over")
    source_normalizer: str = part("source_normalizer", "what the source loss is divided by")
    include_ignored: bool = part("include_ignored", "whether ignored source pixels can be drawn as a class")
    threshold: float = part(
        "threshold", "confidence from which a pixel counts for lambda", unit="probability", low=0, high=1
    )
    decay: float = part("decay", "share of the teacher that a step keeps", unit="share", low=0, high=1)
    mode: str = part("mode", "statistics of the teacher's BatchNorm: the batch's, or the running ones")
    flavor: str = part("flavor", "colour jitter")
    same_on_batch: bool = part("same_on_batch", "jitter and blur by one decision per batch, not per image")
    aspp_branches: int = option(2, "dilated branches of the head", unit="branches", choices=(2, 4))
    nesterov: bool = option(False, "Nesterov momentum")  # noqa: FBT003
    repeated: bool = option(
        True,  # noqa: FBT003
        "update each backbone parameter as often per step as the released code lists it",
    )
    source_size: str = option("720x1280", "source images are resized to this", unit="HxW in pixels", native=True)
    evaluation: str = option(
        "512x1024", "label size that decides the best step; all are reported", unit="HxW in pixels", native=True
    )

    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "where to train", unit="torch device")
    precision: str = option("fp32", "of the networks", choices=("fp32", "tf32", "bf16", "fp16"))
    compile: bool = option(False, "student and teacher by torch.compile")  # noqa: FBT003
    channels_last: bool = option(False, "memory layout that convolutions on GPUs like")  # noqa: FBT003
    deterministic: bool = option(False, "the same bits in every run, on a GPU too, and slower")  # noqa: FBT003
    workers: int = count(min(4, os.cpu_count() or 1), "readers of each data set", "processes", low=0, high=1024)
    cache: str = option("", "folder for decoded and resized images, made when first used", unit="path")
    resident: bool = option(False, "keep both data sets in the device's memory")  # noqa: FBT003

    skip_files: int = count(0, "broken or too small images that are left out before one is an error", "files", low=0)
    skip_steps: int = count(0, "steps that are undone, for a loss or gradient not finite, before one is an error",
                            "steps", low=0)  # fmt: skip
    eval_every: int = count(5000, "between evaluations", "steps")
    save_every: int = count(5000, "between checkpoints", "steps")
    log_every: int = count(100, "between lines of the log", "steps")
    tensorboard: bool = option(False, "write event files too, into OUT/report")  # noqa: FBT003


OPTIONS: dict[str, Field[Any]] = {one.name: one for one in fields(Config)}

FREE = {
    "gta5", "synthia", "cityscapes", "source", "target", "classes", "weights", "random_init", "cache", "resident",
    "device", "workers", "compile", "channels_last", "deterministic", "skip_files", "skip_steps", "eval_every",
    "save_every", "log_every", "tensorboard", "batch",
}  # fmt: skip
"""Options that a resumed run may change: they choose no data and no arithmetic. (What the data is, and the batch of all
processes together, are compared apart.)"""

PAPER_DATA, OWN_DATA = ("gta5", "synthia", "cityscapes"), ("source", "target", "classes")

ALTERNATIVES = {
    "gta5": ("synthia", *OWN_DATA),
    "synthia": ("gta5", *OWN_DATA),
    "source": PAPER_DATA,
    "weights": ("random_init",),
    "random_init": ("weights",),
}
"""A flag takes the place of others that a file holds."""

PAPER_OPTIONS = {
    **{name: value for name, value in asdict(recipes.PAPER).items() if name in Config.__dataclass_fields__},
    "aspp_branches": 4,
    "nesterov": True,
    "repeated": False,
    "source_size": "760x1280",
    "evaluation": "1024x2048",
}

# The demo: what the paper does, scaled to a laptop. Sizes are those of the rendered images. A small network from random
# weights wants a higher learning rate and is less sure of itself (hardly a pixel would reach 0.968), and a teacher that
# averages over a hundred steps lags behind in a short run.
DEMO_OPTIONS = {
    "network": "tiny",
    "random_init": True,
    "crop": "64x128",
    "source_size": "native",
    "target_size": "native",
    "evaluation": "native",
    "batch": 4,
    "steps": 1700,
    "lr": 0.002,
    "threshold": 0.5,
    "repeated": False,
    "decay": 0.9,
    "workers": 0,
    "channels_last": True,  # a sixth faster on a CPU
    "eval_every": 850,
    "save_every": 850,
    "log_every": 50,
}


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
    """Read a command line.

    Raises:
        SystemExit: If an option is unknown, a value is none that it may have, or two contradict each other.
    """
    args = _parser(description).parse_args(argv)
    for name, value in vars(args).items():
        if value == [] or (isinstance(value, str) and "\0" in value):  # argparse makes a list of "--name=--"
            raise SystemExit(f"error: --{name.replace('_', '-')} must be a text, got {value or '--'!r}.")
    given = {
        name: checked(name, _from_text(OPTIONS[name].metadata["kind"].type, value), "--" + name.replace("_", "-"))
        for name, value in vars(args).items()
        if name in OPTIONS
    }
    runs = _from_text(int, args.runs)
    if not Kind(int, low=1, high=10_000).allows(runs):
        raise SystemExit(f"error: --runs must be a whole number from 1 to 10000, got {runs!r}.")
    if args.resume and args.out is None:
        raise SystemExit("error: --resume needs --out DIR, the folder of the run that goes on.")
    if args.out == "":
        raise SystemExit("error: --out must name a folder, got ''.")
    chosen = {} if args.config is None else _from_file(Path(args.config))
    for name, others in ALTERNATIVES.items():
        for other in others if given.get(name) else ():
            chosen.pop(other, None)
    chosen |= given
    if args.resume and not chosen.keys() & {"weights", "random_init"}:  # then the run's own
        for path in config_files(Path(args.out))[:1]:
            before = _from_file(path)
            chosen |= {name: before[name] for name in ("weights", "random_init") if name in before}
    config = _resolved(chosen, demo=args.demo)
    _refuse_contradictions(config, given, demo=args.demo)
    return Request(
        config=config,
        methods=("source", "dacs") if args.demo and "method" not in chosen else (config.method,),
        runs=runs,
        demo=args.demo,
        out=None if args.out is None else Path(args.out),
        resume=args.resume,
        dry_run=args.dry_run,
    )


def checked(name: str, value: object, where: str) -> Any:  # noqa: ANN401 - an option's value
    """Return a value as it is used, or refuse it; `where` is what messages call it."""
    kind: Kind = OPTIONS[name].metadata["kind"]
    if not kind.allows(value):
        raise SystemExit(f"error: {where} must be {kind.expected()}, got {value!r}{_meant(value, kind.choices)}")
    if kind.native is not None:
        return size_name(size(str(value)))
    return kind.type(value)


def config_files(out: Path) -> list[Path]:
    """The config.json of a run's folder, or those of the seeds and methods below it."""
    patterns = ("config.json", "*/config.json", "*/*/config.json")
    return next((paths for pattern in patterns if (paths := sorted(out.glob(pattern)))), [])


def size(text: str) -> tuple[int, int] | None:
    """'512x1024' as (512, 1024), '512' as a square, 'native' as None."""
    if text == "native":
        return None
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def size_name(value: tuple[int, int] | None) -> str:
    """The reverse: what metrics.json calls it."""
    return "native" if value is None else f"{value[0]}x{value[1]}"


def label_sizes(config: Config) -> list[tuple[int, int] | None]:
    """The sizes that labels are scored at: that of the images and twice it, or their own."""
    image_size = size(config.target_size)
    return [None] if image_size is None else [image_size, (2 * image_size[0], 2 * image_size[1])]


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="%(prog)s [options]",
    )  # fmt: skip
    parser.add_argument("--demo", action="store_true",
                        help="render a small pair of domains and train on it (default: off)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<time>-<method>)")
    parser.add_argument("--resume", action="store_true",
                        help="go on where the run in --out stopped (default: off)")  # fmt: skip
    parser.add_argument("--runs", default="1", metavar="N",
                        help="train so many seeds, report mean and deviation [seeds] (default: 1)")  # fmt: skip
    parser.add_argument("--config", metavar="FILE",
                        help="options from a JSON file, such as a run's own config.json (default: none)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true",
                        help="print options and plan and what would stop the run (default: off)")  # fmt: skip
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
    """Text, unit and default of an option."""

    def shown(value: object) -> str:
        return ("on" if value else "off") if isinstance(value, bool) else "none" if value == "" else f"{value}"

    unit = f" [{one.metadata['kind'].unit}]" if one.metadata["kind"].unit else ""
    paper = PAPER_OPTIONS.get(one.name, one.default)
    default = shown(one.default) + (f"; {shown(paper)} by --recipe paper" if paper != one.default else "")
    return f"{one.metadata['text']}{unit} (default: {default})".replace("%", "%%")


def _from_text(kind: type, value: Any) -> Any:  # noqa: ANN401 - a flag's value
    """A number, where the text is one."""
    try:
        return kind(value) if kind in {int, float} else value
    except ValueError:
        return value


def _from_file(path: Path) -> dict[str, Any]:
    """The options that a file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"error: {path}: is no JSON object of options ({error}).") from error
    if not isinstance(found, dict):
        raise SystemExit(f"error: {path}: is no JSON object of options, but holds a {type(found).__name__}.")
    found.pop("versions", None)
    for name in found.keys() - OPTIONS.keys():
        raise SystemExit(f"error: {path}: unknown option {name!r}{_meant(name, tuple(OPTIONS))}")
    return {name: checked(name, value, f"{path}: {name!r}") for name, value in found.items()}


def _meant(value: object, names: Sequence[Any]) -> str:
    """The end of a message, with what was meant, perhaps."""
    near = difflib.get_close_matches(str(value), [str(name) for name in names], 1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _resolved(chosen: dict[str, Any], *, demo: bool) -> Config:
    """What was chosen over the recipe over the defaults."""
    options: dict[str, Any] = PAPER_OPTIONS if chosen.get("recipe") == "paper" else {}
    if chosen.get("synthia"):
        options = {**options, "source_size": "760x1280"}  # its own size
    if chosen.get("source"):
        size_of_target = chosen.get("target_size", "native")
        options = {**options, "source_size": "native", "target_size": "native", "evaluation": size_of_target}
    if not is_ours(chosen.get("network", "resnet101")):
        options = {**options, "repeated": False}
    if demo:
        options = {**options, **DEMO_OPTIONS}
        if chosen.get("weights"):
            options["random_init"] = False
    return Config(**{**options, **chosen})


def _refuse_contradictions(config: Config, given: dict[str, Any], *, demo: bool) -> None:
    """Look at options together."""
    scored = [size_name(one) for one in label_sizes(config)]
    problem = _data_problem(config, given, demo=demo)
    if problem:
        pass
    elif config.weights and config.random_init:
        problem = "give --weights FILE or --random-init, not both"
    elif is_ours(config.network) and not (config.weights or config.random_init):
        problem = (
            "give --weights FILE: the paper starts from weights trained on COCO, and ResNet-101 from random ones comes "
            "nowhere near its numbers; or --random-init, to go on all the same"
        )
    elif is_ours(config.network) and config.head:
        problem = "--head is for --network MODULE:FUNCTION; DeepLab-v2's is known"
    elif min(size(config.crop) or ()) < SMALLEST:
        problem = f"--crop must be {SMALLEST}x{SMALLEST} at least, the stride of the network, got {config.crop}"
    elif config.evaluation not in scored:
        problem = f"--evaluation must be one of the scored sizes, {' or '.join(scored)}, got {config.evaluation!r}"
    elif config.nesterov and config.momentum == 0:
        problem = "--nesterov needs --momentum above 0"
    else:
        problem = _unusable(config.device)
    if problem:
        raise SystemExit(f"error: {problem}.")


def _data_problem(config: Config, given: dict[str, Any], *, demo: bool) -> str:
    """What is contradictory or lacking in the data that was named."""
    papers, own = ([name for name in names if getattr(config, name)] for names in (PAPER_DATA, OWN_DATA))
    if demo:
        named = [name for name in PAPER_DATA if given.get(name)] + own + (["synthia"] if config.synthia else [])
        return f"--demo renders its own data; leave out --{named[0]}" if named else ""
    if own and papers:
        return f"--{own[0]} takes the place of --{papers[0]}; give one of them"
    if own:
        lacking = [f"--{name}" for name in OWN_DATA if name not in own]
        return f"--{own[0]} needs {' and '.join(lacking)} too" if lacking else ""
    if bool(config.gta5) == bool(config.synthia):
        return "give --gta5 DIR or --synthia DIR, or --source, --target and --classes, or --demo"
    return "" if config.cityscapes else "--cityscapes DIR is needed, or --demo"


def _unusable(device: str) -> str:
    """Why a device cannot be trained on, if it cannot."""
    try:
        kind = torch.device(device)
        if kind.type == "cuda" and (kind.index or 0) < torch.cuda.device_count():
            return ""  # looking closer would take memory of that GPU, in every process
        if kind.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(1, device=kind)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"--device {device} cannot be used: {str(error).splitlines()[0].rstrip('.')}; try --device cpu"
    return ""
