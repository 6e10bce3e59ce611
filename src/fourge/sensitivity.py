"""`fourge sensitivity`: which Linears four bits hurt most, on held-out text, and the mixture that a budget buys."""

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourge.errors import InputError
from fourge.progress import peak_resident_bytes
from fourge.settings import (
    DEFAULT_CALIBRATION,
    DEFAULT_IGNORE,
    DEFAULT_TARGETS,
    Backend,
    ComputeDtype,
    QuantizeSettings,
    Scheme,
)

if TYPE_CHECKING:
    from fourge.mixing.mixture import GroupDamage, Mixture
    from fourge.mixing.run import SensitivityRun

TABLE = "sensitivity.json"
_RECIPE = "recipe.yaml"
_ABOUT = "Damage by layer and group of Linears, worst first, as `fourge sensitivity` measured it: the mean over "
_ABOUT += "held-out tokens of the layer output's squared relative error with that group alone quantized."


@dataclass(frozen=True)
class LayerDamage:
    """`damage` is an estimate as JSON: of what the layer's output loses with all of its groups in FP4."""

    layer: int
    damage: dict[str, Any]


@dataclass(frozen=True)
class SensitivityResult:
    """Layers and groups, worst first; `scheme` is the one in FP4. `mixture` is None without --target-bits."""

    output: Path
    scheme: Scheme
    layers: tuple[LayerDamage, ...]
    groups: "tuple[GroupDamage, ...]"
    mixture: "Mixture | None"
    events: int
    seconds: float
    peak_resident_bytes: int
    continued: bool


def sensitivity(
    model: Annotated[str, typer.Argument(help="A local checkpoint directory, or a hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for the table, and for the walk.")],
    *,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits a weight: write the recipe file of the least damage within them.")
    ] = None,
    recipe_file_out: Annotated[
        Path | None, typer.Option(help=f"Where to write it, .json or YAML [default: OUT/{_RECIPE}].")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    scheme: Annotated[Scheme, typer.Option(help="What FP8 and BF16 are held against.")] = "NVFP4",
    method: Annotated[str, typer.Option(help="search or max: how weights in FP4 are rounded.")] = "search",
    targets: Annotated[list[str] | None, typer.Option(help="Modules to quantize [default: Linear].")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Modules to leave [default: lm_head].")] = None,
    calibration: Annotated[
        str, typer.Option(help="A hub dataset, a local file, 'self' or 'random'.")
    ] = DEFAULT_CALIBRATION,
    num_calibration_samples: Annotated[int, typer.Option(min=1, help="Sequences to calibrate on.")] = 128,
    num_validation_samples: Annotated[int, typer.Option(min=1, help="Held-out sequences to measure on.")] = 32,
    max_seq_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence, at most.")] = 2048,
    seed: Annotated[int, typer.Option(help="For the choice of samples, and for sampling.")] = 0,
    input_headroom: Annotated[float, typer.Option(min=1.0, help="As for quantize.")] = 2.0,
    micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens run through a layer at once.")] = 2048,
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="Arithmetic of the walk; auto is float32 on a CPU, bfloat16 on a GPU.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes a GPU where there is one.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 leaves it to torch.")] = 0,
    backend: Annotated[Backend, typer.Option(help="As for quantize.")] = "auto",
    restart: Annotated[bool, typer.Option(help="Throw away what an earlier walk left in the output.")] = False,
) -> SensitivityResult:
    """Rank layers and Linears by what four bits cost them, and pick the mixture with FP8 and BF16 for a budget.

    Walks once, layer by layer; the same command continues a walk that was stopped, and takes the figures of one that
    is finished: another --target-bits costs nothing. Raises InputError for what the caller can mend.
    """
    import torch

    from fourge.checkpoint.durable import disk_errors_named
    from fourge.mixing.mixture import rank_groups, require_possible
    from fourge.mixing.run import SensitivityRun
    from fourge.walk.device import resolve_backend, resolve_device
    from fourge.walk.resources import return_freed_layers

    began = time.monotonic()
    if recipe_file_out is not None and target_bits is None:
        raise InputError(f"--recipe-file-out {recipe_file_out}: a recipe is for a budget; name it with --target-bits")
    output = Path(output)  # a script may well give a string
    recipe_path = Path(recipe_file_out or output / _RECIPE)
    if not recipe_path.parent.is_dir() and recipe_path.parent.resolve() != output.resolve():
        raise InputError(f"--recipe-file-out {recipe_path}: its folder is not there; make it, or name another")
    arithmetic = resolve_device(device, compute_dtype, threads)
    settings = QuantizeSettings(
        model=model,
        revision=revision,
        scheme=scheme,
        kv_cache_scheme=None,
        method=method,
        smooth=False,
        recipe_file=None,
        targets=tuple(targets or DEFAULT_TARGETS),
        ignore=tuple(DEFAULT_IGNORE if ignore is None else ignore),
        calibration=calibration,
        probe=None,
        num_calibration_samples=num_calibration_samples,
        num_validation_samples=num_validation_samples,
        num_probe_samples=0,
        max_seq_length=max_seq_length,
        seed=seed,
        input_headroom=input_headroom,
        micro_batch_tokens=micro_batch_tokens,
        backend=resolve_backend(backend, arithmetic["device"]),
        **arithmetic,
    )
    torch.set_num_threads(settings.threads)
    return_freed_layers()
    run = SensitivityRun.prepare(settings, output)
    if target_bits is not None:
        require_possible(run.quantizing, target_bits)
    with disk_errors_named(output), run.open_folder(restart) as folder:
        continued = folder.next_step > 0
        run.work(folder)
        layers = [LayerDamage(layer, measured["whole"]) for layer, measured in enumerate(run.measures(folder))]
        groups = rank_groups(run.quantizing, run.measures(folder))
        events = sum(len(measured["events"]) for measured in run.measures(folder))
        data = (folder.result or {})["data"]
    layers.sort(key=lambda layer: -float(layer.damage["mean"]))
    _write_table(run, layers, groups, data)
    mixture = None
    if target_bits is not None:
        mixture = _write_mixture(run, groups, target_bits, recipe_path)
    return SensitivityResult(
        output=output,
        scheme=scheme,
        layers=tuple(layers),
        groups=groups,
        mixture=mixture,
        events=events,
        seconds=time.monotonic() - began,
        peak_resident_bytes=peak_resident_bytes(),
        continued=continued,
    )


def _write_table(
    run: "SensitivityRun", layers: list[LayerDamage], groups: "tuple[GroupDamage, ...]", data: dict[str, Any]
) -> None:
    from fourge.checkpoint.durable import write_json

    content = {
        "about": _ABOUT,
        "settings": run.quantizing.settings.to_json(),
        "source": run.quantizing.source.digest(),
        "data": data,
        "layers": [asdict(layer) for layer in layers],
        "groups": [asdict(group) for group in groups],
    }
    write_json(run.output / TABLE, content)


def _selection(settings: QuantizeSettings) -> str:
    """The options that leave quantize the Linears that were ranked here; nothing where those are the default."""
    chosen = [f"--targets {shlex.quote(target)}" for target in settings.targets if settings.targets != DEFAULT_TARGETS]
    chosen += [f"--ignore {shlex.quote(name)}" for name in settings.ignore if settings.ignore != DEFAULT_IGNORE]
    return "".join(f" {option}" for option in chosen)


def _write_mixture(
    run: "SensitivityRun", groups: "tuple[GroupDamage, ...]", target_bits: float, path: Path
) -> "Mixture":
    from fourge.mixing.mixture import as_rules, choose_schemes, describe_mixture
    from fourge.recipe_file import write_recipe_file

    chosen = choose_schemes(run.quantizing, groups, target_bits)
    mixture = describe_mixture(run.quantizing, chosen, target_bits, path)
    comment = (
        f"{mixture.bits:.4f} bits a weight, of {target_bits:g} asked for: picked by {TABLE}.\n"
        f"fourge quantize MODEL -o OUT --recipe-file THIS{_selection(run.quantizing.settings)}"
    )
    write_recipe_file(path, as_rules(chosen), comment)
    return mixture
