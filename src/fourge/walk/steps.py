"""What a quantization does at each step of the walk: the embedding, a decoder layer, the head.

A step writes two temporary files, the output shard and the next hidden states, and gives the record to commit. The
shard is written, and the step committed, by a thread, while the next step reads and computes; before that step opens
hidden states it waits for the commit, so that there are never more than two files of them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

from torch import Tensor

from fourge.checkpoint import compressed_tensors
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.writer import Copied, write_safetensors
from fourge.progress import WalkProgress
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices
from fourge.walk.hidden import HiddenFile, create_together, finish_together
from fourge.walk.job import Job, JobFolder, StepRecord, shard_name
from fourge.walk.lanes import LayerWeights, read_layer
from fourge.walk.layer_step import HiddenStates, LayerStep, StepOutput
from fourge.walk.machine import device_peak
from fourge.walk.one_behind import OneBehind
from fourge.walk.source_digests import SourceDigests
from fourge.walk.walk import Walk
from fourge.walk.weight_step import GroupReader, quantize_weights


@dataclass(frozen=True)
class QuantizingWalk:
    """A walk that quantizes: runs one step at a time for a job. Holds no state between steps but the files."""

    walk: Walk
    layout: Layout
    settings: QuantizeSettings
    choices: Choices

    def costs(self) -> list[float]:
        """What each step costs relative to a decoder layer, for an ETA: arithmetic, or bytes where none is done."""
        sizes = [sum(self.walk.source.tensors[name].nbytes for name in names) for names in self.layout.steps]
        if not self.walk.streams:
            return [size / sizes[1] for size in sizes]
        probe = self.walk.stream("probe", "nvfp4")
        rows = 2 * probe.num_tokens if probe else 0
        # The embedding is looked up; the head is multiplied with the probe's rows alone, in both lanes.
        return [0.01, *[1.0] * self.layout.num_layers, 0.01 + sizes[0] / sizes[1] * rows / self.walk.hidden_layout.rows]

    def run(self, folder: JobFolder, first: int, digests: SourceDigests, progress: WalkProgress) -> None:
        """Runs and commits every step from `first` on. Rank 0 commits, and is to be given its Job as the `folder`;
        there `digests` reads ahead."""
        reader = GroupReader(self.walk)
        with OneBehind("shards") as writing:
            for step in range(first, self.layout.num_steps):
                if isinstance(folder, Job):
                    digests.begin(step)
                self._run_one(step, folder, reader, writing, progress)
        self.walk.ranks.wait()

    def _run_one(
        self, step: int, folder: JobFolder, reader: GroupReader, writing: OneBehind, progress: WalkProgress
    ) -> None:
        if self.walk.streams:
            output, checksum = self._step(step, folder, writing, progress)
        else:
            output, checksum = self._step_without_data(step, reader, progress), None
        name = self.layout.step_name(step)
        self.walk.ranks.require_same(output.decided(), f"{name} came out differently; use machines of one kind")
        if isinstance(folder, Job):
            writing.hand_over(partial(self._commit, step, folder, output, self._entries(step, output), checksum))
        record = {"step": step} | output.measures | device_peak(self.walk.device)
        progress.finish_step(name, output.facts, record)

    def _commit(
        self, step: int, job: Job, output: StepOutput, entries: Mapping[str, Tensor | Copied], checksum: int | None
    ) -> None:
        written = write_safetensors(job.shard_temporary, entries)
        shard = shard_name(step, self.layout.num_steps)
        job.commit(StepRecord(shard, written.size, written.sha256, checksum, output.measures, output.events))

    def _step_without_data(self, step: int, reader: GroupReader, progress: WalkProgress) -> StepOutput:
        if step in (0, self.layout.num_steps - 1):
            return StepOutput()
        return quantize_weights(self.layout, self.choices, step - 1, reader, progress)

    def _step(
        self, step: int, folder: JobFolder, writing: OneBehind, progress: WalkProgress
    ) -> tuple[StepOutput, int | None]:
        last = step == self.layout.num_steps - 1
        ranks = self.walk.ranks
        with ranks.as_one():
            weights = {} if step == 0 or last else read_layer(self.walk, self.layout, step - 1, progress)
            writing.wait()
        # Now the hidden states that this step reads are in their place.
        if last:
            with HiddenFile(folder.hidden_path(step), self.walk.hidden_layout, create=False) as source:
                return self._head(source, progress), None
        with create_together(folder.hidden_temporary, self.walk.hidden_layout, ranks) as target:
            if step == 0:
                output = self._embedding(target, progress)
            else:
                with HiddenFile(folder.hidden_path(step), self.walk.hidden_layout, create=False) as source:
                    output = self._layer(step - 1, weights, HiddenStates(source, target), progress)
            return output, finish_together(target, ranks)

    def _entries(self, step: int, output: StepOutput) -> dict[str, Tensor | Copied]:
        entries: dict[str, Tensor | Copied] = {}
        for name in self.layout.steps[step]:
            linear = name.removesuffix(".weight")
            if linear in output.linears:
                stored = compressed_tensors.tensors(linear, output.linears[linear])
                entries |= {key: tensor.cpu() for key, tensor in stored.items()}
            elif name in output.tensors:
                entries[name] = output.tensors[name].cpu()
            else:
                entries[name] = Copied(self.walk.source, name)
        if output.kv_scales is not None:
            entries |= compressed_tensors.kv_scale_tensors(self.layout.attention(step - 1), output.kv_scales)
        return entries

    def _embedding(self, target: HiddenFile, progress: WalkProgress) -> StepOutput:
        self.walk.embed(target, lambda share, tokens: progress.advance(share, tokens=tokens))
        return StepOutput()

    def _head(self, source: HiddenFile, progress: WalkProgress) -> StepOutput:
        if self.walk.stream("probe", "nvfp4") is None:
            return StepOutput()
        fidelity = self.walk.fidelity(source, "probe", lambda share, _: progress.advance(share))
        return StepOutput(measures={"fidelity": asdict(fidelity)}, facts=f"KL {fidelity.kl_div}")

    def _layer(self, layer: int, weights: LayerWeights, states: HiddenStates, progress: WalkProgress) -> StepOutput:
        return LayerStep(self.walk, self.layout, self.settings, self.choices, layer, weights, states, progress).run()
