"""One quantized checkpoint in two layouts of files: compressed-tensors' and NVIDIA's.

They differ in the names of a quantized Linear's tensors and of the KV cache's scales, in which side of a fraction the
global scales stand on, and in the JSON that says what is quantized. Everything else is the same bytes.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourge.checkpoint import compressed_tensors, modelopt
from fourge.checkpoint.folder import CONFIG, INDEX, regular_file
from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.reader import FLOAT_DTYPES, Checkpoint
from fourge.errors import InputError
from fourge.nvfp4.quantize import GROUP_SIZE
from fourge.settings import KvCacheScheme, Scheme

Describe = Callable[[Scheme, Sequence[str], KvCacheScheme | None], dict[str, Any]]
"""The JSON that says what is quantized, from the schemes and the names of the modules that are not."""


@dataclass(frozen=True)
class FileLayout:
    """How one family of engines wants a checkpoint. The fields hold the last parts of tensor names."""

    name: str
    packed: str
    group_scale: str
    global_scales: tuple[str, str]
    """The weight's, and the inputs' (absent in NVFP4A16)."""
    kv_scales: tuple[str, str]
    """Of the KV cache, relative to the attention module; multipliers in every layout."""
    scalar_shape: tuple[int, ...]
    """Of the global scales and those of the KV cache."""
    quantization_config: Describe
    documents: Mapping[str, Describe]
    """The files that go with it beside `config.json`."""

    def suffixes(self, scheme: Scheme) -> tuple[str, ...]:
        """What stands for a Linear's weight, in the same order in every layout."""
        return (self.packed, self.group_scale, *self.global_scales[: 2 if scheme == "NVFP4" else 1])


COMPRESSED_TENSORS = FileLayout(
    name="compressed-tensors",
    packed="weight_packed",
    group_scale="weight_scale",
    global_scales=("weight_global_scale", "input_global_scale"),
    kv_scales=("k_scale", "v_scale"),
    scalar_shape=(1,),
    quantization_config=compressed_tensors.quantization_config,
    documents={},
)
MODELOPT = FileLayout(
    name="modelopt",
    packed="weight",
    group_scale="weight_scale",
    global_scales=("weight_scale_2", "input_scale"),
    kv_scales=("k_proj.k_scale", "v_proj.v_scale"),
    scalar_shape=(),
    quantization_config=modelopt.quantization_config,
    documents={modelopt.HF_QUANT_CONFIG: modelopt.hf_quant_config},
)
LAYOUTS: Mapping[str, FileLayout] = {layout.name: layout for layout in (COMPRESSED_TENSORS, MODELOPT)}

_RESERVED = frozenset(
    suffix for layout in LAYOUTS.values() for suffix in layout.suffixes("NVFP4") if suffix != MODELOPT.packed
) | {"k_scale", "v_scale"}


@dataclass(frozen=True)
class Content:
    """An opened checkpoint in one of the layouts, its tensors known to be those of that layout.

    `linears` are the full names of the quantized Linears, `attentions` of the modules with an FP8 KV cache; `kept`
    those of every other module with a matrix.
    """

    checkpoint: Checkpoint
    layout: FileLayout
    scheme: Scheme
    linears: frozenset[str]
    attentions: frozenset[str]
    kept: tuple[str, ...]

    @property
    def kv_cache_scheme(self) -> KvCacheScheme | None:
        return "fp8" if self.attentions else None

    def rename(self, name: str, to: FileLayout) -> str:
        """The name of tensor `name` in the layout `to`."""
        for ours, theirs in zip(self.layout.kv_scales, to.kv_scales, strict=True):
            attention = name.removesuffix(f".{ours}")
            if attention != name and attention in self.attentions:
                return f"{attention}.{theirs}"
        module, _, suffix = name.rpartition(".")
        if module not in self.linears or suffix == "bias":
            return name
        place = self.layout.suffixes(self.scheme).index(suffix)
        return f"{module}.{to.suffixes(self.scheme)[place]}"

    @cached_property
    def scales(self) -> dict[str, Tensor]:
        """The global scales and those of the KV cache by name, one element each, as they are stored."""
        suffixes = self.layout.suffixes(self.scheme)[2:]
        names = [f"{linear}.{suffix}" for linear in sorted(self.linears) for suffix in suffixes]
        return {name: self.checkpoint.read(name) for name in (*names, *sorted(self.kv_scale_names))}

    @cached_property
    def kv_scale_names(self) -> frozenset[str]:
        return frozenset(f"{attention}.{name}" for attention in self.attentions for name in self.layout.kv_scales)

    def carry(self, name: str, scale: Tensor) -> Tensor:
        """What the other layout has for `scale` of this one's name `name`: FP32, the shape left as it is."""
        if name in self.kv_scale_names:
            return scale.float()
        return invert(name, scale, self.checkpoint.directory)

    @cached_property
    def documents(self) -> dict[str, bytes]:
        """The layout's JSON files as they are, `config.json` and the index included."""
        directory = self.checkpoint.directory
        own = {name: regular_file(directory, name).read_bytes() for name in self.layout.documents}
        return own | self.checkpoint.documents

    def documents_in(self, to: FileLayout) -> dict[str, bytes]:
        """The JSON files that go with the tensors in the layout `to`, the ones that readers open first last."""
        what = (self.scheme, self.kept, self.kv_cache_scheme)
        files = {name: describe(*what) for name, describe in to.documents.items()}
        quantization = {"quantization_config": to.quantization_config(*what)}
        files[CONFIG] = self.checkpoint.config | quantization
        if INDEX in self.checkpoint.documents:
            weight_map = {self.rename(name, to): info.path.name for name, info in self.checkpoint.tensors.items()}
            files[INDEX] = {"metadata": self.checkpoint.index_metadata, "weight_map": weight_map}
        return {name: _json_bytes(content) for name, content in files.items()}


def find_layout(checkpoint: Checkpoint) -> FileLayout:
    """The layout of a quantized checkpoint, from its JSON files; InputError where it has none of ours, or two."""
    config, stored = checkpoint.directory / CONFIG, checkpoint.config.get("quantization_config")
    nvidias = checkpoint.directory / modelopt.HF_QUANT_CONFIG
    if modelopt.is_modelopt(stored) or (stored is None and nvidias.exists()):
        return MODELOPT
    if stored is None:
        raise InputError(
            f"{config}: has no quantization_config, so nothing here is quantized; quantize it first, "
            "with `fourge quantize`"
        )
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method != COMPRESSED_TENSORS.name:
        raise InputError(
            f"{config}: quant_method is {method!r}, known are {', '.join(LAYOUTS)}; give a checkpoint in one of them"
        )
    if nvidias.exists():
        raise InputError(f"{nvidias}: does not belong to a checkpoint of compressed-tensors; remove it")
    return COMPRESSED_TENSORS


def describe_content(
    checkpoint: Checkpoint,
    layout: FileLayout,
    scheme: Scheme,
    kv_cache_scheme: KvCacheScheme | None,
    listed: Sequence[str],
) -> Content:
    """Finds the quantized Linears by their tensors. `listed` are names that the checkpoint itself says are not.

    Raises InputError where tensors of a Linear or of the KV cache are missing, of another dtype or shape, or of a
    kind that the layouts do not share.
    """
    linears = frozenset(
        name.removesuffix(f".{layout.packed}")
        for name, info in checkpoint.tensors.items()
        if name.endswith(f".{layout.packed}") and info.dtype == "U8"
    )
    if not linears:
        raise InputError(
            f"{checkpoint.directory}: no Linear is quantized, though its config says so; download it again"
        )
    for linear in sorted(linears):
        _check_linear(checkpoint, linear, layout, scheme)
    attentions = frozenset[str]() if kv_cache_scheme is None else _find_attentions(checkpoint, layout)
    kv_scales = {f"{attention}.{name}" for attention in attentions for name in layout.kv_scales}
    for name, info in checkpoint.tensors.items():
        if name not in kv_scales:
            _check_name(info, name, linears, layout.suffixes(scheme))
    matrices = (name.removesuffix(".weight") for name, info in checkpoint.tensors.items() if _is_matrix(name, info))
    kept = sorted({*matrices, *listed} - linears)
    return Content(checkpoint, layout, scheme, linears, attentions, tuple(kept))


def _is_matrix(name: str, info: TensorInfo) -> bool:
    return name.endswith(".weight") and len(info.shape) >= 2


def _check_linear(checkpoint: Checkpoint, linear: str, layout: FileLayout, scheme: Scheme) -> None:
    shape = checkpoint.tensors[f"{linear}.{layout.packed}"].shape
    if len(shape) != 2 or 2 * shape[1] % GROUP_SIZE:
        raise InputError(
            f"{checkpoint.directory}: {linear}.{layout.packed} has shape {list(shape)}, not [N, K/2] with K a "
            f"multiple of {GROUP_SIZE}; such a Linear cannot be converted"
        )
    rows, columns = shape[0], 2 * shape[1]
    scalar: tuple[str, tuple[tuple[int, ...], ...]] = ("F32", ((), (1,)))
    expected = [("U8", (shape,)), ("F8_E4M3", ((rows, columns // GROUP_SIZE),)), scalar, scalar]
    for suffix, (dtype, shapes) in zip(layout.suffixes(scheme), expected, strict=False):
        name = f"{linear}.{suffix}"
        info = checkpoint.tensors.get(name)
        if info is None:
            raise InputError(f"{checkpoint.directory}: {name} is missing, {scheme} calls for it; download it again")
        if info.dtype != dtype or info.shape not in shapes:
            raise InputError(
                f"{info.path}: {name} is {info.dtype} {list(info.shape)}, expected {dtype} {list(shapes[0])}; "
                "download it again"
            )


def _find_attentions(checkpoint: Checkpoint, layout: FileLayout) -> frozenset[str]:
    """The modules with scales of an FP8 KV cache; InputError where one of a pair is missing, or all are."""
    attentions = frozenset(
        name.removesuffix(f".{suffix}")
        for name in checkpoint.tensors
        for suffix in layout.kv_scales
        if name.endswith(f".{suffix}")
    )
    if not attentions:
        raise InputError(
            f"{checkpoint.directory}: the KV cache is FP8 by its config, and no scales of it are there (engines take "
            "1); such a checkpoint cannot be converted: take one with calibrated scales"
        )
    for attention in sorted(attentions):
        for suffix in layout.kv_scales:
            name = f"{attention}.{suffix}"
            info = checkpoint.tensors.get(name)
            if info is None:
                raise InputError(f"{checkpoint.directory}: {name} is missing, the other is there; download it again")
            if info.dtype not in FLOAT_DTYPES or info.shape not in ((), (1,)):
                raise InputError(
                    f"{info.path}: {name} is {info.dtype} {list(info.shape)}, expected one floating-point number; "
                    "such a checkpoint cannot be converted"
                )
    return attentions


def _check_name(info: TensorInfo, name: str, linears: frozenset[str], suffixes: tuple[str, ...]) -> None:
    module, _, suffix = name.rpartition(".")
    if module in linears and suffix not in (*suffixes, "bias"):
        raise InputError(f"{info.path}: {name} is not part of a Linear in NVFP4; such a checkpoint cannot be converted")
    if module not in linears and suffix in _RESERVED:
        raise InputError(f"{info.path}: {name} belongs to no Linear in NVFP4; such a checkpoint cannot be converted")


def invert(name: str, scale: Tensor, directory: Path) -> Tensor:
    """`modelopt.reciprocal` of the stored global scale `name`; InputError unless both are ordinary numbers."""
    inverse = modelopt.reciprocal(scale)
    smallest = torch.finfo(torch.float32).tiny
    if not all(smallest <= float(x) < math.inf for x in (scale, inverse)):
        raise InputError(
            f"{directory}: {name} is {float(scale)}, which FP32 cannot invert; `fourge verify` says what is wrong"
        )
    return inverse


def _json_bytes(content: object) -> bytes:
    """As `durable.write_json` and transformers write it."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
