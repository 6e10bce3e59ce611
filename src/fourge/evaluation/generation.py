"""What lm-eval's `hf` model does with a request to generate: the tokens it reads, where an answer ends, its text.

As in lm_eval/models/huggingface.py, 0.4.13, with one request at a time: the beginning of a context that is too long
is dropped, an answer ends with the tokens of the model's generation_config.json, with a stop string in the text of
its last tokens (as many as the string has, and two more), or with `max_gen_toks` tokens; special tokens are not
written out, and the text is cut at the first stop string.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from fourge.errors import InputError
from fourge.evaluation.lm_eval_run import samples_tokens
from fourge.evaluation.prompting import END_OF_THOUGHT
from fourge.evaluation.requests import GenerateRequest
from fourge.evaluation.samples import DEFAULT_MAX_GEN_TOKS
from fourge.evaluation.walk_lm import Prompting, Recorder, WalkLM

_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
}
"""transformers' settings that make greedy decoding take another token than the likeliest, unless they are as here."""

_READ_HERE = ("until", "do_sample", "max_gen_toks")
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_LOOK_BACK = 2


@dataclass(frozen=True)
class EndRule:
    """Where an answer ends; `stops` are the stop strings by how many of the last tokens they are looked for in."""

    max_tokens: int
    end_tokens: frozenset[int]
    stops: Mapping[int, tuple[str, ...]]
    decode: Callable[[Sequence[int]], str]

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether an answer of these tokens, which did not end before, ends with the last of them."""
        return len(tokens) >= self.max_tokens or self._stopped(tokens)

    def truncated(self, tokens: Sequence[int]) -> bool:
        """Whether an answer that has ended did so for its length alone."""
        return len(tokens) >= self.max_tokens and not self._stopped(tokens)

    def _stopped(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.end_tokens:
            return True
        for count, stops in self.stops.items():
            text = self.decode(tokens[-count:])
            if any(stop in text for stop in stops):
                return True
        return False


@dataclass(frozen=True)
class Question:
    """A request as a model reads it: the token ids of the context, and where an answer to it ends."""

    prompt: tuple[int, ...]
    rule: EndRule
    until: tuple[str, ...]


class GenerationReader:
    """Reads requests for one model, and writes its answers, as lm-eval's `hf` model would.

    `directory` is the model's: its generation_config.json says which tokens end an answer.
    """

    def __init__(self, prompting: Prompting, directory: Path) -> None:
        self._lm = WalkLM(prompting, Recorder())
        self._tokenizer = prompting.tokenizer
        self._prompting = prompting
        self._directory = directory
        self._config = _generation_config(directory, prompting.config)
        self._think_end = END_OF_THOUGHT if any(prompting.chat_template_args.values()) else None
        self._stop_lengths: dict[str, int] = {}

    def question(self, request: GenerateRequest) -> Question:
        """InputError for a request that samples, or that asks for more than greedy decoding can give."""
        settings = normalize_gen_kwargs(dict(request.gen_kwargs), DEFAULT_MAX_GEN_TOKS)
        self._require_greedy(settings)
        until = handle_stop_sequences(settings.get("until"), eos=self._tokenizer.decode(self._lm.eot_token_id))
        most = int(settings["max_gen_toks"])
        room = self._lm.max_length - most
        if most < 1 or room < 1:
            raise InputError(
                f"a task generates {most} tokens, and the model reads at most {self._lm.max_length}; "
                "lower it with --gen-kwargs max_gen_toks=N, or leave that task out"
            )
        prompt = self._encode(request.context)[-room:]
        if not prompt:
            raise InputError("a task asks for text after an empty context; leave that task out, or use --engine hf")
        stops: dict[int, tuple[str, ...]] = {}
        for stop in until:
            count = self._stop_length(stop) + _LOOK_BACK
            stops[count] = (*stops.get(count, ()), stop)
        rule = EndRule(most, _as_set(self._config.eos_token_id), stops, self._tokenizer.decode)
        return Question(tuple(prompt), rule, tuple(until))

    def text(self, question: Question, tokens: Sequence[int]) -> str:
        """The answer that lm-eval is given."""
        decoded = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        text: str = postprocess_generated_text(decoded, list(question.until), self._think_end)
        return text

    def _encode(self, context: str) -> list[int]:
        options: dict[str, Any] = {}
        if has_bos_prefix(context, self._tokenizer.bos_token):
            options = {"add_special_tokens": False}
        elif self._prompting.add_bos_token is not None:
            options = {"add_special_tokens": self._prompting.add_bos_token}
        ids: list[int] = self._tokenizer(context, **options)["input_ids"]
        return ids

    def _stop_length(self, stop: str) -> int:
        if stop not in self._stop_lengths:
            self._stop_lengths[stop] = len(self._tokenizer.encode(stop, add_special_tokens=False))
        return self._stop_lengths[stop]

    def _require_greedy(self, settings: Mapping[str, Any]) -> None:
        if samples_tokens(settings):
            raise InputError(
                f"a task samples its answers ({dict(settings)}), and the walk generates greedily alone; "
                "add --gen-kwargs do_sample=false,temperature=0, or use --engine hf or vllm"
            )
        for name, neutral in _NEUTRAL.items():
            value = settings.get(name, getattr(self._config, name, None))
            if value is not None and value != neutral:
                where = "--gen-kwargs or the task" if name in settings else self._directory / "generation_config.json"
                raise InputError(
                    f"{where}: {name} = {value} takes other tokens than the likeliest, which the walk cannot; "
                    f"add --gen-kwargs {name}={neutral}, or use --engine hf"
                )
        unknown = sorted(set(settings).difference(_READ_HERE, _OF_SAMPLING, _NEUTRAL))
        if unknown:
            raise InputError(
                f"a task generates with {unknown[0]} = {settings[unknown[0]]!r}, which the walk does not know; "
                "use --engine hf or vllm"
            )


def _generation_config(directory: Path, config: Any) -> Any:
    """As transformers gives it to a model that is loaded from `directory`."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def _as_set(ids: int | Sequence[int] | None) -> frozenset[int]:
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
