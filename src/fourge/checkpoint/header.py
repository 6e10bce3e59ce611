"""The header of a safetensors file, held against the file before any offset in it is trusted.

A header comes from whoever made the file. Everything else in this package seeks and allocates by what stands
in `TensorInfo`, so this is the one place that decides whether it may.
"""

import json
import math
import reprlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fourge.errors import InputError

# In safetensors' own order: the writer lays tensors out by it, last first.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
METADATA_KEY = "__metadata__"

_MOST_HEADER_BYTES = 100_000_000
_LARGEST = 2**63 - 1
_DAMAGED = "the file is damaged: download it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `[begin, end)` of the file `path`. `dtype` is safetensors' name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file by name, and its `__metadata__`.

    Reads the header only. Raises InputError unless the tensors are well formed and fill the file exactly: no
    overlap, no hole, nothing beyond the end and nothing after it.
    """
    raw, size = _read_raw_header(path)
    header = parse_object(raw, f"{path}: its header")
    metadata = header.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: {METADATA_KEY} in its header is not a table of strings; {_DAMAGED}")
    data_begin = 8 + len(raw)
    tensors = {name: _tensor_info(path, name, entry, data_begin) for name, entry in header.items()}
    _check_coverage(path, tensors, data_begin, size)
    return tensors, metadata


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `raw`. InputError, beginning with `what`, where it is none or has a key twice."""
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not valid JSON ({error}); {_DAMAGED}") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{what} is not a JSON object; {_DAMAGED}")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {reprlib.repr(key)} occurs twice")
        result[key] = value
    return result


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    """The JSON bytes of the header and the size of the file."""
    size = path.stat().st_size
    if size < 8:
        raise InputError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _MOST_HEADER_BYTES:
            raise InputError(
                f"{path}: claims a header of {length} bytes, where safetensors allows {_MOST_HEADER_BYTES}: "
                "not a safetensors file, or a damaged one; download it again"
            )
        if 8 + length > size:
            raise InputError(
                f"{path}: truncated: its header takes {8 + length} bytes, the file has {size}; download it again"
            )
        return file.read(length), size


def _tensor_info(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    """The checked header entry of one tensor, its offsets counted from the start of the file."""
    if not name.isprintable():  # names end up in one-line messages and on terminals
        raise InputError(f"{path}: the tensor name {reprlib.repr(name)} has unprintable characters; {_DAMAGED}")

    def damaged(what: str) -> InputError:
        return InputError(f"{path}: {name}: {what}; {_DAMAGED}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise damaged("its header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(
            f"{path}: {name}: unknown dtype {reprlib.repr(dtype)}; known are {', '.join(DTYPES)}: "
            "download the file again, or take the model in one of these"
        )
    if not isinstance(shape, list) or not all(_is_natural(size) for size in shape):
        raise damaged(f"its shape {reprlib.repr(shape)} is not a list of sizes")
    nbytes = _count_bytes(dtype, shape)
    if nbytes is None:
        raise damaged(f"its shape {reprlib.repr(shape)} has more bytes than 64 bits can count")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_natural(offset) for offset in offsets):
        raise damaged(f"its data_offsets {reprlib.repr(offsets)} are not two offsets")
    begin, end = offsets
    if begin > end:
        raise damaged(f"it begins at byte {begin}, after its end at byte {end}")
    if end - begin != nbytes:
        raise damaged(f"{dtype} {reprlib.repr(shape)} takes {nbytes} bytes, its offsets span {end - begin}")
    return TensorInfo(name, dtype, tuple(shape), path, data_begin + begin, data_begin + end)


def _is_natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST  # type(), for True is an int to isinstance


def _count_bytes(dtype: str, shape: list[int]) -> int | None:
    """Bytes of a tensor; None where 64 bits cannot count them, or the strides, in which a size 0 is a 1."""
    stride = DTYPES[dtype].itemsize
    for size in shape:
        stride *= max(size, 1)
        if stride > _LARGEST:
            return None
    return DTYPES[dtype].itemsize * math.prod(shape)


def _check_coverage(path: Path, tensors: dict[str, TensorInfo], data_begin: int, size: int) -> None:
    """Raises InputError unless the tensors, in order, fill `[data_begin, size)` with no gap or overlap."""
    position, previous = data_begin, "the header"
    cut: str | None = None
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin < position:
            raise InputError(f"{path}: {info.name} overlaps {previous}; {_DAMAGED}")
        if info.begin > position:
            raise InputError(
                f"{path}: bytes {position} to {info.begin}, between {previous} and {info.name}, belong to no "
                f"tensor; {_DAMAGED}"
            )
        position, previous = info.end, info.name
        if cut is None and position > size:
            cut = info.name
    if cut is not None:
        raise InputError(
            f"{path}: truncated: the header says {position} bytes, the file has {size} and ends within {cut}; "
            "download it again"
        )
    if position < size:
        raise InputError(
            f"{path}: {size - position} bytes after {previous} belong to no tensor: the header says "
            f"{position} bytes, the file has {size}; download it again"
        )
