"""What a record says: a text, or a conversation, told by its fields."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fourge.errors import InputError

_PROMPTS = ("prompt", "instruction", "question")
_CONTEXTS = ("input", "context")
_ANSWERS = ("response", "output", "completion", "answer")
_FIELDS = frozenset({"messages", "conversations", "text", "turns", *_PROMPTS, *_ANSWERS})
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template, and the same as plain text where that says it all (None where it does not)."""

    messages: list[dict[str, Any]]
    plain: str | None = None


def parse_record(record: Mapping[str, Any], place: str) -> str | Conversation:
    """The text or conversation of a record; `place` names it in messages. The first of these that it has:

    - `messages`, a list of `{role, content}`; `conversations`, a list of `{from, value}` (ShareGPT's form);
    - `text`;
    - a prompt (`prompt`, `instruction` or `question`; with `input` or `context` after a blank line) and an answer
      (`response`, `output`, `completion` or `answer`);
    - `turns`, a list of questions: the first one, for the later ones refer to answers that are not there.

    A record whose fields are null, as tables have them, is the empty text. Raises InputError, naming the fields
    that it has, where none of these are among them or where one is not of its type.
    """
    has = {field: value for field, value in record.items() if value is not None}
    if "messages" in has:
        return Conversation(_objects(has["messages"], "role", "messages", place))
    if "conversations" in has:
        return Conversation(_from_sharegpt(_objects(has["conversations"], "from", "conversations", place)))
    if "text" in has:
        return _text(has, "text", place)
    prompt, answer = _first(_PROMPTS, has), _first(_ANSWERS, has)
    if prompt and answer:
        return _exchange(has, prompt, answer, place)
    if "turns" in has:
        return _first_turn(has["turns"], place)
    if any(field in _FIELDS and value is None for field, value in record.items()):
        return ""
    raise InputError(
        f"{place}: has the fields {', '.join(record) or 'none'}; wanted are 'messages', or 'text', or 'prompt' and "
        "'response'; rename the fields, or name another file"
    )


def _first(names: Iterable[str], has: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in has), None)


def _exchange(has: Mapping[str, Any], prompt: str, answer: str, place: str) -> Conversation:
    question = _text(has, prompt, place)
    context = _first(_CONTEXTS, has)
    if context and _text(has, context, place):
        question = f"{question}\n\n{_text(has, context, place)}"
    reply = _text(has, answer, place)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    gap = "" if question[-1:].isspace() else "\n"
    return Conversation(messages, f"{question}{gap}{reply}")


def _first_turn(turns: Any, place: str) -> str | Conversation:
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise _wrong(place, "turns", turns, "a list of texts")
    return Conversation([{"role": "user", "content": turns[0]}], turns[0]) if turns else ""


def _from_sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")}
        for message in messages
    ]


def _objects(value: Any, key: str, field: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(v, dict) and isinstance(v.get(key), str) for v in value):
        raise _wrong(place, field, value, f"a list of objects with '{key}'")
    return value


def _text(has: Mapping[str, Any], field: str, place: str) -> str:
    value = has[field]
    if not isinstance(value, str):
        raise _wrong(place, field, value, "a text")
    return value


def _wrong(place: str, field: str, value: Any, wanted: str) -> InputError:
    return InputError(
        f"{place}: '{field}' is {wanted} in a usable record, here it is {type(value).__name__} "
        f"({_shortened(value)}); correct it, or leave the record out"
    )


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}…"
