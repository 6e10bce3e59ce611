"""Group scales as codes: E4M3's positive values in order are 1 … 126, so a neighbour is a code away."""

import torch
from torch import Tensor

from fourge.nvfp4 import e4m3

SMALLEST_CODE = 1
LARGEST_CODE = 126


def positive_codes(scales: Tensor) -> Tensor:
    """int32 codes of the positive E4M3 values nearest to `scales`; those under 2⁻⁹ get its code."""
    return e4m3.encode(scales.float().clamp_min(e4m3.MIN_POSITIVE)).view(torch.uint8).int()


def positive_scales(codes: Tensor) -> Tensor:
    """FP32 values of integer `codes`; a code beyond the range counts as the last one within."""
    return e4m3.decode(codes.clamp(SMALLEST_CODE, LARGEST_CODE).to(torch.uint8).view(torch.float8_e4m3fn))
