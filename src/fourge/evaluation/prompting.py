"""How a model is spoken to: its chat template, the switch for thinking in it, and who writes the BOS token."""

from pathlib import Path
from typing import Any

from fourge.errors import InputError
from fourge.evaluation.suites import Thinking

END_OF_THOUGHT = "</think>"
"""What ends a train of thought in Hermes 4, Qwen3 and DeepSeek-R1; only what follows it is scored."""
_SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call the switch: Qwen3's name, Hermes 4's and DeepSeek's."""
_HELLO = [{"role": "user", "content": "Hello"}]


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint directory; InputError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{directory}: no tokenizer that transformers can load ({reason}); copy it there") from error


def thinking_arguments(tokenizer: Any, directory: Path, thinking: Thinking | None) -> dict[str, Any]:
    """Arguments of the chat template that turn thinking on or off; none where it is not asked for.

    The switch is found by what it does: the prompt must change with it. Raises InputError where none does.
    """
    if thinking is None:
        return {}
    for name in _SWITCHES:
        if _render(tokenizer, **{name: True}) != _render(tokenizer, **{name: False}):
            return {name: thinking == "on"}
    raise InputError(
        f"--thinking {thinking}: the chat template in {directory} has no switch for it ({' or '.join(_SWITCHES)}); "
        "leave --thinking out"
    )


def require_chat_template(tokenizer: Any, directory: Path) -> None:
    """Raises InputError for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{directory}: its tokenizer has no chat template; evaluate it with --no-apply-chat-template, or put "
            "chat_template.jinja there"
        )


def adds_bos(tokenizer: Any, chat: bool, **arguments: Any) -> bool:
    """Whether tokenizing a prompt must add BOS, as lm-eval's `hf` model decides: where the tokenizer does, but never
    to a chat template that wrote it already."""
    if chat and tokenizer.bos_token and _render(tokenizer, **arguments).startswith(tokenizer.bos_token):
        return False
    first = tokenizer("Hello").input_ids[0]
    return tokenizer.bos_token_id is not None and bool(first == tokenizer.bos_token_id)


def _render(tokenizer: Any, **arguments: Any) -> str:
    return str(tokenizer.apply_chat_template(_HELLO, tokenize=False, add_generation_prompt=True, **arguments))
