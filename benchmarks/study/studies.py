"""The rows of each study: a name and a `Variant` each."""

from dataclasses import replace

from benchmarks.study.pairs import PAIRS
from benchmarks.study.trials import Variant
from crossmix import recipes

__all__ = ["BASE", "CAUSES", "METHODS", "OPTIONS", "PRETRAINED", "SEEDS", "row_name", "rows_of", "seeds_of", "steps_of"]

METHODS = {
    "source": Variant("source"),
    "source + jitter": Variant("source", jitter_source=True),
    "pseudo-label": Variant("pseudo-label"),
    "classmix": Variant("classmix"),
    "alignment": Variant("alignment"),
    "dacs": Variant("dacs"),
    "oracle": Variant("source", train_on="target"),
}
BASE = METHODS["dacs"]
STREET = PAIRS["streetscenes"]

# The rows of the pairs that start from ImageNet weights: those above, and what later work adds to DACS.
MIC = recipes.MIC
PRETRAINED = {
    "source": METHODS["source"],
    "source + jitter": METHODS["source + jitter"],
    "pseudo-label": METHODS["pseudo-label"],
    "classmix": METHODS["classmix"],
    "alignment": METHODS["alignment"],
    "alignment, source prior": Variant("alignment", prior="source"),
    "dacs": BASE,
    "dacs + rare classes": replace(BASE, rare_classes=True),
    "dacs + boxes": replace(BASE, boxes=True),
    "dacs + masked consistency": replace(BASE, consistency=True),
    "mic": Variant(
        recipe="mic",
        decay=MIC.decay,
        scope=MIC.scope,
        include_ignored=MIC.include_ignored,
        rare_classes=True,
        consistency=True,
    ),
    "oracle": METHODS["oracle"],
}

# One option of DACS at a time, with all its values in order; the base's own value is the base itself.
OPTIONS: dict[str, dict[str, Variant]] = {
    "threshold": {
        f"{value:g}": BASE if value == STREET.threshold else replace(BASE, threshold=value)
        for value in (0.5, 0.7, 0.9, 0.968)
    },
    "EMA decay": {
        f"{value:g}": BASE if value == STREET.decay else replace(BASE, decay=value) for value in (0.0, 0.9, 0.99, 0.999)
    },
    "ratio of classes": {f"{value:g}": replace(BASE, ratio=value) for value in (0.25, 0.5, 0.75)},
    "lambda scope": {scope: replace(BASE, scope=scope) for scope in ("image", "batch", "pixel", "none")},
    "ignored pixels": {
        "can be drawn": replace(BASE, include_ignored=True),
        "never drawn": replace(BASE, include_ignored=False),
    },
    "teacher's BatchNorm": {
        "batch statistics": replace(BASE, mode="train"),
        "running statistics": replace(BASE, mode="eval"),
    },
    "ASPP branches": {"2": replace(BASE, aspp_branches=2), "4": replace(BASE, aspp_branches=4)},
    "what is pasted": {"classes": BASE, "a box (CutMix)": replace(BASE, boxes=True)},
}

# Possible causes of missed expectations: less training, the threshold and decay of the paper's code, jittered source
# images as in `source + jitter`; hidden blocks too large or too small for the things in the images, and BatchNorm's
# running statistics, which follow partly hidden images, while images of evaluation are whole.
STRICT, SLOW = recipes.RELEASED.threshold, recipes.RELEASED.decay
JITTERED = {"dacs + jitter": replace(BASE, jitter_source=True)}
KEPT = {
    "dacs + masked consistency, statistics kept": replace(BASE, consistency=True, consistency_running_stats=False),
}
CAUSES = {
    "streetscenes": {
        "source": METHODS["source"],
        "source + jitter": METHODS["source + jitter"],
        "classmix": METHODS["classmix"],
        f"classmix, threshold {STRICT}": replace(METHODS["classmix"], threshold=STRICT),
        "dacs": BASE,
        **JITTERED,
    },
    "camvid": {
        f"dacs, threshold {STRICT}": replace(BASE, threshold=STRICT),
        f"dacs, decay {SLOW}": replace(BASE, decay=SLOW),
        **JITTERED,
    },
    "streets-camvid": KEPT,
    "day-dusk": {
        **{f"dacs + masked consistency, blocks of {size}": replace(BASE, consistency=size) for size in (64, 16, 8)},
        **KEPT,
    },
}
SEEDS = {"ablation": 5, "sensitivity": 3, "causes": 3}


def rows_of(study: str, pair: str) -> dict[str, Variant]:
    if study == "sensitivity":
        return {"dacs": BASE} | {
            row_name(option, value): variant
            for option, values in OPTIONS.items()
            for value, variant in values.items()
            if variant != BASE
        }
    if study == "causes":
        return CAUSES[pair]
    return PRETRAINED if is_pretrained(pair) else METHODS


def row_name(option: str, value: str) -> str:
    return f"{option}: {value}"


def seeds_of(study: str, pair: str) -> int:
    return 3 if is_pretrained(pair) else SEEDS[study]


def is_pretrained(pair: str) -> bool:
    return PAIRS[pair].pretrained


def steps_of(study: str, pair: str) -> int:
    """Steps per run; from random weights, studies other than the ablation use a third of those on StreetScenes."""
    return PAIRS[pair].steps if study == "ablation" or is_pretrained(pair) else STREET.steps // 3
