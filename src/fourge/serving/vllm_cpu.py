"""A plugin that lets stock vLLM load and run NVFP4 checkpoints on a machine with no GPU.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in each of its processes.
On any platform but the CPU it does nothing. `FOURGE_VLLM_CPU` chooses, for every model loaded from then on:

- unset: what the checkpoint says, W4A4 for NVFP4 and weight-only for NVFP4A16;
- `w4a4`: activations are quantized and dequantized as an engine with FP4 tensor cores does;
- `w4a16`: weights only, as Marlin serves the same checkpoint on GPUs without them.
"""

import os
from collections.abc import Mapping
from typing import Literal, cast, get_args

from fourge.errors import InputError

VARIABLE = "FOURGE_VLLM_CPU"
Mode = Literal["w4a4", "w4a16"]


def register() -> None:
    """Offers our kernel to vLLM's selection on the CPU; calling it again changes nothing.

    Raises InputError for a `FOURGE_VLLM_CPU` that means nothing.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    chosen_mode(os.environ)
    from fourge.nvfp4 import backend
    from fourge.serving.vllm_cpu_kernel import offer_to_vllm

    # vLLM looks through every imported module for kernels, and fails at llvmlite's, so numba must not be among them.
    backend.choose("torch")
    offer_to_vllm()


def chosen_mode(environment: Mapping[str, str]) -> Mode | None:
    """The arithmetic that `FOURGE_VLLM_CPU` asks for; None, when it is unset or empty, leaves it to the checkpoint.

    Raises InputError for an unknown value.
    """
    value = environment.get(VARIABLE, "")
    if not value:
        return None
    if value not in get_args(Mode):
        raise InputError(f"{VARIABLE}={value} is not known; set it to {' or '.join(get_args(Mode))}, or unset it")
    return cast(Mode, value)


def quantizes_activations(mode: Mode | None, has_input_scale: bool) -> bool:
    """Whether a Linear runs W4A4; `has_input_scale` is whether the checkpoint carries a global scale for its input.

    Raises InputError where W4A4 is asked of a weight-only checkpoint.
    """
    if mode == "w4a4" and not has_input_scale:
        raise InputError(
            f"{VARIABLE}=w4a4, but the checkpoint is weight-only (NVFP4A16) and has no input scales; "
            "unset it, or quantize with --scheme NVFP4"
        )
    return has_input_scale if mode is None else mode == "w4a4"
