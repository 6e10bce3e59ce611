"""What each Linear becomes, and by which method: `--scheme` and `--method`, unless a recipe file says otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast

from torch import nn

from fourge.checkpoint.architecture import Architecture, LinearGroup
from fourge.errors import InputError
from fourge.methods import find_method
from fourge.methods.base import Method
from fourge.methods.fp8 import Fp8Rows
from fourge.methods.tuned import MOST_COLUMNS
from fourge.settings import DEFAULT_IGNORE, DEFAULT_TARGETS, LinearScheme, QuantizeSettings, Rule, RuleScheme, Scheme
from fourge.walk.selection import require_match, select_linears

_FP8 = Fp8Rows()
_UNCOMPENSATED = find_method("replay")


@dataclass(frozen=True)
class Choices:
    """`schemes` and `methods` of every Linear that is quantized, by full name; and what any of the methods wants.

    `too_wide` are those of more columns than are compensated: `replay` has taken the place of their `tuned`.
    """

    schemes: Mapping[str, LinearScheme]
    methods: Mapping[str, Method]
    too_wide: frozenset[str] = frozenset()

    def method(self, prefix: str, group: LinearGroup) -> Method:
        """That of a group, whose Linears' names begin with `prefix`."""
        return self.methods[prefix + group.linears[0]]

    def scheme(self, prefix: str, group: LinearGroup) -> LinearScheme:
        """Likewise."""
        return self.schemes[prefix + group.linears[0]]

    @property
    def scales_inputs(self) -> bool:
        """Whether some inputs are rounded to NVFP4, for which calibration finds a scale."""
        return "NVFP4" in self.schemes.values()

    @property
    def weighs_channels(self) -> bool:
        return any(method.weighs_channels for method in self.methods.values())

    @property
    def needs_hessian(self) -> bool:
        return any(method.needs_hessian for method in self.methods.values())

    @property
    def compensates(self) -> bool:
        return any(method.compensates for method in self.methods.values())


@dataclass(frozen=True)
class Selection:
    """What is asked for, in the options' names and patterns; `rules` are a recipe file's."""

    targets: tuple[str, ...] = DEFAULT_TARGETS
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    scheme: Scheme = "NVFP4"
    method: str = "max"
    rules: tuple[Rule, ...] = ()

    @classmethod
    def of(cls, settings: QuantizeSettings) -> Self:
        return cls(settings.targets, settings.ignore, settings.scheme, settings.method, settings.recipe_file or ())

    def resolve(self, linears: Mapping[str, nn.Module], architecture: Architecture, num_layers: int) -> Choices:
        """The choice for each of `linears` that `targets` and `ignore` leave and no rule keeps in BF16.

        Raises InputError for a pattern that is none or names nothing, and for rules that leave nothing in NVFP4, or
        different things in Linears that engines load as one.
        """
        selected = select_linears(linears, self.targets, self.ignore)
        asked_schemes, asked_methods = self._asked({name: linears[name] for name in linears if name in selected})
        schemes: dict[str, LinearScheme] = {}
        methods: dict[str, Method] = {}
        for name in sorted(selected):
            scheme = asked_schemes.get(name, self.scheme)
            if scheme != "BF16":
                schemes[name] = scheme
                methods[name] = _FP8 if scheme == "FP8" else find_method(asked_methods.get(name, self.method))
        wide = {name for name in methods if cast(nn.Linear, linears[name]).in_features > MOST_COLUMNS}
        too_wide = frozenset(name for name in wide if methods[name].compensates)
        choices = Choices(schemes, methods | dict.fromkeys(too_wide, _UNCOMPENSATED), too_wide)
        if self.rules:
            _require_whole_groups(choices, architecture, num_layers)
            if set(schemes.values()) <= {"FP8"}:
                raise InputError("--recipe-file leaves no Linear in NVFP4; give some of them that scheme")
        return choices

    def _asked(self, selected: Mapping[str, nn.Module]) -> tuple[dict[str, RuleScheme], dict[str, str]]:
        """What the rules say of Linears by name; of rules that match, the first one that says something counts."""
        schemes: dict[str, RuleScheme] = {}
        methods: dict[str, str] = {}
        for number, rule in enumerate(self.rules, 1):
            where = f"--recipe-file: rule {number}: of what --targets and --ignore leave,"
            for name in frozenset().union(*(require_match(selected, target, where) for target in rule.targets)):
                if rule.scheme is not None:
                    schemes.setdefault(name, rule.scheme)
                if rule.method is not None:
                    methods.setdefault(name, rule.method)
        return schemes, methods


def _require_whole_groups(choices: Choices, architecture: Architecture, num_layers: int) -> None:
    """Raises InputError, naming two, where Linears that engines load as one matrix differ in scheme or method."""
    for layer in range(num_layers):
        prefix = architecture.layer_prefix(layer)
        for group in architecture.groups:
            first, *others = (prefix + linear for linear in group.linears)
            for other in others:
                one, two = (choices.schemes.get(name, "BF16") for name in (first, other))
                if one != two:
                    difference = f"{first} would be {one} and {other} {two}; give them one scheme"
                elif choices.methods.get(first) is not choices.methods.get(other):
                    difference = f"{first} and {other} would be quantized by two methods; give them one"
                else:
                    continue
                raise InputError(f"--recipe-file: engines load {prefix}{group.name} as one matrix: {difference}")
