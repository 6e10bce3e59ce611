"""The model card: metadata, sections by a template, the owner's own text; checked, then put in README.md's place."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fourge.checkpoint.durable import replaced
from fourge.checkpoint.folder import CARD, CARD_MARKER
from fourge.errors import InputError
from fourge.publishing.card_closing import acknowledgments, citation, sources
from fourge.publishing.card_details import details
from fourge.publishing.card_errors import PICTURE, draw_layer_errors, has_matplotlib, layer_errors
from fourge.publishing.card_limits import limitations
from fourge.publishing.card_metadata import card_data
from fourge.publishing.card_model import model_comment
from fourge.publishing.card_options import CardFacts, CardOptions
from fourge.publishing.card_overview import base_model_text, overview
from fourge.publishing.card_owner import OwnerTexts, read_owner_texts
from fourge.publishing.card_scores import evaluation, fidelity
from fourge.publishing.card_section import Section
from fourge.publishing.card_usage import hardware, usage
from fourge.publishing.evidence import Evidence, read_evidence
from fourge.publishing.signed import require_unsigned
from fourge.publishing.source_card import keep_source_card, read_source_card

TEMPLATE = """\
# {{ name }}

{{ scheme }} quantization of {{ base_model }}.

{{ owner("introduction") }}

{{ overview }}

{{ usage }}

{{ owner("usage") }}

{{ hardware }}

{{ evaluation }}

{{ fidelity }}

{{ layer_errors }}

{{ details }}

{{ limitations }}

{{ owner("limitations") }}

{{ acknowledgments }}

{{ owner("acknowledgments") }}

{{ citation }}

{{ sources }}
"""
"""Our own template. One's own may use `SECTION.title` and `SECTION.body`, and every name that stands here."""

_NOTICE = f"""\
{CARD_MARKER}
<!-- `fourge card` wrote this file, and writes it anew when asked. Text between the owner's markers stays. -->"""


@dataclass(frozen=True)
class WrittenCard:
    """Where the card and its picture lie (None where none was drawn), and what it could not show, by section."""

    card: Path
    picture: Path | None
    missing: Mapping[str, str]
    owner_texts: tuple[str, ...]


def write_card(output: Path, options: CardOptions) -> WrittenCard:
    """Writes `README.md` and its picture into the checkpoint directory `output`; the source's own card is kept.

    Raises InputError for files that cannot be read, a template that does not work, and broken owner's markers.
    """
    card = CardFacts(read_evidence(output), read_source_card(output), options)
    owner = read_owner_texts(card.source_card.ours_text, str(output / CARD))
    sections = card_sections(card)
    text = render_card(card, sections, owner)
    picture = draw_picture(card.evidence, card.name)
    require_unsigned(output, output / CARD, text.encode())
    if picture is not None:
        require_unsigned(output, output / PICTURE, picture)
    keep_source_card(output)
    if picture is not None:
        with replaced(output / PICTURE) as temporary:
            temporary.write_bytes(picture)
    with replaced(output / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")
    missing = {section.title: section.missing for section in sections.values() if section.missing is not None}
    return WrittenCard(output / CARD, None if picture is None else output / PICTURE, missing, owner.filled)


def card_sections(card: CardFacts) -> dict[str, Section]:
    """The sections by the names that a template has for them."""
    made = (overview, usage, hardware, evaluation, fidelity, layer_errors, details, limitations)
    sections = {make.__name__: make(card) for make in (*made, acknowledgments, citation)}
    return sections | {"sources": sources(list(sections.values()))}


def render_card(card: CardFacts, sections: Mapping[str, Section], owner: OwnerTexts) -> str:
    """The whole file: front matter, the marker that says it is ours, the body by the template."""
    from huggingface_hub import ModelCard

    plan = card.evidence.plan
    body = _render(
        card.options.template or TEMPLATE,
        {
            **sections,
            "name": card.name,
            "model_id": card.model_id,
            "base_model": base_model_text(card),
            "scheme": "NVFP4" if plan is None else plan.scheme,
            "owner": owner.block,
        },
    )
    front = card_data(card).to_yaml(line_break="\n")
    notice = f"{_NOTICE}\n{model_comment(card.model_id)}"
    return str(ModelCard(f"---\n{front}\n---\n\n{notice}\n\n{owner.add_unplaced(body)}"))


def draw_picture(evidence: Evidence, name: str) -> bytes | None:
    """The picture of the layers' errors; None where nothing was measured or matplotlib is missing."""
    return draw_layer_errors(evidence.layers, name) if evidence.layers and has_matplotlib() else None


def _render(template: str, names: Mapping[str, object]) -> str:
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    # A template may come from elsewhere; it fills in text and runs nothing.
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(template).render(names)
    except TemplateError as error:
        known = ", ".join(sorted(names))
        raise InputError(f"--template: {error.message or error}; the names that it may use are {known}") from error
