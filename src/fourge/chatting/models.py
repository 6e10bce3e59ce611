"""Who answers: a server, or transformers in this process."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fourge.serving.api import Client, Delta

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How to answer; None leaves it to the model's own generation config. Temperature 0 is greedy."""

    temperature: float | None
    max_tokens: int | None
    thinking: bool

    def template_arguments(self) -> dict[str, bool]:
        """Switches of chat templates: Hermes 4 calls it `thinking`, Qwen 3 `enable_thinking`; others read neither."""
        return {"thinking": True, "enable_thinking": True} if self.thinking else {}


class ChatModel(Protocol):
    """`name` is the model's, `described` says where it runs."""

    @property
    def name(self) -> str: ...

    @property
    def described(self) -> str: ...

    def answer(self, messages: Messages, sampling: Sampling) -> Generator[Delta, None, None]:
        """The answer, piece by piece; closing the iterator stops the generation. Raises ApiError."""
        ...


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an OpenAI API."""

    client: Client
    name: str

    @property
    def described(self) -> str:
        return f"{self.name} at {self.client.url}"

    def answer(self, messages: Messages, sampling: Sampling) -> Generator[Delta, None, None]:
        """As `ChatModel.answer`."""
        yield from self.client.chat(chat_request(self.name, messages, sampling))


def chat_request(model: str, messages: Messages, sampling: Sampling) -> dict[str, Any]:
    """The body of a chat completion request; what is None is left to the server."""
    request: dict[str, Any] = {"model": model, "messages": [dict(message) for message in messages]}
    if sampling.temperature is not None:
        request["temperature"] = sampling.temperature
    if sampling.max_tokens is not None:
        request["max_tokens"] = sampling.max_tokens
    if sampling.thinking:
        request["chat_template_kwargs"] = sampling.template_arguments()
    return request
