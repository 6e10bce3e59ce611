"""The worked example of docs/numerics.md: compressed-tensors, given BF16 tensors, rounds intermediates to BF16."""

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from fourge.nvfp4.quantize import (
    QuantizedWeight,
    amax,
    dequantize_weight,
    global_scale,
    group_scales,
    quantize_weight,
)

WEIGHTS = preset_name_to_scheme("NVFP4", ["Linear"]).weights
AMAX, GROUP_AMAX, INNER = 0.46875, 0.259765625, 0.2001953125


def example(dtype: torch.dtype) -> torch.Tensor:
    """One row of two groups; every number is BF16's own, so that only intermediates can differ."""
    weight = torch.zeros(1, 32, dtype=dtype)
    weight[0, 0], weight[0, 16], weight[0, 17] = AMAX, GROUP_AMAX, INNER
    assert weight.bfloat16().double().tolist() == weight.double().tolist()
    return weight


def their_scales(weight: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    groups = weight.view(1, 2, 16)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), WEIGHTS, global_scale=divisor)
    return scales.float()


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 5734.400390625), (torch.bfloat16, 5760.0)])
def test_their_global_scale_depends_on_the_dtype(dtype: torch.dtype, expected: float) -> None:
    weight = example(dtype)
    assert float(generate_gparam(weight.min(), weight.max())) == expected
    assert float(global_scale(amax(weight))) == 5734.400390625, "ours does not"


def test_their_group_scale_depends_on_the_dtype() -> None:
    divisor = global_scale(amax(example(torch.float32))).reshape(1)
    assert their_scales(example(torch.float32), divisor).tolist() == [[448.0, 256.0]]
    assert their_scales(example(torch.bfloat16), divisor).tolist() == [[448.0, 240.0]]
    assert group_scales(example(torch.float32), divisor).tolist() == [[448.0, 256.0]]
    assert torch.equal(
        quantize_weight(example(torch.bfloat16), divisor).scale.float(),
        quantize_weight(example(torch.float32), divisor).scale.float(),
    )


def test_the_values_that_come_of_it() -> None:
    weight = example(torch.bfloat16)
    exact = global_scale(amax(weight)).reshape(1)
    llm_compressor = generate_gparam(weight.min(), weight.max())

    def restored(divisor: torch.Tensor, scales: torch.Tensor | None) -> list[float]:
        quantized: QuantizedWeight = quantize_weight(weight, divisor, scales)
        return dequantize_weight(quantized)[0, [0, 16, 17]].tolist()

    assert restored(exact, None) == pytest.approx([0.46875, 0.267857, 0.178571], abs=1e-6)
    assert restored(exact, their_scales(weight, exact)) == pytest.approx([0.46875, 0.251116, 0.167411], abs=1e-6)
    theirs = restored(llm_compressor, their_scales(weight, llm_compressor))
    assert theirs == pytest.approx([0.466667, 0.266667, 0.177778], abs=1e-6)
