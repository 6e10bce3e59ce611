"""One evaluation from beginning to end: an engine answers, lm-eval scores, the two models are compared, all is kept."""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourge._version import __version__
from fourge.checkpoint.durable import disk_errors_named
from fourge.evaluation.benchmark import Benchmark
from fourge.evaluation.comparison import Comparison, CountTokens, compare_runs
from fourge.evaluation.engine_choice import emulated_numerics, file_bytes
from fourge.evaluation.folder import begin, finish, write_lane
from fourge.evaluation.lm_eval_run import SEED, Engine, LmEvalRun
from fourge.evaluation.prompting import load_tokenizer, require_chat_template, thinking_arguments
from fourge.evaluation.runs import Run, open_run
from fourge.evaluation.suites import Thinking
from fourge.progress import announced, peak_resident_bytes
from fourge.walk.job import FOLDER
from fourge.walk.machine import describe_machine

if TYPE_CHECKING:
    from fourge.evaluation.requests import Results, Role
    from fourge.walk.ranks import Ranks

_ROLES: "tuple[Role, Role]" = ("baseline", "quantized")
NOT_SAID = "numerics not stated"
"""Of a server, which does not say what it computes in."""


@dataclass(frozen=True)
class Models:
    """The two models by role, either of which may be left out: what the user called them, and where they lie.

    `notes` say what a reader of the scores should know of them.
    """

    paths: "Mapping[Role, Path]"
    names: "Mapping[Role, str]"
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> Path | None:
        """The quantized directory."""
        return self.paths.get("quantized")

    def described(self) -> dict[str, Any]:
        """As `evaluation.json` has them; None for one left out."""
        return {
            role: {"name": self.names[role], "path": str(self.paths[role])} if role in self.paths else None
            for role in _ROLES
        }


@dataclass(frozen=True)
class Computing:
    """Which engine, where and in what arithmetic; `numerics` is what the user says of servers.

    `batch_size` requests at once for the engine `hf` and for servers; `micro_batch_tokens` for the walk, None: as many
    as memory allows. With the walk the one URL that there may be is of a server that drafts.
    """

    engine: Engine
    device: str
    compute_dtype: str
    batch_size: int
    micro_batch_tokens: int | None = None
    urls: "Mapping[Role, str]" = field(default_factory=dict)
    numerics: str | None = None
    restart: bool = False
    ranks: "Ranks | None" = None


@dataclass(frozen=True)
class _Answers:
    """What an engine gave: results by role, its own words on its arithmetic, and what only the walk measures."""

    results: "dict[Role, Results]"
    numerics: str
    bytes_read: int
    per_token: dict[str, Any] | None = None
    sharing: dict[str, int] | None = None
    drafting: "dict[Role, dict[str, Any]] | None" = None


@dataclass(frozen=True)
class EvaluationRun:
    """A benchmark in one thinking mode, two models and an engine; `folder` gets everything.

    `metrics` are the user's wishes as `scores.parse_wishes` gives them, `command` what is to be recorded.
    """

    benchmark: Benchmark
    models: Models
    computing: Computing
    thinking: Thinking | None
    folder: Path
    metrics: Mapping[str, str]
    command: str

    def run(self) -> dict[str, Any]:
        """Evaluates; returns the content of `evaluation.json`. Raises InputError for what the user can mend."""
        began = time.monotonic()
        arguments = self._template_arguments()
        run_lm_eval = LmEvalRun.prepare(self.benchmark, self.computing.engine)
        answers = self._answer(run_lm_eval, arguments)
        with disk_errors_named(self.folder):
            return self._keep(answers, began)

    def _keep(self, answers: _Answers, began: float) -> dict[str, Any]:
        """Writes samples, results and at last `evaluation.json`, whose content it returns."""
        with announced("Comparing"):
            begin(self.folder)
            for role, results in answers.results.items():
                write_lane(self.folder / role, results)
            runs = {role: self._open(role) for role in _ROLES}
            comparison = compare_runs(
                runs["baseline"],
                runs["quantized"],
                tasks=[choice.task for choice in self.benchmark.choices],
                metrics=self.metrics,
                count_tokens=self._token_counter(),
            )
        content = self._content(answers, comparison, self._contamination(runs))
        content["cost"]["seconds"] = time.monotonic() - began
        finish(self.folder, content)
        return content

    def _template_arguments(self) -> dict[str, Any]:
        """Checks every model's chat template, where one is used; the arguments are the same for both."""
        arguments: dict[str, Any] = {}
        if self.benchmark.prompts.apply_chat_template:
            for directory in self.models.paths.values():
                tokenizer = load_tokenizer(directory)
                require_chat_template(tokenizer, directory)
                arguments = thinking_arguments(tokenizer, directory, self.thinking)
        return arguments

    def _answer(self, run_lm_eval: LmEvalRun, arguments: dict[str, Any]) -> _Answers:
        answer = {"walk": self._walk, "hf": self._in_memory, "vllm": self._ask_servers}[self.computing.engine]
        return answer(run_lm_eval, arguments)

    def _walk(self, run_lm_eval: LmEvalRun, arguments: dict[str, Any]) -> _Answers:
        from fourge.evaluation.engine import WalkEngine, WalkSettings

        engine = WalkEngine(
            WalkSettings(
                baseline=self.models.paths.get("baseline"),
                quantized=self.models.quantized,
                folder=self.folder,
                compute_dtype=self.computing.compute_dtype,
                device=self.computing.device,
                micro_batch_tokens=self.computing.micro_batch_tokens,
                chat_template_args=arguments,
                restart=self.computing.restart,
                draft_url=self.computing.urls.get("quantized"),
                draft_concurrency=self.computing.batch_size,
                ranks=self.computing.ranks,
            )
        )
        results = engine.evaluate(run_lm_eval)
        outcome = engine.outcome
        assert outcome is not None
        per_token = None
        if outcome.kl_div is not None and outcome.top1_agreement is not None:
            per_token = {"kl_div": asdict(outcome.kl_div), "top1_agreement": asdict(outcome.top1_agreement)}
        sharing = None
        if outcome.tokens_walked:
            sharing = {"tokens_requested": outcome.tokens_requested, "tokens_walked": outcome.tokens_walked}
        drafting = {role: made.described() for role, made in engine.generation.items()} or None
        return _Answers(results, engine.numerics, outcome.bytes_read, per_token, sharing, drafting)

    def _in_memory(self, run_lm_eval: LmEvalRun, arguments: dict[str, Any]) -> _Answers:
        from fourge.evaluation.hf_engine import HfEngine

        engine = HfEngine(
            models=self.models.paths,
            compute_dtype=self.computing.compute_dtype,
            device=self.computing.device,
            batch_size=self.computing.batch_size,
            chat_template_args=arguments,
        )
        read = sum(file_bytes(directory) for directory in self.models.paths.values())
        return _Answers(engine.evaluate(run_lm_eval), emulated_numerics(self.models.quantized), read)

    def _ask_servers(self, run_lm_eval: LmEvalRun, arguments: dict[str, Any]) -> _Answers:
        from fourge.evaluation.server_engine import ServerEngine

        engine = ServerEngine(
            urls=self.computing.urls,
            tokenizers=self.models.paths,
            concurrency=self.computing.batch_size,
            apply_chat_template=self.benchmark.prompts.apply_chat_template,
            chat_template_args=arguments,
        )
        return _Answers(engine.evaluate(run_lm_eval), self.computing.numerics or NOT_SAID, 0)

    def _open(self, role: "Role") -> Run:
        return open_run(self.folder / role) if role in self.models.paths else Run(role, {})

    def _token_counter(self) -> CountTokens:
        tokenizer = load_tokenizer(next(iter(self.models.paths.values())))
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)

    def _contamination(self, runs: "Mapping[Role, Run]") -> dict[str, Any] | None:
        """Which items the quantized model was calibrated on; None without one."""
        from fourge.evaluation.contamination import Contamination, NgramIndex, calibration_texts, check_contamination
        from fourge.evaluation.samples import read_docs

        quantized = self.models.quantized
        if quantized is None:
            return None
        if not (quantized / FOLDER / "tokens.safetensors").is_file():
            return asdict(Contamination.unknown(f"{quantized} kept no calibration tokens in {FOLDER}"))
        samples = runs["quantized"].samples
        with announced("Looking for benchmark items in the calibration text"):
            index = NgramIndex(calibration_texts(quantized))
            found = check_contamination(
                index, str(quantized), {task: read_docs(task, source) for task, source in samples.items()}
            )
        if any(found.items.values()):
            counted = ", ".join(f"{task} {count}" for task, count in found.items.items() if count)
            print(f"warning: items share text with the calibration set: {counted}", file=sys.stderr)
        return asdict(found)

    def _content(
        self, answers: _Answers, comparison: Comparison, contamination: dict[str, Any] | None
    ) -> dict[str, Any]:
        served = self.computing.engine == "vllm"
        prompts = self.benchmark.prompts
        packages = {"lm_eval": "lm_eval", "transformers": "transformers", "torch": "torch"}
        return {
            "kind": "fourge-evaluation",
            "version": 1,
            "suite": None if self.benchmark.suite is None else self.benchmark.suite.name,
            "command": self.command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "engine": {
                "name": self.computing.engine,
                "numerics": answers.numerics,
                "compute_dtype": "the server's" if served else self.computing.compute_dtype,
                "device": "a server" if served else self.computing.device,
                "versions": {"fourge": __version__} | {name: version(package) for name, package in packages.items()},
            },
            "machine": None if served else describe_machine(self.computing.device),
            "models": self.models.described(),
            "settings": {
                "apply_chat_template": prompts.apply_chat_template,
                "fewshot_as_multiturn": prompts.fewshot_as_multiturn,
                "limit": prompts.limit,
                "limits": {c.task: c.limit for c in self.benchmark.choices if c.limit is not None},
                "num_fewshot": prompts.num_fewshot,
                "gen_kwargs": prompts.gen_kwargs,
                "thinking": self.thinking,
                "add_bos_token": None,
                "seed": SEED if prompts.seed is None else prompts.seed,
                "system_instruction": prompts.system_instruction,
            },
            **asdict(comparison),
            "per_token": answers.per_token,
            "sharing": answers.sharing,
            "drafting": answers.drafting,
            "contamination": contamination,
            "cost": {"peak_resident_bytes": peak_resident_bytes(), "bytes_read": answers.bytes_read},
            "notes": self._notes(),
        }

    def _notes(self) -> list[str]:
        mode = f" with thinking {self.thinking}" if self.thinking else ""
        left_out = self.benchmark.left_out
        return [
            *self.models.notes,
            *(f"{task} was left out: it has no data here, or measures nothing{mode}" for task in left_out),
        ]
