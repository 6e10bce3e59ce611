"""The GPUs a checkpoint may be served on, as data, and how the user names one.

Memory is what the driver reports (`nvidia-smi`, `rocm-smi`), for that is what an engine takes its share of; cards
and datasheets round it up or down by several GB. Rates are dense, without structured sparsity, from the makers'
documents named beside each row.
"""

import re
from dataclasses import dataclass

from fourge.errors import InputError

MIB = 1 << 20
GIB = 1 << 30
TERA = 1e12

_UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": MIB, "GIB": GIB, "TIB": 1 << 40}


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: memory in bytes, bandwidth in bytes/s, dense matrix rates in FLOP/s.

    `sm` is the CUDA compute capability times ten, None for a GPU that has none. A rate is None where the hardware
    has no such arithmetic, and all of them are where the GPU was given by memory and SM alone.
    """

    name: str
    memory: int
    sm: int | None
    bandwidth: float | None = None
    fp4: float | None = None
    fp8: float | None = None
    bf16: float | None = None


def _gpu(
    name: str, mib: int, sm: int | None, terabytes: float, fp4: float | None, fp8: float | None, bf16: float
) -> Gpu:
    """Memory in MiB, bandwidth in TB/s, rates in TFLOP/s."""

    def rate(teraflops: float | None) -> float | None:
        return None if teraflops is None else teraflops * TERA

    return Gpu(name, mib * MIB, sm, terabytes * TERA, rate(fp4), rate(fp8), rate(bf16))


GPUS: tuple[Gpu, ...] = (
    # NVIDIA Blackwell datasheet: HGX B200, and GB200 NVL72 per GPU (sparse figures, halved).
    _gpu("B200", 183_359, 100, 7.7, 9_000, 4_500, 2_250),
    _gpu("GB200", 189_471, 100, 8.0, 10_000, 5_000, 2_500),
    # NVIDIA GB300 NVL72 datasheet, per GPU. Its FP4 is given dense beside sparse: three quarters of it, not half.
    _gpu("GB300", 284_208, 103, 8.0, 15_000, 5_000, 2_500),
    # NVIDIA RTX Blackwell GPU architecture whitepaper. FP8 with FP16 accumulation; BF16 always adds in FP32.
    _gpu("RTX 5090", 32_607, 120, 1.792, 1_676, 838, 209.5),
    # NVIDIA RTX PRO Blackwell GPU architecture whitepaper, the Workstation Edition; the Server Edition has 1.6 TB/s.
    _gpu("RTX PRO 6000", 97_887, 120, 1.792, 2_015, 1_008, 503.8),
    # NVIDIA H200 and H100 datasheets, the SXM modules.
    _gpu("H200", 143_771, 90, 4.8, None, 1_979, 989.5),
    _gpu("H100", 81_559, 90, 3.35, None, 1_979, 989.5),
    # NVIDIA A100 datasheet, the 80 GB SXM module.
    _gpu("A100", 81_920, 80, 2.039, None, None, 312),
    # NVIDIA L40S datasheet.
    _gpu("L40S", 46_068, 89, 0.864, None, 733, 362),
    # AMD Instinct MI300X datasheet.
    _gpu("MI300X", 196_592, None, 5.3, None, 2_615, 1_307),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, whatever its case, spaces and hyphens; InputError lists the known ones."""
    wanted = _canonical(name)
    found = next((gpu for gpu in GPUS if _canonical(gpu.name) == wanted), None)
    if found is None:
        known = ", ".join(gpu.name for gpu in GPUS)
        raise InputError(f"--gpu {name} is not known; known are: {known}; any other by --gpu-memory 96GiB --sm 12.0")
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|amd|geforce", "", name.lower())


def parse_gpu(gpu: str | None, gpu_memory: str | None, sm: str | None) -> tuple[Gpu, int | None] | None:
    """What `--gpu NAME[:COUNT]`, `--gpu-memory` and `--sm` name, and the count if there is one; None for none.

    Memory or SM beside a name replace that GPU's own. Raises InputError for an unknown name, a count that is
    none, a malformed size or SM, and for one of `--gpu-memory` and `--sm` alone.
    """
    memory = None if gpu_memory is None else parse_bytes("--gpu-memory", gpu_memory)
    capability = None if sm is None else _parse_sm(sm)
    if gpu is not None:
        name, colon, text = gpu.partition(":")
        known = find_gpu(name)
        count = _parse_count(gpu, text) if colon else None
        if memory is None and capability is None:
            return known, count
        rates = (known.bandwidth, known.fp4, known.fp8, known.bf16)
        return Gpu(known.name, memory or known.memory, capability or known.sm, *rates), count
    if memory is None and capability is None:
        return None
    if memory is None or capability is None:
        raise InputError("--gpu-memory and --sm describe a GPU together: give both, or a known one by --gpu")
    return Gpu(f"SM{capability} of {memory / GIB:.0f} GiB", memory, capability), None


def parse_bytes(option: str, text: str) -> int:
    """`96GiB`, `80 GB` or `81559MiB` in bytes; InputError, naming `option`, for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise InputError(f"{option} {text} is not a size such as 96GiB or 80GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _parse_sm(text: str) -> int:
    match = re.fullmatch(r"(\d{1,2})\.(\d)", text.strip())
    if match is None:
        raise InputError(f"--sm {text} is not a compute capability such as 9.0 or 12.0")
    return 10 * int(match[1]) + int(match[2])


def _parse_count(gpu: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"--gpu {gpu}: {text or 'nothing'} after the colon is not a number of GPUs, as in b200:2")
    return int(text)
