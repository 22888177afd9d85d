"""Intervals and tests: of one share, and of the paired difference between two models on the same images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from robustfast.extras import needed


def binomial_interval(successes: Tensor, trials: int, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """The two-sided Clopper-Pearson interval of a probability: float64 bounds in the shape of ``successes``."""
    alpha = (1 - confidence) / 2
    return binomial_bound(successes, trials, alpha), 1 - binomial_bound(trials - successes, trials, alpha)


def binomial_bound(successes: Tensor, trials: int, alpha: float) -> Tensor:
    """The lower one-sided Clopper-Pearson bound, float64: beta.ppf(alpha, k, n - k + 1), and 0 at k = 0."""
    with needed("evaluate"):
        from scipy.stats import beta
    k = successes.cpu().numpy()
    bound = np.where(k > 0, beta.ppf(alpha, np.maximum(k, 1), trials - k + 1), 0.0)
    return torch.from_numpy(np.asarray(bound)).to(successes.device)


class Paired(NamedTuple):
    """mean(a - b) over pairs, its confidence interval, and the p-value of the test that there is no difference."""

    difference: float
    low: float
    high: float
    p_value: float
    pairs: int


def paired(a: Any, b: Any, confidence: float = 0.95) -> Paired:
    """Two values (N,) of the same images or seeds: Student's interval of the mean difference, and an exact sign test.

    Where both hold right or wrong alone the sign test is McNemar's exact one. Ties count in the interval, not in the
    test. With fewer than 2 pairs the interval is infinite.

    Raises:
        ValueError: the two are not of one length, are empty, or not finite.
    """
    with needed("evaluate"):
        from scipy import stats
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"a, b: expected two rows of one length, at least 1, got shapes {a.shape} and {b.shape}")
    difference = a - b
    if not np.isfinite(difference).all():
        raise ValueError("a, b: expected finite values")
    mean, count = float(difference.mean()), len(difference)
    width = np.inf
    if count > 1:
        width = stats.t.ppf((1 + confidence) / 2, count - 1) * difference.std(ddof=1) / np.sqrt(count)
    better, decided = int((difference > 0).sum()), int((difference != 0).sum())
    p_value = float(stats.binomtest(better, decided).pvalue) if decided else 1.0
    return Paired(mean, mean - float(width), mean + float(width), p_value, count)


class Correlation(NamedTuple):
    """Pearson's r and Spearman's rho; nan where one side is constant or there are fewer than 3 pairs."""

    pearson: float
    spearman: float


def correlation(x: Any, y: Any, given: Any = None) -> Correlation:
    """How x and y (N,) go together; with ``given`` (N, M) what is left of it once both are regressed on that.

    A partial correlation is the correlation of the residuals of linear least squares (with a constant) on ``given``,
    of the values for Pearson's, of the ranks for Spearman's.
    """
    with needed("evaluate"):
        from scipy.stats import rankdata
    x, y = (np.asarray(part, dtype=np.float64) for part in (x, y))
    control = np.zeros((len(x), 0)) if given is None else np.asarray(given, dtype=np.float64)
    ranks = rankdata(control, axis=0) if control.size else control
    return Correlation(_pearson(x, y, control), _pearson(rankdata(x), rankdata(y), ranks))


def _pearson(x: np.ndarray, y: np.ndarray, control: np.ndarray) -> float:
    if len(x) < 3 + control.shape[1] or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    scaled = (control - control.mean(0)) / np.where(np.ptp(control, 0) > 0, control.std(0), 1)
    design = np.column_stack((np.ones(len(x)), scaled))
    u, v = ((side - side.mean()) / side.std() for side in (x, y))
    u, v = (side - design @ np.linalg.lstsq(design, side, rcond=None)[0] for side in (u, v))
    lengths = np.linalg.norm(u) * np.linalg.norm(v)
    return float(u @ v / lengths) if lengths > 1e-9 * len(x) else float("nan")
