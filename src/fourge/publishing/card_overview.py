"""The card's first section: what this is, of what, how large, under which licence."""

from typing import Any

from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_section import Section, Trace
from fourge.publishing.markdown import facts, giga, plain
from fourge.report.plan_text import both_units

_SCHEMES = {
    "NVFP4": "NVFP4 (W4A4): weights and activations in FP4 (E2M1), an FP8 scale for every 16 values, an FP32 scale "
    "for every tensor",
    "NVFP4A16": "NVFP4A16 (W4A16): weights in FP4 (E2M1), an FP8 scale for every 16 values, an FP32 scale for every "
    "tensor; activations stay in 16 bits",
    "FP8": "FP8 (W8A8): weights and activations in E4M3, a scale for every output channel and for every token",
}


def overview(card: CardFacts) -> Section:
    """Base model, parameters, architecture, scheme, format, sizes, context, licence."""
    rows = [
        ("Base model", f"{base_model_text(card)}{_local_copy(card)}"),
        *_model_rows(card),
        ("Format", _format(card)),
        *_size_rows(card),
        *_context_rows(card),
        ("Licence", licence_text(card)),
    ]
    if card.quantized_by:
        rows.append(("Quantized by", card.quantized_by))
    return Section("Overview", f"{_missing(card)}{facts(rows)}", _traces(card))


def base_model_text(card: CardFacts) -> str:
    """A link to the base model; its name, where it has no repository that is known."""
    if card.base_model is not None:
        at = f", revision `{card.revision}`" if card.revision else ""
        return f"[{card.base_model}](https://huggingface.co/{card.base_model}){at}"
    settings = card.evidence.settings
    asked = "its repository is not recorded: name it with `fourge card OUT --base-model ORG/NAME`"
    return asked if settings is None else f"`{plain(str(settings['model']).rstrip('/').rpartition('/')[2])}` ({asked})"


def _local_copy(card: CardFacts) -> str:
    """Said where only the owner knows that what was quantized, a local folder, is that repository's."""
    source = (card.evidence.provenance or {}).get("source", {})
    if card.base_model is None or not source or source.get("repository") is not None:
        return ""
    name = plain(str(source["name"]).rstrip("/").rpartition("/")[2])
    return f", as its owner says of the local copy `{name}`; the digests of its files are in `fourge.json`"


def licence_text(card: CardFacts) -> str:
    """The licence as the source gives it; that it gives none, where it does not."""
    licence, name, link = (card.source_card.inherited(key) for key in ("license", "license_name", "license_link"))
    files = ", ".join(f"[{file}]({file})" for file in card.source_card.licence_files)
    beside = f"; see {files} beside the weights" if files else ""
    if licence is None:
        said = (
            "the source's card names none" if card.source_card.origin else "there is no card of the source to name it"
        )
        return f"not known: {said}{beside}"
    text = plain(str(name or licence))
    if isinstance(link, str) and link.startswith(("https://", "http://")):
        text = f"[{text}]({link})"
    return f"{text}, as the base model's{beside}"


def plan_file(card: CardFacts) -> str:
    """What the plan read."""
    alone = card.evidence.weights is None
    return "config.json" if alone else "config.json and the headers of the weights"


def _model_rows(card: CardFacts) -> list[tuple[str, str]]:
    plan = card.evidence.plan
    architecture = ", ".join(card.evidence.config.get("architectures") or []) or "not named in config.json"
    if plan is None:
        return [("Architecture", architecture)]
    sizes = plan.sizes
    share = sizes.quantized_parameters / sizes.parameters
    return [
        ("Parameters", f"{giga(sizes.parameters)} ({sizes.parameters:,}), {share:.1%} of them quantized"),
        (
            "Architecture",
            f"{architecture}: {sizes.num_layers} layers, {sizes.num_attention_heads} attention heads, "
            f"{sizes.num_key_value_heads} key-value heads",
        ),
        ("Scheme", "; some Linears in ".join(_SCHEMES[scheme] for scheme in plan.schemes)),
    ]


def _format(card: CardFacts) -> str:
    found = card.quantization
    method, layout = found.get("quant_method"), found.get("format")
    return " · ".join(str(part) for part in (method, layout, "safetensors") if part)


def _size_rows(card: CardFacts) -> list[tuple[str, str]]:
    """Sizes of the weights: as the files lie there, or, where only the config is there, as it makes them."""
    plan, weights = card.evidence.plan, card.evidence.weights
    rows = []
    if weights is not None:
        rows.append(("Size", f"{both_units(weights.nbytes)} ({weights.nbytes:,} bytes in {weights.count} files)"))
    elif plan is not None:
        rows.append(("Size", f"{both_units(plan.sizes.output_bytes)} (computed from config.json; no weights here)"))
    source = _source_bytes(card)
    if source is not None:
        rows.append(("Size of the source", both_units(source)))
    return rows


def _source_bytes(card: CardFacts) -> int | None:
    recorded: dict[str, Any] | None = (card.evidence.provenance or {}).get("source", {}).get("files")
    if recorded is None:
        return None
    sizes = [entry["size"] for name, entry in recorded.items() if name.endswith(".safetensors")]
    return sum(sizes) if sizes else None


def _context_rows(card: CardFacts) -> list[tuple[str, str]]:
    length = card.evidence.config.get("max_position_embeddings")
    rows = [] if length is None else [("Context length", f"{length:,} tokens")]
    if card.quantization.get("kv_cache_scheme"):
        rows.append(("KV cache", "FP8, with calibrated scales"))
    return rows


def _missing(card: CardFacts) -> str:
    why = card.evidence.plan_failure
    return "" if why is None else f"Parameters, sizes and hardware are not here: {plain(why)}.\n\n"


def _traces(card: CardFacts) -> tuple[Trace, ...]:
    traces = [Trace("parameters, architecture, scheme, sizes, context", plan_file(card), "fourge plan OUT")]
    if _source_bytes(card) is not None:
        traces.append(Trace("base model, size of the source", "fourge.json", "fourge quantize"))
    if card.source_card.origin is not None:
        traces.append(Trace("licence", "the source's README.md", "fourge quantize, which copies it"))
    return tuple(traces)
