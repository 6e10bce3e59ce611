"""`--targets`, `--ignore` and rules in compressed-tensors' language, resolved by its own matcher."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from fourge.errors import InputError
from fourge.settings import LinearScheme


def select_linears(linears: Mapping[str, nn.Module], targets: Iterable[str], ignore: Iterable[str]) -> frozenset[str]:
    """Full names among `linears` (modules by name, on the meta device will do) that match `targets`, not `ignore`.

    A target is a class name (`Linear`), a module's name, or a regular expression after `re:`. Raises InputError
    for an expression that does not compile, and for one that names no module at all.
    """
    chosen, left = (
        frozenset().union(*(require_match(linears, pattern, option) for pattern in patterns))
        for option, patterns in (("--targets", targets), ("--ignore", ignore))
    )
    return chosen - left


def require_match(linears: Mapping[str, nn.Module], pattern: str, where: str) -> frozenset[str]:
    """Full names among `linears` that match `pattern`; InputError that begins with `where` if there are none."""
    from compressed_tensors.utils import is_match

    if pattern in linears:  # a recipe may name every one of a thousand
        return frozenset((pattern,))
    try:
        matching = frozenset(name for name, module in linears.items() if is_match(name, module, pattern))
    except re.error as error:
        raise InputError(f"{where} {pattern}: not a regular expression: {error}") from error
    if not matching:
        raise InputError(f"{where} {pattern} matches no Linear of this model, such as {next(iter(linears))}")
    return matching


def match_schemes(
    linears: Mapping[str, nn.Module], groups: Iterable[tuple[LinearScheme, Iterable[str]]], ignore: Iterable[str]
) -> dict[str, LinearScheme]:
    """What a checkpoint's `groups` of targets make of each of `linears`; patterns that match nothing are allowed.

    Where several targets match, a name goes before an expression and that before a class, as readers have it. Raises
    re.error for an expression that does not compile.
    """
    from compressed_tensors.utils import is_match, match_targets

    schemes = {target: scheme for scheme, targets in groups for target in targets}
    ignore = tuple(ignore)
    found: dict[str, LinearScheme] = {}
    for name, module in linears.items():
        matching = match_targets(name, module, schemes)
        if matching and not any(is_match(name, module, pattern) for pattern in ignore):
            found[name] = schemes[matching[0]]
    return found
