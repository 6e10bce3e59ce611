"""What the card does not show, from what its files say and lack."""

from collections.abc import Iterator, Mapping
from typing import Any

from fourge.publishing.card_details import calibration_text
from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_section import Section
from fourge.publishing.markdown import bullets, plain
from fourge.report.evaluation_text import limit_text

_SUITE = "openllm-v1"
_SIGNIFICANT = 0.05


def limitations(card: CardFacts) -> Section:
    """One line a limitation; what is true of every quantized model, and more where a file says so."""
    lines = [*_of_the_arithmetic(card), *_of_the_data(card), *_of_the_fidelity(card), *_of_the_evaluation(card)]
    lines.append("What the base model gets wrong, makes up or should not say, this one does too; see the base model.")
    return Section("Limitations", bullets(lines))


def _of_the_arithmetic(card: CardFacts) -> Iterator[str]:
    plan = card.evidence.plan
    if plan is None or "NVFP4" not in plan.schemes:
        return
    weight_only = [fit.gpu for fit in plan.gpus if fit.kernel is not None and fit.kernel.startswith("Marlin")]
    yield (
        f"Without FP4 tensor cores ({', '.join(weight_only)}, …) engines multiply with the weights alone quantized "
        "(W4A16); a score taken there is not one of W4A4."
    )


def _of_the_data(card: CardFacts) -> Iterator[str]:
    data, plan = card.evidence.data, card.evidence.plan
    if data is None:
        return
    yield (
        f"Calibrated on one source, {calibration_text(data)}: text unlike it (other languages, code, long "
        "documents) was not looked at."
    )
    if plan is not None and data["max_seq_length"] < plan.request.max_model_len:
        yield (
            f"Nothing longer than {data['max_seq_length']:,} tokens was calibrated or probed, of a context of "
            f"{plan.request.max_model_len:,}."
        )


def _of_the_fidelity(card: CardFacts) -> Iterator[str]:
    if card.evidence.fidelity is None:
        yield "How far the next-token distributions are from the base model's is not recorded."


def _of_the_evaluation(card: CardFacts) -> Iterator[str]:
    from fourge.evaluation.suites import SUITES

    tasks = [task for found in card.evidence.evaluations for task in found.content["tasks"]]
    measured = {task["task"] for task in tasks if task["quantized"] is not None}
    missing = [task.task for task in SUITES[_SUITE].tasks if task.task not in measured]
    if missing:
        yield f"Not measured, of the tasks that cards usually report: {', '.join(missing)}."
    alone = sorted({task["task"] for task in tasks if task["baseline"] is None and task["quantized"] is not None})
    if alone:
        yield f"Measured on this model alone, so that nothing is known of what it lost: {', '.join(alone)}."
    chance = sorted({task["task"] for task in tasks if task["at_chance"]})
    if chance:
        yield f"The base model is at chance on {', '.join(chance)}: these cannot show damage."
    lost = sorted({task["task"] for task in tasks if _is_loss(task)})
    if lost:
        yield f"Lost more than chance explains (Holm's p below {_SIGNIFICANT}): {', '.join(lost)}."
    for found in card.evidence.evaluations:
        yield from _of_one_evaluation(plain(found.name), found.content)


def _is_loss(task: Mapping[str, Any]) -> bool:
    return task["holm_p"] is not None and task["holm_p"] < _SIGNIFICANT and task["delta"]["value"] < 0


def _of_one_evaluation(name: str, content: Mapping[str, Any]) -> Iterator[str]:
    numerics = content["engine"]["numerics"]
    if "native" not in numerics:
        yield f"{name}: scores are of {numerics}; FP4 hardware adds in another order, so single items may differ."
    limits = content["settings"].get("limits") or {}
    if content["settings"]["limit"] is not None:
        yield f"{name}: {limit_text(content['settings']['limit'])} of every task or subject alone."
    elif limits:
        yield f"{name}: not all items of {', '.join(sorted(limits))}."
    found = content["contamination"]
    seen = sum(found["items"].values()) if found is not None else 0
    if found is not None and found["checked_against"] is None:
        yield f"{name}: not checked against the calibration set, whose text was not kept."
    if found is not None and seen:
        yield f"{name}: {seen} items share {found['ngram']} words in a row with the calibration set."
