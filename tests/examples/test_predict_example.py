"""The prediction script: any pictures in, train ids, colours and overlays out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kornia_rs import io
from PIL import Image
from torch import Tensor
from torch.nn import functional as tf

import predict
from crossmix.datasets import StreetScenes, write_png
from crossmix.datasets._png import read_png
from crossmix.models import DeepLabV2, deeplab_v2_tiny, save_weights
from crossmix.visualize import colorize
from runs import Capture


@pytest.fixture
def model() -> DeepLabV2:
    torch.manual_seed(0)
    model = deeplab_v2_tiny(19, aspp_branches=2).eval()
    torch.nn.init.normal_(model.layer5.conv2d_list[0].weight, std=1)  # or one class would win everywhere
    return model


@pytest.fixture
def weights(model: DeepLabV2, tmp_path: Path) -> str:
    return str(save_weights(model, tmp_path / "released.pth", entry="model"))


def picture(seed: int = 0, size: tuple[int, int] = (48, 80)) -> Tensor:
    return StreetScenes(1, size=size, seed=seed)[0].image


def command(weights: str, tmp_path: Path, size: str) -> list[str]:
    return ["--weights", weights, "--network", "tiny", "--out", str(tmp_path / "out"), "--size", size]


@torch.no_grad()
def expected(model: DeepLabV2, image: Tensor, size: tuple[int, int] | None) -> Tensor:
    small = image[None] if size is None else tf.interpolate(image[None], size=size, mode="bilinear", antialias=True)
    logits = model.forward_features(small.float() / 255)
    return tf.interpolate(logits, size=image.shape[1:], mode="bilinear", align_corners=True)[0].argmax(0)


@pytest.mark.parametrize("size", ["32x64", "native"])
def test_predict__ids_colors_and_overlay(
    size: str, model: DeepLabV2, weights: str, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    images = {"one": picture(1), "deep/two": picture(2, (40, 56))}
    write_png(folder / "one.png", images["one"])
    io.write_image_jpeg(
        str(folder / "deep" / "two.JPG"), images["deep/two"].permute(1, 2, 0).contiguous().numpy(), "rgb", 90
    )
    images["deep/two"] = torch.from_numpy(np.array(Image.open(folder / "deep" / "two.JPG"))).permute(2, 0, 1)
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    assert predict.main([*command(weights, tmp_path, size), str(folder)]) == 0
    assert f"2 of 2 images into {out}" in capsys.readouterr().out
    assert len([path for path in out.rglob("*") if path.is_file()]) == 6
    for name, image in images.items():
        want = expected(model, image, None if size == "native" else (32, 64))
        assert len(want.unique()) > 1
        ids = read_png(out / f"{name}_trainIds.png")
        assert ids.shape == (1, *image.shape[1:])
        assert torch.equal(ids[0].long(), want)
        color = read_png(out / f"{name}_color.png")
        assert torch.equal(color, colorize(want))
        blend = (image.double() + color.double()) / 2
        assert (read_png(out / f"{name}_overlay.png").double() - blend).abs().max() <= 0.5


def test_predict__own_checkpoints_by_entry_and_only_what_is_asked(model: DeepLabV2, tmp_path: Path) -> None:
    other = deeplab_v2_tiny(19, aspp_branches=2)
    path = tmp_path / "copied.pt"
    teacher = {f"module.{name}": value for name, value in model.state_dict().items()}
    config = {"network": "tiny", "aspp_branches": 2, "target_size": "48x80"}
    torch.save({"student": other.state_dict(), "teacher": teacher, "step": 1, "config": config}, path)
    write_png(tmp_path / "x.png", picture())
    flags = ["--weights", str(path), "--entry", "teacher", str(tmp_path / "x.png"), "--what", "ids"]
    assert predict.main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["x_trainIds.png"]
    ids = read_png(tmp_path / "out" / "x_trainIds.png")[0]
    assert torch.equal(ids.long(), expected(model, picture(), (48, 80)))
    assert not torch.equal(ids.long(), expected(other.eval(), picture(), (48, 80)))


def test_predict__folders_by_the_one_listing(weights: str, tmp_path: Path, capsys: Capture) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    for name in ("A.PNG", "frame.0001", "frame.0002", "linked/b.png"):
        write_png(tmp_path / "x.png", picture())
        (tmp_path / "x.png").rename(folder / name)
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(folder / "c.jfif", "jpeg")
    for name in ("._A.PNG", "Thumbs.db", "d.heic", "linked/e.txt"):
        (folder / name).write_bytes(b"something else")
    assert predict.main([*command(weights, tmp_path, "32x64"), str(folder), "--what", "ids"]) == 0
    printed = capsys.readouterr()
    assert "5 of 5 images" in printed.out
    assert f"{folder}: left out, being neither PNG nor JPEG: d.heic, linked/e.txt" in printed.err
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    stems = ("A", "c", "frame.0001", "frame.0002", "linked/b")
    assert names == [f"{stem}_trainIds.png" for stem in stems]


def test_argmax_at__is_the_argmax_of_the_upsampled_logits() -> None:
    logits = torch.randn(1, 7, 5, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits[:, 1]  # of equals the first, as argmax has it
    whole = tf.interpolate(logits, size=(37, 53), mode="bilinear", align_corners=True)[0]
    assert torch.equal(predict.argmax_at(logits, (37, 53)).long(), whole.argmax(0))


def png(width: int, height: int, bits: int, color: int) -> bytes:
    """A PNG's beginning."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, color, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + head + bytes(20)


def jpeg(width: int, height: int, channels: int) -> bytes:
    """A JPEG's beginning: a comment, then the frame."""
    frame = b"\x08" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes([channels])
    return b"\xff\xd8\xff\xfe\0\x04hi\xff\xff\xc0\0\x11" + frame + bytes(20)


UNREADABLE = {
    "empty": (b"", "is empty; .* download it again"),
    "gif": (b"GIF89a....", "is neither PNG nor JPEG; convert it"),
    "png-short": (b"\x89PNG\r\n\x1a\n....", "is cut off"),
    "palette": (png(8, 8, 8, 3), "cannot be decoded"),
    "deep": (png(8, 8, 16, 2), "expected 8 bits per channel, got 16; .* Convert it"),
    "png-huge": (png(20000, 20000, 8, 2), "has 20000 x 20000 pixels, more than"),
    "png-cut": (png(8, 8, 8, 2), "cannot be decoded"),
    "jpeg-short": (b"\xff\xd8\xff\xc0", "is cut off or damaged"),
    "jpeg-length": (b"\xff\xd8\xff\xe0\0\0\0\0", "is cut off or damaged"),
    "jpeg-huge": (jpeg(60000, 60000, 3), "has 60000 x 60000 pixels, more than"),
    "cmyk": (jpeg(8, 8, 4), "is a JPEG of 4 channels; convert it to RGB"),
    "jpeg-cut": (jpeg(8, 8, 3), "cannot be decoded"),
}


def test_unreadable_images__are_named_and_stop_or_are_skipped(weights: str, tmp_path: Path, capsys: Capture) -> None:
    for name, (data, message) in UNREADABLE.items():
        (tmp_path / f"{name}.png").write_bytes(data)
        with pytest.raises(SystemExit, match=rf"error: .*{name}\.png: {message}"):
            predict.main([*command(weights, tmp_path, "32x64"), str(tmp_path / f"{name}.png")])
    bad = [str(path) for path in tmp_path.glob("*.png")]
    with pytest.raises(SystemExit, match="none of the images could be read"):
        predict.main([*command(weights, tmp_path, "32x64"), *bad, "--skip"])
    write_png(tmp_path / "good.png", picture())
    assert predict.main([*command(weights, tmp_path, "32x64"), *bad, str(tmp_path / "good.png"), "--skip"]) == 0
    printed = capsys.readouterr().out
    assert "skipped:" in printed
    assert f"1 of {len(bad) + 1} images into" in printed
    names = [f"good_{kind}.png" for kind in ("color", "overlay", "trainIds")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_predict__refuses_before_anything_is_written(weights: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("a/x.png", "b/x.png", "b/x_color.png", "a/y.png"):
        write_png(tmp_path / name, picture())
    (tmp_path / "y.jpg").write_bytes(b"")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for images, out, message in (
        ([str(tmp_path / "none.png")], "out", r"none\.png: no such file or folder"),
        ([str(tmp_path / "empty")], "out", r"empty: holds no PNG or JPEG images"),
        ([a, b], "out", r"x\.png and .*x\.png: would both become .*x_\*\.png; predict them apart"),
        ([f"{a}/y.png", str(tmp_path / "y.jpg")], "out", "would both become"),
        ([f"{b}/x.png", f"{b}/x_color.png"], "b", r"x_color\.png: is an input and would be written over"),
        ([a], "a", "whose images are the input"),
        ([a], "a/deep", "whose images are the input"),
    ):
        with pytest.raises(SystemExit, match=rf"error: .*{message}"):
            predict.main(["--weights", weights, "--network", "tiny", *images, "--out", str(tmp_path / out)])
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "a").iterdir())) == 2
    good, out = [f"{a}/x.png", "--size", "32x64"], ["--out", str(tmp_path / "out")]
    for path, message in (
        (str(tmp_path / "none.pth"), "no such file"),
        (str(save_weights(deeplab_v2_tiny(5), tmp_path / "five.pth")), "expected everything to match"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main(["--weights", path, "--network", "tiny", *good, *out])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=f"^error: --out {tmp_path}/file: is a file; name a folder"):
        predict.main(["--weights", str(tmp_path / "none.pth"), *good, "--out", str(tmp_path / "file")])


@pytest.mark.parametrize("flags", [["--size", "512x"], ["--size", "0x5"], ["--size", "axb"], ["--device", "nowhere"]])
def test_predict__wrong_flags_exit_with_2(flags: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        predict.main(["--weights", "w", "x.png", "--out", "o", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_predict__as_a_command(weights: str, tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", picture())
    script = [sys.executable, predict.__file__, *command(weights, tmp_path, "native"), "--device", "cpu"]
    for image, code, said in (
        (str(tmp_path / "x.png"), 0, []),
        ("none.png", 1, ["error: none.png: no such file or folder; check the path."]),
    ):
        done = subprocess.run([*script, image], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert not said or done.stderr.strip().splitlines() == said
