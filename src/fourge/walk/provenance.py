"""`fourge.json`: what a checkpoint was made from and how, and the SHA-256 of every file on both sides.

It stays with the published directory, where `.fourge` does not go. Nothing in it depends on when, where or in how many
attempts the run was made: no times, no host, no path but those that the user typed.
"""

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fourge.checkpoint.durable import json_text
from fourge.checkpoint.folder import CARD, CONFIG, INDEX
from fourge.checkpoint.reader import Checkpoint
from fourge.progress import WalkProgress, format_bytes
from fourge.walk.job import Job, sha256_file
from fourge.walk.source_digests import SourceDigests

_FORMAT = 1
_ABOUT = "What this checkpoint was made from and how; `fourge verify` holds the files against it."


def describe_provenance(job: Job, source: Checkpoint, digests: SourceDigests, index: dict[str, Any]) -> dict[str, Any]:
    """The content of `fourge.json` for a job of which all but the `index` is written; `job.result` is there.

    Files are `{name: {size, sha256}}`; of the source's, `digests` knows those with tensors. The card is not among
    the output's: it is written, and rewritten, after the weights. `smoothing` has what was folded, layer by layer:
    without it the weights could not be held against the source's.
    """
    assert job.result is not None
    repository, revision = hub_snapshot(source.directory)
    shards = {record.shard: {"size": record.size, "sha256": record.sha256} for record in job.records}
    beside = [job.output / CONFIG, *(job.output / path.name for path in source.sidecars() if path.name != CARD)]
    smoothing = [record.measures["smoothing"] for record in job.records[1:-1]] if job.settings["smooth"] else []
    versions = {key: job.fingerprint[key] for key in ("fourge", "torch", "transformers")}
    return {
        "about": _ABOUT,
        "format": _FORMAT,
        "settings": job.settings,
        "source": {
            "name": job.settings["model"],
            "repository": repository,
            "revision": revision,
            "files": digests.finish() | {path.name: _digest(path) for path in _small_files(source)},
        },
        "output": {"files": shards | {path.name: _digest(path) for path in beside} | {INDEX: _text_digest(index)}},
        "versions": versions
        | {"compressed-tensors": version("compressed-tensors"), "python": platform.python_version()},
        "smoothing": smoothing,
        **{key: job.result[key] for key in ("data", "events", "dropped_tensors", "fidelity")},
    }


def hub_snapshot(directory: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a hub cache's snapshot (`models--ORG--NAME/snapshots/COMMIT`), else None and None."""
    place = directory.absolute()
    model = place.parent.parent
    if place.parent.name != "snapshots" or not model.name.startswith("models--"):
        return None, None
    return model.name.removeprefix("models--").replace("--", "/", 1), place.name


def source_files(source: Checkpoint) -> list[Path]:
    """Every file of the source that the output depends on or carries: JSON documents, weights, sidecars."""
    return [*sorted({info.path for info in source.tensors.values()}), *_small_files(source)]


def _small_files(source: Checkpoint) -> list[Path]:
    return [*(source.directory / name for name in sorted(source.documents)), *source.sidecars()]


def hash_files(paths: Iterable[Path], title: str) -> dict[str, dict[str, Any]]:
    """`{name: {size, sha256}}` of files, each read once in blocks; a step of the bar each, as wide as it is long."""
    paths = list(paths)
    sizes = [path.stat().st_size for path in paths]
    digests = {}
    with WalkProgress(title, len(paths), costs=[float(size) for size in sizes]) as progress:
        for path, size in zip(paths, sizes, strict=True):
            sha256 = sha256_file(path, lambda read, size=size: progress.advance(read / size, read=read))  # type: ignore[misc]
            digests[path.name] = {"size": size, "sha256": sha256}
            progress.finish_step(path.name, format_bytes(size), {})
    return digests


def _digest(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def _text_digest(content: object) -> dict[str, Any]:
    raw = json_text(content).encode()
    return {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
