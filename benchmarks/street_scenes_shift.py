"""How far apart the two looks of StreetScenes are, told by two networks and nothing else.

Trains the same small network with the same budget on labelled source scenes and on labelled target scenes, and scores
both on held-out target scenes (and the first on held-out source scenes too). StreetScenes was fixed by these figures
alone, before any adaptation method was run on it: the target-trained network at least 40 points of mIoU above the
source-only one, and the source-only one not at chance.

    python benchmarks/street_scenes_shift.py --save
"""

import argparse
import datetime as dt
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossmix import functional as F
from crossmix.datasets import StreetScenes
from crossmix.datasets.classes import CLASS_NAMES
from crossmix.engine import KeyedCrops
from crossmix.evaluation import evaluate
from crossmix.models import DeepLabV2, deeplab_v2_tiny
from crossmix.optim import parameter_groups, poly_lr

RESULT = Path(__file__).parent / "results" / "street_scenes_shift.json"
SIZE = (64, 128)


def train(domain: str, seed: int, args: argparse.Namespace) -> DeepLabV2:
    """Supervised training on one domain: scenes and network as in the demo of the trainer."""
    torch.manual_seed(seed)
    scenes = StreetScenes(args.scenes, domain=domain, seed=0 if domain == "source" else 1)  # type: ignore[arg-type]
    memory = [scenes[i] for i in range(len(scenes))]
    crops = KeyedCrops(memory, SIZE, seed=seed, stream=0)
    network = deeplab_v2_tiny().train()
    optimizer = torch.optim.SGD(parameter_groups(network, args.lr), args.lr, momentum=0.9, weight_decay=5e-4)
    for step in range(args.steps):
        batch = [crops[step * args.batch + i] for i in range(args.batch)]
        images, labels = (torch.stack(parts) for parts in zip(*batch, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, args.steps, group["initial_lr"])
        optimizer.zero_grad()
        loss: Tensor = F.weighted_cross_entropy(network(images.float() / 255), labels, normalizer="valid")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network


def score(network: DeepLabV2, domain: str, args: argparse.Namespace) -> dict[str, Any]:
    """IoU on held-out scenes, as fractions."""
    scenes = StreetScenes(args.test_scenes, domain=domain, seed=2)  # type: ignore[arg-type]
    iou = evaluate(network, (scenes[i] for i in range(len(scenes))))["native"].compute()
    return {"miou": iou.mean, "per_class": dict(zip(CLASS_NAMES, iou.per_class.tolist(), strict=True))}


def main() -> None:
    """Print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--test-scenes", type=int, default=100)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {"source on target": [], "target on target": [], "source on source": []}
    for seed in range(args.seeds):
        source_only, oracle = train("source", seed, args), train("target", seed, args)
        rows["source on target"].append(score(source_only, "target", args))
        rows["target on target"].append(score(oracle, "target", args))
        rows["source on source"].append(score(source_only, "source", args))
        print(f"seed {seed}: " + ", ".join(f"{k} {100 * v[-1]['miou']:.2f} %" for k, v in rows.items()), flush=True)
    print(f"\n{'class':14}" + "".join(f"{name:>18}" for name in rows))
    for name in CLASS_NAMES:
        means = [statistics.mean(run["per_class"][name] for run in runs) for runs in rows.values()]
        print(f"{name:14}" + "".join(f"{100 * mean:>18.2f}" for mean in means))
    if args.save:
        document = {
            "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
            "torch": str(torch.__version__),
            "options": {key: value for key, value in vars(args).items() if key != "save"},
            "rows": rows,
        }
        RESULT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
