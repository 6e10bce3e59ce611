"""What a quantization does, counted: tokens through each lane, bytes moved, arithmetic, weights rounded."""

from dataclasses import dataclass

from fourge.planning.facts import ModelFacts, total_bytes
from fourge.settings import QuantizeSettings
from fourge.walk.choices import Choices
from fourge.walk.hidden import HiddenLayout
from fourge.walk.passes import passes
from fourge.walk.smoothing import SAMPLED, WATCHED


@dataclass(frozen=True)
class Tokens:
    """Tokens of each set that runs, the most there can be: 0 for one that does not."""

    calibration: int
    validation: int
    probe: int
    rows: int
    longest_batch: int

    @classmethod
    def of(cls, settings: QuantizeSettings, choices: Choices) -> "Tokens":
        length = settings.max_seq_length
        lanes = passes(settings, choices)
        sets = {
            "calibration": settings.num_calibration_samples * length,
            "validation": settings.num_validation_samples * length,
            "probe": settings.num_probe_samples * length,
        }
        running = {name for name, _ in lanes}
        longest_set = max((sets[name] for name in running), default=0)
        return cls(
            **{name: tokens if name in running else 0 for name, tokens in sets.items()},
            rows=sum(sets[name] for name, _ in lanes),
            longest_batch=min(max(1, settings.micro_batch_tokens // length) * length, longest_set),
        )


@dataclass(frozen=True)
class Work:
    """One run from start to end. FLOP are floating-point operations.

    `flop_curvature`: XᵀX of every group, its factor, and the walk along it. `rounded_bytes`: the source's bytes of
    what the method quantizes; `smoothed_bytes`: of the rows on which smoothing tries its exponents.
    """

    bytes_read: int
    bytes_written: int
    flop_bf16_lane: int
    flop_nvfp4_lane: int
    flop_curvature: int
    rounded_bytes: int
    smoothed_bytes: int


def count_work(
    facts: ModelFacts, settings: QuantizeSettings, choices: Choices, tokens: Tokens, hidden: HiddenLayout, output: int
) -> Work:
    """The work of quantizing `facts`, whose `output` files have so many bytes."""
    assert facts.source is not None
    layers = _layers(facts, tokens, settings.max_seq_length, choices)
    token = sum(layer.whole for layer in layers)
    head = 2 * facts.head_parameters * tokens.probe
    # Smoothing looks at some of both sets before the layer is run.
    looked_at = min(tokens.calibration, WATCHED) + min(tokens.validation, WATCHED) if settings.smooth else 0
    bf16 = (tokens.calibration + tokens.validation + tokens.probe + looked_at) * token + head
    nvfp4 = tokens.probe * token + head
    again = facts.num_layers * looked_at
    curvature = 0
    if choices.needs_hessian:
        # The calibration set runs through what is quantized, and before that once more up to every group.
        nvfp4 += tokens.calibration * (token + sum(layer.up_to_groups for layer in layers))
        again += tokens.calibration * sum(layer.groups for layer in layers)
        if choices.compensates:
            # All lanes up to every group, on calibration and some validation tokens; the latter runs on as well.
            before = sum(layer.up_to_groups for layer in layers)
            judged = min(tokens.validation, WATCHED)
            weight_only = int(choices.scales_inputs)
            bf16 += (tokens.calibration + judged) * before
            nvfp4 += tokens.validation * token + judged * before
            nvfp4 += weight_only * ((tokens.calibration + tokens.validation) * token)
            nvfp4 += weight_only * ((tokens.calibration + judged) * before)
            groups = sum(layer.groups for layer in layers)
            again += ((1 + weight_only) * tokens.calibration + (2 + weight_only) * judged) * groups
        curvature = sum(layer.curvature for layer in layers)
    # Hidden states are written once a step but the last, read once a layer and by the head.
    traffic = (facts.num_layers + 1) * hidden.nbytes
    rounded = {f"{linear}.weight": facts.source[f"{linear}.weight"] for linear in facts.quantized}
    in_fp4 = [rounded[f"{linear}.weight"] for linear, scheme in facts.schemes.items() if scheme != "FP8"]
    sampled = sum(min(w.shape[0], SAMPLED) * w.nbytes // w.shape[0] for w in in_fp4)
    return Work(
        bytes_read=_source_bytes_read(facts, tokens) + traffic + again * hidden.row_bytes,
        bytes_written=output + traffic,
        flop_bf16_lane=bf16,
        flop_nvfp4_lane=nvfp4,
        flop_curvature=curvature,
        rounded_bytes=sum(weight.nbytes for weight in rounded.values()),
        smoothed_bytes=sampled if settings.smooth else 0,
    )


@dataclass(frozen=True)
class _Layer:
    """FLOP a token of the whole layer, and of the parts before each of its `groups` that need a Hessian; FLOP of
    curvature."""

    whole: int
    up_to_groups: int
    groups: int
    curvature: int


def _layers(facts: ModelFacts, tokens: Tokens, length: int, choices: Choices) -> list[_Layer]:
    attention = 4 * facts.num_attention_heads * facts.head_dim * length // 2
    found = []
    for layer in range(facts.num_layers):
        prefix = facts.architecture.layer_prefix(layer)
        done = up_to_groups = groups = curvature = 0
        for position, group in enumerate(facts.architecture.groups):
            shapes = [facts.shapes[f"{prefix}{linear}.weight"] for linear in group.linears]
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
            method = choices.methods.get(prefix + group.linears[0])
            if method is not None and method.needs_hessian:
                groups += 1
                up_to_groups += done
                looks = tokens.calibration * (1 + (method.compensates and choices.scales_inputs))
                # Half of XᵀX, for it is symmetric; Cholesky; the walk feeds every column to those after it.
                curvature += looks * columns**2 + columns**3 // 3 + rows * columns**2
                if method.compensates:  # what the lanes are apart times the input: of the output for one Linear alone
                    curvature += 2 * looks * columns * (rows if len(shapes) == 1 else columns)
            done += 2 * rows * columns + (attention if position == 0 else 0)
        found.append(_Layer(done, up_to_groups, groups, curvature))
    return found


def _source_bytes_read(facts: ModelFacts, tokens: Tokens) -> int:
    """Every tensor once; what is copied again when written; embedding and head for the tokens that need them."""
    assert facts.source is not None
    kept = total_bytes(facts.source, lambda name: name.removesuffix(".weight") not in facts.quantized)
    row = facts.source[f"{facts.architecture.embedding}.weight"].nbytes // facts.vocab_size
    looked_up = min(tokens.rows, facts.vocab_size) * row
    head = facts.vocab_size * row if tokens.probe else 0
    return total_bytes(facts.source) + kept + looked_up + head
