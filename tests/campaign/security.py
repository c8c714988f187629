"""Files and options of an attacker: no code runs, nothing outside is read, memory and time stay small."""

import contextlib
import ctypes
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import resource
import runpy
import struct
import subprocess
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attacks import Calls, bomb, packed, recompressed, shared, written
from crossmix.datasets import GTA5, SegmentationFolder, StreetScenes, read_classes, read_image
from crossmix.datasets._images import read_header
from crossmix.datasets._png import read_png
from crossmix.engine import CheckpointStore, RunLog
from crossmix.models import deeplab_v2_tiny, load_weights
from oracles import picture, save
from runs import FORKED, fork

EVERY = {"short": 100, "ci": 5, "nightly": 1}
"""Of the attacks, which one in so many is tried."""
SECONDS = 20
"""What a reader may take."""
MEGABYTES = {"image": 400}
"""What the resident memory may grow by: 100 million pixels are permitted; all other files are smaller by far."""
OURS = ("DataError", "WeightsError", "CheckpointError", "NetworkError", "ArgumentTypeError")


class Attack(NamedTuple):
    """A file or folder, and what reads it."""

    name: str
    make: Callable[[Path], Path]  # in an empty folder
    reader: Callable[[Path], object]


def run(profile: str) -> dict[str, Any]:
    """Attacks of all kinds, each on a process of its own."""
    import evaluate  # noqa: F401 - here, so that no process has to load it

    torch.set_num_threads(1)
    tried: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    wrong = {f"payload {what}": "it leaves no trace" for what in PAYLOADS if not is_live(what)}
    for kind, attacks in KINDS.items():
        for attack in list(attacks())[:: EVERY[profile]]:
            outcome = outcome_of(attack, MEGABYTES.get(kind, 32))
            tried[kind] += 1
            ended[outcome] += 1
            if outcome not in {"refused", "harmless"}:
                wrong.setdefault(f"{kind}: {outcome}"[:300], attack.name)
    figures = {f"{kind}s": tried[kind] for kind in KINDS}
    return {**figures, "refused by name": ended["refused"], "read as harmless": ended["harmless"], "wrong": wrong}


def outcome_of(attack: Attack, megabytes: int) -> str:
    """How the reader ends: refusing the file by name, reading it without harm, or as it should not."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "folder"
        folder.mkdir()
        path = attack.make(folder)
        told, tell = multiprocessing.Pipe(duplex=False)
        process = fork(read, attack.reader, path, megabytes, tell)
        tell.close()
        try:
            said = told.recv() if told.poll(SECONDS) else f"no end within {SECONDS} seconds"
        except EOFError:
            process.join()
            said = f"it ended with {process.exitcode}"
        process.kill()
        process.join()
        FORKED.remove(process)
        return "code was run" if (Path(root) / "trace").exists() else str(said)


def read(
    begun: Callable[[], object], reader: Callable[[Path], object], path: Path, megabytes: int, tell: Connection
) -> None:
    """Read, and say how that ends, in a process with no more than a gigabyte."""
    begun()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 30), held + (1 << 30)))
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    with contextlib.suppress(AttributeError, OSError):  # where there is neither, less is noticed
        ctypes.CDLL(None).malloc_trim(0)  # what was inherited and is free would be taken first
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader(path)
            said = "harmless"
        except SystemExit as error:
            said = "refused" if str(error).startswith("error: ") else f"it ended with {error}"
        except Exception as error:  # noqa: BLE001
            ours = type(error).__name__ in OURS and (type(error).__name__ == OURS[-1] or str(path.parent) in str(error))
            said = "refused" if ours else f"{type(error).__name__}: {error}".replace(str(path.parent), "")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tell.send(said if grown <= megabytes else f"it took {grown:.0f} MB")


def put(content: bytes, name: str, folder: Path) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


# ---------------------------------------------------------------------------------------------- weights, checkpoints


def script(trace: Path) -> str:
    """A script that leaves a trace."""
    path = trace.with_name("script.py")
    path.write_text(f"open({str(trace)!r}, 'w').close()")
    return str(path)


PAYLOADS: dict[str, Callable[[Path], object]] = {
    "os.system": lambda trace: Calls(os.system, f"touch {trace}"),
    "os.mkdir": lambda trace: Calls(os.mkdir, str(trace)),
    "exec": lambda trace: Calls(exec, f"open({str(trace)!r}, 'w').close()"),
    "eval": lambda trace: Calls(eval, f"open({str(trace)!r}, 'w').close()"),
    "open": lambda trace: Calls(open, str(trace), "w"),
    "subprocess": lambda trace: Calls(subprocess.call, ["touch", str(trace)]),
    "a method": lambda trace: Calls(Path.touch, trace),
    "a script": lambda trace: Calls(runpy.run_path, script(trace)),
    "a pickle in it": lambda trace: Calls(pickle.loads, pickle.dumps(Calls(os.mkdir, str(trace)))),
    "a lazy call": lambda trace: Calls(list, Calls(map, os.mkdir, [str(trace)])),
}
"""Objects that leave a trace if they are unpickled without restrictions."""


def as_weights(path: Path) -> object:
    return load_weights(deeplab_v2_tiny(5), path)


def as_run(path: Path, network: str | None = "tiny") -> object:
    from evaluate import load_network, trained_size

    return load_network(str(path), "student", network=network), trained_size(str(path))


def as_checkpoint(path: Path, *, hashed: bool = True, best: bool = False) -> object:
    """As one of a run; the hash is the attacker's too."""
    path = path.rename(path.with_name("best.pt" if best else "step-0000001.pt"))
    if hashed:
        path.with_name(f"{path.name}.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    store = CheckpointStore(path.parent)
    return store.load_best() if best else store.load_newest()


READERS: dict[str, Callable[[Path], object]] = {
    "load_weights": as_weights,
    "load_weights of safetensors": lambda path: as_weights(path.rename(path.with_suffix(".safetensors"))),
    "evaluate.py": as_run,
    "a checkpoint": as_checkpoint,
    "a checkpoint without its hash": partial(as_checkpoint, hashed=False),
    "the best checkpoint": partial(as_checkpoint, best=True),
}


def with_payload(what: str, kind: str, folder: Path) -> Path:
    payload = PAYLOADS[what](folder.parent / "trace")
    return put(packed({"step": 1, "student": {"conv1.weight": payload, "w": torch.ones(2)}}, kind), "x.pth", folder)


def pickles() -> Iterator[Attack]:
    """Each payload in each form of file, before each reader."""
    for what in PAYLOADS:
        for reader, call in READERS.items():
            for kind in ("zip", "legacy", "pickle"):
                yield Attack(f"{what}, {kind}, {reader}", partial(with_payload, what, kind), call)


def is_live(what: str) -> bool:
    """Whether a payload leaves its trace without restrictions: otherwise the attacks would prove nothing."""
    unrestricted = Attack(what, partial(with_payload, what, "pickle"), lambda path: pickle.loads(path.read_bytes()))
    return outcome_of(unrestricted, 1000) == "code was run"


def replaced(whole: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch with another pickle inside, whose checksums are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.infolist():
            data = old.read(part)
            new.writestr(part.filename, change(data) if part.filename.endswith("data.pkl") else data)
    return file.getvalue()


def understated(whole: bytes) -> bytes:
    """A zip file whose directory claims that its largest part has few bytes."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    entry = whole.rindex(b"PK\1\2", 0, whole.rindex(largest.filename.encode()))
    return whole[: entry + 24] + struct.pack("<I", 100) + whole[entry + 28 :]


def deep(levels: int) -> bytes:
    """A pickle of dicts within dicts."""
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * levels + b"}" + b"s" * levels + b"."


MANY = {"step": 1, "student": {"conv1.weight": torch.ones(0x7BCD)}}
LARGE = (b"M\xcd\x7b", b"J\xff\xff\xff\x7f")  # that many numbers, and two thousand million
BOMBS: dict[str, Callable[[], bytes]] = {
    "zeros": lambda: bomb(torch.zeros(1 << 24)),
    "zeros of less than it says": lambda: understated(bomb(torch.zeros(1 << 24))),
    "more numbers than there are": lambda: replaced(written(MANY), lambda data: data.replace(*LARGE)),
    "more numbers, legacy": lambda: written(MANY, legacy=True).replace(*LARGE),
    "a long bytearray": lambda: written({"w": torch.ones(2), "student": Calls(bytearray, 1 << 40)}),
    "a long bytearray, legacy": lambda: written({"student": Calls(bytearray, 1 << 40)}, legacy=True),
    "deep dicts": lambda: replaced(written({}), lambda data: deep(50_000)),
    "deep dicts, as a pickle": lambda: deep(50_000),
    "dicts on many paths": lambda: written({"step": 1, "student": shared(8, 60, {"w": torch.ones(2)})}),
    "dicts on many paths and code": lambda: written(
        {"step": Calls(os.getpid), "student": shared(30, 2, {"w": torch.ones(2)})}
    ),
    "a large view of one number": lambda: written(
        {"step": 1, "student": {"conv1.weight": torch.ones(1).expand(1 << 50)}}
    ),
    "a compressed checkpoint": lambda: recompressed(written({"step": 1, "w": torch.zeros(1 << 24)})),
}


def bombs() -> Iterator[Attack]:
    """Small files that are large once they are read."""
    for what, make in BOMBS.items():
        for reader, call in READERS.items():
            yield Attack(f"{what}, {reader}", lambda folder, make=make: put(make(), "x.pth", folder), call)


# ------------------------------------------------------------------------------------------------------------ paths

LINES = (
    "../outside/1", "../../outside/1", "images/../../outside/1", "./../outside/1", "..\\outside\\1", "{outside}/1",
    "{outside}/1.png", "C:\\outside\\1", "//host/outside/1", "~/1", "file://{outside}/1.png", "%2e%2e/outside/1",
    "\0", "1\0", "$HOME", "`touch {trace}`", "; touch {trace}", "a" * 100_000, "a/" * 50_000, "..", "/",
    "1\n../outside/1",
)  # fmt: skip


def data(line: str, folder: Path) -> Path:
    """A small data set, one that an attacker wants, and a list."""
    StreetScenes(1, size=(16, 16)).write(folder / "root", layout="gta5")
    save(folder.parent / "outside" / "1.png", picture())
    text = line.format(outside=folder.parent / "outside", trace=folder.parent / "trace")
    return put(text.encode(), "list.txt", folder)


def inside(reader: Callable[[Path, Path], Any], path: Path) -> None:
    """Read what a list names, which must be inside of the data set."""
    root = path.parent / "root"
    found = reader(root, path)
    for i in range(len(found)):
        if not found.files[i].image.resolve().is_relative_to(root.resolve()):
            raise RuntimeError("it reads a file outside of the folder")
        found[i]


LISTS: dict[str, Callable[[Path, Path], Any]] = {
    "SegmentationFolder": lambda root, path: SegmentationFolder(root, names=path),
    "GTA5": lambda root, path: GTA5(root, names=path),
    "a pattern": lambda root, path: SegmentationFolder(root / "images" / "*.png", names=path),
}


def linked(goal: str, folder: Path) -> Path:
    """A data set with a link to something that is no image."""
    (folder / "secret").write_text("password")
    (folder / "1.png").symlink_to(goal)
    return folder / "1.png"


def lists_and_links() -> Iterator[Attack]:
    for line in LINES:
        for reader, call in LISTS.items():
            yield Attack(f"the line {line[:30]!r}, {reader}", partial(data, line), partial(inside, call))
    for goal in ("secret", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd", ".", "1.png", "/proc/self/fd"):
        yield Attack(f"a link to {goal}", partial(linked, goal), lambda path: SegmentationFolder(path.parent)[0])
        yield Attack(f"a link to {goal}, by its path", partial(linked, goal), read_image)


# ----------------------------------------------------------------------------------------------------------- images


def chunk(name: bytes, body: bytes, length: int | None = None) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + body))
    return struct.pack(">I", len(body) if length is None else length) + name + body + crc


def png(
    width: int, height: int, depth: int = 8, color: int = 2, more: bytes = b"", pixels: bytes = bytes(100)
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def jpeg(*sizes: tuple[int, int]) -> bytes:
    """A JPEG with so many headers, and no pixels."""
    frames = b"".join(
        b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", *size) + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
        for size in sizes
    )
    return b"\xff\xd8" + frames + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00" + bytes(100) + b"\xff\xd9"


LIMIT = 2**31 - 1
SIZES = (
    (LIMIT, 1),
    (1, LIMIT),
    (2**32 - 1,) * 2,
    (2**31, 2**31),
    (60_000,) * 2,
    (0, 0),
    (0, 5),
    (5, 0),
    (10_001, 10_000),
)
ZEROS = zlib.compress(bytes(1 << 26))
HUGE_FRAME = chunk(b"acTL", struct.pack(">II", 1, 0)) + chunk(
    b"fcTL", struct.pack(">IIIIIHHBB", 0, 60_000, 60_000, 0, 0, 1, 1, 0, 0)
)
IMAGES: dict[str, Callable[[], bytes]] = {
    "EXIF of 4 GB": lambda: png(4, 4, more=chunk(b"eXIf", b"II*\0", 2**32 - 1)),
    "EXIF of 2 GB": lambda: png(4, 4, more=chunk(b"eXIf", b"II*\0", LIMIT)),
    "a compressed text": lambda: png(4, 4, more=chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "a compressed profile": lambda: png(4, 4, more=chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "a compressed text in UTF-8": lambda: png(4, 4, more=chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    "more pixels than it has": lambda: png(4, 4, pixels=bytes(1 << 26)),
    "more pixels of 4 bits": lambda: png(4, 4, 4, 0, pixels=bytes(1 << 26)),
    "a second, large header": lambda: png(4, 4, more=png(60_000, 60_000)[8:33]),
    "an animation of large frames": lambda: png(4, 4, more=HUGE_FRAME),
    "a large palette": lambda: png(4, 4, 8, 3, more=chunk(b"PLTE", bytes(3 << 16))),
    "JPEG, 65,535 by 65,535": lambda: jpeg((65_535, 65_535)),
    "JPEG of no size": lambda: jpeg((0, 0)),
    "JPEG, no lines": lambda: jpeg((0, 8)),
    "JPEG, two headers": lambda: jpeg((8, 8), (65_535, 65_535)),
    "JPEG, two headers, the large one first": lambda: jpeg((65_535, 65_535), (8, 8)),
    **{
        f"{width} x {height}, {depth} bits, colour type {color}": partial(png, width, height, depth, color)
        for width, height in SIZES for depth in (1, 4, 8, 16) for color in (0, 2, 3, 6)
    },
}  # fmt: skip


def images() -> Iterator[Attack]:
    """Headers of absurd sizes, and what is compressed to little."""
    for what, make in IMAGES.items():
        for reader, call in (
            ("an image", read_image),
            ("a header", read_header),
            ("ids", partial(read_png, deep=True)),
            ("a label map", lambda path: SegmentationFolder(None, path.parent)[0]),
        ):
            yield Attack(f"{what}, {reader}", lambda folder, make=make: put(make(), "1.png", folder), call)


# ---------------------------------------------------------------------------------------------------------- options

VALUES = (
    None, True, -1, 0, 10**30, 10**400, -math.inf, math.nan, 1e308, "", "\0", "../../x", "x" * 100_000, "os:system",
    [], [[]], {}, {"a": {"b": None}}, "\ud800",
)  # fmt: skip
TEXTS: dict[str, bytes] = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a deep value": b'{"lr": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "a long number": b'{"lr": ' + b"9" * 100_000 + b"}",
    "an infinite number": b'{"lr": 1e999}',
    "no number": b'{"lr": NaN}',
    "an unknown name": b'{"learning_rate": 0.1}',
    "a name of Python": b'{"__class__": "x", "__init__": 1}',
    "one name twice": b'{"lr": 0.1, "lr": []}',
    "no object": b"[1]",
    "a number": b"1",
    "nothing": b"",
    "no text": bytes(range(256)),
    "half": b'{"lr": 0.1',
    "a pickle": pickle.dumps({"lr": 0.1}),
}


def as_options(path: Path) -> object:
    from options import read_options

    return read_options(["--demo", "--config", str(path)], "")


def with_config(name: str, value: object, folder: Path) -> Path:
    """A checkpoint of the trainer, with an option of its own."""
    state = {"student": deeplab_v2_tiny(5).state_dict(), "config": {"network": "tiny", "num_classes": 5, name: value}}
    return put(written(state), "x.pth", folder)


def options() -> Iterator[Attack]:
    """Files of options, of classes and logs; every option with every value, also in a checkpoint."""
    from options import OPTIONS

    for what, text in TEXTS.items():
        for reader, call in (
            ("options", as_options),
            ("classes", read_classes),
            ("a log", lambda path: RunLog(path).read()),
        ):
            yield Attack(f"{what}, {reader}", partial(put, text + b"\n", "x.json"), call)
    for name in OPTIONS:
        for value in VALUES:
            yield Attack(
                f"{name}: {value!r}"[:60], partial(put, json.dumps({name: value}).encode(), "x.json"), as_options
            )
    for name in ("network", "num_classes", "aspp_branches", "target_size"):
        for value in VALUES:
            yield Attack(
                f"a checkpoint's {name}: {value!r}"[:60],
                partial(with_config, name, value),
                partial(as_run, network=None),
            )


KINDS: dict[str, Callable[[], Iterator[Attack]]] = {
    "pickle": pickles, "bomb": bombs, "path": lists_and_links, "image": images, "option": options,
}  # fmt: skip
