"""Which sequences of a source a run calibrates on, which ones choose, and which ones it is probed with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fourge.data.sources import Pool, Workbench, open_pool
from fourge.data.tokens import TokenSet, TokenSets
from fourge.errors import InputError

_FEWEST_TOKENS = 2
"""One token predicts nothing."""


@dataclass(frozen=True)
class DataRequest:
    """What the user asked for. Validation comes from `source`; with `probe_source` None the probe does, too."""

    source: str
    num_calibration_samples: int
    num_probe_samples: int
    max_seq_length: int
    seed: int
    num_validation_samples: int = 0
    probe_source: str | None = None


def load_token_sets(
    request: DataRequest,
    model_directory: Path,
    vocab_size: int,
    sample: Callable[[int, int, int], list[np.ndarray]] | None,
) -> TokenSets:
    """The calibration, validation and probe sequences that `request` names, for the model in `model_directory`.

    A source is `random`, `self`, a local file or saved dataset, or a hub dataset; with `self`,
    `sample(count, length, seed)` draws from the model, and is None where that is not possible.

    Records (of a text file: pieces) are shuffled by the seed. Calibration takes from the front, validation goes on
    from there, and the probe then takes from the back; each leaves out what was taken before, so no sequence is in
    two sets, nor twice in one. More calibration samples add to those there were. The calibration set depends on
    source, tokenizer, `num_calibration_samples`, `max_seq_length` and `seed`, validation also on
    `num_validation_samples`, and neither on the probe. The probe depends on its own source, tokenizer,
    `num_probe_samples`, `max_seq_length` and `seed`, and on the other two only where a sequence of theirs turns up
    among those that it would have taken.

    `vocab_size` is the model's: no token reaches it. Raises InputError for anything that the caller can mend.
    """
    _require_sensible(request)
    bench = Workbench(
        model_directory,
        vocab_size,
        sample,
        request.max_seq_length,
        request.seed,
        request.num_calibration_samples,
        request.num_validation_samples,
        request.num_probe_samples,
    )
    pool = open_pool("--calibration", request.source, bench)
    probe_pool = pool if request.probe_source is None else open_pool("--probe", request.probe_source, bench)
    seen: dict[bytes, str] = {}
    calibration = _Selection("calibration", pool, request.num_calibration_samples)
    calibration.fill(pool.calibration, seen)
    validation = _Selection("validation", pool, request.num_validation_samples)
    validation.fill(pool.validation, seen)
    probe = _Selection("probe", probe_pool, request.num_probe_samples)
    if probe_pool is not pool:
        _require_enough(calibration, validation)
    probe.fill(probe_pool.probe, seen)
    _require_enough(*([calibration, validation, probe] if probe_pool is pool else [probe]))
    return _finish(request, calibration, validation, probe)


class _Selection:
    """The sequences taken for one role, and how many were left out, by reason."""

    def __init__(self, role: str, pool: Pool, asked: int) -> None:
        self.role = role
        self.pool = pool
        self.asked = asked
        self.sequences: list[np.ndarray] = []
        self.skipped = {"too_short": 0, "repeated": 0, "in_calibration": 0, "in_validation": 0}

    def fill(self, candidates: Iterator[np.ndarray], seen: dict[bytes, str]) -> None:
        """Takes as many as asked for, if there are; `seen` knows the role of every sequence taken so far."""
        self.sequences = list(islice(self._usable(candidates, seen), self.asked))

    def _usable(self, candidates: Iterator[np.ndarray], seen: dict[bytes, str]) -> Iterator[np.ndarray]:
        for candidate in candidates:
            sequence = np.asarray(candidate, dtype=np.int32)
            key = sequence.tobytes()
            if len(sequence) < _FEWEST_TOKENS:
                self.skipped["too_short"] += 1
            elif key in seen:
                self.skipped["repeated" if seen[key] == self.role else f"in_{seen[key]}"] += 1
            else:
                seen[key] = self.role
                yield sequence


def _finish(request: DataRequest, *selections: _Selection) -> TokenSets:
    provenance: dict[str, Any] = {
        "source": request.source,
        "probe_source": request.probe_source,
        "seed": request.seed,
        "max_seq_length": request.max_seq_length,
    }
    sets = {}
    for selection in selections:
        tokens = sets[selection.role] = TokenSet(tuple(selection.sequences))
        provenance[selection.role] = {
            "sequences": len(tokens.sequences),
            "tokens": tokens.num_tokens,
            "sha256": tokens.digest(),
            "skipped": selection.skipped,
            "origin": selection.pool.origin,
        }
    return TokenSets(**sets, provenance=provenance)


def _require_sensible(request: DataRequest) -> None:
    for option, value, least in (
        ("--num-calibration-samples", request.num_calibration_samples, 1),
        ("--num-validation-samples", request.num_validation_samples, 0),
        ("--num-probe-samples", request.num_probe_samples, 0),
        ("--max-seq-length", request.max_seq_length, _FEWEST_TOKENS),
        ("--seed", request.seed, 0),
    ):
        if value < least:
            raise InputError(f"{option} {value}: must be {least} or more")


def _require_enough(*selections: _Selection) -> None:
    """Raises InputError where the selections, all of one pool, have fewer sequences than were asked for."""
    found = sum(len(selection.sequences) for selection in selections)
    if found == sum(selection.asked for selection in selections):
        return
    pool = selections[0].pool
    reasons = {
        reason.replace("_", " "): sum(selection.skipped[reason] for selection in selections)
        for reason in selections[0].skipped
    }
    left_out = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    wanted = [selection for selection in selections if selection.asked]
    raise InputError(
        f"{pool.name} has {found} usable {pool.unit}{f' ({left_out})' if left_out else ''}; asked for "
        f"{' and '.join(f'{selection.asked} {selection.role}' for selection in wanted)}: lower "
        f"{' / '.join(f'--num-{selection.role}-samples' for selection in wanted)}, or {pool.mend}"
    )
