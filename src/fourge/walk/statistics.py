"""Means with standard errors over tokens that are not independent."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over `tokens` tokens with its standard error; None where fewer than two sequences were seen."""

    mean: float
    standard_error: float | None
    tokens: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.2g}"
        return f"{self.mean:.5g}{error}"


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> Estimate:
    """The mean of `values` `[n]` with a standard error clustered by `clusters` `[n]` (sequence numbers).

    Tokens of one sequence go right and wrong together, so they count as one draw: with residual sums
    `r_c = Σ (v − mean)` over a cluster, `SE = sqrt(C / (C − 1) · Σ r_c²) / n` for C clusters (the ratio estimator
    of survey sampling, Cochran, Sampling Techniques, §9A).
    """
    assert len(values) == len(clusters) > 0
    values = values.astype(np.float64)
    mean = float(values.mean())
    _, numbers = np.unique(clusters, return_inverse=True)
    residuals = np.bincount(numbers, weights=values - mean)
    count = len(residuals)
    error = None
    if count > 1:
        error = float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / len(values))
    return Estimate(mean, error, len(values))
