"""Two models on the same items: scores, paired differences, recovery, exact tests, means over tasks.

The items are the same, so the two scores are not independent: an error bar of the difference comes from the items'
differences. Where items come in subjects that stand or fall together (MMLU), it comes from the subjects' sums.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """A mean over items and its standard error; `se` is None below two items."""

    score: float
    se: float | None


@dataclass(frozen=True)
class Effect:
    """A difference or a ratio of two scores and its standard error; `se` is None where nothing can be said of it."""

    value: float
    se: float | None


@dataclass(frozen=True, eq=False)
class PairedScores:
    """One task's scores of both models, float64 `[items]` each, item by item; higher is better.

    `subjects`, int64 `[items]`, says which items stand or fall together; None where all are independent.
    """

    baseline: FloatArray
    quantized: FloatArray
    subjects: IntArray | None = None


@dataclass(frozen=True)
class Aggregate:
    """A weighted mean over tasks; `tasks` and `items` say over how many."""

    baseline: Score
    quantized: Score
    delta: Effect
    recovery: Effect | None
    tasks: int
    items: int


def mean_score(values: FloatArray, subjects: IntArray | None = None) -> Score:
    """The mean of `values` `[items]`, with lm-eval's standard error: s / √n, s pooled within subjects.

    Equals lm-eval's `mean_stderr` for one task, its `pooled_sample_stderr` for a group weighted by size.
    """
    subjects = np.zeros(len(values), np.int64) if subjects is None else subjects
    counts = np.bincount(subjects)
    counts_or_one = np.maximum(counts, 1)
    residuals = values - (np.bincount(subjects, weights=values) / counts_or_one)[subjects]
    freedom = len(values) - np.count_nonzero(counts)
    se = None if freedom == 0 else math.sqrt(float(residuals @ residuals) / freedom / len(values))
    return Score(float(values.mean()), se)


def paired_delta(scores: PairedScores) -> Effect:
    """Quantized minus baseline.

    With b items that only the baseline has right and c that only the quantized model has, its value is (c − b) / n
    and its standard error √(b + c − (b − c)² / n) / n, unless there are subjects: see `_variance_of_mean`.
    """
    differences = scores.quantized - scores.baseline
    return Effect(float(differences.mean()), _root(_variance_of_mean(differences, scores.subjects)))


def recovery(scores: PairedScores) -> Effect | None:
    """R, the quantized score over the baseline's: 1 is no loss, and more than 1 is left as it is.

    Its standard error is √(Var(y₁ − R·y₀) / n) / p₀ (delta method). None where the baseline scores nothing.
    """
    total = float(scores.baseline.sum())
    if total <= 0:
        return None
    ratio = float(scores.quantized.sum()) / total
    root = _root(_variance_of_mean(scores.quantized - ratio * scores.baseline, scores.subjects))
    return Effect(ratio, None if root is None else root / (total / len(scores.baseline)))


def flips(scores: PairedScores) -> tuple[int, int] | None:
    """How many items only the baseline has right, and only the quantized model; None where scores are not 0 or 1."""
    if not np.isin(np.concatenate([scores.baseline, scores.quantized]), (0.0, 1.0)).all():
        return None
    return int((scores.baseline > scores.quantized).sum()), int((scores.quantized > scores.baseline).sum())


def mcnemar(only_baseline: int, only_quantized: int) -> float:
    """The exact two-sided p of McNemar's test: min(1, 2·P[Bin(b + c, ½) ≤ min(b, c)]); 1 where nothing flipped."""
    flipped = only_baseline + only_quantized
    term, tail = 1, 0
    for count in range(min(only_baseline, only_quantized) + 1):
        tail += term
        term = term * (flipped - count) // (count + 1)
    return min(1.0, float(2 * tail / 2**flipped))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted for their number (Holm, "A simple sequentially rejective multiple test …", 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def binomial_upper_tail(successes: int, trials: int, probability: float) -> float:
    """P[Bin(trials, probability) ≥ successes], for a probability between 0 and 1, both excluded."""
    log_p, log_q = math.log(probability), math.log1p(-probability)
    constant = math.lgamma(trials + 1)
    terms = (
        math.exp(constant - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q)
        for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(terms))


def macro_mean(tasks: Sequence[PairedScores]) -> Aggregate:
    """The mean of the tasks' scores, each task counting the same."""
    return _aggregate(tasks, [1 / len(tasks)] * len(tasks))


def item_weighted_mean(tasks: Sequence[PairedScores]) -> Aggregate:
    """The mean over all items of all tasks, each item counting the same."""
    sizes = [len(task.baseline) for task in tasks]
    return _aggregate(tasks, [size / sum(sizes) for size in sizes])


def _aggregate(tasks: Sequence[PairedScores], weights: Sequence[float]) -> Aggregate:
    """The tasks are those that were asked, not drawn: errors come from the items within each, and add up in squares."""
    baseline = [mean_score(task.baseline, task.subjects) for task in tasks]
    quantized = [mean_score(task.quantized, task.subjects) for task in tasks]
    deltas = [paired_delta(task) for task in tasks]
    p0, p1 = (_dot(weights, [score.score for score in scores]) for scores in (baseline, quantized))
    ratio = None
    if p0 > 0:
        residuals = [_variance_of_mean(task.quantized - p1 / p0 * task.baseline, task.subjects) for task in tasks]
        root = _combined(weights, [_root(variance) for variance in residuals])
        ratio = Effect(p1 / p0, None if root is None else root / p0)
    return Aggregate(
        baseline=Score(p0, _combined(weights, [score.se for score in baseline])),
        quantized=Score(p1, _combined(weights, [score.se for score in quantized])),
        delta=Effect(
            _dot(weights, [delta.value for delta in deltas]), _combined(weights, [delta.se for delta in deltas])
        ),
        recovery=ratio,
        tasks=len(tasks),
        items=sum(len(task.baseline) for task in tasks),
    )


def _variance_of_mean(values: FloatArray, subjects: IntArray | None) -> float | None:
    """Var(values) / n; with G subjects, the cluster-robust G / (G − 1) · Σ (sum of a subject's residuals)² / n².

    None below two items, or two subjects.
    """
    residuals = values - values.mean()
    if subjects is None:
        return None if len(values) < 2 else float(residuals @ residuals) / len(values) ** 2
    count = len(np.unique(subjects))
    if count < 2:
        return None
    sums = np.bincount(subjects, weights=residuals)
    return count / (count - 1) * float(sums @ sums) / len(values) ** 2


def _root(variance: float | None) -> float | None:
    return None if variance is None else math.sqrt(variance)


def _dot(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))


def _combined(weights: Sequence[float], errors: Sequence[float | None]) -> float | None:
    """The standard error of a weighted sum of independent estimates; None where one of theirs is not known."""
    known = [error for error in errors if error is not None]
    return None if len(known) < len(errors) else math.hypot(*(w * e for w, e in zip(weights, known, strict=True)))
