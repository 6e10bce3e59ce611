"""Markdown as a card needs it: tables, numbers with their errors, text that cannot break out of a cell."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
"""A cell without a measurement."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table; columns of `numbers`, all after the first, stand to the right. Cells are escaped."""
    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in (header, rule, *rows))


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns, both to the left."""
    return "\n".join(["| | |", "|---|---|", *(f"| **{name}** | {cell(value)} |" for name, value in rows)])


def cell(text: str) -> str:
    """Text for a table's cell: on one line, its bars escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def plain(text: str) -> str:
    """Text from a file, shown as it is: no tag, no comment, no template syntax in it takes effect."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str, language: str = "bash") -> str:
    """A fenced block."""
    return f"```{language}\n{text}\n```"


def without_folder(argument: str) -> str:
    """A local path without what is before its last name: where it lay on one machine is nobody else's matter."""
    return argument.rstrip("/").rpartition("/")[2] if argument.startswith(("/", "~", ".")) else argument


def shared_command(command: str) -> str:
    """A command line whose local paths are those last names."""
    return shlex.join(without_folder(argument) for argument in shlex.split(command))


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return "\n".join(f"- {line}" for line in lines)


def estimate(found: Mapping[str, Any], digits: int = 4) -> str:
    """`0.1234 ± 0.0021` from an estimate with `mean` and `standard_error`."""
    return _with_error(found["mean"], found["standard_error"], digits)


def percent(value: float, error: float | None, digits: int = 2, signed: bool = False) -> str:
    """`75.17 ± 1.26`: a share of 1 and its standard error, in percent."""
    return _with_error(100 * value, None if error is None else 100 * error, digits, "+" if signed else "")


def giga(count: int) -> str:
    """A count of parameters: `405.85 B`; `134.5 M` below a thousand million."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def _with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    text = f"{value:{sign},.{digits}f}"
    return text if error is None else f"{text} ± {error:,.{digits}f}"
