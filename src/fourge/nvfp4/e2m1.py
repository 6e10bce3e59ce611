"""E2M1 on tensors of any device: decode, round, encode, pack. `reference.py` says what they mean.

Rounding to a grid whose step is a power of two is an addition and a subtraction: `a + M` with `M = 2²³ · step` has
no bits left below `step`, and FP32's own ties-to-even do the rest. E2M1's step doubles at 2 and at 4; the power of
two below `max(a, 1)` is twice the step, and its exponent bits come from a mask.
"""

import torch
from torch import Tensor

_EXPONENT = 0x7F800000
_TWO_TO_22 = 2.0**22


def decode(codes: Tensor) -> Tensor:
    """FP32 values of codes `sign << 3 | index`, uint8 of any shape."""
    return _values(codes.device)[codes.int()]


def round(x: Tensor) -> Tensor:
    """The nearest E2M1 values of FP32 `x`: ties to the even code, saturating at ±6.

    A negative number that rounds to zero gives −0.0, −0.0 itself gives 0.0.
    """
    magnitude, power = _magnitude_and_power(x)
    magic = power.mul_(_TWO_TO_22)
    return magnitude.add_(magic).sub_(magic).copysign_(x + 0.0)


def encode(x: Tensor) -> Tensor:
    """The codes, uint8, of FP32 values on the grid, −0.0 being code 8; for others, those of the nearest values.

    After the addition of `M` the last mantissa bits count steps: 0 to 4 of a half, 2 to 4 of one, 2 or 3 of two.
    The grid's index is that count plus 0, 2 or 4, twice the exponent of the power.
    """
    magnitude, power = _magnitude_and_power(x)
    twice_exponent = (power.view(torch.int32) >> 22).sub_(2 * 127)
    codes = magnitude.add_(power.mul_(_TWO_TO_22)).view(torch.int32)
    codes.bitwise_and_(7).add_(twice_exponent)
    sign = (x.view(torch.int32) >> 28).bitwise_and_(8)
    return codes.bitwise_or_(sign).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte along the last dimension, `[…, K]` to `[…, K/2]` uint8; the low nibble is the even column."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: `[…, K/2]` to `[…, K]`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def byte_values(device: torch.device) -> Tensor:
    """FP32 `[256, 2]`: the two values of every packed byte."""
    return decode(unpack(torch.arange(256, device=device, dtype=torch.uint8)[:, None]))


def _values(device: torch.device) -> Tensor:
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=device)
    return torch.cat((magnitudes, -magnitudes))


def _magnitude_and_power(x: Tensor) -> tuple[Tensor, Tensor]:
    """|x| up to 6 and the power of two below `max(|x|, 1)`, both fresh."""
    assert x.dtype == torch.float32
    magnitude = x.abs().clamp_(max=6.0)
    power = magnitude.clamp_min(1.0)
    power.view(torch.int32).bitwise_and_(_EXPONENT)
    return magnitude, power
