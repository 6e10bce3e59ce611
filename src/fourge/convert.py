"""`fourge convert`: a quantized checkpoint in the layout of other engines, and back to the same bytes."""

import os
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fourge._version import __version__
from fourge.errors import InputError
from fourge.settings import KvCacheScheme, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from fourge.checkpoint.exchange import Content, FileLayout
    from fourge.checkpoint.header import TensorInfo
    from fourge.checkpoint.reader import Checkpoint
    from fourge.checkpoint.way_back import WayBack

LayoutName = Literal["modelopt", "compressed-tensors"]
MARKER = ".fourge-convert.json"
"""In an output as long as its conversion is not finished; says of what it is one."""


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    `kept_scales` counts the global scales whose reciprocal does not lead back to them, `kept_documents` names the
    JSON files that would come back worded otherwise: both are in `fourge_convert.json` of the output. `restored`:
    the checkpoint was itself converted before, and the output has the scales and JSON files of what it was made from.
    `reordered_shards` counts those whose header is not as safetensors writes it, or has metadata not sorted by key:
    the way back gives the same tensors and metadata in that order. Bytes are those of the output's shards.
    """

    output: Path
    source_layout: str
    layout: str
    scheme: Scheme
    kv_cache_scheme: KvCacheScheme | None
    quantized_linears: int
    global_scales: int
    kept_scales: int
    kept_documents: tuple[str, ...]
    restored: bool
    reordered_shards: int
    output_bytes: int
    seconds: float
    continued: bool


def convert(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint's directory, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.")],
    *,
    layout: Annotated[
        LayoutName, typer.Option(help="modelopt is NVIDIA's, for TensorRT-LLM; compressed-tensors is what we write.")
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
) -> ConvertResult:
    """Write a quantized checkpoint in another layout; the values stay. The same command continues a stopped one.

    Copies shard by shard: codes and group scales as they are, global scales inverted. Converting the result back
    gives the same bytes again, except for what quantize keeps in `.fourge`. Raises InputError for what the caller
    can mend, before anything is written.
    """
    from fourge.checkpoint.durable import disk_errors_named
    from fourge.checkpoint.exchange import LAYOUTS, find_layout
    from fourge.checkpoint.reader import Checkpoint
    from fourge.checkpoint.source import locate

    began = time.monotonic()
    output = Path(output)  # a script may well give a string
    if layout not in LAYOUTS:
        raise InputError(f"--layout {layout}: known are {', '.join(LAYOUTS)}")
    opened = Checkpoint.open(locate(checkpoint, revision))
    found = find_layout(opened)
    if found.name == layout:
        raise InputError(f"{opened.directory} is in the {layout} layout already; name the other one with --layout")
    conversion = _Conversion.prepare(_read_content(opened, found), LAYOUTS[layout], output)
    with disk_errors_named(output):
        continued = conversion.run()
    content, kept = conversion.content, conversion.kept
    return ConvertResult(
        output=output,
        source_layout=found.name,
        layout=layout,
        scheme=content.scheme,
        kv_cache_scheme=content.kv_cache_scheme,
        quantized_linears=len(content.linears),
        global_scales=len(content.scales.keys() - content.kv_scale_names),
        kept_scales=len(kept.scales.keys() - content.kv_scale_names) if kept else 0,
        kept_documents=tuple(sorted(kept.documents)) if kept else (),
        restored=conversion.restored,
        reordered_shards=sum(not shard.standard for shard in conversion.shards),
        output_bytes=sum((output / shard.path.name).stat().st_size for shard in conversion.shards),
        seconds=time.monotonic() - began,
        continued=continued,
    )


def _read_content(checkpoint: "Checkpoint", layout: "FileLayout") -> "Content":
    from fourge.checkpoint.exchange import COMPRESSED_TENSORS, describe_content
    from fourge.checkpoint.folder import CONFIG, regular_file
    from fourge.checkpoint.header import parse_object
    from fourge.checkpoint.modelopt import HF_QUANT_CONFIG, read_hf_quant_config
    from fourge.checks.config import check_config

    if layout is not COMPRESSED_TENSORS:
        path = regular_file(checkpoint.directory, HF_QUANT_CONFIG)
        scheme, kv_cache_scheme, exclude = read_hf_quant_config(path, parse_object(path.read_bytes(), str(path)))
        return describe_content(checkpoint, layout, scheme, kv_cache_scheme, exclude)
    check, quantization = check_config(checkpoint.config)
    if quantization is None or check.failures:
        raise InputError(f"{checkpoint.directory / CONFIG}: {check.failures[0]}; such a checkpoint cannot be converted")
    throughout = quantization.scheme
    if throughout is None or throughout == "FP8":
        found = " + ".join(dict.fromkeys(each for each, _ in quantization.groups))
        raise InputError(f"{checkpoint.directory}: a mixture, {found}: only what is NVFP4 throughout can be converted")
    literal = [name for name in quantization.ignore if not name.startswith("re:")]
    return describe_content(checkpoint, layout, throughout, quantization.kv_cache_scheme, literal)


@dataclass(frozen=True)
class _Shard:
    """A file of the source, and whether its header is as safetensors itself would write it."""

    path: Path
    tensors: "dict[str, TensorInfo]"
    metadata: dict[str, str]
    standard: bool

    @classmethod
    def read(cls, path: Path) -> "_Shard":
        from fourge.checkpoint.header import DTYPES, read_header
        from fourge.checkpoint.writer import safetensors_size

        tensors, metadata = read_header(path)
        ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
        order = [(-ranks[info.dtype], name) for name, info in tensors.items()]
        ordered = order == sorted(order) and list(metadata) == sorted(metadata)
        ascending = all(one.end <= next_.begin for one, next_ in pairwise(tensors.values()))
        size = safetensors_size({n: (info.dtype, info.shape) for n, info in tensors.items()}, metadata or None)
        standard = ordered and ascending and size == path.stat().st_size
        return cls(path, tensors, metadata, standard)


@dataclass(frozen=True)
class _Conversion:
    """A validated request: all that the output will hold, but for the copied bytes, is known."""

    content: "Content"
    target: "FileLayout"
    output: Path
    shards: tuple[_Shard, ...]
    documents: dict[str, bytes]
    scales: "dict[str, Tensor]"
    sidecars: tuple[Path, ...]
    kept: "WayBack | None"
    restored: bool

    @classmethod
    def prepare(cls, content: "Content", target: "FileLayout", output: Path) -> "_Conversion":
        from fourge.checkpoint.folder import PROVENANCE, regular_file
        from fourge.checkpoint.modelopt import HF_QUANT_CONFIG
        from fourge.checkpoint.way_back import WAY_BACK, WayBack

        directory = content.checkpoint.directory
        documents = content.documents_in(target)
        scales = {
            content.rename(name, target): content.carry(name, scale).reshape(target.scalar_shape)
            for name, scale in content.scales.items()
        }
        origin = WayBack.read(directory)
        if origin is None:
            kept = WayBack.find(content, documents)
        else:
            origin.require_current(content, target)
            documents, scales, kept = documents | dict(origin.documents), scales | dict(origin.scales), None
        paths = sorted({info.path for info in content.checkpoint.tensors.values()})
        shards = tuple(_Shard.read(path) for path in paths)
        carried = [path for path in content.checkpoint.sidecars() if path.name not in (HF_QUANT_CONFIG, WAY_BACK)]
        if (directory / PROVENANCE).exists():
            # It goes on describing what was converted, so that the way back is to the very files that it describes.
            carried.append(regular_file(directory, PROVENANCE))
        return cls(content, target, output, shards, documents, scales, tuple(carried), kept, origin is not None)

    def run(self) -> bool:
        """Writes the output; shards that an earlier, stopped run finished are left. Whether there was one."""
        from fourge.checkpoint.durable import copy_file, fsync_directory, write_json
        from fourge.checkpoint.way_back import WAY_BACK

        marker = self.output / MARKER
        request = {"source": self.content.checkpoint.digest(), "layout": self.target.name, "fourge": __version__}
        continued = _require_output(self.output, request)
        left = [shard for shard in self.shards if not (self.output / shard.path.name).exists()]
        _require_room(self.output, sum(shard.path.stat().st_size for shard in left))
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(marker, request)
        self._write_shards(left)
        for path in self.sidecars:
            copy_file(path, self.output / path.name)
        if self.kept is not None:
            write_json(self.output / WAY_BACK, self.kept.to_json())
        for name, raw in self.documents.items():
            _write_bytes(self.output / name, raw)
        marker.unlink()
        fsync_directory(self.output)
        return continued

    def _write_shards(self, shards: list[_Shard]) -> None:
        from fourge.checkpoint.durable import replaced
        from fourge.checkpoint.writer import Copied, write_safetensors
        from fourge.progress import WalkProgress, format_bytes

        done = len(self.shards) - len(shards)
        with WalkProgress("convert", len(self.shards), done) as progress:
            for shard in shards:
                entries: dict[str, Tensor | Copied] = {}
                for name in shard.tensors:
                    renamed = self.content.rename(name, self.target)
                    entries[renamed] = self.scales.get(renamed, Copied(self.content.checkpoint, name))
                with replaced(self.output / shard.path.name) as temporary:
                    written = write_safetensors(temporary, entries, shard.metadata or None)
                progress.advance(1.0, read=written.size)
                progress.finish_step(shard.path.name, format_bytes(written.size), {})


def _require_output(output: Path, request: dict[str, str]) -> bool:
    """Whether `output` holds this very conversion, unfinished; InputError where it holds anything else."""
    from fourge.checkpoint.header import parse_object

    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file; name a new directory with -o")
    marker = output / MARKER
    if marker.is_file():
        if parse_object(marker.read_bytes(), str(marker)) != request:
            raise InputError(
                f"{output} holds an unfinished conversion of something else; delete it, or name another -o"
            )
        return True
    if output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output} is not empty; name a new directory with -o")
    return False


def _require_room(output: Path, needed: int) -> None:
    from fourge.checkpoint.durable import nearest_existing
    from fourge.progress import format_bytes

    existing = nearest_existing(output)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{output}: {format_bytes(needed)} of disk are needed, {format_bytes(free)} are free; "
            "free some, or name another -o"
        )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{output} cannot be written to; name another -o")


def _write_bytes(path: Path, raw: bytes) -> None:
    from fourge.checkpoint.durable import replaced

    with replaced(path) as temporary:
        temporary.write_bytes(raw)


__all__ = ["ConvertResult", "LayoutName", "convert"]
