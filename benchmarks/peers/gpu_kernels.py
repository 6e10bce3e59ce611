"""Other tools' NVFP4 kernels for a GPU, as their own functions call them, where they are installed beside fourge."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operations = dict[str, dict[str, Callable[[], object]]]
"""Operation → tool → what runs it."""

PEERS = {"compressed-tensors": "compressed_tensors", "Model-Optimizer": "modelopt", "llm-compressor": "llmcompressor"}


def not_installed() -> list[str]:
    """A line for each tool that is missing here."""
    return [f"{name}: not installed" for name, module in PEERS.items() if importlib.util.find_spec(module) is None]


def operations(weight: Tensor, divisor: Tensor, packed: Tensor, scale: Tensor) -> Operations:
    """What the installed ones have for `weight` BF16 `[N, K]` and its NVFP4 form under `divisor`, FP32 `[1]`."""
    found: Operations = {}
    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is not None:
            for operation, run in _OF[name](weight, divisor, packed, scale).items():
                found.setdefault(operation, {})[name] = run
    return found


def _compressed_tensors(weight: Tensor, divisor: Tensor, packed: Tensor, scale: Tensor) -> dict[str, Any]:
    """Its Triton kernels are what its functions run on a GPU."""
    from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.quant_config import QuantizationStatus

    scheme = preset_name_to_scheme("NVFP4", ["Linear"])
    layer = torch.nn.Linear(8, 8, device=weight.device)
    layer.quantization_status = QuantizationStatus.FROZEN
    layer.input_global_scale = divisor
    state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": divisor}
    stored = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}
    return {
        "encode, scales given": lambda: NVFP4PackedCompressor.compress(dict(state), scheme),
        "decode": lambda: NVFP4PackedCompressor.decompress(dict(stored), scheme),
        "fake-quantize": lambda: forward_quantize(layer, weight, "input", scheme.input_activations),
    }


def _llm_compressor(weight: Tensor, divisor: Tensor, packed: Tensor, scale: Tensor) -> dict[str, Any]:
    """The search of its observer for NVFP4, over a grid of 89 ranges, with that observer's settings."""
    from compressed_tensors.quantization import QuantizationStrategy, preset_name_to_scheme

    arguments = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    by_token = arguments.model_copy(update={"strategy": QuantizationStrategy.TOKEN})
    groups = weight.unflatten(1, (-1, 16)).unsqueeze(0)

    def search() -> object:
        from llmcompressor.observers.mse_quant import _grid_search_mse

        return _grid_search_mse(groups, arguments, by_token, 1 - 0.8 / 1.8, 1000, 200.0, 2.4, 1.0, 1.8)

    return {"search": search}


def _model_optimizer(weight: Tensor, divisor: Tensor, packed: Tensor, scale: Tensor) -> dict[str, Any]:
    """Its Triton kernels: activations, decoding, and the sweep over all 126 scales."""
    largest = 448 * 6 / divisor

    def kernels() -> Any:
        from modelopt.torch.kernels.quantization import gemm

        return gemm

    return {
        "decode": lambda: kernels().fp4_dequantize(packed, scale, 1 / divisor, 16, 128, torch.bfloat16),
        "fake-quantize": lambda: kernels().fp4_fake_quant_block(weight, largest),
        "search": lambda: kernels().nvfp4_fp8_scale_sweep(weight, largest),
    }


_OF = {
    "compressed-tensors": _compressed_tensors,
    "llm-compressor": _llm_compressor,
    "Model-Optimizer": _model_optimizer,
}
