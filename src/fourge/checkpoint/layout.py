"""What goes into which output shard: decided from names and shapes alone, before anything is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from fourge.checkpoint import compressed_tensors
from fourge.checkpoint.architecture import Architecture, LinearGroup
from fourge.checkpoint.header import TensorInfo
from fourge.errors import InputError
from fourge.nvfp4.quantize import GROUP_SIZE
from fourge.settings import KvCacheScheme, LinearScheme

_DROPPED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Layout:
    """A checkpoint cut into steps: the embedding, one decoder layer each, the final norm with the head.

    `schemes` has what every Linear that is quantized becomes, by full name; `kept` names those that stay as they are
    (`ignore` in the file); `steps` the source's tensor names by step; `dropped` names that no engine reads.
    """

    architecture: Architecture
    num_layers: int
    shapes: Mapping[str, tuple[int, ...]]
    schemes: Mapping[str, LinearScheme]
    kept: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...]
    dropped: tuple[str, ...]

    @cached_property
    def quantized(self) -> frozenset[str]:
        """Full names of the Linears that are quantized."""
        return frozenset(self.schemes)

    @property
    def num_steps(self) -> int:
        return len(self.steps)

    def step_name(self, step: int) -> str:
        """`embedding`, `layer 7` or `head`."""
        if step == 0:
            return "embedding"
        return f"layer {step - 1}" if step <= self.num_layers else "head"

    def groups(self, layer: int) -> list[LinearGroup]:
        """The groups of a layer that are quantized."""
        prefix = self.architecture.layer_prefix(layer)
        return [g for g in self.architecture.groups if prefix + g.linears[0] in self.quantized]

    def attention(self, layer: int) -> str:
        """The full name of a layer's attention."""
        return self.architecture.layer_prefix(layer) + self.architecture.attention

    def output_specs(
        self,
        step: int,
        sources: Mapping[str, TensorInfo],
        kv_cache_scheme: KvCacheScheme | None = None,
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name → (safetensors dtype, shape) of every tensor in the output shard of `step`."""
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in self.steps[step]:
            linear = name.removesuffix(".weight")
            if linear in self.quantized:
                rows, columns = self.shapes[name]
                scheme, dtype = self.schemes[linear], sources[name].dtype
                specs |= compressed_tensors.tensor_specs(linear, (rows, columns), scheme, dtype)
            else:
                specs[name] = (sources[name].dtype, sources[name].shape)
        if kv_cache_scheme is not None and 0 < step <= self.num_layers:
            specs |= compressed_tensors.kv_scale_specs(self.attention(step - 1))
        return specs


def plan_layout(
    architecture: Architecture,
    num_layers: int,
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, TensorInfo],
    tied_head: bool,
    selected: Mapping[str, LinearScheme],
) -> Layout:
    """Holds the source's tensors against the model's and cuts them into steps.

    `expected` are transformers' names and shapes for this config; `selected` has, by full name, what the Linears
    that are quantized become. Raises InputError for a tensor that is missing, not part of
    the model or of another shape, for K not divisible by 16, for a fused group selected in part.
    """
    layout = source_layout(architecture, num_layers, expected, sources, tied_head, selected)
    _check_selection(architecture, num_layers, layout.shapes, selected)
    return layout


def source_layout(
    architecture: Architecture,
    num_layers: int,
    expected: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, TensorInfo],
    tied_head: bool,
    selected: Mapping[str, LinearScheme] = MappingProxyType({}),
) -> Layout:
    """`plan_layout` for a source that is read and not quantized: `selected` is taken as it is."""
    head = f"{architecture.head}.weight"
    dropped = tuple(name for name in sources if name.endswith(_DROPPED_SUFFIXES) or (tied_head and name == head))
    wanted = {name: shape for name, shape in expected.items() if not (tied_head and name == head)}
    _check_names_and_shapes(wanted, {name: info for name, info in sources.items() if name not in dropped})
    return cut_layout(architecture, num_layers, wanted, selected, dropped)


def cut_layout(
    architecture: Architecture,
    num_layers: int,
    wanted: Mapping[str, tuple[int, ...]],
    selected: Mapping[str, LinearScheme],
    dropped: tuple[str, ...] = (),
) -> Layout:
    """Cuts a model into steps; `wanted` are the shapes of its tensors as a source stores them, tied head left out."""
    head = f"{architecture.head}.weight"
    linears = [
        architecture.layer_prefix(layer) + linear for layer in range(num_layers) for linear in architecture.linears
    ]
    kept = tuple(name for name in [*linears, architecture.head] if name not in selected)
    in_order = {name: selected[name] for name in [*linears, architecture.head] if name in selected}
    steps = [tuple(name for name in wanted if name.startswith(architecture.embedding + "."))]
    for layer in range(num_layers):
        prefix = architecture.layer_prefix(layer)
        steps.append(tuple(name for name in wanted if name.startswith(prefix)))
    steps.append(tuple(name for name in wanted if name.startswith((architecture.final_norm + ".", head))))
    assert sum(map(len, steps)) == len(wanted), "a tensor belongs to no step"
    return Layout(architecture, num_layers, wanted, in_order, kept, tuple(steps), dropped)


def _check_names_and_shapes(wanted: Mapping[str, tuple[int, ...]], sources: Mapping[str, TensorInfo]) -> None:
    for name, shape in wanted.items():
        if name not in sources:
            raise InputError(f"the source has no tensor {name}, which its config.json calls for; download it again")
        info = sources[name]
        if info.shape != shape:
            raise InputError(
                f"{info.path}: {name} has shape {list(info.shape)}, config.json makes it {list(shape)}; "
                "one of the two belongs to another model"
            )
    for name, info in sources.items():
        if name not in wanted:
            raise InputError(f"{info.path}: {name} is not part of the model that config.json describes")


def _check_selection(
    architecture: Architecture,
    num_layers: int,
    shapes: Mapping[str, tuple[int, ...]],
    selected: Mapping[str, LinearScheme],
) -> None:
    if not selected:
        raise InputError("--targets and --ignore leave no Linear to quantize")
    if architecture.head in selected:
        raise InputError(f"{architecture.head} stays in the source's dtype: add it to --ignore")
    for layer in range(num_layers):
        prefix = architecture.layer_prefix(layer)
        for group in architecture.groups:
            chosen = [prefix + linear for linear in group.linears if prefix + linear in selected]
            if chosen and len(chosen) < len(group.linears):
                left = next(prefix + linear for linear in group.linears if prefix + linear not in selected)
                raise InputError(
                    f"engines load {prefix}{group.name} as one matrix: {left} is left out and {chosen[0]} is not; "
                    "name all of them in --targets or --ignore, or none"
                )
    for linear in sorted(selected):
        columns = shapes[f"{linear}.weight"][1]
        if columns % GROUP_SIZE:
            suffix = linear.rpartition(".")[2]
            raise InputError(
                f"{linear} has {columns} input columns, not a multiple of {GROUP_SIZE}: it cannot be "
                f"{selected[linear]}; leave it as it is with --ignore lm_head --ignore 're:.*{suffix}'"
            )
