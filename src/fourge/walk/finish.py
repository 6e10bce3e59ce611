"""The last act of a job: the files beside the weights, config, provenance, then the index: now it is a checkpoint."""

from typing import Any

from fourge.checkpoint.compressed_tensors import with_quantization
from fourge.checkpoint.durable import copy_file, write_json
from fourge.checkpoint.folder import CONFIG, PROVENANCE
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import Checkpoint
from fourge.checkpoint.writer import index_json
from fourge.settings import KvCacheScheme
from fourge.walk.job import Job, shard_name
from fourge.walk.provenance import describe_provenance
from fourge.walk.source_digests import SourceDigests


def finish_checkpoint(
    job: Job,
    source: Checkpoint,
    digests: SourceDigests,
    layout: Layout,
    kv_cache_scheme: KvCacheScheme | None,
    data: dict[str, Any] | None,
) -> None:
    """Writes what is left of the output directory. `data` is the token sets' provenance, kept in job.json."""
    from fourge.checkpoint.header import read_header

    weight_map: dict[str, str] = {}
    total = 0
    for step in range(layout.num_steps):
        shard = shard_name(step, layout.num_steps)
        tensors, _ = read_header(job.output / shard)
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(info.nbytes for info in tensors.values())

    index = index_json(weight_map, total)

    def write_rest() -> None:
        for path in source.sidecars():
            copy_file(path, job.output / path.name)
        config = with_quantization(source.config, layout.schemes, layout.kept, kv_cache_scheme)
        write_json(job.output / CONFIG, config)
        write_json(job.output / PROVENANCE, describe_provenance(job, source, digests, index))

    events = job.events + [
        {"step": layout.step_name(i)} | event for i, record in enumerate(job.records) for event in record.events
    ]
    result = {
        "fidelity": job.records[-1].measures.get("fidelity"),
        "data": data,
        "dropped_tensors": list(layout.dropped),
        "events": events,
    }
    job.finish(result, index, write_rest)
