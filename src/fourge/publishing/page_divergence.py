"""How the divergence is spread over tokens: many small differences, or few large ones."""

from collections.abc import Mapping
from typing import Any

from fourge.publishing.evidence import Evidence
from fourge.publishing.page_axes import WIDTH, linear_from_zero, percent, power, svg, text, titled, y_axis
from fourge.publishing.page_markup import Markup, table
from fourge.publishing.page_section import Section, folded, missing, note

_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 1100, 12, 170
_MOST_EDGES = 12
"""Under the figure; of more, every other is named."""
_LARGE = 1.0
"""Nats: the other model gives what this one expects about a third of the probability."""


def divergence_section(evidence: Evidence) -> Section:
    """The probe's KL, token by token, in bins that double."""
    topic = "Divergence"
    if evidence.fidelity is None:
        return missing("divergence", topic, "The divergence was not measured: the job had no probe, or is not done")
    histogram = evidence.fidelity.get("kl_histogram")
    mean = evidence.fidelity["kl_div"]["mean"]
    if histogram is None:
        why = f"The mean KL is {mean:.4f} nats a token; how it is spread over tokens, this job did not record"
        return missing("divergence", topic, why)
    bins = _bins(histogram)
    total = sum(count for _, _, count in bins)
    large = sum(count for low, _, count in bins if low >= _LARGE) / total
    finding = f"{percent(large)} of the tokens diverge by {_LARGE:g} nat or more; the mean is {mean:.4f} nats"
    numbers = table(
        ("KL from", "to", "tokens"), [(f"{low:.4g}", f"{high:.4g}", f"{count:,}") for low, high, count in bins]
    )
    explained = "Shares of the probe's tokens by their KL(BF16‖NVFP4) in nats; every bin ends at twice where it begins."
    body = (_figure(bins, total), note(explained), folded("Counts as a table", numbers))
    return Section("divergence", topic, finding, body, str(evidence.record))


def _bins(histogram: Mapping[str, Any]) -> list[tuple[float, float, int]]:
    """`(from, to, tokens)`, as `walk/head.py` counts them: the first bin begins at zero, the last has no end."""
    lowest, counts = histogram["lowest_exponent"], histogram["counts"]
    edges = [0.0, *(2.0 ** (lowest + number) for number in range(len(counts) - 1)), float("inf")]
    return list(zip(edges, edges[1:], counts, strict=False))


def _with_tokens(bins: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """The bins from the first to the last that has tokens, with one empty bin beside them, so that both ends show."""
    filled = [number for number, (_, _, count) in enumerate(bins) if count]
    return bins[max(0, filled[0] - 1) : filled[-1] + 2]


def _figure(bins: list[tuple[float, float, int]], total: int) -> Markup:
    bins = _with_tokens(bins)
    shares = [count / total for _, _, count in bins]
    y = linear_from_zero(shares, _BOTTOM, _TOP)
    width = (_RIGHT - _LEFT) / len(bins)
    marks = [
        titled(
            "rect",
            f"{power(low)} to {power(high)} nats: {percent(share, 2)}",
            x=_LEFT + number * width + 1,
            y=y(share),
            width=width - 2,
            height=_BOTTOM - y(share),
            class_="bar",
        )
        for number, ((low, high, _), share) in enumerate(zip(bins, shares, strict=True))
    ]
    step = 1 if len(bins) <= _MOST_EDGES else 2
    edges = [
        text(_LEFT + number * width, _BOTTOM + 16, power(bins[number][0]), "middle", "tick")
        for number in range(0, len(bins), step)
    ]
    axis = y_axis(y, _LEFT, _RIGHT, lambda share: f"{100 * share:.0f} %")
    return svg(WIDTH, _BOTTOM + 26, "Shares of tokens by their KL", axis, marks, edges)
