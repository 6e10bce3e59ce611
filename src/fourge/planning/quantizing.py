"""What the quantization itself takes: disk, memory, bytes moved, arithmetic, and from measured rates the time.

Threads read ahead of the walk and write behind it. Without data all three go on at once, and the longest counts. With
data a layer is computed once the shard before is written, so reading and writing hide behind each other alone; but on a
GPU hidden states, which are nearly all of both, come and go while it computes, from and to one disk.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from fourge.methods.base import Method
from fourge.planning.facts import ModelFacts, largest_layer_bytes, part_of
from fourge.planning.model import SourceLayout
from fourge.planning.probe import Rates, measure_rates
from fourge.planning.work import Tokens, Work, count_work
from fourge.progress import announced
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices
from fourge.walk.hidden import HiddenLayout
from fourge.walk.passes import require_data
from fourge.walk.resources import available_memory, estimate_needs

PROBE_SECONDS = 10.0

_HOST_SLACK = 2 << 30
"""Host memory of a process that computes on a GPU: torch with its CUDA libraries, and I/O buffers."""


@dataclass(frozen=True)
class Resource:
    """Bytes needed, and free on this machine now."""

    needed: int
    available: int


@dataclass(frozen=True)
class Seconds:
    """A run's time by what it does, estimated from measured rates; some goes on at once, so `total` is not the sum."""

    reading: float
    computing: float
    smoothing: float
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
    method: str
    smooth: bool
    tokens: Tokens
    disk: Resource
    disk_output: int
    disk_hidden_states: int
    host_memory: Resource
    device_memory: Resource | None
    work: Work
    rates: Rates | None
    seconds: Seconds | None


def estimate_quantizing(
    facts: ModelFacts, source: SourceLayout, settings: QuantizeSettings, folder: Path, probe: bool
) -> QuantizingCost:
    """The cost on this machine, with the output in `folder`, whose disk is looked at and, with `probe`, measured.

    Raises InputError for a method that is not known or cannot do without data.
    """
    choices = source.choices
    require_data(settings, choices)
    device, dtype = torch.device(settings.device), getattr(torch, settings.compute_dtype)
    tokens = Tokens.of(settings, choices)
    hidden = HiddenLayout(tokens.rows, facts.hidden_size, dtype)
    needs = estimate_needs(source.layout, source.checkpoint, settings, choices, hidden, tokens.longest_batch)
    work = count_work(facts, settings, choices, tokens, hidden, needs.output)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    on_gpu = device.type == "cuda"
    rates = None
    if probe:
        with announced(f"Measuring this machine for about {PROBE_SECONDS:.0f} seconds"):
            rates = measure_rates(existing, _largest_shard(facts, source), settings, _hardest(choices), PROBE_SECONDS)
    return QuantizingCost(
        device=settings.device,
        compute_dtype=settings.compute_dtype,
        method=settings.method,
        smooth=settings.smooth,
        tokens=tokens,
        disk=Resource(needs.disk, shutil.disk_usage(existing).free),
        disk_output=needs.output,
        disk_hidden_states=2 * needs.hidden,
        host_memory=Resource(_host_beside_gpu(facts) if on_gpu else needs.memory, available_memory()),
        device_memory=Resource(needs.memory, torch.cuda.mem_get_info(device)[0]) if on_gpu else None,
        work=work,
        rates=rates,
        seconds=None if rates is None else _estimate_seconds(work, rates, has_data=tokens.rows > 0, on_gpu=on_gpu),
    )


def _hardest(choices: Choices) -> Method:
    """The method that a mixture is timed by, as if all of it was quantized so: the most thorough one."""
    return max(choices.methods.values(), key=lambda m: (m.compensates, m.needs_hessian, m.weighs_channels))


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


def _estimate_seconds(work: Work, rates: Rates, *, has_data: bool, on_gpu: bool) -> Seconds:
    reading, writing = work.bytes_read / rates.disk_read, work.bytes_written / rates.disk_write
    computing = work.flop_bf16_lane / rates.linear_bf16 + work.flop_nvfp4_lane / rates.linear_nvfp4
    if rates.curvature is not None:
        computing += work.flop_curvature / rates.curvature
    smoothing = 0.0 if rates.smooth is None else work.smoothed_bytes / rates.smooth
    quantizing = work.rounded_bytes / rates.quantize
    working = computing + smoothing + quantizing
    if not has_data:
        total = max(reading, working, writing)
    elif on_gpu:
        total = max(working, reading + writing)
    else:
        total = working + max(reading, writing)
    return Seconds(reading, computing, smoothing, quantizing, writing, total)
