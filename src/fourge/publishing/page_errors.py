"""The heat map: how far every quantized weight is from its source, and what the method did there."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from fourge.checkpoint.architecture import ARCHITECTURES
from fourge.publishing.evidence import Evidence, LayerMeasures
from fourge.publishing.page_axes import (
    WIDTH,
    layer_ticks,
    line_path,
    linear_from_zero,
    percent,
    svg,
    text,
    titled,
    y_axis,
)
from fourge.publishing.page_markup import Markup, Node, json_island, table, tag
from fourge.publishing.page_section import Section, folded, missing, note

InputRanges = Mapping[tuple[int, str], float]
"""The largest input that the stored scale represents, by layer and the Linear's name in it."""

_TOPIC = "Weight errors"
_LEFT, _RIGHT, _ROW, _STEPS = 170, 1100, 24, 9


def errors_section(evidence: Evidence, ranges: InputRanges) -> Section:
    """Layers across, Linears down; a cell answers a click or Enter with all that is known of it."""
    layers = [layer for layer in evidence.layers if layer.linears]
    if not layers:
        why = "The directory has no job.json, so nothing is known of single layers"
        return missing("errors", _TOPIC, why if evidence.job is None else "No layer is committed yet")
    heading, body = _finding(layers), [_heat_map(layers), _details(layers, ranges), _hidden_errors(layers)]
    body.append(folded("All weight errors as a table", _numbers(layers)))
    return Section("errors", _TOPIC, heading, tuple(body), ".fourge/job.json")


def _linears(layers: list[LayerMeasures]) -> list[str]:
    """Every Linear's name, in the order of the computation as far as it is known, then by name."""
    return in_order({name for layer in layers for name in layer.linears})


def in_order(linears: Iterable[str]) -> list[str]:
    """Names of Linears in a layer as the known architectures list them, unknown ones after them by name."""
    listed = [name for architecture in ARCHITECTURES.values() for name in architecture.linears]
    return sorted(linears, key=lambda name: (listed.index(name) if name in listed else len(listed), name))


def _weight_errors(layers: list[LayerMeasures]) -> dict[tuple[int, str], float]:
    return {
        (layer.layer, name): float(measures["weight_error"])
        for layer in layers
        for name, measures in layer.linears.items()
    }


def _finding(layers: list[LayerMeasures]) -> str:
    errors = _weight_errors(layers)
    (layer, linear), largest = max(errors.items(), key=lambda item: item[1])
    middle = statistics.median(errors.values())
    return (
        f"Weights are {percent(middle)} off in the median Linear, {percent(largest)} in the worst: "
        f"layer {layer}, {linear}"
    )


def _heat_map(layers: list[LayerMeasures]) -> Markup:
    errors, linears = _weight_errors(layers), _linears(layers)
    low, high = min(errors.values()), max(errors.values())
    width = (_RIGHT - _LEFT) / len(layers)
    eventful = {(layer.layer, name) for layer in layers for name in linears if _events_of(layer, name)}
    rows = []
    for row, name in enumerate(linears):
        y = 4 + row * _ROW
        cells = []
        for column, layer in enumerate(layers):
            key = (layer.layer, name)
            if key in errors:
                shade = round((errors[key] - low) / (high - low) * (_STEPS - 1)) if high > low else 0
                x = _LEFT + column * width
                cells.append(_cell(key, errors[key], shade, x, y, width, key in eventful, row == column == 0))
        rows.append(tag("g", text(_LEFT - 10, y + _ROW / 2 + 4, name, "end", "label"), cells, role="row"))
    bottom = 4 + _ROW * len(linears)
    numbers = [
        text(_LEFT + (at + 0.5) * width, bottom + 16, str(layers[at].layer), "middle", "tick")
        for at in layer_ticks(len(layers))
    ]
    legend = _legend(low, high, bottom + 28)
    grid = svg(WIDTH, bottom + 48, "Weight error by layer and Linear", rows, numbers, legend, role="grid")
    return tag("div", grid, id="heat")


def _cell(
    key: tuple[int, str], error: float, shade: int, x: float, y: float, width: float, eventful: bool, first: bool
) -> Markup:
    layer, name = key
    label = f"layer {layer}, {name}: weight error {percent(error, 2)}" + (", with events" if eventful else "")
    rect = tag("rect", x=x, y=float(y), width=width - 1, height=_ROW - 1.0, class_=f"q{shade}")
    dot = tag("circle", cx=x + width / 2, cy=y + _ROW / 2, r=2.2, class_="event") if eventful else None
    return tag(
        "g",
        tag("title", label),
        rect,
        dot,
        class_="cell",
        role="gridcell",
        tabindex="0" if first else "-1",
        aria_label=label,
        data_cell=f"{layer}/{name}",
    )


def _legend(low: float, high: float, y: float) -> list[Markup]:
    width = 26
    steps = [
        tag("rect", x=_LEFT + step * width, y=float(y), width=width - 1, height=12, class_=f"q{step}")
        for step in range(_STEPS)
    ]
    end = _LEFT + _STEPS * width
    words = f"‖Ŵ − W‖ / ‖W‖, {percent(low)} to {percent(high)}; • the method reported an event"
    return [*steps, text(end + 10, y + 10.5, words, class_="tick")]


def _events_of(layer: LayerMeasures, linear: str) -> list[Mapping[str, Any]]:
    """The layer's events that name the Linear or its group, and those that name none."""
    return [event for event in layer.events if _concerns(event, linear)]


def _concerns(event: Mapping[str, Any], linear: str) -> bool:
    named = [event[key] for key in ("linear", "linears", "group") if key in event]
    if not named:
        return True
    names: list[str] = []
    for value in named:
        for joined in [value] if isinstance(value, str) else value:
            parts = joined.split("+")
            parent = parts[0].rpartition(".")[0]
            names += [part if "." in part else f"{parent}.{part}" for part in parts]
    return linear in names


def event_text(event: Mapping[str, Any]) -> str:
    """An event in one line: what happened, then its figures."""
    facts = [f"{key} {_value_text(value)}" for key, value in event.items() if key not in ("event", "step")]
    return f"{event['event']} ({', '.join(facts)})" if facts else str(event["event"])


def _value_text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _details(layers: list[LayerMeasures], ranges: InputRanges) -> list[Markup]:
    """The panel that a cell fills, and what it is filled with."""
    facts = {
        f"{layer.layer}/{name}": _facts(layer, name, ranges.get((layer.layer, name)))
        for layer in layers
        for name in layer.linears
    }
    hint = "Click a cell, or move with the arrow keys and press Enter: its numbers, and what the method reported there."
    panel = tag("div", tag("p", hint, class_="note"), id="cell", aria_live="polite")
    return [panel, json_island("cells", facts)]


def _facts(layer: LayerMeasures, name: str, input_range: float | None) -> list[tuple[str, str]]:
    measures = layer.linears[name]
    facts = [("weight error", percent(measures["weight_error"], 3))]
    if "input_amax" in measures:
        facts.append(("largest calibrated input", f"{measures['input_amax']:.5g}"))
    if input_range is not None:
        facts.append(("largest input the scale represents", f"{input_range:.5g}"))
    if "tokens" in measures:
        facts.append(("calibration tokens seen", f"{measures['tokens']:,}"))
    known = {"weight_error", "input_amax", "tokens"}
    facts += [(key.replace("_", " "), str(value)) for key, value in measures.items() if key not in known]
    if layer.hidden_error is not None:
        facts.append(("hidden error after the layer", percent(layer.hidden_error["mean"], 2)))
    events = [event_text(event) for event in _events_of(layer, name)]
    return [*facts, *[("event", event) for event in events or ["none"]]]


def _hidden_errors(layers: list[LayerMeasures]) -> Node:
    """How the error grows with depth: relative distance of the two lanes' hidden states on the probe."""
    measured = [(layer.layer, float(layer.hidden_error["mean"])) for layer in layers if layer.hidden_error is not None]
    if not measured:
        return note("Hidden errors were not measured: the job had no probe.")
    height, top = 120, 12
    y = linear_from_zero([error for _, error in measured], height, top)
    width = (_RIGHT - _LEFT) / len(layers)
    place = {layer.layer: _LEFT + (column + 0.5) * width for column, layer in enumerate(layers)}
    points = [(place[layer], y(error)) for layer, error in measured]
    dots = [
        titled("circle", f"after layer {layer}: {percent(error, 2)}", cx=place[layer], cy=y(error), r=3, class_="dot")
        for layer, error in measured
    ]
    return [
        tag("h3", f"Between the lanes, hidden states end {percent(measured[-1][1])} apart"),
        svg(
            WIDTH,
            height + 26,
            "Relative error of the hidden states after each layer",
            y_axis(y, _LEFT, _RIGHT, lambda value: f"{100 * value:.0f} %"),
            tag("path", d=line_path(points), class_="line"),
            dots,
            [
                text(place[layers[at].layer], height + 18, str(layers[at].layer), "middle", "tick")
                for at in layer_ticks(len(layers))
            ],
        ),
    ]


def _numbers(layers: list[LayerMeasures]) -> Markup:
    linears, errors = _linears(layers), _weight_errors(layers)
    rows = [
        (
            layer.layer,
            *[None if (layer.layer, name) not in errors else percent(errors[layer.layer, name], 2) for name in linears],
            None if layer.hidden_error is None else percent(layer.hidden_error["mean"], 2),
            "; ".join(event_text(event) for event in layer.events),
        )
        for layer in layers
    ]
    return table(("layer", *linears, "hidden error", "events"), rows, class_="numbers")
