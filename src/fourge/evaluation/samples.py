"""What a model answered, item by item: lm-eval's logged samples, as records or in jsonl or parquet files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourge.errors import InputError

Record = Mapping[str, Any]
Source = Path | Sequence[Record]
"""Where samples come from: a `.jsonl` or `.parquet` file, or the records as lm-eval gives them."""

DEFAULT_MAX_GEN_TOKS = 256
"""What lm-eval's models generate at most where a task does not say."""
_LENGTH_ALIASES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class Item:
    """One question, one model's answer to it, and what one filter made of it.

    `prompt` is what the requests' texts have in common at the head of their contexts, `choices` what follows in each
    (empty for generation and rolling requests). `generation` has the generation settings, None for log-likelihoods.
    `loglikelihoods` belong to the choices; `responses` are the generated texts. `values` are lm-eval's scores by
    metric, of whatever kind. `truncated` says whether the answer was cut off at the limit, None where its engine did
    not record that.
    """

    doc_id: int
    prompt: str
    prompt_hash: str
    choices: tuple[str, ...]
    target: str
    target_hash: str
    generation: Mapping[str, Any] | None
    loglikelihoods: tuple[float, ...]
    responses: tuple[str, ...]
    extracted: str | None
    values: Mapping[str, Any]
    truncated: bool | None = None

    @property
    def max_gen_toks(self) -> int:
        """How many tokens the answer may have."""
        settings = self.generation or {}
        return int(next((settings[name] for name in _LENGTH_ALIASES if name in settings), DEFAULT_MAX_GEN_TOKS))


def read_items(task: str, source: Source) -> dict[str, dict[int, Item]]:
    """Items by filter and `doc_id`, both in the order of the source.

    Raises InputError where it holds no samples, is damaged, or has an item twice.
    """
    items: dict[str, dict[int, Item]] = {}
    for place, record in _records(task, source):
        try:
            item, filter_name = parse_item(record), record["filter"]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{place} is no sample of lm-eval ({error!r}); log them with --log_samples") from error
        of_filter = items.setdefault(filter_name, {})
        if item.doc_id in of_filter:
            raise InputError(f"{place}: doc {item.doc_id} is there twice; keep one run of {task} in the file")
        of_filter[item.doc_id] = item
    if not items:
        raise InputError(f"{source if isinstance(source, Path) else task}: no samples in it; evaluate the task again")
    return items


def read_docs(task: str, source: Source) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """`doc_id` and the document behind each item, once."""
    seen = set()
    for _, record in _records(task, source):
        if record["doc_id"] not in seen:
            seen.add(record["doc_id"])
            yield int(record["doc_id"]), record["doc"]


def parse_item(record: Record) -> Item:
    """An item from lm-eval's record of it, as lm-eval gives it or as it writes it to a file."""
    requests = _requests(record["arguments"])
    first = requests[0]
    generation = _without_none(first[1]) if len(first) > 1 and isinstance(first[1], Mapping) else None
    scored = generation is None
    contexts = [_text(request[0]) for request in requests]
    shared = _shared_length(contexts)
    texts = len(first) > 1 and scored
    answers = [[_answer(repeat) for repeat in of_request] for of_request in record["resps"]]
    filtered = record["filtered_resps"][0]
    return Item(
        doc_id=int(record["doc_id"]),
        prompt=contexts[0][:shared],
        prompt_hash=record["prompt_hash"],
        choices=tuple(c[shared:] + r[1] for c, r in zip(contexts, requests, strict=True)) if texts else (),
        target=str(record["target"]),
        target_hash=record["target_hash"],
        generation=generation,
        loglikelihoods=tuple(float(of_request[0]) for of_request in answers) if scored else (),
        responses=() if scored else tuple(str(answer) for answer in answers[0]),
        extracted=None if scored else str(filtered),
        values={metric: record[metric] for metric in record["metrics"]},
        truncated=bool(record["truncated"][0]) if record.get("truncated") else None,
    )


def _requests(arguments: Any) -> list[Sequence[Any]]:
    """An item's requests: lists of arguments, or lm-eval's `{"gen_args_0": {"arg_0": …}}` in files.

    Parquet has a column for every request that any item has: those of others are None.
    """
    if not isinstance(arguments, Mapping):
        return list(arguments)
    rows = (arguments.get(f"gen_args_{index}") for index in range(len(arguments)))
    return [
        [row[f"arg_{index}"] for index in range(len(row)) if row[f"arg_{index}"] is not None]
        for row in rows
        if row is not None
    ]


def _shared_length(contexts: Sequence[str]) -> int:
    """How much the contexts share: all of them mostly, else whole words (WinoGrande's differ, not what follows)."""
    if all(context == contexts[0] for context in contexts):
        return len(contexts[0])
    return contexts[0].rfind(" ", 0, agreement(min(contexts), max(contexts))) + 1


def agreement(first: str, second: str) -> int:
    """How many characters two texts share from their beginning on."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def _text(context: Any) -> str:
    """The text of a context; requests to a chat endpoint have it in a list of one, as JSON."""
    return context if isinstance(context, str) else str(context[0])


def _answer(response: Any) -> Any:
    """Generated text, or the log-likelihood without the flag that says whether it is greedy."""
    return response if isinstance(response, str | float | int) else response[0]


def _without_none(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _records(task: str, source: Source) -> Iterator[tuple[str, Record]]:
    """Records, each with what a message calls it."""
    if not isinstance(source, Path):
        yield from ((f"{task}, sample {number}", record) for number, record in enumerate(source, 1))
    elif source.suffix == ".parquet":
        yield from _parquet_records(source)
    else:
        yield from _json_records(source)


def _json_records(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{place}: damaged ({error}); evaluate the task again") from error
            yield place, record


def _parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    parquet = import_parquet(f"{path}")
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); evaluate the task again") from error
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record


def import_parquet(what: str) -> Any:
    """`pyarrow.parquet`; InputError where it is not installed, naming `what` needs it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{what}: parquet needs pyarrow; pip install pyarrow") from error
    return pyarrow.parquet
