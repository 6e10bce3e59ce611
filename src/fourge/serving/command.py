"""The arguments of `vllm serve`, and the whole command as a line for a shell."""

import ipaddress
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourge.planning.kv_cache import KvCacheDtype

API_KEY = "VLLM_API_KEY"
"""The environment variable that both vLLM and we read a key from; a key is in no argument and in no output of ours."""


@dataclass(frozen=True)
class ServerSettings:
    """What the server is told; None leaves an option out, so that vLLM's own default holds."""

    model: Path
    served_model_name: str
    host: str
    port: int
    max_model_len: int
    tensor_parallel_size: int
    gpu_memory_utilization: float | None
    kv_cache_dtype: KvCacheDtype
    dtype: str
    enforce_eager: bool
    chat_template: Path | None
    tool_call_parser: str | None
    reasoning_parser: str | None
    linear_backend: str | None
    extra: tuple[str, ...]


def serve_arguments(settings: ServerSettings) -> list[str]:
    """What follows `vllm serve`: the model, then options, the user's own last, so that they win."""
    arguments = [str(settings.model), "--served-model-name", settings.served_model_name]
    arguments += ["--host", settings.host, "--port", str(settings.port)]
    arguments += ["--max-model-len", str(settings.max_model_len)]
    if settings.tensor_parallel_size > 1:
        arguments += ["--tensor-parallel-size", str(settings.tensor_parallel_size)]
    if settings.gpu_memory_utilization is not None:
        arguments += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization:g}"]
    if settings.kv_cache_dtype != "auto":
        arguments += ["--kv-cache-dtype", settings.kv_cache_dtype]
    if settings.dtype != "auto":
        arguments += ["--dtype", settings.dtype]
    if settings.enforce_eager:
        arguments.append("--enforce-eager")
    if settings.chat_template is not None:
        arguments += ["--chat-template", str(settings.chat_template)]
    if settings.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
    if settings.reasoning_parser is not None:
        arguments += ["--reasoning-parser", settings.reasoning_parser]
    if settings.linear_backend is not None:
        arguments += ["--linear-backend", settings.linear_backend]
    return [*arguments, *settings.extra]


def shell_line(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """The command as one would type it, `variables` before it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in variables.items()), shlex.join(command)])


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may resolve to anything


def base_url(host: str, port: int) -> str:
    """Where this machine finds a server bound to `host`; an address that means all of them is reached by loopback."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
