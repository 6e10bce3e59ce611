"""The page of a checkpoint, from its evidence: every section in the order in which people ask."""

from dataclasses import dataclass

from fourge.checkpoint.folder import CARD, has_own_card
from fourge.checkpoint.reader import Checkpoint
from fourge.publishing.card_model import repository_of
from fourge.publishing.evidence import Evidence
from fourge.publishing.page_activations import activations_section, read_input_ranges
from fourge.publishing.page_costs import costs_section
from fourge.publishing.page_divergence import divergence_section
from fourge.publishing.page_document import document
from fourge.publishing.page_errors import InputRanges, errors_section
from fourge.publishing.page_flips import collect_flips, flips_section
from fourge.publishing.page_histograms import WeightHistogram, count_weights, histograms_section
from fourge.publishing.page_overview import overview, record_section
from fourge.publishing.page_plan import plan_section
from fourge.publishing.page_recovery import recovery_section


@dataclass(frozen=True)
class BuiltPage:
    """The HTML text, and the finding above each section, by its topic."""

    html: str
    findings: dict[str, str]


def _name(evidence: Evidence) -> str:
    """The model's name: that of the repository for which the card was written, if it was, else of the folder."""
    card = evidence.output / CARD
    repository = repository_of(card.read_text(encoding="utf-8")) if has_own_card(evidence.output) else None
    return repository.partition("/")[2] if repository else evidence.output.resolve().name


def build_page(
    evidence: Evidence, *, with_histograms: bool, max_flips: int, refresh_seconds: int | None = None
) -> BuiltPage:
    """Reads what the evidence points to, samples and input scales, and with histograms every weight once.

    `refresh_seconds` makes a page that the browser reads again after that time, for a job under way.
    """
    ranges: InputRanges = {}
    histogram: WeightHistogram | None = None
    why_not = "The weights were not read (--no-histograms)"
    if evidence.index is None:
        why_not = "Codes and scales are counted when the checkpoint is finished"
    else:
        checkpoint = Checkpoint.open(evidence.output)
        ranges = read_input_ranges(checkpoint)
        if with_histograms:
            histogram, why_not = count_weights(checkpoint), "No Linear of this checkpoint is in NVFP4"
    title = _name(evidence)
    sections = [
        recovery_section(evidence),
        errors_section(evidence, ranges),
        activations_section(evidence, ranges),
        histograms_section(histogram, why_not),
        divergence_section(evidence),
        flips_section(collect_flips(evidence, max_flips), evidence),
        costs_section(evidence),
        plan_section(evidence),
        record_section(evidence, f"fourge page {title}"),
    ]
    html = document(f"{title} · Fourge", overview(evidence, title), sections, refresh_seconds)
    return BuiltPage(html, {section.topic: section.finding for section in sections})
