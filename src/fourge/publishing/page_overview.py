"""The page's head and foot: what the checkpoint is in a few figures, and what the page was made from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fourge.progress import format_binary, format_bytes, format_seconds
from fourge.publishing.evidence import Evidence
from fourge.publishing.markdown import without_folder
from fourge.publishing.page_errors import event_text
from fourge.publishing.page_markup import Markup, Node, table, tag
from fourge.publishing.page_section import Section, folded, note

_MOST_KINDS = 2
"""Of events that the run's heading names."""


def overview(evidence: Evidence, title: str) -> Markup:
    """The title, one line of facts, and the figures that people look for first."""
    tiles = [
        tag("div", tag("dt", name), tag("dd", value, class_="value"), tag("dd", detail))
        for name, value, detail in _tiles(evidence)
    ]
    return tag(
        "header",
        tag("h1", title),
        tag("p", " · ".join(_facts(evidence)), class_="facts"),
        tag("dl", tiles, class_="tiles") if tiles else None,
        tag("p", "From ", ", ".join(_sources(evidence)), class_="source") if tiles else None,
    )


def _sources(evidence: Evidence) -> list[str]:
    """The files that the tiles are from, in their order."""
    found = {
        f"{evidence.record} (KL, top-1 agreement, perplexity)": evidence.fidelity,
        "the files of weights as they lie there": evidence.weights,
        "their headers (parameters)": evidence.plan,
    }
    return [source for source, there in found.items() if there is not None]


def _facts(evidence: Evidence) -> list[str]:
    settings, versions = evidence.settings, evidence.versions
    facts = ["NVFP4 checkpoint"]
    if settings is not None:
        smoothed = ", smoothed" if settings.get("smooth") else ""
        otherwise = ", some Linears by a recipe file" if settings.get("recipe_file") else ""
        made = f"{settings['scheme']} by {settings['method']}{smoothed}{otherwise}"
        facts = [made, f"from {without_folder(str(settings['model']))}"]
    architectures = evidence.config.get("architectures")
    if isinstance(architectures, list):
        facts.append(", ".join(map(str, architectures)))
    if versions is not None and "fourge" in versions:
        facts.append(f"fourge {versions['fourge']}")
    if evidence.index is None and evidence.job is not None:
        facts.append(_progress(evidence))
    return facts


def _progress(evidence: Evidence) -> str:
    """How far an unfinished job is; its shards' names say how many steps there are."""
    assert evidence.job is not None
    done = len(evidence.job.records)
    if not done:
        return "no step committed yet"
    steps = int(evidence.job.records[-1].shard.removesuffix(".safetensors").rpartition("-")[2])
    eta = evidence.metrics[-1].entry.get("eta_seconds") if evidence.metrics else None
    left = "" if eta is None else f", about {format_seconds(eta)} left"
    return f"not finished: {done} of {steps} steps committed{left}"


def _tiles(evidence: Evidence) -> list[tuple[str, str, str]]:
    tiles = []
    if evidence.fidelity is not None:
        kl, top = evidence.fidelity["kl_div"], evidence.fidelity["top1_agreement"]
        before, after = evidence.fidelity["perplexity_bf16"], evidence.fidelity["perplexity_nvfp4"]
        tiles.append(("KL(BF16‖NVFP4)", f"{kl['mean']:.4f}", f"{_error(kl, 4)} nats a token"))
        tiles.append(
            ("Top-1 agreement", f"{100 * top['mean']:.1f} %", f"{_error(top, 1, 100)} points, {top['tokens']:,} tokens")
        )
        tiles.append(("Perplexity", f"{after['mean']:.2f}", f"{_error(after, 2)}; BF16 {before['mean']:.2f}"))
    if evidence.weights is not None:
        size = evidence.weights
        files = "file" if size.count == 1 else "files"
        tiles.append(("Weights", format_bytes(size.nbytes), f"{format_binary(size.nbytes)} in {size.count} {files}"))
    if evidence.plan is not None:
        sizes = evidence.plan.sizes
        share = sizes.quantized_parameters / sizes.parameters
        tiles.append(("Parameters", _count(sizes.parameters), f"{share:.1%} of them in four bits"))
    return tiles


def _error(estimate: Mapping[str, Any], digits: int, factor: float = 1.0) -> str:
    error = estimate["standard_error"]
    return "" if error is None else f"± {factor * error:.{digits}f}"


def _count(number: int) -> str:
    return f"{number / 1e9:,.2f} G" if number >= 1e9 else f"{number / 1e6:,.1f} M"


def record_section(evidence: Evidence, made_with: str) -> Section:
    """Settings, versions and events, so that every figure above traces to a run."""
    settings, events = evidence.settings, evidence.events
    rows = [] if settings is None else [(key, _setting(value)) for key, value in sorted(settings.items())]
    rows += [(f"version of {name}", value) for name, value in sorted((evidence.versions or {}).items())]
    listed = [(event.get("step", ""), event_text(event)) for event in events]
    body: tuple[Node, ...] = (
        folded("Settings and versions", table(("setting", "value"), rows, class_="words")) if rows else None,
        folded(f"Events ({len(listed)})", table(("step", "event"), listed, class_="words")) if listed else None,
        note(
            "± is one standard error, clustered by sequence or question; intervals are 95 %. Everything on this page "
            "is from files of the checkpoint's directory; the page loads nothing. fourge.json, .fourge/job.json, "
            "metrics.jsonl and the shards are written by ",
            tag("code", "fourge quantize"),
            " with the settings above; evaluation.json and the samples by the commands in Recovery. Made with: ",
            tag("code", made_with),
        ),
    )
    finding = f"The run reported {len(events) or 'no'} {'event' if len(events) == 1 else 'events'}{_kinds(events)}"
    if evidence.record is None:
        finding = "The directory has neither job.json nor fourge.json: its run is not known"
    return Section("record", "Run", finding, body, evidence.record)


def _kinds(events: Sequence[Mapping[str, Any]]) -> str:
    """What was reported and how often, where a heading has room for it."""
    counted = Counter(str(event["event"]) for event in events)
    if not 0 < len(counted) <= _MOST_KINDS:
        return ""
    return ": " + "; ".join(f"{name} ({count:,} ×)" if count > 1 else name for name, count in counted.items())


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else without_folder(str(value))
