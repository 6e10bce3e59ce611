"""The `walk` engine: both models' answers to all of lm-eval's requests from one pass over their weights.

lm-eval hands requests over a type at a time and one model at a time; the walk wants all of them at once. So lm-eval
runs first on a recorder, the walk answers what was recorded in every lane, and lm-eval runs again for each model on
the recorded answers: prompts, metrics and standard errors are its own.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fourge._version import __version__
from fourge.checkpoint.durable import disk_errors_named
from fourge.evaluation.budget import choose_micro_batch, must_walk_alone, require_room, row_cost
from fourge.evaluation.engine_choice import name_numerics
from fourge.evaluation.following import walk_together
from fourge.evaluation.lanes import ScoringLane, open_lanes
from fourge.evaluation.prompting import load_tokenizer
from fourge.evaluation.requests import GenerateRequest, Results, Role, RunLmEval, ScoreRequest
from fourge.evaluation.scoring import ScoringPlan, plan_scoring
from fourge.evaluation.scoring_job import ScoringJob, digest_requests
from fourge.evaluation.scoring_walk import ScoringWalk
from fourge.progress import announced
from fourge.walk.ranks import Ranks, alone
from fourge.walk.resources import return_freed_layers
from fourge.walk.statistics import Estimate
from fourge.walk.walk_folder import read_stored

if TYPE_CHECKING:
    from fourge.evaluation.draft_server import DraftServer
    from fourge.evaluation.walk_generation import GeneratedText, GenerationOutcome
    from fourge.evaluation.walk_lm import Prompting, Recorder

Scores = dict[bytes, tuple[float, bool]]
"""Log-likelihood in nats and greedy flag by a request's key."""


@dataclass(frozen=True)
class WalkSettings:
    """What to walk over and how; `device` and `compute_dtype` resolved. One of the two models may be None.

    `micro_batch_tokens` None takes what memory allows, and on continuation what the walk was begun with. From
    `max_length` to `chat_template_args` are arguments of lm-eval's `hf` model, with its meaning. A server of the
    quantized model at `draft_url` drafts answers to generation requests, `draft_concurrency` at once.
    """

    baseline: Path | None
    quantized: Path | None
    folder: Path
    compute_dtype: str
    device: str
    micro_batch_tokens: int | None = None
    max_length: int | None = None
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)
    restart: bool = False
    draft_url: str | None = None
    draft_concurrency: int = 1
    ranks: Ranks | None = None
    """Those that share the walk, on devices of their own; None for this process alone, on `device`."""


@dataclass(frozen=True)
class WalkOutcome:
    """What the walk says beside the answers. Token counts are a lane's; `bytes_read` are of weights, in this run.

    KL(bf16‖nvfp4) in nats and top-1 agreement are means over the distinct tokens that predict a scored one, with
    standard errors clustered by context; None unless both models were walked.
    """

    tokens_requested: int
    tokens_walked: int
    kl_div: Estimate | None
    top1_agreement: Estimate | None
    seconds: float
    bytes_read: int
    continued: bool


class WalkEngine:
    """Opens the models by their headers, and raises InputError for what cannot be walked, before anything is written.

    `outcome` is None until something was walked, `generation` says how generated answers were made, where there are.
    """

    def __init__(self, settings: WalkSettings) -> None:
        self.settings = settings
        self.outcome: WalkOutcome | None = None
        self.generation: dict[Role, GenerationOutcome] = {}
        ranks = settings.ranks or alone(torch.device(settings.device))
        self.lanes = open_lanes(settings.baseline, settings.quantized, getattr(torch, settings.compute_dtype), ranks)
        self.tokenizer = load_tokenizer(self.lanes[0].checkpoint.directory)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models that are walked, baseline first."""
        return tuple(_role(lane) for lane in self.lanes)

    @property
    def numerics(self) -> str:
        """How the quantized model is computed; the empty string where the baseline is alone."""
        model = self.lanes[-1].quantized
        return "" if model is None else name_numerics(model.layout.schemes.values())

    @property
    def max_length(self) -> int:
        """Tokens that the models read at most, as lm-eval's `hf` model resolves it."""
        from fourge.evaluation.walk_lm import Recorder, WalkLM

        return WalkLM(self.prompting, Recorder()).max_length

    @property
    def prompting(self) -> "Prompting":
        """How lm-eval's text reaches both models: by the first one's tokenizer."""
        from fourge.evaluation.walk_lm import Prompting

        settings = self.settings
        return Prompting(
            self.tokenizer,
            self.lanes[0].config,
            settings.max_length,
            settings.add_bos_token,
            settings.prefix_token_id,
            settings.chat_template_args,
        )

    def evaluate(self, run_lm_eval: RunLmEval) -> dict[Role, Results]:
        """lm-eval's results of every model. A walk that was stopped goes on; one that is finished is not redone."""
        from fourge.evaluation.walk_lm import Recorder, Replay, WalkLM

        before = self._bytes_read
        recorder = Recorder()
        server = self._draft_server
        if server is not None:
            server.require_ready()
        with announced("Collecting lm-eval's requests"):
            run_lm_eval(WalkLM(self.prompting, recorder))
        if server is not None and not recorder.to_generate:
            print("No task generates: the server is not asked for drafts", file=sys.stderr, flush=True)
        texts = self._texts(list(recorder.to_generate.values()))
        scores = self._scores(recorder)
        assert self.outcome is not None
        self.outcome = replace(self.outcome, bytes_read=self._bytes_read - before)
        results: dict[Role, Results] = {}
        for role in self.roles:
            with announced(f"{role}: lm-eval's scores"):
                replay = Replay(scores[role], {key: generated.text for key, generated in texts[role].items()})
                results[role] = run_lm_eval(WalkLM(self.prompting, replay))
            _note_lengths(results[role], texts[role])
        return results

    @cached_property
    def _draft_server(self) -> "DraftServer | None":
        from fourge.evaluation.draft_server import DraftServer

        url = self.settings.draft_url
        return None if url is None else DraftServer(url, self.settings.draft_concurrency)

    @property
    def _bytes_read(self) -> int:
        return sum(lane.checkpoint.bytes_read for lane in self.lanes)

    def _texts(self, requests: Sequence[GenerateRequest]) -> dict[Role, dict[bytes, "GeneratedText"]]:
        if not requests:
            return {role: {} for role in self.roles}
        from fourge.evaluation.walk_generation import WalkGeneration

        return_freed_layers()
        settings = self.settings
        lanes = dict(zip(self.roles, self.lanes, strict=True))
        generation = WalkGeneration(
            lanes, self.prompting, settings.folder, settings.micro_batch_tokens, settings.restart, self._draft_server
        )
        generated = generation.answer(requests)
        self.generation = generation.outcomes
        return {
            role: {request.key: text for request, text in zip(requests, generated[role], strict=True)}
            for role in self.roles
        }

    def _scores(self, recorder: "Recorder") -> dict[Role, Scores]:
        requests = list(recorder.to_score.values())
        if not requests:
            self.outcome = WalkOutcome(0, 0, None, None, seconds=0.0, bytes_read=0, continued=False)
            return {role: {} for role in self.roles}
        return self.score(requests, recorder.tokens_requested)

    def score(self, requests: Sequence[ScoreRequest], tokens_requested: int | None = None) -> dict[Role, Scores]:
        """Walks distinct requests, or takes the answers of the finished walk over them that is in the folder.

        `tokens_requested` is what they and their duplicates hold; their own sum where it is left out. Sets `outcome`.
        """
        began = time.monotonic()
        return_freed_layers()
        folder = self.settings.folder / "walk"
        budget = self._micro_batch_tokens(folder)
        plan = plan_scoring(requests, budget, row_cost(self.lanes[0]))
        requested = tokens_requested or sum(len(request.inputs) for request in requests)
        walked = plan.packing.num_tokens
        saving = f"{requested:,} tokens asked for, {walked:,} to walk, {requested / walked:.1f} times fewer"
        print(f"Shared beginnings: {saving}", file=sys.stderr, flush=True)
        before = self._bytes_read
        job = ScoringJob(folder, self._fingerprint(requests, budget))
        with disk_errors_named(folder), job.open(restart=self.settings.restart):
            continued = job.next_step > 0
            if job.result is None:
                self._walk(job, plan)
            answers, result = job.answers(), job.result
        assert result is not None
        self.outcome = WalkOutcome(
            tokens_requested=requested,
            tokens_walked=walked,
            kl_div=_estimate(result["kl_div"]),
            top1_agreement=_estimate(result["top1_agreement"]),
            seconds=time.monotonic() - began,
            bytes_read=self._bytes_read - before,
            continued=continued,
        )
        return {_role(lane): _by_key(requests, lane, answers) for lane in self.lanes}

    def _walk(self, job: ScoringJob, plan: ScoringPlan) -> None:
        walk = ScoringWalk(self.lanes, plan)
        require_room(self.lanes, plan.packing, walk.hidden_layout.nbytes, job.folder, fresh=job.next_step == 0)
        walk_together(walk, job)

    def _micro_batch_tokens(self, folder: Path) -> int:
        """The option; else what the walk in the folder was begun with, for its layout hangs on it; else from memory.
        Where sequences cannot share a row, 1: each has its own."""
        if must_walk_alone(self.lanes[0]):
            return 1
        if self.settings.micro_batch_tokens is not None:
            return self.settings.micro_batch_tokens
        stored = None if self.settings.restart else read_stored(folder)
        if stored is not None:
            return int(stored["fingerprint"]["micro_batch_tokens"])
        return choose_micro_batch(self.lanes)

    def _fingerprint(self, requests: Sequence[ScoreRequest], budget: int) -> dict[str, Any]:
        """Everything that a bit of the answers depends on but device and threads, as for a quantization."""
        return {
            **{_role(lane): lane.checkpoint.digest() for lane in self.lanes},
            "requests": digest_requests([request.key for request in requests]),
            "micro_batch_tokens": budget,
            "compute_dtype": self.settings.compute_dtype,
            "fourge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def _role(lane: ScoringLane) -> Role:
    return "baseline" if lane.name == "bf16" else "quantized"


def _by_key(requests: Sequence[ScoreRequest], lane: ScoringLane, answers: Mapping[str, Any]) -> Scores:
    likelihoods = answers[f"{lane.name}_log_likelihood"].tolist()
    greedy = answers[f"{lane.name}_greedy"].tolist()
    keys = [request.key for request in requests]
    return dict(zip(keys, zip(likelihoods, greedy, strict=True), strict=True))


def _note_lengths(results: Results, texts: Mapping[bytes, "GeneratedText"]) -> None:
    """Adds to the samples of tasks that generate how long the model's own answers were, as text does not say it:
    `generated_tokens`, and `truncated` where `max_gen_toks` ended one; a list each, a request an entry."""
    for samples in results["samples"].values() if texts else ():
        for sample in samples:
            keys = [GenerateRequest(*given).key for given in sample["arguments"] if isinstance(given[-1], Mapping)]
            if keys:
                sample["generated_tokens"] = [texts[key].tokens for key in keys]
                sample["truncated"] = [texts[key].truncated for key in keys]


def _estimate(stored: Mapping[str, Any] | None) -> Estimate | None:
    return None if stored is None else Estimate(**stored)
