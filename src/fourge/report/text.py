"""Results as text for people."""

from typing import TYPE_CHECKING, Any

from fourge.progress import format_bytes, format_seconds

if TYPE_CHECKING:
    from fourge.quantize import QuantizeResult

GIB = 1 << 30


def estimate_text(estimate: dict[str, Any], digits: int = 4) -> str:
    """`0.1234 ± 0.0021` from an `Estimate` as JSON."""
    error = estimate["standard_error"]
    text = f"{estimate['mean']:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def quantize_summary(result: "QuantizeResult") -> str:
    """The closing table of `fourge quantize`."""
    lines = [
        f"{result.output}",
        f"  size         {format_bytes(result.output_bytes)} ({result.output_bytes / GIB:.2f} GiB), "
        f"from {format_bytes(result.source_bytes)}",
        f"  quantized    {result.quantized_linears} Linears, {result.events} events",
    ]
    if result.fidelity is None:
        lines.append("  fidelity     not measured (no probe sequences)")
    else:
        f = result.fidelity
        lines += [
            f"  KL(BF16‖NVFP4)    {estimate_text(f['kl_div'])} nats a token, over {f['kl_div']['tokens']} held-out tokens",
            f"  top-1 agreement   {estimate_text(f['top1_agreement'])}",
            f"  perplexity BF16   {estimate_text(f['perplexity_bf16'], 3)}",
            f"  perplexity NVFP4  {estimate_text(f['perplexity_nvfp4'], 3)}",
        ]
    lines.append(
        f"  took         {format_seconds(result.seconds)}, peak memory {format_bytes(result.peak_resident_bytes)}"
        + (" (continued)" if result.continued else "")
    )
    return "\n".join(lines)
