"""Answers to generation requests in the walk engine, for every model, kept on disk as they are made.

    FOLDER/generation/
      baseline.json, quantized.json   a model's answers so far and the drafts of the pass under way
      baseline-pass-00000/            a verifying walk under way, as scoring_job.py keeps it

Where the quantized model fits in memory it answers there, greedily, and its answers are the baseline's drafts; past
a difference it drafts again from the baseline's token. Without a quantized model the baseline drafts for itself if
it fits. What does not fit is walked for its own answers too, on drafts looked up in the text, or on those of a server
of the quantized model where one is named: then both models' answers are the walk's, whatever the server computes in.
"""

import hashlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from fourge._version import __version__
from fourge.checkpoint.durable import disk_errors_named
from fourge.evaluation.budget import choose_micro_batch, require_room, row_cost
from fourge.evaluation.draft_journal import DraftJournal, DraftState
from fourge.evaluation.draft_models import (
    Fit,
    ResidentModel,
    batches,
    choose_rows,
    draft_by_look_up,
    draft_following,
    draft_with,
    find_fit,
    say_drafted,
)
from fourge.evaluation.draft_server import DraftServer
from fourge.evaluation.drafting import Answer, Draft, answer_verified
from fourge.evaluation.following import walk_together
from fourge.evaluation.generation import GenerationReader, Question
from fourge.evaluation.lanes import ScoringLane
from fourge.evaluation.requests import GenerateRequest, Role, ScoreRequest
from fourge.evaluation.scoring import plan_scoring
from fourge.evaluation.scoring_job import ScoringJob
from fourge.evaluation.scoring_walk import ScoringWalk
from fourge.evaluation.walk_lm import Prompting


@dataclass(frozen=True)
class GeneratedText:
    """An answer as lm-eval is given it, how many tokens the model made for it, and whether it was cut off at
    `max_gen_toks`."""

    text: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class GenerationOutcome:
    """How a model's answers were made.

    `drafted_by` is "itself" (in memory, no passes), "quantized", "baseline", "server" or "look-up". An answer verified
    in a pass counts once there in `verified`; of `drafted` tokens `accepted` were right.
    """

    drafted_by: str
    passes: int
    verified: int
    drafted: int
    accepted: int

    @property
    def mean_accepted(self) -> float | None:
        """Drafted tokens that a verified answer keeps a pass, its model's own token at the end not counted."""
        return self.accepted / self.verified if self.verified else None

    def described(self) -> dict[str, Any]:
        """As `evaluation.json` has it."""
        return asdict(self) | {"mean_accepted": self.mean_accepted}


class WalkGeneration:
    """Answers distinct requests for all `lanes`; everything else of the walk engine's settings.

    `server` serves the quantized model and drafts in its place; None where there is no such server.
    `outcomes` has how it went, a role, after `answer`.
    """

    def __init__(
        self,
        lanes: Mapping[Role, ScoringLane],
        prompting: Prompting,
        folder: Path,
        micro_batch_tokens: int | None,
        restart: bool,
        server: DraftServer | None = None,
    ) -> None:
        self.outcomes: dict[Role, GenerationOutcome] = {}
        self._lanes = lanes
        self._prompting = prompting
        self._folder = folder / "generation"
        self._micro_batch_tokens = micro_batch_tokens
        self._server = server
        if restart:
            shutil.rmtree(self._folder, ignore_errors=True)

    def answer(self, requests: Sequence[GenerateRequest]) -> dict[Role, list[GeneratedText]]:
        """Texts in the order of the requests. Stopped at any time it goes on to the same ones.

        Raises InputError for requests that are not greedy, before anything is computed.
        """
        readers = {
            role: GenerationReader(self._prompting, lane.checkpoint.directory) for role, lane in self._lanes.items()
        }
        answers = {role: [Answer(reader.question(request)) for request in requests] for role, reader in readers.items()}
        with disk_errors_named(self._folder):
            others: list[Answer] | None = None
            for role in sorted(self._lanes, reverse=True):  # the quantized model first: its answers are drafts
                self._complete(role, answers[role], others)
                others = answers[role]
        return {
            role: [
                GeneratedText(readers[role].text(answer.question, answer.tokens), len(answer.tokens), answer.truncated)
                for answer in answers[role]
            ]
            for role in self._lanes
        }

    def _complete(self, role: Role, answers: list[Answer], others: list[Answer] | None) -> None:
        lane = self._lanes[role]
        journal = DraftJournal(
            self._folder / f"{role}.json",
            self._fingerprint(lane, answers),
            answers,
            lambda: DraftState(self._budget(lane), choose_rows(lane, answers)),
        )
        if all(answer.ended for answer in answers):
            print(f"{role}: all {len(answers):,} answers were there already", file=sys.stderr)
        elif role == "quantized" and self._server is None and self._fit.form is not None:
            journal.state.drafted_by = "itself"
            self._decode(answers, journal)
        else:
            draft = self._draft(journal.state, answers, others)
            answer_verified(answers, draft, _Verifier(role, lane, self._folder, journal.state), journal)
        self._remove_passes(role)
        self._report(role, journal.state, len(answers))

    def _decode(self, answers: list[Answer], journal: DraftJournal) -> None:
        """The resident model's own answers, kept a batch at a time."""
        done = 0
        for chosen in batches(answers, journal.state.batch_rows):
            begun = [answers[number] for number in chosen]
            if not all(answer.ended for answer in begun):
                for answer, tokens in zip(begun, self._resident.decode(begun), strict=True):
                    answer.take(tokens)
                journal.save(answers)
            done += len(chosen)
            say_drafted("quantized", done, len(answers))

    def _draft(self, state: DraftState, answers: Sequence[Answer], others: Sequence[Answer] | None) -> Draft:
        known = {} if others is None else {id(ours): its for ours, its in zip(answers, others, strict=True)}
        otherwise: Draft
        if self._server is not None:
            state.drafted_by, otherwise = "server", self._server.draft
        elif self._fit.form is None:
            print(
                f"The {self._drafter} model cannot draft in memory ({self._fit}): drafts are looked up in the text, "
                "which takes more passes",
                file=sys.stderr,
            )
            state.drafted_by, otherwise = "look-up", draft_by_look_up(known)
        else:
            state.drafted_by, otherwise = self._drafter, draft_with(lambda: self._resident, state.batch_rows)
        return draft_following(known, otherwise) if known else otherwise

    @property
    def _drafter(self) -> Role:
        """The model that drafts in memory if it fits there."""
        return "quantized" if "quantized" in self._lanes else "baseline"

    @cached_property
    def _fit(self) -> Fit:
        return find_fit(self._lanes[self._drafter], list(self._lanes.values()))

    @cached_property
    def _resident(self) -> ResidentModel:
        return ResidentModel(self._lanes[self._drafter], widen=self._fit.form == "widened")

    def _budget(self, lane: ScoringLane) -> int:
        return self._micro_batch_tokens or choose_micro_batch((lane,))

    def _fingerprint(self, lane: ScoringLane, answers: Sequence[Answer]) -> dict[str, Any]:
        return {
            "model": lane.checkpoint.digest(),
            "requests": _digest([answer.question for answer in answers]),
            "micro_batch_tokens": self._micro_batch_tokens,
            "compute_dtype": str(lane.walk.dtype),
            "fourge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def _remove_passes(self, role: Role) -> None:
        for path in self._folder.glob(f"{role}-pass-*"):
            shutil.rmtree(path)

    def _report(self, role: Role, state: DraftState, count: int) -> None:
        outcome = GenerationOutcome(state.drafted_by, state.passes, state.verified, state.drafted, state.accepted)
        self.outcomes[role] = outcome
        if outcome.mean_accepted is not None:
            print(
                f"{role}: {count:,} answers in {outcome.passes} passes over the weights; an answer kept "
                f"{outcome.mean_accepted:.1f} of {state.drafted / state.verified:.1f} drafted tokens a pass",
                file=sys.stderr,
                flush=True,
            )


@dataclass(frozen=True)
class _Verifier:
    """A pass of one lane over all drafts, in a folder of its own."""

    role: Role
    lane: ScoringLane
    folder: Path
    state: DraftState

    def __call__(
        self, number: int, prefixes: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        # What follows a draft is not known: any token stands for it, only the model's own is asked for.
        requests = [
            ScoreRequest(np.array([*prefix, *draft, 0], dtype=np.int32), len(draft) + 1)
            for prefix, draft in zip(prefixes, drafts, strict=True)
        ]
        plan = plan_scoring(requests, self.state.micro_batch_tokens, row_cost(self.lane))
        walk = ScoringWalk((self.lane,), plan, title=f"{self.role} pass {number + 1}", keep_top=True)
        folder = self.folder / f"{self.role}-pass-{number:05d}"
        for other in self.folder.glob(f"{self.role}-pass-*"):
            if other != folder:
                shutil.rmtree(other)
        digest = hashlib.sha256(b"".join(request.key for request in requests)).hexdigest()
        with ScoringJob(folder, {"requests": digest}).open() as job:
            if job.result is None:
                require_room((self.lane,), plan.packing, walk.hidden_layout.nbytes, folder, fresh=job.next_step == 0)
                walk_together(walk, job)
            top = job.answers()[f"{self.lane.name}_top"].tolist()
        return [top[first:last] for first, last in zip(plan.first_pair[:-1], plan.first_pair[1:], strict=True)]


def _digest(questions: Sequence[Question]) -> str:
    """SHA-256 in hexadecimal over what the models read and where answers end."""
    content = [
        (q.prompt, q.rule.max_tokens, sorted(q.rule.end_tokens), sorted(q.rule.stops.items())) for q in questions
    ]
    return hashlib.sha256(repr(content).encode()).hexdigest()
