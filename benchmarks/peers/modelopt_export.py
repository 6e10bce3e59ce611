"""Model-Optimizer's quantization and export on the tokens of one of our jobs. Runs in Model-Optimizer's environment.

    python modelopt_export.py MODEL OUTPUT TOKENS.safetensors [--scheme NVFP4] [--recipe local-hessian]

Prints one JSON line: seconds of calibrating and of saving, peak resident bytes, version.
"""

import copy
import time
from typing import Any

import modelopt
import modelopt.torch.quantization as mtq
import modelopt_on_cpu
import torch
from common import parse_arguments, read_calibration, report
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.utils import update_quant_cfg_with_kv_cache_quant
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = ("max", "mse", "local-hessian", "gptq", "four-over-six", "kv-fp8")


def configuration(recipe: str, scheme: str) -> dict[str, Any]:
    """The library's own configuration of that name; GPTQ as in its recipe `nvfp4_default-kv_none-gptq`."""
    if scheme == "NVFP4A16":
        return mtq.W4A16_NVFP4_CFG
    if recipe == "kv-fp8":
        return update_quant_cfg_with_kv_cache_quant(mtq.NVFP4_DEFAULT_CFG, mtq.FP8_KV_CFG["quant_cfg"])
    if recipe == "gptq":
        config = copy.deepcopy(mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG)
        return config | {"algorithm": {"method": "gptq", "layerwise": {"enable": True}}}
    return {
        "max": mtq.NVFP4_DEFAULT_CFG,
        "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
        "local-hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
        "four-over-six": mtq.NVFP4_FOUR_OVER_SIX_CFG,
    }[recipe]


def main() -> None:
    options = parse_arguments(__doc__, RECIPES)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        modelopt_on_cpu.install()
    sequences = [torch.tensor([sequence], device=options.device) for sequence in read_calibration(options.tokens)]

    def calibrate(model: torch.nn.Module) -> None:
        for sequence in sequences:
            model(sequence, use_cache=False)

    began = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").to(options.device)
    model = mtq.quantize(model, configuration(options.recipe, options.scheme), calibrate)
    calibrated = time.monotonic()
    export_hf_checkpoint(model, export_dir=options.output)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)
    report(calibrated - began, time.monotonic() - calibrated, modelopt=modelopt.__version__)


if __name__ == "__main__":
    main()
