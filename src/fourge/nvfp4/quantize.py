"""Temporary stand-in by the lead while the real room is being written: overwrite me."""

from dataclasses import dataclass
import torch
from torch import Tensor

GROUP_SIZE = 16


@dataclass(frozen=True)
class QuantizedWeight:
    packed: Tensor
    scale: Tensor
    global_scale: Tensor

    @property
    def shape(self):
        return (self.packed.shape[0], self.packed.shape[1] * 2)


def amax(x):
    return x.abs().amax().float()


def global_scale(a):
    g = 2688.0 / a.float().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(g, nan=1.0, posinf=1.0)


def group_scales(x, G):
    s = (x.unflatten(-1, (-1, 16)).abs().amax(-1) / 6.0 * G).clamp(max=448).to(torch.float8_e4m3fn).float()
    return torch.where(s == 0, torch.tensor(0.125), s)


def _round(x):
    a = x.abs()
    i = sum(
        [
            (a > 0.25).int(),
            (a >= 0.75).int(),
            (a > 1.25).int(),
            (a >= 1.75).int(),
            (a > 2.5).int(),
            (a >= 3.5).int(),
            (a > 5).int(),
        ]
    )
    return i


_V = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def quantize_weight(w, G, scales=None):
    w = w.float()
    s = group_scales(w, G) if scales is None else scales
    y = w.unflatten(-1, (-1, 16)) / (s / G)[..., None]
    c = (_round(y) + 8 * torch.signbit(y).int()).to(torch.uint8).flatten(-2)
    return QuantizedWeight(c[:, ::2] | (c[:, 1::2] << 4), s.to(torch.float8_e4m3fn), G.reshape(1))


def dequantize_weight(q, rows=slice(None), dtype=torch.float32):
    p = q.packed[rows]
    c = torch.stack([p & 15, p >> 4], -1).flatten(-2).long()
    v = _V[c & 7] * torch.where(c >= 8, -1.0, 1.0)
    return (v.unflatten(-1, (-1, 16)) * (q.scale[rows].float() / q.global_scale)[..., None]).flatten(-2).to(dtype)


def fake_quantize(x, G):
    f = x.float()
    s = (group_scales(f, G) / G)[..., None]
    y = f.unflatten(-1, (-1, 16)) / s
    return (torch.copysign(_V[_round(y).long()], y) * s).flatten(-2).to(x.dtype)
