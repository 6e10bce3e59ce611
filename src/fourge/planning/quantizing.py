"""What the quantization itself takes: disk, memory, bytes moved, arithmetic, and from measured rates the time.

The walk does one thing after the other (read, compute, quantize, write), so the times add up.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.planning.facts import ModelFacts, largest_layer_bytes, part_of, total_bytes
from fourge.planning.model import SourceLayout
from fourge.planning.probe import Rates, measure_rates
from fourge.walk.hidden import HiddenLayout
from fourge.walk.resources import available_memory, estimate_needs

PROBE_SECONDS = 10.0

_HOST_SLACK = 2 << 30
"""Host memory of a process that computes on a GPU: torch with its CUDA libraries, and I/O buffers."""


@dataclass(frozen=True)
class QuantizingRequest:
    """The settings of `fourge quantize` that its cost follows from, resolved."""

    num_calibration_samples: int
    num_probe_samples: int
    max_seq_length: int
    micro_batch_tokens: int
    compute_dtype: str
    device: str


@dataclass(frozen=True)
class Resource:
    """Bytes needed, and free on this machine now."""

    needed: int
    available: int


@dataclass(frozen=True)
class Seconds:
    """A run's time by what it does, estimated from measured rates."""

    reading: float
    computing: float
    quantizing: float
    writing: float
    total: float


@dataclass(frozen=True)
class QuantizingCost:
    """One run from start to end; token counts are the most there can be, and so is all that follows from them.

    `disk` is `disk_output` and `disk_hidden_states`. `device_memory` is None where the host computes; `rates` and
    `seconds` are None where nothing was measured.
    """

    device: str
    compute_dtype: str
    calibration_tokens: int
    probe_tokens: int
    disk: Resource
    disk_output: int
    disk_hidden_states: int
    host_memory: Resource
    device_memory: Resource | None
    bytes_read: int
    bytes_written: int
    flop_bf16_lane: int
    flop_nvfp4_lane: int
    rates: Rates | None
    seconds: Seconds | None


def estimate_quantizing(
    facts: ModelFacts, source: SourceLayout, request: QuantizingRequest, folder: Path, probe: bool
) -> QuantizingCost:
    """The cost on this machine, with the output in `folder`, whose disk is looked at and, with `probe`, measured."""
    device, dtype = torch.device(request.device), getattr(torch, request.compute_dtype)
    tokens = _Tokens.of(facts, request)
    hidden = HiddenLayout(tokens.rows, facts.hidden_size, dtype)
    needs = estimate_needs(source.layout, source.checkpoint, facts.scheme, hidden, tokens.longest_batch)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    on_gpu = device.type == "cuda"
    # Written once a step but the last, read once a layer and by the head.
    hidden_traffic = (facts.num_layers + 1) * hidden.nbytes
    read = _source_bytes_read(facts, tokens) + hidden_traffic
    written = needs.output + hidden_traffic
    bf16, nvfp4 = _flop(facts, tokens)
    rates = None
    if probe:
        rates = measure_rates(existing, _largest_shard(facts, source), dtype, device, PROBE_SECONDS)
    return QuantizingCost(
        device=request.device,
        compute_dtype=request.compute_dtype,
        calibration_tokens=tokens.calibration,
        probe_tokens=tokens.probe,
        disk=Resource(needs.disk, shutil.disk_usage(existing).free),
        disk_output=needs.output,
        disk_hidden_states=2 * needs.hidden,
        host_memory=Resource(_host_beside_gpu(facts) if on_gpu else needs.memory, available_memory()),
        device_memory=Resource(needs.memory, torch.cuda.mem_get_info(device)[0]) if on_gpu else None,
        bytes_read=read,
        bytes_written=written,
        flop_bf16_lane=bf16,
        flop_nvfp4_lane=nvfp4,
        rates=rates,
        seconds=None if rates is None else _estimate_seconds(facts, rates, read, written, bf16, nvfp4),
    )


@dataclass(frozen=True)
class _Tokens:
    """How many tokens run through which lane. Weight-only schemes are quantized without data, so through none."""

    calibration: int
    probe: int
    length: int
    longest_batch: int

    @classmethod
    def of(cls, facts: ModelFacts, request: QuantizingRequest) -> "_Tokens":
        if facts.scheme == "NVFP4A16":
            return cls(0, 0, 0, 0)
        length = request.max_seq_length
        return cls(
            calibration=request.num_calibration_samples * length,
            probe=request.num_probe_samples * length,
            length=length,
            longest_batch=max(1, request.micro_batch_tokens // length) * length,
        )

    @property
    def rows(self) -> int:
        """Of a hidden-state file: the probe is in both lanes."""
        return self.calibration + 2 * self.probe


def _source_bytes_read(facts: ModelFacts, tokens: _Tokens) -> int:
    """Every tensor once; what is copied again when written; embedding and head for the tokens that need them."""
    assert facts.source is not None
    kept = total_bytes(facts.source, lambda name: name.removesuffix(".weight") not in facts.quantized)
    row = facts.source[f"{facts.architecture.embedding}.weight"].nbytes // facts.vocab_size
    looked_up = min(tokens.rows, facts.vocab_size) * row
    head = facts.vocab_size * row if tokens.probe else 0
    return total_bytes(facts.source) + kept + looked_up + head


def _flop(facts: ModelFacts, tokens: _Tokens) -> tuple[int, int]:
    """Floating-point operations in the bf16 and in the nvfp4 lane: Linears, attention, and the head on the probe."""
    attention = 4 * facts.num_layers * facts.num_attention_heads * facts.head_dim * tokens.length // 2
    token = 2 * facts.linear_parameters + attention
    head = 2 * facts.head_parameters * tokens.probe
    return (tokens.calibration + tokens.probe) * token + head, tokens.probe * token + head


def _host_beside_gpu(facts: ModelFacts) -> int:
    """A tensor on its way to the device, a layer of the output on its way to the file."""
    assert facts.source is not None
    largest = max(
        stored.nbytes
        for name, stored in facts.source.items()
        if part_of(name, facts.architecture) in ("attention", "MLP")
    )
    return largest + largest_layer_bytes(facts, facts.output) + _HOST_SLACK


def _largest_shard(facts: ModelFacts, source: SourceLayout) -> Path | None:
    if facts.origin != "headers":
        return None
    return max({info.path for info in source.checkpoint.tensors.values()}, key=lambda path: path.stat().st_size)


def _estimate_seconds(facts: ModelFacts, rates: Rates, read: int, written: int, bf16: int, nvfp4: int) -> Seconds:
    assert facts.source is not None
    source = total_bytes(facts.source, lambda name: name.removesuffix(".weight") in facts.quantized)
    reading, writing = read / rates.disk_read, written / rates.disk_write
    computing = bf16 / rates.linear_bf16 + nvfp4 / rates.linear_nvfp4
    quantizing = source / rates.quantize
    return Seconds(reading, computing, quantizing, writing, reading + computing + quantizing + writing)
