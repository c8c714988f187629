"""`SegmentationFolder` on the folders that people have, name lists, class files, and what any data set promises."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset

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
)
from crossmix.datasets.__main__ import main
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


# ------------------------------------------------------------------------------------------ Samples that a loader takes


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_samples__collate_in_a_plain_loader(tmp_path: Path, labelled: bool, workers: int) -> None:
    pairs(tmp_path)
    data = SegmentationFolder(tmp_path / "images", tmp_path / "labels" if labelled else None)
    (batch, rest) = DataLoader(data, batch_size=2, num_workers=workers)
    assert isinstance(batch, Sample)
    assert batch.image.shape == (2, 3, 12, 20)
    want = np.stack([ids(seed=i) for i in range(2)]) if labelled else np.full((2, 12, 20), 255, np.uint8)
    assert batch.label.dtype == torch.uint8
    assert np.array_equal(batch.label.numpy(), want)
    assert list(batch.name) == ["a", "b"]
    assert rest.image.shape == (1, 3, 12, 20)


def test_unlabelled__in_crops_and_in_a_cache(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path) / "images", ignore_index=200)
    cached = CachedSamples(data, tmp_path / "cache", progress=False)
    for sample in (data[1], cached[1]):
        assert sample.label.unique().tolist() == [200]
    image, label = KeyedCrops(cached, (4, 4), seed=0, stream=0)[3]
    assert torch.equal(image, KeyedCrops(data, (4, 4), seed=0, stream=0)[3][0])
    assert label.unique().tolist() == [200]
    with pytest.raises(DataError, match="3 samples have no label map"):
        class_counts(data)


def mirrored(sample: Sample, *, named: str) -> Sample:
    return Sample(sample.image.flip(-1), sample.label.flip(-1), named + sample.name)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_transform__takes_each_sample_in_the_workers(tmp_path: Path, labelled: bool, context: str) -> None:
    pairs(tmp_path)
    folders = (tmp_path / "images", tmp_path / "labels" if labelled else None)
    plain = SegmentationFolder(*folders)
    data = SegmentationFolder(*folders, transform=partial(mirrored, named="mirrored "))
    batch = next(iter(DataLoader(data, batch_size=3, num_workers=2, multiprocessing_context=context)))
    for i, sample in enumerate(plain):
        assert torch.equal(batch.image[i], sample.image.flip(-1))
        assert torch.equal(batch.label[i], sample.label.flip(-1))
        assert batch.name[i] == f"mirrored {sample.name}"


def test_transform__may_return_anything_and_is_not_cached(tmp_path: Path) -> None:
    pairs(tmp_path)
    data = SegmentationFolder(tmp_path, transform=lambda sample: {"pixels": sample.image.float() / 255})
    assert next(iter(DataLoader(data, batch_size=3)))["pixels"].max() <= 1
    with pytest.raises(ValueError, match="`samples` must have no `transform`"):
        CachedSamples(data, tmp_path / "cache")
    assert torch.equal(class_counts(data), class_counts(SegmentationFolder(tmp_path)))  # of the files
    with pytest.raises(TypeError, match="`transform` must be callable, got str"):
        SegmentationFolder(tmp_path, transform="flip")


# ------------------------------------------------------------------------------------------------------------ Class ids


def test_num_classes__ids_at_or_beyond_it_are_refused(tmp_path: Path) -> None:
    pairs(tmp_path)
    save(tmp_path / "labels" / "b.png", ids() + 1)  # 1..5, for five classes
    assert len(SegmentationFolder(tmp_path)) == 3
    assert SegmentationFolder(tmp_path)[1].label.max() == 5  # nobody has said how many there are
    data = SegmentationFolder(tmp_path, num_classes=5)
    assert data.num_classes == 5
    assert data[0].label.max() == 4
    with pytest.raises(
        DataError, match=r"labels/b\.png: holds \[5\], but 5 classes have the ids 0\.\.4, and ignored pixels 255"
    ):
        data[1]
    for count in (
        partial(class_counts, data),
        lambda: [KeyedCrops(data, (4, 4), seed=0, stream=0)[i] for i in range(3)],
    ):
        with pytest.raises(DataError, match=r"b\.png: holds \[5\]"):
            count()
    assert SegmentationFolder(tmp_path, num_classes=6)[1].label.max() == 5
    assert SegmentationFolder(tmp_path, num_classes=5, ignore_index=5)[1].label.max() == 5
    save(tmp_path / "labels" / "b.png", np.full((12, 20), 255, np.uint8))
    assert data[1].label.unique().tolist() == [255]
    with pytest.raises(DataError, match=r"holds \[255\]"):
        SegmentationFolder(tmp_path, num_classes=5, ignore_index=5)[1]


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
        with pytest.raises(DataError, match=rf"{said}; pass `labels`, or leave out `{given}`"):
            SegmentationFolder(root, **options)
        assert not SegmentationFolder(root).labelled


@pytest.mark.parametrize("value", range(256))
def test_num_classes__every_id(tmp_path: Path, value: int) -> None:
    save(tmp_path / "l.png", np.full((2, 3), value, np.uint8))
    data = SegmentationFolder(None, tmp_path, num_classes=19)
    if value < 19 or value == 255:
        assert data[0].label.unique().tolist() == [value]
    else:
        with pytest.raises(DataError, match=rf"l\.png: holds \[{value}\]"):
            data[0]


def test_num_classes__that_of_the_mapping(tmp_path: Path) -> None:
    pairs(tmp_path)
    mapping = {0: 255, 1: 0, 2: 1, 3: 2, 4: 2}
    assert SegmentationFolder(tmp_path, None, mapping).num_classes == 3
    assert SegmentationFolder(tmp_path, None, mapping, num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match=r"has the train id 2, but 2 classes have the ids 0\.\.1"):
        SegmentationFolder(tmp_path, None, mapping, num_classes=2)
    with pytest.raises(ValueError, match="has the train id 255, but 3 classes"):
        SegmentationFolder(tmp_path, None, mapping, num_classes=3, ignore_index=100)
    ignoring = SegmentationFolder(tmp_path, None, {1: 0}, unlisted="ignore", ignore_index=9)
    assert ignoring[0].label.unique().tolist() == [0, 9]


# ----------------------------------------------------------------------------------------------- Which folders they are


def test_root__with_images_and_labels(tmp_path: Path) -> None:
    data = SegmentationFolder(pairs(tmp_path, ["a", "sub/b"]))
    assert [(sample.name, sample.label.max() < 5) for sample in data] == [("a", True), ("b", True)]


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
    with pytest.raises(DataError) as caught:
        SegmentationFolder(tmp_path)
    assert instead.format(root=tmp_path) in str(caught.value)


def test_root__above_is_said_by_official_readers_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    StreetScenes(1).write(tmp_path / "g" / "unpacked", layout="gta5")
    StreetScenes(1).write(tmp_path / "c" / "unpacked", layout="cityscapes")
    for folder, read in (("g", GTA5), ("c", Cityscapes)):
        with pytest.raises(DataError, match=rf"did you mean {tmp_path / folder}/unpacked\?"):
            read(tmp_path / folder)
        assert main(["check", str(tmp_path / folder)]) == 2
        assert f"did you mean {tmp_path / folder}/unpacked?" in capsys.readouterr().err
    classes = tmp_path / "classes.json"
    classes.write_text('["a"]', encoding="utf-8")
    assert main(["check", str(tmp_path / "g"), "--classes", str(classes)]) == 2
    assert f"did you mean {tmp_path / 'g'}/unpacked?" in capsys.readouterr().err


def test_folders__one_for_both_is_refused(tmp_path: Path) -> None:
    pairs(tmp_path)
    for given in (tmp_path, tmp_path / "images", tmp_path / "*" / "*.png"):
        with pytest.raises(DataError, match="is given for both images and labels"):
            SegmentationFolder(given, f"{given}/")


def test_patterns__endings_in_any_case_and_of_any_kind(tmp_path: Path) -> None:
    save(tmp_path / "[1] a_img.JPG", picture())
    save(tmp_path / "[1] b_img.png", picture())
    for name in "ab":
        save(tmp_path / f"[1] {name}_ids.PNG", ids())
    (tmp_path / "[1] a_img.json").write_text("{}", encoding="utf-8")
    data = SegmentationFolder(tmp_path / "[1] *_img.*", tmp_path / "[1] *_ids.png")
    assert [sample.name for sample in data] == ["a", "b"]
    assert len(SegmentationFolder(tmp_path / "*_img.jpg")) == 1


# ----------------------------------------------------------------------------------------------------- Names, and lists


@pytest.fixture
def sequences(tmp_path: Path) -> SegmentationFolder:
    return SegmentationFolder(pairs(tmp_path, ["seq1/000000", "seq1/000001", "seq2/000000", "seq10/000000"]))


def test_names__are_unique_where_folders_repeat_stems(tmp_path: Path, sequences: SegmentationFolder) -> None:
    assert [file.name for file in sequences.files] == ["seq1/000000", "seq1/000001", "seq10/000000", "seq2/000000"]
    assert [file.name for file in SegmentationFolder(pairs(tmp_path / "u", ["x/1", "y/2"])).files] == ["1", "2"]
    for city in ("a", "b"):
        save(tmp_path / "leftImg8bit" / "val" / city / "1_leftImg8bit.png", picture())
    assert [file.name for file in Cityscapes(tmp_path, "val", labels=False).files] == ["a/1", "b/1"]


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
def test_lists__in_every_form(
    tmp_path: Path, sequences: SegmentationFolder, encode: Callable[[list[str]], bytes]
) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(encode(["seq2/000000", "seq1/000001"]))
    data = SegmentationFolder(tmp_path, names=path)
    assert [file.name for file in data.files] == ["seq1/000001", "seq2/000000"]
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
    path = tmp_path / "list.txt"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        SegmentationFolder(tmp_path, names=path)
    assert len(sequences) == 4


def test_lists__of_whole_paths_and_of_parts_that_tell(tmp_path: Path) -> None:
    pairs(tmp_path, ["seq1/000000", "seq1/000001", "seq10/000000"])
    path = tmp_path / "list.txt"
    linked = tmp_path.with_name(tmp_path.name + "-linked")
    linked.symlink_to(tmp_path)
    for root in (tmp_path, linked):
        path.write_text(str(tmp_path / "images" / "seq10" / "000000.png"), encoding="utf-8")
        assert [file.name for file in SegmentationFolder(root, names=path).files] == ["seq10/000000"]
    pairs(tmp_path / "dots", ["a.v1", "a.v2", "b"])
    path.write_text("a.v2\nb.png\nb\n", encoding="utf-8")
    assert [file.name for file in SegmentationFolder(tmp_path / "dots", names=path).files] == ["a.v2", "b"]
    path.write_text("000001", encoding="utf-8")  # there is only one
    assert [file.name for file in SegmentationFolder(tmp_path, names=path).files] == ["seq1/000001"]


@pytest.mark.parametrize(
    "line", ["{stem}", "{stem}_leftImg8bit.png", "street/{stem}", "leftImg8bit/val/street/{stem}_leftImg8bit.png"]
)
def test_lists__of_cityscapes(tmp_path: Path, line: str) -> None:
    StreetScenes(3).write(tmp_path, layout="cityscapes", split="val")
    path = tmp_path / "list.txt"
    path.write_text(line.format(stem="street_000001_000019"), encoding="utf-8-sig")
    for options in ({}, {"labels": False}):
        data = Cityscapes(tmp_path, "val", names=path, **options)
        assert [file.name for file in data.files] == ["street_000001_000019"]


def test_lists__two_lines_for_one_file_are_not_taken_for_two(tmp_path: Path) -> None:
    StreetScenes(2).write(tmp_path, layout="gta5")
    path = tmp_path / "list.txt"
    path.write_text("seq1/00001.png\nseq2/00001.png\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"names seq1/00001\.png and seq2/00001\.png, but there is only"):
        GTA5(tmp_path, names=path)


# ---------------------------------------------------------------------------------------------------------- The command


MAPPINGS = {
    "names": ["first", "second", "third", "fourth", "fifth"],
    "ids": {"0": 0, "1": 1, "2": 2, "3": 2, "4": 255},
    "both": {
        "classes": ["first", "second", "third"], "mapping": {"0": "first", "1": 1, "2": "third", "3": 2, "4": 255}
    },
}  # fmt: skip
COLORS = [(128, 64, 128), (0, 0, 142), (1, 2, 3), (9, 9, 9), (0, 0, 0)]


@pytest.mark.parametrize("form", [*MAPPINGS, "colours", "hex"])
def test_command__classes_of_your_own(tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
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
    ways = ([str(tmp_path)], ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")])
    for i, way in enumerate(ways):
        assert main(["check", *way, "--classes", str(classes)]) == 0
        assert "your own: 3 images, 3 label maps of mapped ids, 3 pairs" in capsys.readouterr().out
        assert main(["stats", *way, "--classes", str(classes), "--out", str(tmp_path / f"{i}.jsonl")]) == 0
        out = capsys.readouterr().out
        for value, name in enumerate(names):
            row = next(line.split() for line in out.splitlines() if line.split()[0] == name)
            assert row[1] == str(int((want == value).sum()))
    save(tmp_path / "labels" / "b.png", ids(classes=6) if form in MAPPINGS else picture())
    assert main(["check", str(tmp_path), "--classes", str(classes)]) == 1
    assert capsys.readouterr().out.count("labels/b.png: holds [") == 1
    assert main(["stats", str(tmp_path), "--classes", str(classes)]) == 2
    assert "labels/b.png: holds [" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", "[1]", '["a", "a"]', '{"classes": ["a"], "ids": {}}', '{"classes": "ab"}',
        '{"classes": ["a"], "mapping": []}', '{"classes": ["a"], "mapping": {"3": 1}}', '{"1": "road"}', '{"1": 0.5}',
        '{"1": true}', '{"1": 256}', '{"-1": 0}', '{"70000": 0}', '{"#12345": 0}', '{"1, 2": 0}', '{"1, 2, 300": 0}',
        '{"1": 0, "01": 1}', '{"1": 0, "#000000": 1}', "{", "7", json.dumps([str(i) for i in range(256)]),
    ],
    ids=range(22),
)  # fmt: skip
def test_class_files__that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"classes\.json: is not a file of classes \(.*\); expected a list of names"
    ) as caught:
        read_classes(path)
    assert ".)" not in str(caught.value)
    with pytest.raises(DataError, match=r"none\.json: cannot be read"):
        read_classes(tmp_path / "none.json")


def test_command__unlabelled_images_of_your_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "grey.png", ids(classes=200))
    save(tmp_path / "b.jpg", picture())
    assert main(["check", "--images", str(tmp_path)]) == 0
    assert "your own: 2 images, 0 label maps" in capsys.readouterr().out
    (tmp_path / "sub").mkdir()
    assert main(["check", "--images", str(tmp_path / "sub")]) == 2
    (tmp_path / "sub" / "a.tif").write_bytes(b"II*\0")
    assert main(["check", "--images", str(tmp_path / "sub")]) == 2
    assert "left out, being neither PNG nor JPEG: 1 .tif" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["images", "labels"])
@pytest.mark.parametrize("form", ["root", "folders", "patterns"])
def test_command__says_that_there_are_none_of_a_kind(
    tmp_path: Path, missing: str, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, pixels in (("images", picture()), ("labels", ids())):
        if kind != missing:
            save(tmp_path / kind / "a.png", pixels)
    (tmp_path / missing).mkdir()
    classes = put_classes(tmp_path)
    arguments = {
        "root": [str(tmp_path)],
        "folders": ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")],
        "patterns": ["--images", str(tmp_path / "images" / "*.png"), "--labels", str(tmp_path / "labels" / "*.png")],
    }[form]
    assert main(["check", *arguments, "--classes", str(classes)]) == 2
    assert f"has no {'images' if missing == 'images' else 'label maps'}, PNG or JPEG" in capsys.readouterr().err


def put_classes(folder: Path) -> Path:
    path = folder / "classes.json"
    path.write_text('["a", "b", "c", "d", "e"]', encoding="utf-8")
    return path


@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes__of_an_image_that_was_turned_are_not_advised_away(
    tmp_path: Path, orientation: int, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "labels" / "a.png", ids()[:5])
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    width = 7 if orientation == 1 else ids().shape[1]
    Image.new("RGB", (width, 5)).save(tmp_path / "images" / "a.jpg", exif=exif)
    with pytest.raises(DataError) as caught:
        SegmentationFolder(tmp_path)[0]
    main(["check", str(tmp_path), "--classes", str(put_classes(tmp_path))])
    for text in (str(caught.value), capsys.readouterr().out):
        assert ("EXIF" in text) == (orientation == 6)
        assert ("pass `size=`" in text) == (orientation == 1)


def test_command__finds_images_smaller_than_the_crop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StreetScenes(3).write(tmp_path, layout="gta5")
    for folder in ("images", "labels"):
        with Image.open(tmp_path / folder / "00002.png") as opened:
            small = opened.crop((0, 0, 100, 50))
        small.save(tmp_path / folder / "00002.png")
    assert main(["check", str(tmp_path)]) == 0
    assert main(["check", str(tmp_path), "--crop", "50x100"]) == 0
    assert main(["check", str(tmp_path), "--crop", "64x64", "--workers", "2"]) == 1
    assert f"{tmp_path}/images/00002.png: is 50 x 100, smaller than the crop 64 x 64" in capsys.readouterr().out
    assert main(["check", str(tmp_path), "--crop", "200"]) == 1
    assert capsys.readouterr().out.count("smaller than the crop 200 x 200") == 3
    for wrong in (["--crop", "0x64"], ["--crop", "x"], ["--workers", "-1"]):
        with pytest.raises(SystemExit):
            main(["check", str(tmp_path), *wrong])


# ------------------------------------------------------------------------------------------- What each of them promises


@pytest.fixture
def every(tmp_path: Path) -> dict[str, Any]:
    """Each data set, of three samples."""
    StreetScenes(3).write(tmp_path / "g", layout="gta5")
    StreetScenes(3).write(tmp_path / "c", layout="cityscapes", split="val")
    for i in range(3):
        save(tmp_path / "s" / "RGB" / f"{i}.png", picture())
        save(tmp_path / "s" / "GT" / "LABELS" / f"{i}.png", ids() + 1)
    gta5 = GTA5(tmp_path / "g")
    return {
        "gta5": gta5,
        "synthia": Synthia(tmp_path / "s"),
        "cityscapes": Cityscapes(tmp_path / "c", "val"),
        "folder": SegmentationFolder(pairs(tmp_path / "o")),
        "street scenes": StreetScenes(3),
        "cached": CachedSamples(gta5, tmp_path / "cache", progress=False),
    }


@pytest.mark.parametrize("name", ["gta5", "synthia", "cityscapes", "folder", "street scenes", "cached"])
def test_items__by_any_int_and_nothing_else(every: dict[str, Any], name: str) -> None:
    data = every[name]
    whole = list(data)  # ends by itself
    assert len(whole) == len(data) == 3
    for i in range(3):
        for index in (i, i - 3, np.int64(i), np.int32(i - 3), torch.tensor(i)):
            assert data[index].name == whole[i].name
            assert torch.equal(data[index].image, whole[i].image)
    for index in (3, -4, 10**6, np.int64(3)):
        with pytest.raises(IndexError, match="out of range for 3 samples"):
            data[index]
    for index in (slice(0, 2), 1.0, "1", None, (0, 1), [0]):
        with pytest.raises(TypeError, match="is indexed by an int, got"):
            data[index]


@pytest.mark.parametrize("name", ["gta5", "synthia", "cityscapes", "folder", "street scenes", "cached"])
def test_class_counts__of_any_data_set_and_its_parts(every: dict[str, Any], name: str) -> None:
    data = every[name]
    want = torch.stack([torch.bincount(sample.label.flatten().long(), minlength=256) for sample in data])
    assert torch.equal(class_counts(data), want)
    part = Subset(Subset(data, [2, 0]), [1, 0, 0])
    assert torch.equal(class_counts(part), want[[0, 2, 2]])
    assert torch.equal(class_counts(ConcatDataset([part, data])), torch.cat([want[[0, 2, 2]], want]))


def test_class_counts__of_samples_refuses(every: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`cache` stores counts of label files, but StreetScenes has none"):
        class_counts(every["street scenes"], cache=tmp_path / "counts.jsonl")
    bare = CachedSamples(GTA5(tmp_path / "g", labels=False), tmp_path / "bare", progress=False)
    with pytest.raises(DataError, match="sample 0 of CachedSamples has no label"):
        class_counts(bare)
    for wrong, error in ((-1, ValueError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="`workers` must"):
            class_counts(every["gta5"], workers=wrong)
    scene = every["street scenes"][0]
    with pytest.raises(DataError, match=r"labels outside 0\.\.255"):
        class_counts([scene._replace(label=scene.label.long() - 1)])
    for item in (tuple(scene), scene._asdict()):
        with pytest.raises(TypeError, match=f"must hold items with a `label`, .* got {type(item).__name__}"):
            class_counts([item])
    with pytest.raises(TypeError, match="must have a length and items, got generator"):
        class_counts(iter_of(scene))
    with pytest.raises(TypeError, match="must have a length and items, got LongStream"):
        class_counts(LongStream())


class LongStream(IterableDataset[Sample]):
    """A stream with a length; `Dataset` has a `__getitem__`, which raises."""

    def __iter__(self) -> Iterator[Sample]:
        return iter([])

    def __len__(self) -> int:
        return 1


def iter_of(scene: Sample) -> Any:
    return (sample for sample in [scene])


BAD_SIZES = [
    (7, TypeError), ("12x20", TypeError), ((7.0, 9), TypeError), ((7, 9, 3), TypeError), ((7,), TypeError),
    ((True, 9), TypeError), ((7, None), TypeError), ({7, 9}, TypeError), ((0, 9), ValueError), ((7, -9), ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("size", "error"), BAD_SIZES)
def test_sizes__that_are_none(every: dict[str, Any], tmp_path: Path, size: Any, error: type[Exception]) -> None:
    makers: tuple[Callable[[], object], ...] = (
        lambda: GTA5(tmp_path / "g", size=size),
        lambda: Synthia(tmp_path / "s", size=size),
        lambda: Cityscapes(tmp_path / "c", "val", size=size),
        lambda: SegmentationFolder(tmp_path / "o", size=size),
        lambda: StreetScenes(2, size=size),
    )
    for make in makers:
        with pytest.raises(error, match="`size` must be"):
            make()
    with pytest.raises(error, match="`size` must be"):
        KeyedCrops(every["gta5"], size, seed=0, stream=0)


def test_sizes__lists_and_numpys_are_taken(tmp_path: Path) -> None:
    StreetScenes(1).write(tmp_path, layout="gta5")
    for size in ([8, 16], (np.int64(8), np.int32(16))):
        data = GTA5(tmp_path, size=size)
        assert data[0].image.shape == (3, 8, 16)
        assert len(CachedSamples(data, tmp_path / "cache", progress=False)) == 1
        assert KeyedCrops(data, size, seed=0, stream=0)[0][0].shape == (3, 8, 16)
    assert SegmentationFolder(tmp_path / "images", size=(16, 8))[0].image.shape == (3, 16, 8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StreetScenes(2.0), TypeError, "`length` must be an int, got float"),
        (lambda: StreetScenes(length=True), TypeError, "`length` must be an int, got bool"),
        (lambda: StreetScenes("2"), TypeError, "`length` must be an int, got str"),
        (lambda: StreetScenes(2, seed=0.5), TypeError, "`seed` must be an int"),
        (lambda: SegmentationFolder(None, ".", num_classes=0), ValueError, "`num_classes` must be at least 1, got 0"),
        (
            lambda: SegmentationFolder(None, ".", num_classes=256),
            ValueError,
            "`num_classes` must be at most 255, got 256",
        ),
        (lambda: SegmentationFolder(None, ".", num_classes=5.0), TypeError, "`num_classes` must be an int"),
        (lambda: SegmentationFolder(None, ".", ignore_index=-1), ValueError, "`ignore_index` must not be negative"),
        (lambda: SegmentationFolder(None, ".", ignore_index=256), ValueError, "`ignore_index` must be at most 255"),
        (
            lambda: SegmentationFolder(None, ".", {"7": 0}),
            TypeError,
            r"`mapping` must go from ints or \(R, G, B\) to ints",
        ),
        (lambda: SegmentationFolder(None, ".", {7: 0.0}), TypeError, "`mapping` must go from ints"),
        (lambda: KeyedCrops(StreetScenes(1), (8, 8), seed=-1, stream=0), ValueError, "non-negative"),
    ],
    ids=range(12),
)
def test_arguments__of_the_wrong_kind(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# ----------------------------------------------------------------------------------------- Images smaller than the crop


def test_crops__a_small_image_is_named_left_out_or_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs(tmp_path)
    small, ids_of_it = picture(7, 20, seed=1), ids(7, 20, seed=1)
    save(tmp_path / "images" / "b.png", small)
    save(tmp_path / "labels" / "b.png", ids_of_it)
    data = SegmentationFolder(tmp_path)
    strict = KeyedCrops(data, (10, 16), seed=0, stream=0)
    with pytest.raises(
        DataError, match=r"images/b\.png: the image is 7 x 20, smaller than the crop of 10 x 16"
    ) as caught:
        [strict[draw] for draw in range(3)]
    lenient = KeyedCrops(data, (10, 16), seed=0, stream=0, skip=1)
    padded = KeyedCrops(data, (10, 16), seed=0, stream=0, pad=True)
    for draw in range(30):
        image, label = padded[draw]
        assert image.shape == (3, 10, 16)
        assert label.shape == (10, 16)
        if padded.index(draw) != 1:
            assert torch.equal(image, lenient[draw][0])
            assert torch.equal(label, lenient[draw][1])
            continue
        assert lenient[draw][0].shape == (3, 10, 16)
        assert not image[:, 7:].any()
        assert label[7:].unique().tolist() == [255]
        lefts = [x for x in range(5) if np.array_equal(image[:, :7].permute(1, 2, 0), small[:, x : x + 16])]
        assert len(lefts) == 1
        assert np.array_equal(label[:7], ids_of_it[:, lefts[0] : lefts[0] + 16])
    assert list(lenient.skipped) == [1]
    assert lenient.skipped[1] == str(caught.value)
    assert len(caplog.records) == 1
    assert padded.skipped == {}
    tall = KeyedCrops(data, (30, 50), seed=0, stream=0, pad=True)  # smaller in both directions
    image, label = tall[0]
    sample = data[tall.index(0)]
    height, width = sample.label.shape
    assert torch.equal(image[:, :height, :width], sample.image)
    assert int((label == 255).sum()) == 30 * 50 - height * width


def test_crops__unlabelled_padded_and_of_a_cache(tmp_path: Path) -> None:
    pairs(tmp_path)
    for data in (
        SegmentationFolder(tmp_path / "images"),
        CachedSamples(SegmentationFolder(tmp_path), tmp_path / "cache", progress=False),
        [sample._replace(label=None) for sample in SegmentationFolder(tmp_path)],
    ):
        image, label = KeyedCrops(data, (16, 24), seed=0, stream=0, pad=True)[2]
        assert image.shape == (3, 16, 24)
        assert label.shape == (16, 24)
        assert label[12:].unique().tolist() == [255]
        with pytest.raises(DataError, match=r"[abc](\.png)?: the image is 12 x 20, smaller than the crop of 16 x 24"):
            KeyedCrops(data, (16, 24), seed=0, stream=0)[2]


def test_crops__draws_are_whole_numbers_from_0() -> None:
    crops = KeyedCrops(StreetScenes(2), (8, 8), seed=0, stream=0)
    assert torch.equal(crops[np.int64(5)][0], crops[5][0])
    with pytest.raises(IndexError, match="numbered from 0, got -1"):
        crops[-1]
    for draw in (slice(2), 1.0, None):
        with pytest.raises(TypeError):
            crops[draw]


def test_real_images__as_jpeg(test_data: Path, tmp_path: Path) -> None:
    """CamVid, saved again as photographs are, with links to its own label maps."""
    day = test_data / "camvid" / "day"
    paths = sorted((day / "images").glob("*.png"))[:4]
    (tmp_path / "images").mkdir()
    for path in paths:
        with Image.open(path) as opened:
            opened.convert("RGB").save(tmp_path / "images" / f"{path.stem}.JPG", quality=95)
    (tmp_path / "labels").symlink_to(day / "labels")
    data = SegmentationFolder(tmp_path, num_classes=12)
    for i, path in enumerate(paths):
        with Image.open(path) as opened:
            original = np.asarray(opened.convert("RGB")).astype(int)
        assert np.abs(data[i].image.permute(1, 2, 0).numpy() - original).mean() < 3
        with Image.open(day / "labels" / path.name) as opened:
            assert np.array_equal(data[i].label, np.asarray(opened))
    with pytest.raises(DataError, match=r"holds \[11\], but 11 classes have the ids 0\.\.10"):
        [SegmentationFolder(tmp_path, num_classes=11)[i] for i in range(4)]
