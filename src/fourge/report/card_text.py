"""What `fourge card` wrote, as a text for people."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourge.card import CardResult


def card_summary(result: "CardResult") -> str:
    """The files, and what the card could not show."""
    lines = [f"{result.card}"]
    if result.picture is not None:
        lines.append(f"{result.picture}")
    if result.sbom is not None:
        lines.append(f"{result.sbom}")
    if result.owner_texts:
        lines.append(f"  kept         the owner's texts: {', '.join(result.owner_texts)}")
    lines += [f"  not shown    {section}: for want of {what}" for section, what in result.missing.items()]
    return "\n".join(lines)
