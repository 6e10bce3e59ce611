"""A section of the card, and the files and commands that its figures come from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Trace:
    """Figures in `what` are from `file`; `command` makes that file, or reads it where its bytes are the source."""

    what: str
    file: str
    command: str


@dataclass(frozen=True)
class Section:
    """`body` is Markdown without the heading; every figure in it is in one of the `traces`' files.

    `missing` says in a few words what would fill a section that has no figures to show; None where it has.
    """

    title: str
    body: str
    traces: tuple[Trace, ...] = ()
    missing: str | None = None

    def __str__(self) -> str:
        """Heading and body: what a template prints."""
        return f"## {self.title}\n\n{self.body}"
