"""lm-eval's model interface over recorded answers: the first run of lm-eval writes requests down, later ones are
answered from the walk.

Strings become tokens exactly as in lm-eval's `hf` model (lm_eval/models/huggingface.py, 0.4.13): the tokenizer's own
special tokens or `add_bos_token`, none where the text begins with BOS already (a chat template wrote it), BOS or
EOS alone as an empty context, and rolling windows that each predict as much as fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fourge.errors import InputError
from fourge.evaluation.requests import GenerateRequest, ScoreRequest, score_request


@dataclass(frozen=True)
class Prompting:
    """How text reaches the model: `tokenizer` and `config` are transformers', the rest lm-eval's `hf` arguments."""

    tokenizer: Any
    config: Any
    max_length: int | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)


class AnswerSource(Protocol):
    """Where answers come from."""

    def scores(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        """Log-likelihood and greedy flag of each."""
        ...

    def generated(self, requests: Sequence[GenerateRequest]) -> list[str]:
        """The text that follows each."""
        ...


class Recorder:
    """Keeps every distinct request in the order of their first coming; what it answers means nothing."""

    def __init__(self) -> None:
        self.to_score: dict[bytes, ScoreRequest] = {}
        self.to_generate: dict[bytes, GenerateRequest] = {}
        self.tokens_requested = 0

    def scores(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        for request in requests:
            self.to_score.setdefault(request.key, request)
            self.tokens_requested += len(request.inputs)
        return [(-1.0, False)] * len(requests)

    def generated(self, requests: Sequence[GenerateRequest]) -> list[str]:
        for request in requests:
            self.to_generate.setdefault(request.key, request)
        return [""] * len(requests)


@dataclass(frozen=True)
class Replay:
    """Answers by the requests' keys."""

    score_by_key: Mapping[bytes, tuple[float, bool]]
    text_by_key: Mapping[bytes, str]

    def scores(self, requests: Sequence[ScoreRequest]) -> list[tuple[float, bool]]:
        return [self.score_by_key[request.key] for request in requests]

    def generated(self, requests: Sequence[GenerateRequest]) -> list[str]:
        return [self.text_by_key[request.key] for request in requests]


class WalkLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An lm-eval model that tokenizes, and leaves the answering to `answers`."""

    def __init__(self, prompting: Prompting, answers: AnswerSource) -> None:
        super().__init__()
        self.tokenizer = prompting.tokenizer
        self._prompting = prompting
        self._answers = answers

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: BOS, or EOS where there is none."""
        for token in (self._prompting.prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise InputError(
            "the tokenizer has neither BOS nor EOS for an empty context; give one to tokenizer_config.json"
        )

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most, from its config."""
        return self._prompting.max_length or int(resolve_max_length(self._prompting.config, self.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; BOS once, whoever writes it."""
        if add_special_tokens is None:
            add_special_tokens = self._prompting.add_bos_token
            if has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the tokenizer's template writes it; without its system messages where it refuses those."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except jinja2.exceptions.TemplateError:
            without = [message for message in chat_history if message["role"] != "system"]
            return self._render(without, add_generation_prompt)

    def _render(self, chat_history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._prompting.chat_template_args,
        )
        return rendered

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._answers.scores(
            [score_request(context, continuation, self.max_length) for _, context, continuation in requests]
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each the sum over its windows."""
        return [sum(score for score, _ in self._answers.scores(self._windows(*request.args))) for request in requests]

    def _windows(self, text: str) -> list[ScoreRequest]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        pairs = (make_disjoint_window(window) for window in windows)
        return [score_request(context, continuation, self.max_length) for context, continuation in pairs]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that follow the contexts."""
        return self._answers.generated([GenerateRequest(*request.args) for request in requests])
