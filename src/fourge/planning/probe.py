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

from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.reader import require_finite
from fourge.checkpoint.writer import write_safetensors
from fourge.errors import InputError
from fourge.methods.max import Max
from fourge.nvfp4.quantize import QuantizedWeight, global_scale
from fourge.walk.linear import InputSite, LaneLinear
from fourge.walk.weight_error import relative_weight_error

_FILE_BYTES = 256 << 20
_READ_BYTES = 1 << 30
_CHUNK_BYTES = 16 << 20
_COLUMNS = {"cpu": 2048, "cuda": 8192}
"""K of the weight, which has four times as many rows: large enough for full speed, small enough to repeat."""
_TOKENS = 2048
"""As many as quantize runs through a layer at once, unless told otherwise."""


@dataclass(frozen=True)
class Rates:
    """Bytes/s from and to disk, source bytes/s quantized, FLOP/s of the Linears of each lane."""

    disk_read: float
    disk_write: float
    quantize: float
    linear_bf16: float
    linear_nvfp4: float
    seconds: float


def measure_rates(
    folder: Path,
    shard: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
) -> Rates:
    """Measures for about `seconds`, in equal parts.

    Writes a file of 256 MB into `folder`, which is removed, and reads it back, or the source's `shard` where there
    is one of that size. Arithmetic is in `dtype` on `device`. Raises InputError where `folder` cannot be written to.
    """
    began = time.monotonic()
    share = seconds / 5
    content = {"x": torch.zeros(_FILE_BYTES, dtype=torch.uint8)}
    with _disk_errors_named(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".fourge-probe-") as scratch:
        path = Path(scratch) / "probe.safetensors"
        disk_write = _measure(share, lambda: write_safetensors(path, content).size)
        if shard is None or shard.stat().st_size < _FILE_BYTES:
            shard = path
        disk_read = _measure_reading(share, shard)
    columns = _COLUMNS[device.type]
    square = torch.randn(columns, columns).to(device, torch.bfloat16)
    info = TensorInfo("square", "BF16", (columns, columns), Path(), 0, square.nbytes)

    def quantize() -> QuantizedWeight:
        require_finite(square, info)
        quantized = Max().quantize_group({"square": square}, None, [])["square"]
        relative_weight_error(square, quantized)
        return quantized

    def quantize_square() -> int:
        quantize()
        return square.nbytes

    one = quantize()
    quantized = QuantizedWeight(one.packed.repeat(4, 1), one.scale.repeat(4, 1), one.global_scale)
    x = torch.randn(_TOKENS, columns, device=device, dtype=dtype)
    site = InputSite(global_scale=global_scale(x.abs().amax()).reshape(1))

    def run(linear: LaneLinear) -> int:
        linear(x)
        linear.site.forget()
        return 2 * x.numel() * linear.stored.shape[0]

    bf16 = LaneLinear(square.repeat(4, 1), None, InputSite())
    nvfp4 = LaneLinear(quantized, None, site)
    with torch.no_grad():
        return Rates(
            disk_read=disk_read,
            disk_write=disk_write,
            quantize=_measure(share, quantize_square, device),
            linear_bf16=_measure(share, lambda: run(bf16), device),
            linear_nvfp4=_measure(share, lambda: run(nvfp4), device),
            seconds=time.monotonic() - began,
        )


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
