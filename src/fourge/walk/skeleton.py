"""transformers' own model on the meta device: every name, shape, mask and rotary embedding, and not one weight.

The walk runs decoder layers one at a time, so it needs what the model's forward hands to each layer (attention
mask, rotary cos and sin, positions). Rather than rebuild that per architecture, the skeleton keeps the model's own
forward and puts recorders where the layers were: what a recorder is called with is what the layer gets.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourge.checkpoint.architecture import Architecture
from fourge.errors import InputError
from fourge.walk.tree import Tree


class _Recorder(nn.Module):
    """Stands in for a decoder layer, hands its input on, keeps the keyword arguments of the call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Some models look at a layer's attributes to choose its mask.
        for attribute in ("attention_type", "layer_type"):
            if hasattr(layer, attribute):
                setattr(self, attribute, getattr(layer, attribute))
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


def load_config(directory: Path) -> Any:
    """transformers' config of a checkpoint directory; remote code is never run. InputError when it does not parse."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{directory / 'config.json'}: transformers does not accept it: {reason}") from error


def meta_causal_lm(config: Any, device: torch.device) -> Any:
    """The causal LM on the meta device but for its rotary table, which is computed, not loaded, and so is real."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    decoder = causal_lm.base_model
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config)
    return causal_lm


class Skeleton:
    """The model without weights. Shapes and masks come from transformers; the names from `architecture`."""

    def __init__(self, config: Any, architecture: Architecture, device: torch.device) -> None:
        self.config = config
        self.architecture = architecture
        causal_lm = meta_causal_lm(config, device)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in causal_lm.state_dict().items()}
        self.linears = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear)}
        self.tied_head = bool(config.tie_word_embeddings)
        self.num_layers = int(config.num_hidden_layers)
        self.hidden_size = int(config.hidden_size)
        self._layers = list(causal_lm.get_submodule(architecture.layers))
        self._final_norm = causal_lm.get_submodule(architecture.final_norm)
        self._decoder = causal_lm.base_model
        self._decoder.layers = nn.ModuleList(_Recorder(layer) for layer in self._layers)
        self._decoder.norm = nn.Identity()
        self._arguments: tuple[tuple[int, int, torch.dtype], list[dict[str, Any]]] | None = None
        self._chain_masks: list[Tensor | None] | None = None
        self._chain_length = 0

    def new_layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with every parameter on the meta device."""
        layer: nn.Module = copy.deepcopy(self._layers[index])
        return layer

    def new_final_norm(self) -> nn.Module:
        """The norm before the head, on the meta device."""
        norm: nn.Module = copy.deepcopy(self._final_norm)
        return norm

    @torch.no_grad()
    def layer_arguments(self, index: int, hidden: Tensor, tree: Tree | None = None) -> dict[str, Any]:
        """What the model's forward passes to layer `index` beside the hidden states `[batch, length, hidden]`.

        Without a `tree`, the sequences of a batch have one length and no padding, so this depends on shape and
        dtype alone; the last answer is kept. With one, the batch is one row, and a token sees its ancestors as it
        would in a sequence of its own: at their depths, and no further back than the layer's window reaches.
        """
        if tree is not None:
            return self._tree_arguments(index, hidden, tree)
        key = (hidden.shape[0], hidden.shape[1], hidden.dtype)
        if self._arguments is None or self._arguments[0] != key:
            self._arguments = (key, self._record(hidden))
        return self._arguments[1][index]

    def _record(self, hidden: Tensor, **inputs: Tensor) -> list[dict[str, Any]]:
        self._decoder(inputs_embeds=hidden, use_cache=False, **inputs)
        return [recorder.arguments for recorder in self._decoder.layers]

    def _tree_arguments(self, index: int, hidden: Tensor, tree: Tree) -> dict[str, Any]:
        mask = tree.ancestors()
        recorded = self._record(hidden, position_ids=tree.positions[None], attention_mask=mask[None, None])
        chain = self._chain_mask(index, hidden, tree.depth)
        if chain is not None:
            mask &= chain[tree.positions[:, None], tree.positions]
        return recorded[index] | {"attention_mask": mask[None, None]}

    def _chain_mask(self, index: int, hidden: Tensor, length: int) -> Tensor | None:
        """Which position of a plain sequence sees which in layer `index`, bool; None where all before it.

        transformers' own mask, so a sliding window comes from where the model's forward has it. One for a longer
        sequence begins with those of the shorter, so the longest is kept.
        """
        if self._chain_masks is None or self._chain_length < length:
            recorded = self._record(hidden[:, :1].expand(1, length, -1))
            self._chain_masks = [arguments["attention_mask"] for arguments in recorded]
            self._chain_length = length
        mask = self._chain_masks[index]
        return None if mask is None else mask[0, 0]
