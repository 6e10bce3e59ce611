"""Our own log-probabilities of a few token sequences: the quantized lane alone, from the files that are served."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourge.checkpoint.architecture import find_architecture
from fourge.checkpoint.header import TensorInfo
from fourge.checkpoint.layout import plan_layout
from fourge.checkpoint.reader import Checkpoint
from fourge.checks.config import check_config
from fourge.checks.expected import expect
from fourge.data import read_token_sets
from fourge.errors import InputError
from fourge.progress import WalkProgress
from fourge.walk.head import Targets, score_heads
from fourge.walk.job import FOLDER
from fourge.walk.layer import fill
from fourge.walk.quantized import QuantizedModel
from fourge.walk.skeleton import Skeleton
from fourge.walk.walk import Walk

_HEAD_ROWS = 4096


def read_probe(output: Path, sequences: int, tokens: int) -> list[np.ndarray]:
    """The first `tokens` of the first `sequences` probe sequences that `fourge quantize` kept, int32 1-d each.

    Raises InputError where it kept none.
    """
    path = output / FOLDER / "tokens.safetensors"
    kept = read_token_sets(path).probe.sequences if path.is_file() else ()
    usable = [sequence[:tokens] for sequence in kept if len(sequence) > 1][:sequences]
    if not usable:
        raise InputError(
            f"{path}: --smoke needs probe tokens and none were kept; serve the directory that `fourge quantize` wrote "
            "(with --num-probe-samples), or leave --smoke out"
        )
    return usable


@dataclass(frozen=True)
class Lane:
    """The model as engines run it, a layer at a time; to be asked for log-probabilities."""

    walk: Walk
    model: QuantizedModel

    @classmethod
    def open(cls, output: Path, numerics: str, cache_in_fp8: bool, device: torch.device, dtype: torch.dtype) -> "Lane":
        """A checkpoint in compressed-tensors' layout; `numerics` `W4A16` rounds no activation to FP4."""
        checkpoint = Checkpoint.open(output)
        check, quantization = check_config(checkpoint.config)
        if quantization is None or check.failures:
            raise InputError(f"{output}: {check.failures[0]}; `fourge verify` says more")
        architecture = find_architecture(checkpoint.config)
        expected = expect(output, architecture, quantization)
        skeleton = Skeleton(expected.config, architecture, device)
        # The layout is cut along the source's tensors; of those, names and shapes are all that is left.
        tensors = {
            name: TensorInfo(name, "BF16", shape, output, 0, 2 * prod(shape)) for name, shape in expected.shapes.items()
        }
        layout = plan_layout(
            architecture, skeleton.num_layers, expected.shapes, tensors, skeleton.tied_head, expected.schemes
        )
        model = QuantizedModel(checkpoint, layout, expected.kv_cache_scheme)
        if numerics == "W4A16":
            model = replace(model, rounds_fp4_inputs=False)
        if not cache_in_fp8:
            model = replace(model, kv_cache_scheme=None)
        return cls(Walk(skeleton, checkpoint, (), dtype, device), model)

    @torch.no_grad()
    def log_probs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """log p of every token but the first of each sequence, given those before it; FP64.

        Sequences run one by one and hidden states stay in memory: for a few hundred tokens, not for a whole set.
        """
        architecture = self.walk.skeleton.architecture
        tokens = [torch.from_numpy(sequence.astype(np.int64)) for sequence in sequences]
        with WalkProgress("our log-probabilities", self.model.layout.num_layers) as progress:
            states = [self._embed(f"{architecture.embedding}.weight", ids) for ids in tokens]
            for layer in range(self.model.layout.num_layers):
                with self.model.layer(self.walk, layer, progress) as lane:
                    states = [lane(hidden) for hidden in states]
                progress.finish_step(f"layer {layer}", "", {})
        norm = self.walk.skeleton.new_final_norm()
        fill(norm, {"weight": self._read(f"{architecture.final_norm}.weight")}, self.walk.dtype)
        # The last token of a sequence predicts nothing.
        final = torch.cat([norm(hidden[0, :-1]) for hidden in states])
        targets = torch.cat([ids[1:] for ids in tokens]).to(final.device)
        every = Targets(torch.arange(len(targets), device=final.device), targets)
        (scores,), _ = score_heads(lambda rows: (final[rows],), len(targets), every, self._head())
        return np.split(scores.log_prob, np.cumsum([len(ids) - 1 for ids in tokens])[:-1])

    def _embed(self, name: str, tokens: Tensor) -> Tensor:
        rows = self.model.checkpoint.gather_rows(name, tokens)
        return rows.to(self.walk.device, self.walk.dtype)[None]

    def _head(self) -> Iterator[tuple[Tensor]]:
        skeleton = self.walk.skeleton
        owner = skeleton.architecture.embedding if skeleton.tied_head else skeleton.architecture.head
        name = f"{owner}.weight"
        for start in range(0, self.model.checkpoint.tensors[name].shape[0], _HEAD_ROWS):
            yield (self._read(name, slice(start, start + _HEAD_ROWS)).to(self.walk.dtype),)

    def _read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.model.checkpoint.read(name, rows).to(self.walk.device)
