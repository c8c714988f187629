"""The domain gap of StreetScenes, measured with supervised networks only.

Trains the same small network with the same budget on labelled source scenes and on labelled target scenes, and scores
both on held-out target scenes (and the first on held-out source scenes as well). StreetScenes was designed by these
figures alone, before any adaptation method was run on it: the target-trained network should be at least 40 points of
mIoU above the source-only one, and the source-only one above chance.
"""

import statistics
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

SIZE = (64, 128)
STEPS, BATCH, LR, SCENES, TEST_SCENES = 2500, 4, 0.002, 400, 100
OPTIONS = {"steps": STEPS, "batch": BATCH, "lr": LR, "scenes": SCENES, "test_scenes": TEST_SCENES}


def train(domain: str, seed: int) -> DeepLabV2:
    """Train on one domain with its labels; scenes and network are those of the trainer's demo."""
    torch.manual_seed(seed)
    scenes = StreetScenes(SCENES, domain=domain, seed=0 if domain == "source" else 1)  # type: ignore[arg-type]
    memory = [scenes[i] for i in range(len(scenes))]
    crops = KeyedCrops(memory, SIZE, seed=seed, stream=0)
    network = deeplab_v2_tiny().train()
    optimizer = torch.optim.SGD(parameter_groups(network, LR), LR, momentum=0.9, weight_decay=5e-4)
    for step in range(STEPS):
        batch = [crops[step * BATCH + i] for i in range(BATCH)]
        images, labels = (torch.stack(parts) for parts in zip(*batch, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = poly_lr(step, STEPS, group["initial_lr"])
        optimizer.zero_grad()
        loss: Tensor = F.weighted_cross_entropy(network(images.float() / 255), labels, normalizer="valid")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network


def score(network: DeepLabV2, domain: str) -> dict[str, Any]:
    scenes = StreetScenes(TEST_SCENES, domain=domain, seed=2)  # type: ignore[arg-type]
    iou = evaluate(network, (scenes[i] for i in range(len(scenes))))["native"].compute()
    return {"miou": iou.mean, "per_class": dict(zip(CLASS_NAMES, iou.per_class.tolist(), strict=True))}


def run(seeds: int) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {"source on target": [], "target on target": [], "source on source": []}
    for seed in range(seeds):
        source_only, oracle = train("source", seed), train("target", seed)
        rows["source on target"].append(score(source_only, "target"))
        rows["target on target"].append(score(oracle, "target"))
        rows["source on source"].append(score(source_only, "source"))
        print(f"seed {seed}: " + ", ".join(f"{k} {100 * v[-1]['miou']:.2f} %" for k, v in rows.items()), flush=True)
    print(f"\n{'class':14}" + "".join(f"{name:>18}" for name in rows))
    for name in CLASS_NAMES:
        means = [statistics.mean(run["per_class"][name] for run in runs) for runs in rows.values()]
        print(f"{name:14}" + "".join(f"{100 * mean:>18.2f}" for mean in means))
    return {"torch": str(torch.__version__), "options": OPTIONS, "rows": rows}
