"""The card's metadata, as the hub understands it: what the model is of, under which licence, its scores."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_scores import shots
from fourge.publishing.evidence import StoredEvaluation

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_FROM_THE_SOURCE = ("license", "license_name", "license_link", "language")
_CAUSAL = "ForCausalLM"


def card_data(card: CardFacts) -> "ModelCardData":
    """The front matter. A key that no file and no option gives is left out."""
    from huggingface_hub import ModelCardData

    inherited = {key: card.source_card.inherited(key) for key in _FROM_THE_SOURCE}
    results = list(eval_results(card))
    return ModelCardData(
        base_model=card.base_model,
        base_model_relation="quantized" if card.base_model else None,
        library_name="transformers",
        pipeline_tag=card.source_card.inherited("pipeline_tag") or _pipeline_tag(card),
        quantized_by=card.quantized_by,
        tags=_tags(card),
        datasets=_datasets(card),
        model_name=card.name if results else None,
        eval_results=results or None,
        **inherited,
    )


def eval_results(card: CardFacts) -> "Iterator[EvalResult]":
    """This model's score of every task, a share of 1, in the order of the evaluations."""
    from huggingface_hub import EvalResult

    for found in card.evidence.evaluations:
        for task in found.content["tasks"]:
            if task["quantized"] is None:
                continue
            dataset, subset = _dataset(found, task["task"])
            yield EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=dataset or task["task"],
                dataset_name=task["task"],
                dataset_config=subset,
                metric_type=task["metric"],
                metric_name=task["metric"] if task["filter"] == "none" else f"{task['metric']} ({task['filter']})",
                metric_value=round(task["quantized"]["score"], 6),
                metric_args=_metric_args(found, task),
            )


def _metric_args(found: StoredEvaluation, task: Mapping[str, Any]) -> dict[str, Any]:
    known = {"num_fewshot": shots(found, task), "thinking": found.content["settings"].get("thinking")}
    return {key: value for key, value in known.items() if value is not None}


def _dataset(found: StoredEvaluation, task: str) -> tuple[str | None, str | None]:
    """The hub dataset and subset of a task, as lm-eval's results have it; None for a group and for local data."""
    path = found.folder / "quantized" / "results.json"
    if not path.is_file():
        return None, None
    config = json.loads(path.read_text(encoding="utf-8")).get("configs", {}).get(task, {})
    dataset = config.get("dataset_path")
    if not isinstance(dataset, str) or dataset.startswith(("/", ".")) or dataset.count("/") != 1:
        return None, None
    return dataset, config.get("dataset_name")


def _pipeline_tag(card: CardFacts) -> str | None:
    architectures = card.evidence.config.get("architectures") or []
    return "text-generation" if any(name.endswith(_CAUSAL) for name in architectures) else None


def _tags(card: CardFacts) -> list[str]:
    plan, model_type = card.evidence.plan, card.evidence.config.get("model_type")
    scheme = "nvfp4" if plan is None else plan.scheme.lower()
    arithmetic = "w4a16" if scheme == "nvfp4a16" else "w4a4"
    tags = ["fourge", "nvfp4", "fp4", arithmetic, "quantized", str(card.quantization.get("quant_method") or ""), "vllm"]
    tags += [str(model_type or ""), *(card.source_card.inherited("tags") or [])]
    return list(dict.fromkeys(tag for tag in tags if tag))


def _datasets(card: CardFacts) -> list[str] | None:
    data = card.evidence.data
    if data is None or data["calibration"]["origin"].get("kind") != "hub":
        return None
    return [str(data["source"])]
