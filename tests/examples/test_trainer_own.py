"""The trainer on somebody's own folders, classes and network."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import domains
from crossmix.datasets import StreetScenes, write_png
from runs import Capture, Patch, Run, assert_same, final, forget, log_of, metrics_of, resolved

pytestmark = pytest.mark.usefixtures("one_thread", "no_charts")
NAMES = ["ground", "things", "sky", "living"]
MODULE = """
import collections, types
import torch
from torch import nn

class Quarter(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.decode_head = nn.Conv2d(8, classes, 3, stride=2, padding=1)
        self.kind = kind
    def forward(self, images):
        logits = self.decode_head(self.body(images))
        return {"tensor": logits, "object": types.SimpleNamespace(logits=logits), "out": {"out": logits},
                "logits": collections.OrderedDict(loss=None, logits=logits), "tuple": (logits,)}[self.kind]

def plain(n): return Quarter(n, "tensor")
def object(num_classes, depth=3): return Quarter(num_classes, "object")
def out(*, classes): return Quarter(classes, "out")
def logits(*, num_labels=5): return Quarter(num_labels, "logits")
def dropout(n):
    network = Quarter(n, "tensor")
    network.body.append(nn.Dropout2d(0.5))
    return network
class nested:
    @staticmethod
    def made(n): return Quarter(n, "tensor")

number = 7
def tuples(n): return Quarter(n, "tuple")
def fails(n): raise KeyError("no such encoder")
def lines(n): raise RuntimeError("Error in loading:\\n\\tMissing key.")
def nothing(n): return None
def more(n): return Quarter(n + 1, "tensor")
def small(n): return nn.Sequential(nn.AvgPool2d(64), nn.Conv2d(3, n, 1))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two domains of four classes, a file of them, and a module of networks."""
    root = tmp_path_factory.mktemp("own")
    (root / "my_networks.py").write_text(MODULE)
    mapping = {str(i): NAMES[0 if i < 2 else 2 if i == 10 else 3 if i in {11, 12} else 1] for i in range(19)}
    (root / "classes.json").write_text(json.dumps({"classes": NAMES, "mapping": {**mapping, "255": 255}}))
    write(root / "game", "", 6, "source", 0)
    for split, count, seed in (("train", 5, 1), ("val", 3, 2)):
        write(root / "street", split, count, "target", seed)
    shutil.rmtree(root / "street" / "labels" / "train")  # no label of the target is trained on
    return root


@pytest.fixture
def place(root: Path, monkeypatch: Patch) -> Path:
    """The folder to work in; what tests add to it has names of its own."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return root


def write(root: Path, split: str, count: int, domain: str, seed: int) -> None:
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    for i, (image, label, _) in enumerate(StreetScenes(count, domain=domain, size=(32, 64), seed=seed)):  # type: ignore[arg-type]
        assert label is not None
        write_png(root / "images" / split / f"{i}.png", image)
        write_png(root / "labels" / split / f"{i}.png", label)


FLAGS = [
    "--source", "game", "--target", "street", "--classes", "classes.json", "--crop", "32", "--steps", "4", "--workers",
    "0", "--device", "cpu", "--save-every", "2", "--eval-every", "4", "--log-every", "1",
]  # fmt: skip
OURS = ["--network", "tiny", "--random-init"]
PLAIN = ["--network", "my_networks:plain"]


@pytest.fixture
def run(trainer: ModuleType, place: Path) -> Run:
    """A run, made once for all tests of this file that ask for it by these flags; not to be written to."""

    def go(*flags: str) -> Path:
        out = place / "runs" / re.sub(r"\W+", "-", " ".join(flags))
        if not out.exists():
            assert trainer.main([*FLAGS, "--out", str(out), *flags]) == 0
        return out

    return go


def refused(trainer: ModuleType, *flags: str) -> str:
    """What a run and a dry run are refused with, in one line."""
    messages = []
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=r"^error: .*\Z") as ended:
            trainer.main([*FLAGS, "--out", "refused", *flags, *dry])
        messages.append(str(ended.value))
    assert messages[0] == messages[1]
    assert not Path("refused").exists()
    return messages[0]


@pytest.mark.parametrize("method", ["source", "dacs", "alignment"])
def test_own_data__from_two_folders_to_a_report(run: Run, place: Path, method: str) -> None:
    flags = [*OURS, "--method", method]
    if method == "alignment":  # whose oracle takes labels of the target's training images
        shutil.copytree(place / "street", place / "labelled")
        write(place / "labelled", "train", 5, "target", 1)
        flags += ["--target", "labelled"]
    out = run(*flags)
    scores = metrics_of(out)["last"]["student"]["native"]
    assert list(scores["per_class"]) == NAMES
    present = [value for value in scores["per_class"].values() if value is not None]
    assert scores["miou"] == pytest.approx(sum(present) / len(present))
    assert "miou_16" not in scores
    assert final(out)["student"]["layer5.conv2d_list.0.weight"].shape[0] == len(NAMES)
    page = (out / "report" / "index.html").read_text()
    assert f"game to {'labelled' if method == 'alignment' else 'street'}" in page
    assert all(name in page for name in NAMES)
    assert "bicycle" not in page
    assert "in the paper" not in (out / "report" / "table.md").read_text()


@pytest.mark.parametrize("name", ["plain", "object", "out", "logits", "nested.made", "dropout"])
def test_own_network__trains_and_resumes_to_the_same_end(trainer: ModuleType, run: Run, place: Path, name: str) -> None:
    flags = ["--network", f"my_networks:{name}", "--head", "decode_head", "--lr", "0.01"]
    whole = run(*flags)
    state = final(whole)
    assert set(state["student"]) >= {"body.0.weight", "decode_head.weight"}  # the names are the network's own
    assert [group["initial_lr"] for group in state["optimizer"]["param_groups"]] == pytest.approx([0.01, 0.1])
    assert all(0 < record["loss"] < 20 for record in log_of(whole))
    out = shutil.copytree(whole, place / f"resumed-{name}")
    forget(out)
    assert trainer.main([*FLAGS, *flags, "--out", str(out), "--resume"]) == 0
    assert_same(state, final(out))


def test_own_network__draws_its_dropout_by_seed_step_and_process(trainer: ModuleType) -> None:
    def drawn(seed: int, step: int, rank: int) -> tuple[float, ...]:
        config, ranks = trainer.Config(seed=seed), trainer.Ranks(rank, 2)
        trainer.seed_network(SimpleNamespace(config=config, ranks=ranks, done=step))
        return tuple(torch.rand(4).tolist())

    keys = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 249_999) for rank in (0, 1)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(*keys[3]) == drawn(*keys[3])


def test_own_network__learns_what_it_is_shown(run: Run) -> None:
    out = run(*PLAIN, "--lr", "0.05", "--method", "source", "--steps", "60", "--eval-every", "60", "--save-every", "60")
    losses = [record["loss"] for record in log_of(out)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.usefixtures("place")
def test_own_network__small_logits_are_upsampled_as_its_kind_does(trainer: ModuleType) -> None:
    config = trainer.Config(network="my_networks:plain", classes="classes.json", repeated=False)
    network = trainer.build_network(config, trainer.Ranks(), fresh=True)
    training = trainer.build_training(network, config, trainer.Ranks(), fresh=True)
    assert (training.upsample, training.align_corners, training.num_classes) == (True, False, len(NAMES))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_networks:none", r"my_networks\.py has no none; name a function"),
        ("my_networks:nested.none", r"has no nested\.none"),
        ("my_networks:number", "number must be a function, got int"),
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("my_networks:fails", r"fails\(4\) failed: KeyError: 'no such encoder' \(.*my_networks\.py, line \d+\)"),
        ("my_networks:lines", r"lines\(4\) failed: RuntimeError: Error in loading: Missing key \("),
        ("my_networks:nothing", r"must return a torch\.nn\.Module, got NoneType"),
        ("my_networks:tuples", "returned a tuple; return logits as a tensor, as `logits` or as `out`, or the masks"),
        ("my_networks:more", r"must return logits \(N, C, H, W\), here \(2, 4, \.\.\.\), got \(2, 5, 8, 8\)"),
        ("my_networks:small", "fails on images of 32x32: RuntimeError"),
    ],
)
@pytest.mark.usefixtures("place")
def test_own_network__that_cannot_be_trained_is_found_first(trainer: ModuleType, name: str, message: str) -> None:
    assert re.match(f"error: --network {re.escape(name)}: .*{message}", refused(trainer, "--network", name))


@pytest.mark.usefixtures("place")
def test_own_network__bad_names_and_heads(trainer: ModuleType) -> None:
    for name in ("resnet50", "a:", ":b", "a:b:c", "a b:c", "./a.py:b", ""):
        with pytest.raises(SystemExit, match=r"error: --network must be one of resnet101, tiny, or MODULE:FUNCTION"):
            trainer.main([*FLAGS, "--network", name])
    assert "'nowhere'" in refused(trainer, "--network", "my_networks:plain", "--head", "nowhere")
    with pytest.raises(SystemExit, match="error: --head is for --network MODULE:FUNCTION"):
        trainer.main([*FLAGS, *OURS, "--head", "layer5"])


def test_own_data__layouts(trainer: ModuleType, place: Path) -> None:
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            if (place / "street" / kind / split).exists():
                shutil.copytree(place / "street" / kind / split, place / "other" / split / kind)
    write(place / "alone", "", 4, "target", 5)
    parts = []
    for target in ("street", "other", "alone"):
        config = trainer.Config(**resolved(*FLAGS, *OURS, "--target", target))
        parts.append([[(one.image, one.label) for one in part] for part in domains.open_data(config)])
    for one, other in zip(parts[0], parts[1], strict=True):
        assert all(torch.equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))
    assert [len(part) for part in parts[2]] == [6, 4, 4]  # without splits it is evaluated whole
    assert all(bool((label < 4).any()) for _, label in parts[2][2])
    assert all(bool((label == 255).all()) for _, label in parts[2][1])  # and trained on without its labels


def test_own_data__without_labels_trains_and_says_that_it_scores_nothing(
    run: Run, place: Path, capsys: Capture
) -> None:
    shutil.copytree(place / "street" / "images" / "train", place / "photos")
    out = run(*OURS, "--target", "photos", "--eval-every", "2")
    printed = capsys.readouterr()
    assert "no pixel of the validation images counts" in printed.out
    assert "not one pixel" not in printed.err
    metrics = metrics_of(out)
    assert metrics["last"]["student"]["native"]["miou"] is None
    gains = [entry["unsupervised"]["student"]["information"] for entry in metrics["evaluations"]]
    assert all(math.isfinite(value) for value in gains)
    assert metrics["best_unsupervised"] == metrics["evaluations"][gains.index(max(gains))]
    assert "points below the best step | - |" in (out / "report" / "table.md").read_text()
    assert (out / "report" / "index.html").exists()


def test_own_data__what_is_wrong_is_found_first(trainer: ModuleType, place: Path) -> None:
    for flag in ("--source", "--target"):
        assert "nowhere: is not a folder; expected images/" in refused(trainer, *OURS, flag, "nowhere")
        said = refused(trainer, *OURS, flag, "x" * 300)
        assert re.match("error: x*: (cannot be listed \\(File name too long\\)|is not a folder)", said)
    shutil.copytree(place / "game" / "images", place / "bare" / "images")
    assert "bare: has no label maps; expected images/ and labels/" in refused(trainer, *OURS, "--source", "bare")
    assert "street: has a split train but no test" in refused(trainer, *OURS, "--eval-split", "test")
    assert "--prior oracle" in refused(trainer, *OURS, "--method", "alignment")  # nobody labelled the training images
    assert "is not a file of classes" in refused(trainer, *OURS, "--classes", "my_networks.py")
    assert "gone.json: cannot be read" in refused(trainer, *OURS, "--classes", "gone.json")
    (place / "few.json").write_text(json.dumps(NAMES))  # no mapping, and ids beyond them
    both = r"^error: game/labels/0\.png: .*\nerror: street/labels/val/0\.png: .* 4 classes have the ids 0\.\.3"
    with pytest.raises(SystemExit, match=both):
        trainer.main([*FLAGS, *OURS, "--classes", "few.json", "--dry-run"])


@pytest.mark.usefixtures("place")
def test_own_data__contradictions(trainer: ModuleType) -> None:
    for flags, message in (
        (FLAGS[2:], "--target needs --source too"),
        (FLAGS[:4], "--source needs --classes too"),
        ([*FLAGS, "--gta5", "x"], "--source takes the place of --gta5"),
        ([*FLAGS, "--demo"], "--demo renders its own data; leave out --source"),
        (FLAGS, "or --random-init"),
        ([*FLAGS, *OURS, "--evaluation", "1x1"], "must be one of the scored sizes, native"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            trainer.main([*flags])


def test_own_data__resumed_from_anywhere_but_not_with_other_classes(
    trainer: ModuleType, run: Run, place: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = shutil.copytree(run(*OURS, "--method", "dacs"), tmp_path / "run")
    whole = final(out)
    forget(out)
    (place / "renamed.json").write_text((place / "classes.json").read_text().replace("things", "objects"))
    with pytest.raises(SystemExit, match=r"error: cannot resume on other data: the source .* with other classes"):
        trainer.main([*FLAGS, *OURS, "--classes", "renamed.json", "--out", str(out), "--resume"])
    for name in ("game", "street"):
        shutil.copytree(place / name, tmp_path / name)
    shutil.copy(place / "classes.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert trainer.main([*FLAGS, *OURS, "--out", str(out), "--resume"]) == 0
    assert_same(whole, final(out))


def test_own_data__a_runs_own_config_repeats_it(trainer: ModuleType, run: Run, tmp_path: Path) -> None:
    out = run(*PLAIN)
    file = ["--config", str(out / "config.json")]
    assert trainer.main([*file, "--out", str(tmp_path / "again")]) == 0
    assert_same(final(out), final(tmp_path / "again"))
    with pytest.raises(SystemExit, match="has no images"):  # which takes the place of the file's folders
        trainer.main([*file, "--gta5", "a", "--cityscapes", "b", "--out", str(tmp_path / "other")])


def test_predict__takes_own_classes_and_own_networks(run: Run, tmp_path: Path) -> None:
    import predict

    for out, named in ((run(*OURS, "--method", "dacs"), []), (run(*PLAIN), PLAIN)):
        weights = str(out / "checkpoints" / "best_unsupervised.pt")
        given = ["street/images/val/0.png", "--weights", weights, "--out", str(tmp_path / f"{len(named)}")]
        assert predict.main([*given, *named]) == 0
        assert (tmp_path / f"{len(named)}" / "0_color.png").exists()
    with pytest.raises(SystemExit, match="if you trust it, add --network my_networks:plain"):
        predict.main(given)
    with pytest.raises(SystemExit, match="--aspp-branches has no effect without --network resnet101 or tiny"):
        predict.main([*given, *PLAIN, "--aspp-branches", "4"])


@pytest.mark.usefixtures("place")
def test_plan__of_own_networks(trainer: ModuleType, capsys: Capture) -> None:
    assert trainer.main([*FLAGS, *PLAIN, "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["images"] == {"source": 6, "target": 5, "validation": 3}
    assert isinstance(plan["memory_mb_computed_fp32"], int)
