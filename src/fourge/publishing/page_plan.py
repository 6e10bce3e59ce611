"""Where the checkpoint can be served, as `fourge plan` computes it."""

from typing import TYPE_CHECKING

from fourge.publishing.evidence import Evidence
from fourge.publishing.page_markup import Node, table, tag
from fourge.publishing.page_section import Section, missing, note

if TYPE_CHECKING:
    from fourge.planning.fit import Fit

GIB = 1 << 30
_CACHE = {"auto": "16 bits", "bfloat16": "BF16", "fp8": "FP8"}


def plan_section(evidence: Evidence) -> Section:
    """Every known kind of GPU in the smallest number that holds the model and its longest sequence."""
    report = evidence.plan
    if report is None:
        return missing("plan", "Plan", f"No plan: {evidence.plan_failure}")
    native = {kernel.name for kernel in report.kernels if kernel.activations_quantized and "FP4" in kernel.name}
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
    return Section("plan", "Plan", _finding(report.gpus, native), body, ("the headers, by ", tag("code", command)))


def _finding(fits: "tuple[Fit, ...]", native: set[str]) -> str:
    fitting = [fit for fit in fits if fit.holds]
    if not fitting:
        return "No number of the known GPUs holds the model at full length"
    best = min(fitting, key=lambda fit: (fit.kernel not in native, fit.count))
    in_fp4 = "in FP4" if best.kernel in native else f"through {best.kernel}, not in FP4"
    return f"{best.count} × {best.gpu} {'serves' if best.count == 1 else 'serve'} it {in_fp4}, at full length"


def _row(fit: "Fit") -> tuple[Node, ...]:
    if not fit.holds:
        return (fit.gpu, None, fit.reason, None, None, None, None, None)
    speed = fit.roofline
    return (
        fit.gpu,
        fit.count,
        fit.kernel,
        f"{fit.weights / GIB:,.1f} GiB",
        f"{fit.kv_cache_tokens:,}",
        f"{fit.full_length_sequences:,}",
        None if speed is None else f"{speed.decode:,.0f}",
        None if speed is None else f"{speed.prefill:,.0f}",
    )
