"""Flipped bits and cut files of checkpoints and of their hashes: nothing but what was saved is ever loaded."""

import random
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from crossmix.engine import CheckpointError, CheckpointStore
from oracles import flipped
from runs import tensors

TRIES = {"short": (6, 4), "ci": (50, 10), "nightly": (500, 50)}
TARGETS = ("checkpoint", "hash", "checkpoint without its hash")


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer{i}": torch.rand(40, generator=generator) for i in range(4)}
    return {"step": step, "student": weights, "optimizer": {"lr": 0.1 / step, "momentum": [torch.ones(7) * step]}}


def same(one: Any, two: Any) -> bool:
    a, b = tensors(one), tensors(two)
    return (
        one["step"] == two["step"]
        and one["optimizer"]["lr"] == two["optimizer"]["lr"]
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


def loaded(store: CheckpointStore, *, may_be_newest: bool) -> str:
    """Which of the two checkpoints comes back, or what is wrong with what does."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = store.load_newest()
        except CheckpointError as error:
            return f"WRONG: refused both: {error}"
        except Exception as error:  # noqa: BLE001
            return f"WRONG: {type(error).__name__}: {error}"
    if found is None:
        return "WRONG: nothing was found"
    if same(found, state(1)):
        return "older one loaded" if told else "WRONG: older one loaded without a warning"
    if not same(found, state(2)):
        return "WRONG: other contents were loaded"
    return "newest one loaded, its contents unharmed" if may_be_newest else "WRONG: a file with another hash was loaded"


def run(profile: str) -> dict[str, Any]:
    """Damage the newer of two checkpoints."""
    flips, cuts = TRIES[profile]
    rng = random.Random(0)  # noqa: S311
    outcomes: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(folder)
        store.save(1, state(1))
        path = store.save(2, state(2))
        digest = Path(f"{path}.sha256")
        whole = {path: path.read_bytes(), digest: digest.read_bytes()}
        for i in range(flips + cuts):
            target = TARGETS[i % 3]
            one = digest if target == "hash" else path
            place = rng.randrange(len(whole[one]))
            bit = 1 << rng.randrange(8)
            one.write_bytes(flipped(whole[one], place, bit) if i < flips else whole[one][:place])
            if target == TARGETS[2]:
                digest.unlink()
            outcome = loaded(store, may_be_newest=target != "checkpoint")
            outcomes[outcome] += 1
            if outcome.startswith("WRONG"):
                how = f"bit {bit} flipped" if i < flips else "cut"
                wrong.setdefault(outcome, f"{target}, {how} at byte {place}")
            for file, content in whole.items():
                file.write_bytes(content)
    return {"bit flips": flips, "truncations": cuts, **outcomes, "wrong": wrong}
