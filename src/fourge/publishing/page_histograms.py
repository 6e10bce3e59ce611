"""Which codes and group scales a checkpoint's weights use: counted from the shards, a chunk at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fourge.checkpoint.reader import Checkpoint
from fourge.nvfp4 import e2m1, e4m3
from fourge.progress import WalkProgress, format_bytes
from fourge.publishing.page_axes import Scale, linear_from_zero, percent, power, svg, text, titled, y_axis
from fourge.publishing.page_markup import Markup, Node, table, tag
from fourge.publishing.page_section import Section, folded, missing, note

PACKED, SCALES = "weight_packed", "weight_scale"
_CHUNK_BYTES = 1 << 20
"""Counting widens bytes to eight: this bounds it."""

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 548, 56, 540, 30, 180


@dataclass(frozen=True)
class WeightHistogram:
    """How often each byte occurs in the packed codes and in the group scales: int64 `[256]` each."""

    packed: Tensor
    scales: Tensor

    @property
    def codes(self) -> Tensor:
        """How often each of the 16 codes occurs, int64 `[16]`: a byte holds two."""
        counts = torch.zeros(16, dtype=torch.int64)
        pairs = e2m1.unpack(torch.arange(256, dtype=torch.uint8)[:, None]).long()
        for nibble in pairs.T:
            counts.index_add_(0, nibble, self.packed)
        return counts

    @property
    def by_value(self) -> dict[float, int]:
        """Codes by the number they stand for, ascending; both zeros count as one."""
        counts: dict[float, int] = {}
        for value, count in zip(
            e2m1.decode(torch.arange(16, dtype=torch.uint8)).tolist(), self.codes.tolist(), strict=True
        ):
            counts[value + 0.0] = counts.get(value + 0.0, 0) + count
        return dict(sorted(counts.items()))

    @property
    def by_scale(self) -> dict[float, int]:
        """Group scales by value, ascending: all of E4M3's positive numbers."""
        values = e4m3.decode(torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn))
        return dict(zip(values.tolist(), self.scales[1:127].tolist(), strict=True))


def count_weights(checkpoint: Checkpoint) -> WeightHistogram:
    """Reads every packed weight and every group scale once, with a bar; holds a chunk of 1 MiB."""
    files: dict[str, list[str]] = {}
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[2] in (PACKED, SCALES):
            files.setdefault(info.path.name, []).append(name)
    files = dict(sorted(files.items()))
    sizes = [sum(checkpoint.tensors[name].nbytes for name in names) for names in files.values()]
    counts = {PACKED: torch.zeros(256, dtype=torch.int64), SCALES: torch.zeros(256, dtype=torch.int64)}
    with WalkProgress("codes and scales", len(files), costs=[float(size) for size in sizes]) as progress:
        for (file, names), size in zip(files.items(), sizes, strict=True):
            for name in names:
                for found in _counted(checkpoint, name):
                    counts[name.rpartition(".")[2]] += found
                    read = int(found.sum())
                    progress.advance(read / size, read=read)
            progress.finish_step(file, format_bytes(size), {})
    return WeightHistogram(counts[PACKED], counts[SCALES])


def _counted(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    for chunk in checkpoint.chunks(name, _CHUNK_BYTES):
        yield torch.bincount(torch.frombuffer(chunk, dtype=torch.uint8), minlength=256)


def histograms_section(histogram: WeightHistogram | None, why_not: str) -> Section:
    """The codes' shares and the group scales', each on its own axis."""
    if histogram is None or not int(histogram.packed.sum()):
        return missing("codes", "Codes and scales", why_not)
    body: tuple[Node, ...] = (
        tag("div", _codes_figure(histogram), _scales_figure(histogram), class_="panels"),
        note("Left: the weights' E2M1 codes, by value. Right: the group scales, E4M3, by value."),
        folded("Counts as a table", _numbers(histogram)),
    )
    return Section("codes", "Codes and scales", _finding(histogram), body, "the shards (weight_packed, weight_scale)")


def _finding(histogram: WeightHistogram) -> str:
    codes, scales = histogram.by_value, histogram.by_scale
    weights, groups = sum(codes.values()), sum(scales.values())
    zero, largest = codes[0.0] / weights, (codes[-6.0] + codes[6.0]) / weights
    subnormal = sum(count for value, count in scales.items() if value < 2**-6) / groups
    return (
        f"{percent(zero)} of the weights are zero and {percent(largest)} are at ±6; "
        f"{percent(subnormal, 2) if subnormal else 'none'} of the group scales are subnormal"
    )


def _codes_figure(histogram: WeightHistogram) -> Markup:
    codes = histogram.by_value
    total = sum(codes.values())
    shares = [count / total for count in codes.values()]
    y = linear_from_zero(shares, _BOTTOM, _TOP)
    width = (_RIGHT - _LEFT) / len(codes)
    bars = [
        titled(
            "rect",
            f"{value:g}: {percent(share, 2)}",
            x=_LEFT + number * width + 2,
            y=y(share),
            width=width - 4,
            height=_BOTTOM - y(share),
            class_="bar",
        )
        for number, (value, share) in enumerate(zip(codes, shares, strict=True))
    ]
    names = [
        text(_LEFT + (number + 0.5) * width, _BOTTOM + 16, f"{value:g}".replace("-", "−"), "middle", "tick")
        for number, value in enumerate(codes)
    ]
    axis = y_axis(y, _LEFT, _RIGHT, lambda share: f"{100 * share:.0f} %")
    label = "Shares of the weights' codes by value"
    return svg(_WIDTH, _BOTTOM + 26, label, text(_LEFT, 14, "weight codes", class_="label"), axis, bars, names)


def _scales_figure(histogram: WeightHistogram) -> Markup:
    scales = histogram.by_scale
    total = sum(scales.values())
    shares = [count / total for count in scales.values()]
    y = linear_from_zero(shares, _BOTTOM, _TOP)
    # A bar a code: E4M3 is a logarithm in small steps, so codes in order make a logarithmic axis.
    x = Scale(0, len(scales), _LEFT, _RIGHT)
    bars = [
        titled(
            "rect",
            f"{value:g}: {percent(share, 3)}",
            x=x(number),
            y=y(share),
            width=x(1) - x(0) - 0.6,
            height=_BOTTOM - y(share),
            class_="bar",
        )
        for number, (value, share) in enumerate(zip(scales, shares, strict=True))
        if share > 0
    ]
    values = list(scales)
    named = [2.0**-6, 2.0**-3, 1.0, 8.0, 64.0, 448.0]
    names = [text(x(values.index(value) + 0.5), _BOTTOM + 16, power(value), "middle", "tick") for value in named]
    axis = y_axis(y, _LEFT, _RIGHT, lambda share: f"{100 * share:g} %")
    label = "Shares of the group scales by value"
    return svg(_WIDTH, _BOTTOM + 26, label, text(_LEFT, 14, "group scales", class_="label"), axis, bars, names)


def _numbers(histogram: WeightHistogram) -> list[Node]:
    codes = table(
        ("code's value", "weights"), [(f"{value:g}", f"{count:,}") for value, count in histogram.by_value.items()]
    )
    used = [(f"{value:g}", f"{count:,}") for value, count in histogram.by_scale.items() if count]
    return [tag("div", codes, table(("group scale", "groups"), used), class_="panels tables")]
