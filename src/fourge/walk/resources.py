"""What a quantization needs and what the machine has: said, and refused, before anything is done."""

import ctypes
import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fourge.checkpoint.durable import nearest_existing
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.writer import num_bytes, safetensors_size
from fourge.errors import InputError
from fourge.nvfp4.quantize import GROUP_SIZE
from fourge.progress import format_bytes, resident_bytes
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices
from fourge.walk.compensation import compensation_bytes
from fourge.walk.hidden import HiddenLayout
from fourge.walk.machine import memory_in_use, memory_limit
from fourge.walk.smoothing import smoothing_bytes

_M_MMAP_THRESHOLD = -3  # of malloc.h
_MAPPED_BLOCK_BYTES = 16 << 20

_WORKING_BYTES = {"cpu": 200 << 20, "cuda": 1536 << 20}
"""Blocks of rows, I/O buffers and the allocator's slack, whatever the model's size."""

_METHOD_BYTES = {"cpu": 512 << 20, "cuda": 5 << 30}
"""What a method takes for the chunk of rows that it works on, and for the panels of a Cholesky factorization."""


@dataclass(frozen=True)
class Needs:
    """Bytes that a run takes at its largest on a `device`, `cpu` or `cuda`."""

    device: str
    output: int
    hidden: int
    layer: int
    micro_batch: int
    method: int

    @property
    def disk(self) -> int:
        """The output, and the hidden states of two layers at once."""
        return self.output + 2 * self.hidden

    @property
    def memory(self) -> int:
        """A layer at its largest, and the larger of what runs a micro-batch and what the method works with; slack."""
        return self.layer + max(self.micro_batch, self.method) + _WORKING_BYTES[self.device]


def estimate_needs(
    layout: Layout,
    source: Checkpoint,
    settings: QuantizeSettings,
    choices: Choices,
    hidden: HiddenLayout,
    longest_batch: int,
) -> Needs:
    """The needs of a run whose longest micro-batch has `longest_batch` tokens (0 for none)."""
    output = sum(
        safetensors_size(layout.output_specs(step, source.tensors, settings.kv_cache_scheme))
        for step in range(layout.num_steps)
    )
    if settings.calibration == "none":
        layer = _held_without_data(layout, source, choices)
    else:
        layer = max(_largest_moment(layout, source, i, choices) for i in range(layout.num_layers))
    micro_batch = micro_batch_bytes(layout, hidden, longest_batch)
    smoothing = smoothing_bytes(layout, hidden.dtype) if settings.smooth else 0
    device = torch.device(settings.device).type
    works_with = max(smoothing, _METHOD_BYTES[device] if choices.needs_hessian else 0)
    return Needs(device, output, hidden.nbytes, layer, micro_batch, works_with)


def micro_batch_bytes(layout: Layout, hidden: HiddenLayout, tokens: int) -> int:
    """What running a micro-batch of `tokens` tokens takes."""
    widest = max(layout.shapes[f"{name}.weight"][0] for name in layout.quantized)
    # Residual, normed input, its quantized copy and two outputs of the hidden width; gate, up and their product.
    return tokens * (6 * hidden.width + 4 * widest) * hidden.dtype.itemsize


def _largest_moment(layout: Layout, source: Checkpoint, layer: int, choices: Choices) -> int:
    """The most that a layer holds while its groups are quantized one after the other: of each the source's tensors or
    the output's, and for a method with a Hessian XᵀX of the group's input in FP32, which is factored where it lies.

    Where one compensates, the source's tensors stay, and the weights moved and what moves them come beside them. Before
    all that, the layer is read while the output of the one before is written.
    """
    prefix = layout.architecture.layer_prefix(layer)
    specs = layout.output_specs(layer + 1, source.tensors)
    held = sum(source.tensors[name].nbytes for name in layout.steps[layer + 1])
    largest = held + (_quantized_bytes(layout, source, layer - 1) if layer else 0)
    for group in layout.groups(layer):
        linears, method = [prefix + linear for linear in group.linears], choices.method(prefix, group)
        quantized = sum(num_bytes(*spec) for name, spec in specs.items() if name.rpartition(".")[0] in linears)
        rows, columns = layout.shapes[f"{linears[0]}.weight"]
        hessian = 4 * columns**2 if method.needs_hessian else 0
        sources = sum(source.tensors[f"{linear}.weight"].nbytes for linear in linears)
        moved = sources + compensation_bytes(columns, rows) if method.compensates else 0
        largest = max(largest, held + quantized + hessian + moved)
        held += quantized if choices.compensates else quantized - sources
    return largest


def _held_without_data(layout: Layout, source: Checkpoint, choices: Choices) -> int:
    """The most that is held where there is no data: a group of the source's tensors, and the outputs of two layers, the
    one that is quantized and the one before, which is written; for a search the scales of a Linear in FP32.
    """
    layers = range(layout.num_layers)
    places: dict[int, int] = {}
    for layer in layers:
        prefix = layout.architecture.layer_prefix(layer)
        for group in layout.groups(layer):
            for place, linear in enumerate(group.linears):
                places[place] = max(places.get(place, 0), source.tensors[f"{prefix}{linear}.weight"].nbytes)
    outputs = max(_quantized_bytes(layout, source, layer) for layer in layers)
    largest = max(math.prod(layout.shapes[f"{name}.weight"]) for name in layout.quantized)
    searched = 4 * largest // GROUP_SIZE if choices.weighs_channels else 0
    return sum(places.values()) + 2 * outputs + searched


def _quantized_bytes(layout: Layout, source: Checkpoint, layer: int) -> int:
    """The bytes of a layer's quantized Linears in the output."""
    specs = layout.output_specs(layer + 1, source.tensors)
    return sum(num_bytes(*spec) for name, spec in specs.items() if name.rpartition(".")[0] in layout.quantized)


def return_freed_layers() -> None:
    """Makes the allocator give a freed layer back to the system at once, so that memory does not grow with depth.

    glibc raises its threshold for mapped blocks up to 32 MB as such blocks are freed; later layers then come from
    the heap, where they leave holes that the next ones do not quite fit. A threshold that is set stays. Small
    blocks are left to the heap: mapping them would cost more than they save. Other allocators need none of this.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BLOCK_BYTES)


def available_memory() -> int:
    """Bytes that this process may still take: what the system has free, or what a control group leaves of it."""
    available = int(psutil.virtual_memory().available)
    limit = memory_limit()
    return available if limit is None else min(available, limit - memory_in_use())


def require_resources(
    needs: Needs, output: Path, device: torch.device, already_written: int, processes: int = 1
) -> None:
    """Raises InputError, naming what is needed and what there is, when disk or memory will not do.

    `processes` of one job run on this machine, each with a layer of its own, on CPUs all in one memory.
    """
    existing = nearest_existing(output)
    free = shutil.disk_usage(existing).free
    disk = max(0, needs.disk - already_written)
    if free < disk:
        raise InputError(
            f"{output}: {format_bytes(disk)} of disk are needed ({format_bytes(needs.output)} for the checkpoint, "
            f"{format_bytes(2 * needs.hidden)} for hidden states), {format_bytes(free)} are free; "
            "free some, or name another -o"
        )
    if not os.access(existing, os.W_OK):
        raise InputError(f"{output} cannot be written to; name another -o")
    if device.type == "cuda":
        needed, have, where = needs.memory, torch.cuda.mem_get_info(device)[0], f"on {device}"
    else:
        needed, have, where = processes * needs.memory, available_memory(), "of memory"
    if have < needed:
        what = "one layer and a micro-batch" + (f" in each of {processes} ranks" if processes > 1 else "")
        raise InputError(
            f"{format_bytes(needed)} {where} are needed for {what} "
            f"(beside the {format_bytes(resident_bytes())} in use), {format_bytes(have)} are there; "
            "free some, or lower --micro-batch-tokens and --max-seq-length"
        )
