"""What the source's own card says: licence, languages, what it is for; and the card that ours takes the place of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.checkpoint.durable import copy_file
from fourge.checkpoint.folder import CARD, CARD_MARKER
from fourge.errors import InputError

KEPT = ".fourge/source_card.md"
"""Where the card that `fourge quantize` copied from the source lies once ours has taken its place."""
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md", "NOTICE")


@dataclass(frozen=True)
class SourceCard:
    """`front` is the source's front matter and `origin` the file it is from, None where there is none.

    `ours` is the card of ours that lies there now with its front matter, both empty before the first.
    `licence_files` are those beside the weights.
    """

    front: Mapping[str, Any]
    origin: str | None
    ours_text: str
    ours: Mapping[str, Any]
    licence_files: tuple[str, ...]

    def inherited(self, key: str) -> Any:
        """What the source says under `key`, else what the owner wrote there in our card; None without both."""
        found = self.front.get(key)
        return self.ours.get(key) if found is None else found


def is_ours(text: str) -> bool:
    """Whether `fourge card` wrote a card."""
    return CARD_MARKER in text


def read_source_card(output: Path) -> SourceCard:
    """Reads the cards of a checkpoint directory; InputError for a front matter that is no YAML table."""
    card, kept = output / CARD, output / KEPT
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    ours_text = text if is_ours(text) else ""
    origin = None
    if text and not ours_text:
        origin = CARD
    elif kept.is_file():
        origin = KEPT
    return SourceCard(
        front=_front_matter(output / origin) if origin else {},
        origin=origin,
        ours_text=ours_text,
        ours=_front_matter(card) if ours_text else {},
        licence_files=tuple(name for name in _LICENCES if (output / name).is_file()),
    )


def keep_source_card(output: Path) -> None:
    """Puts the card that is not ours where ours does not take its place."""
    card, kept = output / CARD, output / KEPT
    if card.is_file() and not is_ours(card.read_text(encoding="utf-8")):
        kept.parent.mkdir(exist_ok=True)
        copy_file(card, kept)


def _front_matter(path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    try:
        return metadata_load(path) or {}
    except (ValueError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its front matter is not valid ({reason}); mend it, or delete the file") from error
