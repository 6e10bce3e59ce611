"""How often a reciprocal in FP32 does not lead back, over every significand there is."""

import numpy as np
import torch

from fourge.checkpoint.modelopt import reciprocal

ONE = np.float32(1)
SIGNIFICANDS = (np.arange(1 << 23, dtype=np.uint32) | 0x3F800000).view(np.float32)


def test_it_is_the_nearest() -> None:
    ours = reciprocal(torch.from_numpy(SIGNIFICANDS)).numpy()
    exact = 1 / SIGNIFICANDS.astype(np.float64)
    error = np.abs(ours - exact)
    for neighbour in (np.nextafter(ours, np.float32(0)), np.nextafter(ours, np.float32(2))):
        assert (error <= np.abs(neighbour - exact)).all()


def test_where_the_nearest_does_not_lead_back_no_neighbour_does() -> None:
    nearest = reciprocal(torch.from_numpy(SIGNIFICANDS)).numpy()
    lost = SIGNIFICANDS[ONE / nearest != SIGNIFICANDS]
    assert round(len(lost) / len(SIGNIFICANDS), 4) == 0.1716
    assert lost.min() > 2**0.5
    inverse = ONE / lost
    for neighbour in (np.nextafter(inverse, np.float32(0)), np.nextafter(inverse, np.float32(2))):
        assert (ONE / neighbour != lost).all()
    weight = np.log2(np.nextafter(lost, np.float32(4)).astype(np.float64) / lost)
    assert round(float(weight.sum()), 2) == 0.14, "of scales spread evenly on a logarithmic axis"
