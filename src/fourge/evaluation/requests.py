"""What lm-eval asks of a model: tokens to read and the last of them to score, or a context to generate from."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fourge.errors import InputError

Role = Literal["baseline", "quantized"]
"""Which of the two models: the source in the walk's `bf16` lane, the quantized directory in its `nvfp4` lane."""

Results = dict[str, Any]
"""What `lm_eval.simple_evaluate` returns."""

RunLmEval = Callable[[Any], Results]
"""Runs lm-eval on an LM; the same tasks, prompts and seeds at every call."""


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """`tokens` int32 `[n + 1]`: the model reads the first n; the last `scored` are each to be predicted from all
    before them."""

    tokens: np.ndarray
    scored: int

    @property
    def inputs(self) -> np.ndarray:
        """The tokens that the model reads, int32 `[n]`."""
        return self.tokens[:-1]

    @property
    def context(self) -> np.ndarray:
        """The tokens before the first one that is scored."""
        return self.tokens[: -self.scored]

    @property
    def key(self) -> bytes:
        """16 bytes that two requests share only when they are the same."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        digest.update(self.scored.to_bytes(8, "little"))
        return digest.digest()


@dataclass(frozen=True)
class GenerateRequest:
    """Text to go on from, and lm-eval's arguments for how (`until`, `max_gen_toks`, `temperature`, …)."""

    context: str
    gen_kwargs: Mapping[str, Any]

    @property
    def key(self) -> bytes:
        """16 bytes that two requests share only when they are the same."""
        content = json.dumps([self.context, self.gen_kwargs], sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(), digest_size=16).digest()


def score_request(context: Sequence[int], continuation: Sequence[int], max_length: int) -> ScoreRequest:
    """Scores `continuation` after `context` with at most `max_length` tokens read: the oldest are dropped.

    As lm-eval's `hf` model does it. Raises InputError for a continuation that is empty or longer than that.
    """
    if not continuation:
        raise InputError("a task asks for the likelihood of an empty continuation; mend its doc_to_choice")
    if len(continuation) > max_length:
        raise InputError(
            f"a task asks for the likelihood of {len(continuation)} tokens, the model reads at most {max_length}; "
            "leave that task out"
        )
    assert context, "a model reads at least one token"
    tokens = np.array([*context, *continuation][-(max_length + 1) :], dtype=np.int32)
    return ScoreRequest(tokens, len(continuation))
