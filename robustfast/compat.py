"""Names of the published code: importing ``DiscriminativeLoss_forcing`` from here is the one line to change."""

from robustfast.losses import DiscriminativeLoss as DiscriminativeLoss_forcing

__all__ = ["DiscriminativeLoss_forcing"]
