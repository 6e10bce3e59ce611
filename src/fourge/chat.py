"""`fourge chat`: talk to a model in the terminal, on a server or in this process."""

import os
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from fourge.errors import InputError

if TYPE_CHECKING:
    from fourge.chatting.models import ChatModel

DEFAULT_SERVER = "http://127.0.0.1:8000"
"""Where `fourge serve` listens, if it is told nothing else."""


@dataclass(frozen=True)
class ChatResult:
    """Who answered, where it ran, and how often."""

    model: str
    described: str
    answers: int


def chat(
    model: Annotated[
        str, typer.Argument(help="A server's address, or a model: its directory or hub id.")
    ] = DEFAULT_SERVER,
    *,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Let it think first, if its template can.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy [default: the model's own].")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer [default: what the context holds].")] = (
        None
    ),
    device: Annotated[str, typer.Option(help="For a model in this process: cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> ChatResult:
    """Chat with a model: with the one behind an address, or with one that fits this process.

    Reads lines from standard input, with a prompt where that is a terminal; /help says more. A server's API key
    comes from VLLM_API_KEY. Raises InputError for a server that cannot be reached and a model that does not fit.
    """
    from fourge.chatting.conversation import Conversation
    from fourge.chatting.models import Sampling
    from fourge.chatting.terminal import Terminal, converse

    chosen = _open(model, revision, device, threads)
    terminal = Terminal()
    terminal.note(f"chat: {chosen.described}" + ("; /help lists the commands" if terminal.interactive else ""))
    sampling = Sampling(temperature, max_tokens, thinking)
    # The command line takes SIGTERM for Ctrl-C, which here stops an answer and not the chat.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        answers = converse(chosen, Conversation(system), sampling, terminal)
    finally:
        signal.signal(signal.SIGTERM, before)
    return ChatResult(chosen.name, chosen.described, answers)


def _open(model: str, revision: str | None, device: str, threads: int) -> "ChatModel":
    if model.startswith(("http://", "https://")):
        return _connect(model)
    import torch

    from fourge.chatting.resident import ResidentModel
    from fourge.walk.device import resolve_device

    arithmetic = resolve_device(device, "auto", threads)
    torch.set_num_threads(arithmetic["threads"])
    return ResidentModel.load(model, revision, torch.device(arithmetic["device"]))


def _connect(address: str) -> "ChatModel":
    from fourge.chatting.models import RemoteModel
    from fourge.serving.api import ApiError, Client, parse_url
    from fourge.serving.command import API_KEY

    client = Client(parse_url(address), os.environ.get(API_KEY))
    try:
        return RemoteModel(client, client.model_name())
    except ApiError as error:
        raise InputError(
            f"{error}; start a server with `fourge serve`, give its address, and its key by {API_KEY}"
        ) from error
