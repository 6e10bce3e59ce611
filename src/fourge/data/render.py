"""Text and conversations to token ids, as the model would see them in use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fourge.data.shapes import Conversation, parse_record
from fourge.errors import InputError

# Some templates write today's date; this one, Llama 3.1's own default, keeps a run's tokens the same tomorrow.
# A template that asks the clock without looking at `date_string` first is out of reach.
_DATE = "26 Jul 2024"


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a checkpoint directory; runs no code from it. InputError where it has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, LookupError, ImportError) as error:
        raise InputError(
            f"{directory}: the tokenizer cannot be loaded ({_one_line(error)}); put the model's tokenizer files "
            "there, or take --calibration random"
        ) from error
    # Of a directory without its files transformers makes a tokenizer that knows special tokens only.
    if len(tokenizer) == len(tokenizer.get_added_vocab()):
        raise InputError(
            f"{directory}: has no tokenizer; put the model's tokenizer.json there, or take --calibration random"
        )
    return tokenizer


class Renderer:
    """Renders records of one source with one model's tokenizer. `vocab_size` is the model's, not the tokenizer's."""

    def __init__(self, tokenizer: Any, directory: Path, vocab_size: int, max_seq_length: int) -> None:
        self._tokenizer = tokenizer
        self._directory = directory
        self._vocab_size = vocab_size
        self._max_seq_length = max_seq_length

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def record(self, record: Mapping[str, Any], place: str) -> np.ndarray:
        """The tokens of a record, int32, at most `max_seq_length` of them; none for an empty one.

        Conversations go through the chat template, which writes every special token itself. Without a template
        an exchange of prompt and answer is rendered as its plain text, and anything else raises InputError.
        """
        content = parse_record(record, place)
        if isinstance(content, str):
            tokens = self._text(content, place)
        elif not content.messages:
            tokens = np.empty(0, np.int32)
        elif self.has_chat_template:
            tokens = self._tokenize(self._apply_template(content, place), place, add_special_tokens=False)
        elif content.plain is not None:
            tokens = self._text(content.plain, place)
        else:
            raise InputError(
                f"{place}: a conversation, but the model in {self._directory} has no chat template; put a "
                "chat_template.jinja there, or name a source with 'text' or 'prompt' and 'response'"
            )
        return tokens[: self._max_seq_length]

    def stream(self, text: str, place: str) -> np.ndarray:
        """The tokens of a whole file, int32, however many."""
        return self._text(text, place)

    def _text(self, text: str, place: str) -> np.ndarray:
        # A tokenizer adds its special tokens to the empty text too; a record with nothing in it is to be skipped.
        return self._tokenize(text, place, add_special_tokens=True) if text else np.empty(0, np.int32)

    def _apply_template(self, conversation: Conversation, place: str) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self._tokenizer.apply_chat_template(conversation.messages, tokenize=False, date_string=_DATE)
        # A template is a program: what it computes can fail in Python's own ways, too.
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{place}: the chat template of {self._directory} refuses it ({_one_line(error)}); correct the "
                "record or the template, or name another source"
            ) from error
        assert isinstance(rendered, str)
        return rendered

    def _tokenize(self, text: str, place: str, add_special_tokens: bool) -> np.ndarray:
        # verbose=False: sequences longer than the model's context are cut here, and need no warning.
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        tokens = self._single_bos(np.array(ids, dtype=np.int32))
        if len(tokens) and tokens.max() >= self._vocab_size:
            raise InputError(
                f"{place}: the tokenizer in {self._directory} gives token {tokens.max()}, the model knows "
                f"{self._vocab_size} (0 to {self._vocab_size - 1}); put the model's own tokenizer there"
            )
        return tokens

    def _single_bos(self, tokens: np.ndarray) -> np.ndarray:
        """Of several BOS at the beginning, from the text, the template and the tokenizer, one stays."""
        others = np.flatnonzero(tokens != self._tokenizer.bos_token_id)
        leading = int(others[0]) if len(others) else len(tokens)
        return tokens[max(0, leading - 1) :]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
