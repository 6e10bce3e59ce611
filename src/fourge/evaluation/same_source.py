"""Whether the baseline is the model that OUT was made from, by what `fourge.json` recorded of the source's files.

Another model of the same shape would walk as well, and be compared in silence. Config, tokenizer and the smallest
shard are held against the record; not every shard, for that reads the model once more (`fourge verify` does it).
"""

from pathlib import Path

from fourge.checkpoint.folder import CONFIG, PROVENANCE
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.provenance import read_recorded_files
from fourge.errors import InputError
from fourge.walk.provenance import hash_files

_DOCUMENTS = (CONFIG, "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def require_same_source(quantized: Path, baseline: Path) -> str | None:
    """None where the files looked at are those that `quantized` was made from; else why that is not known.

    Raises InputError that names both directories and the file in which `baseline` is another model.
    """
    unknown = f"whether {quantized} was made from {baseline} was not checked"
    if not (quantized / PROVENANCE).is_file():
        return f"{unknown}: it has no {PROVENANCE}"
    _, recorded = read_recorded_files(quantized / PROVENANCE)
    shards = {info.path for info in Checkpoint.open(baseline).tensors.values()}
    if not all(path.name in recorded for path in shards):
        return f"{unknown}: the weights lie in other files than {PROVENANCE} names"
    documents = [baseline / name for name in _DOCUMENTS if name in recorded and (baseline / name).is_file()]
    smallest = min(shards, key=lambda path: (path.stat().st_size, path.name))
    for name, found in hash_files([*documents, smallest], "baseline digests").items():
        if found != {key: recorded[name][key] for key in found}:
            raise InputError(
                f"--baseline {baseline}: its {name} is not the one that {quantized} was made from (its SHA-256 "
                f"differs from {PROVENANCE}'s); name the model that it was made from"
            )
    return None
