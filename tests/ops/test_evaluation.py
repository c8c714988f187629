"""Evaluation and pictures."""

import math
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as tf
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from checks import compiled
from crossmix import MeanTeacher, evaluation
from crossmix._tensors import nearest
from crossmix.datasets import Sample, SegmentationFolder, StreetScenes, write_png
from crossmix.datasets.classes import PALETTE
from crossmix.evaluation import evaluate
from crossmix.metrics import ConfusionMatrix
from crossmix.models import deeplab_v2_tiny
from crossmix.visualize import colorize, gallery
from oracles import seeded
from runs import run_ranks


def samples(sizes: list[tuple[int, int]]) -> list[Sample]:
    out = []
    for i, (height, width) in enumerate(sizes):
        image = torch.randint(0, 256, (3, height, width), generator=seeded(i), dtype=torch.uint8)
        label = torch.randint(0, 5, (height, width), generator=seeded(i + 9), dtype=torch.uint8)
        label[0] = 255
        out.append(Sample(image, label, f"s{i}"))
    return out


def test_evaluate__equals_the_steps_by_hand() -> None:
    torch.manual_seed(0)
    model = deeplab_v2_tiny(5).train()
    data = samples([(32, 48), (40, 64), (33, 47)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    matrices = evaluate(
        model, data, num_classes=5, image_size=(32, 64), label_sizes=[None, (16, 32)], forward=model.forward_features
    )
    assert list(matrices) == ["native", "16x32"]
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.eval()
    want = [ConfusionMatrix(5), ConfusionMatrix(5)]
    with torch.no_grad():
        for image, label, _ in data:
            small = tf.interpolate(image[None], size=(32, 64), mode="bilinear", antialias=True).float() / 255
            logits = model.forward_features(small)
            for matrix, size in zip(want, (label.shape, (16, 32)), strict=True):
                target = tf.interpolate(label[None, None].double(), size=size, mode="nearest-exact")[0].long()
                up = tf.interpolate(logits, size=size, mode="bilinear", align_corners=True)
                matrix.update(up.argmax(1), target)
    for matrix, other in zip(matrices.values(), want, strict=True):
        assert torch.equal(matrix.counts, other.counts)


def test_evaluate__workers_and_precision() -> None:
    torch.manual_seed(0)
    model, data = nn.Conv2d(3, 5, 1), samples([(8, 12), (9, 7), (5, 5)])
    state = torch.get_rng_state()
    alone, ahead = evaluate(model, data, num_classes=5), evaluate(model, data, num_classes=5, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(alone["native"].counts, ahead["native"].counts)
    seen: set[torch.dtype] = set()
    half = evaluate(model, data, num_classes=5, dtype=torch.bfloat16, logits=lambda out: seen.add(out.dtype) or out)
    assert seen == {torch.bfloat16}
    want = ConfusionMatrix(5)
    for image, label, _ in data:
        logits = tf.conv2d((image[None] / 255).bfloat16(), model.weight.bfloat16(), model.bias.bfloat16())
        want.update(logits.argmax(1), label[None])
    assert torch.equal(half["native"].counts, want.counts)
    for options in ({"workers": 1}, {"sync": True}):
        with pytest.raises(TypeError, match="need a map-style data set, got list_iterator"):
            evaluate(model, iter(data), num_classes=5, **options)


def test_evaluate__an_error_on_a_rank_names_the_item_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (torch.rand(3, 8, 12), torch.full((8, 12), 7))
    data = [(image, label) for image, label, _ in samples([(8, 12)] * 7)]
    data[5] = wrong
    monkeypatch.setattr(evaluation, "rank", lambda: 1)  # of two, whose share is 1, 3, 5
    monkeypatch.setattr(evaluation, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="item 5: label ids must lie in"):
        evaluate(nn.Conv2d(3, 5, 1), data, num_classes=5, sync=True)


RANKS = """
import copy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from crossmix.datasets import StreetScenes
from crossmix.evaluation import evaluate
torch.manual_seed(0)
model = nn.Conv2d(3, 19, 3, padding=1)
scenes = [StreetScenes(5)[i] for i in range(5)]
matrices = evaluate(model, scenes, label_sizes=[None, (32, 64)], sync=True)
assert int(matrices["native"].counts.sum()) <= 64 * 128 * len(range(rank, 5, size))  # its own share
scores = [matrix.compute() for matrix in matrices.values()]
print([(score.per_class.tolist(), score.mean, score.pixel_accuracy) for score in scores])
few = evaluate(model, scenes[:1], sync=True)  # some ranks have none
print(few["native"].compute().per_class.tolist())
norms = nn.Sequential(model, nn.BatchNorm2d(19))
waiting = [DistributedDataParallel(copy.deepcopy(norms)), copy.deepcopy(norms)]
fully_shard(waiting[1][0]), fully_shard(waiting[1])  # a part, which is gathered in each forward pass, and the whole
for count in (1, 5):  # a forward pass of these waits for those of the other ranks
    plain, *others = (evaluate(one, scenes[:count], sync=True)["native"].counts for one in (norms, *waiting))
    assert all(torch.equal(plain, other) for other in others)
pairs = [(torch.stack([one.image] * 2), torch.stack([one.label] * 2)) for one in scenes]  # items of two images
plain, *others = (evaluate(one, pairs, sync=True)["native"].counts for one in (norms, *waiting))
assert all(torch.equal(plain, other) for other in others)
"""


@pytest.mark.slow
def test_evaluate__ranks_share_the_samples_and_agree_exactly(tmp_path: Path) -> None:
    assert len({output for size in (1, 2, 3) for output in run_ranks(RANKS, size, tmp_path)}) == 1


def test_evaluate__in_inference_mode_gives_counts_to_go_on_with() -> None:
    network, data = nn.Conv2d(3, 19, 1), StreetScenes(1)
    with torch.inference_mode():
        matrix = evaluate(network, data)["native"]
    once = matrix.counts.clone()
    matrix.update(*(data[0].label[None] for _ in range(2)))
    assert matrix.counts.sum() == 2 * once.sum()


class Perfect(nn.Module):
    """Reads the class off the red channel."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm2d(3).eval()
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        return tf.one_hot((images[:, 0] * 255).round().long(), 5).permute(0, 3, 1, 2).float()


def test_evaluate__a_perfect_model_and_mixed_modes() -> None:
    label = torch.randint(0, 5, (6, 8), dtype=torch.uint8)
    model = Perfect()
    data = [Sample(label.expand(3, 6, 8), label, "a")]
    assert evaluate(model, iter(data), num_classes=5)["native"].compute().mean == 1.0
    assert model.modes == [False]
    assert model.training
    assert not model.frozen.training  # every submodule's own mode is put back


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"window": 4}, {"window": 4, "flip": True}])
def test_evaluate__nan_is_no_prediction(options: dict[str, Any]) -> None:
    def scores(images: Tensor) -> Tensor:
        found = images.new_zeros(len(images), 5, *images.shape[-2:])
        found[:, 3, 0, 0] = math.nan  # of each window
        return found

    label = torch.zeros(6, 8, dtype=torch.uint8)
    score = partial(evaluate, nn.Identity(), num_classes=5, forward=scores, **options)
    with pytest.raises(ValueError, match=r"got other values; .* find out why the scores are NaN"):
        score([Sample(label.expand(3, 6, 8), label, "a")])
    label[:5] = 255  # NaN at pixels without a label
    assert score([Sample(label.expand(3, 6, 8), label, "a")])["native"].compute().pixel_accuracy == 1


def test_evaluate__an_average_of_a_compiled_network() -> None:
    torch.manual_seed(0)
    network, data = nn.Conv2d(3, 5, 1), samples([(8, 12)])
    want = evaluate(network, data, num_classes=5)["native"].counts
    assert torch.equal(evaluate(AveragedModel(compiled(network)), data, num_classes=5)["native"].counts, want)


class Tuples(Dataset[object]):
    """Somebody else's data set; it need not stop by itself."""

    def __init__(self, form: Callable[[Sample], object]) -> None:
        self.form = form

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> object:
        return self.form(samples([(8, 12)] * 4)[index])


FORMS: dict[str, Callable[[Sample], object]] = {
    "sample": lambda sample: sample,
    "pair": lambda sample: (sample.image, sample.label.long()),
    "list": lambda sample: [sample.image / 255, sample.label.int(), sample.name, 7],
    "dict": lambda sample: {"name": sample.name, "image": sample.image, "label": sample.label},
    "other dict": lambda sample: {"pixel_values": sample.image.float() / 255, "labels": sample.label.short()},
}


@pytest.mark.parametrize("form", FORMS)
def test_evaluate__data_of_any_form(form: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
    want = evaluate(network, samples([(8, 12)] * 3), num_classes=5, image_size=(9, 11), label_sizes=[None, (5, 7)])
    assert want["native"].counts.sum() == 3 * 7 * 12
    data = Tuples(FORMS[form])
    for given, options in (
        (data, {}),
        (data, {"workers": 1}),
        ([data[i] for i in range(3)], {}),
        (iter([data[i] for i in range(3)]), {}),
        (DataLoader(data, batch_size=2), {}),
        (DataLoader(data, batch_size=2, num_workers=1), {}),
    ):
        sizes = [None, (5, 7), (5, 7)]  # one twice is scored once
        got = evaluate(network, given, num_classes=5, image_size=(9, 11), label_sizes=sizes, **options)
        assert list(got) == ["native", "5x7"]
        for name, matrix in want.items():
            if form in {"list", "other dict"}:  # floating images are not rounded to bytes when they are resized
                assert (got[name].counts - matrix.counts).abs().sum() <= 4
            else:
                assert torch.equal(got[name].counts, matrix.counts)


class Stream(IterableDataset[Sample]):
    """A data set without indices; `Dataset` has a `__getitem__` nevertheless."""

    def __iter__(self) -> Iterator[Sample]:
        return iter(samples([(8, 12)] * 3))


class LongStream(Stream):
    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize("data", [Stream(), LongStream()])
def test_evaluate__a_stream(data: Stream) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 5, 3, padding=1)
    want = evaluate(network, samples([(8, 12)] * 3), num_classes=5)["native"].counts
    for given in (data, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None, num_workers=1)):
        assert torch.equal(evaluate(network, given, num_classes=5, progress=True)["native"].counts, want)
    with pytest.raises(TypeError, match="need a map-style data set, got"):
        evaluate(network, data, num_classes=5, workers=1)


class Wrapped(nn.Module):
    """A network that returns its logits in something."""

    def __init__(self, wrap: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.wrap = nn.Conv2d(3, 5, 1), wrap

    def forward(self, images: Tensor) -> object:
        return self.wrap(self.inner(images))


@pytest.mark.parametrize(
    ("wrap", "fix"),
    [
        (lambda logits: {"out": logits, "aux": 1}, 'out["out"]'),
        (lambda logits: {"loss": 1, "logits": logits}, 'out["logits"]'),
        (lambda logits: {"seg": logits}, 'out["seg"]'),
        (lambda logits: SimpleNamespace(logits=logits), "out.logits"),
        (lambda logits: (logits, 3), "out[0]"),
    ],
)
def test_evaluate__a_network_that_returns_no_tensor(wrap: Callable[[Tensor], object], fix: str) -> None:
    torch.manual_seed(0)
    network, data = Wrapped(wrap), samples([(8, 12), (9, 7)])
    with pytest.raises(TypeError, match="`network` must return logits as a tensor, got") as caught:
        evaluate(network, data, num_classes=5)
    advice = re.search(r"`logits=(lambda out: .*)`", str(caught.value))
    assert advice
    assert advice[1] == f"lambda out: {fix}"
    got = evaluate(network, data, num_classes=5, logits=eval(advice[1]))  # noqa: S307 - what the error said
    assert torch.equal(got["native"].counts, evaluate(network.inner, data, num_classes=5)["native"].counts)


def windows_by_hand(
    network: nn.Module, images: Tensor, window: tuple[int, int], stride: tuple[int, int], corners: bool
) -> Tensor:
    """The mean over all windows that show a pixel, pixel by pixel."""
    height, width = images.shape[-2:]

    def starts(length: int, size: int, step: int) -> list[int]:
        found = [0]
        while found[-1] + size < length:
            found.append(min(found[-1] + step, length - size))
        return found

    parts = []
    for top in starts(height, window[0], stride[0]):
        for left in starts(width, window[1], stride[1]):
            part = images[..., top : top + window[0], left : left + window[1]]
            up = tf.interpolate(network(part), size=part.shape[-2:], mode="bilinear", align_corners=corners)
            whole = torch.full((1, 5, height, width), math.nan)
            whole[..., top : top + window[0], left : left + window[1]] = up.softmax(1)
            parts.append(whole)
    return torch.stack(parts).nanmean(0)


@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("window", "stride", "meant"),
    [
        (None, None, None),
        ((6, 8), (4, 5), ((6, 8), (4, 5))),
        (7, 7, ((7, 7), (7, 7))),
        ((6, 9), None, ((6, 9), (4, 6))),
        ((40, 6), 1, ((17, 6), (1, 1))),
        (100, None, None),
        ((17, 19), 5, None),
    ],
)
def test_evaluate__windows_and_mirrored_images(
    window: Any, stride: Any, meant: tuple[tuple[int, int], tuple[int, int]] | None, flip: bool, corners: bool
) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 5, 3, padding=1, stride=2)  # smaller logits, and borders that matter
    data = samples([(17, 19)])
    images = data[0].image[None] / 255
    for size in (None, (8, 9), (34, 50)):  # whether probabilities or logits are resized makes a difference
        got = evaluate(
            network, data, num_classes=5, label_sizes=[size], window=window, stride=stride, flip=flip,
            align_corners=corners,
        )  # fmt: skip
        label = data[0].label if size is None else nearest(data[0].label, size)

        def probs(view: Tensor, shape: torch.Size = label.shape) -> Tensor:
            if meant is None:  # one pass, also where a window shows all of the image
                return tf.interpolate(network(view), size=shape, mode="bilinear", align_corners=corners).softmax(1)
            mean = windows_by_hand(network, view, *meant, corners)
            return tf.interpolate(mean, size=shape, mode="bilinear", align_corners=corners)

        with torch.no_grad():
            total = probs(images) + probs(images.flip(-1)).flip(-1) if flip else probs(images)
        want = ConfusionMatrix(5)
        want.update(total.argmax(1), label[None])
        assert (next(iter(got.values())).counts - want.counts).abs().sum() <= 2  # a tie in the last bit


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("evaluating")]


def test_evaluate__progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Conv2d(3, 5, 1)
    data = samples([(3, 4)] * 120)
    quiet = evaluate(network, data, num_classes=5)["native"].counts
    assert capsys.readouterr().err == ""
    told = [f"evaluating: {done} of 120" for done in range(12, 121, 12)]
    for given, want in (
        (data, told),
        (DataLoader(data, batch_size=1), told),  # type: ignore[arg-type]
        (iter(data), ["evaluating: 100"]),
        (data[:99], []),
    ):
        got = evaluate(network, given, num_classes=5, progress=True)["native"].counts
        assert lines_of(capsys.readouterr().err) == want
        assert want == [] or torch.equal(got, quiet)
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert torch.equal(evaluate(network, data, num_classes=5, progress=True)["native"].counts, quiet)
    assert re.search(r"evaluating: 100%.* 120/120", capsys.readouterr().err)


def test_evaluate__nothing_is_labelled(caplog: pytest.LogCaptureFixture) -> None:
    data = [Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.full((4, 4), 255), "a")]
    iou = evaluate(nn.Conv2d(3, 5, 1), data, num_classes=5)["native"].compute()
    assert "no pixel of the 1 images has a label" in caplog.text
    assert math.isnan(iou.mean)
    assert math.isnan(iou.pixel_accuracy)
    assert iou.per_class.isnan().all()


def test_evaluate__a_folder_without_labels_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / f"{name}.png", torch.zeros(3, 4, 4, dtype=torch.uint8))
    folder = SegmentationFolder(tmp_path)
    for data in (folder, Subset(folder, [0]), DataLoader(Subset(folder, [0, 1]), batch_size=2)):
        with pytest.raises(ValueError, match="no label maps to score against, got a SegmentationFolder of images only"):
            evaluate(nn.Conv2d(3, 5, 1), data, num_classes=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("data", [[(torch.rand(3, 4, 6), torch.zeros(4, 6, dtype=torch.uint8))], samples([(4, 6)])])
@pytest.mark.parametrize("window", [None, 3])
def test_evaluate__images_in_the_dtype_of_the_network(dtype: torch.dtype, data: Any, window: int | None) -> None:
    network = nn.Conv2d(3, 5, 1)
    want = evaluate(network, data, num_classes=5)["native"].counts
    got = evaluate(network.to(dtype), data, num_classes=5, window=window)["native"].counts
    assert got.sum() == want.sum()
    assert (got - want).abs().sum() <= (4 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize(
    ("value", "ignore_index", "dtype"),
    [
        (5, 255, torch.int64),
        (-1, 255, torch.int64),
        (255, 0, torch.int64),
        (254, 255, torch.uint8),
        (156, -100, torch.uint8),  # equal modulo 256
    ],
)
def test_evaluate__refuses_ids_that_would_not_count(value: int, ignore_index: int, dtype: torch.dtype) -> None:
    label = torch.full((4, 4), 1, dtype=dtype)
    label[2, 3] = value
    data = [Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), label, "street")]
    message = rf"street: label ids must lie in 0..4 or be {ignore_index}, got {value}; map them"
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Conv2d(3, 5, 1), data, num_classes=5, ignore_index=ignore_index)
    evaluate(nn.Conv2d(3, 5, 1), data, num_classes=5, ignore_index=value)


IMAGE, LABEL = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no label", {"data": [Sample(IMAGE, None, "a")]}, ValueError, "a: has no label to score against"),
    ("no label in a dict", {"data": [{"image": IMAGE}]}, ValueError, "item 0: has no label to score against"),
    ("other keys", {"data": [{"x": IMAGE, "y": LABEL}]}, TypeError, "got a dict with keys 'x', 'y'; convert"),
    ("a tensor", {"data": [IMAGE]}, TypeError, "`data` must hold items with `image` and `label`.* got Tensor"),
    ("numpy", {"data": [(IMAGE.numpy(), LABEL)]}, TypeError, "`image` must be a torch.Tensor, got ndarray"),
    ("a worker's numpy", {"data": [(IMAGE.numpy(), LABEL)], "workers": 1}, TypeError, "must be a torch.Tensor, got"),
    ("numpy label", {"data": [(IMAGE, LABEL.numpy())]}, TypeError, "`label` must be a torch.Tensor, got ndarray"),
    ("image rank", {"data": [(IMAGE[0], LABEL)]}, ValueError, r"must be \(C, H, W\).* got \(4, 4\)"),
    ("image dtype", {"data": [(IMAGE.long(), LABEL)]}, ValueError, "uint8 or floating, got .* torch.int64"),
    ("label dtype", {"data": [(IMAGE, LABEL.float())]}, TypeError, "`label` must be uint8"),
    ("label rank", {"data": [(IMAGE[None], LABEL[None, None])]}, ValueError, "squeeze the channel dimension"),
    ("batches", {"data": [(IMAGE[None], LABEL.expand(2, 4, 4))]}, ValueError, "1 images and 2 label maps"),
    ("classes", {"num_classes": 19}, ValueError, "returned 5 classes but `num_classes` is 19"),
    ("nothing", {"data": []}, ValueError, "`data` must not be empty"),
    ("no sizes", {"label_sizes": []}, ValueError, "`label_sizes` must not be empty"),
    ("stride alone", {"stride": 3}, ValueError, "`stride` belongs to a `window`"),
    ("wide stride", {"window": 3, "stride": (3, 4)}, ValueError, "pixels between windows would get no prediction"),
    ("no stride", {"window": 3, "stride": 0}, ValueError, r"`stride` must be positive, got \(0, 0\)"),
    ("no window", {"window": (0, 3)}, ValueError, "`window` must be positive"),
    ("one window side", {"window": (3,)}, TypeError, r"`window` must be \(height, width\), .* got \(3,\); pass both"),
    ("float window", {"window": 3.0}, TypeError, r"`window` must be \(height, width\), .* got 3.0"),
    ("float stride", {"window": 3, "stride": (1.5, 1)}, TypeError, r"`stride` must be \(height, width\)"),
    ("one side", {"image_size": 4}, TypeError, r"`image_size` must be \(height, width\), .* got 4"),
    ("bool", {"image_size": (4, True)}, TypeError, "`image_size` must be"),
    ("no list", {"label_sizes": (4, 4)}, TypeError, r"`label_sizes` must be a list of \(height, width\) or None"),
    ("no height", {"label_sizes": [(0, 4)]}, ValueError, "`label_sizes` must be positive"),
    ("no module", {"network": lambda x: x}, TypeError, "`network` must be an nn.Module, got function"),
    ("rank", {"logits": lambda out: out[0]}, ValueError, r"logits of shape \(N, C, H, W\) with N = 1, got \(5, 4, 4\)"),
    ("loader", {"data": DataLoader([(IMAGE, LABEL)]), "workers": 1}, TypeError, "got DataLoader; pass its `dataset`"),
]


@pytest.mark.parametrize(("change", "error", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_evaluate__refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    network = nn.Conv2d(3, 5, 1)
    arguments = {"network": network, "data": [(IMAGE, LABEL)], "num_classes": 5, **change}
    with pytest.raises(error, match=message):
        evaluate(**arguments)
    assert network.training


def test_colorize_and_gallery() -> None:
    painted = colorize(torch.tensor([[1, 2, 255, -1]]), colors=[(1, 2, 3), (4, 5, 6)])
    assert painted[:, 0].T.tolist() == [[4, 5, 6], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    colors = colorize(torch.tensor([[0, 18, 255], [-1, 19, 5]]))
    want = [[PALETTE[0], PALETTE[18], (0, 0, 0)], [(0, 0, 0), (0, 0, 0), PALETTE[5]]]
    assert torch.equal(colors.permute(1, 2, 0), torch.tensor(want).to(colors))
    sheet = gallery([[colors, torch.ones(3, 2, 3)], [torch.full((3, 2, 3), 0.5), colors]], gap=1)
    assert sheet.shape == (3, 7, 9)
    assert torch.equal(sheet[:, 1:3, 1:4], colors)
    assert torch.equal(sheet[:, 4:6, 5:8], colors)
    assert sheet[:, 4:6, 1:4].unique().tolist() == [128]
    assert sheet[:, 0].unique().tolist() == [255]
    for wrong in ([[colors], [colors, colors]], []):
        with pytest.raises(ValueError, match="equal lengths and pictures of one size"):
            gallery(wrong)
    with pytest.raises(ValueError, match=r"shape \(H, W\)"):
        colorize(colors)
    with pytest.raises(TypeError, match=r"must be integers, got torch.float32"):
        colorize(torch.zeros(2, 2))
    for color in [(300, 0, 0), (0.5, 0, 0), (0, 0)]:
        with pytest.raises(ValueError, match="from 0 to 255"):
            colorize(colors[0], colors=[color])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"must be uint8 or floating in \[0, 1\], got torch.int64"):
        gallery([[colors.long()]])


def test_evaluate__takes_ids_of_uint8_with_more_classes_than_it_holds() -> None:
    for num_classes in (256, 300, 512):
        network = nn.Conv2d(3, num_classes, 1)
        label = torch.full_like(LABEL, 17, dtype=torch.uint8)
        assert evaluate(network, [(IMAGE, label)], num_classes=num_classes)["native"].counts.sum() == label.numel()


def test_evaluate__runs_the_network_of_a_teacher_in_eval_mode() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, momentum=0.5), nn.Conv2d(5, 5, 1))
    student(torch.rand(2, 3, 8, 8))
    teacher = MeanTeacher(student)
    data = samples([(32, 48)])
    got, want = (evaluate(network, data, num_classes=5)["native"].counts for network in (teacher, student))
    assert torch.equal(got, want)
    assert not torch.equal(ConfusionMatrix(5).counts, got)


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"window": 4}])
def test_evaluate__near_ties_of_a_float64_network_are_kept(options: dict[str, Any]) -> None:
    class Tied(nn.Module):
        """Class 1 leads by less than float32 can tell."""

        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.0, 1e-10, 0.0], dtype=torch.float64))

        def forward(self, images: Tensor) -> Tensor:
            return self.scores[:, None, None].expand(len(images), 3, *images.shape[-2:])

    data = [(torch.rand(3, 8, 8), torch.ones(8, 8, dtype=torch.uint8))]
    assert evaluate(Tied(), data, num_classes=3, **options)["native"].compute().pixel_accuracy == 1


def test_evaluate__window_and_stride_may_be_ints_of_numpy() -> None:
    network = deeplab_v2_tiny(5)
    given = [
        evaluate(network, samples([(32, 48)]), num_classes=5, window=kind(16), stride=kind(8))["native"].counts
        for kind in (int, np.int64)
    ]
    assert torch.equal(*given)
