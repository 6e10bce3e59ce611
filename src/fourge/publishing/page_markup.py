"""HTML and SVG from Python, safe by construction: every text is escaped unless it is markup already."""

import html
import json
from collections.abc import Iterable, Sequence

_VOID = frozenset({"meta", "br", "input"})
_CLOSED_AT_ONCE = frozenset({"line", "rect", "circle", "path"})
"""SVG's shapes: what an HTML parser takes for open holds all that follows."""


class Markup(str):
    """Text that is HTML already. Only this file makes it."""

    __slots__ = ()


Node = str | int | float | None | Iterable["Node"]
"""What an element may hold: markup, text to escape, numbers, nothing, or any of these in a row."""


def tag(name: str, *children: Node, **attributes: str | float | bool | None) -> Markup:
    """One element. Attributes: `class_` is `class`, `data_layer` is `data-layer`; None and False leave one out."""
    opening = "<" + name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID | _CLOSED_AT_ONCE:
        assert not children
        return Markup(opening + (">" if name in _VOID else "/>"))
    return Markup(f"{opening}>{join(children)}</{name}>")


def join(children: Iterable[Node]) -> Markup:
    """Several nodes one after the other."""
    return Markup("".join(_rendered(child) for child in children))


def trusted(text: str) -> Markup:
    """Our own package's text, as it is: templates, style and script."""
    return Markup(text)


def json_island(identifier: str, content: object) -> Markup:
    """JSON for the script to read, in an element that is never run; nothing in it can end the element."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{html.escape(identifier)}">{text}</script>')


def table(header: Sequence[Node], rows: Iterable[Sequence[Node]], **attributes: str | None) -> Markup:
    """A table whose first column names the row; the others hold figures."""
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    head = tag("tr", [tag("th", cell, scope="col") for cell in header])
    return tag("div", tag("table", tag("thead", head), tag("tbody", body), **attributes), class_="scroll")


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{html.escape(text)}"'


def _rendered(child: Node) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return html.escape(child)
    if isinstance(child, int | float):
        return str(child)
    return join(child)
