"""Names of the published code: ``from robustfast.compat import DiscriminativeLoss_forcing`` is the one line to change."""

from robustfast.losses import DiscriminativeLoss as DiscriminativeLoss_forcing

__all__ = ["DiscriminativeLoss_forcing"]
