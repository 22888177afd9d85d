"""What a trained classifier is worth: accuracy on clean images and under noise."""

from robustfast.evaluation.noise import accuracy, noise_curve

__all__ = ["accuracy", "noise_curve"]
