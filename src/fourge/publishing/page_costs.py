"""What the quantization took: time and memory, step by step."""

from fourge.progress import format_bytes, format_seconds
from fourge.publishing.evidence import Evidence, StepMetrics
from fourge.publishing.page_axes import Format, layer_ticks, linear_from_zero, short, svg, text, titled, y_axis
from fourge.publishing.page_markup import Markup, Node, table, tag
from fourge.publishing.page_section import Section, folded, missing, note

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 548, 56, 540, 30, 150


def costs_section(evidence: Evidence) -> Section:
    """Seconds, and resident memory at the end, of every step."""
    steps = evidence.metrics
    if not steps:
        return missing("costs", "Cost", "The directory has no metrics.jsonl: what the job took is not known")
    seconds = sum(step.seconds for step in steps)
    between = max(step.resident_bytes for step in steps)
    peaks = " and ".join(f"{format_bytes(count)} {what}" for what, count in evidence.peaks)
    memory = f"at its peak it held {peaks}" if peaks else f"between steps it held {format_bytes(between)} at most"
    took = f"The walk took {format_seconds(seconds)}; {memory}"
    panels = tag(
        "div",
        _bars(steps, "seconds", [step.seconds for step in steps], short),
        _bars(steps, "resident memory, MB", [step.resident_bytes / 1e6 for step in steps], short),
        class_="panels",
    )
    body: tuple[Node, ...] = (
        panels,
        note("On ", "; then ".join(evidence.machines), ".") if evidence.machines else None,
        note(
            "Steps from left to right: the embedding, the layers, the head; memory as at the end of each. Of a step "
            "done twice, the last."
        ),
        folded("Steps as a table", _numbers(steps)),
    )
    return Section("costs", "Cost", took, body, ".fourge/metrics.jsonl")


def _bars(steps: tuple[StepMetrics, ...], name: str, values: list[float], form: Format) -> Markup:
    y = linear_from_zero(values, _BOTTOM, _TOP)
    width = (_RIGHT - _LEFT) / len(steps)
    bars = [
        titled(
            "rect",
            f"{step.name}: {value:,.4g}",
            x=_LEFT + number * width + 0.5,
            y=y(value),
            width=width - 1,
            height=_BOTTOM - y(value),
            class_="bar",
        )
        for number, (step, value) in enumerate(zip(steps, values, strict=True))
    ]
    names = [
        text(_LEFT + (at + 0.5) * width, _BOTTOM + 16, steps[at].name.removeprefix("layer "), "middle", "tick")
        for at in _named(len(steps))
    ]
    axis = y_axis(y, _LEFT, _RIGHT, form)
    return svg(_WIDTH, _BOTTOM + 26, f"{name} by step", text(_LEFT, 14, name, class_="label"), axis, bars, names)


def _named(steps: int) -> list[int]:
    """Which steps' names stand under the figure: some of the layers', and the head's."""
    last = steps - 1
    return [*(at + 1 for at in layer_ticks(steps - 2, 10) if at + 1 < last - 1), last]


def _numbers(steps: tuple[StepMetrics, ...]) -> Markup:
    header = ("step", "seconds", "resident", "tokens", "bytes read")
    rows = [
        (
            step.name,
            f"{step.seconds:.1f}",
            format_bytes(step.resident_bytes),
            f"{step.entry.get('tokens', 0):,}",
            format_bytes(step.entry.get("bytes_read", 0)),
        )
        for step in steps
    ]
    return table(header, rows, class_="numbers")
