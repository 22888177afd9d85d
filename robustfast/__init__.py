"""Fused kernels for noise-robust classifiers: the losses of arXiv 2405.18499 and the noise they are trained with."""

import sys

try:
    from robustfast import functional, reference
    from robustfast.backends import backends
    from robustfast.classifier import RobustClassifier
    from robustfast.losses import DiscriminativeLoss
except (KeyboardInterrupt, ModuleNotFoundError) as error:
    if sys.argv[:1] == ["-m"]:  # python -m robustfast, whose __main__ would come too late to say it
        from robustfast_command import give_up

        give_up(error)
    raise

__all__ = ["DiscriminativeLoss", "RobustClassifier", "backends", "functional", "reference"]
__version__ = "0.1.0"
