"""Exponents of smoothing: exact powers, the textbook's scales, and a joint error that falls where channels are loud."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fourge.methods.smooth import (
    MOST,
    POWERS,
    Rounding,
    Sample,
    Tie,
    choose,
    exponents_for,
    output_error,
    powers_of_two,
)
from fourge.nvfp4.quantize import amax, dequantize_weight, fake_quantize, global_scale, quantize_weight

ROUNDINGS = [Rounding(searched, inputs, 2.0) for searched in (False, True) for inputs in (False, True)]


def sample_of(x: Tensor, *weights: Tensor) -> Sample:
    return Sample(x, weights, torch.cat(weights).float().abs().amax(0))


def planted(seed: int, tokens: int = 256, columns: int = 64, rows: int = 48) -> tuple[Sample, Sample]:
    """Two samples of inputs for the same two weights; one channel in every group of 16 is thirty times as loud."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * tokens, columns, generator=generator)
    x[:, torch.arange(0, columns, 16) + torch.randint(16, (columns // 16,), generator=generator)] *= 30
    weights = [torch.randn(rows, columns, generator=generator).bfloat16() * 0.02 for _ in range(2)]
    return sample_of(x[:tokens], *weights), sample_of(x[tokens:], *weights)


def plain_error(sample: Sample, exponents: Tensor) -> float:
    """‖Y' − Y‖ / ‖Y‖ in FP64 with max scales, tokens as they come, from the functions that the lanes use."""
    factor = torch.tensor([2.0**k for k in exponents.tolist()])
    weight, x = torch.cat(list(sample.weights)).float() * factor, sample.inputs / factor
    stored = dequantize_weight(quantize_weight(weight, global_scale(amax(weight)))).double()
    seen = fake_quantize(x, global_scale(2 * amax(x))).double()
    output = x.double() @ weight.double().T
    return ((seen @ stored.T - output).norm() / output.norm()).item()


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128, dtype=torch.int8)
    assert powers_of_two(exponents).tolist() == [2.0**k for k in range(-126, 128)]


def test_the_exponents_are_the_textbook_s() -> None:
    """Channel by channel in numpy, tokens of unit norm."""
    sample, _ = planted(3)
    x = sample.inputs.numpy().astype(np.float64)
    x /= np.sqrt((x**2).sum(1, keepdims=True))
    w = np.abs(torch.cat(list(sample.weights)).float().numpy().astype(np.float64))
    rms = [np.sqrt(np.mean(x[:, j] ** 2)) for j in range(x.shape[1])]
    largest = [w[:, j].max() for j in range(x.shape[1])]
    for a, b in POWERS:
        wanted = [
            round(float(np.log2((rms[j] / np.mean(rms)) ** a / (largest[j] / np.mean(largest)) ** b)))
            for j in range(x.shape[1])
        ]
        assert exponents_for(sample, (a, b), Tie()).tolist() == wanted


@pytest.mark.parametrize("seed", range(20))
def test_the_joint_error_falls_strictly_where_channels_are_loud(seed: int) -> None:
    """Fitted on one half of the tokens, measured on the other."""
    fitted, held_out = planted(seed)
    nothing = torch.zeros(64, dtype=torch.int8)
    for rounding in ROUNDINGS:
        powers, exponents = choose(fitted, Tie(), rounding)
        assert exponents.dtype == torch.int8
        if rounding.inputs:
            assert powers[0] > 0
            assert output_error(held_out, exponents, rounding) < 0.9 * output_error(held_out, nothing, rounding)
    _, exponents = choose(fitted, Tie(), Rounding(False, True, 2.0))
    assert plain_error(held_out, exponents) < 0.9 * plain_error(held_out, nothing)


def test_the_first_of_equals_stays() -> None:
    """Where nothing can be gained, nothing is done: a weight and inputs that NVFP4 holds exactly."""
    x = torch.tensor([1.0, -2.0, 3.0, 6.0] * 8).repeat(5, 1)
    powers, exponents = choose(sample_of(x, x[:3].clone()), Tie(), Rounding(False, True, 1.0))
    assert powers == (0.0, 0.0)
    assert not exponents.any()


def test_a_tie_is_grouped_query_attention() -> None:
    """Which value channel becomes which input of o_proj: transformers' own repetition of key-value heads."""
    from transformers.models.llama.modeling_llama import repeat_kv

    heads, repeats, width = 2, 3, 4
    channels = torch.arange(heads * width, dtype=torch.float32)
    values = channels.view(1, heads, 1, width)
    theirs = repeat_kv(values, repeats).transpose(1, 2).reshape(-1)
    tie = Tie(heads, repeats)
    assert torch.equal(tie.to_inputs(channels), theirs)
    assert torch.equal(tie.by_channel(theirs), channels[:, None].expand(-1, repeats))


def test_tied_inputs_share_their_exponent() -> None:
    sample, _ = planted(1)
    tie = Tie(2, 2)
    exponents = exponents_for(sample, (0.5, 0.25), tie)
    assert exponents.shape == (32,)
    assert torch.equal(tie.by_channel(tie.to_inputs(exponents)), exponents[:, None].expand(-1, 2))


def test_dead_hot_and_absent_channels_give_numbers() -> None:
    sample, _ = planted(0)
    sample.inputs[:, 5] = 0
    sample.inputs[:, 6] = 1e30
    sample.inputs[7] = 0
    sample.weights[0][:, 8] = 0
    sample.weights[1].zero_()
    whole = sample_of(sample.inputs, *sample.weights)
    for rounding in ROUNDINGS:
        _, exponents = choose(whole, Tie(), rounding)
        assert exponents[5] == 0
        assert int(exponents.abs().max()) <= MOST
        assert np.isfinite(output_error(whole, exponents, rounding))
    nothing = sample_of(torch.zeros(4, 16), torch.zeros(3, 16))
    assert choose(nothing, Tie(), ROUNDINGS[-1])[0] == (0.0, 0.0)
