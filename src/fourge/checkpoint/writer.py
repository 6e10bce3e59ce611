"""Writes a safetensors file as safetensors' own writer would, byte for byte, a chunk at a time."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fourge.checkpoint.header import DTYPES, METADATA_KEY, TensorInfo
from fourge.checkpoint.reader import CHUNK_BYTES, Checkpoint, byte_view

Specs = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name → (safetensors dtype, shape)."""

FORMAT_PT: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""The metadata that transformers asks for."""

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Copied:
    """An entry whose bytes come from a source checkpoint, never held as a whole."""

    checkpoint: Checkpoint
    name: str

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.tensors[self.name]


@dataclass(frozen=True)
class Written:
    """A finished file: its size in bytes and the SHA-256 of its content, in hex."""

    path: Path
    size: int
    sha256: str


def write_safetensors(
    path: Path, entries: Mapping[str, Tensor | Copied], metadata: Mapping[str, str] | None = FORMAT_PT
) -> Written:
    """Writes `entries` to exactly `path` and forces them to disk; contiguous tensors of any device.

    The caller gives a temporary name and renames. On an exception the partial file is removed and the
    exception goes on. The order is safetensors': by dtype (last of `DTYPES` first), then by name; metadata
    sorted by key.
    """
    specs = {name: _spec(entry) for name, entry in entries.items()}
    size = safetensors_size(specs, metadata)
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        try:
            for chunk in _content(entries, specs, metadata):
                sha256.update(chunk)
                file.write(chunk)
            assert file.tell() == size
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return Written(path, size, sha256.hexdigest())


def safetensors_size(specs: Specs, metadata: Mapping[str, str] | None = FORMAT_PT) -> int:
    """Exact size in bytes, header included, of the file that `write_safetensors` would write."""
    return len(_header(specs, metadata)) + sum(num_bytes(*spec) for spec in specs.values())


def index_json(weight_map: Mapping[str, str], total_size: int) -> dict[str, Any]:
    """`model.safetensors.index.json`: tensor → shard file; `total_size` is the bytes of all tensors."""
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def _spec(entry: Tensor | Copied) -> tuple[str, tuple[int, ...]]:
    if isinstance(entry, Copied):
        return entry.info.dtype, entry.info.shape
    return _DTYPE_NAMES[entry.dtype], tuple(entry.shape)


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `shape` and of safetensors' `dtype`."""
    return DTYPES[dtype].itemsize * math.prod(shape)


def _file_order(specs: Specs) -> list[str]:
    return sorted(specs, key=lambda name: (-_RANK[specs[name][0]], name))


def _header(specs: Specs, metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON, padded with spaces so that the data begin at a multiple of 8."""
    table: dict[str, Any] = {}
    if metadata is not None:
        table[METADATA_KEY] = dict(sorted(metadata.items()))
    offset = 0
    for name in _file_order(specs):
        dtype, shape = specs[name]
        end = offset + num_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _content(
    entries: Mapping[str, Tensor | Copied], specs: Specs, metadata: Mapping[str, str] | None
) -> Iterator[bytes | memoryview]:
    """The whole file, in order, in pieces of bounded size."""
    yield _header(specs, metadata)
    for name in _file_order(specs):
        entry = entries[name]
        yield from entry.checkpoint.chunks(entry.name) if isinstance(entry, Copied) else _tensor_chunks(entry)


def _tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), CHUNK_BYTES):
        yield byte_view(flat[start : start + CHUNK_BYTES].cpu())
