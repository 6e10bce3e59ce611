"""Keys and values on their way into the KV cache: observed for their scales, or rounded to FP8 as engines store them.

transformers' attention hands both to `past_key_values.update()` after the norms of keys and the rotary embedding, and
computes with what comes back. An object with that one method is therefore all it takes to see, or to change, exactly
what an engine caches, in every architecture. Nothing is kept from one micro-batch to the next but two numbers.

Engines divide by the scale, cast to E4M3 with saturation, and multiply again (vLLM, SGLang, TensorRT-LLM alike).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fourge.checkpoint.compressed_tensors import KvScales
from fourge.checkpoint.reader import Checkpoint
from fourge.nvfp4 import e4m3
from fourge.nvfp4.quantize import amax
from fourge.walk.ranks import Ranks

_ROWS_BYTES = 8 << 20


class KvCache(Protocol):
    """What a layer's attention needs of a cache."""

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """Takes keys and values `[batch, heads, length, head_dim]`; returns those to compute with, likewise."""
        ...


class KvObserver:
    """The largest magnitudes of a layer's keys and values; passes them on as they are."""

    def __init__(self) -> None:
        self.k_amax = torch.zeros((), dtype=torch.float32)
        self.v_amax = torch.zeros((), dtype=torch.float32)

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        self.k_amax = torch.maximum(self.k_amax, amax(keys).cpu())
        self.v_amax = torch.maximum(self.v_amax, amax(values).cpu())
        return keys, values

    def agree(self, ranks: Ranks) -> None:
        """Takes what was seen on any of `ranks`."""
        self.k_amax, self.v_amax = ranks.largest(self.k_amax), ranks.largest(self.v_amax)

    def scales(self, events: list[dict[str, Any]]) -> KvScales:
        """The scales of what was seen; `events` gets an entry for what was always zero."""
        for what, seen in (("keys", self.k_amax), ("values", self.v_amax)):
            if seen == 0:
                events.append({"event": f"{what} are always zero"})
        return KvScales(kv_scale(self.k_amax), kv_scale(self.v_amax))


class Fp8KvCache:
    """A cache in FP8: keys and values come back as an engine would read them again."""

    def __init__(self, scales: KvScales, device: torch.device) -> None:
        self._k_scale, self._v_scale = scales.k.to(device), scales.v.to(device)

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return round_to_fp8(keys, self._k_scale), round_to_fp8(values, self._v_scale)


class CacheChain:
    """Caches one after the other: each takes what the one before it gave back."""

    def __init__(self, caches: Sequence[KvCache]) -> None:
        self._caches = caches

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        for cache in self._caches:
            keys, values = cache.update(keys, values, *rest, **options)
        return keys, values


def kv_scale(largest: Tensor) -> Tensor:
    """The multiplier, FP32 `[1]`, that puts `largest` on E4M3's largest value: `amax / 448`.

    The scale of llm-compressor and Model-Optimizer, without headroom: what lies beyond the calibrated range saturates
    to its end in every engine. (llm-compressor's default observer takes a moving average of each sample's largest in
    place of the largest of all, and so cuts calibration data off too.) Where all was zero the scale is 1, which vLLM
    takes in the absence of any and which leaves zeros zero; 0 would make them NaN.
    """
    scale = largest / e4m3.MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(1)


def round_to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """`scale · E4M3(x / scale)` in FP32, returned in `x`'s dtype and shape; a block of rows at a time."""
    rows = x.reshape(-1, x.shape[-1])
    rounded = torch.empty_like(rows)
    step = max(1, _ROWS_BYTES // (4 * x.shape[-1]))
    for block, target in zip(torch.split(rows, step), torch.split(rounded, step), strict=True):
        target.copy_(e4m3.round(block.float() / scale) * scale)
    return rounded.view(x.shape)


def read_kv_scales(checkpoint: Checkpoint, attention: str, device: torch.device) -> KvScales:
    """The scales that a quantized checkpoint stores for the module `attention`, on `device`, in FP32."""
    k, v = (checkpoint.read(f"{attention}.{name}").to(device, torch.float32) for name in ("k_scale", "v_scale"))
    return KvScales(k, v)
