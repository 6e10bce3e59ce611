"""The largest magnitude by bits, beside torch's own maximum."""

import pytest
import torch

from fourge.nvfp4.magnitude import from_bits, infinity_bits, largest_bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
class TestLargest:
    def test_it_is_torchs(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        for count in (1, 16, 131_072, 300_001):
            x = torch.randn(count, generator=generator).to(dtype)
            for place in (0, count // 2, count - 1):
                y = x.clone()
                y[place] = -7.5
                assert torch.equal(from_bits(largest_bits(y), dtype), y.abs().max())
                assert largest_bits(y) < infinity_bits(dtype)
        zero = torch.zeros(1, dtype=dtype)
        assert largest_bits(zero) == largest_bits(-zero) == 0

    @pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, -torch.nan])
    def test_what_is_no_number_is_above_all_numbers(self, dtype: torch.dtype, value: float) -> None:
        x = torch.full((200_000,), torch.finfo(dtype).min, dtype=dtype)
        assert largest_bits(x) < infinity_bits(dtype)
        x[150_000] = value
        assert largest_bits(x) >= infinity_bits(dtype)
        assert bool(from_bits(largest_bits(x), dtype).isnan()) == (value != value)
