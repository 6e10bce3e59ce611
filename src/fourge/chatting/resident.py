"""A whole model in this process, through transformers: a quantized one as compressed-tensors emulates it."""

import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from fourge.chatting.models import Messages, Sampling
from fourge.checkpoint.exchange import MODELOPT, find_layout
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.source import locate
from fourge.errors import InputError
from fourge.planning.model import describe
from fourge.progress import announced, format_bytes
from fourge.serving.api import Delta
from fourge.serving.templates import read_chat_template, reads_variable
from fourge.walk.choices import Selection
from fourge.walk.resources import available_memory

_WORKING_BYTES = 1 << 30
"""KV cache and activations of one conversation."""


def weights_in_memory(checkpoint: Checkpoint) -> int:
    """Bytes that transformers holds: codes of NVFP4 and FP8 become BF16, their scales go; everything else stays."""
    total = 0
    for name, info in checkpoint.tensors.items():
        if name.endswith(".weight_packed"):
            total += 2 * 2 * prod(info.shape)  # two codes a byte, two bytes a value
        elif info.dtype == "F8_E4M3" and name.endswith(".weight"):
            total += 2 * info.nbytes
        elif info.dtype in ("BF16", "F16", "F32"):
            total += info.nbytes
    return total


def require_memory(model: str, weights: int, device: torch.device) -> None:
    """Raises InputError, naming the way round it, where a model of that many bytes does not fit."""
    need = weights + _WORKING_BYTES
    have = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if have < need:
        raise InputError(
            f"{model} is too large to chat with in this process: {format_bytes(need)} are needed on {device}, "
            f"{format_bytes(have)} are free; serve it with `fourge serve`, then `fourge chat http://HOST:PORT`"
        )


@dataclass(frozen=True)
class ResidentModel:
    """transformers' model and tokenizer, ready to generate."""

    name: str
    tokenizer: Any = field(repr=False)
    model: Any = field(repr=False)

    @classmethod
    def load(cls, model: str, revision: str | None, device: torch.device) -> "ResidentModel":
        """A directory or hub id, quantized or not. Raises InputError where it does not fit or cannot chat."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        directory = _locate(model, revision, device)
        if read_chat_template(directory) is None:
            raise InputError(f"{directory}: has no chat template, so it is no model to chat with; take an instruct one")
        with announced(f"Loading {model} into this process, with transformers on {device}"):
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
            loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)
            loaded.to(device).eval()
        return cls(model, tokenizer, loaded)

    @property
    def described(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{self.name} in this process, through transformers on {self.model.device} in {dtype}"

    def answer(self, messages: Messages, sampling: Sampling) -> Generator[Delta, None, None]:
        """As `ChatModel.answer`; what `generate` raises is raised here."""
        from transformers import TextIteratorStreamer

        if sampling.thinking and not self._can_think():
            raise InputError(f"--thinking: the chat template of {self.name} has no such switch; leave it out")
        inputs = self.tokenizer.apply_chat_template(
            list(messages),
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            **sampling.template_arguments(),
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with _Generation(self.model, dict(inputs), streamer, sampling):
            for text in streamer:
                if text:
                    yield Delta("", text)

    def _can_think(self) -> bool:
        template = str(self.tokenizer.chat_template)
        return any(reads_variable(template, switch) for switch in ("thinking", "enable_thinking"))


class _Generation:
    """`generate` in a thread of its own, that it may be read from as it goes; leaving it early stops it."""

    def __init__(self, model: Any, inputs: dict[str, Any], streamer: Any, sampling: Sampling) -> None:
        self._model, self._inputs, self._streamer, self._sampling = model, inputs, streamer, sampling
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        from transformers import StoppingCriteriaList

        def stopped(tokens: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
            return torch.full((tokens.shape[0],), self._stop.is_set(), device=tokens.device)

        try:
            self._model.generate(
                **self._inputs,
                **self._arguments(),
                streamer=self._streamer,
                stopping_criteria=StoppingCriteriaList([stopped]),
            )
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits for it
            self._error = error
            self._streamer.end()

    def _arguments(self) -> dict[str, Any]:
        sampling, prompt = self._sampling, self._inputs["input_ids"].shape[1]
        room = self._model.config.max_position_embeddings - prompt
        if room < 1:
            raise InputError(f"the conversation has {prompt} tokens and fills the model's context; /reset it")
        arguments: dict[str, Any] = {"max_new_tokens": min(sampling.max_tokens or room, room)}
        if sampling.temperature == 0:
            arguments |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif sampling.temperature is not None:
            arguments |= {"do_sample": True, "temperature": sampling.temperature}
        return arguments


def _locate(model: str, revision: str | None, device: torch.device) -> Path:
    """The model's directory, once it is known to fit; a hub model is not downloaded before."""
    local = Path(model).expanduser()
    if not local.exists():
        facts, _ = describe(model, revision, Selection())
        require_memory(model, 2 * facts.parameters, device)
    directory = locate(model, revision)
    checkpoint = Checkpoint.open(directory)
    if checkpoint.config.get("quantization_config") is not None and find_layout(checkpoint) is MODELOPT:
        raise InputError(
            f"{directory}: transformers does not read NVIDIA's layout; `fourge convert --layout compressed-tensors` "
            "it, or serve it with `fourge serve`"
        )
    require_memory(model, weights_in_memory(checkpoint), device)
    return directory
