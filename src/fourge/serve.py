"""`fourge serve`: the checkpoint on vLLM, if it fits; started, tried, watched, stopped cleanly."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fourge.errors import InputError
from fourge.plan import GPU_MEMORY_UTILIZATION
from fourge.planning.kv_cache import KvCacheDtype
from fourge.settings import ComputeDtype

if TYPE_CHECKING:
    from fourge.planning.facts import ModelFacts
    from fourge.planning.fit import Request
    from fourge.serving.command import ServerSettings
    from fourge.serving.placement import Placement
    from fourge.serving.smoke import Comparison, Trial


@dataclass(frozen=True)
class ServeResult:
    """What was served, or with `--print` would be; `exit_code` is the server's own.

    `command` is the line for a shell. `generated` is the greedy continuation of the first prompt, None where the
    server never came up. `comparison` is that of `--smoke`; `agrees` is None without.
    """

    output: Path
    url: str
    command: str
    hardware: str
    kernel: str
    numerics: str
    printed_only: bool
    start_seconds: float | None = None
    generated: str | None = None
    comparison: "Comparison | None" = None
    agrees: bool | None = None
    exit_code: int = 0


def serve(
    output: Annotated[Path, typer.Argument(help="The quantized checkpoint's directory, in either layout.")],
    *,
    gpu: Annotated[
        str | None, typer.Option(help="GPU and number, as for plan: h200:2 [default: this machine's].")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Memory of a GPU not known: 96GiB.")] = None,
    sm: Annotated[str | None, typer.Option(help="Its compute capability: 12.0.")] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option(min=1, help="How many GPUs [default: what --gpu says, or the fewest that do].")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens a sequence [default: the model's].")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Sequences of that length that must fit at once.")] = 1,
    gpu_memory_utilization: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="The share of each GPU that the engine may take; vLLM's default.")
    ] = GPU_MEMORY_UTILIZATION,
    kv_cache_dtype: Annotated[
        KvCacheDtype, typer.Option(help="auto is FP8 where the checkpoint says so, else two bytes.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to bind to; the default is reached from this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to bind to.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Its name in the API [default: the directory's].")
    ] = None,
    tool_call_parser: Annotated[
        str, typer.Option(help="vLLM's name; auto looks at the chat template, none leaves it out.")
    ] = "auto",
    reasoning_parser: Annotated[str, typer.Option(help="Likewise.")] = "auto",
    linear_backend: Annotated[
        Literal["emulation"] | None, typer.Option(help="emulation: W4A4's numbers on GPUs without FP4; slow.")
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option(help="One more argument of vLLM's: --extra=--max-num-seqs=8")
    ] = None,
    vllm_python: Annotated[Path | None, typer.Option(help="The interpreter of the environment with vLLM.")] = None,
    print_command: Annotated[bool, typer.Option("--print", help="Print the command, and start nothing.")] = False,
    smoke: Annotated[
        bool, typer.Option(help="Start, hold its log-probabilities of the probe against ours, and stop.")
    ] = False,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds that the start may take.")] = 3600.0,
    device: Annotated[str, typer.Option(help="For --smoke's own lane: cpu, cuda or cuda:N.")] = "auto",
    compute_dtype: Annotated[ComputeDtype, typer.Option(help="For --smoke's own lane.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="For --smoke's own lane; 0 leaves it to torch.")] = 0,
) -> ServeResult:
    """Serve a quantized checkpoint with vLLM, on GPUs that hold it or, where there are none, on the CPU.

    Runs until Ctrl-C, which stops the server too. An API key comes from VLLM_API_KEY. Raises InputError for what
    does not fit, for vLLM or a port that is not there, and for a server that dies while it starts.
    """
    from fourge.planning.fit import Request
    from fourge.planning.kv_cache import resolve_kv_cache_dtype
    from fourge.serving.api import Client
    from fourge.serving.command import API_KEY, base_url, is_loopback, serve_arguments, shell_line
    from fourge.serving.environment import find_environment, generic_environment
    from fourge.serving.placement import read_facts, resolve_length
    from fourge.serving.server import require_free_port
    from fourge.serving.session import Session

    output = Path(output)  # a script may well give a string
    facts = read_facts(output)
    request = Request(
        resolve_length(facts, max_model_len),
        concurrency,
        gpu_memory_utilization,
        resolve_kv_cache_dtype(facts, kv_cache_dtype),
    )
    placement = _place(facts, request, gpu, gpu_memory, sm, tensor_parallel_size, linear_backend)
    settings = _settings(
        output,
        placement,
        request,
        host=host,
        port=port,
        name=served_model_name or output.resolve().name,
        parsers=(tool_call_parser, reasoning_parser),
        linear_backend=linear_backend,
        extra=tuple(extra or ()),
    )
    if print_command and vllm_python is None:
        environment = generic_environment(placement.on_cpu)
    else:
        environment = find_environment(vllm_python, placement.on_cpu)
    command = [*environment.launch, *serve_arguments(settings)]
    variables = _variables(placement)
    result = ServeResult(
        output=output,
        url=base_url(host, port),
        command=shell_line(command, variables),
        hardware=placement.hardware,
        kernel=placement.kernel,
        numerics=placement.numerics,
        printed_only=print_command,
    )
    _warn_if_open(host, port)
    if print_command:
        return result
    require_free_port(host, port)
    trial = None
    if smoke:
        trial = _score(output, placement, request, device, compute_dtype, threads)
    print(f"serve: {result.command}", file=sys.stderr)
    session = Session(
        command=command,
        variables=variables,
        client=Client(result.url, os.environ.get(API_KEY)),
        model_name=settings.served_model_name,
        reach="this machine alone" if is_loopback(host) else "the network",
        start_timeout=start_timeout,
        trial=trial,
    )
    outcome = session.run()
    return replace(
        result,
        start_seconds=outcome.start_seconds,
        generated=outcome.generated,
        comparison=outcome.comparison,
        agrees=None if outcome.comparison is None else outcome.comparison.agrees,
        exit_code=outcome.exit_code,
    )


def _place(
    facts: "ModelFacts",
    request: "Request",
    gpu: str | None,
    gpu_memory: str | None,
    sm: str | None,
    tensor_parallel_size: int | None,
    linear_backend: str | None,
) -> "Placement":
    """On the GPUs that are named, else on this machine's, else on its CPU."""
    from fourge.planning.hardware import parse_gpu
    from fourge.serving.placement import find_gpus, place_on_cpu, place_on_gpus
    from fourge.serving.vllm_cpu import chosen_mode, quantizes_activations

    named = parse_gpu(gpu, gpu_memory, sm)
    if named is not None:
        kind, count = named
        if count is not None and tensor_parallel_size not in (None, count):
            raise InputError(f"--gpu {gpu} and --tensor-parallel-size {tensor_parallel_size} disagree; leave one out")
        return place_on_gpus(facts, kind, count or tensor_parallel_size, None, request, linear_backend)
    found = find_gpus(os.environ)
    if found is not None:
        kind, most = found
        if tensor_parallel_size is not None and tensor_parallel_size > most:
            raise InputError(
                f"--tensor-parallel-size {tensor_parallel_size}: this machine has {most} × {kind.name}; lower it"
            )
        return place_on_gpus(facts, kind, tensor_parallel_size, most, request, linear_backend)
    for option, value in (("--tensor-parallel-size", tensor_parallel_size), ("--linear-backend", linear_backend)):
        if value is not None:
            raise InputError(
                f"{option} {value} is for GPUs and none is found here; name some with --gpu, or leave it out"
            )
    return place_on_cpu(facts, request, quantizes_activations(chosen_mode(os.environ), facts.scheme == "NVFP4"))


def _settings(
    output: Path,
    placement: "Placement",
    request: "Request",
    *,
    host: str,
    port: int,
    name: str,
    parsers: tuple[str, str],
    linear_backend: str | None,
    extra: tuple[str, ...],
) -> "ServerSettings":
    from fourge.serving.command import API_KEY, ServerSettings
    from fourge.serving.templates import (
        choose_reasoning_parser,
        choose_tool_call_parser,
        read_chat_template,
        read_think_tokens,
    )

    if any(argument.startswith("--api-key") for argument in extra):
        raise InputError(f"--extra --api-key would show the key to everyone who lists processes; set {API_KEY} instead")
    template = read_chat_template(output)
    if template is None:
        print("serve: no chat template in the checkpoint: it completes texts, and does not chat", file=sys.stderr)
    text = "" if template is None else template.text
    chosen = (choose_tool_call_parser(text), choose_reasoning_parser(text, read_think_tokens(output)))
    tool_calls, reasoning = (
        found if asked == "auto" else None if asked == "none" else asked
        for asked, found in zip(parsers, chosen, strict=True)
    )
    return ServerSettings(
        model=output,
        served_model_name=name,
        host=host,
        port=port,
        max_model_len=request.max_model_len,
        tensor_parallel_size=placement.tensor_parallel_size,
        gpu_memory_utilization=None if placement.on_cpu else request.gpu_memory_utilization,
        kv_cache_dtype=request.kv_cache_dtype,
        dtype=placement.dtype,
        enforce_eager=placement.on_cpu,  # compiling takes minutes there, and a C++ compiler
        chat_template=None if template is None else template.path,
        tool_call_parser=tool_calls,
        reasoning_parser=reasoning,
        linear_backend=linear_backend,
        extra=extra,
    )


def _variables(placement: "Placement") -> dict[str, str]:
    """What the server needs in its environment beside what is there: on a CPU, the size of its KV cache."""
    if placement.kv_cache_gib is None or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(placement.kv_cache_gib)}


def _warn_if_open(host: str, port: int) -> None:
    from fourge.serving.command import API_KEY, is_loopback

    if not is_loopback(host) and not os.environ.get(API_KEY):
        print(
            f"serve: WARNING: {host} is open to the network and {API_KEY} is not set: whoever reaches port {port} "
            "can use the model",
            file=sys.stderr,
        )


def _score(
    output: Path, placement: "Placement", request: "Request", device: str, compute_dtype: ComputeDtype, threads: int
) -> "Trial":
    """What the server will be held against, computed before it starts, so that the two do not share memory."""
    import torch

    from fourge.serving.reference import Lane, read_probe
    from fourge.serving.smoke import SEQUENCES, TOKENS, Trial
    from fourge.walk.device import resolve_device

    arithmetic = resolve_device(device, compute_dtype, threads)
    torch.set_num_threads(arithmetic["threads"])
    # One more token is generated than is scored.
    sequences = read_probe(output, SEQUENCES, min(TOKENS, request.max_model_len - 1))
    lane = Lane.open(
        output,
        placement.numerics,
        request.kv_cache_dtype == "fp8",
        torch.device(arithmetic["device"]),
        getattr(torch, arithmetic["compute_dtype"]),
    )
    return Trial(placement.numerics, tuple(sequences), tuple(lane.log_probs(sequences)))
