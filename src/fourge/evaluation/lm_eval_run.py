"""One run of lm-eval over a benchmark, the same for every model; what cannot be run is refused before it begins."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Self

from fourge.errors import InputError
from fourge.evaluation.benchmark import Benchmark, Prompts
from fourge.evaluation.task_data import TaskData
from fourge.evaluation.tasks import import_lm_eval

Engine = Literal["walk", "hf", "vllm"]
SEED = 1234
"""lm-eval's default seed of the examples' choice."""
_OTHER_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed")


@dataclass(frozen=True)
class LmEvalRun:
    """One run of lm-eval's `simple_evaluate` for any model; the same in every call.

    `samples` lists the items of every task where tasks have limits of their own, else None.
    """

    benchmark: Benchmark
    samples: Mapping[str, list[int]] | None

    @classmethod
    def prepare(cls, benchmark: Benchmark, engine: Engine) -> Self:
        """Builds the tasks once, so that what cannot be run is refused before anything long begins."""
        leaves = [
            (choice, task)
            for choice, built in zip(benchmark.choices, _build(benchmark), strict=True)
            for task in _leaves(built)
        ]
        seen: dict[str, str] = {}
        for choice, task in leaves:
            if task.task_name in seen:
                raise InputError(
                    f"--tasks: {seen[task.task_name]} and {choice.task} both hold {task.task_name}; drop one"
                )
            seen[task.task_name] = choice.task
            _refuse(task, engine, benchmark.prompts.gen_kwargs)
        if benchmark.prompts.limit is not None or all(choice.limit is None for choice in benchmark.choices):
            return cls(benchmark, None)
        samples = {}
        for choice, task in leaves:
            count = len(task.eval_docs)
            samples[task.task_name] = list(range(count if choice.limit is None else min(choice.limit, count)))
        return cls(benchmark, samples)

    def __call__(self, lm: Any) -> dict[str, Any]:
        """lm-eval's results of a model, with samples."""
        lm_eval = import_lm_eval()
        prompts = self.benchmark.prompts
        with _opened(self.benchmark.data), _quietly():
            results: dict[str, Any] = lm_eval.simple_evaluate(
                model=lm,
                tasks=_build(self.benchmark),
                num_fewshot=prompts.num_fewshot,
                limit=None if self.samples is not None else prompts.limit,
                samples=self.samples,
                # Standard errors are ours: paired, from the samples.
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=prompts.apply_chat_template,
                fewshot_as_multiturn=prompts.fewshot_as_multiturn,
                gen_kwargs=prompts.gen_kwargs,
                task_manager=self.benchmark.index.manager,
                system_instruction=prompts.system_instruction,
                fewshot_random_seed=SEED if prompts.seed is None else prompts.seed,
                **({} if prompts.seed is None else dict.fromkeys(_OTHER_SEEDS, prompts.seed)),
            )
        return results | _about_prompts(lm, prompts)


def _opened(data: TaskData | None) -> Any:
    return nullcontext() if data is None else data.answering()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a bar for every subject's prompts, and without the commit of whatever folder the user stands in."""
    import lm_eval.api.task as task
    import lm_eval.evaluator as evaluator

    bar, commit = task.tqdm, evaluator.get_git_commit_hash
    task.tqdm = lambda docs, **options: docs
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        task.tqdm, evaluator.get_git_commit_hash = bar, commit


def _build(benchmark: Benchmark) -> list[Any]:
    with _opened(benchmark.data):
        return benchmark.index.build(benchmark.choices)


def _leaves(built: Any) -> list[Any]:
    """The tasks of a group, however deep, or the task itself."""
    return list(built.get_all_tasks()) if hasattr(built, "get_all_tasks") else [built]


def _refuse(task: Any, engine: Engine, gen_kwargs: str | None) -> None:
    """InputError for a task that runs what a model wrote, looks at pictures, or samples where the walk is greedy."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"--tasks {task.task_name}: runs code that the model wrote; run it with lm-eval in a sandbox")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"--tasks {task.task_name}: not text alone; leave it out")
    settings = dict(getattr(task.config, "generation_kwargs", None) or {}) | parse_gen_kwargs(gen_kwargs)
    generates = task.OUTPUT_TYPE == "generate_until"
    if engine == "walk" and generates and samples_tokens(settings):
        raise InputError(
            f"--tasks {task.task_name}: samples its answers ({settings}), and the walk generates greedily alone; "
            "add --gen-kwargs do_sample=false,temperature=0, or use --engine hf or vllm"
        )


def samples_tokens(settings: Mapping[str, Any]) -> bool:
    """Whether generation settings draw tokens at random: as lm-eval's `hf` model reads them."""
    temperature = float(settings.get("temperature") or 0.0)
    return bool(settings.get("do_sample", temperature > 0.0)) and temperature != 0.0


def parse_gen_kwargs(text: str | None) -> dict[str, Any]:
    """`temperature=0.6,do_sample=true` as lm-eval reads it; InputError for what is not of that form."""
    from lm_eval.utils import simple_parse_args_string

    try:
        return dict(simple_parse_args_string(text)) if text else {}
    except ValueError as error:
        raise InputError(f"--gen-kwargs {text}: write NAME=VALUE,NAME=VALUE") from error


def _about_prompts(lm: Any, prompts: Prompts) -> dict[str, Any]:
    """What lm-eval's own command records beside the results, so that `fourge compare` can say why prompts differ."""
    from lm_eval.utils import hash_string

    instruction = prompts.system_instruction
    template = lm.chat_template(True) if prompts.apply_chat_template else None
    return {
        "fewshot_as_multiturn": prompts.fewshot_as_multiturn,
        "chat_template_sha": hash_string(template) if template else None,
        "system_instruction_sha": hash_string(instruction) if instruction else None,
    }
