"""Fused kernels for noise-robust classifiers: the losses of arXiv 2405.18499 and the noise they are trained with."""

from robustfast import functional, reference
from robustfast.backends import backends
from robustfast.classifier import RobustClassifier
from robustfast.losses import DiscriminativeLoss

__all__ = ["DiscriminativeLoss", "RobustClassifier", "backends", "functional", "reference"]
__version__ = "0.1.0"
