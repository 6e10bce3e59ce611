"""The job directory `OUT/.fourge/`: the only truth about how far a run is, safe to kill at any instant.

Commit order of step i (embedding, one a decoder layer, head):

    1. shard i           written as .fourge/shard.tmp, fsync, renamed to OUT/model-…, fsync of the folder
    2. hidden states     for step i + 1, written as .fourge/hidden.tmp, likewise
    3. job.json          replaced: from here on step i is committed
    4. hidden states     of step i deleted

What a crash leaves: before 3, files of step i that nothing refers to, written over by the next run; after 3, at
most the old hidden states beside the new, deleted by the next run. Both ways exactly one step is the next one.
`metrics.jsonl` is a log for people (times differ from run to run) and never read for a decision.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from fourge.checkpoint.durable import fsync_directory, replace_durably, write_json
from fourge.checkpoint.folder import PROVENANCE
from fourge.errors import InputError
from fourge.settings import FREE_ON_CONTINUATION, first_difference
from fourge.walk.held_folder import Held, WalkPaths, require_committed
from fourge.walk.hidden import HiddenLayout

FOLDER = ".fourge"
INDEX = "model.safetensors.index.json"
_BLOCK = 16 << 20


@dataclass(frozen=True)
class StepRecord:
    """What job.json keeps of a committed step: its shard, the hidden states after it, what was measured."""

    shard: str
    size: int
    sha256: str
    hidden_checksum: int | None
    measures: dict[str, Any]
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class Manifest:
    """The content of job.json: what the run was asked for, the committed steps, and, once finished, the result."""

    settings: dict[str, Any]
    fingerprint: dict[str, Any]
    records: list[StepRecord]
    events: list[dict[str, Any]]
    result: dict[str, Any] | None


def read_manifest(output: Path) -> Manifest:
    """What `OUT/.fourge/job.json` says; InputError when it is damaged."""
    path = output / FOLDER / "job.json"
    try:
        stored = json.loads(path.read_text())
        records = [StepRecord(**record) for record in stored["steps"]]
        return Manifest(stored["settings"], stored["fingerprint"], records, stored["events"], stored["result"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); start over with --restart") from error


def shard_name(step: int, num_steps: int) -> str:
    """`model-00001-of-00128.safetensors` for step 0 of 128."""
    return f"model-{step + 1:05d}-of-{num_steps:05d}.safetensors"


def sha256_file(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of a file in hexadecimal, read in blocks; `progress` gets the size of each."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


class JobFolder(WalkPaths):
    """Where a job keeps what; also for the ranks that work at it and do not hold it."""

    def __init__(self, output: Path) -> None:
        super().__init__(output / FOLDER)
        self.output = output

    @property
    def tokens_path(self) -> Path:
        return self.folder / "tokens.safetensors"

    @property
    def shard_temporary(self) -> Path:
        return self.folder / "shard.tmp"

    @property
    def finished(self) -> bool:
        return (self.output / INDEX).exists()


class Job(JobFolder, Held):
    """An output directory held by this process."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        super().__init__(output)
        self.fingerprint = dict(fingerprint)
        self.settings = dict(settings)
        self.records: list[StepRecord] = []
        self.events: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None
        self.continued = False

    # Opening

    def open(self, *, restart: bool = False) -> Self:
        """Takes the directory: a new job, or the one there continued.

        Raises InputError when it holds something else, when another process holds it, and when the settings, the
        source or the versions are not those the job began with (the key is named).
        """
        self._refuse_foreign()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock(f"{self.output} is being written by another process; wait for it or name another -o")
        try:
            if restart:
                self._clear()
            if self.manifest_path.exists():
                self._load()
            else:
                self._save()
        except BaseException:
            self.close()
            raise
        return self

    def _refuse_foreign(self) -> None:
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file; name a new directory with -o")
        if self.output.is_dir() and not self.folder.is_dir() and any(self.output.iterdir()):
            raise InputError(f"{self.output} holds other files and no job of ours; name a new directory with -o")

    def _clear(self) -> None:
        # The manifest goes first: without it, what else is left is nobody's and is written over.
        self.manifest_path.unlink(missing_ok=True)
        for path in self.output.glob("model-*-of-*.safetensors"):
            path.unlink()
        for name in (INDEX, "config.json", PROVENANCE):
            (self.output / name).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _load(self) -> None:
        stored = read_manifest(self.output)
        theirs = stored.fingerprint
        key = first_difference(self.fingerprint, theirs)
        if key is not None:
            raise InputError(
                f"{self.output} was begun with {key} = {theirs.get(key)!r}, now it is {self.fingerprint.get(key)!r}; "
                "give the same value to continue, or --restart to start over"
            )
        self.records, self.events, self.result = stored.records, stored.events, stored.result
        self.continued = True
        for setting in FREE_ON_CONTINUATION:
            before, now = stored.settings.get(setting), self.settings.get(setting)
            if before != now and not self.finished:
                self.events.append({"event": "continued", "setting": setting, "before": before, "now": now})

    # Committing

    @property
    def next_step(self) -> int:
        return len(self.records)

    def commit(self, record: StepRecord) -> None:
        """Commits step `next_step` from the two temporary files, in the order at the head of this file."""
        step = self.next_step
        replace_durably(self.shard_temporary, self.output / record.shard)
        if record.hidden_checksum is not None:
            replace_durably(self.hidden_temporary, self.hidden_path(step + 1))
        self.records.append(record)
        self._save()
        self.hidden_path(step).unlink(missing_ok=True)

    def _save(self) -> None:
        write_json(
            self.manifest_path,
            {
                "settings": self.settings,
                "fingerprint": self.fingerprint,
                "steps": [vars(record) for record in self.records],
                "events": self.events,
                "result": self.result,
            },
        )

    def finish(self, result: dict[str, Any], index: dict[str, Any], write_rest: Callable[[], None]) -> None:
        """Records the result, lets `write_rest` put config and sidecar files down, then the index: finished."""
        self.result = result
        self._save()
        write_rest()
        write_json(self.output / INDEX, index)
        self.remove_leftovers()
        fsync_directory(self.folder)

    # Continuing

    def check_committed(self, hidden: HiddenLayout | None, checked: Callable[[str], None]) -> None:
        """Reads back every committed shard and the hidden states that come next; InputError names what is wrong.

        `checked` is called with the name of every shard that was found as it should be.
        """
        for record in self.records:
            path = self.output / record.shard
            require_committed(path, record.size, "SHA-256", partial(sha256_file, path), record.sha256)
            checked(record.shard)
        checksum = self.records[-1].hidden_checksum if self.records else None
        if hidden is not None and checksum is not None:
            self._require_hidden(hidden, checksum)

    def remove_leftovers(self) -> None:
        """Deletes what a killed run left: temporary files, and hidden states that no step will read any more."""
        for path in [*self.folder.iterdir(), *self.output.glob(".*.tmp")]:
            needed = path == self.hidden_path(self.next_step) and not self.finished
            if path.suffix == ".tmp" or (path.name.startswith("hidden-") and not needed):
                path.unlink()
