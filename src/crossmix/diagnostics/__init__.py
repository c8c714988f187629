"""Diagnostics of self-training, with and without true labels of the target."""

from crossmix.diagnostics.pseudo_labels import PseudoLabelMonitor, PseudoLabelQuality
from crossmix.diagnostics.unsupervised import UnsupervisedQuality, UnsupervisedScores

__all__ = ["PseudoLabelMonitor", "PseudoLabelQuality", "UnsupervisedQuality", "UnsupervisedScores"]
