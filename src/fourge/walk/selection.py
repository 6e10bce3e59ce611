"""`--targets` and `--ignore` in compressed-tensors' language, resolved by its own matcher."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from fourge.errors import InputError


def select_linears(linears: Mapping[str, nn.Module], targets: Iterable[str], ignore: Iterable[str]) -> frozenset[str]:
    """Full names among `linears` (modules by name, on the meta device will do) that match `targets`, not `ignore`.

    A target is a class name (`Linear`), a module's name, or a regular expression after `re:`. Raises InputError
    for an expression that does not compile, and for one that names no module at all.
    """
    from compressed_tensors.utils import is_match

    targets, ignore = tuple(targets), tuple(ignore)
    for option, patterns in (("--targets", targets), ("--ignore", ignore)):
        for pattern in patterns:
            try:
                matches = any(is_match(name, module, pattern) for name, module in linears.items())
            except re.error as error:
                raise InputError(f"{option} {pattern}: not a regular expression: {error}") from error
            if not matches:
                raise InputError(f"{option} {pattern} matches no Linear of this model, such as {next(iter(linears))}")
    return match_linears(linears, targets, ignore)


def match_linears(linears: Mapping[str, nn.Module], targets: Iterable[str], ignore: Iterable[str]) -> frozenset[str]:
    """The names that `select_linears` gives, for patterns of a checkpoint: those that match nothing are allowed.

    Raises re.error for an expression that does not compile.
    """
    from compressed_tensors.utils import is_match

    targets, ignore = tuple(targets), tuple(ignore)
    return frozenset(
        name
        for name, module in linears.items()
        if any(is_match(name, module, target) for target in targets)
        and not any(is_match(name, module, pattern) for pattern in ignore)
    )
