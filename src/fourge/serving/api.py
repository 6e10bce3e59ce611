"""The OpenAI API as vLLM speaks it: health, the model's name, completions, and chat as a stream of events."""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fourge.errors import InputError
from fourge.serving.command import API_KEY, is_loopback

_SHORT = 10.0
_LONG = 600.0


class ApiError(Exception):
    """The server did not do what it was asked; the message says what it answered."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to a place that the user did not name."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer: more of what the model thinks, or more of what it says."""

    reasoning: str
    content: str


@dataclass(frozen=True)
class Client:
    """A server at `url` (without `/v1`); `key` goes into the Authorization header and nowhere else."""

    url: str
    key: str | None = field(default=None, repr=False)

    def is_healthy(self) -> bool:
        """Whether the server says that it is ready. One that cannot be reached is not."""
        try:
            with self._open("/health", None, _SHORT):
                return True
        except ApiError:
            return False

    def model_name(self) -> str:
        """The first model that the server offers."""
        models = self._json("/v1/models", None, _SHORT)["data"]
        if not models:
            raise ApiError(f"{self.url}/v1/models lists no model")
        return str(models[0]["id"])

    def generate(self, model: str, prompt: str | Sequence[int], max_tokens: int) -> str:
        """Greedy continuation of a text or of token ids."""
        answer = self._json("/v1/completions", _completion(model, prompt, max_tokens), _LONG)
        return str(answer["choices"][0]["text"])

    def continue_tokens(self, model: str, prompt: Sequence[int], max_tokens: int, stop: Sequence[str]) -> list[int]:
        """Token ids of the greedy continuation, up to one of the texts `stop`, the tokens that make it included."""
        request = _completion(model, list(prompt), max_tokens) | {"return_token_ids": True}
        if stop:
            request["stop"] = list(stop)
        (choice,) = self._json("/v1/completions", request, _LONG)["choices"]
        if choice.get("token_ids") is None:
            raise ApiError(f"{self.url} does not give token ids, as vLLM does where `return_token_ids` is asked for")
        return [int(token) for token in choice["token_ids"]]

    def prompt_log_probs(self, model: str, tokens: Sequence[int]) -> list[float]:
        """log p of every token of `tokens` but the first, given those before it."""
        request = _completion(model, list(tokens), 1) | {"echo": True, "logprobs": 0}
        answer = self._json("/v1/completions", request, _LONG)
        log_probs = answer["choices"][0]["logprobs"]["token_logprobs"]
        return [float(value) for value in log_probs[1 : len(tokens)]]

    def chat(self, request: dict[str, Any]) -> Iterator[Delta]:
        """The answer to a chat completion request, piece by piece as it is generated."""
        with self._open("/v1/chat/completions", request | {"stream": True}, _LONG) as response:
            try:
                yield from parse_events(line.decode() for line in response)
            except (OSError, http.client.HTTPException) as error:
                raise ApiError(f"{self.url} broke off in the middle of an answer ({error})") from error

    def _json(self, path: str, request: dict[str, Any] | None, timeout: float) -> Any:
        with self._open(path, request, timeout) as response:
            try:
                return json.loads(response.read())
            except ValueError as error:
                raise ApiError(f"{self.url}{path} does not answer in JSON; is it an OpenAI API?") from error

    def _open(self, path: str, request: dict[str, Any] | None, timeout: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = None if request is None else json.dumps(request).encode()
        # No proxy reaches this machine's own loopback.
        host = urlsplit(self.url).hostname or ""
        direct = [urllib.request.ProxyHandler({})] if is_loopback(host) else []
        opener = urllib.request.build_opener(_NoRedirects, *direct)
        try:
            return opener.open(urllib.request.Request(self.url + path, body, headers), timeout=timeout)
        except urllib.error.HTTPError as error:
            raise ApiError(f"{self.url}{path} answers {error.code}: {_reason(error.read())}") from error
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ApiError(f"{self.url}{path} cannot be reached ({reason})") from error


def parse_events(lines: Iterable[str]) -> Iterator[Delta]:
    """Server-sent events of a chat completion: `data:` lines of JSON up to `[DONE]`; other lines are skipped.

    Reasoning is called `reasoning` by vLLM now, and was `reasoning_content`. Raises ApiError for an error event.
    """
    for line in lines:
        data = line.strip()
        if not data.startswith("data:"):
            continue
        data = data.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ApiError(_reason(data.encode()))
        for choice in event["choices"]:
            delta = choice["delta"]
            piece = Delta(
                reasoning=delta.get("reasoning") or delta.get("reasoning_content") or "",
                content=delta.get("content") or "",
            )
            if piece != Delta("", ""):
                yield piece


def parse_url(text: str) -> str:
    """A server's address as the user gives it, without `/v1` and slashes at its end; InputError unless it is one."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"{text} is not a server's address such as http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise InputError(f"a key does not belong into an address, where others can see it; set {API_KEY} instead")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def _completion(model: str, prompt: str | Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0}


def _reason(body: bytes) -> str:
    """The message inside an error's JSON, or the beginning of whatever else it is."""
    text = body.decode(errors="replace").strip()
    try:
        content = json.loads(text)
    except ValueError:
        return text[:300]
    error = content.get("error", content) if isinstance(content, dict) else content
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]
