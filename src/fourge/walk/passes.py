"""Which set of sequences a quantization runs through which lane: what its settings and its method ask for."""

from fourge.errors import InputError
from fourge.methods.base import Method
from fourge.settings import QuantizeSettings
from fourge.walk.streams import Lane

_FEWEST_VALIDATION_SAMPLES = 8


def require_data(settings: QuantizeSettings, method: Method) -> None:
    """Raises InputError where there is no data and something cannot do without."""
    if settings.calibration == "none":
        if method.needs_hessian:
            raise InputError(
                f"--calibration none: --method {settings.method} needs data; name some, or --method search"
            )
        if settings.scheme == "NVFP4":
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
    if needs_validation(settings.smooth, method) and settings.num_validation_samples == 0:
        decided = "--smooth" if settings.smooth else f"--method {settings.method}"
        raise InputError(f"--num-validation-samples 0: {decided} is decided on validation text; ask for 1 or more")


def needs_validation(smooth: bool, method: Method) -> bool:
    """Whether something is kept or not by what it does on validation text."""
    return smooth or method.compensates


def validation_samples(asked: int | None, num_calibration_samples: int, smooth: bool, method: Method) -> int:
    """How many sequences decide: an eighth of the calibration's where there is something to decide, unless `asked`."""
    if asked is not None:
        return asked
    return max(_FEWEST_VALIDATION_SAMPLES, num_calibration_samples // 8) if needs_validation(smooth, method) else 0


def needs_calibration(settings: QuantizeSettings, method: Method) -> bool:
    """Weight-only `max` looks at no activation, so there the calibration set would run for nothing."""
    scaled = settings.scheme == "NVFP4" or settings.kv_cache_scheme is not None
    return scaled or settings.smooth or method.weighs_channels or method.needs_hessian


def passes(settings: QuantizeSettings, method: Method) -> tuple[tuple[str, Lane], ...]:
    """Sets and lanes in the order in which their rows lie in a hidden-state file; none where there is no data.

    Calibration and validation sets are in the quantized lane only for methods that look there.
    """
    if settings.calibration == "none":
        return ()
    chosen: list[tuple[str, Lane]] = []
    if needs_calibration(settings, method):
        chosen.append(("calibration", "bf16"))
    if method.needs_hessian:
        chosen.append(("calibration", "nvfp4"))
    if needs_validation(settings.smooth, method):
        chosen.append(("validation", "bf16"))
    if method.compensates:
        chosen.append(("validation", "nvfp4"))
    return (*chosen, ("probe", "bf16"), ("probe", "nvfp4"))
