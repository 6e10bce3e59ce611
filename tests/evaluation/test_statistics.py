"""The paired statistics: against scipy, statsmodels, lm-eval's own, and against drawing again."""

import math
from fractions import Fraction

import numpy as np
import pytest
from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr
from scipy.stats import binom, binomtest
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from fourge.evaluation.statistics import (
    PairedScores,
    binomial_upper_tail,
    flips,
    holm,
    item_weighted_mean,
    macro_mean,
    mcnemar,
    mean_score,
    paired_delta,
    recovery,
)


def drawn(items: int, seed: int, loss: float = 0.1) -> PairedScores:
    """Right and wrong answers of a model, and of one that differs from it in some."""
    generator = np.random.default_rng(seed)
    baseline = (generator.random(items) < 0.6).astype(np.float64)
    changed = generator.random(items) < np.where(baseline == 1, loss, loss / 2)
    return PairedScores(baseline, np.where(changed, 1 - baseline, baseline))


def drawn_subjects(seed: int, subjects: int = 40, size: int = 25) -> PairedScores:
    """Subjects of unlike difficulty in which the second model loses unlike much."""
    generator = np.random.default_rng(seed)
    of_item = np.repeat(np.arange(subjects), generator.integers(size // 2, 2 * size, subjects))
    right = generator.uniform(0.3, 0.9, subjects)[of_item]
    loss = np.clip(generator.normal(0.1, 0.15, subjects), 0, 1)[of_item]
    baseline = (generator.random(len(of_item)) < right).astype(np.float64)
    quantized = np.where(generator.random(len(of_item)) < loss, 0.0, baseline)
    return PairedScores(baseline, quantized, of_item)


@pytest.mark.parametrize("seed", range(5))
def test_delta_is_the_textbook_formula(seed: int) -> None:
    scores = drawn(400, seed)
    counts = [(a, b) for a, b in zip(scores.baseline, scores.quantized, strict=True)]
    b, c, n = counts.count((1, 0)), counts.count((0, 1)), len(counts)
    delta = paired_delta(scores)
    assert flips(scores) == (b, c)
    assert delta.value == pytest.approx((c - b) / n, abs=1e-15)
    assert delta.se == pytest.approx(math.sqrt(b + c - (b - c) ** 2 / n) / n, rel=1e-12)


def test_delta_is_least_squares_on_a_constant() -> None:
    scores = drawn_subjects(3)
    differences = scores.quantized - scores.baseline
    plain = PairedScores(scores.baseline, scores.quantized)
    ones = np.ones(len(differences))
    assert paired_delta(plain).se == pytest.approx(OLS(differences, ones).fit(cov_type="HC0").bse[0], rel=1e-10)
    robust = OLS(differences, ones).fit(cov_type="cluster", cov_kwds={"groups": scores.subjects})
    assert paired_delta(scores).se == pytest.approx(robust.bse[0], rel=1e-10)


def test_errors_are_those_of_a_bootstrap_over_items() -> None:
    scores = drawn(500, 11)
    generator = np.random.default_rng(0)
    picks = generator.integers(500, size=(4000, 500))
    p0, p1 = scores.baseline[picks].mean(axis=1), scores.quantized[picks].mean(axis=1)
    ratio = recovery(scores)
    assert ratio is not None
    assert paired_delta(scores).se == pytest.approx((p1 - p0).std(), rel=0.05)
    assert ratio.se == pytest.approx((p1 / p0).std(), rel=0.05)
    # What two independent runs of this size would say is far wider.
    apart = math.hypot(mean_score(scores.baseline).se or 0, mean_score(scores.quantized).se or 0)
    assert (paired_delta(scores).se or 0) < 0.6 * apart


def test_clustered_errors_are_those_of_a_bootstrap_over_subjects() -> None:
    scores = drawn_subjects(5)
    members = [np.flatnonzero(scores.subjects == subject) for subject in range(40)]
    generator = np.random.default_rng(1)
    deltas, ratios = [], []
    for _ in range(3000):
        picked = np.concatenate([members[subject] for subject in generator.integers(40, size=40)])
        p0, p1 = scores.baseline[picked].mean(), scores.quantized[picked].mean()
        deltas.append(p1 - p0)
        ratios.append(p1 / p0)
    ratio = recovery(scores)
    assert ratio is not None
    assert paired_delta(scores).se == pytest.approx(np.std(deltas), rel=0.08)
    assert ratio.se == pytest.approx(np.std(ratios), rel=0.08)
    independent = paired_delta(PairedScores(scores.baseline, scores.quantized)).se
    assert independent is not None and (paired_delta(scores).se or 0) > 1.3 * independent


def test_mean_errors_are_those_of_a_bootstrap_within_tasks() -> None:
    tasks = [drawn(300, 1), drawn(900, 2, loss=0.25), drawn(120, 3)]
    generator = np.random.default_rng(2)
    means: dict[str, list[tuple[float, float]]] = {"macro": [], "items": []}
    for _ in range(4000):
        picks = [generator.integers(len(task.baseline), size=len(task.baseline)) for task in tasks]
        lanes = [[getattr(t, lane)[p] for t, p in zip(tasks, picks, strict=True)] for lane in ("baseline", "quantized")]
        means["macro"].append(tuple(np.mean([values.mean() for values in lane]) for lane in lanes))
        means["items"].append(tuple(np.concatenate(lane).mean() for lane in lanes))
    for name, result in (("macro", macro_mean(tasks)), ("items", item_weighted_mean(tasks))):
        p0, p1 = np.array(means[name]).T
        assert result.recovery is not None
        assert result.baseline.score == pytest.approx(p0.mean(), abs=2e-3)
        assert result.baseline.se == pytest.approx(p0.std(), rel=0.05)
        assert result.delta.se == pytest.approx((p1 - p0).std(), rel=0.05)
        assert result.recovery.se == pytest.approx((p1 / p0).std(), rel=0.05)
        assert (result.tasks, result.items) == (3, 1320)


def test_the_two_means_are_different_figures() -> None:
    easy = PairedScores(np.ones(10), np.ones(10))
    hard = PairedScores(np.array([1.0, 0.0] * 45), np.zeros(90))
    macro, weighted = macro_mean([easy, hard]), item_weighted_mean([easy, hard])
    assert (macro.baseline.score, macro.quantized.score) == (0.75, 0.5)
    assert weighted.baseline.score == pytest.approx(0.55) and weighted.quantized.score == pytest.approx(0.1)
    assert macro.recovery is not None and macro.recovery.value == pytest.approx(2 / 3)
    assert weighted.recovery is not None and weighted.recovery.value == pytest.approx(2 / 11)


def test_item_weighted_mean_of_one_task_is_that_task() -> None:
    scores = drawn_subjects(9)
    mean = item_weighted_mean([scores])
    assert mean.delta.se == pytest.approx(paired_delta(scores).se)
    ratio = recovery(scores)
    assert ratio is not None and mean.recovery is not None
    assert mean.recovery.se == pytest.approx(ratio.se)


def test_score_errors_are_lm_evals() -> None:
    scores = drawn_subjects(7)
    assert mean_score(scores.baseline).se == pytest.approx(mean_stderr(list(scores.baseline)), rel=1e-12)
    of_subject = [scores.baseline[scores.subjects == subject] for subject in range(40)]
    pooled = pooled_sample_stderr([mean_stderr(list(v)) for v in of_subject], [len(v) for v in of_subject])
    assert mean_score(scores.baseline, scores.subjects).se == pytest.approx(pooled, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (0, 1), (5, 5), (3, 12), (12, 3), (40, 60), (700, 640)])
def test_mcnemar_is_the_exact_test(b: int, c: int) -> None:
    expected = statsmodels_mcnemar([[10, b], [c, 10]], exact=True).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(min(1.0, expected), rel=1e-9)
    if b + c:
        assert mcnemar(b, c) == pytest.approx(binomtest(b, b + c, 0.5).pvalue, rel=1e-9)


def test_mcnemar_in_fractions() -> None:
    tail = sum(Fraction(math.comb(9, k), 2**9) for k in range(3))
    assert mcnemar(2, 7) == float(2 * tail)


def test_mcnemar_of_tens_of_thousands_of_flips() -> None:
    assert mcnemar(10000, 10150) == pytest.approx(binomtest(10000, 20150, 0.5).pvalue, rel=1e-8)


def test_mcnemar_is_a_permutation_test() -> None:
    """Under the hypothesis which of the two models is which means nothing: every flip is turned by a coin."""
    scores = drawn(300, 21, loss=0.06)
    b, c = flips(scores) or (0, 0)
    turned = np.random.default_rng(4).choice([-1, 1], size=(200_000, b + c)).sum(axis=1)
    share = float((np.abs(turned) >= abs(b - c)).mean())
    assert mcnemar(b, c) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 200_000))


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_statsmodels(seed: int) -> None:
    p_values = list(np.random.default_rng(seed).random(7) ** 3)
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]), rel=1e-12)


def test_holm_of_equal_and_of_no_p_values() -> None:
    assert holm([]) == []
    assert holm([0.04]) == [0.04]
    assert holm([0.01, 0.01, 0.9]) == pytest.approx(list(multipletests([0.01, 0.01, 0.9], method="holm")[1]))


@pytest.mark.parametrize(
    ("k", "n", "p"), [(0, 5, 0.25), (5, 5, 0.25), (30, 100, 0.25), (3600, 14042, 0.25), (7, 9, 0.5)]
)
def test_binomial_tail_is_scipys(k: int, n: int, p: float) -> None:
    assert binomial_upper_tail(k, n, p) == pytest.approx(binom.sf(k - 1, n, p), rel=1e-8)
    assert binomial_upper_tail(k, n, p) == pytest.approx(binomtest(k, n, p, alternative="greater").pvalue, rel=1e-8)


def test_one_item_has_no_error() -> None:
    one = PairedScores(np.array([1.0]), np.array([0.0]))
    assert mean_score(one.baseline).se is None
    assert (paired_delta(one).value, paired_delta(one).se) == (-1.0, None)
    ratio = recovery(one)
    assert ratio is not None and (ratio.value, ratio.se) == (0.0, None)
    assert macro_mean([one, drawn(50, 0)]).delta.se is None


def test_one_subject_has_no_error_of_the_difference() -> None:
    scores = drawn(50, 0)
    clustered = PairedScores(scores.baseline, scores.quantized, np.zeros(50, np.int64))
    assert paired_delta(clustered).se is None
    assert mean_score(scores.baseline, clustered.subjects).se == pytest.approx(mean_stderr(list(scores.baseline)))


def test_no_recovery_of_nothing() -> None:
    nothing = PairedScores(np.zeros(8), np.array([1.0] + [0.0] * 7))
    assert recovery(nothing) is None
    assert macro_mean([nothing, nothing]).recovery is None
    assert paired_delta(nothing).value == 0.125


def test_more_than_everything_is_said() -> None:
    better = PairedScores(np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0]))
    ratio = recovery(better)
    assert ratio is not None and ratio.value == 1.5


def test_identical_models() -> None:
    scores = drawn(30, 0)
    same = PairedScores(scores.baseline, scores.baseline.copy())
    ratio = recovery(same)
    assert ratio is not None and (ratio.value, ratio.se) == (1.0, 0.0)
    assert (paired_delta(same).value, paired_delta(same).se, flips(same), mcnemar(0, 0)) == (0.0, 0.0, (0, 0), 1.0)


def test_shares_are_no_flips() -> None:
    assert flips(PairedScores(np.array([0.3, 1.0]), np.array([0.2, 1.0]))) is None
