"""Training by the paper's method and by its four baselines: recipes over one loop, resumable to the bit."""

from robustfast.training.config import Config
from robustfast.training.loop import resume, train
from robustfast.training.presets import preset
from robustfast.training.saved import SavedClassifier, load_classifier

__all__ = ["Config", "SavedClassifier", "load_classifier", "preset", "resume", "train"]
