"""The mixture for a budget of bits: for every group one of its forms, by greedy steps along their lower hulls.

A group's forms (NVFP4, FP8, as it is) are points of bits and damage. Only those on the lower convex hull can be worth
their bits; along it every step buys less than the one before. All groups begin in their smallest form, and the step
that takes off the most damage a bit is taken next, as long as it fits. Damages are taken to add up.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from fourge.settings import RuleScheme


@dataclass(frozen=True)
class Form:
    """One way to store a group, the bits that all its weights take so, and the damage that it does."""

    scheme: RuleScheme
    bits: float
    damage: float


def lower_hull(forms: Sequence[Form]) -> list[Form]:
    """Those of `forms` that a budget can call for: bits ascending, damage falling, less and less a bit."""
    hull: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.bits, form.damage)):
        if hull and form.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-1], form) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(form)
    return hull


def _slope(one: Form, other: Form) -> float:
    """Damage a bit from `one` to the larger `other`: below 0 on a hull, and rising along it."""
    return (other.damage - one.damage) / (other.bits - one.bits)


def pick(groups: Sequence[Sequence[Form]], budget: float) -> list[Form]:
    """One of the forms of each of `groups`, of at most `budget` bits together, which the smallest forms must fit in.

    A step that does not fit is passed over, and with it what lies beyond it for that group. Of equal steps the
    first group's is taken.
    """
    hulls = [lower_hull(forms) for forms in groups]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(form.bits for form in chosen)
    assert left >= 0, "the smallest forms exceed the budget"
    steps = [(_slope(*hull[:2]), number, 1) for number, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, number, place = heapq.heappop(steps)
        hull = hulls[number]
        cost = hull[place].bits - hull[place - 1].bits
        if cost > left:
            continue
        left -= cost
        chosen[number] = hull[place]
        if place + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[place], hull[place + 1]), number, place + 1))
    return chosen
