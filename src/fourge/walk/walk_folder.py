"""What a walk that writes no checkpoint keeps on disk, safe to kill at any instant.

    FOLDER/
      job.json           the only truth: the fingerprint, for every committed step the checksum of the hidden states
                         after it and what was measured, and the result once there is one
      hidden-000SS.bin   the hidden states that step SS reads (one file; two while a step commits)
      metrics.jsonl      a log for people, never read for a decision
      lock               held while a process is at work
      hidden.tmp         being written

A step commits by renaming its hidden states, then replacing job.json; then the states it read are deleted. A kill
before job.json's replacement leaves files that nothing refers to, and the next run writes them again; after it, at
most files that it deletes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

from fourge.checkpoint.durable import replace_durably, write_json
from fourge.errors import InputError
from fourge.settings import first_difference
from fourge.walk.held_folder import Held
from fourge.walk.hidden import HiddenLayout


class WalkFolder(Held):
    """A folder held by this process, new or continued. `checksums` and `measures` have an entry a committed step."""

    user: ClassVar[str] = "another process"
    """Who else may have the folder."""
    said: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """How to say that a walk was begun with another value of a fingerprint's key, where the values say nothing."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        super().__init__(folder)
        self.fingerprint = dict(fingerprint)
        self.checksums: list[int] = []
        self.measures: list[Any] = []
        self.result: dict[str, Any] | None = None

    def open(self, *, restart: bool = False) -> Self:
        """Takes the folder; InputError where another process has it, or holds another walk's, or is damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock(f"{self.folder} is in use by {self.user}; wait for it or name another -o")
        try:
            if restart:
                self._clear()
            stored = read_stored(self.folder)
            if stored is None:
                self._save()
            else:
                require_same(self.folder, self.fingerprint, stored["fingerprint"], self.said)
                self.checksums, self.measures, self.result = stored["checksums"], stored["measures"], stored["result"]
            self._remove_leftovers()
        except BaseException:
            self.close()
            raise
        return self

    def _clear(self) -> None:
        # The manifest goes first: without it, what else is left is nobody's.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name != "job.json"):
            if path.name != "lock":
                path.unlink()

    def _remove_leftovers(self) -> None:
        for path in self.folder.iterdir():
            needed = path == self.hidden_path(self.next_step) and self.result is None
            if path.suffix == ".tmp" or (path.name.startswith("hidden-") and not needed):
                path.unlink()

    @property
    def next_step(self) -> int:
        return len(self.checksums)

    def check_hidden(self, layout: HiddenLayout) -> None:
        """Reads back the hidden states that come next; InputError where they are not what was committed."""
        self._require_hidden(layout, self.checksums[-1])

    def commit_hidden(self, checksum: int, measures: Any = None) -> None:
        """Commits step `next_step`, whose hidden states lie whole and forced to disk in `hidden_temporary`."""
        step = self.next_step
        replace_durably(self.hidden_temporary, self.hidden_path(step + 1))
        self.checksums.append(checksum)
        self.measures.append(measures)
        self._save()
        self.hidden_path(step).unlink(missing_ok=True)

    def conclude(self, result: dict[str, Any]) -> None:
        """Commits the last step: `result`, JSON values. No hidden states are needed any more."""
        self.result = result
        self._save()
        self.hidden_path(self.next_step).unlink(missing_ok=True)

    def _save(self) -> None:
        content = {"fingerprint": self.fingerprint, "checksums": self.checksums, "measures": self.measures}
        write_json(self.manifest_path, content | {"result": self.result})


def read_stored(folder: Path) -> dict[str, Any] | None:
    """What `job.json` says, None where there is none; InputError when it is damaged."""
    path = folder / "job.json"
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {*stored} != {"fingerprint", "checksums", "measures", "result"}:
            raise ValueError("its keys are others")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); start over with --restart") from error
    return stored


def require_same(
    folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], said: Mapping[str, str] = MappingProxyType({})
) -> None:
    """InputError where what is in `folder` was begun with another fingerprint, naming the first difference."""
    key = first_difference(ours, theirs)
    if key is not None:
        how = said.get(key, f"with {key} = {theirs.get(key)!r}, now it is {ours.get(key)!r}")
        raise InputError(f"{folder} was begun {how}; --restart starts over, another -o keeps both")
