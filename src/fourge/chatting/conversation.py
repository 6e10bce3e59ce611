"""What has been said, and what a typed line means: no input, no output."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fourge.serving.api import Delta

HELP = """\
/reset        forget what was said; the system prompt stays
/save FILE    write the conversation to a new JSON file
/help         this
/quit         end, as Ctrl-D does
Ctrl-C stops an answer, not the chat. A line that begins with a space is said, whatever comes after."""

_COMMANDS = ("reset", "save", "help", "quit")
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Say:
    """Words for the model."""

    text: str


@dataclass(frozen=True)
class Command:
    """One of `/reset`, `/save`, `/help`, `/quit`, and what follows it."""

    name: str
    argument: str


@dataclass(frozen=True)
class Mistake:
    """A line that means nothing; `message` says what would."""

    message: str


def parse_line(line: str) -> Say | Command | Mistake | None:
    """What a typed line asks for; None for an empty one."""
    if not line.strip():
        return None
    if not line.startswith("/"):
        return Say(line.strip())
    name, _, argument = line[1:].strip().partition(" ")
    if name not in _COMMANDS:
        known = ", ".join(f"/{command}" for command in _COMMANDS)
        return Mistake(f"/{name} is no command; known are {known}; begin with a space to say it to the model")
    if name == "save" and not argument.strip():
        return Mistake("/save needs a file's name: /save chat.json")
    return Command(name, argument.strip())


@dataclass
class Conversation:
    """Turns of user and assistant, in OpenAI's form; `system` goes before them and outlives a reset."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model is given."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return before + self.turns

    def say(self, text: str) -> None:
        """Adds the user's words."""
        self.turns.append({"role": "user", "content": text})

    def hear(self, text: str) -> None:
        """Adds the answer, as far as it came; of one that did not come, the question goes too."""
        if text:
            self.turns.append({"role": "assistant", "content": text})
        else:
            self.turns.pop()

    def reset(self) -> None:
        """Forgets every turn."""
        self.turns.clear()

    def to_json(self, model: str) -> dict[str, Any]:
        """What `/save` writes."""
        return {"model": model, "messages": self.messages}


def split_thoughts(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Moves what stands between `<think>` and `</think>` at the beginning of an answer into its reasoning.

    Tags may come in pieces. For servers without a reasoning parser, and for models in process.
    """
    phase, held = "start", ""
    for delta in deltas:
        if delta.reasoning:
            yield Delta(delta.reasoning, "")
        held += delta.content
        if phase == "start":
            begun = held.lstrip()
            if begun.startswith(_OPEN):
                phase, held = "thinking", begun.removeprefix(_OPEN)
            elif not _OPEN.startswith(begun):
                phase = "answering"
        if phase == "thinking":
            thought, closed, rest = held.partition(_CLOSE)
            if closed:
                phase, held = "closed", rest
            else:
                end = len(thought) - _beginning_of(_CLOSE, thought)
                thought, held = thought[:end], thought[end:]
            if thought:
                yield Delta(thought, "")
        if phase == "closed":
            held = held.lstrip()
            phase = "answering" if held else "closed"
        if phase == "answering" and held:
            yield Delta("", held)
            held = ""
    if held:
        yield Delta(held, "") if phase == "thinking" else Delta("", held)


def _beginning_of(tag: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-n:])), 0)
