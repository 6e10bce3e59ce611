"""A section of the page: a heading that says the finding, the figure, its numbers, and the file they are from."""

from dataclasses import dataclass

from fourge.publishing.page_markup import Markup, Node, tag


@dataclass(frozen=True)
class Section:
    """`topic` stands small above `finding`; `source` names the files that the figures are from."""

    identifier: str
    topic: str
    finding: str
    body: tuple[Node, ...]
    source: Node

    def render(self) -> Markup:
        """The section as HTML."""
        heading = f"{self.identifier}-finding"
        return tag(
            "section",
            tag("p", self.topic, class_="topic"),
            tag("h2", self.finding, id=heading),
            self.body,
            None if self.source is None else tag("p", "From ", self.source, class_="source"),
            id=self.identifier,
            aria_labelledby=heading,
        )


def missing(identifier: str, topic: str, what: str, command: str | None = None) -> Section:
    """A section that says what is not there, and which command would bring it."""
    how = () if command is None else (note("It would come from ", tag("code", command)),)
    return Section(identifier, topic, what, how, None)


def folded(summary: str, *children: Node) -> Markup:
    """Numbers behind a line that opens them."""
    return tag("details", tag("summary", summary), children)


def note(*children: Node) -> Markup:
    """What a reader should know of the figure above."""
    return tag("p", children, class_="note")
