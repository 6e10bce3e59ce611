"""What the page's figures are drawn with: scales from values to pixels, axes, and the frame of an SVG.

By hand, because plotly inside the page would be 4 MB of it, and nothing to see without JavaScript.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fourge.publishing.page_markup import Markup, Node, tag

WIDTH = 1120
"""Of a figure that takes the page's whole width, in its own pixels."""

Format = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on pixels from `begin` to `end`; a logarithmic one needs positive values."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(x) if self.logarithmic else x for x in (self.low, self.high, value))
        return self.begin + (at - low) / (high - low) * (self.end - self.begin)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside, about `count`; whole decades on a logarithmic scale."""
        if self.logarithmic:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**decade for decade in decades]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def linear_from_zero(values: Sequence[float], begin: float, end: float) -> Scale:
    """From 0 to a little above the largest value."""
    return Scale(0.0, max(values, default=0.0) * 1.05 or 1.0, begin, end)


def decades_around(values: Sequence[float], begin: float, end: float) -> Scale:
    """The whole decades that hold all positive values; 1 to 10 where there are none."""
    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return Scale(1.0, 10.0, begin, end, logarithmic=True)
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return Scale(10.0**low, 10.0 ** max(high, low + 1), begin, end, logarithmic=True)


def svg(width: float, height: float, label: str, *children: Node, role: str = "img") -> Markup:
    """A figure as wide as its place; `label` says to those who do not see it what it shows."""
    picture = tag("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role=role, aria_label=label, width="100%")
    return tag("div", picture, class_="figure")


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """A line of text; `anchor` is start, middle or end."""
    return tag("text", content, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def titled(shape: str, title: str, **attributes: str | float | None) -> Markup:
    """A shape that says `title` when pointed at."""
    return tag("g", tag("title", title), tag(shape, **attributes))


def y_axis(scale: Scale, left: float, right: float, form: Format, count: int = 4) -> Markup:
    """Grid lines across, each with its value at the left."""
    return tag(
        "g",
        [
            (
                tag("line", x1=left, x2=right, y1=scale(tick), y2=scale(tick), class_="grid"),
                text(left - 6, scale(tick) + 4, form(tick), "end", "tick"),
            )
            for tick in scale.ticks(count)
        ],
    )


def x_axis(scale: Scale, y: float, form: Format, ticks: Sequence[float] | None = None) -> Markup:
    """Values under a figure."""
    at = scale.ticks() if ticks is None else ticks
    return tag("g", [text(scale(tick), y, form(tick), "middle", "tick") for tick in at])


def layer_ticks(count: int, most: int = 32) -> list[int]:
    """Which of `count` layers are numbered under a figure with room for `most`: all, or every 2nd, 5th, 10th, …"""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if count <= most * step)
    return list(range(0, count, step))


def line_path(points: Sequence[tuple[float, float]]) -> str:
    """The `d` of a path through points."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def short(value: float) -> str:
    """A tick's value: `0.05`, `10`, `2,000`."""
    return f"{value:,.0f}" if abs(value) >= 10 else f"{value:g}"


def power(value: float) -> str:
    """A power of two as people read it: `1/64`, `8`, `∞`."""
    if value == math.inf:
        return "∞"
    return f"{value:g}" if value >= 1 or value == 0 else f"1/{1 / value:,.0f}"


def percent(value: float, digits: int = 1) -> str:
    """`9.3 %` from a share."""
    return f"{100 * value:.{digits}f} %".replace("-", "−")
