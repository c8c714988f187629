"""crossmix in a training loop of its own: CamVid, from drives by day to a drive at dusk.

    python examples/camvid_day_to_dusk.py CAMVID

CAMVID contains `day`, `dusk-train` and `dusk-test`, each with `images/` and `labels/`: drive 0006R0 and the two halves
of 0001TP of CamVid in the SegNet version (ids 0..10; 11 is unlabelled). Network, data loading and training loop are
part of this file; crossmix provides the algorithm, its recipe, the metric and the resizing of label maps. The script
compares training on the day alone, with the colour jitter and blur that DACS uses, with DACS, which also sees the
images of `dusk-train` but not their labels. Both are scored on `dusk-test`.
"""

import argparse
import statistics
from pathlib import Path

import torch
from kornia_rs import io
from torch import Tensor, nn
from torch.nn import functional as tf

from crossmix import StrongAugment, recipes
from crossmix.datasets import image_files
from crossmix.evaluation import resize_labels
from crossmix.metrics import ConfusionMatrix

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
SIZE, CROP, BATCH = (120, 160), (96, 128), 4


class Network(nn.Module):
    """A small encoder and decoder with skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.down1, self.down2, self.down3 = (block(width * k, 2 * width * k, stride=2) for k in (1, 2, 4))
        self.up2, self.up1, self.up0 = (block(3 * width * k, width * k) for k in (4, 2, 1))
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images in [0, 1] into logits of their size."""
        x0 = self.stem(images - 0.5)
        x1 = self.down1(x0)
        x2 = self.down2(x1)
        x = self.down3(x2)
        for skip, up in ((x2, self.up2), (x1, self.up1), (x0, self.up0)):
            x = up(torch.cat([tf.interpolate(x, size=skip.shape[-2:], mode="bilinear"), skip], 1))
        logits: Tensor = self.head(x)
        return logits


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, step in ((inputs, stride), (outputs, 1)):
        layers += [nn.Conv2d(width, outputs, 3, step, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def load(folder: Path) -> tuple[Tensor, Tensor]:
    """Load all images (N, 3, H, W) and labels (N, H, W) of a folder, uint8, resized to SIZE; 255 where unlabelled."""
    names = [path.name for path in image_files(folder / "images").files] if (folder / "images").is_dir() else []
    if not names:
        raise SystemExit(
            f"{folder}: no images/*.png; expected CAMVID/{{day,dusk-train,dusk-test}}/{{images,labels}}/*.png"
        )
    images, labels = [], []
    for name in names:
        image = torch.from_numpy(io.read_image(str(folder / "images" / name))).permute(2, 0, 1)
        label = torch.from_numpy(io.read_image(str(folder / "labels" / name)))[..., 0]
        images.append(tf.interpolate(image[None], size=SIZE, mode="bilinear", antialias=True)[0])
        labels.append(resize_labels(label, SIZE))
    ids = torch.stack(labels)
    return torch.stack(images), ids.masked_fill(ids >= len(CLASSES), 255)


def crops(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cut a random batch of crops, half of them flipped."""
    batch = []
    for i in torch.randint(len(images), (BATCH,), generator=generator).tolist():
        top, left, flip = (
            int(torch.randint(n, (), generator=generator)) for n in (SIZE[0] - CROP[0] + 1, SIZE[1] - CROP[1] + 1, 2)
        )
        rows, columns = slice(top, top + CROP[0]), slice(left, left + CROP[1])
        image, label = images[i, :, rows, columns], labels[i, rows, columns]
        batch.append((image.flip(-1), label.flip(-1)) if flip else (image, label))
    return torch.stack([image for image, _ in batch]).float() / 255, torch.stack([label for _, label in batch])


def train(
    data: dict[str, tuple[Tensor, Tensor]], method: recipes.Method, seed: int, steps: int, lr: float
) -> nn.Module:
    """Train one network. This stands for the training loop that you already have."""
    torch.manual_seed(seed)
    network = Network()
    training = recipes.self_training(network, len(CLASSES), method=method)
    jitter = StrongAugment(flavor="additive", same_on_batch=True)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    generator = torch.Generator().manual_seed(seed)
    training.train()
    for _ in range(steps):
        day, day_labels = crops(*data["day"], generator)
        dusk, _ = crops(*data["dusk-train"], generator)
        if method == "source":  # a fair baseline has the same colour jitter and blur as DACS
            day = jitter(day, generator=generator)
        output = training(day, day_labels, dusk, generator=generator)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        training.update()
        schedule.step()
    return network.eval()


@torch.no_grad()
def score(network: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Compute the IoU of each class and their mean, in percent."""
    confusion = ConfusionMatrix(len(CLASSES))
    for image, label in zip(images, labels, strict=True):
        confusion.update(network(image[None].float() / 255).argmax(1), label[None])
    iou = confusion.compute()
    return [100 * value for value in (*iou.per_class.tolist(), iou.mean)]


def main() -> None:
    """Train and print a table of means and standard deviations over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()
    data = {name: load(args.camvid / name) for name in ("day", "dusk-train", "dusk-test")}
    table: dict[recipes.Method, list[list[float]]] = {"source": [], "dacs": []}
    for seed in range(args.seeds):
        for method, rows in table.items():
            rows.append(score(train(data, method, seed, args.steps, args.lr), *data["dusk-test"]))
            print(f"seed {seed}  {method:6}  mIoU {rows[-1][-1]:5.2f} %", flush=True)
    print(f"\n{'class':12}" + "".join(f"{'source + jitter' if name == 'source' else name:>18}" for name in table))
    for i, name in enumerate((*CLASSES, "mIoU")):
        cells = [[row[i] for row in rows] for rows in table.values()]
        spread = [statistics.stdev(cell) if len(cell) > 1 else 0.0 for cell in cells]
        texts = [f"{statistics.mean(cell):.2f} +- {sd:.2f}" for cell, sd in zip(cells, spread, strict=True)]
        print(f"{name:12}" + "".join(f"{text:>18}" for text in texts))


if __name__ == "__main__":
    main()
