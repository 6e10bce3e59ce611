"""Fourge turns BF16 language models of any size into verified NVFP4 checkpoints, on one ordinary machine.

The verbs are functions here and commands of the same names: `fourge.plan`, `fourge.sensitivity`, `fourge.quantize`,
`fourge.verify`, `fourge.convert`, `fourge.evaluate`, `fourge.compare`, `fourge.card`, `fourge.page`, `fourge.sign`,
`fourge.sbom`, `fourge.push`, `fourge.serve`, `fourge.chat`. Their modules import torch and transformers when called,
so that `import fourge` stays light.
"""

from fourge._version import __version__
from fourge.card import CardResult, card
from fourge.chat import ChatResult, chat
from fourge.compare import CompareReport, compare
from fourge.convert import ConvertResult, convert
from fourge.errors import InputError
from fourge.evaluate import EvaluateResult, evaluate
from fourge.page import PageResult, page
from fourge.plan import PlanReport, plan
from fourge.push import PushResult, push
from fourge.quantize import QuantizeResult, quantize
from fourge.sbom import SbomResult, sbom
from fourge.sensitivity import SensitivityResult, sensitivity
from fourge.serve import ServeResult, serve
from fourge.sign import SignResult, sign
from fourge.verify import VerifyReport, verify

__all__ = [
    "CardResult",
    "ChatResult",
    "CompareReport",
    "ConvertResult",
    "EvaluateResult",
    "InputError",
    "PageResult",
    "PlanReport",
    "PushResult",
    "QuantizeResult",
    "SbomResult",
    "SensitivityResult",
    "ServeResult",
    "SignResult",
    "VerifyReport",
    "__version__",
    "card",
    "chat",
    "compare",
    "convert",
    "evaluate",
    "page",
    "plan",
    "push",
    "quantize",
    "sbom",
    "sensitivity",
    "serve",
    "sign",
    "verify",
]
