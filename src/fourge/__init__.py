"""Fourge turns BF16 language models of any size into verified NVFP4 checkpoints, on one ordinary machine.

import torch and transformers when called, so that `import fourge` stays light.
"""

from fourge._version import VERSION as __version__
from fourge.errors import InputError
from fourge.quantize import QuantizeResult, quantize

__all__ = ["InputError", "QuantizeResult", "__version__", "quantize"]
