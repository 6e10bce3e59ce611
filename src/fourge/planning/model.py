"""From what the user names a model by to its facts: headers where there are any, `config.json` alone otherwise.

Shapes come from transformers' model on the meta device, so a config is enough; where shards are there, their
headers are held against it. No tensor is ever read, and of a model on the hub nothing but its config is fetched.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fourge.checkpoint.architecture import Architecture, find_architecture
from fourge.checkpoint.compressed_tensors import kv_scale_specs, tensor_specs
from fourge.checkpoint.folder import CONFIG
from fourge.checkpoint.header import DTYPES, TensorInfo, parse_object
from fourge.checkpoint.layout import Layout, plan_layout
from fourge.checkpoint.reader import Checkpoint, require_float, require_unquantized
from fourge.checkpoint.writer import Specs, safetensors_size
from fourge.checks.config import Quantization, check_config
from fourge.errors import InputError
from fourge.planning.facts import ModelFacts, Stored
from fourge.settings import KvCacheScheme
from fourge.walk.choices import Choices, Selection
from fourge.walk.selection import match_schemes
from fourge.walk.skeleton import Skeleton

_REQUIRED = (
    *("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "vocab_size", "max_position_embeddings"),
)
"""Fields without which transformers would quietly take another model's numbers."""

_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class SourceLayout:
    """What a quantization would start from. Made from a config alone, `checkpoint` has every tensor and no bytes."""

    checkpoint: Checkpoint
    layout: Layout
    choices: Choices


@dataclass(frozen=True)
class _Found:
    """A model's config and, where its shards are there, its checkpoint. `path` is the config's file."""

    name: str
    path: Path
    raw: dict[str, Any]
    checkpoint: Checkpoint | None


def describe(
    model: str,
    revision: str | None,
    selection: Selection,
    kv_cache_scheme: KvCacheScheme | None = None,
) -> tuple[ModelFacts, SourceLayout | None]:
    """The facts of `model`: a directory, a `config.json` under any name, or a hub id.

    For a source, `selection` and `kv_cache_scheme` say what its quantized form is; an NVFP4 checkpoint is taken as
    it is, and the second value is None. Raises InputError for a config that lacks fields, is of an unknown
    architecture or disagrees with the headers, and for checkpoints quantized in another way.
    """
    found = _find(model, revision)
    _require_fields(found)
    architecture = find_architecture(found.raw)
    config = _parse_config(found)
    skeleton = Skeleton(config, architecture, torch.device("cpu"))
    if found.raw.get("quantization_config") is not None:
        return _describe_quantized(found, skeleton, _read_quantization(found)), None
    return _describe_source(found, skeleton, selection, kv_cache_scheme)


def _find(model: str, revision: str | None) -> _Found:
    path = Path(model).expanduser()
    if not path.exists():
        path = _fetch_config(model, revision)
    elif revision is not None:
        raise InputError(f"--revision {revision}: {model} is local and has none; leave it out")
    directory = path if path.is_dir() else None
    if directory is not None:
        path = directory / CONFIG
        if not path.is_file():
            raise InputError(f"{directory}: has no {CONFIG}; give a model's directory, its config or a hub id")
    has_shards = directory is not None and any(directory.glob("*.safetensors"))
    checkpoint = Checkpoint.open(directory) if directory is not None and has_shards else None
    raw = checkpoint.config if checkpoint is not None else parse_object(path.read_bytes(), str(path))
    return _Found(model, path, raw, checkpoint)


def _fetch_config(model: str, revision: str | None) -> Path:
    """`config.json` of a hub id from the hub or its cache; nothing else is downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, CONFIG, revision=revision))
    except HFValidationError as error:
        raise InputError(f"{model}: no such file or directory, and not a hub id (ORG/NAME)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{model}: no such file or directory, and the hub gives no {CONFIG} ({reason}); check the spelling, "
            "set HF_TOKEN if it is private, or give a config.json"
        ) from error


def _require_fields(found: _Found) -> None:
    # Left out, it means one for every head, if it was left out on purpose: headers would show, a config cannot.
    also = ("num_key_value_heads",) if found.checkpoint is None else ()
    missing = [name for name in (*_REQUIRED, *also) if found.raw.get(name) is None]
    if missing:
        raise InputError(f"{found.path}: lacks {', '.join(missing)}; take the model's complete config.json")
    for name in (*_REQUIRED[2:], "num_key_value_heads", "head_dim"):
        value = found.raw.get(name)
        if value is not None and (type(value) is not int or value <= 0):
            raise InputError(f"{found.path}: {name} is {value!r}, expected a positive integer")
    dtype = _named_dtype(found)
    if dtype is not None and dtype not in _FLOATS:
        raise InputError(f"{found.path}: dtype {dtype!r} is not one of {', '.join(_FLOATS)}")


def _named_dtype(found: _Found) -> Any:
    return found.raw.get("dtype") or found.raw.get("torch_dtype")


def _parse_config(found: _Found) -> Any:
    """transformers' config object without `quantization_config`; no remote code is run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(found.path, local_files_only=True, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{found.path}: transformers does not accept it: {reason}") from error
    if found.raw.get("quantization_config") is not None:
        del config.quantization_config
    return config


# A source, to be quantized


def _describe_source(
    found: _Found,
    skeleton: Skeleton,
    selection: Selection,
    kv_cache_scheme: KvCacheScheme | None,
) -> tuple[ModelFacts, SourceLayout]:
    notes = list(_notes(found, skeleton))
    if found.checkpoint is not None:
        require_unquantized(found.checkpoint)
        require_float(found.checkpoint)
        checkpoint = found.checkpoint
    else:
        checkpoint = _imagine_checkpoint(found, skeleton, _source_dtype(found, notes))
    choices = selection.resolve(skeleton.linears, skeleton.architecture, skeleton.num_layers)
    layout = plan_layout(
        skeleton.architecture,
        skeleton.num_layers,
        skeleton.shapes,
        checkpoint.tensors,
        skeleton.tied_head,
        choices.schemes,
    )
    shards = [layout.output_specs(step, checkpoint.tensors, kv_cache_scheme) for step in range(layout.num_steps)]
    facts = _facts(
        found,
        skeleton,
        kv_cache_scheme=kv_cache_scheme,
        shapes=layout.shapes,
        schemes=layout.schemes,
        source={
            name: Stored(checkpoint.tensors[name].dtype, shape, checkpoint.tensors[name].nbytes)
            for name, shape in layout.shapes.items()
        },
        output={name: stored for specs in shards for name, stored in _store(specs).items()},
        num_shards=layout.num_steps,
        shard_bytes=sum(map(safetensors_size, shards)),
        notes=tuple(notes),
    )
    return facts, SourceLayout(checkpoint, layout, choices)


def _source_dtype(found: _Found, notes: list[str]) -> str:
    """safetensors' name of the dtype that the config says the weights are in."""
    named = _named_dtype(found)
    if named is None:
        notes.append(f"{found.path.name} names no dtype: BF16 is taken")
    return _FLOATS[named or "bfloat16"]


def _imagine_checkpoint(found: _Found, skeleton: Skeleton, dtype: str) -> Checkpoint:
    """The checkpoint that the config describes: every tensor with its size, none with a place in a file."""
    tensors = {
        name: TensorInfo(name, dtype, shape, found.path, 0, prod(shape) * DTYPES[dtype].itemsize)
        for name, shape in sorted(skeleton.shapes.items())
    }
    return Checkpoint(found.path.parent, tensors, found.raw, {}, {})


# A checkpoint that is quantized already


def _read_quantization(found: _Found) -> Quantization:
    check, quantization = check_config(found.raw)
    if quantization is None or check.failures:
        raise InputError(
            f"{found.path}: quantized, but not as NVFP4 in compressed-tensors' layout ({check.failures[0]}); "
            "give the model it was made from, or a checkpoint that fourge quantize wrote"
        )
    return quantization


def _describe_quantized(found: _Found, skeleton: Skeleton, quantization: Quantization) -> ModelFacts:
    head = f"{skeleton.architecture.head}.weight"
    shapes = {name: shape for name, shape in skeleton.shapes.items() if not (skeleton.tied_head and name == head)}
    schemes = match_schemes(skeleton.linears, quantization.groups, quantization.ignore)
    notes = list(_notes(found, skeleton))
    if found.checkpoint is not None:
        output = {n: Stored(info.dtype, info.shape, info.nbytes) for n, info in found.checkpoint.tensors.items()}
        paths = {info.path for info in found.checkpoint.tensors.values()}
        num_shards, shard_bytes = len(paths), sum(path.stat().st_size for path in paths)
    else:
        dtype = _source_dtype(found, notes)
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            linear = name.removesuffix(".weight")
            if linear in schemes:
                specs |= tensor_specs(linear, (shape[0], shape[-1]), schemes[linear], dtype)
            else:
                specs[name] = (dtype, shape)
        if quantization.kv_cache_scheme is not None:
            for layer in range(skeleton.num_layers):
                architecture = skeleton.architecture
                specs |= kv_scale_specs(architecture.layer_prefix(layer) + architecture.attention)
        output = _store(specs)
        num_shards, shard_bytes = 1, safetensors_size(specs)
    return _facts(
        found,
        skeleton,
        kv_cache_scheme=quantization.kv_cache_scheme,
        shapes=shapes,
        schemes=schemes,
        source=None,
        output=output,
        num_shards=num_shards,
        shard_bytes=shard_bytes,
        notes=tuple(notes),
    )


# Both


def _facts(found: _Found, skeleton: Skeleton, **own: Any) -> ModelFacts:
    config, architecture = skeleton.config, skeleton.architecture
    return ModelFacts(
        name=found.name,
        origin="config.json alone" if found.checkpoint is None else "headers",
        architecture=architecture,
        num_layers=skeleton.num_layers,
        hidden_size=skeleton.hidden_size,
        intermediate_size=int(config.intermediate_size),
        num_attention_heads=int(config.num_attention_heads),
        num_key_value_heads=int(config.num_key_value_heads),
        head_dim=_head_dim(skeleton, architecture),
        vocab_size=int(config.vocab_size),
        max_position_embeddings=int(config.max_position_embeddings),
        tied_head=skeleton.tied_head,
        **own,
    )


def _head_dim(skeleton: Skeleton, architecture: Architecture) -> int:
    """From the shape of the first key projection: configs leave `head_dim` out, or say it and ignore it."""
    rows: int = skeleton.shapes[f"{architecture.layer_prefix(0)}self_attn.k_proj.weight"][0]
    return rows // int(skeleton.config.num_key_value_heads)


def _notes(found: _Found, skeleton: Skeleton) -> list[str]:
    window = getattr(skeleton.config, "sliding_window", None)
    if window is None:
        return []
    return [f"a sliding window of {window} tokens is not taken off the KV cache: less is needed than stands here"]


def _store(specs: Specs) -> dict[str, Stored]:
    return {name: Stored(dtype, shape, prod(shape) * DTYPES[dtype].itemsize) for name, (dtype, shape) in specs.items()}
