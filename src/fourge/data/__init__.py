"""From `--calibration X` to token sequences: read, render, choose, keep."""

from fourge.data.sampling import DataRequest, load_token_sets
from fourge.data.tokens import TokenSet, TokenSets, read_token_sets, save_token_sets

__all__ = ["DataRequest", "TokenSet", "TokenSets", "load_token_sets", "read_token_sets", "save_token_sets"]
