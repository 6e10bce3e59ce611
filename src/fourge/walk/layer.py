"""One decoder layer of one lane: transformers' module, with its Linears reading weights as they are stored."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fourge.nvfp4.fp8 import Fp8Weight
from fourge.nvfp4.quantize import QuantizedWeight
from fourge.walk.kv_cache import CacheChain, KvCache
from fourge.walk.linear import InputSite, LaneLinear
from fourge.walk.skeleton import Skeleton
from fourge.walk.tree import Tree

StoredWeights = Mapping[str, Tensor | QuantizedWeight | Fp8Weight]
"""The tensors of one layer by name relative to it: `self_attn.q_proj.weight`, `input_layernorm.weight`, …"""


def fill(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replaces parameters of a meta module by `tensors` (same names, same shapes), cast to `dtype`."""
    for name, tensor in tensors.items():
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(tensor.to(dtype), requires_grad=False)
        setattr(module.get_submodule(owner), attribute, parameter)


class LaneLayer:
    """Decoder layer `index` with `weights`; `sites` names, per group, what happens to its shared input;
    keys and values pass through `kv_cache`, where there is one.

    Runs `[batch, length, hidden]` to the same shape, in the dtype of what it is given; with a `tree`, one row whose
    tokens see their ancestors alone. A group without a site passes its input on unchanged. To be used in a `with`:
    modules of transformers lie on reference cycles, so the weights of a layer that is merely forgotten stay until
    the collector comes by, a layer or two later.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        weights: StoredWeights,
        dtype: torch.dtype,
        sites: Mapping[str, InputSite] | None = None,
        kv_cache: KvCache | None = None,
    ) -> None:
        self._skeleton = skeleton
        self.index = index
        self._dtype = dtype
        self._kv_cache = kv_cache
        self._sites: list[InputSite] = []
        self._linears: list[LaneLinear] = []
        self._module = skeleton.new_layer(index)
        rest = dict(weights)
        for group in skeleton.architecture.groups:
            site = (sites or {}).get(group.name, InputSite())
            self._sites.append(site)
            for name in group.linears:
                bias = rest.pop(f"{name}.bias", None)
                assert bias is None or isinstance(bias, Tensor)
                linear = LaneLinear(rest.pop(f"{name}.weight"), None if bias is None else bias.to(dtype), site)
                self._linears.append(linear)
                parent, _, attribute = name.rpartition(".")
                setattr(self._module.get_submodule(parent), attribute, linear)
        fill(self._module, {name: t for name, t in rest.items() if isinstance(t, Tensor)}, dtype)
        left = [name for name, parameter in self._module.named_parameters() if parameter.is_meta]
        assert not left, f"layer {index} was given no {left}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for linear in self._linears:
            del linear.stored

    def observe_input(self, module: str, observe: Callable[[Tensor], None]) -> None:
        """Has `observe` called with what `module`, named relative to the layer, is given."""
        self._module.get_submodule(module).register_forward_pre_hook(lambda _, inputs: observe(inputs[0]))

    def widen(self) -> None:
        """Holds the Linears' weights in the computation's dtype from now on: faster at every call, and larger."""
        for linear in self._linears:
            linear.widen(self._dtype)

    @torch.no_grad()
    def __call__(self, hidden: Tensor, tree: Tree | None = None) -> Tensor:
        return self.run(hidden, self._skeleton.layer_arguments(self.index, hidden, tree))

    @torch.no_grad()
    def run(self, hidden: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Runs `hidden` with what the model's forward hands to the layer: mask, positions, a cache that remembers."""
        if self._kv_cache is not None:
            remembering = arguments.get("past_key_values")
            cache = self._kv_cache if remembering is None else CacheChain((self._kv_cache, remembering))
            arguments = {**arguments, "past_key_values": cache}
        try:
            output = self._module(hidden, **arguments)
        finally:
            for site in self._sites:
                site.forget()
        assert isinstance(output, Tensor)
        return output
