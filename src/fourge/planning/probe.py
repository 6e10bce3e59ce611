"""How fast this machine is at what a quantization does: about ten seconds of its real code on made-up weights.

Rates are totals over repetitions, so a slow first one counts; a machine that is busy is measured as busy.
"""

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.reader import require_finite
from fourge.checkpoint.writer import write_safetensors
from fourge.errors import InputError
from fourge.methods.base import Method
from fourge.methods.hessian import HessianAccumulator
from fourge.methods.observe import InputStatistics
from fourge.methods.smooth import Rounding, Sample, Tie, choose, output_error
from fourge.nvfp4.quantize import QuantizedWeight, amax, global_scale, quantize_weight
from fourge.settings import QuantizeSettings
from fourge.walk.linear import InputSite, LaneLinear, to_nvfp4
from fourge.walk.smoothing import SAMPLED
from fourge.walk.weight_error import squared_sums

_FILE_BYTES = 256 << 20
_READ_BYTES = 1 << 30
_CHUNK_BYTES = 16 << 20
_COLUMNS = {"cpu": 2048, "cuda": 8192}
"""K of the weight, which has four times as many rows: large enough for full speed, small enough to repeat."""
_TOKENS = 2048
"""As many as quantize runs through a layer at once, unless told otherwise."""
_ROWS = 128
"""Of the weight, for smoothing, whose cost grows with rows and columns alike."""


@dataclass(frozen=True)
class Rates:
    """Bytes/s from and to disk, source bytes/s quantized by the method, FLOP/s of the Linears of each lane.

    `smooth`: bytes/s of the rows that smoothing tries its exponents on; `curvature`: FLOP/s of a Hessian's products.
    Both are None where the settings have none.
    """

    disk_read: float
    disk_write: float
    quantize: float
    smooth: float | None
    curvature: float | None
    linear_bf16: float
    linear_nvfp4: float
    seconds: float


def measure_rates(
    folder: Path, shard: Path | None, settings: QuantizeSettings, method: Method, seconds: float
) -> Rates:
    """Measures for about `seconds`, in equal parts.

    Writes a file of 256 MB into `folder`, which is removed, and reads it back, or the source's `shard` where there
    is one of that size. Raises InputError where `folder` cannot be written to.
    """
    began = time.monotonic()
    device, dtype = torch.device(settings.device), getattr(torch, settings.compute_dtype)
    share = seconds / (5 + settings.smooth + method.needs_hessian)
    disk_write, disk_read = _measure_disk(folder, shard, share)
    square = torch.randn(_COLUMNS[device.type], _COLUMNS[device.type]).to(device, torch.bfloat16)
    bf16, nvfp4 = _linears(square)
    x = torch.randn(_TOKENS, len(square), device=device, dtype=dtype)

    def rate(work: Callable[[], int]) -> float:
        return _measure(share, work, device)

    with torch.no_grad():
        _quantizing(square[:64, :64].contiguous(), settings, method)()  # loops that are compiled are compiled now
        return Rates(
            disk_read=disk_read,
            disk_write=disk_write,
            quantize=rate(_quantizing(square, settings, method)),
            smooth=rate(_smoothing(square, settings, method)) if settings.smooth else None,
            curvature=rate(_summing(square)) if method.needs_hessian else None,
            linear_bf16=rate(lambda: _run(bf16, x)),
            linear_nvfp4=rate(lambda: _run(nvfp4, x)),
            seconds=time.monotonic() - began,
        )


# Pieces of work on a weight `square`, bfloat16 `[K, K]`


def _quantizing(square: Tensor, settings: QuantizeSettings, method: Method) -> Callable[[], int]:
    """What the walk does with a weight, given what calibration saw of an input."""
    info = TensorInfo("square", "BF16", tuple(square.shape), Path(), 0, square.nbytes)
    statistics = None
    if settings.calibration != "none":
        statistics = InputStatistics(weigh_channels=method.weighs_channels)
        statistics.observe(square)
        if method.needs_hessian:
            statistics.hessian = HessianAccumulator(len(square), square.device)
            statistics.hessian.add(square)

    on_host = square.cpu()

    def quantize() -> int:
        require_finite(on_host, info)
        quantized = method.prepare_group({"square": square}, statistics, [])(square)
        squared_sums(square, quantized)
        return square.nbytes

    return quantize


def _smoothing(square: Tensor, settings: QuantizeSettings, method: Method) -> Callable[[], int]:
    """What smoothing does with some rows of a weight: every candidate, then the verdict on other text."""
    rounding = Rounding(method.weighs_channels, settings.scheme == "NVFP4", settings.input_headroom)
    sample = Sample(square[:SAMPLED].to(getattr(torch, settings.compute_dtype)), [square[:_ROWS]], square.abs().amax(0))

    def smooth() -> int:
        _, exponents = choose(sample, Tie(), rounding)
        for tried in (torch.zeros_like(exponents), exponents):
            output_error(sample, tried, rounding)
        return square[:_ROWS].nbytes

    return smooth


def _summing(square: Tensor) -> Callable[[], int]:
    """What a Hessian does with a micro-batch."""
    hessian = HessianAccumulator(len(square), square.device)

    def add() -> int:
        hessian.add(square)
        return len(square) ** 3

    return add


def _linears(square: Tensor) -> tuple[LaneLinear, LaneLinear]:
    """A Linear `[4K, K]` of each lane."""
    one = quantize_weight(square, global_scale(amax(square)))
    quantized = QuantizedWeight(one.packed.repeat(4, 1), one.scale.repeat(4, 1), one.global_scale)
    site = InputSite(to_nvfp4(global_scale(torch.tensor(4.0, device=square.device)).reshape(1)))
    return LaneLinear(square.repeat(4, 1), None, InputSite()), LaneLinear(quantized, None, site)


def _run(linear: LaneLinear, x: Tensor) -> int:
    linear(x)
    linear.site.forget()
    return 2 * x.numel() * linear.stored.shape[0]


# The clock, and the disk


def _measure_disk(folder: Path, shard: Path | None, share: float) -> tuple[float, float]:
    """Bytes/s written and read, `share` seconds each."""
    content = {"x": torch.zeros(_FILE_BYTES, dtype=torch.uint8)}
    with _disk_errors_named(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".fourge-probe-") as scratch:
        path = Path(scratch) / "probe.safetensors"
        written = _measure(share, lambda: write_safetensors(path, content).size)
        if shard is None or shard.stat().st_size < _FILE_BYTES:
            shard = path
        return written, _measure_reading(share, shard)


def _measure(seconds: float, work: Callable[[], int], device: torch.device | None = None) -> float:
    """Units of `work`, which says how many it did, a second: repeated until `seconds` have passed."""

    def now() -> float:
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    began = now()
    done = work()
    while (elapsed := now() - began) < seconds:
        done += work()
    return done / elapsed


def _measure_reading(seconds: float, path: Path) -> float:
    """Bytes/s of `path` from the disk itself: what the page cache holds of it is dropped first, where the OS can."""
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = min(os.fstat(descriptor).st_size, _READ_BYTES)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_DONTNEED)
        began = time.monotonic()
        done = 0
        while done < size and (done == 0 or time.monotonic() - began < seconds):
            done += os.preadv(descriptor, [buffer], done)
        return done / (time.monotonic() - began)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        raise InputError(
            f"{folder}: {error.strerror}, so its disk cannot be measured; name another -o, or --no-probe"
        ) from error
