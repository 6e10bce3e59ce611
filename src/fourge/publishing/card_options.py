"""What the owner says of a card: the few things that no file of the checkpoint can know."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.publishing.card_model import repository_of
from fourge.publishing.card_reference import Reference
from fourge.publishing.evidence import Evidence
from fourge.publishing.source_card import SourceCard


@dataclass(frozen=True)
class CardOptions:
    """The options of `fourge card`, read and checked. `template` is a template's text, None for ours."""

    base_model: str | None = None
    quantized_by: str | None = None
    repository: str | None = None
    references: tuple[Reference, ...] = ()
    template: str | None = None


@dataclass(frozen=True)
class CardFacts:
    """Everything a section may use: what the files say, the source's card, and what the owner said."""

    evidence: Evidence
    source_card: SourceCard
    options: CardOptions

    @property
    def output(self) -> Path:
        return self.evidence.output

    @property
    def repository(self) -> str | None:
        """Where it will be published: as the owner says now, or said before unless now it is somebody else's."""
        before = repository_of(self.source_card.ours_text)
        if self.options.quantized_by is not None and before is not None:
            before = before if before.startswith(f"{self.options.quantized_by}/") else None
        return self.options.repository or before

    @property
    def name(self) -> str:
        """The model's name: that of its repository, else of its folder."""
        return self.repository.partition("/")[2] if self.repository else self.output.resolve().name

    @property
    def model_id(self) -> str:
        """What an engine is told to load: the hub's id where it is known whose it will be, else the folder's name."""
        return self.repository or (f"{self.quantized_by}/{self.name}" if self.quantized_by else self.name)

    @property
    def quantized_by(self) -> str | None:
        """Who publishes it: as the owner says now, or whose the repository is, or as the owner said before."""
        named = self.options.quantized_by or (self.options.repository or "").partition("/")[0]
        return named or self.source_card.ours.get("quantized_by")

    @property
    def base_model(self) -> str | None:
        """The hub repository of the source: as the owner says now or said before, else as `fourge.json` has it."""
        recorded = (self.evidence.provenance or {}).get("source", {}).get("repository")
        found: str | None = self.options.base_model or recorded or self.source_card.ours.get("base_model")
        return found

    @property
    def revision(self) -> str | None:
        """The commit of the source on the hub, where `fourge.json` has it and the repository is the recorded one."""
        source = (self.evidence.provenance or {}).get("source", {})
        found: str | None = source.get("revision") if source.get("repository") == self.base_model else None
        return found

    @property
    def quantization(self) -> Mapping[str, Any]:
        """`quantization_config` of config.json; empty where there is none."""
        found: Mapping[str, Any] = self.evidence.config.get("quantization_config") or {}
        return found

    def fourge(self, *arguments: str) -> str:
        """A command line of ours about this checkpoint."""
        return " ".join(("fourge", *arguments))
