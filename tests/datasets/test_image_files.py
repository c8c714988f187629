"""Which files count as images, by every way to list them, and how PNG and JPEG files of any kind are read."""

import io
import os
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from checks import refusal
from crossmix.datasets import (
    GTA5,
    CachedSamples,
    Cityscapes,
    DataError,
    SegmentationFolder,
    Synthia,
    image_files,
    image_size,
    read_image,
)
from crossmix.datasets import _images as images
from oracles import seeded


def picture(height: int = 12, width: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth, so that JPEG keeps most of it."""
    noise = torch.rand(1, 3, 4, 5, generator=seeded(seed))
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")[0]
    return (smooth * 255).byte().permute(1, 2, 0).numpy()


def encoded(array: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def png(path: Path, array: np.ndarray | None = None) -> Path:
    return put(path, encoded(picture() if array is None else array, "png"))


def names(folder: Path, **options: bool) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in image_files(folder, **options).files]


def pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def shown(path: Path) -> np.ndarray:
    """By Pillow: turned, in colour."""
    with Image.open(path) as opened:
        return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))


def test_listing__by_ending_in_any_case_or_by_content(tmp_path: Path) -> None:
    data = {"png": encoded(picture(), "png"), "jpeg": encoded(picture(), "jpeg"), "tiff": encoded(picture(), "tiff")}
    for name, kind in (
        ("a.png", "png"), ("b.PNG", "png"), ("c.Jpg", "jpeg"), ("d.JPEG", "jpeg"), ("e", "png"), ("f.dat", "jpeg"),
        ("g.png", "jpeg"), ("h.jpg", "png"), ("frame.0001", "png"),
    ):  # fmt: skip
        put(tmp_path / name, data[kind])
    put(tmp_path / "empty.png", b"")  # counts, so that reading it is an error, and nothing is passed over
    for name, content in (("x.tif", data["tiff"]), ("y.txt", b"text"), ("z", b""), ("w.bmp", data["tiff"])):
        put(tmp_path / name, content)
    hidden = ("._a.png", ".h.png", ".x/a.png", "__MACOSX/a", "@eaDir/a.png", "Thumbs.db", "desktop.ini", ".DS_Store")
    for name in hidden:
        put(tmp_path / name, data["png"])
    found = image_files(tmp_path)
    assert [path.name for path in found.files] == [
        "a.png", "b.PNG", "c.Jpg", "d.JPEG", "e", "empty.png", "f.dat", "frame.0001", "g.png", "h.jpg",
    ]  # fmt: skip
    assert [path.name for path in found.left_out] == ["w.bmp", "x.tif", "y.txt", "z"]


def test_listing__follows_links_and_survives_circles(tmp_path: Path) -> None:
    png(tmp_path / "elsewhere" / "deep" / "1.png")
    root = tmp_path / "root"
    png(root / "a" / "2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "3.png").symlink_to(tmp_path / "elsewhere" / "deep" / "1.png")
    for circle, goal in (("up", root), ("a/up", root), ("a/here", root / "a"), ("self", root / "self")):
        (root / circle).symlink_to(goal)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")  # reading it will say so
    (root / "round.png").symlink_to(root / "round.png")
    assert names(root) == ["3.png", "a/2.png", "gone.png", "linked/deep/1.png", "round.png"]
    assert names(root, recursive=False) == ["3.png", "gone.png", "round.png"]
    data = SegmentationFolder(root)
    assert len(data) == 5
    for i, error in ((2, "no such file"), (4, "cannot be read")):
        refusal(partial(data.__getitem__, i), rf"{data.files[i].image}: {error}")
    for left, right in (("p", "q"), ("q", "p")):  # two folders that link to each other
        (tmp_path / "pair" / left).mkdir(parents=True, exist_ok=True)
        (tmp_path / "pair" / left / "other").symlink_to(tmp_path / "pair" / right)
    png(tmp_path / "pair" / "p" / "1.png")
    assert names(tmp_path / "pair") == ["p/1.png", "q/other/1.png"]


def test_listing__is_sorted_and_needs_a_folder(tmp_path: Path) -> None:
    for name in ("b/2.png", "a.png", "b/10.png", "a/1.png"):
        png(tmp_path / name)
    assert names(tmp_path) == ["a/1.png", "a.png", "b/10.png", "b/2.png"]
    only_b = image_files(str(tmp_path), only=lambda path: path.startswith("b/"))
    assert only_b.files == (tmp_path / "b/10.png", tmp_path / "b/2.png")
    for bad in (tmp_path / "none", tmp_path / "a.png"):
        refusal(partial(image_files, bad), "no such folder")


def test_listing__pipes_and_locked_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    assert names(tmp_path) == ["a.png"]
    (tmp_path / "locked").mkdir(mode=0)
    if os.geteuid() == 0:  # who may read everything

        def refuse(_: object) -> object:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "scandir", refuse)
    refusal(lambda: image_files(tmp_path), r"cannot be listed \(Permission denied\)")


@pytest.mark.parametrize("reader", [
    GTA5, Synthia, Cityscapes, SegmentationFolder, image_files,
    pytest.param(lambda root: SegmentationFolder(root, f"{root}/labels", {0: 0}), id="two folders"),
    pytest.param(lambda root: SegmentationFolder(f"{root}/*.png"), id="pattern"),
])  # fmt: skip
def test_listing__a_root_that_cannot_be_entered_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Callable[[Path], object]
) -> None:
    refusal(
        lambda: reader(tmp_path / ("x" * 300)), r"x: cannot be listed|x/.*: cannot be listed \(File name too long\)"
    )
    root, look = tmp_path / "locked", Path.stat
    (root / "images").mkdir(parents=True)

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if root in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)  # root may enter everything
    if reader is not image_files:  # which looks at nothing below before it lists
        refusal(lambda: reader(root), r"locked/.*: cannot be listed \(Permission denied\); check its permissions")


@pytest.mark.parametrize("locked", ["", "images", "leftImg8bit"])
def test_check__a_folder_that_can_be_entered_and_not_listed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., str], locked: str
) -> None:
    root = tmp_path / "root"
    (root / (locked or "images")).mkdir(parents=True)

    def unless_locked(look: Callable[[object], object], path: object) -> object:
        if Path(str(path)) == root / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    for name in ("scandir", "listdir"):  # root may list everything
        monkeypatch.setattr(os, name, partial(unless_locked, getattr(os, name)))
    assert f"error: {root / locked}: cannot be listed (Permission denied)" in command(2, "check", root)


def labels(kind: str) -> np.ndarray:
    return np.full((12, 20), {"synthia": 3}.get(kind, 7), np.uint8)


READERS: dict[str, tuple[str, str, str, str, Callable[[Path], object]]] = {
    # images, labels, the ending of both names without .png
    "gta5": ("images", "labels", "", "", GTA5),
    "synthia": ("RGB", "GT/LABELS", "", "", Synthia),
    "cityscapes": (
        "leftImg8bit/val/town", "gtFine/val/town", "_leftImg8bit", "_gtFine_labelIds", lambda r: Cityscapes(r, "val")
    ),
    "folder": ("images", "labels", "", "", lambda r: SegmentationFolder(r / "images", r / "labels")),
    "root": ("images", "labels", "", "", SegmentationFolder),
    "patterns": ("images", "labels", "", "", lambda r: SegmentationFolder(r / "images/*.*", r / "labels/*.png")),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_readers__take_the_same_files(tmp_path: Path, reader: str) -> None:
    left, right, image_suffix, label_suffix, read = READERS[reader]
    png(tmp_path / left / f"a{image_suffix}.PNG")
    put(tmp_path / left / f"b{image_suffix}.JPG", encoded(picture(seed=1), "jpeg", quality=95))
    put(tmp_path / left / f"c{image_suffix}.png", encoded(picture(seed=2), "jpeg", quality=95))
    put(tmp_path / left / f"d{image_suffix}.jpeg", encoded(picture(seed=3), "png"))
    for name in "abcd":
        png(tmp_path / right / f"{name}{label_suffix}.{'Png' if name == 'c' else 'png'}", labels(reader))
    for folder, suffix in ((left, image_suffix), (right, label_suffix)):
        put(tmp_path / folder / f"._a{suffix}.png", b"macOS")
        put(tmp_path / folder / "Thumbs.db", b"Windows")
    data = read(tmp_path)
    assert [sample.name for sample in data] == list("abcd")
    for sample, file in zip(data, data.files, strict=True):
        assert np.array_equal(pixels(sample.image), shown(file.image))
    for folder in (left, right):  # the same behind links
        moved = tmp_path / "elsewhere" / folder.replace("/", "-")
        moved.parent.mkdir(exist_ok=True)
        (tmp_path / folder).rename(moved)
        (tmp_path / folder).symlink_to(moved)
    assert len(read(tmp_path)) == 4


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("other", ["{}.jpg", "{}.PNG"])  # names that differ in case alone, too
def test_readers__two_files_of_one_name_are_refused(tmp_path: Path, reader: str, other: str) -> None:
    left, right, suffix, _, read = READERS[reader]
    one, two = png(tmp_path / left / f"a{suffix}.png"), png(tmp_path / left / other.format(f"a{suffix}"))
    if len(list((tmp_path / left).iterdir())) < 2:
        pytest.skip("this disk makes no difference either")
    png(tmp_path / right / "a.png")
    said = refusal(lambda: read(tmp_path), "are two files of one name")
    assert str(one) in said
    assert str(two) in said


@pytest.mark.parametrize("reader", ["gta5", "synthia", "cityscapes", "folder", "root"])
def test_readers__say_what_was_left_out(tmp_path: Path, reader: str) -> None:
    left, right, image_suffix, label_suffix, read = READERS[reader]
    for name in "ab":
        put(tmp_path / left / f"{name}{image_suffix}.tif", encoded(picture(), "tiff"))
        png(tmp_path / right / f"{name}{label_suffix}.png")
    refusal(lambda: read(tmp_path), r"left out, being neither PNG nor JPEG: 2 \.tif, such as .*a\w*\.tif")
    for name in "ab":
        png(tmp_path / left / f"{name}{image_suffix}.png")
    (tmp_path / right / f"b{label_suffix}.png").unlink()
    put(tmp_path / right / f"b{label_suffix}.bmp", encoded(picture(), "bmp"))
    refusal(lambda: read(tmp_path), r"b has no label map \(left out, being neither PNG nor JPEG: 1 \.bmp")


def test_check__names_images_of_other_types(tmp_path: Path, command: Callable[..., str]) -> None:
    ids = np.arange(240, dtype=np.uint8).reshape(12, 20) % 34
    for name in ("1.png", "2.PNG"):
        png(tmp_path / "images" / name)
        png(tmp_path / "labels" / name, ids)
    put(tmp_path / "images" / "3.JPG", encoded(picture(), "jpeg"))
    png(tmp_path / "labels" / "3.png", ids)
    put(tmp_path / "images" / "._1.png", b"macOS")
    put(tmp_path / "labels" / "notes.txt", b"text")
    out = command(0, "check", tmp_path)
    assert "GTA5: 3 images (the whole data set has 24966), 3 label maps of label ids, 3 pairs" in out
    assert "(other files, ignored: 1 .txt)" in out
    tif, empty = put(tmp_path / "images" / "4.TIF", encoded(picture(), "tiff")), put(tmp_path / "images" / "5.jpg", b"")
    png(tmp_path / "labels" / "5.png", ids)
    out = command(1, "check", tmp_path)
    assert f"{tif}: is left out, being neither PNG nor JPEG; convert it" in out
    assert f"{empty}: is empty; " in out
    out = command(0, "stats", tmp_path)
    assert "GTA5: 4 label maps" in out
    assert "left out, being neither PNG nor JPEG: 1 .tif, 1 .txt" in out


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (37, 51), (1, 1)])
def test_jpeg__is_pillows(tmp_path: Path, subsampling: int, progressive: bool, size: tuple[int, int]) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(picture(*size)).save(path, subsampling=subsampling, progressive=progressive, quality=85)
    assert np.array_equal(pixels(SegmentationFolder(tmp_path)[0].image), shown(path))
    header = images.read_header(path)
    assert (header.height, header.width) == size


def test_jpeg__tables_may_come_before_the_frame(tmp_path: Path) -> None:
    data, tables = encoded(picture(16, 24), "jpeg"), b""
    while (start := data.find(b"\xff\xc4")) >= 0:
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        data, tables = data[:start] + data[end:], tables + data[start:end]
    path = put(tmp_path / "a.jpg", data[:2] + tables + data[2:])
    assert images.read_header(path)[:2] == (24, 16)
    assert np.array_equal(pixels(SegmentationFolder(tmp_path)[0].image), shown(path))
    put(path, data.replace(b"\xff\xdb", b"\xdb", 1))  # half a marker
    refusal(lambda: images.read_header(path), "is cut off or damaged")


@pytest.mark.parametrize("orientation", [None, 0, *range(1, 10)])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images__are_turned_as_exif_says(tmp_path: Path, orientation: int | None, order: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    head = b"II*\0" if order == "<" else b"MM\0*"
    tags = [] if orientation is None else [struct.pack(f"{order}HHIHxx", 0x0112, 3, 1, orientation)]
    other = struct.pack(f"{order}HHII", 0x0100, 4, 1, 7)
    body = struct.pack(f"{order}IH", 8, 1 + len(tags)) + other + b"".join(tags) + bytes(4)
    Image.fromarray(picture(16, 40)).save(path, quality=95, exif=b"Exif\0\0" + head + body)
    want, got = shown(path), SegmentationFolder(tmp_path)[0].image
    assert np.array_equal(pixels(got), want)
    assert image_size(str(path)) == want.shape[:2]
    cached = CachedSamples(SegmentationFolder(tmp_path), tmp_path / "cache", progress=False)
    assert torch.equal(cached[0].image, got)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["ids", "mapped", "colours", "label ids", "SYNTHIA ids"])
def test_labels__are_turned_as_their_own_exif_says(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    label = np.zeros((12, 20), np.uint8)
    label[0, :5] = 7
    image = np.stack([label] * 3, -1)
    for folder in ("images", "labels", "RGB", "GT/LABELS"):
        path = png(tmp_path / folder / "a.png", image if folder in {"images", "RGB"} or kind == "colours" else label)
        with Image.open(path) as opened:
            opened.save(path, exif=exif)
    mapping = {"mapped": {0: 0, 7: 7}, "colours": {(0, 0, 0): 0, (7, 7, 7): 7}}.get(kind)
    readers = {"label ids": GTA5, "SYNTHIA ids": Synthia}
    sample = readers.get(kind, partial(SegmentationFolder, mapping=mapping))(tmp_path)[0]
    is_marked = sample.label == sample.label[tuple((sample.image[0] == 7).nonzero()[0])]
    assert torch.equal(is_marked, sample.image[0] == 7)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images__damaged_exif_turns_nothing(tmp_path: Path, kind: str) -> None:
    for exif in (b"", b"II*\0", b"MM\0*" + b"\xff" * 8, b"II*\0" + struct.pack("<IH", 8, 9)):
        Image.fromarray(picture()).save(tmp_path / f"a.{kind}", exif=b"Exif\0\0" + exif)
        assert SegmentationFolder(tmp_path)[0].image.shape == (3, 12, 20)


def test_images__exif_that_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    chunk = b"eXIfII*\0"
    whole = encoded(picture(), "png")
    path = put(tmp_path / "a.png", whole[:33] + struct.pack(">I", 2**31 - 1) + chunk + whole[33:])
    tracemalloc.start()
    try:
        assert images.read_header(path)[:2] == (20, 12)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def bomb(data: bytes) -> bytes:
    frame = max(data.find(b"\xff\xc2"), data.find(b"\xff\xc0"))
    return data[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + data[frame + 9 :]


def cmyk(_: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture()).convert("CMYK").save(file, "jpeg")
    return file.getvalue()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "end": lambda data: data[:-2],
    "few": lambda data: data[:40],
    "marker": lambda data: data[:2] + b"\0" + data[3:],
    "length": lambda data: data[:4] + bytes(2) + data[6:],  # shorter than itself
    "bomb": bomb,
    "cmyk": cmyk,
    "html": lambda _: b"<html>not found</html>" * 10,
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg__damaged_files_are_named_and_never_read(tmp_path: Path, kind: str, progressive: bool) -> None:
    data = encoded(picture(96, 128), "jpeg", progressive=progressive, quality=95)
    path = put(tmp_path / "a.jpg", DAMAGES[kind](data))
    assert ";" in refusal(lambda: SegmentationFolder(tmp_path)[0], str(path))


def test_jpeg__mutated_files_are_read_as_pillow_reads_them_or_refused(tmp_path: Path) -> None:
    whole, path = encoded(picture(48, 64), "jpeg", quality=90), tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        put(path, bytes(data))
        try:
            image = SegmentationFolder(path.parent)[0].image
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017 - not every one is refused
            refused += 1
        else:
            assert np.array_equal(pixels(image), shown(path))
    assert 50 < refused < 300


ODD: dict[str, Callable[[], Image.Image]] = {
    "grey": lambda: Image.fromarray(picture()[..., 0]),
    "grey and alpha": lambda: Image.fromarray(picture()).convert("LA"),
    "alpha": lambda: Image.fromarray(np.dstack([picture(), picture()[..., :1]])),
    "palette": lambda: Image.fromarray(picture()).quantize(40),
    "one bit": lambda: Image.fromarray(picture()[..., 0] > 99),
}


@pytest.mark.parametrize(("kind", "name"), [*((kind, "a.png") for kind in ODD), ("grey", "a.jpg")])
def test_images__of_any_kind_are_rgb_and_turned_and_none_of_official_readers(
    tmp_path: Path, kind: str, name: str
) -> None:
    path = put(tmp_path / "images" / name, b"")
    turned = Image.Exif()
    turned[0x0112] = 6
    for exif in (b"", turned):
        ODD[kind]().save(path, exif=exif)
        for image in (SegmentationFolder(path.parent)[0].image, read_image(str(path))):
            assert np.array_equal(pixels(image), shown(path))
    said = rf"{path}: (expected an RGB image, got 1 channels; is this a label map|is grey with transparency)"
    if kind != "alpha":
        refusal(lambda: GTA5(tmp_path, labels=False)[0], said)


def test_images__odd_ones_without_pillow_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "Image", None)
    ODD["palette"]().save(tmp_path / "a.png")
    refusal(lambda: SegmentationFolder(tmp_path)[0], r"a\.png: .*with `pip install pillow`")
    path = put(tmp_path / "b.jpg", encoded(picture(), "jpeg"))  # these need none
    assert read_image(path).shape == (3, 12, 20)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_labels__in_jpeg_are_refused(tmp_path: Path, name: str) -> None:
    png(tmp_path / "images" / "a.png")
    put(tmp_path / "labels" / name, encoded(labels("gta5"), "jpeg"))
    for read in (GTA5, SegmentationFolder):
        data = read(tmp_path)
        refusal(partial(data.__getitem__, 0), "is a JPEG file, whose lossy compression changes ids; save .* as PNG")
