"""What a walk over lm-eval's requests keeps on disk: a walk's folder (`walk_folder.py`) that ends in answers.

    FOLDER/
      answers.npz        what the walk found out, a request; there when job.json has a result

Steps are the embedding, every decoder layer, the head; the last one commits by renaming the answers.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fourge.checkpoint.durable import replaced
from fourge.errors import InputError
from fourge.walk import walk_folder
from fourge.walk.job import sha256_file
from fourge.walk.walk_folder import WalkFolder

_SAID = {
    "requests": "with other requests (tasks, shots, limit, template or tokenizer)",
    "baseline": "with another --baseline",
    "quantized": "with another quantized checkpoint",
}


class ScoringJob(WalkFolder):
    """A folder held by this process, new or continued. `checksums` has an entry a committed step."""

    user = "another evaluation"
    said = _SAID

    @property
    def _answers_path(self) -> Path:
        return self.folder / "answers.npz"

    def finish(self, answers: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Commits the last step: the answers, and `facts` (JSON values) beside them."""
        with replaced(self._answers_path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **answers)
        self.conclude({"answers_sha256": sha256_file(self._answers_path), **facts})

    def answers(self) -> dict[str, np.ndarray]:
        """What `finish` was given; InputError where the file is not what was committed."""
        assert self.result is not None
        path = self._answers_path
        if not path.is_file() or sha256_file(path) != self.result["answers_sha256"]:
            raise InputError(f"{path} is gone or not what was written; walk again with --restart")
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)


def require_same(folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """InputError where what is in `folder` was begun with another fingerprint, naming the first difference."""
    walk_folder.require_same(folder, ours, theirs, _SAID)


def digest_requests(keys: list[bytes]) -> str:
    """SHA-256 in hexadecimal over the requests' keys in order."""
    return hashlib.sha256(b"".join(keys)).hexdigest()
