"""`SegmentationFolder` on the folders that people have, name lists, class files, and what any data set promises."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

from checks import refusal
from crossmix.datasets import (
    GTA5,
    CachedSamples,
    Cityscapes,
    DataError,
    Sample,
    SegmentationFolder,
    StreetScenes,
    Synthia,
    class_counts,
    read_classes,
    segmentation_folder,
    statistics,
)
from crossmix.engine import KeyedCrops
from oracles import picture, save, seeded


def ids(height: int = 12, width: int = 20, seed: int = 0, classes: int = 5) -> np.ndarray:
    return torch.randint(0, classes, (height, width), generator=seeded(seed)).numpy().astype(np.uint8)


def pairs(
    root: Path, names: Sequence[str] = ("a", "b", "c"), *, images: str = "images", labels: str = "labels"
) -> Path:
    for i, name in enumerate(names):
        save(root / images / f"{name}.png", picture(seed=i))
        save(root / labels / f"{name}.png", ids(seed=i))
    return root


def mirrored(sample: Sample, *, named: str) -> Sample:
    return Sample(sample.image.flip(-1), sample.label.flip(-1), named + sample.name)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("context", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_samples__collate_and_are_transformed_in_workers(tmp_path: Path, labelled: bool, context: str | None) -> None:
    pairs(tmp_path)
    folders = (tmp_path / "images", tmp_path / "labels" if labelled else None)
    images = np.stack([picture(seed=i) for i in range(3)])
    labels = np.stack([ids(seed=i) if labelled else np.full((12, 20), 255, np.uint8) for i in range(3)])
    loader = partial(DataLoader, batch_size=3, num_workers=1 if context else 0, multiprocessing_context=context)
    [batch] = loader(SegmentationFolder(*folders))
    assert isinstance(batch, Sample)
    assert batch.label.dtype == torch.uint8
    assert np.array_equal(batch.image.permute(0, 2, 3, 1), images)
    assert np.array_equal(batch.label, labels)
    assert list(batch.name) == ["a", "b", "c"]
    [batch] = loader(SegmentationFolder(*folders, transform=partial(mirrored, named="mirrored ")))
    assert np.array_equal(batch.image.permute(0, 2, 3, 1), images[:, :, ::-1])
    assert np.array_equal(batch.label, labels[..., ::-1])
    assert list(batch.name) == ["mirrored a", "mirrored b", "mirrored c"]


def test_unlabelled__in_crops_and_in_a_cache(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path) / "images", ignore_index=200)
    cached = CachedSamples(data, tmp_path / "cache", progress=False)
    for sample in (data[1], cached[1]):
        assert sample.label.unique().tolist() == [200]
    image, label = KeyedCrops(cached, (4, 4), seed=0, stream=0)[3]
    assert torch.equal(image, KeyedCrops(data, (4, 4), seed=0, stream=0)[3][0])
    assert label.unique().tolist() == [200]
    refusal(lambda: class_counts(data), "3 samples have no label map")


def test_transform__may_return_anything_and_is_not_cached(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path), transform=lambda sample: {"pixels": sample.image.float() / 255})
    assert next(iter(DataLoader(data, batch_size=3)))["pixels"].max() <= 1
    refusal(lambda: CachedSamples(data, tmp_path / "cache"), "`samples` must have no `transform`", ValueError)
    assert torch.equal(class_counts(data), class_counts(SegmentationFolder(tmp_path)))  # of the files
    wrong = "`transform` must be callable, got str"
    refusal(lambda: SegmentationFolder(tmp_path, transform="flip"), wrong, TypeError)


def test_num_classes__ids_at_or_beyond_it_are_refused(tmp_path: Path) -> None:
    def read(**options: int) -> torch.Tensor:
        return SegmentationFolder(tmp_path, **options)[1].label

    pairs(tmp_path)
    save(tmp_path / "labels" / "b.png", ids() + 1)  # 1..5, for five classes
    assert read().max() == 5  # nobody has said how many there are
    data = SegmentationFolder(tmp_path, num_classes=5)
    assert data.num_classes == 5
    assert data[0].label.max() == 4
    refusal(lambda: data[1], r"labels/b\.png: holds \[5\], but 5 classes have the ids 0\.\.4, and ignored pixels 255")
    refusal(lambda: class_counts(data, cache=tmp_path / "counts"), r"b\.png: holds \[5\]")
    crops = KeyedCrops(data, (4, 4), seed=0, stream=0)
    refusal(lambda: [crops[i] for i in range(3)], r"b\.png: holds \[5\]")
    assert read(num_classes=6).max() == read(num_classes=5, ignore_index=5).max() == 5
    save(tmp_path / "labels" / "b.png", np.full((12, 20), 255, np.uint8))
    assert data[1].label.unique().tolist() == [255]
    refusal(lambda: read(num_classes=5, ignore_index=5), r"holds \[255\]")


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("num_classes", {"num_classes": 5}),
        ("mapping", {"mapping": {0: 0}}),
        ("mapping", {"mapping": {0: 0}, "num_classes": 5}),
    ],
)
def test_num_classes__without_label_maps_is_refused(tmp_path: Path, given: str, options: dict[str, Any]) -> None:
    pairs(tmp_path)
    for root in (tmp_path / "images", tmp_path / "images" / "*.png"):
        said = rf"{re.escape(str(root))}: has no label maps for `{given}`: .*`images` and `labels`"
        refusal(lambda root=root: SegmentationFolder(root, **options), f"{said}; pass `labels`, or leave out `{given}`")
        assert not SegmentationFolder(root).labelled


def test_num_classes__every_id(tmp_path: Path) -> None:
    for value in range(256):
        save(tmp_path / "l.png", np.full((2, 3), value, np.uint8))
        data = SegmentationFolder(None, tmp_path, num_classes=19)
        if value < 19 or value == 255:
            assert data[0].label.unique().tolist() == [value]
        else:
            refusal(partial(data.__getitem__, 0), rf"l\.png: holds \[{value}\]")


def test_num_classes__that_of_the_mapping(tmp_path: Path) -> None:
    pairs(tmp_path)
    mapping = {0: 255, 1: 0, 2: 1, 3: 2, 4: 2}
    assert SegmentationFolder(tmp_path, None, mapping).num_classes == 3
    assert SegmentationFolder(tmp_path, None, mapping, num_classes=7).num_classes == 7
    for num_classes, ignore_index, beyond in ((2, 255, 2), (3, 100, 255)):
        with pytest.raises(ValueError, match=rf"has the train id {beyond}, but {num_classes} classes have the ids 0"):
            SegmentationFolder(tmp_path, None, mapping, num_classes=num_classes, ignore_index=ignore_index)
    assert SegmentationFolder(tmp_path, None, dict.fromkeys(mapping, 255)).num_classes is None  # nothing but ignored
    ignoring = SegmentationFolder(tmp_path, None, {1: 0}, unlisted="ignore", ignore_index=9)
    assert ignoring[0].label.unique().tolist() == [0, 9]


@pytest.mark.parametrize(
    ("images", "labels", "instead"),
    [
        ("train/images", "train/labels", "did you mean {root}/train?"),
        ("data/train/images", "data/train/labels", "did you mean {root}/data/train?"),
        ("data/images", "data/masks", "did you mean {root}/data/images and {root}/data/masks?"),
        ("leftImg8bit/train", "gtFine/train", "did you mean {root}/leftImg8bit and {root}/gtFine?"),
        ("images/train", "labels/train", None),
    ],
)
def test_root__above_images_and_labels_is_said(tmp_path: Path, images: str, labels: str, instead: str | None) -> None:
    pairs(tmp_path, images=images, labels=labels)
    if instead is None:
        assert len(SegmentationFolder(tmp_path)) == 3
        pairs(tmp_path, images="images/val", labels="labels/val")
        instead = "images: holds the splits train, val; pass one of them, {root}/images/train and {root}/labels/train"
    refusal(lambda: SegmentationFolder(tmp_path), re.escape(instead.format(root=tmp_path)))


def test_root__names_of_splits_in_another_case_are_those_of_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("Train", "Val"):
        pairs(tmp_path, images=f"images/{split}", labels=f"labels/{split}")

    def on_a_disk_that_ignores_case(path: Path) -> bool:
        return path.is_dir() or path.name.casefold() in {one.name.casefold() for one in path.parent.iterdir()}

    monkeypatch.setattr(segmentation_folder, "is_folder", on_a_disk_that_ignores_case)
    assert names_of(SegmentationFolder(tmp_path))[::3] == ["Train/a", "Val/a"]


def test_root__above_is_said_of_official_ones(tmp_path: Path, command: Callable[..., str]) -> None:
    StreetScenes(1).write(tmp_path / "g" / "unpacked", layout="gta5")
    StreetScenes(1).write(tmp_path / "c" / "unpacked", layout="cityscapes")
    classes = ["--classes", str(put_classes(tmp_path))]
    for folder, read, options in (("g", GTA5, []), ("c", Cityscapes, []), ("g", GTA5, classes)):
        said = f"did you mean {tmp_path / folder}/unpacked?"
        refusal(partial(read, tmp_path / folder), re.escape(said))
        assert said in command(2, "check", tmp_path / folder, *options)


def test_root__above_zips_in_folders_of_their_own_is_said(tmp_path: Path) -> None:
    for part in ("01", "02"):
        for kind, array in (("images", picture()), ("labels", ids())):
            save(tmp_path / f"{part}_{kind}" / kind / f"{part}.png", array)
    merge = rf"such as {tmp_path}/01_images; merge these into one images and one labels\); expected <root>/images"
    refusal(lambda: GTA5(tmp_path), merge)
    StreetScenes(1).write(tmp_path / "whole", layout="gta5")
    refusal(lambda: GTA5(tmp_path), rf"\(did you mean {tmp_path}/whole\?\)")  # though others come before it


def test_folders__one_for_both_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path)
    for given in (tmp_path, tmp_path / "images", tmp_path / "*" / "*.png"):
        refusal(partial(SegmentationFolder, given, f"{given}/"), "is given for both images and labels")


def test_patterns__a_folder_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    refusal(lambda: SegmentationFolder(tmp_path / "none" / "*.png"), "none.*no images|none.*no image")


def test_class_counts__by_as_many_workers_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SegmentationFolder(pairs(tmp_path) / "images", tmp_path / "labels")
    each, asked = statistics.each, []

    def counted(*arguments: Any, workers: int) -> Iterator[Any]:
        asked.append(workers)
        return each(*arguments, workers=0)

    monkeypatch.setattr(statistics, "each", counted)
    class_counts(data, workers=3)
    class_counts(data)
    assert asked == [3, 0]


def test_class_counts__a_label_map_lost_since_it_was_listed(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path) / "images", tmp_path / "labels")
    (tmp_path / "labels" / "b.png").unlink()
    refusal(
        lambda: class_counts(data, cache=tmp_path / "counts"),
        r"b\.png: cannot be read \(No such file or directory\); check the folder",
    )


def test_patterns__endings_in_any_case_and_of_any_kind(tmp_path: Path) -> None:
    save(tmp_path / "[1] a_img.JPG", picture())
    save(tmp_path / "[1] b_img.png", picture())
    for name in "ab":
        save(tmp_path / f"[1] {name}_ids.PNG", ids())
    (tmp_path / "[1] a_img.json").write_text("{}", encoding="utf-8")
    data = SegmentationFolder(tmp_path / "[1] *_img.*", tmp_path / "[1] *_ids.png")
    assert [sample.name for sample in data] == ["a", "b"]
    assert len(SegmentationFolder(tmp_path / "*_img.jpg")) == 1


def names_of(data: Any) -> list[str]:
    return [file.name for file in data.files]


def put(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def sequences(tmp_path: Path) -> SegmentationFolder:
    return SegmentationFolder(pairs(tmp_path, ["seq1/000000", "seq1/000001", "seq2/000000", "seq10/000000"]))


def test_names__are_unique_where_folders_repeat_stems(tmp_path: Path, sequences: SegmentationFolder) -> None:
    assert names_of(sequences) == ["seq1/000000", "seq1/000001", "seq10/000000", "seq2/000000"]
    assert names_of(SegmentationFolder(pairs(tmp_path / "u", ["x/1", "y/2"]))) == ["1", "2"]
    for city in ("a", "b"):
        save(tmp_path / "leftImg8bit" / "val" / city / "1_leftImg8bit.png", picture())
    assert names_of(Cityscapes(tmp_path, "val", labels=False)) == ["a/1", "b/1"]


@pytest.mark.parametrize(
    "encode",
    [
        lambda lines: "\n".join(lines).encode(),
        lambda lines: "\r\n".join([*lines, ""]).encode(),
        lambda lines: "\n".join(lines).encode("utf-8-sig"),
        lambda lines: "\r\n".join([*lines, "", ""]).encode("utf-8-sig"),
        lambda lines: "\r\n".join(lines).encode("utf-16"),
        lambda lines: "".join(f"\n  {line} \t\n\n" for line in lines).encode(),
        lambda lines: "\n".join(["# a comment", *lines, "#", *lines]).encode(),
        lambda lines: "\n".join(line.replace("/", "\\") for line in lines).encode(),
        lambda lines: "\n".join(f"{line}.png" for line in lines).encode(),
        lambda lines: "\n".join(f"./{line}.PNG" for line in lines).encode(),
        lambda lines: "\n".join(f"images/{line}.jpg" for line in lines).encode(),
        lambda lines: "\n".join(f"Somewhere Else/{line}" for line in lines).encode(),
    ],
    ids=["plain", "CRLF", "BOM", "BOM and CRLF", "UTF-16", "blank lines", "comments", "backslashes", "endings", "dots",
         "paths", "prefix"],
)  # fmt: skip
def test_lists__of_any_form(
    tmp_path: Path, sequences: SegmentationFolder, encode: Callable[[list[str]], bytes]
) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(encode(["seq2/000000", "seq1/000001"]))
    data = SegmentationFolder(tmp_path, names=path)
    assert data.files == [sequences.files[1], sequences.files[3]]
    assert torch.equal(data[1].image, sequences[3].image)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000000", "names 000000, which may be seq1/000000 or seq10/000000; include the folder"),
        ("seq3/000000", r"names seq3/000000, which is not there \(1 of 1 are missing\)"),
        ("q1/000001", "names q1/000001, which is not there"),
        ("../images/seq1/000001.png", r"names \.\./images/seq1/000001\.png, which is outside of the folder"),
        ("/etc/seq1/000001.png", "names /etc/seq1/000001, which is not there"),
        ("C:\\\\seq1\\\\000001.png", "names C:/seq1/000001, which is not there"),
        ("seq1/000001\nimages/seq1/000001", "names seq1/000001 and images/seq1/000001, but there is only"),
        ("", "names nothing"),
        ("# none", "names nothing"),
    ],
)
def test_lists__what_they_do_not_mean(tmp_path: Path, sequences: SegmentationFolder, line: str, message: str) -> None:
    path = put(tmp_path / "list.txt", line)
    refusal(lambda: SegmentationFolder(tmp_path, names=path), message)
    assert len(sequences) == 4


def test_lists__of_whole_paths_and_of_parts_that_tell(tmp_path: Path) -> None:
    pairs(tmp_path, ["seq1/000000", "seq1/000001", "seq10/000000"])
    pairs(tmp_path / "dots", ["a.v1", "a.v2", "b"])
    linked = tmp_path.with_name(tmp_path.name + "-linked")
    linked.symlink_to(tmp_path)
    whole = str(tmp_path / "images" / "seq10" / "000000.png")
    for root, text, want in (
        (tmp_path, whole, ["seq10/000000"]),
        (linked, whole, ["seq10/000000"]),
        (tmp_path / "dots", "a.v2\nb.png\nb\n", ["a.v2", "b"]),
        (tmp_path, "000001", ["seq1/000001"]),  # there is only one
    ):
        assert names_of(SegmentationFolder(root, names=put(tmp_path / "list.txt", text))) == want


@pytest.mark.parametrize("images", ["images", "images/*/rgb.png"])
@pytest.mark.parametrize(
    "line", ["scene{i}/rgb.png", "scene{i}/rgb", "images/scene{i}/rgb.png", "{root}/images/scene{i}/rgb.png"]
)
def test_lists__of_equal_stems_take_linear_time(
    tmp_path: Path, images: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, calls = 60, [0]
    for i in range(count):
        save(tmp_path / "images" / f"scene{i}" / "rgb.png", picture())
    path = put(tmp_path / "list.txt", "\n".join(line.format(i=i, root=tmp_path) for i in range(count)))

    def counted(call: Callable[[Path], Path], path: Path) -> Path:
        calls[0] += 1
        return call(path)

    for name in ("absolute", "resolve"):
        monkeypatch.setattr(Path, name, partialmethod(lambda path, call: counted(call, path), getattr(Path, name)))
    assert len(SegmentationFolder(tmp_path / images, names=path)) == count
    assert calls[0] < 5 * count


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names__with_accents_pair_however_they_are_encoded(tmp_path: Path, form: str) -> None:
    composed, apart = (unicodedata.normalize(one, "Zürich") for one in ("NFC", "NFD"))
    for folder, name, array in (("images", apart, picture()), ("labels", composed, ids())):
        save(tmp_path / folder / apart / f"{name}.png", array)
    path = put(tmp_path / "list.txt", unicodedata.normalize(form, f"{tmp_path}/images/Zürich/Zürich.png"))
    for given in (None, path, put(tmp_path / "short.txt", unicodedata.normalize(form, "Zürich.png"))):
        assert names_of(SegmentationFolder(tmp_path, names=given)) == [composed]
    assert names_of(SegmentationFolder(tmp_path / "images/**/*.png", tmp_path / "labels/**/*.png")) == [composed]
    save(tmp_path / "images" / apart / f"{composed}.png", picture())
    refusal(lambda: SegmentationFolder(tmp_path), "are two files of one name")


@pytest.mark.parametrize(
    "line", ["{stem}", "{stem}_leftImg8bit.png", "street/{stem}", "leftImg8bit/val/street/{stem}_leftImg8bit.png"]
)
def test_lists__of_cityscapes(tmp_path: Path, line: str) -> None:
    StreetScenes(3).write(tmp_path, layout="cityscapes", split="val")
    path = put(tmp_path / "list.txt", line.format(stem="street_000001_000019"))
    for labels in (True, False):
        assert names_of(Cityscapes(tmp_path, "val", names=path, labels=labels)) == ["street_000001_000019"]


def test_lists__two_lines_for_one_file_are_not_taken_for_two(tmp_path: Path) -> None:
    StreetScenes(2).write(tmp_path, layout="gta5")
    path = put(tmp_path / "list.txt", "seq1/00001.png\nseq2/00001.png\n")
    refusal(lambda: GTA5(tmp_path, names=path), r"names seq1/00001\.png and seq2/00001\.png, but there is only")


MAPPINGS = {
    "names": ["first", "second", "third", "fourth", "fifth"],
    "ids": {"0": 0, "1": 1, "2": 2, "3": 2, "4": 255},
    "both": {
        "classes": ["first", "second", "third"], "mapping": {"0": "first", "1": 1, "2": "third", "3": 2, "4": 255}
    },
}  # fmt: skip
COLORS = [(128, 64, 128), (0, 0, 142), (1, 2, 3), (9, 9, 9), (0, 0, 0)]


@pytest.mark.parametrize("form", [*MAPPINGS, "colours", "hex"])
def test_command__classes_of_your_own(tmp_path: Path, form: str, command: Callable[..., str]) -> None:
    pairs(tmp_path)
    content = MAPPINGS.get(form, MAPPINGS["ids"])
    if form in {"colours", "hex"}:
        for i, name in enumerate("abc"):
            save(tmp_path / "labels" / f"{name}.png", np.array(COLORS, np.uint8)[ids(seed=i)])
        keys = [("#%02x%02X%02x" if form == "hex" else "%d, %d,%d") % color for color in COLORS]
        content = dict(zip(keys, MAPPINGS["ids"].values(), strict=True))
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(content), encoding="utf-8-sig")
    names, mapping = read_classes(classes)
    table = np.array(list(MAPPINGS["ids"].values()) if mapping else range(5))
    want = table[np.stack([ids(seed=i) for i in range(3)])]
    data = SegmentationFolder(tmp_path, None, mapping, num_classes=len(names))
    assert np.array_equal(np.stack([sample.label for sample in data]), want)
    ways = ([tmp_path], ["--images", tmp_path / "images", "--labels", tmp_path / "labels"])
    for i, way in enumerate(ways):
        out = command(0, "check", *way, "--classes", classes)
        assert "your own: 3 images, 3 label maps of mapped ids, 3 pairs" in out
        out = command(0, "stats", *way, "--classes", classes, "--out", tmp_path / f"{i}.jsonl")
        for value, name in enumerate(names):
            row = next(line.split() for line in out.splitlines() if line.split()[0] == name)
            assert row[1] == str(int((want == value).sum()))
    save(tmp_path / "labels" / "b.png", ids(classes=6) if form in MAPPINGS else picture())
    assert command(1, "check", tmp_path, "--classes", classes).count("labels/b.png: holds [") == 1
    assert "labels/b.png: holds [" in command(2, "stats", tmp_path, "--classes", classes)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "[1]", '["a", "a"]', '{"classes": ["a"], "ids": {}}', '{"classes": "ab"}',
        '{"classes": ["a"], "mapping": []}', '{"classes": ["a"], "mapping": {"3": 1}}', '{"1": "road"}', '{"1": 0.5}',
        '{"1": true}', '{"1": 256}', '{"-1": 0}', '{"70000": 0}', '{"#12345": 0}', '{"1, 2": 0}', '{"1, 2, 300": 0}',
        '{"1": 0, "1": 1}', '{"1": 0, "01": 1}', '{"1": 0, "#000000": 1}', "{", "7", "[" * 100_000,
        json.dumps([str(i) for i in range(256)]),
    ],
    ids=range(24),
)  # fmt: skip
def test_class_files__that_are_none(tmp_path: Path, text: str) -> None:
    path = put(tmp_path / "classes.json", text)
    expected = r"classes\.json: is not a file of classes \(.*\); expected a list of names"
    assert ".)" not in refusal(lambda: read_classes(path), expected)
    refusal(lambda: read_classes(tmp_path / "none.json"), r"none\.json: cannot be read")


def test_command__unlabelled_images_of_your_own(tmp_path: Path, command: Callable[..., str]) -> None:
    save(tmp_path / "grey.png", ids(classes=200))
    save(tmp_path / "b.jpg", picture())
    assert "your own: 2 images, 0 label maps" in command(0, "check", "--images", tmp_path)
    (tmp_path / "sub").mkdir()
    command(2, "check", "--images", tmp_path / "sub")
    (tmp_path / "sub" / "a.tif").write_bytes(b"II*\0")
    assert "left out, being neither PNG nor JPEG: 1 .tif" in command(2, "check", "--images", tmp_path / "sub")


@pytest.mark.parametrize("missing", ["images", "labels"])
@pytest.mark.parametrize("form", ["root", "folders", "patterns"])
def test_command__none_of_a_kind(tmp_path: Path, missing: str, form: str, command: Callable[..., str]) -> None:
    for kind, pixels in (("images", picture()), ("labels", ids())):
        if kind != missing:
            save(tmp_path / kind / "a.png", pixels)
    (tmp_path / missing).mkdir()
    classes = put_classes(tmp_path)
    arguments = {
        "root": [tmp_path],
        "folders": ["--images", tmp_path / "images", "--labels", tmp_path / "labels"],
        "patterns": ["--images", tmp_path / "images" / "*.png", "--labels", tmp_path / "labels" / "*.png"],
    }[form]
    kind = "images" if missing == "images" else "label maps"
    assert f"has no {kind}, PNG or JPEG" in command(2, "check", *arguments, "--classes", classes)


def put_classes(folder: Path) -> Path:
    return put(folder / "classes.json", '["a", "b", "c", "d", "e"]')


@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes__of_turned_images(tmp_path: Path, orientation: int, command: Callable[..., str]) -> None:
    save(tmp_path / "labels" / "a.png", ids()[:5])
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    width = 7 if orientation == 1 else ids().shape[1]
    Image.new("RGB", (width, 5)).save(tmp_path / "images" / "a.jpg", exif=exif)
    said = refusal(lambda: SegmentationFolder(tmp_path)[0], "its image")
    for text in (said, command(1, "check", tmp_path, "--classes", put_classes(tmp_path))):
        assert ("EXIF" in text) == (orientation == 6)
        assert ("pass `size=`" in text) == (orientation == 1)


def test_command__finds_images_smaller_than_the_crop(tmp_path: Path, command: Callable[..., str]) -> None:
    StreetScenes(3).write(tmp_path, layout="gta5")
    for folder in ("images", "labels"):
        with Image.open(tmp_path / folder / "00002.png") as opened:
            small = opened.crop((0, 0, 100, 50))
        small.save(tmp_path / folder / "00002.png")
    command(0, "check", tmp_path)
    command(0, "check", tmp_path, "--crop", "50x100")
    small = f"{tmp_path}/images/00002.png: is 50 x 100, smaller than the crop 64 x 64"
    assert small in command(1, "check", tmp_path, "--crop", "64x64")
    assert command(1, "check", tmp_path, "--crop", "200").count("smaller than the crop 200 x 200") == 3
    for wrong in (["--crop", "0x64"], ["--crop", "x"], ["--workers", "-1"]):
        with pytest.raises(SystemExit):
            command(2, "check", tmp_path, *wrong)


NAMES = ["gta5", "synthia", "cityscapes", "folder", "street scenes", "cached"]


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each data set, of three samples."""
    root = tmp_path_factory.mktemp("every")
    StreetScenes(3).write(root / "g", layout="gta5")
    StreetScenes(3).write(root / "c", layout="cityscapes", split="val")
    for i in range(3):
        save(root / "s" / "RGB" / f"{i}.png", picture())
        save(root / "s" / "GT" / "LABELS" / f"{i}.png", ids() + 1)
    data = [
        GTA5(root / "g"), Synthia(root / "s"), Cityscapes(root / "c", "val"), SegmentationFolder(pairs(root / "o")),
        StreetScenes(3), CachedSamples(GTA5(root / "g"), root / "cache", progress=False),
    ]  # fmt: skip
    return {**dict(zip(NAMES, data, strict=True)), "root": root}


@pytest.mark.parametrize("name", NAMES)
def test_items__by_any_int_and_nothing_else(every: dict[str, Any], name: str) -> None:
    data = every[name]
    whole = list(data)  # ends by itself
    assert len(whole) == len(data) == 3
    for i in range(3):
        for index in (i, i - 3, np.int64(i), np.int32(i - 3), torch.tensor(i)):
            assert data[index].name == whole[i].name
            assert torch.equal(data[index].image, whole[i].image)
    for index in (3, -4, 10**6, np.int64(3)):
        refusal(partial(data.__getitem__, index), "out of range for 3 samples", IndexError)
    for index in (slice(0, 2), 1.0, "1", None, (0, 1), [0]):
        refusal(partial(data.__getitem__, index), "is indexed by an int, got", TypeError)


@pytest.mark.parametrize("name", NAMES)
def test_class_counts__of_any_data_set_and_its_parts(every: dict[str, Any], name: str) -> None:
    data = every[name]
    want = torch.stack([torch.bincount(sample.label.flatten().long(), minlength=256) for sample in data])
    assert torch.equal(class_counts(data), want)
    part = Subset(Subset(data, [2, 0]), [1, 0, 0])
    assert torch.equal(class_counts(part), want[[0, 2, 2]])
    assert torch.equal(class_counts(ConcatDataset([part, data])), torch.cat([want[[0, 2, 2]], want]))


class LongStream(IterableDataset[Sample]):
    """A stream with a length; `Dataset` has a `__getitem__`, which raises."""

    def __iter__(self) -> Iterator[Sample]:
        return iter([])

    def __len__(self) -> int:
        return 1


def test_class_counts__of_samples_refuses(every: dict[str, Any], tmp_path: Path) -> None:
    scenes, gta5 = every["street scenes"], every["gta5"]
    scene = scenes[0]
    bare = CachedSamples(GTA5(gta5.root, labels=False), tmp_path / "bare", progress=False)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: class_counts(scenes, cache=tmp_path / "counts.jsonl"), ValueError,
         "`cache` stores counts of label files, but StreetScenes has none"),
        (lambda: class_counts(bare), DataError, "sample 0 of CachedSamples has no label"),
        (lambda: class_counts(gta5, workers=-1), ValueError, "`workers` must"),
        (lambda: class_counts(gta5, workers=1.5), TypeError, "`workers` must"),
        (lambda: class_counts(gta5, workers=None), TypeError, "`workers` must"),
        (lambda: class_counts([scene._replace(label=scene.label.long() - 1)]), DataError, r"labels outside 0\.\.255"),
        (lambda: class_counts([tuple(scene)]), TypeError, "must hold items with a `label`, .* got tuple"),
        (lambda: class_counts([scene._asdict()]), TypeError, "must hold items with a `label`, .* got dict"),
        (lambda: class_counts(one for one in [scene]), TypeError, "must have a length and items, got generator"),
        (lambda: class_counts(LongStream()), TypeError, "must have a length and items, got LongStream"),
    ]  # fmt: skip
    for call, error, message in cases:
        refusal(call, message, error)


BAD_SIZES = [
    (7, TypeError), ("12x20", TypeError), ((7.0, 9), TypeError), ((7, 9, 3), TypeError), ((7,), TypeError),
    ((True, 9), TypeError), ((7, None), TypeError), ({7, 9}, TypeError), ((0, 9), ValueError), ((7, -9), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("size", "error"), BAD_SIZES)
def test_sizes__that_are_none(every: dict[str, Any], size: Any, error: type[Exception]) -> None:
    root = every["root"]
    for make in (
        lambda: GTA5(root / "g", size=size),
        lambda: Synthia(root / "s", size=size),
        lambda: Cityscapes(root / "c", "val", size=size),
        lambda: SegmentationFolder(root / "o", size=size),
        lambda: StreetScenes(2, size=size),
        lambda: KeyedCrops(every["gta5"], size, seed=0, stream=0),
    ):
        refusal(make, "`size` must be", error)


def test_sizes__lists_and_numpys_are_taken(every: dict[str, Any], tmp_path: Path) -> None:
    for size in ([8, 16], (np.int64(8), np.int32(16))):
        data = GTA5(every["gta5"].root, size=size)
        assert data[0].image.shape == (3, 8, 16)
        assert len(CachedSamples(data, tmp_path / "cache", progress=False)) == 3
        assert KeyedCrops(data, size, seed=0, stream=0)[0][0].shape == (3, 8, 16)
    assert SegmentationFolder(every["root"] / "o", size=(16, 8))[0].image.shape == (3, 16, 8)


def folder(*arguments: object, **options: Any) -> SegmentationFolder:
    return SegmentationFolder(None, ".", *arguments, **options)


RULE = r"ids in 0..65535 or \(R, G, B\)"
INTS = r"`mapping` must go from ints or \(R, G, B\) to ints"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StreetScenes(0), ValueError, "`length` must be at least 1"),
        (lambda: StreetScenes(2.0), TypeError, "`length` must be an int, got float"),
        (lambda: StreetScenes(length=True), TypeError, "`length` must be an int, got bool"),
        (lambda: StreetScenes("2"), TypeError, "`length` must be an int, got str"),
        (lambda: StreetScenes(2, seed=0.5), TypeError, "`seed` must be an int"),
        (lambda: StreetScenes(1, seed=-1), ValueError, "`seed` must not be negative"),
        (lambda: StreetScenes(1, domain="real"), ValueError, "`domain` must be one of 'source', 'target'"),
        (lambda: StreetScenes(1, size=(8, 64)), ValueError, "at least 16 pixels"),
        (lambda: StreetScenes(1, size=None), TypeError, r"`size` must be \(height, width\), .*, got None"),  # type: ignore[arg-type]
        (lambda: StreetScenes(1).write("x", layout="synthia"), ValueError, "`layout` must be one of"),
        (lambda: folder(num_classes=0), ValueError, "`num_classes` must be at least 1, got 0"),
        (lambda: folder(num_classes=256), ValueError, "`num_classes` must be at most 255, got 256"),
        (lambda: folder(num_classes=5.0), TypeError, "`num_classes` must be an int"),
        (lambda: folder(ignore_index=-1), ValueError, "`ignore_index` must not be negative"),
        (lambda: folder(ignore_index=256), ValueError, "`ignore_index` must be at most 255"),
        (lambda: folder({"7": 0}), TypeError, INTS),
        (lambda: folder({7: 0.0}), TypeError, INTS),
        (lambda: folder({3: 256}), ValueError, "must give train ids in 0..255, got 256 for 3"),
        (lambda: folder({70_000: 1}), ValueError, RULE),
        (lambda: folder({(1, 2): 1}), ValueError, RULE),
        (lambda: folder({(1, 2, 3): 1, 4: 1}), ValueError, "either ids or colours"),
        (lambda: folder({}), ValueError, "must not be empty"),
        (lambda: folder(unlisted="skip"), ValueError, "`unlisted` must be one of"),
        (lambda: SegmentationFolder(None), ValueError, "must not both be False"),
        (lambda: KeyedCrops(StreetScenes(1), (8, 8), seed=-1, stream=0), ValueError, "non-negative"),
        (lambda: KeyedCrops([], (8, 8), seed=0, stream=0), ValueError, "must not be empty"),
    ],
    ids=range(26),
)
def test_arguments__that_are_wrong(make: Callable[[], object], error: type[Exception], message: str) -> None:
    refusal(make, message, error)


def test_crops__a_small_image_is_named_left_out_or_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs(tmp_path)
    small, ids_of_it = picture(7, 20, seed=1), ids(7, 20, seed=1)
    save(tmp_path / "images" / "b.png", small)
    save(tmp_path / "labels" / "b.png", ids_of_it)
    data = SegmentationFolder(tmp_path)
    strict, lenient, padded = (
        KeyedCrops(data, (10, 16), seed=0, stream=0, **options) for options in ({}, {"skip": 1}, {"pad": True})
    )
    reason = r"images/b\.png: the image is 7 x 20, smaller than the crop of 10 x 16"
    said = refusal(lambda: [strict[draw] for draw in range(3)], reason)
    for draw in range(30):
        image, label = padded[draw]
        assert lenient[draw][0].shape == image.shape == (3, 10, 16)
        assert label.shape == (10, 16)
        if padded.index(draw) != 1:
            assert torch.equal(image, lenient[draw][0])
            assert torch.equal(label, lenient[draw][1])
            continue
        assert not image[:, 7:].any()
        assert label[7:].unique().tolist() == [255]
        [left] = [x for x in range(5) if np.array_equal(image[:, :7].permute(1, 2, 0), small[:, x : x + 16])]
        assert np.array_equal(label[:7], ids_of_it[:, left : left + 16])
    assert lenient.skipped == {1: said}
    assert len(caplog.records) == 1
    assert padded.skipped == {}
    tall = KeyedCrops(data, (30, 50), seed=0, stream=0, pad=True)  # smaller in both directions
    image, label = tall[0]
    sample = data[tall.index(0)]
    height, width = sample.label.shape
    assert torch.equal(image[:, :height, :width], sample.image)
    assert int((label == 255).sum()) == 30 * 50 - height * width


def test_crops__unlabelled_padded_and_of_a_cache(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path))
    reason = r"[abc](\.png)?: the image is 12 x 20, smaller than the crop of 16 x 24"
    for samples in (
        SegmentationFolder(tmp_path / "images"),
        CachedSamples(data, tmp_path / "cache", progress=False),
        [sample._replace(label=None) for sample in data],
    ):
        image, label = KeyedCrops(samples, (16, 24), seed=0, stream=0, pad=True)[2]
        assert image.shape == (3, 16, 24)
        assert label.shape == (16, 24)
        assert label[12:].unique().tolist() == [255]
        refusal(partial(KeyedCrops(samples, (16, 24), seed=0, stream=0).__getitem__, 2), reason)


def test_crops__what_they_add_has_the_ignore_index_of_the_samples(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path), num_classes=5, ignore_index=11)
    listed = [sample._replace(label=None) for sample in data]
    for samples, given, want in (
        (data, None, 11),
        (CachedSamples(data, tmp_path / "cache", progress=False), None, 11),
        (data, 7, 7),
        (listed, None, 255),
        (listed, 11, 11),
    ):
        label = KeyedCrops(samples, (16, 24), seed=0, stream=0, pad=True, ignore_index=given)[2][1]
        assert label[12:].unique().tolist() == label[:, 20:].unique().tolist() == [want]
        assert samples is not listed or label.unique().tolist() == [want]
    for given, error, message in (
        (256, ValueError, r"must lie in 0\.\.255, got 256"),
        (0.5, TypeError, "must be an int"),
    ):
        make = partial(KeyedCrops, data, (16, 24), seed=0, stream=0, ignore_index=given)
        refusal(make, f"`ignore_index` {message}", error)


def test_crops__draws_are_whole_numbers_from_0() -> None:
    crops = KeyedCrops(StreetScenes(2), (8, 8), seed=0, stream=0)
    assert torch.equal(crops[np.int64(5)][0], crops[5][0])
    refusal(lambda: crops[-1], "numbered from 0, got -1", IndexError)
    for draw in (slice(2), 1.0, None):
        refusal(partial(crops.__getitem__, draw), "cannot be interpreted as an integer", TypeError)
