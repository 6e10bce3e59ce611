"""What a plan knows of a model: its shape and every tensor, before and after quantization, to the byte."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal, get_args

from fourge.checkpoint.architecture import Architecture
from fourge.settings import KvCacheScheme, LinearScheme, Scheme


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it; `dtype` is safetensors' name."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Part:
    """One part of the model: its parameters, and its bytes in the source (None: unknown) and the output."""

    name: str
    parameters: int
    source_bytes: int | None
    output_bytes: int


@dataclass(frozen=True)
class ModelFacts:
    """`shapes` are the model's own tensors, a tied head counted once; `schemes` what quantized Linears are stored in,
    by full name.

    `source` is None for a checkpoint that is quantized already. `origin` says what was read.
    """

    name: str
    origin: Literal["config.json alone", "headers"]
    architecture: Architecture
    kv_cache_scheme: KvCacheScheme | None
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tied_head: bool
    shapes: Mapping[str, tuple[int, ...]]
    schemes: Mapping[str, LinearScheme]
    source: Mapping[str, Stored] | None
    output: Mapping[str, Stored]
    num_shards: int
    shard_bytes: int
    notes: tuple[str, ...] = ()

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Full names of the quantized Linears."""
        return frozenset(self.schemes)

    @property
    def scheme(self) -> Scheme:
        """What the Linears in FP4 need of a kernel."""
        return "NVFP4" if "NVFP4" in self.schemes.values() else "NVFP4A16"

    @property
    def mixture(self) -> str:
        """All that there is: `NVFP4`, or `NVFP4 + FP8`."""
        return " + ".join(scheme for scheme in get_args(LinearScheme) if scheme in self.schemes.values())

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def quantized_parameters(self) -> int:
        return sum(prod(self.shapes[f"{linear}.weight"]) for linear in self.quantized)

    @property
    def fp8_parameters(self) -> int:
        """Those of them that are in FP8 and not in FP4."""
        return sum(prod(self.shapes[f"{linear}.weight"]) for linear, scheme in self.schemes.items() if scheme == "FP8")

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder layers' Linears, quantized or not."""
        linears = {f"{linear}.weight" for linear in self.layer_linears()}
        return sum(prod(shape) for name, shape in self.shapes.items() if name in linears)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def layer_linears(self) -> Iterable[str]:
        """Full names of every Linear of the decoder layers."""
        for layer in range(self.num_layers):
            prefix = self.architecture.layer_prefix(layer)
            yield from (prefix + linear for linear in self.architecture.linears)


def total_bytes(tensors: Mapping[str, Stored], of: Callable[[str], bool] = lambda name: True) -> int:
    """Bytes of the tensors whose name satisfies `of`."""
    return sum(tensor.nbytes for name, tensor in tensors.items() if of(name))


def largest_layer_bytes(facts: ModelFacts, tensors: Mapping[str, Stored]) -> int:
    """Bytes of the largest decoder layer among `tensors`."""
    sizes = [0] * facts.num_layers
    prefix = f"{facts.architecture.layers}."
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            sizes[int(name.removeprefix(prefix).partition(".")[0])] += tensor.nbytes
    return max(sizes)


def list_parts(facts: ModelFacts) -> tuple[Part, ...]:
    """The model by part, in the order of the forward pass; together they are all of it."""
    names = ("embedding", "attention", "MLP", "norms", "head")

    def belongs(part: str) -> Callable[[str], bool]:
        return lambda name: part_of(name, facts.architecture) == part

    parts = [
        Part(
            part,
            sum(prod(shape) for name, shape in facts.shapes.items() if belongs(part)(name)),
            None if facts.source is None else total_bytes(facts.source, belongs(part)),
            total_bytes(facts.output, belongs(part)),
        )
        for part in names
    ]
    return tuple(part for part in parts if part.parameters)


def part_of(name: str, architecture: Architecture) -> str:
    """The part that tensor `name`, of the source or the output, belongs to."""
    owner = name.rpartition(".")[0]
    if owner == architecture.embedding:
        return "embedding"
    if owner == architecture.head:
        return "head"
    within = owner.removeprefix(f"{architecture.layers}.").partition(".")[2]
    if within == architecture.attention:  # the scales of the KV cache
        return "attention"
    if within in architecture.linears:
        return "attention" if within.startswith("self_attn.") else "MLP"
    return "norms"
