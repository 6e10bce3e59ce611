"""`fourge.json` beside the files: whether they are those that were written, and the source the one they came from."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fourge.checkpoint.folder import CARD, PROVENANCE, regular_file
from fourge.checkpoint.header import parse_object
from fourge.checkpoint.modelopt import is_modelopt
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.report import Check, conclude, count, skipped
from fourge.errors import InputError
from fourge.walk.job import Manifest
from fourge.walk.provenance import hash_files, source_files

_NAME = "provenance"

Files = Mapping[str, Mapping[str, Any]]


def check_provenance(checkpoint: Checkpoint, manifest: Manifest | None, source: Checkpoint | None) -> Check:
    """Every output file, and with a `source` every one of its files, has the recorded size and SHA-256.

    What the job's own `manifest` says is held against the record; that the shard has those bytes is for the check
    of the digests, so that nothing is read twice. The card may change at any time on both sides.
    """
    path = checkpoint.directory / PROVENANCE
    if not path.exists():
        return skipped(_NAME, f"no {PROVENANCE} to say what was written and from what")
    if is_modelopt(checkpoint.config.get("quantization_config")):
        return skipped(_NAME, f"{PROVENANCE} describes the layout that this was converted from")
    try:
        output, origin = read_recorded_files(path)
    except InputError as error:
        return conclude(_NAME, "the record of the files", [str(error)])
    committed = {} if manifest is None else {record.shard: record.sha256 for record in manifest.records}
    failures = list(_output_failures(checkpoint, output, committed))
    detail = f"SHA-256 of {count(len(output), 'file')}"
    if source is not None:
        failures += _source_failures(source, origin)
        detail += f", and of the source's {len(origin.keys() - {CARD})}"
    return conclude(_NAME, detail, failures)


def read_recorded_files(path: Path) -> tuple[Files, Files]:
    """The output's and the source's files that a `fourge.json` records; InputError where it is damaged."""
    stored = parse_object(regular_file(path.parent, path.name).read_bytes(), str(path))
    try:
        output, source = stored["output"]["files"], stored["source"]["files"]
        for files in (output, source):
            for entry in files.values():
                int(entry["size"]), str(entry["sha256"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error!r}); copy it again from where it was written") from error
    return output, source


def _output_failures(checkpoint: Checkpoint, recorded: Files, committed: Mapping[str, str]) -> Iterator[str]:
    shards = {info.path.name for info in checkpoint.tensors.values()}
    for name in sorted(shards - recorded.keys()):
        yield f"{name}: weights that {PROVENANCE} does not name"
    to_read = []
    for name in sorted(recorded):
        if name in committed:
            if committed[name] != recorded[name]["sha256"]:
                yield f"{name} is not the file of {PROVENANCE}: the job committed another (its SHA-256 differs)"
            continue
        try:
            to_read.append(regular_file(checkpoint.directory, name))
        except InputError as error:
            yield str(error)
    found = hash_files(to_read, "provenance")
    yield from (f"{name} {why}" for name, why in _differences(found, recorded))


def _source_failures(source: Checkpoint, recorded: Files) -> Iterator[str]:
    found = hash_files([path for path in source_files(source) if path.name != CARD], "source digests")
    for name in sorted(recorded.keys() - found.keys() - {CARD}):
        yield f"the source lacks {name}, which this was made from"
    for name in sorted(found.keys() - recorded.keys()):
        yield f"the source's {name} was not there when this was made"
    yield from (f"the source's {name} {why}" for name, why in _differences(found, recorded))


def _differences(found: Files, recorded: Files) -> Iterator[tuple[str, str]]:
    for name in sorted(found.keys() & recorded.keys()):
        if found[name]["size"] != recorded[name]["size"]:
            yield name, f"has {found[name]['size']} bytes, {PROVENANCE} says {recorded[name]['size']}"
        elif found[name]["sha256"] != recorded[name]["sha256"]:
            yield name, f"is not the file of {PROVENANCE} (its SHA-256 differs)"
