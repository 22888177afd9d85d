"""What a trained classifier is worth: what it withstands, what can be promised, and what explains it.

Functions on tensors: images (N, C, H, W) in [0, 1], models that map them to logits. Everything random is a function of
(seed, sample id, draw), so it is the same for every model, batch size and device.
"""

from robustfast.evaluation.attacks import Audit, attack, audited_attack, autoattack, random_search
from robustfast.evaluation.certificates import Certificate, certified_accuracy, certify
from robustfast.evaluation.confidence import Calibration, calibration
from robustfast.evaluation.features import (
    FeatureStatistics,
    boundary_distance,
    feature_statistics,
    principal_components,
    tsne,
)
from robustfast.evaluation.hessian import (
    Eigenvalues,
    Estimate,
    Theory,
    curvature,
    hessian_trace,
    input_hessian_spectrum,
    smoothed_trace,
    theory,
    top_eigenvalues,
)
from robustfast.evaluation.intervals import Correlation, Paired, correlation, paired
from robustfast.evaluation.models import Normalized
from robustfast.evaluation.noise import accuracy, noise_curve
from robustfast.evaluation.perturbations import PERTURBATIONS, perturb
from robustfast.evaluation.repeats import Decision, Tolerance, decide_survival, survival, tolerance

__all__ = [
    "PERTURBATIONS",
    "Audit",
    "Calibration",
    "Certificate",
    "Correlation",
    "Decision",
    "Eigenvalues",
    "Estimate",
    "FeatureStatistics",
    "Normalized",
    "Paired",
    "Theory",
    "Tolerance",
    "accuracy",
    "attack",
    "audited_attack",
    "autoattack",
    "boundary_distance",
    "calibration",
    "certified_accuracy",
    "certify",
    "correlation",
    "curvature",
    "decide_survival",
    "feature_statistics",
    "hessian_trace",
    "input_hessian_spectrum",
    "noise_curve",
    "paired",
    "perturb",
    "principal_components",
    "random_search",
    "smoothed_trace",
    "survival",
    "theory",
    "tolerance",
    "top_eigenvalues",
    "tsne",
]
