"""`fourge evaluate`: benchmark scores of a model and its quantized copy, item by item, whatever the model's size."""

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fourge._version import __version__
from fourge.errors import InputError
from fourge.progress import mute
from fourge.settings import ComputeDtype

if TYPE_CHECKING:
    from fourge.evaluation.benchmark import Benchmark
    from fourge.evaluation.data_list import ListedTask
    from fourge.evaluation.engine_choice import EngineOption
    from fourge.evaluation.evaluation_run import Models
    from fourge.evaluation.fetch_data import FetchedDataset
    from fourge.evaluation.requests import Role
    from fourge.evaluation.suites import Thinking
    from fourge.walk.ranks import Ranks

_MODES: "Mapping[str | None, tuple[Thinking | None, ...]]" = {
    None: (None,),
    "on": ("on",),
    "off": ("off",),
    "both": ("off", "on"),
}


@dataclass(frozen=True)
class EvaluateResult:
    """What `fourge evaluate` did: evaluations, or the list of data, or data fetched.

    `evaluations` are the contents of `evaluation.json`, one a thinking mode, `folders` where each lies.
    """

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    listed: "list[ListedTask]" = field(default_factory=list)
    fetched: "list[FetchedDataset]" = field(default_factory=list)
    fetched_to: Path | None = None


def evaluate(
    quantized: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The quantized directory; without it, --baseline alone.")
    ] = None,
    *,
    baseline: Annotated[
        str | None, typer.Option(help="The model it was made from, a directory or hub id; without it, OUT alone.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub --baseline.")] = None,
    suite: Annotated[str | None, typer.Option(help="openllm-v1, hermes4 or smoke.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="lm-eval's names of tasks, groups or tags; with --suite, only those of it.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", "--num_fewshot", min=0, help="Shots for --tasks.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="The first items of every task or subject alone; below 1, that share of them.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the choice of shots, and all else lm-eval seeds [default: lm-eval's].")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", "--include_path", help="Folder with more task files, for --tasks.")
    ] = None,
    system_instruction: Annotated[
        str | None, typer.Option("--system-instruction", "--system_instruction", help="Text before every prompt.")
    ] = None,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--apply-chat-template/--no-apply-chat-template",
            "--apply_chat_template",
            help="Prompts in the model's chat template [default: the suite's; no for --tasks].",
        ),
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
            "--fewshot_as_multiturn",
            help="Shots as turns of a conversation [default: where there is a template].",
        ),
    ] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option("--gen-kwargs", "--gen_kwargs", help="lm-eval's: temperature=0.6,do_sample=true.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="The score to report: METRIC, METRIC,FILTER or TASK=METRIC; repeated.")
    ] = None,
    thinking: Annotated[
        Literal["on", "off", "both"] | None, typer.Option(help="Turn thinking on or off in the chat template.")
    ] = None,
    engine: Annotated[
        Literal["auto", "walk", "hf", "vllm"],
        typer.Option(help="auto: hf where a GPU holds either model with room to spare, else the walk."),
    ] = "auto",
    baseline_url: Annotated[str | None, typer.Option(help="An OpenAI server of the baseline, for vllm.")] = None,
    quantized_url: Annotated[
        str | None, typer.Option(help="An OpenAI server of OUT, for vllm; beside a walk it drafts answers.")
    ] = None,
    numerics: Annotated[
        str | None, typer.Option(help="What the servers compute in, which they do not say: 'W4A4 native', 'W4A16'.")
    ] = None,
    task_data: Annotated[
        list[Path] | None, typer.Option(help="Folder with the tasks' data, instead of the hub; repeated.")
    ] = None,
    list_data: Annotated[bool, typer.Option("--list-data", help="Say what data is needed, and stop.")] = False,
    fetch_data: Annotated[
        Path | None, typer.Option(help="Fetch the data from the hub into a folder for --task-data, and stop.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [default: in OUT/.fourge/evaluate/].")
    ] = None,
    restart: Annotated[bool, typer.Option(help="Throw away what an earlier run left in the folder.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests at once, for hf and servers.")] = 8,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens through a layer at once, for the walk [default: from memory].")
    ] = None,
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="Arithmetic; auto is float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
) -> EvaluateResult:
    """Score a model and its quantized copy on the same questions, and say what the copy kept.

    lm-eval asks and scores. The walk answers for both models from one reading of the weights, so a model may be any
    size; the same command continues a walk that was stopped. Under torchrun its ranks share the walk, and give the same
    answers. Raises InputError for what the caller can mend.
    """
    limit = _require_limit(limit)
    command = _command_line(locals())
    import torch

    from fourge.evaluation.benchmark import PromptOptions, choose_benchmark
    from fourge.evaluation.engine_choice import choose_engine
    from fourge.evaluation.evaluation_run import Computing, EvaluationRun
    from fourge.evaluation.following import follow, leading
    from fourge.evaluation.scores import parse_wishes
    from fourge.evaluation.task_data import TaskData
    from fourge.walk.device import resolve_device
    from fourge.walk.ranks import join_ranks

    arithmetic = resolve_device(device, compute_dtype, threads)
    torch.set_num_threads(arithmetic["threads"])
    ranks = join_ranks(arithmetic["device"])
    ranks.require_same({**arithmetic, "fourge": __version__, "torch": torch.__version__}, "all ranks need the same")
    del arithmetic["threads"]
    if not ranks.first:
        mute()
        follow(ranks)
        return EvaluateResult()
    with leading(ranks):
        prompts = PromptOptions(
            apply_chat_template, fewshot_as_multiturn, num_fewshot, gen_kwargs, limit, system_instruction, seed
        )
        data = TaskData([Path(folder) for folder in task_data]) if task_data else None
        benchmark = choose_benchmark(suite, tasks, prompts, data, None if include_path is None else Path(include_path))
        if list_data or fetch_data is not None:
            return _data_alone(benchmark, None if fetch_data is None else Path(fetch_data))
        if thinking is not None and not benchmark.prompts.apply_chat_template:
            raise InputError(f"--thinking {thinking}: goes through the chat template; add --apply-chat-template")
        models = _locate_models(baseline, revision, None if quantized is None else Path(quantized))
        folder = _choose_folder(output, models, benchmark.name)
        given: dict[Role, str | None] = {"baseline": baseline_url, "quantized": quantized_url}
        urls = {role: url for role, url in given.items() if url is not None}
        computing = Computing(
            engine=choose_engine(_engine_of(ranks, engine), models.paths, urls, arithmetic["device"]),
            batch_size=batch_size,
            micro_batch_tokens=micro_batch_tokens,
            urls=urls,
            numerics=numerics,
            restart=restart,
            ranks=ranks,
            **arithmetic,
        )
        result = EvaluateResult()
        for mode in _MODES[thinking]:
            run = EvaluationRun(
                benchmark=benchmark.in_mode(mode).with_data(),
                models=models,
                computing=computing,
                thinking=mode,
                folder=folder if thinking != "both" else folder / f"thinking-{mode}",
                metrics=parse_wishes(metric or []),
                command=command,
            )
            result.evaluations.append(run.run())
            result.folders.append(run.folder)
        return result


def _engine_of(ranks: "Ranks", asked: "EngineOption") -> "EngineOption":
    """The engine asked for; several ranks have the walk alone to share. InputError where they are to have another."""
    if ranks.size > 1 and asked in ("hf", "vllm"):
        raise InputError(f"--engine {asked} is work for one process: leave torchrun out, or say --engine walk")
    return asked if ranks.size == 1 else "walk"


def _require_limit(limit: float | None) -> int | float | None:
    """A number of items, or a share below 1, as lm-eval takes it; InputError for neither."""
    if limit is None or 0 < limit < 1:
        return limit
    if limit < 1 or limit != int(limit):
        raise InputError(f"--limit {limit}: give a whole number of items, or a share between 0 and 1")
    return int(limit)


def _command_line(given: Mapping[str, Any]) -> str:
    """The command of these arguments, those left at their defaults left out."""
    words = ["fourge", "evaluate"]
    for name, parameter in inspect.signature(evaluate).parameters.items():
        value = given[name]
        if value == parameter.default:
            continue
        option = f"--{name.replace('_', '-')}"
        if name == "quantized":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [word for one in (value if isinstance(value, list) else [value]) for word in (option, str(one))]
    return shlex.join(words)


def _data_alone(benchmark: "Benchmark", fetch_to: Path | None) -> EvaluateResult:
    """`--list-data` and `--fetch-data`: for a suite, of the tasks of all its modes."""
    from fourge.evaluation.data_list import list_task
    from fourge.evaluation.fetch_data import fetch_data

    choices = {choice.task: choice for mode in _MODES["both"] for choice in benchmark.in_mode(mode).choices}
    needs = {task: benchmark.needs(choice) for task, choice in choices.items()}
    if fetch_to is not None:
        fetched = fetch_data([need for of_task in needs.values() for need in of_task], fetch_to)
        return EvaluateResult(fetched=fetched, fetched_to=fetch_to)
    listed = [list_task(task, of_task, benchmark.suite, benchmark.data) for task, of_task in needs.items()]
    return EvaluateResult(listed=listed)


def _locate_models(baseline: str | None, revision: str | None, quantized: Path | None) -> "Models":
    """The models on this machine; InputError for neither, an unfinished OUT, or a baseline that is quantized or not
    what OUT was made from."""
    from fourge.checkpoint.reader import Checkpoint, require_unquantized
    from fourge.checkpoint.source import locate
    from fourge.checks.files import require_quantized
    from fourge.evaluation.evaluation_run import Models
    from fourge.evaluation.same_source import require_same_source

    if baseline is None and quantized is None:
        raise InputError("name a quantized directory, or a --baseline, or both")
    paths: dict[Role, Path] = {}
    names: dict[Role, str] = {}
    if baseline is not None:
        paths["baseline"], names["baseline"] = locate(str(baseline), revision), str(baseline)
        require_unquantized(Checkpoint.open(paths["baseline"]))
    if quantized is not None:
        require_quantized(quantized)
        if not (quantized / "config.json").is_file():
            raise InputError(f"{quantized}: not finished; the `fourge quantize` command that began it continues it")
        Checkpoint.open(quantized)
        paths["quantized"], names["quantized"] = quantized, str(quantized)
    unknown = require_same_source(paths["quantized"], paths["baseline"]) if len(paths) == 2 else None
    return Models(paths, names, () if unknown is None else (unknown,))


def _choose_folder(output: Path | None, models: "Models", name: str) -> Path:
    if output is not None:
        return Path(output)
    if models.quantized is None:
        raise InputError("--baseline alone: where are the results to go? name a folder with --output")
    return models.quantized / ".fourge" / "evaluate" / name
