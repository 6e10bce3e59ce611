"""The card's last sections: thanks, how to cite, and where every figure is from."""

from collections.abc import Sequence

from fourge._version import __version__
from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_section import Section
from fourge.publishing.markdown import bullets, code, plain, table


def acknowledgments(card: CardFacts) -> Section:
    """Those whose work this stands on, as far as the files name them."""
    lines = []
    if card.base_model is not None:
        lines.append(f"The makers of [{card.base_model}](https://huggingface.co/{card.base_model}).")
    data = card.evidence.data
    if data is not None and data["calibration"]["origin"].get("kind") == "hub":
        name = plain(str(data["source"]))
        lines.append(f"The makers of the calibration set, [{name}](https://huggingface.co/datasets/{name}).")
    lines.append("compressed-tensors for the layout of the files; NVIDIA for the NVFP4 format.")
    if card.evidence.evaluations:
        lines.append("EleutherAI for lm-evaluation-harness.")
    return Section("Acknowledgments", bullets(lines))


def citation(card: CardFacts) -> Section:
    """BibTeX of this checkpoint, from its own record, and whom else to cite."""
    versions = card.evidence.versions or {}
    made_with = f"fourge {versions['fourge']}" if "fourge" in versions else None
    key = "".join(character if character.isalnum() else "_" for character in card.name)
    fields = [("title", card.name)]
    if card.quantized_by:
        fields.append(("author", card.quantized_by))
        fields.append(("url", f"https://huggingface.co/{card.model_id}"))
    if card.base_model:
        made_with = f"{card.base_model} in NVFP4" + (f", by {made_with}" if made_with else "")
    if made_with:
        fields.append(("note", made_with))
    entry = "\n".join([f"@misc{{{key},", *(f"  {name} = {{{{{value}}}}}," for name, value in fields), "}"])
    base = "Cite the base model as its own card asks." if card.base_model else "Cite the base model too."
    return Section("Citation", f"{base} This checkpoint:\n\n{code(entry, 'bibtex')}")


def sources(sections: Sequence[Section]) -> Section:
    """For every table, the file that it came from and the command that made the file."""
    rows = [
        [section.title, trace.what, f"`{trace.file}`", f"`{trace.command}`"]
        for section in sections
        for trace in section.traces
    ]
    intro = (
        "Outside the owner's own text no figure on this card was typed: each was read from a file of the checkpoint's "
        f"directory (OUT) or given on the command line. `fourge card OUT` ({__version__}) writes the card anew; "
        "`fourge verify OUT` checks the files. `.fourge` is the job's own folder, which is not published."
    )
    if not rows:
        return Section("Where the figures come from", intro)
    traced = table(("section", "figures", "file", "made by"), rows, numbers=False)
    return Section("Where the figures come from", f"{intro}\n\n{traced}")
