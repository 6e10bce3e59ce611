"""What a conversion would lose, kept beside the converted weights, so that converting back gives the same bytes.

Three things have no place in the other layout: a global scale whose reciprocal does not lead back to it, the dtype and
shape of a scale where they are not those that we write, and how a JSON file was worded. They are found by going back at
once and comparing; what comes out the same is not kept. Engines do not look at the file, and without it a conversion
still works: it then gives the nearest scales and our wording.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fourge.checkpoint.exchange import Content, FileLayout
from fourge.checkpoint.folder import regular_file
from fourge.checkpoint.header import parse_object
from fourge.errors import InputError

WAY_BACK = "fourge_convert.json"

_ABOUT = "What `fourge convert` needs to give back the files that these were made from. Engines do not read it."


@dataclass(frozen=True)
class WayBack:
    """`documents` and `scales` are the origin's own, by its names, as far as going back would not find them.

    `converted` has the SHA-256 of each JSON file that was written with it: it says whether these are still they.
    """

    layout: str
    documents: Mapping[str, bytes]
    scales: Mapping[str, Tensor]
    converted: Mapping[str, str]

    @classmethod
    def find(cls, content: Content, written: Mapping[str, bytes]) -> Self | None:
        """What the way back from the documents `written` to `content` needs; None where it needs nothing."""
        returned = content.documents_in(content.layout)
        documents = {name: raw for name, raw in content.documents.items() if returned.get(name) != raw}
        scales = {
            name: scale for name, scale in content.scales.items() if not _same(_back(name, scale, content), scale)
        }
        if not documents and not scales:
            return None
        return cls(content.layout.name, documents, scales, {name: _sha256(raw) for name, raw in written.items()})

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """What is kept in `directory`; None where nothing is. InputError where the file is damaged."""
        if not (directory / WAY_BACK).exists():
            return None
        path = regular_file(directory, WAY_BACK)
        stored = parse_object(path.read_bytes(), str(path))
        try:
            documents = {name: text.encode() for name, text in stored["documents"].items()}
            dtypes = stored.get("dtypes", {})
            scales = {name: _scalar(value, dtypes.get(name, "float32")) for name, value in stored["scales"].items()}
            return cls(stored["layout"], documents, scales, dict(stored["converted"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); {_without(path)}") from error

    def to_json(self) -> dict[str, object]:
        """The content of the file. An FP32 number survives JSON's decimals: they are a double's."""
        return {
            "about": _ABOUT,
            "layout": self.layout,
            "documents": {name: raw.decode() for name, raw in self.documents.items()},
            "scales": {name: scale.tolist() for name, scale in self.scales.items()},
            "dtypes": {name: _dtype(scale) for name, scale in self.scales.items() if _dtype(scale) != "float32"},
            "converted": dict(self.converted),
        }

    def require_current(self, content: Content, to: FileLayout) -> None:
        """Raises InputError unless `content` is still what was written with this, and `to` where it came from."""
        path = content.checkpoint.directory / WAY_BACK
        if self.layout != to.name:
            raise InputError(f"{path}: leads to layout {self.layout!r}, {to.name} was asked for; {_without(path)}")
        foreign = sorted(self.documents.keys() - content.documents_in(to).keys())
        if foreign:
            raise InputError(f"{path}: names {foreign[0]}, which is no file of the {to.name} layout; {_without(path)}")
        for name, raw in content.documents.items():
            if self.converted.get(name) != _sha256(raw):
                raise InputError(f"{path}: {name} was changed since; {_without(path)}")
        ours = {content.rename(name, to): name for name in content.scales}
        for name, scale in self.scales.items():
            if name not in ours:
                raise InputError(f"{path}: names {name}, which this checkpoint has not; {_without(path)}")
            if float(content.carry(ours[name], scale)) != float(content.scales[ours[name]]):
                raise InputError(f"{path}: {ours[name]} was changed since; {_without(path)}")


def _without(path: Path) -> str:
    return f"delete {path.name} to convert what is there now"


def _dtype(scale: Tensor) -> str:
    return str(scale.dtype).removeprefix("torch.")


def _scalar(value: object, dtype: str) -> Tensor:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"{dtype} is no dtype of a scale")
    scale = torch.tensor(value, dtype=getattr(torch, dtype))
    if scale.shape not in ((), (1,)):
        raise ValueError(f"{value} is not one number")
    return scale


def _back(name: str, scale: Tensor, content: Content) -> Tensor:
    there = content.carry(name, scale)
    return content.carry(name, there).reshape(content.layout.scalar_shape)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and float(one) == float(other)


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
