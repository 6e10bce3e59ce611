"""What a quantization without data does with a decoder layer: group after group from disk, never all of it at once."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fourge.checkpoint.compressed_tensors import QuantizedLinear
from fourge.checkpoint.layout import Layout
from fourge.checkpoint.reader import require_finite
from fourge.progress import WalkProgress
from fourge.walk.ahead import read_tensor
from fourge.walk.choices import Choices
from fourge.walk.layer_step import StepOutput
from fourge.walk.row_split import quantize_by_rows
from fourge.walk.walk import Walk


class GroupReader:
    """Reads a group's tensors over those of the group before.

    Memory that a process touches for the first time is cleared page by page, which takes as long as to round what is
    then read into it. So there is one block for each member of a group, as large as the largest that it held. What a
    GPU takes goes through pinned memory, which is kept anyway.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self._blocks: list[Tensor] = []

    def read(self, names: Iterable[str], progress: WalkProgress) -> list[Tensor]:
        """The source's tensors `names`, on the walk's device, good until the next call; InputError for NaN and Inf."""
        with self.walk.ranks.as_one():
            return [self._read(place, name, progress) for place, name in enumerate(names)]

    def _read(self, place: int, name: str, progress: WalkProgress) -> Tensor:
        info = self.walk.source.tensors[name]
        if self.walk.device.type == "cpu":
            tensor = self.walk.source.read_into(name, self._block(place, info.nbytes))
        else:
            tensor = read_tensor(self.walk.source, name, self.walk.device)
        require_finite(tensor, info)
        progress.advance(0.0, read=info.nbytes)
        return tensor

    def _block(self, place: int, nbytes: int) -> Tensor:
        if place == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=torch.uint8))
        if len(self._blocks[place]) < nbytes:
            self._blocks[place] = torch.empty(nbytes, dtype=torch.uint8)
        return self._blocks[place]


def quantize_weights(
    layout: Layout, choices: Choices, layer: int, reader: GroupReader, progress: WalkProgress
) -> StepOutput:
    """Quantizes every group of `layer`; what stays as it is is looked at for NaN and Inf, and copied with the shard."""
    output = StepOutput()
    measured = output.measures["linears"] = {}
    prefix, names = layout.architecture.layer_prefix(layer), layout.steps[layer + 1]
    sizes = {name: reader.walk.source.tensors[name].nbytes for name in names}
    for name in names:
        if name.removesuffix(".weight") not in layout.quantized:
            reader.read([name], progress)
    for group in layout.groups(layer):
        stored = [f"{prefix}{linear}.weight" for linear in group.linears]
        weights = dict(zip(group.linears, reader.read(stored, progress), strict=True))
        round_rows = choices.method(prefix, group).prepare_group(weights, None, output.events)
        for linear, (weight, error) in quantize_by_rows(weights, weights, round_rows, reader.walk.ranks).items():
            output.linears[prefix + linear] = QuantizedLinear(weight, None)
            measured[linear] = {"weight_error": error}
        progress.advance(sum(sizes[name] for name in stored) / sum(sizes.values()))
    errors = [linear["weight_error"] for linear in measured.values()]
    output.facts = f"weight error {max(errors):.4f}" if errors else "kept"
    return output
