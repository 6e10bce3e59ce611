"""How the checkpoint was made: the recipe, the data, the versions, what it took, and the command that repeats it."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from fourge.progress import format_bytes, format_seconds
from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_section import Section, Trace
from fourge.publishing.evidence import METRICS, Evidence
from fourge.publishing.markdown import bullets, code, facts, plain, without_folder

_METHODS = {
    "max": "max calibration: every scale from the largest magnitude",
    "search": "search: scales that give the smallest error",
    "gptq": "GPTQ: error fed back by the inputs' second moments",
    "replay": "replay: codes and scales chosen together against the inputs' second moments",
    "tuned": "tuned: Schur replay of weights that make up for the rounding before them",
}
_MADE = {"self": "text sampled from the base model", "random": "random tokens"}
"""What a calibration set that lies in no file was, by its kind."""
_RECIPE = "recipe.json"
_LONGEST_RECIPE = 2000
_INSTEAD = "instead"
"""In the name of an event that says that Linears were quantized by another method than the one asked for."""
_UNSAID = ("model", "revision", "device", "threads")
"""Not in the command as they stand: the model and its commit have their own place, and where it ran is no recipe."""


def details(card: CardFacts) -> Section:
    """Method, data, ignored modules, versions, machine, time and memory, events."""
    settings = card.evidence.settings
    if settings is None:
        said = "No file here says how it was made: there is neither `.fourge/job.json` nor `fourge.json`. "
        ignored = ", ".join(f"`{name}`" for name in card.quantization.get("ignore", []))
        left = f"config.json: left as they were: {ignored}. " if ignored else ""
        again = "`fourge quantize` writes them for a checkpoint of its own."
        return Section(
            "Quantization details", f"{said}{left}{again}", missing="fourge.json, which fourge quantize writes"
        )
    rows = [
        ("Method", _method(card, settings)),
        *_data_rows(card, settings),
        ("Left unquantized", ", ".join(f"`{name}`" for name in settings["ignore"]) or "nothing"),
        ("Quantized", ", ".join(f"`{name}`" for name in settings["targets"])),
        ("Seed", str(settings["seed"])),
        *_cost_rows(card, settings),
    ]
    parts = [facts(rows), *_events(card), "To repeat it:", code(reproduction(card, settings))]
    if settings.get("recipe_file"):
        parts += _recipe(settings["recipe_file"])
    return Section("Quantization details", "\n\n".join(parts), _traces(card))


def reproduction(card: CardFacts, settings: Mapping[str, Any]) -> str:
    """The command line with every setting spelled out, so that no default need stay what it was."""
    recorded = (card.evidence.provenance or {}).get("source", {}).get("repository")
    model = recorded or without_folder(str(settings["model"]))
    arguments = ["fourge", "quantize", model, "--output", card.name]
    if card.revision is not None:
        arguments += ["--revision", card.revision]
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if name in _UNSAID or value is None or value is False:
            continue
        if value is True:
            arguments.append(option)
            continue
        if name == "recipe_file":
            arguments += [option, _RECIPE]
            continue
        for one in value if isinstance(value, list) else [value]:
            arguments += [option, without_folder(str(one))]
    return shlex.join(arguments)


def _recipe(rules: list[dict[str, Any]]) -> list[str]:
    """The recipe file, unless it names a thousand Linears: then where it is kept."""
    text = json.dumps({"rules": rules}, indent=1)
    if len(text) > _LONGEST_RECIPE:
        return [f"where `{_RECIPE}` has as `rules` what `settings.recipe_file` has in the file that all this is from."]
    return [f"where `{_RECIPE}` is", code(text, "json")]


def calibration_text(data: Mapping[str, Any]) -> str:
    """The source of the calibration set, with what is known of where it is from."""
    origin = data["calibration"]["origin"]
    known = [f"{key} {origin[key]}" for key in ("config", "split", "revision") if origin.get(key)]
    if "sha256" in origin:
        known.append(f"SHA-256 `{origin['sha256'][:16]}…`")
    name = _MADE.get(origin.get("kind"), str(data["source"]))
    # A path is of no use to a reader; the digest says which file it was.
    shown = name.rpartition("/")[2] if origin.get("kind") in ("file", "saved dataset") else name
    return plain(shown) + (f" ({', '.join(known)})" if known else "")


def _method(card: CardFacts, settings: Mapping[str, Any]) -> str:
    parts = [_METHODS.get(settings["method"], settings["method"])]
    if settings.get("recipe_file"):
        parts.append("scheme and method of some Linears by the recipe file below")
    otherwise = sum(len(event["linears"]) for event in card.evidence.events if _INSTEAD in event["event"])
    if otherwise:
        parts.append(f"{otherwise} Linears another way, as recorded below")
    if settings["scheme"] == "NVFP4":
        parts.append(f"input scales for {settings['input_headroom']:g} times the calibrated range")
    if settings.get("smooth"):
        parts.append("powers of two folded into norms, up_proj and v_proj where validation text gained")
    if settings.get("kv_cache_scheme"):
        parts.append(f"{settings['kv_cache_scheme'].upper()} scales for the KV cache")
    return "; ".join(parts)


def _data_rows(card: CardFacts, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = card.evidence.data
    if data is None:
        return [("Calibration set", "none: weights only" if settings["calibration"] == "none" else "not recorded")]
    rows = [("Calibration set", calibration_text(data))]
    for role, name in (("calibration", "Calibration"), ("validation", "Validation"), ("probe", "Probe")):
        found = data.get(role)
        if found is not None and found["sequences"]:
            text = f"{found['sequences']:,} samples of at most {data['max_seq_length']:,} tokens, {found['tokens']:,} "
            rows.append((f"{name} samples", f"{text}tokens in all (SHA-256 `{found['sha256'][:16]}…`)"))
    return rows


def _cost_rows(card: CardFacts, settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {version}" for name, version in (card.evidence.versions or {}).items())
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    computed = f"computed on {settings['device']} with {threads} in {settings['compute_dtype']}"
    machines = "; then ".join(map(plain, card.evidence.machines)) or "not recorded"
    rows = [("Software", versions), ("Machine", f"{machines}; {computed}")]
    metrics = card.evidence.metrics
    if metrics:
        seconds = format_seconds(sum(step.seconds for step in metrics))
        cpu = [step.entry["cpu_seconds"] for step in metrics if "cpu_seconds" in step.entry]
        busy = f" ({format_seconds(sum(cpu))} of CPU time)" if len(cpu) == len(metrics) else ""
        rows.append(("Time", f"{seconds}{busy} for {len(metrics)} steps, without preparing the text"))
        rows.append(("Peak memory", _peak_text(card.evidence)))
    return rows


def _peak_text(evidence: Evidence) -> str:
    """What was measured of the highest memory; in older logs, what was resident between steps."""
    if evidence.peaks:
        return ", ".join(f"{format_bytes(count)} {what}" for what, count in evidence.peaks)
    memory = max(step.resident_bytes for step in evidence.metrics)
    return f"not recorded; {format_bytes(memory)} resident at most at the end of a step"


def _events(card: CardFacts) -> list[str]:
    counted: dict[str, int] = {}
    for event in card.evidence.events:
        counted[event["event"]] = counted.get(event["event"], 0) + 1
    if not counted:
        return ["Nothing out of the ordinary was recorded."]
    lines = [f"{plain(name)} ({number} ×)" for name, number in sorted(counted.items())]
    return ["Recorded on the way:", bullets(lines)]


def _traces(card: CardFacts) -> tuple[Trace, ...]:
    record = card.evidence.record
    assert record is not None
    traces = [Trace("method, data, settings, events", record, "fourge quantize")]
    versions = "fourge.json" if card.evidence.provenance is not None else record
    traces.append(Trace("software versions", versions, "fourge quantize"))
    if card.evidence.metrics:
        traces.append(Trace("machine, time, peak memory", METRICS, "fourge quantize"))
    return tuple(traces)
