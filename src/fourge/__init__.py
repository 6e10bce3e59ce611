"""Fourge turns BF16 language models of any size into verified NVFP4 checkpoints, on one ordinary machine.

The verbs are functions here and commands of the same names: `fourge.plan`, `fourge.quantize`, `fourge.verify`,
`fourge.convert`. Their modules import torch and transformers when called, so that `import fourge` stays light.
"""

from fourge._version import __version__
from fourge.convert import ConvertResult, convert
from fourge.errors import InputError
from fourge.plan import PlanReport, plan
from fourge.quantize import QuantizeResult, quantize
from fourge.verify import VerifyReport, verify

__all__ = [
    "ConvertResult",
    "InputError",
    "PlanReport",
    "QuantizeResult",
    "VerifyReport",
    "__version__",
    "convert",
    "plan",
    "quantize",
    "verify",
]
