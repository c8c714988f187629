"""The readers, on small files and on real ones."""

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from checks import refusal
from crossmix._tensors import nearest
from crossmix.datasets import GTA5, Cityscapes, DataError, Sample, SegmentationFolder, StreetScenes, Synthia, write_png
from crossmix.datasets._png import read_png
from crossmix.datasets.classes import CLASS_NAMES, CLASSES, CLASSES_13, CLASSES_16, PALETTE, label_ids, train_ids
from crossmix.engine import KeyedCrops
from oracles import deep_png, flipped, picture, png_file, save, seeded

LABEL_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
             28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip


def ids(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A map of official label ids, 0 to 34."""
    return torch.randint(0, 35, (height, width), generator=seeded(seed)).numpy().astype(np.uint8)


def palette_png(path: Path, array: np.ndarray, bits: int) -> None:
    """A palette file of few bits, as GTA5 tools write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array, "L").convert("P")
    image.putdata(array.flatten().tolist())
    image.putpalette([(37 * i) % 256 for i in range(3 * 2**bits)])
    image.save(path, bits=bits)


def pixels(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def gta5(root: Path) -> Path:
    for i in range(3):
        save(root / "images" / f"{i:05d}.png", picture(12, 20, seed=i))
        save(root / "labels" / f"{i:05d}.png", ids(12, 20, seed=i))
    return root


def cityscapes(root: Path, *, zips: bool = False) -> Path:
    left, fine = (f"{name}_trainvaltest/{name}" if zips else name for name in ("leftImg8bit", "gtFine"))
    for city, i in (("zurich", 1), ("aachen", 0), ("aachen", 2)):
        stem = f"{city}_{i:06d}_000019"
        save(root / left / "val" / city / f"{stem}_leftImg8bit.png", picture(16, 32, seed=i))
        save(root / fine / "val" / city / f"{stem}_gtFine_labelIds.png", ids(16, 32, seed=i))
    return root


def test_class_table__is_the_official_one() -> None:
    assert len(CLASSES) == 19
    assert CLASS_NAMES[:2] == ("road", "sidewalk")
    assert [value for color in PALETTE for value in color] == [
        128, 64, 128, 244, 35, 232, 70, 70, 70, 102, 102, 156, 190, 153, 153, 153, 153, 153, 250, 170, 30, 220, 220, 0,
        107, 142, 35, 152, 251, 152, 70, 130, 180, 220, 20, 60, 255, 0, 0, 0, 0, 142, 0, 0, 70, 0, 60, 100, 0, 80, 100,
        0, 0, 230, 119, 11, 32,
    ]  # fmt: skip
    table = train_ids().tolist()
    assert {i: t for i, t in enumerate(table) if t != 255} == LABEL_IDS
    assert [table[i] for i in label_ids()[:19].tolist()] == list(range(19))
    assert label_ids()[255] == 0
    missing = {CLASS_NAMES[i] for i in set(range(19)) - set(CLASSES_16)}
    assert missing == {"terrain", "truck", "train"}
    assert {CLASS_NAMES[i] for i in set(CLASSES_16) - set(CLASSES_13)} == {"wall", "fence", "pole"}
    assert [row.synthia_id for row in CLASSES] == [3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11]


@pytest.mark.parametrize("reader", ["gta5", "cityscapes", "zips"])
def test_readers__pixels_and_mapped_ids(tmp_path: Path, reader: str) -> None:
    data: GTA5 | Cityscapes
    if reader == "gta5":
        data = GTA5(gta5(tmp_path))
        names = {"00000": 0, "00001": 1, "00002": 2}
    else:
        data = Cityscapes(cityscapes(tmp_path, zips=reader == "zips"), "val")
        names = {"aachen_000000_000019": 0, "aachen_000002_000019": 2, "zurich_000001_000019": 1}
    assert len(data) == 3
    for i, (name, seed) in enumerate(names.items()):
        sample = data[i]
        assert isinstance(sample, Sample)
        assert sample.name == name
        assert sample.image.dtype == sample.label.dtype == torch.uint8
        size = sample.image.shape[1:]
        assert np.array_equal(pixels(sample.image), picture(*size, seed))
        assert sample.label.tolist() == [[LABEL_IDS.get(v, 255) for v in row] for row in ids(*size, seed).tolist()]
    batches = DataLoader(pickle.loads(pickle.dumps(data)), batch_size=None, num_workers=1)
    for got, want in zip(batches, data, strict=True):
        assert torch.equal(got.image, want.image)


@pytest.mark.parametrize("size", [(6, 10), (9, 17), (24, 40), (5, 20)])
def test_size__is_pillows_resize(tmp_path: Path, size: tuple[int, int]) -> None:
    for sample, source, resampling in (
        (GTA5(gta5(tmp_path / "g"), size=size)[0], (12, 20), Image.Resampling.BICUBIC),
        (Cityscapes(cityscapes(tmp_path / "c"), "val", size=size)[0], (16, 32), Image.Resampling.BILINEAR),
    ):
        want = np.asarray(Image.fromarray(picture(*source)).resize(size[::-1], resampling)).astype(int)
        assert np.abs(pixels(sample.image).astype(int) - want).max() <= 1
        nearest = np.asarray(Image.fromarray(ids(*source)).resize(size[::-1], Image.Resampling.NEAREST))
        assert np.array_equal(sample.label.numpy(), train_ids().numpy()[nearest])
    save(tmp_path / "g" / "labels" / "00002.png", ids(13, 22))  # of another size than its image
    sample = GTA5(tmp_path / "g", size=size)[2]
    assert sample.image.shape[1:] == sample.label.shape == size


@pytest.mark.parametrize(
    ("old", "new"), [((1052, 1914), (720, 1280)), ((1024, 2048), (512, 1024)), ((761, 1280), (760, 1280))]
)
def test_label_resize__is_pillows_nearest_at_real_sizes(old: tuple[int, int], new: tuple[int, int]) -> None:
    for coordinate in np.indices(old, np.int32):
        want = np.asarray(Image.fromarray(coordinate).resize(new[::-1], Image.Resampling.NEAREST))
        assert np.array_equal(nearest(torch.from_numpy(coordinate), new).numpy(), want)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [1, 3, 8, 21])
def test_palette_files__give_their_indices(tmp_path: Path, bits: int, width: int) -> None:
    array = (ids(9, width).astype(int) % 2**bits).astype(np.uint8)
    palette_png(tmp_path / "p.png", array, bits)
    header = (tmp_path / "p.png").read_bytes()[16:29]
    assert struct.unpack(">IIBB", header[:10]) == (width, 9, bits, 3)
    assert np.array_equal(read_png(tmp_path / "p.png")[0].numpy(), array)


@pytest.mark.parametrize("kind", range(5))
def test_low_bit_files__every_filter(tmp_path: Path, kind: int) -> None:
    """Lines filtered by hand, against Pillow's decoder."""
    lines = np.random.default_rng(kind).integers(0, 256, (7, 5), dtype=np.uint8)
    filtered = b"".join(bytes([kind]) + line.tobytes() for line in lines)
    path = png_file(tmp_path / "f.png", (7, 10), 4, 0, filtered)
    want = np.asarray(Image.open(path)) // 17  # Pillow spreads 4 bits over 0..255
    assert np.array_equal(read_png(path)[0].numpy(), want)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(8, 3, "3 bits"), (9, 2, "colour type 2"), (10, 1, "header"), (11, 1, "header"), (12, 1, "interlaced"),
     (12, 2, "header")],
)  # fmt: skip
def test_low_bit_files__headers_that_png_does_not_know(tmp_path: Path, place: int, value: int, message: str) -> None:
    data = png_file(tmp_path / "a.png", (2, 8), 4, 0, bytes(10)).read_bytes()
    header = data[16 : 16 + place] + bytes([value]) + data[17 + place : 29]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "a.png").write_bytes(data[:16] + header + checksum + data[33:])
    refusal(lambda: read_png(tmp_path / "a.png"), message)


def test_low_bit_files__pixels_that_do_not_match_the_checksum_of_zlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = zlib.compress
    monkeypatch.setattr(zlib, "compress", lambda lines: flipped(real(lines), -1))
    png_file(tmp_path / "a.png", (2, 8), 4, 0, bytes(10))
    refusal(lambda: read_png(tmp_path / "a.png"), r"a\.png: cannot be decoded \(.*incorrect data check")


def test_write_png__round_trip(tmp_path: Path) -> None:
    path = tmp_path / "w.png"
    for written in (torch.from_numpy(picture(5, 7)).permute(2, 0, 1), torch.from_numpy(ids(5, 7))):
        write_png(path, written)
        assert torch.equal(read_png(path), written.reshape(-1, 5, 7))
    refusal(lambda: write_png(path, torch.rand(3, 4, 4)), "must be uint8", TypeError)
    refusal(lambda: write_png(path, torch.zeros(4, 4, 4).byte()), r"\(3, H, W\) or \(H, W\)", ValueError)
    nowhere = tmp_path / "nowhere" / "w.png"
    refusal(lambda: write_png(nowhere, torch.zeros(4, 4).byte()), r"w\.png: cannot be written \(No such file", OSError)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut before the end": lambda data: data[:-8],
    "flipped": lambda data: flipped(data, bits=255),
    "empty": lambda data: b"",
    "html": lambda data: b"<html>not found</html>" * 10,
    "bomb": lambda data: data[:16] + struct.pack(">II", 20_000, 20_000) + data[24:],
}


def damage(path: Path, kind: str) -> None:
    if kind == "16 bit":
        Image.fromarray(np.zeros((12, 20), np.uint16)).save(path)
        return
    whole = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(DAMAGES[kind](whole))


def one_to_break(root: Path, reader: str) -> tuple[Any, Path]:
    """A data set and a file of its second sample."""
    if reader == "synthia":
        return Synthia(synthia(root, "16-bit RGB")), root / "GT/LABELS/0000001.png"
    if reader == "cityscapes":
        stem = "aachen/aachen_000002_000019_leftImg8bit.png"
        return Cityscapes(cityscapes(root), "val"), root / "leftImg8bit/val" / stem
    gta5(root)
    if reader == "folder":
        return SegmentationFolder(root / "images", root / "labels"), root / "images/00001.png"
    if reader == "packed":
        palette_png(root / "labels/00001.png", (ids(12, 20) % 4).astype(np.uint8), 2)
    return GTA5(root), root / "labels/00001.png"


@pytest.mark.parametrize("kind", ["missing", "folder", *DAMAGES, "16 bit"])
@pytest.mark.parametrize("reader", ["gta5", "packed", "synthia", "cityscapes", "folder"])
def test_damaged_files__under_both_policies(tmp_path: Path, kind: str, reader: str) -> None:
    """Named by default; left out, counted and capped when asked, and no pixel of it gets through."""
    if kind == "16 bit" and reader == "synthia":
        pytest.skip("16 bits are right here")
    data, path = one_to_break(tmp_path, reader)
    whole = list(data)
    damage(path, kind)
    said = refusal(lambda: data[1], f"{path}: ")
    assert "expected 8 bits per channel, got 16" in said or kind != "16 bit"
    assert ";" in said  # and what to do
    strict, lenient = (KeyedCrops(data, (8, 8), seed=0, stream=0, skip=skip) for skip in (0, 1))
    refusal(lambda: [strict[draw] for draw in range(len(data))], path.name)
    for draw in range(20):
        image, _ = lenient[draw]
        assert any(
            (other.image.unfold(1, 8, 1).unfold(2, 8, 1) == image[:, None, None]).all((0, 3, 4)).any()
            for i, other in enumerate(whole)
            if i != 1
        )
    assert list(lenient.skipped) == [1]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.full((12, 20), 77, np.uint8), r"holds ids \[77\] that are not Cityscapes label ids"),
        (np.where(np.arange(240).reshape(12, 20) % 2, 255, 4).astype(np.uint8), r"looks like train ids"),
        (np.zeros((12, 20, 3), np.uint8), "got 3 channels of 8 bits; read colour-coded maps with `SegmentationFolder`"),
        (np.zeros((12, 21), np.uint8), r"is 12 x 21 but its image 12 x 20; pass `size=`"),
    ],
    ids=["unknown ids", "train ids", "colours", "another size"],
)
def test_wrong_labels__are_refused(tmp_path: Path, label: np.ndarray, message: str) -> None:
    save(gta5(tmp_path) / "labels" / "00002.png", label)
    assert "00002.png" in refusal(lambda: GTA5(tmp_path)[2], message)


def test_folders__missing_empty_or_unpaired(tmp_path: Path) -> None:
    none = r"has no images \(there is no such folder\); expected <root>"
    refusal(lambda: GTA5(tmp_path / "nowhere"), rf"nowhere: {none}/images/\*\.png")
    refusal(lambda: Cityscapes(tmp_path / "c", "val"), rf"split 'val' {none}/leftImg8bit/<split>")
    root = gta5(tmp_path / "g")
    (root / "labels" / "00001.png").unlink()
    refusal(lambda: GTA5(root), "g: has 3 images and 2 label maps that do not pair up, 00001 has no label map")
    (root / "images" / "00001.png").unlink()
    (root / "images" / "00002.png").rename(tmp_path / "00002.png")
    refusal(lambda: GTA5(root), "g: has 1 images and 2 label maps that do not pair up, 00002 has no image")
    (tmp_path / "some.txt").write_text("00000\n")  # of a part that is there
    assert [sample.name for sample in GTA5(root, names=tmp_path / "some.txt")] == ["00000"]
    (root / "images" / "00000.png").unlink()
    refusal(lambda: GTA5(root), "has 2 label maps but no images")
    city = cityscapes(tmp_path / "c")
    refusal(lambda: GTA5(city), r"c: has no images \(it looks like Cityscapes\); expected <root>/images")
    refusal(lambda: Cityscapes(city, "test"), r"split 'test' has no images; expected")
    (city / "gtFine/val/aachen/aachen_000002_000019_gtFine_labelIds.png").unlink()
    unpaired = r"3 images and 2 label maps .* aachen/aachen_000002_000019 has no label map"
    refusal(lambda: Cityscapes(city, "val"), unpaired)
    assert len(Cityscapes(city, "val", labels=False)) == 3
    for path in (city / "leftImg8bit/val").rglob("*.png"):
        path.unlink()
    refusal(lambda: Cityscapes(city, "val"), "split 'val' has 2 label maps but no images")


SYNTHIA_TRAIN_IDS = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 10, 10: 11, 17: 12, 8: 13, 19: 15,
                     12: 17, 11: 18}  # fmt: skip


def synthia_ids(seed: int) -> np.ndarray:
    return torch.randint(0, 23, (12, 20), generator=seeded(seed)).numpy()


def synthia(root: Path, kind: str) -> Path:
    """Labels as the archive has them, or as the community saves them again."""
    for i in range(2):
        save(root / "RGB" / f"{i:07d}.png", picture(12, 20, seed=i))
        classes = synthia_ids(i)
        instances = torch.randint(0, 977, (12, 20), generator=seeded(i + 9)).numpy()
        deep = np.stack([classes, instances, np.zeros_like(classes)], -1)
        path = root / "GT" / "LABELS" / f"{i:07d}.png"
        if kind == "16-bit RGB":
            deep_png(path, deep)
        elif kind == "16-bit grey":
            deep_png(path, deep[..., :1])
        elif kind == "8-bit grey":
            save(root / "synthia_mapped_to_cityscapes" / path.name, classes.astype(np.uint8))
        elif kind == "8-bit RGB":
            save(path, (deep & 255).astype(np.uint8))
        elif kind == "high bytes":  # what an ordinary reader makes of the archive's files
            save(path, (deep >> 8).astype(np.uint8))
    return root


@pytest.mark.parametrize("kind", ["16-bit RGB", "16-bit grey", "8-bit grey", "8-bit RGB"])
def test_synthia__every_form_gives_the_same_train_ids(tmp_path: Path, kind: str) -> None:
    data = Synthia(synthia(tmp_path, kind))
    assert [sample.name for sample in data] == ["0000000", "0000001"]
    for i, sample in enumerate(data):
        assert sample.label.tolist() == [
            [SYNTHIA_TRAIN_IDS.get(v, 255) for v in row] for row in synthia_ids(i).tolist()
        ]
        assert np.array_equal(pixels(sample.image), picture(12, 20, seed=i))
    half = Synthia(tmp_path, size=(6, 10))[0].label
    assert torch.equal(half, data[0].label[1::2, 1::2])  # Pillow's NEAREST takes the odd pixels


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((12, 20, 3), 3 << 8), r"holds the id 768, but SYNTHIA's ids end at 22"),  # the bytes in reverse
        (np.full((12, 20, 1), 31), r"holds ids \[31\] that are not SYNTHIA ids"),
        (np.where(np.arange(240).reshape(12, 20, 1) % 2, 255, 4), "looks like train ids"),
    ],
    ids=["reversed bytes", "another id", "train ids"],
)
def test_synthia__other_files_are_refused(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    high = Synthia(synthia(tmp_path / "high", "high bytes"))
    refusal(lambda: high[0], r"0000000\.png: holds no class but 0 in 8 bits, like files saved")
    deep_png(synthia(tmp_path, "16-bit RGB") / "GT" / "LABELS" / "0000001.png", labels)
    assert "0000001.png" in refusal(lambda: Synthia(tmp_path)[1], message)


def test_synthia__transparency_is_refused(tmp_path: Path) -> None:
    path = synthia(tmp_path, "16-bit RGB") / "GT" / "LABELS" / "0000000.png"
    save(path, np.full((12, 20, 4), 3, np.uint8))
    refusal(lambda: Synthia(tmp_path)[0], r"0000000\.png: expected 1 or 3 channels, got 4")


def test_gta5__the_id_255_is_ignored_where_others_are_no_train_ids(tmp_path: Path) -> None:
    label = np.full((12, 20), 26, np.uint8)  # cars
    label[:2] = 255
    save(gta5(tmp_path) / "labels" / "00002.png", label)
    assert GTA5(tmp_path)[2].label.tolist() == [[255] * 20] * 2 + [[13] * 20] * 10


@pytest.mark.parametrize("reader", [GTA5, Synthia])
def test_readers__a_list_of_names_and_either_half_alone(tmp_path: Path, reader: type) -> None:
    root = gta5(tmp_path) if reader is GTA5 else synthia(tmp_path, "16-bit RGB")
    second = reader(root)[1].name
    chosen = tmp_path / "list.txt"
    chosen.write_text(f"RAND_CITYSCAPES/{second}.png\n\n", encoding="utf-8")
    assert [sample.name for sample in reader(root, names=chosen)] == [second]
    chosen.write_text("0.png\n", encoding="utf-8")
    absent = r"list\.txt: names 0, which is not there \(1 of 1 are missing"
    refusal(lambda: reader(root, names=chosen), absent)
    chosen.write_bytes(b"\xff")
    for bad in (chosen, tmp_path / "none.txt"):
        refusal(lambda bad=bad: reader(root, names=bad), "cannot be read as a list of names")
    alone = reader(root, images=False)[0]
    assert alone.image.shape == (3, 0, 0)
    assert torch.equal(alone.label, reader(root)[0].label)
    assert reader(root, labels=False, size=(6, 10))[0].label is None
    assert reader(root, images=False, size=(6, 10))[0].label.shape == (6, 10)
    refusal(lambda: reader(root, images=False, labels=False), "must not both be False", ValueError)


@pytest.mark.parametrize("reader", [GTA5, Synthia])
def test_readers__leave_out_train_ids_beside_the_label_maps(
    tmp_path: Path, reader: type, command: Callable[..., str]
) -> None:
    root = gta5(tmp_path / "g") if reader is GTA5 else synthia(tmp_path / "s", "8-bit RGB")
    want, said = list(reader(root)), command(0, "check", root)
    for path in [*(root / ("labels" if reader is GTA5 else "GT/LABELS")).iterdir()]:
        save(path.with_name(f"{path.stem}_labelTrainIds.png"), np.full((12, 20), 13, np.uint8))
    for options in ({}, {"images": False}):
        for got, one in zip(reader(root, **options), want, strict=True):
            assert got.name == one.name
            assert torch.equal(got.label, one.label)
    assert command(0, "check", root) == said
    assert f"{len(want)} label maps" in command(0, "stats", root)


def test_cityscapes__train_extra_has_coarse_labels(tmp_path: Path) -> None:
    stem = "erlangen_000000_000000"
    left, coarse = "leftImg8bit_trainextra/leftImg8bit/train_extra", "gtCoarse/train_extra"
    save(tmp_path / left / "erlangen" / f"{stem}_leftImg8bit.png", picture(16, 32))
    save(tmp_path / coarse / "erlangen" / f"{stem}_gtCoarse_labelIds.png", ids(16, 32))
    (tmp_path / "leftImg8bit_trainvaltest/leftImg8bit/train").mkdir(parents=True)  # another zip beside it
    sample = Cityscapes(tmp_path, "train_extra")[0]
    assert sample.name == stem
    assert torch.equal(sample.label, train_ids()[torch.from_numpy(ids(16, 32)).long()])


def test_cityscapes__folders_of_zips_beside_each_other(tmp_path: Path) -> None:
    def put(folder: str, ending: str, stem: str = "aachen_000000_000019") -> None:
        image = picture(16, 32) if "left" in ending else ids(16, 32)
        save(tmp_path / folder / "aachen" / f"{stem}_{ending}.png", image)

    put("leftImg8bit_trainextra/leftImg8bit/train_extra", "leftImg8bit")
    refusal(lambda: Cityscapes(tmp_path, "train_extra"), r"<root>/gtCoarse/<split>/<city>/\*_gtCoarse_labelIds\.png")
    put("gtCoarse/gtCoarse/train_extra", "gtCoarse_labelIds")
    assert len(Cityscapes(tmp_path, "train_extra")) == 1
    put("gtFine_trainvaltest/train", "gtFine_labelIds")
    put("leftImg8bit_blurred/train", "leftImg8bit_blurred")
    for frame in ("aachen_000000_000018", "aachen_000000_000019"):
        put("leftImg8bit_sequence/train", "leftImg8bit", frame)
        put("leftImg8bit_sequence_trainvaltest/train", "leftImg8bit", frame)
    refusal(lambda: Cityscapes(tmp_path, "train"), r"1 label maps but no images.*<root>/gtFine/<split>")
    put("leftImg8bit_trainvaltest/train", "leftImg8bit")
    files = Cityscapes(tmp_path, "train").files
    assert [file.image.relative_to(tmp_path).parts[0] for file in files] == ["leftImg8bit_trainvaltest"]


def test_folder__by_folders_of_any_depth(tmp_path: Path) -> None:
    x, y = tmp_path / "x", tmp_path / "y"
    for key in ("a/1", "a/2", "b/1"):
        save(x / f"{key}.png", picture(8, 12, seed=ord(key[0])))
        save(y / f"{key}.png", np.full((8, 12), ord(key[0]) - ord("a"), np.uint8))
    found = [(sample.name, int(sample.label.unique())) for sample in SegmentationFolder(x, y)]
    assert found == [("a/1", 0), ("a/2", 0), ("b/1", 1)]
    assert len(SegmentationFolder(x)) == 3
    assert SegmentationFolder(x, size=(4, 6))[0].image.shape == (3, 4, 6)
    (y / "a" / "2.png").unlink()
    unpaired = "3 images and 2 label maps that do not pair up, a/2 has no label map"
    refusal(lambda: SegmentationFolder(x, y), unpaired)
    refusal(lambda: SegmentationFolder(tmp_path / "z"), "no such folder; pass a folder of image files, or a pattern")
    refusal(lambda: SegmentationFolder(x / "*_img.png"), "has no images; expected PNG or JPEG images")


def test_folder__by_patterns(tmp_path: Path) -> None:
    for town, key in (("t1", "7"), ("t1", "8"), ("t2", "7")):
        save(tmp_path / town / f"{key}_img.png", picture(8, 12))
        save(tmp_path / town / "gt" / f"{key}_ids.png", np.full((8, 12), int(key), np.uint8))
    both = SegmentationFolder(tmp_path / "*" / "*_img.png", tmp_path / "*" / "gt" / "*_ids.png", {7: 0, 8: 1})
    assert [int(sample.label.unique()) for sample in both] == [0, 1, 0]
    assert len(SegmentationFolder(tmp_path / "**" / "*_img.png")) == 3
    one = SegmentationFolder(tmp_path / "t1" / "*_img.png", tmp_path / "t1" / "gt" / "*_ids.png", {7: 0, 8: 255})
    assert [sample.name for sample in one] == ["7", "8"]


@pytest.mark.parametrize("bits", [8, 16])
def test_folder__mapping_of_ids(tmp_path: Path, bits: int) -> None:
    values = torch.randint(0, 5, (9, 7), generator=seeded(bits)).numpy() * (3 if bits == 8 else 13_107)
    mapping = {key: i for i, key in enumerate(sorted(set(values.flatten().tolist())))}
    if bits == 8:
        save(tmp_path / "l.png", values.astype(np.uint8))
    else:
        deep_png(tmp_path / "l.png", values[..., None])

    def read(unlisted: str) -> list[list[int]]:
        return SegmentationFolder(None, tmp_path / "*.png", mapping, unlisted=unlisted)[0].label.tolist()

    want = [[mapping[v] for v in row] for row in values.tolist()]
    assert read("raise") == read("ignore") == want
    lacking = max(mapping)
    del mapping[lacking]
    refusal(lambda: read("raise"), rf"l\.png: holds \[{lacking}\], which the mapping does not list")
    assert read("ignore") == [[255 if v == len(mapping) else v for v in row] for row in want]


def test_folder__mapping_of_colours(tmp_path: Path) -> None:
    def read(mapping: object = None) -> Tensor:
        return SegmentationFolder(None, tmp_path / "*.png", mapping)[0].label

    mapping = {color: i for i, color in enumerate(PALETTE)}
    values = torch.randint(0, 19, (9, 7), generator=seeded(0)).numpy()
    save(tmp_path / "l.png", np.array(PALETTE, np.uint8)[values])
    assert np.array_equal(read(mapping).numpy(), values)
    refusal(lambda: read({c: i for c, i in mapping.items() if c != (0, 0, 70)}), r"holds \[\(0, 0, 70\)")
    refusal(read, "expected a label map with one channel of ids, got 3 channels")
    save(tmp_path / "l.png", ids(9, 7))
    refusal(lambda: read(mapping), "expected an RGB label map for a mapping of colours, got 1 channel of 8 bits")


CARLA = {**{k: k - 1 for k in range(1, 20)}, 24: 0}


def test_real_carla(test_data: Path) -> None:
    base = test_data / "carla"
    data = SegmentationFolder(base / "*_img.png", base / "*_labelIds.png", CARLA, unlisted="ignore")
    assert len(data) == 4
    table = np.array([CARLA.get(value, 255) for value in range(256)])
    for image, label, name in data:
        assert image.shape == (3, 1024, 2048)
        assert np.array_equal(label.numpy(), table[np.asarray(Image.open(base / f"{name}_labelIds.png"))])
        shown = Image.open(base / f"{name}_img.png").convert("RGB")
        assert np.array_equal(pixels(image), np.asarray(shown))


def test_errors_survive_worker_processes(tmp_path: Path) -> None:
    root = gta5(tmp_path)
    (root / "images" / "00001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"00001\.png"):
        list(DataLoader(GTA5(root), batch_size=None, num_workers=1))


def test_real_cityscapes(test_data: Path) -> None:
    base = test_data / "cityscapes"
    for split, count in (("train", 8), ("val", 15)):  # of whose images none is there
        labels = Cityscapes(base, split, images=False)
        assert len(labels) == count
        for sample in labels:
            [path] = (base / "gtFine" / split).rglob(f"{sample.name}_gtFine_labelIds.png")
            assert np.array_equal(sample.label.numpy(), train_ids().numpy()[np.asarray(Image.open(path))])
    refusal(lambda: Cityscapes(base, "val"), "split 'val' has 15 label maps but no images")
    whole, half = (Cityscapes(base, "train", size=size)[0] for size in (None, (512, 1024)))
    image = Image.open(base / f"leftImg8bit/train/aachen/{whole.name}_leftImg8bit.png")
    assert np.array_equal(pixels(whole.image), np.asarray(image))
    want = np.asarray(image.resize((1024, 512), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(pixels(half.image).astype(int) - want).max() <= 1


@pytest.mark.parametrize("domain", ["source", "target"])
def test_street_scenes__are_pure_functions_of_their_index(domain: str) -> None:
    scenes = StreetScenes(30, domain=domain, seed=4)
    forward = list(scenes)
    for i in reversed(range(30)):
        again = StreetScenes(50, domain=domain, seed=4)[i]
        assert torch.equal(again.image, forward[i].image)
        assert torch.equal(again.label, forward[i].label)
    other = StreetScenes(30, domain=domain, seed=5)
    assert not any(torch.equal(other[i].image, forward[i].image) for i in range(30))
    seen = torch.stack([scene.label for scene in forward])
    assert set(seen.unique().tolist()) == {*range(19), 255}


@pytest.mark.parametrize("size", [(16, 16), (33, 57), (96, 160)])
def test_street_scenes__any_size_and_a_street_each_time(size: tuple[int, int]) -> None:
    for domain in ("source", "target"):
        scenes = StreetScenes(20, domain=domain, size=size)
        ground, sky = torch.zeros(size), torch.zeros(size)
        for scene in scenes:
            assert scene.image.shape == (3, *size)
            assert scene.image.dtype == scene.label.dtype == torch.uint8
            ground += scene.label == 0
            sky += scene.label == 10
        rows = torch.arange(size[0]).float()
        assert (ground.sum(1) * rows).sum() / ground.sum() > (sky.sum(1) * rows).sum() / sky.sum() + size[0] / 4


def test_street_scenes__the_domains_differ_in_look_and_not_in_layout() -> None:
    def statistics(domain: str) -> tuple[Tensor, float]:
        counts, saturation = torch.zeros(256), 0.0
        for scene in StreetScenes(60, domain=domain):
            counts += torch.bincount(scene.label.flatten().long(), minlength=256)
            image = scene.image.float()
            saturation += float((image.amax(0) - image.amin(0)).mean())
        return counts[:19] / counts.sum(), saturation

    (shares, vivid), (other, dull) = statistics("source"), statistics("target")
    assert vivid > 2 * dull
    assert float((shares - other).abs().sum()) < 0.2


@pytest.mark.parametrize("layout", ["gta5", "cityscapes"])
def test_street_scenes__written_and_read_back(tmp_path: Path, layout: str) -> None:
    scenes = StreetScenes(3, domain="target", size=(24, 40))
    scenes.write(tmp_path, layout=layout, split="val")
    data = GTA5(tmp_path) if layout == "gta5" else Cityscapes(tmp_path, "val")
    for got, want in zip(data, scenes, strict=True):
        assert torch.equal(got.image, want.image)
        assert torch.equal(got.label, want.label)
