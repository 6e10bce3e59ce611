"""What a quantized directory's own config.json says must be in it: every tensor, its dtypes and its shape.

Derived from transformers' model of the config and the patterns of `quantization_config`, not from how the files
are cut, so that checkpoints written by other tools are held to the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourge.checkpoint.architecture import Architecture
from fourge.checkpoint.compressed_tensors import kv_scale_specs, tensor_specs
from fourge.checkpoint.reader import FLOAT_DTYPES
from fourge.checks.config import Quantization
from fourge.settings import KvCacheScheme, LinearScheme

if TYPE_CHECKING:
    from torch import nn


_OF_THE_MODEL = "the model's"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: the dtypes it may have (safetensors' names), its shape, whether it may be left out."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Expected:
    """`schemes` has what every quantized Linear is stored in, by full name; `modules` every Linear there is, on the
    meta device; `shapes` are those of every source tensor."""

    architecture: Architecture
    config: Any
    """transformers' config, without `quantization_config`."""
    kv_cache_scheme: KvCacheScheme | None
    schemes: Mapping[str, LinearScheme]
    modules: "Mapping[str, nn.Module]"
    shapes: Mapping[str, tuple[int, ...]]
    specs: Mapping[str, TensorSpec]

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Full names of the quantized Linears."""
        return frozenset(self.schemes)

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def tied_head(self) -> bool:
        return bool(self.config.tie_word_embeddings)

    @property
    def linears(self) -> list[str]:
        """Full names of every Linear of the decoder layers, quantized or not."""
        return [
            self.architecture.layer_prefix(layer) + linear
            for layer in range(self.num_layers)
            for linear in self.architecture.linears
        ]

    def quantized_groups(self, layer: int) -> list[tuple[str, ...]]:
        """Full names of the quantized Linears of a layer, by group; of one quantized in part, that part."""
        prefix = self.architecture.layer_prefix(layer)
        groups = [
            tuple(prefix + linear for linear in group.linears if prefix + linear in self.quantized)
            for group in self.architecture.groups
        ]
        return [group for group in groups if group]

    def kv_scale_names(self, layer: int) -> tuple[str, ...]:
        """The scales of a layer's KV cache; none where it is not quantized."""
        if self.kv_cache_scheme is None:
            return ()
        return tuple(kv_scale_specs(self.architecture.layer_prefix(layer) + self.architecture.attention))

    def layer_names(self, layer: int) -> list[str]:
        """The specs' names that belong to a layer."""
        prefix = self.architecture.layer_prefix(layer)
        return [name for name in self.specs if name.startswith(prefix)]

    def outer_names(self) -> list[str]:
        """The specs' names that belong to no layer: embedding, final norm, head."""
        return [name for name in self.specs if not name.startswith(f"{self.architecture.layers}.")]


def expect(directory: Path, architecture: Architecture, quantization: Quantization) -> Expected:
    """Reads `config.json`; InputError where transformers does not accept it."""
    import torch

    from fourge.walk.selection import match_schemes
    from fourge.walk.skeleton import Skeleton, load_config

    config = load_config(directory)
    del config.quantization_config
    skeleton = Skeleton(config, architecture, torch.device("cpu"))
    schemes = match_schemes(skeleton.linears, quantization.groups, quantization.ignore)
    specs: dict[str, TensorSpec] = {}
    for name, shape in skeleton.shapes.items():
        linear = name.removesuffix(".weight")
        if linear in schemes:
            rows, columns = shape
            for stored, (dtype, size) in tensor_specs(linear, (rows, columns), schemes[linear], _OF_THE_MODEL).items():
                specs[stored] = TensorSpec(FLOAT_DTYPES if dtype == _OF_THE_MODEL else (dtype,), size)
        else:
            tied = skeleton.tied_head and linear == architecture.head
            specs[name] = TensorSpec(FLOAT_DTYPES, shape, optional=tied)
    expected = Expected(
        architecture, config, quantization.kv_cache_scheme, schemes, skeleton.linears, skeleton.shapes, specs
    )
    for layer in range(expected.num_layers):
        # llm-compressor stores them in the model's dtype.
        specs |= {name: TensorSpec(FLOAT_DTYPES, (1,)) for name in expected.kv_scale_names(layer)}
    return expected
