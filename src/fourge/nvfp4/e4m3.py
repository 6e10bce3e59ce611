"""E4M3 on tensors of any device: the format of the group scales. `reference.py` says what the functions mean."""

import torch
from torch import Tensor

MAX = 448.0
MIN_POSITIVE = 2.0**-9


def round(x: Tensor) -> Tensor:
    """The nearest E4M3 values of FP32 `x`, as FP32: ties to the even code, saturating at ±448."""
    return decode(encode(x))


def encode(x: Tensor) -> Tensor:
    """`x` as float8_e4m3fn, saturating: torch's own cast gives NaN from 465 on."""
    return x.clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def decode(codes: Tensor) -> Tensor:
    """FP32 values of float8_e4m3fn."""
    return codes.float()
