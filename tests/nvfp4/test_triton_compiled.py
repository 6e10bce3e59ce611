"""Triton's kernels as a GPU gets them, and its interpreter where it was made to be like one.

The interpreter shows what kernels say. That nothing else is computed only the compiled code shows: no product and sum
contracted, no approximate division, no numbers flushed to zero. Compiling needs no GPU.
"""

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

JOBS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("largest", "bf16", {}, {}),
    ("encode", "bf16", {"given": False}, {}),
    ("encode", "fp32", {"given": True}, {}),
    ("decode", "bf16", {}, {}),
    ("fake_quantize", "bf16", {}, {}),
    ("squared_errors", "fp32", {}, {}),
    ("squared_errors", "fp32", {}, {"enable_fp_fusion": True}),
    ("search", "fp32", {}, {}),
]
"""Kernel, dtype of values, its constants, and options that a launch does not have."""

SLOW_JOBS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [("replay_group", "fp32", {}, {})]

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fourge.nvfp4 import triton_kernels, triton_replay, triton_search

MODULES = {"replay_group": triton_replay, "search": triton_search}

TYPES = {"packed_ptr": "*u8", "codes_ptr": "*u8", "partial_ptr": "*i32", "offsets_ptr": "*i32"}

def type_of(argument, dtype):
    types = TYPES | {"words_ptr": {"bf16": "*i32", "fp32": "*i64"}[dtype], "result_ptr": "*" + dtype}
    return types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")

def compiled(name, dtype, constants, options):
    kernel = getattr(MODULES.get(name, triton_kernels), name)
    constants = {"block": 32, **constants}
    signature = {argument: type_of(argument, dtype) for argument in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 1, **triton_kernels.OPTIONS, **options}
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {stage: done.asm[stage] for stage in ("llir", "ptx")}

print(json.dumps([compiled(*job) for job in json.loads(sys.argv[1])]))
"""


@pytest.mark.parametrize("jobs", [JOBS, pytest.param(SLOW_JOBS, marks=pytest.mark.slow)], ids=["loops", "replay"])
def test_every_operation_is_rounded_once_and_as_ieee_says(jobs: list[Any], tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for job, code in zip(jobs, json.loads(done.stdout), strict=True):
        found = set(re.findall(r"\b(?:fma|mad|mul|add|sub|div|rcp|sqrt|ex2)\.[a-z.]*f32\b", code["ptx"]))
        assert found <= {"fma.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32", "div.rn.f32"} or job[3], job
        assert "ftz" not in code["ptx"], job
        asked_for = re.findall(r"call .*@llvm\.fma\.v?(\d*)f32\(", code["llir"])
        contracted = code["ptx"].count("fma.rn.f32") - sum(int(width or 1) for width in asked_for)
        assert bool(contracted) == job[3].get("enable_fp_fusion", False), job


def exactly(x: float, y: float, z: float) -> float:
    """x · y + z rounded to FP32 once: FP64's numbers are exact as fractions, and so is the comparison with ties."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    near = torch.tensor(float(exact)).float()
    around = [near, torch.nextafter(near, torch.tensor(torch.inf)), torch.nextafter(near, torch.tensor(-torch.inf))]
    even = lambda number: int(number.view(torch.int32)) & 1  # noqa: E731
    return min((n for n in around if n.isfinite()), key=lambda n: (abs(Fraction(n.item()) - exact), even(n))).item()


def test_interpreted_fma_rounds_once() -> None:
    from fourge.nvfp4.triton_interpreter import fused_multiply_add

    generator = torch.Generator().manual_seed(0)
    x, y, z = torch.randn(3, 400, generator=generator)
    z[:100] = -(x * y)[:100]  # what is left is the product's rounding
    ulp = 2.0**-23
    x[100:200] = 2.0**-12 * (1 + ulp * torch.arange(100))
    y[100:200] = 2.0**-12 * (1 + ulp * (torch.arange(100) % 5 - 2))
    z[100:200] = 1 + ulp * (torch.arange(100) % 2)  # a tie, but for the product's last bits
    x[200:300] *= 2.0**-75
    y[200:300] *= 2.0**-74
    z[200:300] = 2.0**-149 * (torch.arange(100) % 7 - 3)
    fused = fused_multiply_add(x.numpy(), y.numpy(), z.numpy()).tolist()
    assert fused == [exactly(*numbers) for numbers in zip(x.tolist(), y.tolist(), z.tolist(), strict=True)]
    assert fused != (x * y + z).tolist()
