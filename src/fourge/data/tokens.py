"""Token sequences as a run uses them, and the file that keeps them for a continued run."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fourge.checkpoint.durable import replaced
from fourge.errors import InputError

_ROLES = ("calibration", "validation", "probe")
_PROVENANCE = "provenance"


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token sequences of any lengths, each int32 and 1-d. Two sets hold the same when their digests agree."""

    sequences: tuple[np.ndarray, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def lengths(self) -> np.ndarray:
        """int32 `[sequences]`."""
        return np.array([len(sequence) for sequence in self.sequences], dtype=np.int32)

    @property
    def tokens(self) -> np.ndarray:
        """All sequences one after the other, int32 `[num_tokens]`."""
        return np.concatenate([np.empty(0, np.int32), *self.sequences])

    def digest(self) -> str:
        """SHA-256 in hex over the lengths, then the tokens, both as little-endian int32."""
        return hashlib.sha256(self.lengths.astype("<i4").tobytes() + self.tokens.astype("<i4").tobytes()).hexdigest()

    @classmethod
    def split(cls, tokens: np.ndarray, lengths: np.ndarray) -> "TokenSet":
        """The inverse of `tokens` and `lengths`."""
        return cls(tuple(np.split(tokens, np.cumsum(lengths)[:-1])) if len(lengths) else ())


@dataclass(frozen=True, eq=False)
class TokenSets:
    """What a run fits to (calibration), chooses by (validation) and only reports on (probe): no sequence is in two.

    `provenance` is JSON: `source`, `probe_source`, `seed`, `max_seq_length`, and under each set's name `sequences`,
    `tokens`, `sha256` (the digest), `skipped` (counts by reason) and `origin` (what is known of the source: a
    file's SHA-256, a dataset's revision and split, …).
    """

    calibration: TokenSet
    validation: TokenSet
    probe: TokenSet
    provenance: dict[str, Any]


def save_token_sets(path: Path, sets: TokenSets) -> None:
    """Replaces `path` durably by a safetensors file of `sets`; equal sets give equal bytes.

    For each of the sets it holds `SET.tokens` and `SET.lengths`, int32, and the provenance as JSON in its metadata.
    """
    from safetensors.numpy import save

    arrays = {}
    for role, tokens in zip(_ROLES, (sets.calibration, sets.validation, sets.probe), strict=True):
        arrays[f"{role}.tokens"], arrays[f"{role}.lengths"] = tokens.tokens, tokens.lengths
    # One metadata key only: safetensors keeps several in a hash map, whose order differs from run to run.
    content = save(arrays, metadata={_PROVENANCE: json.dumps(sets.provenance, sort_keys=True)})
    with replaced(path) as temporary:
        temporary.write_bytes(content)


def read_token_sets(path: Path) -> TokenSets:
    """What `save_token_sets` wrote; raises InputError where the file is damaged or is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            provenance = json.loads((file.metadata() or {})[_PROVENANCE])
            # Files of the first version have no validation set.
            sets = {
                role: _checked(
                    file.get_tensor(f"{role}.tokens"), file.get_tensor(f"{role}.lengths"), provenance[role]["sha256"]
                )
                for role in _ROLES
                if role in provenance
            }
            return TokenSets(sets["calibration"], sets.get("validation", TokenSet(())), sets["probe"], provenance)
    except (SafetensorError, LookupError, ValueError) as error:
        raise InputError(f"{path}: the token sequences are damaged ({error}); start over with --restart") from error


def _checked(tokens: np.ndarray, lengths: np.ndarray, recorded: str) -> TokenSet:
    """The set that was written; raises ValueError where it is not the one with the `recorded` digest."""
    if lengths.sum() != len(tokens):
        raise ValueError(f"lengths of {lengths.sum()} tokens, and {len(tokens)} tokens")
    result = TokenSet.split(tokens, lengths)
    if result.digest() != recorded:
        raise ValueError("their digest is not the recorded one")
    return result
