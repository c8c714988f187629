"""Thin adapters to other packages, where a plain call does not work; docs/frameworks.md has a page for each package.

What needs a package stands in a module of its own, which imports it: `crossmix.integrations.torchmetrics`.
"""

from crossmix.integrations.outputs import semantic_logits
from crossmix.integrations.seeded_augment import SeededAugment

__all__ = ["SeededAugment", "semantic_logits"]
