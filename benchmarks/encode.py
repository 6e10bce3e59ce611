"""How fast weights become NVFP4 and come back: MB of BF16 a second, compressed-tensors' own functions beside ours.

Both sides of a row do the same work on the same weight, in turns, in one process with one number of threads; the
best of the repeats counts. Given the same scales both must give the same bytes, which is checked before any timing.
Our exact scale search has no counterpart: it stands beside our own max scales.
"""

import argparse
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.quant_config import QuantizationStatus
from compressed_tensors.quantization.utils import calculate_qparams

from fourge.methods.scale_search import search_scales
from fourge.nvfp4.quantize import (
    GROUP_SIZE,
    amax,
    dequantize_weight,
    fake_quantize,
    global_scale,
    quantize_weight,
)

SCHEME = preset_name_to_scheme("NVFP4", ["Linear"])

Pair = tuple[Callable[[], object], Callable[[], object]]


def pairs(weight: torch.Tensor) -> dict[str, Pair]:
    """Operation → (ours, theirs) on `weight` BF16 `[N, K]`."""
    divisor = global_scale(amax(weight)).reshape(1)
    quantized = quantize_weight(weight, divisor)
    scales = quantized.scale.float()
    layer = torch.nn.Linear(8, 8)
    layer.quantization_status = QuantizationStatus.FROZEN
    layer.input_global_scale = divisor

    def compress(scales: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"weight": weight, "weight_scale": scales, "weight_global_scale": divisor}
        return NVFP4PackedCompressor.compress(state, SCHEME)

    def calibrate_and_compress() -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.amin(-1).float(), groups.amax(-1).float()
        return compress(calculate_qparams(low, high, SCHEME.weights, global_scale=divisor)[0])

    stored = calibrate_and_compress()
    assert torch.equal(stored["weight_packed"], quantized.packed)
    assert torch.equal(stored["weight_scale"].view(torch.uint8), quantized.scale.view(torch.uint8))
    return {
        "quantize, max scales": (lambda: quantize_weight(weight, divisor), calibrate_and_compress),
        "quantize, scales given": (lambda: quantize_weight(weight, divisor, scales), lambda: compress(scales)),
        "dequantize to BF16": (
            lambda: dequantize_weight(quantized, dtype=torch.bfloat16),
            lambda: NVFP4PackedCompressor.decompress(stored, SCHEME),
        ),
        "fake-quantize activations": (
            lambda: fake_quantize(weight, divisor),
            lambda: forward_quantize(layer, weight, "input", SCHEME.input_activations),
        ),
    }


def searches(weight: torch.Tensor) -> dict[str, Pair]:
    """Operation → (max scales and codes, searched scales) on `weight`; channels' weights are log-normal."""
    divisor = global_scale(amax(weight)).reshape(1)
    uneven = torch.exp(2 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)))
    return {
        "scale search": (lambda: quantize_weight(weight, divisor), lambda: search_scales(weight, divisor)),
        "scale search, weighted": (
            lambda: quantize_weight(weight, divisor),
            lambda: search_scales(weight, divisor, uneven),
        ),
    }


def best_seconds(pair: Pair, repeats: int) -> list[float]:
    """The shortest time of each side, taken in turns so that a busy machine slows both."""
    best = [float("inf")] * len(pair)
    for _ in range(repeats):
        for side, run in enumerate(pair):
            start = time.perf_counter()
            run()
            best[side] = min(best[side], time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(options.rows, options.columns, generator=generator)).bfloat16()
    megabytes = weight.nbytes / 1e6
    print(f"MB of BF16 a second, one weight of {megabytes:.0f} MB, best of {options.repeats}")
    print(f"{'':26} {'threads':>7} {'fourge':>8} {'compressed-tensors':>19} {'ratio':>6}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name, pair in pairs(weight).items():
            ours, theirs = best_seconds(pair, options.repeats)
            rates = f"{megabytes / ours:>8.0f} {megabytes / theirs:>19.0f} {theirs / ours:>6.1f}"
            print(f"{name:26} {threads:>7} {rates}", flush=True)
        for name, pair in searches(weight).items():
            rounding, searching = best_seconds(pair, options.repeats)
            slower = f"{searching / rounding:.1f} times as long as max scales"
            print(f"{name:26} {threads:>7} {megabytes / searching:>8.0f} {slower}", flush=True)


if __name__ == "__main__":
    main()
