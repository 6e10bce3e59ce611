"""The greedy choice under a budget, against every choice there is."""

from itertools import pairwise, product

import numpy as np
import pytest

from fourge.mixing.pick import Form, lower_hull, pick


def instance(seed: int) -> list[list[Form]]:
    """Five groups of different sizes; now and then a form that is larger and worse, or hardly better."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(5):
        weights = int(rng.integers(1, 9)) * 64
        fp4, fp8 = rng.exponential(size=2) * (1.0, 0.3)
        forms = [Form("NVFP4", 4.5 * weights, fp4), Form("FP8", 8.25 * weights, fp8), Form("BF16", 16 * weights, 0.0)]
        groups.append(forms)
    return groups


def damage(chosen: list[Form]) -> float:
    return sum(form.damage for form in chosen)


def bits(chosen: list[Form]) -> float:
    return sum(form.bits for form in chosen)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_the_same_bits_does_less_damage(seed: int) -> None:
    """Where the greedy choice spends a budget to the last bit, nothing that fits does less; elsewhere it fits."""
    groups = instance(seed)
    every = [list(chosen) for chosen in product(*groups)]
    low, high = bits([forms[0] for forms in groups]), bits([forms[-1] for forms in groups])
    for budget in np.linspace(low, high, 40):
        chosen = pick(groups, budget)
        assert bits(chosen) <= budget
        # What the steps bought in their order, spent exactly, is the best there is. One that did not fit may have
        # been passed over for a later one, so only choices made of the best steps are held to it.
        slopes = [taken for forms, form in zip(groups, chosen, strict=True) for taken in steps(forms, form)]
        left = [next_ for forms, form in zip(groups, chosen, strict=True) for next_ in steps_left(forms, form)]
        if not slopes or not left or max(slopes) <= min(left):
            best = min(damage(other) for other in every if bits(other) <= bits(chosen))
            assert damage(chosen) == pytest.approx(best, rel=1e-12)


def steps(forms: list[Form], form: Form) -> list[float]:
    """Damage a bit of the steps that led to `form`."""
    hull = lower_hull(forms)
    return slopes_along(hull[: hull.index(form) + 1])


def steps_left(forms: list[Form], form: Form) -> list[float]:
    hull = lower_hull(forms)
    return slopes_along(hull[hull.index(form) :])


def slopes_along(hull: list[Form]) -> list[float]:
    return [(b.damage - a.damage) / (b.bits - a.bits) for a, b in pairwise(hull)]


def test_the_hull_leaves_out_what_no_budget_calls_for() -> None:
    worse_and_larger = [Form("NVFP4", 4.5, 0.1), Form("FP8", 8.0, 0.2), Form("BF16", 16.0, 0.0)]
    assert [form.scheme for form in lower_hull(worse_and_larger)] == ["NVFP4", "BF16"]
    above_the_line = [Form("NVFP4", 4.0, 1.0), Form("FP8", 8.0, 0.9), Form("BF16", 16.0, 0.0)]
    assert [form.scheme for form in lower_hull(above_the_line)] == ["NVFP4", "BF16"]
    harmless = [Form("NVFP4", 4.5, 0.0), Form("FP8", 8.0, 0.0), Form("BF16", 16.0, 0.0)]
    assert [form.scheme for form in lower_hull(harmless)] == ["NVFP4"]
    usual = [Form("BF16", 16.0, 0.0), Form("FP8", 8.0, 0.1), Form("NVFP4", 4.5, 1.0)]
    assert [form.scheme for form in lower_hull(usual)] == ["NVFP4", "FP8", "BF16"]
