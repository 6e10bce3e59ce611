"""One `fourge quantize`, from a request that headers show to be possible to a finished directory."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers

from fourge._version import __version__
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import Checkpoint, require_float, require_unquantized
from fourge.checkpoint.source import locate
from fourge.data import DataRequest, TokenSets, load_token_sets, read_token_sets, save_token_sets
from fourge.errors import InputError
from fourge.progress import WalkProgress, announced
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices, Selection
from fourge.walk.finish import finish_checkpoint
from fourge.walk.hidden import HiddenLayout
from fourge.walk.job import Job, JobFolder
from fourge.walk.machine import describe_machine
from fourge.walk.model import describe_model, require_finite_ends
from fourge.walk.passes import passes, require_data
from fourge.walk.ranks import ALONE, Ranks
from fourge.walk.resident import make_sampler
from fourge.walk.resources import estimate_needs, require_resources
from fourge.walk.skeleton import Skeleton
from fourge.walk.source_digests import SourceDigests
from fourge.walk.steps import QuantizingWalk
from fourge.walk.streams import Stream, lay_out
from fourge.walk.walk import Walk


@dataclass(frozen=True)
class QuantizeRun:
    """A validated request: everything that can be known from headers is known, and nothing is written yet."""

    settings: QuantizeSettings
    output: Path
    source: Checkpoint
    skeleton: Skeleton
    layout: Layout
    choices: Choices
    dtype: torch.dtype
    ranks: Ranks = ALONE

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.ranks.device

    @classmethod
    def prepare(cls, settings: QuantizeSettings, output: Path, ranks: Ranks) -> Self:
        """Reads config and headers, and holds them against the settings; InputError where something cannot be."""
        source = Checkpoint.open(locate(settings.model, settings.revision))
        require_unquantized(source)
        require_float(source)
        skeleton, layout, choices = describe_model(source, Selection.of(settings), ranks.device)
        require_data(settings, choices)
        if output.resolve() == source.directory.resolve():
            raise InputError(f"-o {output} is the source itself; name a new directory")
        dtype = getattr(torch, settings.compute_dtype)
        return cls(settings, output, source, skeleton, layout, choices, dtype, ranks)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that a byte of the output depends on; what a continued run must share."""
        return {
            **self.settings.fingerprint(),
            "source": self.source.digest(),
            "fourge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @contextmanager
    def open_job(self, restart: bool) -> Iterator[Job]:
        """The output directory, held; given back without a trace where nothing came of it."""
        written = 0 if restart else sum(path.stat().st_size for path in self.output.glob("model-*.safetensors"))
        self._require_room(0, 0, written)
        with Job(self.output, self.fingerprint(), self.settings.to_json()).open(restart=restart) as job:
            try:
                yield job
            except BaseException:
                if job.next_step == 0 and not job.tokens_path.exists():
                    job.discard()
                else:
                    job.remove_leftovers()
                raise

    def render_sets(self, path: Path) -> None:
        """Writes the run's sequences to `path`: once, so that a continued run sees the same tokens."""
        settings = self.settings
        if settings.calibration == "none" or path.exists():
            return
        request = DataRequest(
            source=settings.calibration,
            num_calibration_samples=settings.num_calibration_samples,
            num_validation_samples=settings.num_validation_samples,
            num_probe_samples=settings.num_probe_samples,
            max_seq_length=settings.max_seq_length,
            seed=settings.seed,
            probe_source=settings.probe,
        )
        sampler = make_sampler(self.source, self.skeleton, self.dtype, self.device)
        vocabulary = int(self.skeleton.config.vocab_size)
        with announced(f"Rendering {settings.calibration}"):
            sets = load_token_sets(request, self.source.directory, vocabulary, sampler)
        save_token_sets(path, sets)

    def read_sets(self, path: Path) -> TokenSets | None:
        """The sequences kept at `path`; None where there are none."""
        return None if self.settings.calibration == "none" else read_token_sets(path)

    def streams(self, sets: TokenSets | None) -> tuple[Stream, ...]:
        """Which set runs in which lane, laid out in one file."""
        if sets is None:
            return ()
        sequences = {
            "calibration": sets.calibration.sequences,
            "validation": sets.validation.sequences,
            "probe": sets.probe.sequences,
        }
        chosen = [(name, lane, sequences[name]) for name, lane in passes(self.settings, self.choices)]
        return lay_out(chosen, self.settings.micro_batch_tokens)

    def _require_room_for(self, streams: tuple[Stream, ...], already_written: int) -> None:
        rows = streams[-1].last_row if streams else 0
        batches = [batch.count * batch.length for stream in streams for batch in stream.batches]
        self._require_room(rows, max(batches, default=0), already_written)

    def _require_room(self, rows: int, longest_batch: int, already_written: int) -> None:
        hidden = HiddenLayout(rows, self.skeleton.hidden_size, self.dtype)
        needs = estimate_needs(self.layout, self.source, self.settings, self.choices, hidden, longest_batch)
        require_resources(needs, self.output, self.device, already_written, self.ranks.local_size)

    def work(self, job: Job | None) -> None:
        """Runs the steps that are left and finishes the directory; a finished one is left as it is.

        Rank 0 brings the job, and the others, called at the same time, None.
        """
        with SourceDigests(self.source, self.layout.steps) as digests:
            self._work(job, digests)

    def _work(self, job: Job | None, digests: SourceDigests) -> None:
        folder = job or JobFolder(self.output)
        with self.ranks.as_one():
            next_step = None if job is None else self._make_ready(job, digests)
        next_step = self.ranks.from_first(next_step)
        if next_step is None:
            return
        with self.ranks.as_one():
            sets = self.read_sets(folder.tokens_path)
            quantizing = self._quantizing_walk(sets)
        steps, costs = self.layout.num_steps, quantizing.costs()
        about = {"machine": describe_machine(self.device), "ranks": self.ranks.size}
        with WalkProgress("quantize", steps, next_step, folder.metrics_path, costs=costs, about=about) as progress:
            quantizing.run(folder, next_step, digests, progress)
        if job is not None:
            provenance = sets.provenance if sets else None
            finish_checkpoint(job, self.source, digests, self.layout, self.settings.kv_cache_scheme, provenance)

    def _make_ready(self, job: Job, digests: SourceDigests) -> int | None:
        """Checks all that is checked once, and renders the text; the step that comes next, None after the last."""
        job.remove_leftovers()
        if job.finished:
            print(f"{self.output} is finished already; --restart would do it again", file=sys.stderr)
            return None
        digests.begin(job.next_step)
        if job.next_step == 0:
            with announced("Checking embedding and head for NaN and Inf"):
                require_finite_ends(self.source, self.layout)
        self.render_sets(job.tokens_path)
        walk = self._quantizing_walk(self.read_sets(job.tokens_path)).walk
        if job.next_step:
            with WalkProgress("committed", job.next_step) as progress:
                checked = partial(progress.finish_step, facts="as committed", record={})
                job.check_committed(walk.hidden_layout if walk.streams else None, checked)
        self._require_room_for(walk.streams, sum(record.size for record in job.records))
        return job.next_step

    def _quantizing_walk(self, sets: TokenSets | None) -> QuantizingWalk:
        walk = Walk(self.skeleton, self.source, self.streams(sets), self.dtype, self.device, self.ranks)
        return QuantizingWalk(walk, self.layout, self.settings, self.choices)
