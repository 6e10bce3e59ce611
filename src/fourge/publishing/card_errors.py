"""The error of every layer as a picture beside the card; without matplotlib as a table."""

import io
from collections.abc import Sequence
from importlib.util import find_spec

from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_section import Section, Trace
from fourge.publishing.evidence import JOB, LayerMeasures
from fourge.publishing.markdown import NONE, estimate, table

PICTURE = "layer_errors.png"
_TITLE = "Error layer by layer"


def layer_errors(card: CardFacts) -> Section:
    """The picture's place in the card, or the table in its stead, which says how to get the picture."""
    layers = card.evidence.layers
    if not layers:
        body = f"Not known here: {JOB}, which `fourge quantize` writes, is not beside the weights."
        return Section(_TITLE, body, missing=f"{JOB}, which fourge quantize writes")
    intro = (
        "Below: ‖Ŵ − W‖ / ‖W‖ of each Linear's weight. Above: the relative error of the hidden states after each "
        "layer, all layers before it quantized too, on the probe, with its standard error."
    )
    trace = Trace("errors of weights and hidden states", JOB, "fourge quantize")
    if has_matplotlib():
        return Section(_TITLE, f"![Errors of weights and hidden states by layer]({PICTURE})\n\n{intro}", (trace,))
    said = "A table, since matplotlib is not installed: `pip install 'fourge[card]'` makes it a picture."
    return Section(_TITLE, f"{said}\n\n{_layer_table(layers)}", (trace,))


def has_matplotlib() -> bool:
    """Whether a picture can be drawn."""
    return find_spec("matplotlib") is not None


def draw_layer_errors(layers: Sequence[LayerMeasures], name: str) -> bytes:
    """The picture as PNG; needs matplotlib. The same layers give the same bytes under the same matplotlib."""
    from matplotlib.figure import Figure

    probed = [layer for layer in layers if layer.hidden_error is not None]
    figure = Figure(figsize=(9, 6 if probed else 3.5), dpi=120, layout="constrained")
    rows = figure.subplots(2 if probed else 1, 1, squeeze=False, sharex=True)[:, 0]
    if probed:
        means = [layer.hidden_error["mean"] for layer in probed if layer.hidden_error]
        errors = [layer.hidden_error["standard_error"] or 0.0 for layer in probed if layer.hidden_error]
        rows[0].errorbar([layer.layer for layer in probed], means, errors, marker=".", linewidth=1, color="black")
        rows[0].set_ylabel("hidden states")
        rows[0].set_ylim(bottom=0)
    linears = sorted({linear for layer in layers for linear in layer.linears})
    for number, linear in enumerate(linears):
        points = [(layer.layer, layer.linears[linear]["weight_error"]) for layer in layers if linear in layer.linears]
        shape = "osD^v<>Pph"[number % 10]
        rows[-1].plot(*zip(*points, strict=True), shape, markersize=3.5, label=linear.rpartition(".")[2])
    rows[-1].set_ylabel("weights")
    rows[-1].set_xlabel("decoder layer")
    rows[-1].legend(fontsize="x-small", ncols=max(1, len(linears)), loc="upper center", bbox_to_anchor=(0.5, -0.18))
    for axes in rows:
        axes.grid(alpha=0.3)
    figure.suptitle(f"{name}: relative error by layer", fontsize="medium")
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _layer_table(layers: Sequence[LayerMeasures]) -> str:
    rows = []
    for layer in layers:
        errors = {linear: found["weight_error"] for linear, found in layer.linears.items()}
        worst = max(errors, key=lambda linear: errors[linear], default=None)
        weight = NONE if worst is None else f"{errors[worst]:.4f} ({worst})"
        hidden = NONE if layer.hidden_error is None else estimate(layer.hidden_error)
        rows.append([str(layer.layer), hidden, weight])
    return table(("layer", "hidden states", "largest error of a weight"), rows)
