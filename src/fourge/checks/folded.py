"""The source as smoothing left it: its tensors times the powers of two that the job recorded.

The products are exact, so everything that is compared with the source can be compared with this instead: bytes to
the last bit, and the error of what was quantized. A job that recorded no smoothing leaves the source as it is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from fourge.checkpoint.folder import PROVENANCE
from fourge.checkpoint.header import parse_object
from fourge.checkpoint.reader import CHUNK_BYTES, Checkpoint, byte_view
from fourge.checks.expected import Expected
from fourge.errors import InputError
from fourge.walk.folding import Scaling, decode_exponents, find_tie, scale_, scalings
from fourge.walk.job import Manifest


@dataclass
class FoldedSource(Checkpoint):
    """A checkpoint of which some tensors are read scaled; `scalings` by tensor name."""

    scalings: Mapping[str, list[Scaling]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Checkpoint, scalings: Mapping[str, list[Scaling]]) -> Self:
        """`source`, read through `scalings`."""
        return cls(
            source.directory, source.tensors, source.config, source.index_metadata, source.documents, 0, scalings
        )

    def read(self, name: str, rows: slice | None = None, *, pinned: bool = False) -> Tensor:
        """See `Checkpoint.read`."""
        tensor = super().read(name, rows, pinned=pinned)
        for scaling in self.scalings.get(name, ()):
            along = scaling.exponents if scaling.dim or rows is None else scaling.exponents[rows]
            scale_(tensor, scaling.dim, along)
        return tensor

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """See `Checkpoint.chunks`; a scaled tensor is read as a whole."""
        if name not in self.scalings:
            yield from super().chunks(name, chunk_bytes)
            return
        view = byte_view(self.read(name))
        for begin in range(0, len(view), chunk_bytes):
            yield view[begin : begin + chunk_bytes]


def recorded_scalings(
    manifest: Manifest | None, directory: Path, expected: Expected
) -> tuple[dict[str, list[Scaling]], list[str]]:
    """What the job says it multiplied which tensors by, by full name; and what is wrong with what it says.

    A published `directory` has no `manifest` any more; its `fourge.json` says the same.
    """
    found: dict[str, list[Scaling]] = {}
    failures: list[str] = []
    try:
        said_by, layers = _recorded_smoothing(manifest, directory)
    except InputError as error:
        return found, [str(error)]
    for layer, groups in enumerate(layers[: expected.num_layers]):
        prefix = expected.architecture.layer_prefix(layer)
        for group, entry in groups.items():
            try:
                for scaling in _group_scalings(group, entry, prefix, expected):
                    found.setdefault(prefix + scaling.name, []).append(scaling)
            except (ValueError, LookupError, TypeError) as error:
                failures.append(f"{said_by}: what it says of smoothing {prefix}{group} cannot be used ({error!r})")
    return found, failures


def _recorded_smoothing(manifest: Manifest | None, directory: Path) -> tuple[str, list[Mapping[str, Any]]]:
    """The file that says it, and for each decoder layer what smoothing decided by group; no layer without smoothing."""
    if manifest is not None:
        smooth = manifest.settings.get("smooth")
        return "job.json", [r.measures.get("smoothing", {}) for r in manifest.records[1:-1]] if smooth else []
    path = directory / PROVENANCE
    layers = parse_object(path.read_bytes(), str(path)).get("smoothing", []) if path.exists() else []
    if not isinstance(layers, list) or not all(isinstance(groups, dict) for groups in layers):
        raise InputError(f"{path}: smoothing is not a list of tables; copy it again from where it was written")
    return PROVENANCE, layers


def _group_scalings(name: str, entry: Mapping[str, Any], prefix: str, expected: Expected) -> list[Scaling]:
    """Raises ValueError, LookupError or TypeError where the record is not one that the walk writes."""
    if not entry["kept"]:
        return []
    group = {group.name: group for group in expected.architecture.groups}[name]
    shapes = {key.removeprefix(prefix): shape for key, shape in expected.shapes.items() if key.startswith(prefix)}
    exponents, channels = decode_exponents(entry["exponents"]), shapes[f"{group.fed_by}.weight"][0]
    if len(exponents) != channels:
        raise ValueError(f"{len(exponents)} exponents for {channels} channels")
    tie = find_tie(group, shapes, int(expected.config.num_key_value_heads))
    return scalings(group, exponents, tie, shapes)
