"""The plan as a text for people. Bytes in GB and in GiB: cards mix the two, and 7 % decide whether a model fits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fourge.progress import format_binary, format_bytes, format_seconds

if TYPE_CHECKING:
    from fourge.plan import ModelSizes, PlanReport
    from fourge.planning.fit import Fit
    from fourge.planning.quantizing import QuantizingCost, Resource

_GIB = 1 << 30
_GIGA = 1e9


def plan_summary(report: "PlanReport") -> str:
    """The tables of `fourge plan`: the model, the GPUs that serve it, what quantizing takes."""
    lines = [*_model_lines(report), "", *_serving_lines(report)]
    if report.quantizing is not None:
        lines += ["", *_quantizing_lines(report.quantizing)]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    return "\n".join(lines)


def both_units(count: int) -> str:
    """`234.3 GB = 218.2 GiB`; MB and MiB below 1 GB."""
    decimal, binary, prefix = (1e9, 1 << 30, "G") if count >= 1e9 else (1e6, 1 << 20, "M")
    return f"{count / decimal:,.1f} {prefix}B = {count / binary:,.1f} {prefix}iB"


def _model_lines(report: "PlanReport") -> list[str]:
    sizes = report.sizes
    share = sizes.quantized_parameters / sizes.parameters
    lines = [
        f"{report.model}: {sizes.architecture}, {sizes.num_layers} layers, {sizes.num_attention_heads} heads, "
        f"{sizes.num_key_value_heads} key-value heads (from {report.origin})",
        f"  parameters       {_giga(sizes.parameters)}, {_giga(sizes.quantized_parameters)} ({share:.1%}) in Linears "
        "that are quantized",
    ]
    if sizes.source_bytes is not None and sizes.source_layer_bytes is not None:
        lines.append(f"  source           {both_units(sizes.source_bytes)}, {_layer(sizes.source_layer_bytes)}")
    lines += [
        f"  {report.scheme:<16} {both_units(sizes.output_bytes)}, {_layer(sizes.output_layer_bytes)}; "
        f"files {sizes.shard_bytes:,} bytes",
        *(f"    {line}" for line in _table(_part_rows(sizes))),
        f"  KV cache         {report.kv_cache.bytes_per_token_bf16:,} bytes a token in BF16, "
        f"{report.kv_cache.bytes_per_token_fp8:,} in FP8",
        f"  tensor parallel  {_ranks(report) or 'none'}",
    ]
    return lines + [f"                   not {size}: {why}" for size, why in report.tensor_parallel_obstacles.items()]


def _ranks(report: "PlanReport") -> str:
    """The sizes over which the model can be cut, and what each of so many ranks holds."""
    ranks = report.tensor_parallel_ranks
    unit, prefix = (_GIB, "G") if any(rank.weights >= _GIB for rank in ranks.values()) else (1 << 20, "M")
    texts = [f"{size}: {rank.weights / unit:,.1f}" for size, rank in ranks.items()]
    return ", ".join(texts) + (f" {prefix}iB of weights a rank" if texts else "")


def _part_rows(sizes: "ModelSizes") -> list[list[str]]:
    rows = [["part", "parameters", "source", "output"]]
    for part in sizes.parts:
        source = "" if part.source_bytes is None else both_units(part.source_bytes)
        rows.append([part.name, _giga(part.parameters), source, both_units(part.output_bytes)])
    return rows


def _serving_lines(report: "PlanReport") -> list[str]:
    asked = report.request
    dtype = "FP8" if asked.kv_cache_dtype == "fp8" else "16 bits"
    lines = [
        f"Serving {asked.concurrency} × {asked.max_model_len:,} tokens, KV cache in {dtype}, with "
        f"{asked.gpu_memory_utilization:.0%} of each GPU; the fewest that hold it:",
        *(f"  {line}" for line in _table([_FIT_HEADER, *map(_fit_row, report.gpus)])),
        *(f"  {fit.gpu}: {fit.reason}" for fit in report.gpus if not fit.holds),
    ]
    if report.asked is not None:
        lines += ["", *_asked_lines(report.asked, asked.max_model_len)]
    lines.append("  ≤ are upper bounds, a roofline of bandwidth and arithmetic, not predictions; tokens/s over all")
    lines.append("  sequences: one alone with an empty cache, all of them at full length, a prompt of full length.")
    for kernel in report.kernels:
        lines += [f"  {kernel.name}: {kernel.accuracy};", f"    {kernel.speed}"]
    return lines


_FIT_HEADER = [
    *("GPU", "number", "kernel", "weights each", "KV tokens", "sequences", "in FP8"),
    *("one ≤", "decode ≤", "prefill ≤"),
]


def _fit_row(fit: "Fit") -> list[str]:
    if not fit.holds:
        return [fit.gpu, "–", fit.kernel or "none"]
    row = [fit.gpu, str(fit.count), fit.kernel or "none", format_binary(fit.weights)]
    row += [f"{fit.kv_cache_tokens:,}", f"{fit.full_length_sequences:,}", f"{fit.kv_cache_tokens_fp8:,}"]
    if fit.roofline is None:
        return [*row, "–", "–", "–"]
    speeds = (fit.roofline.decode_alone, fit.roofline.decode, fit.roofline.prefill)
    return [*row, *(f"{speed:,.0f}" for speed in speeds)]


def _asked_lines(fit: "Fit", max_model_len: int) -> list[str]:
    verdict = "holds it" if fit.holds else f"does not: {fit.reason}"
    lines = [f"  {fit.count} × {fit.gpu} ({both_units(fit.memory)} each): {verdict}"]
    if not fit.weights:
        return lines
    lines += [
        f"    kernel               {fit.kernel}",
        f"    the engine may take  {both_units(fit.budget)} of each",
        f"    weights              {both_units(fit.weights)}, {format_bytes(fit.replicated)} of it on other ranks too",
        f"    to work in, about    {both_units(fit.overhead)}",
        f"    KV cache             {both_units(fit.kv_cache)}: {fit.kv_cache_tokens:,} tokens, "
        f"{fit.full_length_sequences:,} at full length; in FP8 {fit.kv_cache_tokens_fp8:,}, "
        f"{fit.kv_cache_tokens_fp8 // max_model_len:,}",
    ]
    if fit.roofline is not None:
        speed = fit.roofline
        lines.append(
            f"    tokens/s, at most    {speed.decode_alone:,.0f} alone, {speed.decode:,.0f} decoding (bound by "
            f"{speed.decode_bound_by}), {speed.prefill:,.0f} prefilling"
        )
    elif fit.holds:
        lines.append("    tokens/s             not bounded: this GPU's bandwidth and rates are not known")
    return lines


def _quantizing_lines(cost: "QuantizingCost") -> list[str]:
    work, tokens = cost.work, cost.tokens
    how = f"{cost.method}{' with smoothing' if cost.smooth else ''}"
    lines = [
        f"Quantizing it by {how}, on {cost.device} in {cost.compute_dtype}:",
        f"  tokens         up to {tokens.calibration:,} for calibration, {tokens.validation:,} for validation, "
        f"{tokens.probe:,} for the probe",
        f"  disk           {_resource(cost.disk)}: {format_bytes(cost.disk_output)} output, "
        f"{format_bytes(cost.disk_hidden_states)} hidden states",
        f"  host memory    {_resource(cost.host_memory)}; Python's packages come on top (600 MB, more with CUDA)",
    ]
    if cost.device_memory is not None:
        lines.append(f"  device memory  {_resource(cost.device_memory)}")
    parts = [f"{_flop(work.flop_nvfp4_lane)} with quantized weights"]
    if work.flop_curvature:
        parts.append(f"{_flop(work.flop_curvature)} for Hessians")
    total = work.flop_bf16_lane + work.flop_nvfp4_lane + work.flop_curvature
    lines += [
        f"  moved          {format_bytes(work.bytes_read)} read, {format_bytes(work.bytes_written)} written",
        f"  arithmetic     {_flop(total)}, of which {', '.join(parts)}",
    ]
    return lines + _time_lines(cost)


def _time_lines(cost: "QuantizingCost") -> list[str]:
    if cost.rates is None or cost.seconds is None:
        return ["  time           not estimated: nothing was measured (--no-probe)"]
    rates, seconds = cost.rates, cost.seconds
    measured = [
        f"read {_mega(rates.disk_read)} MB/s",
        f"write {_mega(rates.disk_write)} MB/s",
        f"quantize {_mega(rates.quantize)} MB/s",
        f"{rates.linear_bf16 / _GIGA:,.0f} GFLOP/s",
        f"with quantized weights {rates.linear_nvfp4 / _GIGA:,.0f}",
    ]
    if rates.curvature is not None:
        measured.append(f"for Hessians {rates.curvature / _GIGA:,.0f}")
    spent = {
        "reading": seconds.reading,
        "computing": seconds.computing,
        "smoothing": seconds.smoothing,
        "quantizing": seconds.quantizing,
        "writing": seconds.writing,
    }
    parts = ", ".join(f"{_days(time)} {what}" for what, time in spent.items() if time)
    return [
        f"  measured       {', '.join(measured)} (in {format_seconds(rates.seconds)})",
        f"  time, about    {_days(seconds.total)}: {parts}; some of it at once",
    ]


def _resource(resource: "Resource") -> str:
    verdict = "free" if resource.needed <= resource.available else "free: NOT ENOUGH"
    return f"{both_units(resource.needed)}, {format_bytes(resource.available)} {verdict}"


def _giga(count: int) -> str:
    return f"{count / _GIGA:,.2f} G" if count >= 1e7 else f"{count:,}"


def _flop(count: int) -> str:
    return f"{count / 1e15:,.1f} PFLOP" if count >= 1e14 else f"{count / 1e12:,.2f} TFLOP"


def _mega(rate: float) -> str:
    return f"{rate / 1e6:,.0f}"


def _layer(count: int) -> str:
    return f"{count / _GIGA:,.3f} GB a layer" if count >= 1e8 else f"{count / 1e6:,.3f} MB a layer"


def _days(seconds: float) -> str:
    return format_seconds(seconds) if seconds < 3 * 86400 else f"{seconds / 86400:,.0f} days"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned: the first to the left, numbers to the right."""
    count = max(map(len, rows))
    full = [[*row, *[""] * (count - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in full) for column in range(count)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in full
    ]
