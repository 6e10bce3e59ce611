"""A source checkpoint held against its own config: the skeleton and the layout, from headers alone."""

from collections.abc import Iterable

import torch

from fourge.checkpoint.architecture import find_architecture
from fourge.checkpoint.layout import Layout, plan_layout
from fourge.checkpoint.reader import Checkpoint, require_finite
from fourge.walk.selection import select_linears
from fourge.walk.skeleton import Skeleton, load_config

_BLOCK_BYTES = 8 << 20


def describe_model(
    source: Checkpoint, targets: Iterable[str], ignore: Iterable[str], device: torch.device
) -> tuple[Skeleton, Layout]:
    """The model that `source` holds and how its quantized form is laid out; InputError where the two disagree."""
    architecture = find_architecture(source.config)
    skeleton = Skeleton(load_config(source.directory), architecture, device)
    layout = plan_layout(
        architecture,
        skeleton.num_layers,
        skeleton.shapes,
        source.tensors,
        skeleton.tied_head,
        select_linears(skeleton.linears, targets, ignore),
    )
    return skeleton, layout


def require_finite_ends(source: Checkpoint, layout: Layout) -> None:
    """Raises InputError for NaN or Inf in what only the last step would otherwise meet, hours from now."""
    for name in (*layout.steps[0], *layout.steps[-1]):
        info = source.tensors[name]
        rows = max(1, _BLOCK_BYTES // (info.nbytes // info.shape[0]))
        for start in range(0, info.shape[0], rows):
            require_finite(source.read(name, slice(start, start + rows)), info, first_row=start)
