"""A checkpoint directory, opened: what tensors there are and where, and their bytes when asked for.

Plain reads, no memory map: mapped pages count as resident for as long as the kernel likes, and the walk promises how
much it takes; a file cut short under a map would end the process where a read says which file it was.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from fourge.checkpoint.folder import CONFIG, INDEX, SINGLE, list_sidecars, no_weights_error, regular_file
from fourge.checkpoint.header import TensorInfo, parse_object, read_header
from fourge.errors import InputError
from fourge.nvfp4.magnitude import infinity_bits, largest_bits

CHUNK_BYTES = 16 << 20
FLOAT_DTYPES = ("BF16", "F16", "F32")

_MODELOPT_CONFIG = "hf_quant_config.json"
_FINITE_CHUNK = 1 << 20


@dataclass
class Checkpoint:
    """The tensors of a model directory, sorted by name, its `config.json` and the index's `metadata`.

    `bytes_read` counts the tensor bytes read so far, for progress. Several threads may read at once.
    """

    directory: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    index_metadata: dict[str, Any]
    documents: dict[str, bytes] = field(repr=False)
    """The raw content of `config.json` and, where there is one, the index; by file name."""
    bytes_read: int = 0
    _counting: Lock = field(default_factory=Lock, init=False, repr=False)

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Reads and checks config, index and every shard's header; no tensor.

        Raises InputError where the directory, `config.json` or a shard is missing, a file is malformed, index
        and shards disagree, the index or a symlink leads out of the directory, or the weights are pickles.
        """
        if not directory.is_dir():
            raise InputError(f"{directory}: no such directory; give a checkpoint's directory or a hub id")
        documents: dict[str, bytes] = {}
        index: dict[str, Any] = {}
        if (directory / INDEX).exists():
            documents[INDEX], index = _read_json(directory, INDEX)
            tensors = _sharded_tensors(directory, _weight_map(directory, index))
        elif (directory / SINGLE).exists():
            tensors, _ = read_header(regular_file(directory, SINGLE))
        else:
            raise no_weights_error(directory)
        documents[CONFIG], config = _read_json(directory, CONFIG)
        return cls(directory, dict(sorted(tensors.items())), config, index.get("metadata") or {}, documents)

    def read(self, name: str, rows: slice | None = None, *, pinned: bool = False) -> Tensor:
        """Tensor `name`, or its `rows` along the first dimension (step 1), in its own dtype, on the CPU; `pinned` for
        a GPU to copy from."""
        info = self.tensors[name]
        shape, begin = info.shape, info.begin
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            assert step == 1, "rows are read as they lie"
            shape = (max(stop - start, 0), *shape[1:])
            begin += start * _row_bytes(info)
        tensor = torch.empty(shape, dtype=info.torch_dtype, pin_memory=pinned)
        with _opened(info.path) as descriptor:
            self._fill(byte_view(tensor), descriptor, info, begin)
        return tensor

    def read_into(self, name: str, memory: Tensor) -> Tensor:
        """Tensor `name` as `read` gives it, lying in `memory`, uint8 `[n]` on the CPU, n at least its bytes."""
        info = self.tensors[name]
        taken = memory[: info.nbytes]
        with _opened(info.path) as descriptor:
            self._fill(byte_view(taken), descriptor, info, info.begin)
        return taken.view(info.torch_dtype).view(info.shape)

    def gather_rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows `indices` (int64 `[n]`, any order, repeats allowed) of tensor `name` `[rows, …]`, as `[n, …]`.

        Each distinct row is read once, in the file's order. Raises InputError for a row the tensor has not.
        """
        info = self.tensors[name]
        distinct, places = torch.unique(indices, return_inverse=True)
        outside = distinct[(distinct < 0) | (distinct >= info.shape[0])]
        if len(outside):
            raise InputError(
                f"{info.path}: {name} has {info.shape[0]} rows, row {int(outside[0])} was asked for; "
                "the tokenizer belongs to another model"
            )
        gathered = torch.empty((len(distinct), *info.shape[1:]), dtype=info.torch_dtype)
        view, size = byte_view(gathered), _row_bytes(info)
        with _opened(info.path) as descriptor:
            for place, row in enumerate(distinct.tolist()):
                self._fill(view[place * size : (place + 1) * size], descriptor, info, info.begin + row * size)
        return gathered[places]

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of tensor `name` in order, in one buffer: a chunk is valid until the next is taken."""
        info = self.tensors[name]
        buffer = memoryview(bytearray(min(chunk_bytes, info.nbytes)))
        with _opened(info.path) as descriptor:
            for begin in range(info.begin, info.end, chunk_bytes):
                chunk = buffer[: min(chunk_bytes, info.end - begin)]
                self._fill(chunk, descriptor, info, begin)
                yield chunk

    def _fill(self, view: memoryview, descriptor: int, info: TensorInfo, offset: int) -> None:
        """Reads `len(view)` bytes from `offset` on. One call of the OS may bring fewer, and at most 2 GiB."""
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise InputError(
                    f"{info.path}: ends at byte {offset}, within {info.name}: cut short since it was opened; "
                    "download it again"
                )
            view = view[count:]
            offset += count
            with self._counting:
                self.bytes_read += count

    def digest(self) -> str:
        """SHA-256, in hex, over all headers' tensors, file names and sizes, the index and `config.json`.

        It says whether this is the same checkpoint without reading the weights; where it lies does not count.
        """
        paths = {info.path for info in self.tensors.values()}
        facts = {
            "tensors": [
                (info.name, info.dtype, info.shape, info.path.name, info.begin, info.end)
                for info in self.tensors.values()
            ],
            "sizes": {path.name: path.stat().st_size for path in paths},
            "documents": {name: hashlib.sha256(raw).hexdigest() for name, raw in self.documents.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def sidecars(self) -> list[Path]:
        """Every file to be carried over to the output as it is; see `folder.list_sidecars`."""
        return list_sidecars(self.directory)


def require_unquantized(checkpoint: Checkpoint) -> None:
    """Raises InputError where config.json or NVIDIA's `hf_quant_config.json` says the model is quantized."""
    mend = "give the model that it was made from, in BF16, F16 or F32"
    config = checkpoint.directory / CONFIG
    for key in ("quantization_config", "compression_config"):
        found = checkpoint.config.get(key)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise InputError(f"{config}: already quantized ({key}, method {method or 'unknown'}); {mend}")
    modelopt = checkpoint.directory / _MODELOPT_CONFIG
    if modelopt.exists():
        raise InputError(f"{modelopt}: already quantized (by Model-Optimizer); {mend}")


def require_float(checkpoint: Checkpoint) -> None:
    """Raises InputError for the first tensor whose dtype is not BF16, F16 or F32."""
    for info in checkpoint.tensors.values():
        if info.dtype not in FLOAT_DTYPES:
            raise InputError(f"{info.path}: {info.name} is {info.dtype}; give the model in {', '.join(FLOAT_DTYPES)}")


def require_finite(tensor: Tensor, info: TensorInfo, first_row: int = 0) -> None:
    """Raises InputError, with the first bad index in row-major order, where `tensor` holds NaN or Inf.

    `tensor` is contiguous and of `FLOAT_DTYPES`: all of `info`, or its rows from `first_row` on. One pass that takes
    no memory; the copy of a mask is made for the bad chunk alone.
    """
    if tensor.is_cuda:
        if torch.stack(torch.aminmax(tensor)).isfinite().all():
            return
        tensor = tensor.cpu()
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _FINITE_CHUNK):
        chunk = flat[start : start + _FINITE_CHUNK]
        if largest_bits(chunk) < infinity_bits(tensor.dtype):
            continue
        place = start + int((~chunk.isfinite()).nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape)]
        value = float(flat[place])
        if index:
            index[0] += first_row
        raise InputError(f"{info.path}: {info.name}{index} is {value}; download it again, or mend the model")


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    assert tensor.is_contiguous()
    return tensor.view(-1).view(torch.uint8).numpy().data


def _row_bytes(info: TensorInfo) -> int:
    return info.torch_dtype.itemsize * math.prod(info.shape[1:])


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_json(directory: Path, name: str) -> tuple[bytes, dict[str, Any]]:
    path = regular_file(directory, name)
    raw = path.read_bytes()
    return raw, parse_object(raw, str(path))


def _weight_map(directory: Path, index: dict[str, Any]) -> dict[str, str]:
    """The index's table tensor → shard, every shard the plain name of a file that is there."""
    path = directory / INDEX
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path}: weight_map is not a table of tensor and file names; download it again")
    if not isinstance(index.get("metadata") or {}, dict):
        raise InputError(f"{path}: metadata is not a table; download it again")
    # Compared with the listing, so that no name from the index ever reaches the file system.
    present = {entry.name for entry in directory.iterdir()}
    for name, shard in weight_map.items():
        if "/" in shard or "\\" in shard:
            raise InputError(
                f"{path}: maps {name!r} to {shard!r}, outside the directory; every shard must lie beside the index"
            )
        if shard not in present:
            raise InputError(f"{directory}: shard {shard!r} is missing, the index names it; download it again")
    if SINGLE in present and SINGLE not in weight_map.values():
        raise InputError(f"{directory}: has both {SINGLE} and {INDEX}, which does not name it; remove the stale one")
    return weight_map


def _sharded_tensors(directory: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all shards; InputError unless they are those of the index, each where it says."""
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = regular_file(directory, shard)
        held, _ = read_header(path)
        for name in held:
            if name not in weight_map:
                raise InputError(f"{path}: holds {name}, which {INDEX} does not name; download both again")
            if weight_map[name] != shard:
                raise InputError(f"{path}: holds {name}, which {INDEX} maps to {weight_map[name]}; download both again")
        tensors |= held
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(f"{directory / shard}: lacks {name!r}, which {INDEX} maps to it; download both again")
    return tensors
