"""The `vllm` engine: lm-eval's requests as token ids to OpenAI completions endpoints."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourge.errors import InputError
from fourge.evaluation.prompting import END_OF_THOUGHT, adds_bos, load_tokenizer
from fourge.progress import announced
from fourge.serving.command import API_KEY

if TYPE_CHECKING:
    from fourge.evaluation.requests import Results, Role, RunLmEval

_OPTIONS = {"baseline": "--baseline-url", "quantized": "--quantized-url"}
_SECONDS = 3600
"""How long one request may take: a server that is busy with others answers late, and asking again makes it busier."""


@dataclass(frozen=True)
class ServedModel:
    """What a server says of itself: its completions endpoint, the model's name, tokens a sequence."""

    endpoint: str
    name: str
    max_length: int


def ask_server(url: str, option: str) -> ServedModel:
    """The one model that an OpenAI endpoint serves; `url` with or without `/v1` or `/v1/completions`.

    Raises InputError, naming `option`, where nothing answers or several models are served.
    """
    base = url.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise InputError(f"{option} {url}: not a URL; write http://HOST:PORT")
    try:
        headers = {"Authorization": f"Bearer {os.environ[API_KEY]}"} if os.environ.get(API_KEY) else {}
        request = urllib.request.Request(f"{base}/v1/models", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            models = json.load(response)["data"]
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{option} {url}: no OpenAI server answers there ({error}); start `vllm serve`, its key in {API_KEY}"
        ) from error
    if len(models) != 1:
        names = ", ".join(model["id"] for model in models)
        raise InputError(f"{option} {url}: serves {len(models)} models ({names}); serve one model a server")
    if "max_model_len" not in models[0]:
        raise InputError(f"{option} {url}: does not say max_model_len, as vLLM does; serve with `vllm serve`")
    return ServedModel(f"{base}/v1/completions", models[0]["id"], int(models[0]["max_model_len"]))


@dataclass(frozen=True)
class ServerEngine:
    """One server a model, `concurrency` requests at once; prompts are tokenized here, by the models' own tokenizers."""

    urls: "Mapping[Role, str]"
    tokenizers: "Mapping[Role, Path]"
    concurrency: int
    apply_chat_template: bool
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)

    def evaluate(self, run_lm_eval: "RunLmEval") -> "dict[Role, Results]":
        """lm-eval's results of every model; InputError where a server fails three times in a row."""
        served = {role: ask_server(url, _OPTIONS[role]) for role, url in self.urls.items()}
        return {role: self._evaluate_one(role, server, run_lm_eval) for role, server in served.items()}

    def _evaluate_one(self, role: "Role", server: ServedModel, run_lm_eval: "RunLmEval") -> "Results":
        model = self._model(role, server)
        import aiohttp
        import requests

        try:
            with announced(f"{role}: lm-eval's requests"):
                return run_lm_eval(model)
        except (aiohttp.ClientError, requests.RequestException, TimeoutError) as error:
            raise InputError(
                f"{_OPTIONS[role]} {self.urls[role]}: stopped answering ({error}); look at the server's log"
            ) from error

    def _model(self, role: "Role", server: ServedModel) -> Any:
        directory = self.tokenizers[role]
        try:
            return _completions_class()(
                base_url=server.endpoint,
                model=server.name,
                tokenizer=str(directory),
                tokenizer_backend="huggingface",
                tokenized_requests=True,
                add_bos_token=adds_bos(load_tokenizer(directory), self.apply_chat_template, **self.chat_template_args),
                num_concurrent=self.concurrency,
                # lm-eval keeps one token for the answer.
                max_length=server.max_length,
                timeout=_SECONDS,
                chat_template_args=dict(self.chat_template_args),
            )
        except ModuleNotFoundError as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"--engine vllm: {reason}; pip install 'fourge[eval]'") from error


def _completions_class() -> Any:
    """lm-eval's `local-completions` with arguments for the chat template, and thoughts cut off before scoring.

    Made here, for lm-eval is imported where it is used.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import postprocess_generated_text

    class Completions(LocalCompletionsAPI):  # type: ignore[misc]
        def __init__(self, chat_template_args: dict[str, Any], **options: Any) -> None:
            super().__init__(**options)
            self._chat_template_args = chat_template_args

        @property
        def api_key(self) -> str:
            """The key that `fourge serve` takes; lm-eval would send OPENAI_API_KEY's."""
            return os.environ.get(API_KEY, "")

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            rendered: str = self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._chat_template_args,
            )
            return rendered

        def parse_generations(self, outputs: Any, **options: Any) -> list[str]:
            texts: list[str] = LocalCompletionsAPI.parse_generations(outputs, **options)
            if not any(self._chat_template_args.values()):
                return texts
            return [postprocess_generated_text(text, stop=None, think_end_token=END_OF_THOUGHT) for text in texts]

    return Completions
