"""Results as text for people."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from fourge.progress import format_binary, format_bytes, format_seconds

if TYPE_CHECKING:
    from fourge.convert import ConvertResult
    from fourge.quantize import QuantizeResult
    from fourge.verify import VerifyReport


def estimate_text(estimate: dict[str, Any], digits: int = 4) -> str:
    """`0.1234 ± 0.0021` from an `Estimate` as JSON."""
    error = estimate["standard_error"]
    text = f"{estimate['mean']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def fidelity_lines(fidelity: dict[str, Any]) -> list[str]:
    """What held-out tokens say, from a `Fidelity` as JSON: one line a measure, with its standard error."""
    kl_div = fidelity["kl_div"]
    return [
        f"  KL(BF16‖NVFP4)    {estimate_text(kl_div)} nats a token, over {kl_div['tokens']} held-out tokens",
        f"  top-1 agreement   {estimate_text(fidelity['top1_agreement'])}",
        f"  perplexity BF16   {estimate_text(fidelity['perplexity_bf16'], 3)}",
        f"  perplexity NVFP4  {estimate_text(fidelity['perplexity_nvfp4'], 3)}",
    ]


def quantize_summary(result: "QuantizeResult") -> str:
    """The closing table of `fourge quantize`."""
    lines = [
        f"{result.output}",
        f"  size         {format_bytes(result.output_bytes)} ({format_binary(result.output_bytes)}), "
        f"from {format_bytes(result.source_bytes)}",
        f"  quantized    {_linears(result)}, {result.events} events",
    ]
    if result.fidelity is None:
        lines.append("  fidelity     not measured (no probe sequences)")
    else:
        lines += fidelity_lines(result.fidelity)
    lines.append(f"  computed     on {result.device}, NVFP4 by {result.backend}'s loops")
    lines.append(
        f"  took         {format_seconds(result.seconds)}, peak memory {format_bytes(result.peak_resident_bytes)}"
        + (" (continued)" if result.continued else "")
    )
    return "\n".join(lines)


def _linears(result: "QuantizeResult") -> str:
    counts = result.linears_by_scheme
    mixture = ", ".join(f"{count} in {scheme}" for scheme, count in counts.items()) if len(counts) > 1 else ""
    return f"{result.quantized_linears} Linears" + (f" ({mixture})" if mixture else "")


def verify_summary(report: "VerifyReport") -> str:
    """The table of `fourge verify`: a line a check, under it what is wrong, then what the walk measured."""
    lines = [f"{report.output}"]
    for check in report.checks:
        status = check.status.upper() if check.status == "failed" else check.status
        lines.append(f"  {status:<8} {check.name.replace('_', ' '):<16} {check.detail}")
        lines += [f"           {'':<16} - {failure}" for failure in check.failures]
    if report.fidelity is not None:
        lines += fidelity_lines(report.fidelity)
    if report.hidden_errors:
        worst = max(report.hidden_errors, key=lambda error: float(error["mean"]))
        lines.append(f"  hidden states     relative error at most {estimate_text(worst)}, after layer {worst['layer']}")
    tally = Counter(check.status for check in report.checks)
    lines.append(
        "  " + ", ".join(f"{tally[status]} {status}" for status in ("passed", "failed", "skipped") if tally[status])
    )
    return "\n".join(lines)


def convert_summary(result: "ConvertResult") -> str:
    """The closing table of `fourge convert`: what was written, and what the way back rests on."""
    kv_cache = "" if result.kv_cache_scheme is None else f", KV cache {result.kv_cache_scheme}"
    lines = [
        f"{result.output}",
        f"  layout       {result.layout}, from {result.source_layout}",
        f"  quantized    {result.quantized_linears} Linears, {result.scheme}{kv_cache}",
        f"  size         {format_bytes(result.output_bytes)} ({format_binary(result.output_bytes)})",
    ]
    if result.restored:
        lines.append("  restored     scales and JSON files of what it was converted from")
    elif result.kept_scales or result.kept_documents:
        scales = f"{result.kept_scales} of {result.global_scales} global scales, whose reciprocals do not lead back"
        kept = [scales] if result.kept_scales else []
        lines.append(f"  way back     in fourge_convert.json: {', '.join([*kept, *result.kept_documents])}")
    if result.reordered_shards:
        lines.append(f"  not exact    {result.reordered_shards} shards come back with another order in the header")
    lines.append(f"  took         {format_seconds(result.seconds)}" + (" (continued)" if result.continued else ""))
    return "\n".join(lines)
