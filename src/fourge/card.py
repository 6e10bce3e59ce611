"""`fourge card`: the model card of a quantized checkpoint, every figure of it from a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fourge.errors import InputError


@dataclass(frozen=True)
class CardResult:
    """What was written: `picture` unless there was nothing to draw, or to draw with, `sbom` where it was asked for.

    `missing` says of each section without figures what would fill it; `owner_texts` are those that were kept.
    """

    output: Path
    card: Path
    picture: Path | None
    sbom: Path | None
    missing: dict[str, str]
    owner_texts: tuple[str, ...]


def card(
    output: Annotated[Path, typer.Argument(help="The quantized checkpoint's directory.")],
    *,
    base_model: Annotated[
        str | None, typer.Option(help="The source's hub repository, where it was quantized from a local path.")
    ] = None,
    quantized_by: Annotated[str | None, typer.Option(help="The hub user or organisation that publishes it.")] = None,
    repository: Annotated[
        str | None, typer.Option(help="ORG/NAME that it is pushed to [default: --quantized-by and the folder's name].")
    ] = None,
    reference: Annotated[
        list[Path] | None, typer.Option(help="JSON file of scores from elsewhere, with their source; repeated.")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="Jinja template of the card's body, instead of ours.")] = None,
    sbom: Annotated[bool, typer.Option("--sbom", help="Write the bill of materials, too, as `fourge sbom`.")] = False,
) -> CardResult:
    """Write the model card (README.md) of a checkpoint, with its metadata for the hub.

    Reads config, headers, the job's record and evaluations; what is missing is said. Text between owner's markers
    in an earlier card is kept, and the source's own card as `.fourge/source_card.md`. Raises InputError for
    files that cannot be read.
    """
    from fourge.publishing.card_options import CardOptions
    from fourge.publishing.card_reference import read_reference
    from fourge.publishing.hub_upload import require_repository_name
    from fourge.publishing.model_card import write_card
    from fourge.sbom import sbom as write_sbom

    output = Path(output)  # a script may well give a string
    for named in (base_model, repository):
        if named is not None:
            require_repository_name(named)
    options = CardOptions(
        base_model=base_model,
        quantized_by=quantized_by,
        repository=repository,
        references=tuple(read_reference(Path(path)) for path in reference or ()),
        template=None if template is None else _read_template(Path(template)),
    )
    written = write_card(output, options)
    materials = write_sbom(output).sbom if sbom else None
    return CardResult(output, written.card, written.picture, materials, dict(written.missing), written.owner_texts)


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--template {path}: {error.strerror}") from error
