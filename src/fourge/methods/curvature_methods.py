"""The methods that walk along the curvature of the output error: GPTQ under searched scales, and Schur replay.

Both need a Hessian of full rank to say anything: where a group saw fewer tokens than it has columns, the weighted
scale search does better than a made-up curvature, takes over, and that is recorded.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fourge.methods.base import RoundRows
from fourge.methods.gptq import gptq
from fourge.methods.hessian import Curvature, by_activity, factorize
from fourge.methods.max import shared_global_scale
from fourge.methods.observe import InputStatistics
from fourge.methods.replay import replay
from fourge.methods.scale_search import search_scales
from fourge.methods.search import Search
from fourge.nvfp4.quantize import QuantizedWeight, group_scales

_REPLAY_WINDOW = 8
"""Codes to both sides of a proposal. 8 did better than 4 on held-out tokens of every Linear tried, 16 no better."""

Round = Callable[[Tensor, Tensor, Tensor, Curvature], QuantizedWeight]
"""(weight, global scale, importance, curvature) → the quantized weight."""


def gptq_under_searched_scales(
    weight: Tensor, global_scale: Tensor, importance: Tensor, curvature: Curvature
) -> QuantizedWeight:
    """GPTQ (`gptq.py`) with the scales that the weighted search finds best for rounding to the nearest."""
    return gptq(weight, search_scales(weight, global_scale, importance), global_scale, curvature)


def replay_from_max_scales(
    weight: Tensor, global_scale: Tensor, importance: Tensor, curvature: Curvature
) -> QuantizedWeight:
    """Schur replay (`replay.py`), its proposals starting from max calibration's scales."""
    return replay(weight, group_scales(weight.float(), global_scale), global_scale, curvature, _REPLAY_WINDOW)


class AlongCurvature:
    """One of the two, by how it rounds a weight once the group's curvature is known."""

    weighs_channels = True
    needs_hessian = True

    def __init__(self, round_weight: Round, *, compensates: bool = False) -> None:
        self._round = round_weight
        self.compensates = compensates

    def prepare_group(
        self, weights: Mapping[str, Tensor], statistics: InputStatistics | None, events: list[dict[str, Any]]
    ) -> RoundRows:
        """See `Method.prepare_group`; the curvature is factored once for all members."""
        assert statistics is not None and statistics.hessian is not None
        hessian, names = statistics.hessian, list(weights)
        columns = weights[names[0]].shape[1]
        if hessian.tokens < columns:
            event = {"event": "fewer tokens than columns: weighted search instead", "linears": names}
            events.append(event | {"tokens": hessian.tokens, "columns": columns})
            return Search().prepare_group(weights, statistics, events)
        scale = shared_global_scale(weights, events)
        importance = hessian.diagonal
        curvature = factorize(hessian.matrix, by_activity(importance), events, "+".join(names))
        return lambda rows: self._round(rows, scale, importance, curvature)
