"""Where the checkpoint can be served, as `fourge plan` computes it."""

from typing import TYPE_CHECKING

from fourge.planning.fit import smallest_of
from fourge.progress import format_binary
from fourge.publishing.evidence import Evidence
from fourge.publishing.page_markup import Node, table, tag
from fourge.publishing.page_section import Section, missing, note

if TYPE_CHECKING:
    from fourge.planning.fit import Fit

_CACHE = {"auto": "16 bits", "bfloat16": "BF16", "fp8": "FP8"}


def plan_section(evidence: Evidence) -> Section:
    """Every known kind of GPU in the smallest number that holds the model and its longest sequence."""
    report = evidence.plan
    if report is None:
        return missing("plan", "Plan", f"No plan: {evidence.plan_failure}")
    request = report.request
    rows = [_row(fit) for fit in report.gpus]
    header = ("GPU", "number", "kernel", "weights each", "KV tokens", "sequences", "decode ≤", "prefill ≤")
    kernels = [tag("li", tag("b", kernel.name), f": {kernel.accuracy}; {kernel.speed}") for kernel in report.kernels]
    cache = _CACHE[request.kv_cache_dtype]
    asked = f"For {request.concurrency} × {request.max_model_len:,} tokens, KV cache in {cache}, with "
    body: tuple[Node, ...] = (
        table(header, rows, class_="numbers"),
        note(
            f"{asked}{request.gpu_memory_utilization:.0%} of each GPU. ≤ are upper bounds in tokens/s, a roofline of "
            "bandwidth and arithmetic, not predictions."
        ),
        tag("ul", kernels, class_="note"),
    )
    command = f"fourge plan {evidence.output.name}"
    return Section("plan", "Plan", _finding(report.gpus), body, ("the headers, by ", tag("code", command)))


def _finding(fits: "tuple[Fit, ...]") -> str:
    choices = {"in FP4": smallest_of(fits, native=True), "weight-only": smallest_of(fits, native=False)}
    ways = [f"{fit.count} × {fit.gpu} {how}" for how, fit in choices.items() if fit is not None]
    if not ways:
        return "No number of the known GPUs holds the model at full length in a kernel for NVFP4"
    return f"At full length it takes {' or '.join(ways)}"


def _row(fit: "Fit") -> tuple[Node, ...]:
    if not fit.holds:
        return (fit.gpu, None, fit.reason, None, None, None, None, None)
    speed = fit.roofline
    return (
        fit.gpu,
        fit.count,
        fit.kernel,
        format_binary(fit.weights),
        f"{fit.kv_cache_tokens:,}",
        f"{fit.full_length_sequences:,}",
        None if speed is None else f"{speed.decode:,.0f}",
        None if speed is None else f"{speed.prefill:,.0f}",
    )
