"""Whether a running server computes what we compute: the same tokens scored by both, and what may lie between."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fourge.serving.api import Client

SEQUENCES = 4
TOKENS = 128
"""Of the probe, so that the lane takes minutes on a large model: its layers are read once whatever the number."""

MOST_MEAN_DIFFERENCE = 0.1
STANDARD_ERRORS = 4.0
MOST_TOKEN_DIFFERENCE = {"W4A4": 1.5, "W4A16": 0.25}
"""Nats. SmolLM2-135M on vLLM 0.32's CPU build was .73 and .05 away by token, .07 ± .05 and .008 in the mean."""


@dataclass(frozen=True)
class Comparison:
    """Log-probabilities of the same next tokens, theirs and ours, in nats; both computed as `numerics` says.

    `mean_difference` is that of the means, `token_difference` the mean of the absolute differences; each has its
    limit. vLLM computes in BF16 where our lane, on a CPU, computes in FP32. Under W4A4 that moves some activations
    across a rounding boundary, and with them everything after, so that single tokens differ by much and the means
    by no more than chance: hence four standard errors in their limit. Under W4A16 nothing is rounded but BF16
    itself, and the tokens agree one by one. A file that was read wrongly (scales mixed up, nibbles swapped, a layer
    left out) is nats away in both.
    """

    numerics: str
    tokens: int
    served: float
    ours: float
    mean_difference: float
    mean_limit: float
    token_difference: float
    token_limit: float

    @property
    def agrees(self) -> bool:
        return abs(self.mean_difference) <= self.mean_limit and self.token_difference <= self.token_limit


@dataclass(frozen=True)
class Trial:
    """Token sequences, and our log-probabilities of them under `numerics`."""

    numerics: str
    sequences: tuple[np.ndarray, ...]
    ours: tuple[np.ndarray, ...]

    def hold_against(self, client: Client, model: str) -> Comparison:
        """Asks the server for its own."""
        served = [np.array(client.prompt_log_probs(model, sequence.tolist())) for sequence in self.sequences]
        return compare(served, self.ours, self.numerics)


def compare(served: Sequence[np.ndarray], ours: Sequence[np.ndarray], numerics: str) -> Comparison:
    """Compares log-probabilities sequence by sequence, FP64 1-d each; NaN agrees with nothing."""
    theirs, own = np.concatenate(served), np.concatenate(ours)
    assert theirs.shape == own.shape
    differences = theirs - own
    standard_error = float(differences.std() / np.sqrt(len(differences)))
    return Comparison(
        numerics=numerics,
        tokens=len(own),
        served=float(theirs.mean()),
        ours=float(own.mean()),
        mean_difference=float(differences.mean()),
        mean_limit=MOST_MEAN_DIFFERENCE + STANDARD_ERRORS * standard_error,
        token_difference=float(np.abs(differences).mean()),
        token_limit=MOST_TOKEN_DIFFERENCE[numerics],
    )
