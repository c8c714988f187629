"""Crops per second from PNG files and from the cache, compared with Pillow.

Images of the sizes of GTA5 and Cityscapes are resized as in the released code (720 x 1280 bicubic, 512 x 1024 bilinear;
labels nearest), label ids are mapped, and the same `KeyedCrops` cuts crops of 512 x 512:

- `Pillow`: decoding and resizing with Pillow, mapping ids with a table.
- `PNG`: the readers of crossmix.
- `cache`: `CachedSamples`, after every sample was read once; `first read` includes verifying the bytes.

All files are in the page cache. Images are real if the environment variable CROSSMIX_TEST_DATA is set, else rendered
scenes with noise, which compress like photographs; the result file says which.
"""

import copy
import itertools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.speed.common import compare
from crossmix.datasets import GTA5, CachedSamples, Cityscapes, Sample, StreetScenes, write_png
from crossmix.datasets.classes import label_ids, train_ids
from crossmix.engine import KeyedCrops

COUNT = 64  # images per data set; 8 with --quick
CROP = (512, 512)
BATCH = 2
TRAIN_IDS = train_ids().numpy()
Reader = GTA5 | Cityscapes


class PillowSamples(Dataset[Sample]):
    def __init__(self, reader: Reader, size: tuple[int, int], resampling: Image.Resampling) -> None:
        self.files = reader.files
        self.size = size[::-1]
        self.resampling = resampling

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        files = self.files[index]
        with Image.open(str(files.image)) as image, Image.open(str(files.label)) as label:
            pixels = np.asarray(image.convert("RGB").resize(self.size, self.resampling))
            ids = np.asarray(label.resize(self.size, Image.Resampling.NEAREST))
        return Sample(torch.from_numpy(pixels.copy()).permute(2, 0, 1), torch.from_numpy(TRAIN_IDS[ids]), files.name)


class Onwards(Sampler[int]):
    """Yields the next `count` draws on each iteration."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.start = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        self.start += self.count
        return iter(range(self.start, self.start + self.count))


def real(data: Path, root: Path, count: int) -> str:
    """Copy real images and label maps into the data sets' layouts, repeated to reach `count`."""
    maps = [np.asarray(Image.open(path)) for path in sorted((data / "gta5" / "labels_trainids").glob("*.png"))]
    pairs = Cityscapes(data / "cityscapes", "train").files
    images, labels = root / "gta5" / "images", root / "gta5" / "labels"
    photographs, truth = (root / "cityscapes" / part / "train" / "town" for part in ("leftImg8bit", "gtFine"))
    for folder in (images, labels, photographs, truth):
        folder.mkdir(parents=True)
    for i in range(count):
        shutil.copy(data / "gta5" / "images" / "frame.png", images / f"{i:05d}.png")
        ids = Image.fromarray(label_ids().numpy()[maps[i % len(maps)]]).convert("P")
        ids.save(labels / f"{i:05d}.png")
        files = pairs[i % len(pairs)]
        shutil.copy(str(files.image), photographs / f"town_{i:06d}_000019_leftImg8bit.png")
        shutil.copy(str(files.label), truth / f"town_{i:06d}_000019_gtFine_labelIds.png")
    return f"real: 1 GTA5 frame with {len(maps)} label maps, {len(pairs)} Cityscapes pairs, repeated"


def rendered(root: Path, count: int) -> str:
    """Write a few scenes, rendered at half size, enlarged and with noise, repeated to reach `count`."""
    few = 4
    generator = torch.Generator().manual_seed(0)
    for name, (height, width) in (("gta5", (1052, 1914)), ("cityscapes", (1024, 2048))):
        StreetScenes(count).write(root / name, layout=name, split="train")  # type: ignore[arg-type]
        files = (GTA5(root / name) if name == "gta5" else Cityscapes(root / name)).files
        scenes = StreetScenes(few, domain="target", size=(height // 2, width // 2))
        for i in range(few):
            scene = scenes[i]
            image = functional.interpolate(scene.image[None].float(), size=(height, width), mode="bilinear")[0]
            image += 0.6 * torch.randn(image.shape, generator=generator)
            ids = label_ids()[torch.as_tensor(scene.label).int()]
            write_png(str(files[i].image), image.round().clamp(0, 255).byte())
            write_png(str(files[i].label), functional.interpolate(ids[None, None], size=(height, width))[0, 0])
        for i in range(few, count):
            shutil.copy(str(files[i % few].image), str(files[i].image))
            shutil.copy(str(files[i % few].label), str(files[i].label))
    return f"{few} rendered scenes, enlarged, with noise, repeated"


def loader(samples: Dataset[Sample], workers: int, count: int) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of batches of crops, with `count` crops per epoch."""
    crops = KeyedCrops(samples, CROP, seed=0, stream=0)  # type: ignore[arg-type]
    return DataLoader(crops, BATCH, sampler=Onwards(count), num_workers=workers, persistent_workers=workers > 0)


def throughput(sources: dict[str, Dataset[Sample]], workers: int, rounds: int) -> dict[str, float]:
    """Median crops per second of wall-clock time, with the sources interleaved."""
    counts = {name: 800 if name == "cache" else 16 for name in sources}
    loaders = {name: loader(samples, workers, counts[name]) for name, samples in sources.items()}
    rates: dict[str, list[float]] = {name: [] for name in sources}
    for i in range(1 + rounds):
        for name, batches in loaders.items():
            begin = time.perf_counter()
            seen = sum(len(images) for images, _ in batches)
            if i:  # the first round starts the workers, which verify the samples
                rates[name].append(seen / (time.perf_counter() - begin))
    return {name: statistics.median(values) for name, values in rates.items()}


def crop_by_crop(samples: Dataset[Sample]) -> Callable[[], object]:
    crops = KeyedCrops(samples, CROP, seed=0, stream=0)  # type: ignore[arg-type]
    draws = itertools.count()
    return lambda: crops[next(draws)]


def first_read(cached: CachedSamples) -> Callable[[], object]:
    """Cut the next crop from a copy of the cache, which has not verified any sample yet."""
    draws = itertools.count()
    return lambda: KeyedCrops(copy.copy(cached), CROP, seed=0, stream=0)[next(draws)]


def check_same_work(cached: Sample, read: Sample, pillow: Sample) -> None:
    """Check that cache and reader agree exactly, and with Pillow in all labels and within rounding of two passes."""
    if cached.label is None or read.label is None or pillow.label is None:
        raise RuntimeError(f"{read.name}: a label is missing")
    same = torch.equal(cached.image, read.image) and torch.equal(cached.label, read.label)
    close = (read.image.int() - pillow.image.int()).abs().max() <= 2
    if not (same and close and torch.equal(read.label, pillow.label)):
        raise RuntimeError(f"{read.name}: the pipelines differ")


def data_set(
    reader: Reader, size: tuple[int, int], resampling: Image.Resampling, folder: Path, rounds: int, *, quick: bool
) -> dict[str, object]:
    begin = time.perf_counter()
    cached = CachedSamples(reader, folder, workers=2)
    build = len(reader) / (time.perf_counter() - begin)
    pillow = PillowSamples(reader, size, resampling)
    for i in range(len(cached)):
        check_same_work(cached[i], reader[i], pillow[i])
    sources: dict[str, Dataset[Sample]] = {"Pillow": pillow, "PNG": reader, "cache": cached}
    candidates = {name: crop_by_crop(samples) for name, samples in sources.items()}
    candidates["cache, first read"] = first_read(cached)
    title = f"{type(reader).__name__} at {size[0]} x {size[1]}, one crop, CPU time of one thread"
    rows = compare(title, candidates, "Pillow", rounds=rounds, device="cpu")
    rates = {}
    for workers in (2,) if quick else (0, 1, 2):
        rate = rates[str(workers)] = throughput(sources, workers, max(3, rounds // 3))
        text = ", ".join(f"{name} {value:.1f} ({value / rate['Pillow']:.1f} x)" for name, value in rate.items())
        print(f"  {workers} workers, crops per second: {text}")
    return {
        "images": type(reader).__name__,
        "size": size,
        "bytes_per_png": statistics.mean(Path(str(files.image)).stat().st_size for files in reader.files),
        "one_crop": rows,
        "crops_per_second_by_workers": rates,
        "built_per_second_with_2_workers": build,
    }


def measure(device: str, rounds: int, *, quick: bool) -> dict[str, object]:  # noqa: ARG001 - none is used
    """Measure both data sets; `quick` uses fewer images."""
    count = 8 if quick else COUNT
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = os.environ.get("CROSSMIX_TEST_DATA")
        content = real(Path(data), root, count) if data else rendered(root, count)
        print(content)
        small, large = (512, 1024), (720, 1280)
        results = [
            data_set(reader, size, resampling, root / f"{type(reader).__name__} cached", rounds, quick=quick)
            for reader, size, resampling in (
                (GTA5(root / "gta5", size=large), large, Image.Resampling.BICUBIC),
                (Cityscapes(root / "cityscapes", size=small), small, Image.Resampling.BILINEAR),
            )
        ]
    return {"content": content, "processors": os.cpu_count(), "data_sets": results}
