"""Text that the owner typed into the card, between markers: it survives when the card is written anew."""

import re
from dataclasses import dataclass, field

from fourge.errors import InputError

_BEGIN = re.compile(r"<!-- owner:begin ([\w-]+) -->")
_END = "<!-- owner:end -->"
_BLOCK = re.compile(rf"{_BEGIN.pattern}\n?(.*?)\n?{_END}", re.DOTALL)
_HEADING = "## "


@dataclass(frozen=True)
class OwnerText:
    """A block's text, and the line of the heading that it stood under; None at the top."""

    text: str
    heading: str | None


@dataclass
class OwnerTexts:
    """The blocks of an earlier card, by name; `placed` collects those that the new one has a place for."""

    blocks: dict[str, OwnerText]
    placed: set[str] = field(default_factory=set)

    @property
    def filled(self) -> tuple[str, ...]:
        """The names of those that have text."""
        return tuple(name for name, found in self.blocks.items() if found.text)

    def block(self, name: str) -> str:
        """The block with its markers, for a template; empty before the owner fills it."""
        self.placed.add(name)
        return _marked(name, self.blocks[name].text if name in self.blocks else "")

    def add_unplaced(self, card: str) -> str:
        """`card` with the blocks that have no place in it: at the end of the section that each stood in."""
        for name, found in self.blocks.items():
            if name not in self.placed:
                card = _insert(card, found.heading, _marked(name, found.text))
        return card


def read_owner_texts(card: str, path: str) -> OwnerTexts:
    """The blocks of a card; InputError, naming `path`, where one is not closed or two have one name."""
    blocks: dict[str, OwnerText] = {}
    matches = list(_BLOCK.finditer(card))
    for match in matches:
        name, text = match.groups()
        nested = _BEGIN.search(text)
        if nested is not None:
            raise InputError(f"{path}: the owner's text {name!r} is not closed; put {_END} after it")
        if name in blocks:
            raise InputError(f"{path}: two of the owner's texts are named {name!r}; give one another name")
        blocks[name] = OwnerText(text, _heading_before(card, match.start()))
    if len(matches) != len(_BEGIN.findall(card)):
        last = _BEGIN.findall(card)[-1]
        raise InputError(f"{path}: the owner's text {last!r} is not closed; put {_END} after it")
    return OwnerTexts(blocks)


def _marked(name: str, text: str) -> str:
    return f"<!-- owner:begin {name} -->\n{text}\n{_END}" if text else f"<!-- owner:begin {name} -->\n{_END}"


def _heading_before(card: str, position: int) -> str | None:
    before = _BLOCK.sub("", card[:position]).splitlines()
    return next((line for line in reversed(before) if line.startswith(_HEADING)), None)


def _insert(card: str, heading: str | None, block: str) -> str:
    """Puts `block` at the end of the section under `heading`, or at the card's end where there is none."""
    lines = card.splitlines()
    start = lines.index(heading) if heading in lines else len(lines)
    end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith(_HEADING)), len(lines))
    return "\n".join([*lines[:end], *([] if end == len(lines) else [block, ""]), *lines[end:]]) + (
        "\n" if end < len(lines) else f"\n\n{block}\n"
    )
