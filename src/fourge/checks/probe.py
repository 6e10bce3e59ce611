"""Which tokens `--deep` walks over, and what the job measured on the same ones."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fourge.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from fourge.checkpoint.reader import Checkpoint
    from fourge.walk.job import Manifest

_MICRO_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class DeepOptions:
    """How `--deep` gets its tokens and computes; field names are the options'. `probe` None takes the job's."""

    probe: str | None
    num_probe_samples: int
    max_seq_length: int
    seed: int
    device: str
    compute_dtype: str


@dataclass(frozen=True)
class Probe:
    """Token sequences, int32 1-d each. `recorded` is the KL to compare with, None where there is none."""

    sequences: tuple["np.ndarray", ...]
    micro_batch_tokens: int
    recorded: float | None


def choose_probe(output: Path, source: "Checkpoint", manifest: "Manifest | None", options: DeepOptions) -> Probe:
    """`--probe` where it is given, else the held-out tokens that the job kept.

    Raises InputError where there is neither, and for a `--probe` that cannot be used.
    """
    from fourge.data import read_token_sets
    from fourge.walk.job import FOLDER

    if options.probe is not None:
        return Probe(_load(options.probe, source, options), _MICRO_BATCH_TOKENS, None)
    path = output / FOLDER / "tokens.safetensors"
    kept = read_token_sets(path).probe.sequences if path.is_file() else ()
    if not kept:
        raise InputError(f"{path}: no probe tokens were kept; name some text for --deep with --probe")
    if manifest is None:
        return Probe(kept, _MICRO_BATCH_TOKENS, None)
    return Probe(kept, int(manifest.settings["micro_batch_tokens"]), _recorded(manifest, options))


def _load(probe: str, source: "Checkpoint", options: DeepOptions) -> tuple["np.ndarray", ...]:
    import torch

    from fourge.checkpoint.architecture import find_architecture
    from fourge.data import DataRequest, load_token_sets
    from fourge.progress import announced
    from fourge.walk.resident import make_sampler
    from fourge.walk.skeleton import Skeleton, load_config

    device = torch.device(options.device)
    skeleton = Skeleton(load_config(source.directory), find_architecture(source.config), device)
    # The data room always chooses a calibration set too: one random sequence that nobody looks at.
    request = DataRequest(
        source="random",
        num_calibration_samples=1,
        num_probe_samples=options.num_probe_samples,
        max_seq_length=options.max_seq_length,
        seed=options.seed,
        probe_source=probe,
    )
    sampler = make_sampler(source, skeleton, getattr(torch, options.compute_dtype), device)
    with announced(f"Rendering {probe}"):
        return load_token_sets(request, source.directory, int(skeleton.config.vocab_size), sampler).probe.sequences


def _recorded(manifest: "Manifest", options: DeepOptions) -> float | None:
    """The job's KL, where it was computed in the same arithmetic on the same kind of device."""
    fidelity = (manifest.result or {}).get("fidelity")
    settings = manifest.settings
    same_kind = settings["device"].partition(":")[0] == options.device.partition(":")[0]
    if fidelity is None or settings["compute_dtype"] != options.compute_dtype or not same_kind:
        return None
    return float(fidelity["kl_div"]["mean"])
