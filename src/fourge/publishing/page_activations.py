"""What the inputs of the Linears reach, beside what their stored scales can represent."""

import math
from collections.abc import Mapping

from fourge.checkpoint.reader import Checkpoint
from fourge.nvfp4.reference import GLOBAL_RANGE
from fourge.publishing.evidence import Evidence, LayerMeasures
from fourge.publishing.page_axes import Scale, decades_around, layer_ticks, line_path, short, svg, text, titled, y_axis
from fourge.publishing.page_errors import InputRanges, in_order
from fourge.publishing.page_markup import Markup, Node, table, tag
from fourge.publishing.page_section import Section, folded, missing, note

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 548, 190, 56, 536, 28, 160


def read_input_ranges(checkpoint: Checkpoint, prefix: str = "model.layers.") -> InputRanges:
    """`448 · 6 / input_global_scale` of every Linear that has one, read from the shards: 4 bytes each."""
    ranges: dict[tuple[int, str], float] = {}
    for name in checkpoint.tensors:
        linear, _, last = name.rpartition(".")
        if last == "input_global_scale" and linear.startswith(prefix):
            layer, _, inside = linear.removeprefix(prefix).partition(".")
            ranges[int(layer), inside] = GLOBAL_RANGE / float(checkpoint.read(name))
    return ranges


def activations_section(evidence: Evidence, ranges: InputRanges) -> Section:
    """A panel for each group of Linears that read one input."""
    groups = _groups(evidence.layers)
    if not groups:
        why = (
            "The inputs' ranges are not known: there is no job.json, no layer is done yet, or no text was calibrated on"
        )
        return missing("activations", "Activations", why)
    panels = [_panel(names, evidence.layers, ranges) for names in groups]
    source = ".fourge/job.json" + (" (input_amax), the shards (input_global_scale)" if ranges else "")
    body: tuple[Node, ...] = (
        tag("div", panels, class_="panels"),
        note(
            "Dots: the largest magnitude that calibration saw. ",
            "Line: the largest that the stored scale represents; what is beyond it saturates." if ranges else None,
        ),
        folded("Ranges as a table", _numbers(groups, evidence.layers, ranges)),
    )
    return Section("activations", "Activations", _finding(evidence.layers, ranges), body, source)


def _groups(layers: tuple[LayerMeasures, ...]) -> list[tuple[str, ...]]:
    """Linears that read one input: neighbours with one parent and the same largest value in every layer."""
    names = in_order({name for layer in layers for name, facts in layer.linears.items() if "input_amax" in facts})
    groups: list[list[str]] = []
    for name in names:
        if groups and _same_input(groups[-1][0], name, layers):
            groups[-1].append(name)
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


def _same_input(first: str, second: str, layers: tuple[LayerMeasures, ...]) -> bool:
    if first.rpartition(".")[0] != second.rpartition(".")[0]:
        return False
    both = [layer.linears for layer in layers if first in layer.linears and second in layer.linears]
    return all(linears[first].get("input_amax") == linears[second].get("input_amax") for linears in both)


def _group_name(names: tuple[str, ...]) -> str:
    parent, _, first = names[0].rpartition(".")
    joined = " + ".join([first, *(name.rpartition(".")[2] for name in names[1:])])
    return f"{parent}: {joined}"


def _finding(layers: tuple[LayerMeasures, ...], ranges: InputRanges) -> str:
    largest = max(
        (float(facts["input_amax"]), layer.layer, name)
        for layer in layers
        for name, facts in layer.linears.items()
        if "input_amax" in facts
    )
    rooms = [
        ranges[layer.layer, name] / facts["input_amax"]
        for layer in layers
        for name, facts in layer.linears.items()
        if facts.get("input_amax") and (layer.layer, name) in ranges
    ]
    peak = f"inputs peak at {largest[0]:,.4g}, layer {largest[1]}, {largest[2]}"
    if not rooms:
        return peak[0].upper() + peak[1:]
    return f"Every input scale holds at least {min(rooms):.2g} times the calibrated range; {peak}"


def _panel(names: tuple[str, ...], layers: tuple[LayerMeasures, ...], ranges: InputRanges) -> Markup:
    seen = {layer.layer: float(layer.linears[names[0]]["input_amax"]) for layer in layers if names[0] in layer.linears}
    held = {layer: ranges[layer, names[0]] for layer in seen if (layer, names[0]) in ranges}
    y = decades_around([*seen.values(), *held.values()], _BOTTOM, _TOP)
    x = Scale(min(seen) - 0.5, max(seen) + 0.5, _LEFT, _RIGHT)
    dots = [
        titled("circle", f"layer {layer}: {value:.5g}", cx=x(layer), cy=y(value), r=3, class_="dot")
        for layer, value in seen.items()
        if value > 0
    ]
    limits = [(x(layer), y(value)) for layer, value in held.items() if 0 < value < math.inf]
    numbered = list(seen)
    return svg(
        _WIDTH,
        _HEIGHT,
        f"Largest input by layer: {_group_name(names)}",
        text(_LEFT, 14, _group_name(names), class_="label"),
        y_axis(y, _LEFT, _RIGHT, short),
        tag("path", d=line_path(limits), class_="limit") if limits else None,
        dots,
        [
            text(x(numbered[at]), _BOTTOM + 18, str(numbered[at]), "middle", "tick")
            for at in layer_ticks(len(numbered), 16)
        ],
    )


def _numbers(groups: list[tuple[str, ...]], layers: tuple[LayerMeasures, ...], ranges: InputRanges) -> Markup:
    header = ["layer"]
    for names in groups:
        header += [_group_name(names), "of"] if ranges else [_group_name(names)]
    rows = []
    for layer in layers:
        row: list[Node] = [layer.layer]
        for names in groups:
            facts: Mapping[str, object] = layer.linears.get(names[0], {})
            amax, limit = facts.get("input_amax"), ranges.get((layer.layer, names[0]))
            row.append(None if amax is None else f"{amax:.4g}")
            if ranges:
                row.append(None if limit is None else f"{limit:.4g}")
        rows.append(row)
    return table(header, rows, class_="numbers")
