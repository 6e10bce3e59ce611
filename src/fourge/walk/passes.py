"""Which set of sequences a quantization runs through which lane: what its settings and its methods ask for."""

from collections.abc import Iterable

from fourge.errors import InputError
from fourge.methods import find_method
from fourge.settings import QuantizeSettings, Rule
from fourge.walk.choices import Choices
from fourge.walk.streams import Lane

_FEWEST_VALIDATION_SAMPLES = 8


def require_data(settings: QuantizeSettings, choices: Choices) -> None:
    """Raises InputError where there is no data and something cannot do without."""
    if settings.calibration == "none":
        if choices.needs_hessian:
            raise InputError(f"--calibration none: {_named(settings)} needs data; name some, or --method search")
        if choices.scales_inputs:
            raise InputError(
                "--calibration none: NVFP4 needs data for its input scales; name some, or --scheme NVFP4A16"
            )
        if settings.kv_cache_scheme is not None:
            raise InputError(
                f"--calibration none: --kv-cache-scheme {settings.kv_cache_scheme} needs data for its scales; "
                "name some, or leave the option out"
            )
        if settings.smooth:
            raise InputError("--calibration none: --smooth needs data; name some, or leave the option out")
    if needs_validation(settings.smooth, choices.compensates) and settings.num_validation_samples == 0:
        decided = "--smooth" if settings.smooth else _named(settings)
        raise InputError(f"--num-validation-samples 0: {decided} is decided on validation text; ask for 1 or more")


def _named(settings: QuantizeSettings) -> str:
    """What to say of the method that something is asked for by."""
    return f"--method {settings.method}" if settings.recipe_file is None else "a method of --recipe-file"


def needs_validation(smooth: bool, compensates: bool) -> bool:
    """Whether something is kept or not by what it does on validation text."""
    return smooth or compensates


def methods_named(method: str, rules: Iterable[Rule] | None) -> tuple[str, ...]:
    """`--method`, and those of a recipe file."""
    return (method, *(rule.method for rule in rules or () if rule.method is not None))


def validation_samples(asked: int | None, num_calibration_samples: int, smooth: bool, methods: Iterable[str]) -> int:
    """How many sequences decide: an eighth of the calibration's where there is something to decide, unless `asked`."""
    if asked is not None:
        return asked
    if not needs_validation(smooth, any(find_method(name).compensates for name in methods)):
        return 0
    return max(_FEWEST_VALIDATION_SAMPLES, num_calibration_samples // 8)


def needs_calibration(settings: QuantizeSettings, choices: Choices) -> bool:
    """Weight-only `max` looks at no activation, so there the calibration set would run for nothing."""
    scaled = choices.scales_inputs or settings.kv_cache_scheme is not None
    return scaled or settings.smooth or choices.weighs_channels or choices.needs_hessian


def passes(settings: QuantizeSettings, choices: Choices) -> tuple[tuple[str, Lane], ...]:
    """Sets and lanes in the order in which their rows lie in a hidden-state file; none where there is no data.

    Calibration and validation sets are in the quantized lanes only for methods that look there.
    """
    if settings.calibration == "none":
        return ()
    chosen: list[tuple[str, Lane]] = []
    if needs_calibration(settings, choices):
        chosen.append(("calibration", "bf16"))
    if choices.needs_hessian:
        chosen.append(("calibration", "nvfp4"))
    if needs_validation(settings.smooth, choices.compensates):
        chosen.append(("validation", "bf16"))
    if choices.compensates:
        chosen.append(("validation", "nvfp4"))
    if choices.compensates and choices.scales_inputs:
        chosen += [("calibration", "nvfp4a16"), ("validation", "nvfp4a16")]
    return (*chosen, ("probe", "bf16"), ("probe", "nvfp4"))
