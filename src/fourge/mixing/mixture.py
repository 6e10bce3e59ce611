"""From damages to a recipe: every group's forms, what they cost in bits, and the mixture that a budget buys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourge.checkpoint.writer import safetensors_size
from fourge.errors import InputError
from fourge.mixing.pick import Form, pick
from fourge.mixing.run import stored_bytes
from fourge.settings import LinearScheme, Rule, RuleScheme
from fourge.walk.run import QuantizeRun


@dataclass(frozen=True)
class GroupDamage:
    """Linears of a layer that share their input, and so their scheme. `linears` are full names.

    `damage` has by scheme (the one in FP4, and FP8) an estimate as JSON: of what the layer's output loses.
    """

    layer: int
    name: str
    linears: tuple[str, ...]
    weights: int
    damage: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Mixture:
    """A choice for every group. `bits` are of a weight, on average over all candidates and without global scales.

    `groups` counts them by scheme, `damage` adds theirs up and `damage_in_fp4` what it would be with all in FP4;
    `output_bytes` is the size of all weight files that `fourge quantize --recipe-file` writes.
    """

    target_bits: float
    bits: float
    groups: Mapping[str, int]
    damage: float
    damage_in_fp4: float
    output_bytes: int
    recipe_file: Path


def rank_groups(run: QuantizeRun, measures: Sequence[Mapping[str, Any]]) -> tuple[GroupDamage, ...]:
    """Every group of the model, the one that FP4 hurts most first."""
    found = []
    for layer, measured in enumerate(measures):
        prefix = run.layout.architecture.layer_prefix(layer)
        for group in run.layout.groups(layer):
            linears = tuple(prefix + linear for linear in group.linears)
            weights = sum(run.layout.shapes[f"{linear}.weight"][0] * _columns(run, linear) for linear in linears)
            found.append(GroupDamage(layer, group.name, linears, weights, measured["groups"][group.name]))
    return tuple(sorted(found, key=lambda group: -group.damage[run.settings.scheme]["mean"]))


def _columns(run: QuantizeRun, linear: str) -> int:
    return run.layout.shapes[f"{linear}.weight"][1]


def bits_range(run: QuantizeRun) -> tuple[float, float]:
    """Bits a weight with every candidate in FP4, and with every one as it is."""
    sizes = [_bits(run, tuple(run.layout.quantized), scheme) for scheme in (run.settings.scheme, "BF16")]
    weights = sum(run.layout.shapes[f"{linear}.weight"][0] * _columns(run, linear) for linear in run.layout.quantized)
    return sizes[0] / weights, sizes[1] / weights


def require_possible(run: QuantizeRun, target_bits: float) -> None:
    """Raises InputError for a budget that no mixture has."""
    low, high = bits_range(run)
    if not low <= target_bits < high:
        raise InputError(
            f"--target-bits {target_bits:g}: this model takes {low:g} (all in {run.settings.scheme}) to less than "
            f"{high:g} (all left as they are)"
        )


def _bits(run: QuantizeRun, linears: Sequence[str], scheme: RuleScheme) -> int:
    if scheme == "BF16":
        return 8 * sum(run.source.tensors[f"{linear}.weight"].nbytes for linear in linears)
    return 8 * sum(stored_bytes(run, linear, scheme, scalars=False) for linear in linears)


def choose_schemes(
    run: QuantizeRun, groups: Sequence[GroupDamage], target_bits: float
) -> dict[RuleScheme, list[GroupDamage]]:
    """The groups by the scheme that a budget of `target_bits` a weight buys them, in the model's order.

    Raises InputError where nothing is left in FP4.
    """
    fp4 = run.settings.scheme
    chosen: dict[RuleScheme, list[GroupDamage]] = {fp4: [], "FP8": [], "BF16": []}
    forms = [[_form(run, group, scheme) for scheme in chosen] for group in groups]
    picked = pick(forms, target_bits * sum(group.weights for group in groups))
    for group, form in zip(groups, picked, strict=True):
        chosen[form.scheme].append(group)
    if not chosen[fp4]:
        raise InputError(f"--target-bits {target_bits:g} leaves nothing in {fp4}; lower it")
    return {scheme: sorted(found, key=_place) for scheme, found in chosen.items() if found}


def _place(group: GroupDamage) -> tuple[int, str]:
    return group.layer, group.linears[0]


def _form(run: QuantizeRun, group: GroupDamage, scheme: RuleScheme) -> Form:
    return Form(scheme, _bits(run, group.linears, scheme), _damage(group, scheme))


def _damage(group: GroupDamage, scheme: RuleScheme) -> float:
    return 0.0 if scheme == "BF16" else float(group.damage[scheme]["mean"])


def describe_mixture(
    run: QuantizeRun, chosen: Mapping[RuleScheme, Sequence[GroupDamage]], target_bits: float, recipe_file: Path
) -> Mixture:
    """What the choice comes to."""
    every = [(scheme, group) for scheme, groups in chosen.items() for group in groups]
    kept: dict[str, LinearScheme] = {
        linear: scheme for scheme, group in every if scheme != "BF16" for linear in group.linears
    }
    layout = replace(run.layout, schemes=kept)
    return Mixture(
        target_bits=target_bits,
        bits=sum(_bits(run, group.linears, scheme) for scheme, group in every) / sum(g.weights for _, g in every),
        groups={scheme: len(groups) for scheme, groups in chosen.items()},
        damage=sum(_damage(group, scheme) for scheme, group in every),
        damage_in_fp4=sum(_damage(group, run.settings.scheme) for _, group in every),
        output_bytes=sum(
            safetensors_size(layout.output_specs(step, run.source.tensors)) for step in range(layout.num_steps)
        ),
        recipe_file=recipe_file,
    )


def as_rules(chosen: Mapping[RuleScheme, Sequence[GroupDamage]]) -> list[Rule]:
    """A rule a scheme, every Linear by its name."""
    return [
        Rule(tuple(name for group in groups for name in group.linears), scheme) for scheme, groups in chosen.items()
    ]
