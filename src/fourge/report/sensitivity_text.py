"""The ranking of `fourge sensitivity` as text for people."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fourge.progress import format_binary, format_bytes, format_seconds

if TYPE_CHECKING:
    from fourge.mixing.mixture import Mixture
    from fourge.sensitivity import SensitivityResult

_GROUPS = 20
_LAYERS = 8


def sensitivity_summary(result: "SensitivityResult") -> str:
    """The worst groups and layers, then what a budget bought."""
    groups, layers = result.groups[:_GROUPS], result.layers[:_LAYERS]
    width = max(len(group.name) for group in groups)
    lines = [
        f"{result.output}: the layer output's mean squared relative error on {_tokens(result)} held-out tokens",
        f"  {'layer':>5}  {'group':<{width}}  {result.scheme:>20}  {'FP8':>20}",
    ]
    lines += [
        f"  {group.layer:>5}  {group.name:<{width}}  {_estimate(group.damage[result.scheme]):>20}"
        f"  {_estimate(group.damage['FP8']):>20}"
        for group in groups
    ]
    lines += _more(len(result.groups) - len(groups), "groups")
    lines.append(f"  whole layers in {result.scheme}:")
    lines += [f"  {layer.layer:>5}  {'':<{width}}  {_estimate(layer.damage):>20}" for layer in layers]
    lines += _more(len(result.layers) - len(layers), "layers")
    if result.mixture is not None:
        lines += _mixture(result.mixture, result.scheme)
    lines.append(
        f"  took         {format_seconds(result.seconds)}, peak memory {format_bytes(result.peak_resident_bytes)}"
        + (" (continued)" if result.continued else "")
    )
    return "\n".join(lines)


def _tokens(result: "SensitivityResult") -> str:
    return f"{result.layers[0].damage['tokens']:,}"


def _estimate(estimate: Mapping[str, Any]) -> str:
    error = estimate["standard_error"]
    return f"{estimate['mean']:.3e}" + ("" if error is None else f" ± {error:.1e}")


def _more(count: int, what: str) -> list[str]:
    return [f"  … {count} more {what} in sensitivity.json"] if count else []


def _mixture(mixture: "Mixture", scheme: str) -> list[str]:
    counts = ", ".join(f"{count} in {name}" for name, count in mixture.groups.items())
    return [
        f"  mixture      {mixture.bits:.4f} bits a weight of {mixture.target_bits:g}: groups {counts}",
        f"  its damage   {mixture.damage:.4g} in all, {mixture.damage / mixture.damage_in_fp4:.2f} of all in {scheme}",
        f"  its size     {format_bytes(mixture.output_bytes)} ({format_binary(mixture.output_bytes)})",
        f"  recipe       {mixture.recipe_file}",
    ]
