"""A whole source model in memory, for the one thing that a walk cannot do: sample text from it, token by token.

Used only where the model fits (`--calibration self` on small models); everything else walks.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fourge.checkpoint.reader import Checkpoint
from fourge.errors import InputError
from fourge.progress import format_bytes
from fourge.walk.resources import available_memory
from fourge.walk.skeleton import Skeleton, meta_causal_lm

_BATCH = 32
_GENERATION_BYTES = 1 << 30

Sampler = Callable[[int, int, int], list[np.ndarray]]


def load_resident(source: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' causal LM with all weights in `dtype`; raises InputError when memory will not do."""
    parameters = sum(int(np.prod(info.shape)) for info in source.tensors.values())
    need = parameters * dtype.itemsize + _GENERATION_BYTES
    have = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if have < need:
        raise InputError(
            f"--calibration self holds the whole model in memory: {format_bytes(need)} are needed, "
            f"{format_bytes(have)} are there; name a hub dataset, a local file or 'random' instead"
        )
    causal_lm = meta_causal_lm(skeleton.config, device)
    state = {name: source.read(name).to(device, dtype) for name in skeleton.shapes if name in source.tensors}
    if skeleton.tied_head:
        state[f"{skeleton.architecture.head}.weight"] = state[f"{skeleton.architecture.embedding}.weight"]
    causal_lm.load_state_dict(state, assign=True)
    return causal_lm


def make_sampler(source: Checkpoint, skeleton: Skeleton, dtype: torch.dtype, device: torch.device) -> Sampler:
    """`sample(count, length, seed)`: sequences drawn from the model's own distribution, `length` tokens each.

    Plain ancestral sampling (temperature 1, no truncation) from the start token, or from a random one where the
    model has none. An end-of-text token does not stop a sequence: what follows it is the model's next text.
    """

    @torch.no_grad()
    def sample(count: int, length: int, seed: int) -> list[np.ndarray]:
        model = load_resident(source, skeleton, dtype, device)
        torch.manual_seed(seed)
        start = skeleton.config.bos_token_id
        sequences: list[np.ndarray] = []
        while len(sequences) < count:
            rows = min(_BATCH, count - len(sequences))
            first = (
                torch.randint(skeleton.config.vocab_size, (rows, 1))
                if start is None
                else torch.full((rows, 1), int(start))
            )
            tokens = model.generate(
                first.to(device),
                attention_mask=torch.ones_like(first).to(device),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=length - 1,
                min_new_tokens=length - 1,
                eos_token_id=None,
                pad_token_id=0,
                use_cache=True,
            )
            sequences += list(tokens.cpu().numpy().astype(np.int32))
        return sequences

    return sample
