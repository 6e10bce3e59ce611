"""The card's metadata, as the hub understands it: what the model is of, under which licence, its scores."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_scores import shots
from fourge.publishing.evidence import StoredEvaluation

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

_FROM_THE_SOURCE = ("license", "license_name", "license_link", "language")
_TAGS = {"NVFP4": ("w4a4",), "NVFP4A16": ("w4a16",), "FP8": ("fp8", "w8a8")}
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
            dataset, subset, split = _dataset(found, task["task"])
            yield EvalResult(
                task_type="text-generation",
                task_name="Text Generation",
                dataset_type=dataset or task["task"],
                dataset_name=f"{task['task']}{_share(found, task['task'])}",
                dataset_config=subset,
                dataset_split=split,
                metric_type=task["metric"],
                metric_name=task["metric"] if task["filter"] == "none" else f"{task['metric']} ({task['filter']})",
                metric_value=round(task["quantized"]["score"], 6),
                metric_args=_metric_args(found, task),
            )


def _metric_args(found: StoredEvaluation, task: Mapping[str, Any]) -> dict[str, Any]:
    asked = found.asked(task["task"]) if found.is_subset(task["task"]) else None
    known = {
        "num_fewshot": shots(found, task),
        "num_samples": None if asked is None else asked[0],
        "thinking": found.content["settings"].get("thinking"),
    }
    return {key: value for key, value in known.items() if value is not None}


def _share(found: StoredEvaluation, task: str) -> str:
    """Said beside the dataset's name wherever the score is not of all items: nobody takes it for the task's."""
    if not found.is_subset(task):
        return ""
    asked = found.asked(task)
    return " (not all items)" if asked is None else f" ({asked[0]:,} of {asked[1]:,} items)"


def _dataset(found: StoredEvaluation, task: str) -> tuple[str | None, str | None, str | None]:
    """The hub dataset of a task, its subset and its split, as lm-eval's results have them; None for a group and for
    local data. Of a split asked in part, the part is named as the `datasets` library names slices."""
    config = found.results.get("configs", {}).get(task, {})
    dataset = config.get("dataset_path")
    if not isinstance(dataset, str) or dataset.startswith(("/", ".")) or dataset.count("/") != 1:
        return None, None, None
    split = config.get("test_split") or config.get("validation_split")
    asked = found.asked(task)
    if split is not None and asked is not None and found.is_subset(task):
        split = f"{split}[:{asked[0]}]"
    return dataset, config.get("dataset_name"), split


def _pipeline_tag(card: CardFacts) -> str | None:
    architectures = card.evidence.config.get("architectures") or []
    return "text-generation" if any(name.endswith(_CAUSAL) for name in architectures) else None


def _tags(card: CardFacts) -> list[str]:
    plan, model_type = card.evidence.plan, card.evidence.config.get("model_type")
    schemes = ["NVFP4"] if plan is None else plan.schemes
    kinds = [_TAGS[scheme] for scheme in schemes]
    tags = [
        "fourge",
        "nvfp4",
        "fp4",
        *(tag for kind in kinds for tag in kind),
        "quantized",
        str(card.quantization.get("quant_method") or ""),
        "vllm",
    ]
    tags += [str(model_type or ""), *(card.source_card.inherited("tags") or [])]
    return list(dict.fromkeys(tag for tag in tags if tag))


def _datasets(card: CardFacts) -> list[str] | None:
    data = card.evidence.data
    if data is None or data["calibration"]["origin"].get("kind") != "hub":
        return None
    return [str(data["source"])]
