"""Training in several ranks whose devices share one classifier: its classes split over them, and its checkpoints.

For a classifier that each rank has as a whole, :class:`robustfast.DiscriminativeLoss` takes a ``process_group``.
"""

from robustfast.checkpoint import load_checkpoint, optimizer_state, save_checkpoint, set_optimizer_state
from robustfast.sharded import ShardedDiscriminativeLoss

__all__ = [
    "ShardedDiscriminativeLoss",
    "load_checkpoint",
    "optimizer_state",
    "save_checkpoint",
    "set_optimizer_state",
]
