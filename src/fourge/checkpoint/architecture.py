"""Which model families are known, and what their decoder layers hold: one table, no code per model.

A `LinearGroup` is a set of Linears that read the same input. Engines load a group of more than one as a single
matrix (q/k/v, gate/up), so its members share the weight's global scale and the input's: where they differ, the
engine takes the larger and the result is wrong by the ratio.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fourge.errors import InputError


@dataclass(frozen=True)
class LinearGroup:
    """Linears of one decoder layer that read one input; names are relative to the layer.

    `fed_by` is the norm, or the Linear, to whose output channels the input's are proportional. `added_to` is there
    where the output is added to the residual stream: the norm that reads the stream as it is before that.
    """

    linears: tuple[str, ...]
    fed_by: str
    added_to: str | None = None

    @property
    def name(self) -> str:
        """The group's name in logs: `self_attn.q_proj+k_proj+v_proj`."""
        parent, _, first = self.linears[0].rpartition(".")
        rest = [linear.rpartition(".")[2] for linear in self.linears[1:]]
        return f"{parent}.{'+'.join([first, *rest])}"


@dataclass(frozen=True)
class Architecture:
    """The names of one family's parts. `groups` lists every Linear of a decoder layer exactly once."""

    name: str
    groups: tuple[LinearGroup, ...]
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    """The module that fills the KV cache, relative to the layer."""

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.7.` for layer 7."""
        return f"{self.layers}.{layer}."

    @property
    def linears(self) -> tuple[str, ...]:
        """Every Linear of a decoder layer, in the table's order."""
        return tuple(linear for group in self.groups for linear in group.linears)


_GATED_MLP_DECODER = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    LinearGroup(("self_attn.o_proj",), "self_attn.v_proj", "input_layernorm"),
    LinearGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    LinearGroup(("mlp.down_proj",), "mlp.up_proj", "post_attention_layernorm"),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    name: Architecture(name, _GATED_MLP_DECODER)
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """The table's entry for a `config.json`; raises InputError that lists the known ones for any other."""
    names = config.get("architectures")
    known = ", ".join(ARCHITECTURES)
    if not isinstance(names, list) or len(names) != 1:
        raise InputError(f'config.json: "architectures" is {names!r}, expected a list of one of: {known}')
    if names[0] not in ARCHITECTURES:
        raise InputError(f"config.json: architecture {names[0]} is not known; known are: {known}")
    return ARCHITECTURES[names[0]]
