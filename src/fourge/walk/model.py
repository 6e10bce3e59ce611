"""A source checkpoint held against its own config: the skeleton and the layout, from headers alone."""

import torch

from fourge.checkpoint.architecture import find_architecture
from fourge.checkpoint.layout import Layout, plan_layout
from fourge.checkpoint.reader import Checkpoint, require_finite
from fourge.walk.choices import Choices, Selection
from fourge.walk.skeleton import Skeleton, load_config

_BLOCK_BYTES = 8 << 20


def describe_model(source: Checkpoint, selection: Selection, device: torch.device) -> tuple[Skeleton, Layout, Choices]:
    """The model that `source` holds, how its quantized form is laid out, and what `selection` makes of its Linears.

    Raises InputError where config and headers disagree, and for a selection that is not possible.
    """
    architecture = find_architecture(source.config)
    skeleton = Skeleton(load_config(source.directory), architecture, device)
    choices = selection.resolve(skeleton.linears, architecture, skeleton.num_layers)
    layout = plan_layout(
        architecture,
        skeleton.num_layers,
        skeleton.shapes,
        source.tensors,
        skeleton.tied_head,
        choices.schemes,
    )
    return skeleton, layout, choices


def require_finite_ends(source: Checkpoint, layout: Layout) -> None:
    """Raises InputError for NaN or Inf in what only the last step would otherwise meet, hours from now."""
    for name in (*layout.steps[0], *layout.steps[-1]):
        info = source.tensors[name]
        rows = max(1, _BLOCK_BYTES // (info.nbytes // info.shape[0]))
        for start in range(0, info.shape[0], rows):
            require_finite(source.read(name, slice(start, start + rows)), info, first_row=start)
