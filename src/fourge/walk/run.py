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
from fourge.walk.job import Job
from fourge.walk.machine import describe_machine
from fourge.walk.model import describe_model, require_finite_ends
from fourge.walk.passes import passes, require_data
from fourge.walk.resident import make_sampler
from fourge.walk.resources import estimate_needs, require_resources
from fourge.walk.skeleton import Skeleton
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
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def prepare(cls, settings: QuantizeSettings, output: Path) -> Self:
        """Reads config and headers, and holds them against the settings; InputError where something cannot be."""
        source = Checkpoint.open(locate(settings.model, settings.revision))
        require_unquantized(source)
        require_float(source)
        device = torch.device(settings.device)
        skeleton, layout, choices = describe_model(source, Selection.of(settings), device)
        require_data(settings, choices)
        if output.resolve() == source.directory.resolve():
            raise InputError(f"-o {output} is the source itself; name a new directory")
        dtype = getattr(torch, settings.compute_dtype)
        return cls(settings, output, source, skeleton, layout, choices, device, dtype)

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

    def token_sets(self, job: Job) -> TokenSets | None:
        """The job's sequences: rendered once, then read back, so that a continued run sees the same tokens."""
        settings = self.settings
        if settings.calibration == "none":
            return None
        if not job.tokens_path.exists():
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
            save_token_sets(job.tokens_path, sets)
        return read_token_sets(job.tokens_path)

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
        require_resources(needs, self.output, self.device, already_written)

    def work(self, job: Job) -> None:
        """Runs the steps that are left and finishes the directory; a finished one is left as it is."""
        job.remove_leftovers()
        if job.finished:
            print(f"{self.output} is finished already; --restart would do it again", file=sys.stderr)
            return
        if job.next_step == 0:
            with announced("Checking embedding and head for NaN and Inf"):
                require_finite_ends(self.source, self.layout)
        sets = self.token_sets(job)
        streams = self.streams(sets)
        walk = Walk(self.skeleton, self.source, streams, self.dtype, self.device)
        quantizing = QuantizingWalk(walk, self.layout, self.settings, self.choices)
        if job.next_step:
            with WalkProgress("committed", job.next_step) as progress:
                checked = partial(progress.finish_step, facts="as committed", record={})
                job.check_committed(walk.hidden_layout if streams else None, checked)
        self._require_room_for(streams, sum(record.size for record in job.records))
        steps, costs = self.layout.num_steps, quantizing.costs()
        about = {"machine": describe_machine(self.device)}
        with WalkProgress("quantize", steps, job.next_step, job.metrics_path, costs=costs, about=about) as progress:
            quantizing.run(job, progress)
        provenance = sets.provenance if sets else None
        finish_checkpoint(job, self.source, self.layout, self.settings.kv_cache_scheme, provenance)
