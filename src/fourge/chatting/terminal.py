"""The loop: a line in, an answer out, on a terminal or in a pipe."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TextIO

from fourge.chatting.conversation import HELP, Command, Conversation, Mistake, Say, parse_line, split_thoughts
from fourge.chatting.models import ChatModel, Sampling
from fourge.errors import InputError
from fourge.serving.api import ApiError

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Terminal:
    """Reads from `source`; answers go to `answers`, and what is no answer to `notes`.

    On a terminal there is a prompt, thoughts are dim, and an error does not end the chat. In a pipe there is none
    of that: standard output has the answers alone, thoughts go where the notes go, and an error ends it.
    """

    def __init__(
        self, source: TextIO | None = None, answers: TextIO | None = None, notes: TextIO | None = None
    ) -> None:
        self._source, self._answers, self._notes = source or sys.stdin, answers or sys.stdout, notes or sys.stderr
        self.interactive = self._source.isatty() and self._answers.isatty()

    def lines(self) -> Iterator[str]:
        """Typed lines until Ctrl-D; Ctrl-C at the prompt gives a new one."""
        if not self.interactive:
            yield from self._source
            return
        import readline  # noqa: F401  arrow keys and history in input()

        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                self.note("\nCtrl-D or /quit ends")
            except EOFError:
                self.note("")
                return

    def note(self, text: str) -> None:
        """A line that is no part of an answer."""
        print(text, file=self._notes, flush=True)

    def think(self, text: str) -> None:
        """A piece of what the model thinks."""
        print(f"{_DIM}{text}{_PLAIN}" if self.interactive else text, end="", file=self._notes, flush=True)

    def speak(self, text: str) -> None:
        """A piece of what the model says."""
        print(text, end="", file=self._answers, flush=True)


def converse(model: ChatModel, conversation: Conversation, sampling: Sampling, terminal: Terminal) -> int:
    """Until the lines end or `/quit`; the number of answers. Raises InputError, in a pipe, where none comes."""
    answers = 0
    for line in terminal.lines():
        match parse_line(line):
            case None:
                continue
            case Say(text):
                answers += _answer(model, conversation, sampling, terminal, text)
            case Mistake(message):
                terminal.note(message)
            case Command("quit"):
                break
            case Command("help"):
                terminal.note(HELP)
            case Command("reset"):
                conversation.reset()
                terminal.note("forgotten")
            case Command("save", name):
                terminal.note(save(conversation, model.name, Path(name).expanduser()))
    return answers


def save(conversation: Conversation, model: str, path: Path) -> str:
    """Writes the conversation to a new file; what came of it, in a line."""
    try:
        with path.open("x") as file:
            json.dump(conversation.to_json(model), file, indent=2, ensure_ascii=False)
            file.write("\n")
    except FileExistsError:
        return f"{path} exists; name another file"
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}); name another file"
    return f"saved to {path}"


def _answer(model: ChatModel, conversation: Conversation, sampling: Sampling, terminal: Terminal, text: str) -> int:
    """One turn; 1 if anything was said. Ctrl-C ends it with what has been said so far."""
    conversation.say(text)
    said = ""
    thought = False
    try:
        with closing(model.answer(conversation.messages, sampling)) as deltas:
            for delta in split_thoughts(deltas):
                if delta.reasoning:
                    terminal.think(delta.reasoning)
                    thought = True
                if delta.content:
                    if thought and not said:
                        terminal.note("\n")
                    said += delta.content  # before it is seen: what was seen is in the conversation
                    terminal.speak(delta.content)
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        terminal.note(" (stopped)")
    except (ApiError, InputError) as error:
        conversation.hear(said)
        if not terminal.interactive:
            raise InputError(str(error)) from error
        terminal.note(f"fourge: {error}")
        return 0
    if said:
        terminal.speak("\n")
    conversation.hear(said)
    return int(bool(said))
