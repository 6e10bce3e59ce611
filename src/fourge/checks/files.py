"""The files themselves: readable and in agreement with the index, finished, and as they were committed."""

from pathlib import Path

from fourge.checkpoint.folder import CONFIG, regular_file
from fourge.checkpoint.header import parse_object
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.report import Check, conclude, count, skipped
from fourge.errors import InputError
from fourge.progress import WalkProgress, format_bytes
from fourge.walk.job import FOLDER, INDEX, Manifest, StepRecord, read_manifest, sha256_file

_MEND = "copy it again from where it was written, or quantize again with --restart"


def require_quantized(output: Path) -> None:
    """Raises InputError for what cannot be verified at all: no directory, no checkpoint, or not a quantized one.

    A directory of an unfinished job has no config.json yet; that is for `check_files` to say.
    """
    if not output.is_dir():
        raise InputError(f"{output}: no such directory; give the one that `fourge quantize` wrote")
    config = output / CONFIG
    if not config.is_file():
        if (output / FOLDER).is_dir():
            return
        raise InputError(f"{output}: has no {CONFIG}; give a quantized checkpoint's directory")
    try:
        content = parse_object(config.read_bytes(), str(config))
    except InputError:
        return  # a damaged one: a failure to report, not a wrong directory
    if "quantization_config" not in content:
        raise InputError(
            f"{config}: has no quantization_config, so nothing here is quantized; "
            "give the directory that `fourge quantize` wrote"
        )


def read_job(output: Path) -> tuple[Manifest | None, list[str]]:
    """The manifest of the job that wrote `output`, None where there is none; what is wrong with it."""
    if not (output / FOLDER / "job.json").exists():
        return None, []
    try:
        return read_manifest(output), []
    except InputError as error:
        return None, [str(error)]


def check_files(output: Path, manifest: Manifest | None, damage: list[str]) -> tuple[Check, Checkpoint | None]:
    """Config, index and every header; leftovers; whether the job is finished. None where it cannot be opened."""
    failures = list(damage)
    if (output / FOLDER).is_dir() and not (output / INDEX).exists():
        done = 0 if manifest is None else len(manifest.records)
        failures.append(
            f"{output}: the job is not finished ({count(done, 'step')} committed); "
            "run the same `fourge quantize` command again"
        )
        return conclude("files", "an unfinished job", failures), None
    failures += [f"{path}: left behind by a stopped run; delete it" for path in _leftovers(output)]
    try:
        checkpoint = Checkpoint.open(output)
    except InputError as error:
        return conclude("files", "config, index and headers", [*failures, str(error)]), None
    shards = {info.path for info in checkpoint.tensors.values()}
    failures += [
        f"{path}: weights that the index does not name; delete it"
        for path in sorted(output.glob("*.safetensors"))
        if path not in shards
    ]
    size = sum(info.nbytes for info in checkpoint.tensors.values())
    found = [count(len(shards), "shard"), count(len(checkpoint.tensors), "tensor"), format_bytes(size)]
    return conclude("files", ", ".join(found), failures), checkpoint


def _leftovers(output: Path) -> list[Path]:
    return sorted([*output.glob("*.tmp"), *(output / FOLDER).glob("*.tmp"), *(output / FOLDER).glob("hidden-*.bin")])


def check_digests(output: Path, manifest: Manifest | None) -> Check:
    """Size and SHA-256 of every shard as the job committed it: finds a single flipped bit."""
    if manifest is None:
        return skipped("digests", f"no readable {FOLDER}/job.json to say what was written")
    failures: list[str] = []
    with WalkProgress("digests", len(manifest.records)) as progress:
        for record in manifest.records:
            failure = _digest_failure(output, record, progress)
            if failure is not None:
                failures.append(failure)
            progress.finish_step(record.shard, "as committed" if failure is None else "FAILED", {})
    total = format_bytes(sum(record.size for record in manifest.records))
    return conclude("digests", f"SHA-256 of {count(len(manifest.records), 'shard')}, {total}", failures)


def _digest_failure(output: Path, record: StepRecord, progress: WalkProgress) -> str | None:
    try:
        path = regular_file(output, record.shard)
    except InputError as error:
        return str(error)
    size = path.stat().st_size
    if size != record.size:
        return f"{path} has {size} bytes, {record.size} were committed; {_MEND}"
    if sha256_file(path, lambda read: progress.advance(read / size, read=read)) != record.sha256:
        return f"{path} is not what was committed (its SHA-256 differs); {_MEND}"
    return None
