"""`fourge sbom`: the CycloneDX bill of materials of a checkpoint, from its `fourge.json`.

A verb of its own, for it needs neither a key nor the evidence; and `--sbom` of `fourge card`, which it has the licence
from, and of `fourge sign`, whose signature covers it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fourge.errors import InputError


@dataclass(frozen=True)
class SbomResult:
    """The file that was written; `licence` is the card's, None where it states none."""

    output: Path
    sbom: Path
    licence: str | None
    files: int


def sbom(
    output: Annotated[Path, typer.Argument(help="The checkpoint's directory.")],
    *,
    name: Annotated[str | None, typer.Option(help="The model's published name [default: the directory's].")] = None,
) -> SbomResult:
    """Write the bill of materials, CycloneDX 1.6: files and their digests, the source, the data, licence and tools.

    It goes to `OUT/fourge.cdx.json`; equal files give equal bytes. Raises InputError where there is no `fourge.json`.
    """
    from fourge.checkpoint.durable import replaced
    from fourge.checkpoint.folder import CARD, PROVENANCE, SBOM, regular_file
    from fourge.checkpoint.header import parse_object
    from fourge.publishing.bill_of_materials import bill_of_materials
    from fourge.publishing.signed import require_unsigned

    output = Path(output)  # a script may well give a string
    path = output / PROVENANCE
    if not path.is_file():
        raise InputError(f"{path} is missing: a bill of materials is made from it; quantize with this version")
    record = regular_file(output, PROVENANCE).read_bytes()
    provenance = parse_object(record, str(path))
    licence = _stated_licence(output / CARD)
    try:
        text = bill_of_materials(name or output.resolve().name, provenance, record, licence)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); copy it again from where it was written") from error
    require_unsigned(output, output / SBOM, text.encode())
    with replaced(output / SBOM) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return SbomResult(output, output / SBOM, licence, len(provenance["output"]["files"]))


def _stated_licence(card: Path) -> str | None:
    """The licence in the card's front matter; None without a card, without front matter, or without one in it."""
    from huggingface_hub import metadata_load

    if not card.is_file():
        return None
    front = metadata_load(card) or {}
    licence = front.get("license_name") or front.get("license")
    return licence if isinstance(licence, str) else None
