"""What a checkpoint's chat template and tokenizer ask of a server: parsers for tool calls and for reasoning."""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.errors import InputError

_TEMPLATE_FILE = "chat_template.jinja"
_OTHER_TEMPLATES = "additional_chat_templates"
_THINK_TOKENS = ("<think>", "</think>")
_STATEMENT = re.compile(r"\{%(.*?)%\}|\{\{(.*?)\}\}", re.DOTALL)
_STRING = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)


@dataclass(frozen=True)
class ChatTemplate:
    """`path` is the file to hand to a server; None where the tokenizer's own choice must stand.

    That is so for a template inside tokenizer_config.json, and where there are several (one for tools, say).
    """

    text: str
    path: Path | None


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template that transformers takes by default: its own file, or the tokenizer config's; None without one."""
    path = directory / _TEMPLATE_FILE
    if path.is_file():
        return ChatTemplate(path.read_text(), None if (directory / _OTHER_TEMPLATES).is_dir() else path)
    stored = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, list):
        named = {entry["name"]: entry["template"] for entry in stored}
        stored = named.get("default")
    return None if stored is None else ChatTemplate(stored, None)


def read_think_tokens(directory: Path) -> frozenset[str]:
    """Which of `<think>` and `</think>` are single tokens of the tokenizer, as vLLM's parsers need them."""
    stored = _read_json(directory / "tokenizer.json")
    added = {token["content"] for token in stored.get("added_tokens", [])}
    vocabulary = stored.get("model", {}).get("vocab", {})
    # Unigram tokenizers store [token, score] pairs, the others a table.
    words = vocabulary if isinstance(vocabulary, dict) else {pair[0] for pair in vocabulary}
    return frozenset(token for token in _THINK_TOKENS if token in added or token in words)


def reads_variable(template: str, name: str) -> bool:
    """Whether a Jinja template looks at variable `name`; the same word in its text or its strings does not count."""
    word = re.compile(rf"(?<![\w.]){re.escape(name)}\b")
    return any(
        word.search(_STRING.sub("", statement)) is not None
        for match in _STATEMENT.finditer(template)
        for statement in match.groups(default="")
    )


def choose_tool_call_parser(template: str) -> str | None:
    """vLLM's parser for the template's tool calls: `hermes` for JSON between `<tool_call>` tags, None for others.

    Qwen's coder models put XML between the same tags, which is another parser's.
    """
    if not reads_variable(template, "tools") or "<tool_call>" not in template or "<function=" in template:
        return None
    return "hermes"


def choose_reasoning_parser(template: str, think_tokens: Collection[str]) -> str | None:
    """vLLM's parser for what the model thinks; None where there is none that fits.

    Hermes 4 thinks when its template is given `thinking=True` and not otherwise, as DeepSeek-V3.1 does. vLLM's
    `deepseek_v3` looks at the same switch: with it, everything up to `</think>` is reasoning, without it nothing
    is (`deepseek_r1` and `qwen3` would take a plain answer for a thought without end). Qwen 3's switch is
    `enable_thinking`, and on by default. The parsers of both need the tags to be single tokens.
    """
    if set(think_tokens) != set(_THINK_TOKENS):
        return None
    if reads_variable(template, "thinking"):
        return "deepseek_v3"
    return "qwen3" if reads_variable(template, "enable_thinking") else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); take the model's own file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; take the model's own file")
    return content
