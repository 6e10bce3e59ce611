"""`fourge sensitivity`: its damages against transformers, its ranking, and what a budget of bits buys."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp, generate_gparam
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import fourge
from fourge.checkpoint import durable
from fourge.cli import app
from fourge.data import read_token_sets
from fourge.errors import InputError
from fourge.recipe_file import read_recipe_file
from fourge.walk import walk_folder

FEW: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 4,
    "num_validation_samples": 6,
    "max_seq_length": 16,
    "threads": 1,
}
GROUPS = {
    "self_attn.q_proj+k_proj+v_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj+up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
SENSITIVE = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def one_sensitive(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which one Linear alone is hard on four bits, and easy on eight.

    Each group of 16 columns of layer 0's `o_proj` has one of huge weights, that multiplies nothing: its channel of
    `v_proj` is zero. Max calibration gives the group a scale under which its other weights are lost.
    """
    model = Path(shutil.copytree(pico(), tmp_path_factory.mktemp("sensitive") / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][3::16] = 0
    tensors[f"{SENSITIVE}.weight"][:, 3::16] *= 64
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.fixture(scope="module")
def found(one_sensitive: Path, tmp_path_factory: pytest.TempPathFactory) -> fourge.SensitivityResult:
    return fourge.sensitivity(str(one_sensitive), tmp_path_factory.mktemp("found") / "out", method="max", **FEW)


def test_the_sensitive_one_is_ranked_first_and_gets_the_bytes(
    one_sensitive: Path, found: fourge.SensitivityResult, tmp_path: Path
) -> None:
    first, second = found.groups[:2]
    assert first.linears == (SENSITIVE,)
    assert first.damage["NVFP4"]["mean"] > 2 * second.damage["NVFP4"]["mean"]
    assert first.damage["FP8"]["mean"] < 0.05 * first.damage["NVFP4"]["mean"]
    # Bits for that one in FP8 (8 and a scale of 16 a row, where NVFP4 has 4.5), and for nothing else.
    weights = sum(group.weights for group in found.groups)
    target = 4.5 + first.weights * (3.5 + 16 / 64) / weights
    result = fourge.sensitivity(str(one_sensitive), found.output, method="max", target_bits=target, **FEW)
    assert result.continued and result.mixture is not None
    assert result.mixture.groups == {"NVFP4": 7, "FP8": 1} and result.mixture.bits == pytest.approx(target)
    (fp8,) = (rule for rule in read_recipe_file(result.mixture.recipe_file) if rule.scheme == "FP8")
    assert fp8.targets == (SENSITIVE,)


@pytest.mark.parametrize("target", [4.5, 4.9, 6.0, 8.0])
def test_quantize_writes_the_bytes_that_were_promised(
    target: float, one_sensitive: Path, found: fourge.SensitivityResult, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.json"
    options = {"method": "max", "target_bits": target, "recipe_file_out": recipe} | FEW
    mixture = fourge.sensitivity(str(one_sensitive), found.output, **options).mixture
    assert mixture is not None and 4.5 <= mixture.bits <= target and mixture.bits > target - 0.6
    made = fourge.quantize(
        str(one_sensitive), tmp_path / "out", recipe_file=recipe, scheme="NVFP4", method="max", max_seq_length=8,
        calibration="random", num_calibration_samples=1, num_probe_samples=0, threads=1,
    )  # fmt: skip
    on_disk = sum(path.stat().st_size for path in made.output.glob("*.safetensors"))
    assert mixture.output_bytes == made.output_bytes == on_disk
    assert ("FP8" in mixture.groups) == (target > 4.5) and "NVFP4" in mixture.groups
    assert (mixture.damage == mixture.damage_in_fp4) == (target == 4.5)


# Against transformers


def in_scheme(weights: list[Tensor], scheme: QuantizationScheme) -> list[Tensor]:
    """Weights as compressed-tensors rounds them; in NVFP4 under one global scale."""
    args, divisor = scheme.weights, None
    if scheme.weights.num_bits == 4:
        every = torch.cat(weights)
        divisor = generate_gparam(every.min(), every.max())
    rounded = []
    for weight in weights:
        if divisor is None:  # the scale of a row is in the source's dtype
            low, high = torch.aminmax(weight.bfloat16(), dim=1, keepdim=True)
            scale, zero_point = (found.float() for found in calculate_qparams(low, high, args))
        else:
            rows = weight.unflatten(-1, (-1, args.group_size))
            scale, zero_point = calculate_qparams(rows.amin(-1), rows.amax(-1), args, global_scale=divisor)
        rounded.append(fake_quantize(weight, scale, zero_point, args, global_scale=divisor))
    return rounded


@contextmanager
def replaced(layer: Any, linears: tuple[str, ...], scheme: QuantizationScheme, largest: Tensor) -> Iterator[None]:
    """`layer` with those Linears and their inputs rounded by compressed-tensors, twice the calibrated range."""
    modules = [layer.get_submodule(linear) for linear in linears]
    divisor = generate_gparam(-2 * largest, 2 * largest) if scheme.weights.num_bits == 4 else None

    def round_input(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        args = scheme.input_activations
        scale, zero_point = compute_dynamic_scales_and_zp(inputs[0], args, nn.Identity(), global_scale=divisor)
        return (fake_quantize(inputs[0], scale, zero_point, args, global_scale=divisor),)

    before = [module.weight.data for module in modules]
    with ExitStack() as stack:
        for module, rounded in zip(modules, in_scheme(before, scheme), strict=True):
            module.weight.data = rounded
            stack.callback(module.register_forward_pre_hook(round_input).remove)
        yield
    for module, weight in zip(modules, before, strict=True):
        module.weight.data = weight


def outputs(model: Any, layer: int, sequences: tuple[np.ndarray, ...]) -> Tensor:
    """What a layer of the model gives for sequences of one length, `[tokens, hidden]`."""
    seen: list[Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(torch.tensor(np.stack(sequences).astype(np.int64)))
    hook.remove()
    return seen[0].flatten(0, 1).double()


def test_damages_are_those_of_transformers_with_one_group_rounded(
    one_sensitive: Path, found: fourge.SensitivityResult
) -> None:
    """Every group of every layer, in both schemes, by transformers and compressed-tensors alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(one_sensitive, dtype=torch.float32).eval()
    sets = read_token_sets(found.output / "walk" / "tokens.safetensors")
    compared = 0
    for group in found.groups:
        layer = model.model.layers[group.layer]
        linears = GROUPS[group.name]
        assert group.linears == tuple(f"model.layers.{group.layer}.{linear}" for linear in linears)
        inputs: list[Tensor] = []
        hook = layer.get_submodule(linears[0]).register_forward_pre_hook(lambda _, x, seen=inputs: seen.append(x[0]))
        outputs(model, group.layer, sets.calibration.sequences)
        hook.remove()
        whole = outputs(model, group.layer, sets.validation.sequences)
        for name, preset in (("NVFP4", "NVFP4"), ("FP8", "FP8_DYNAMIC")):
            scheme = preset_name_to_scheme(preset, ["Linear"])
            with replaced(layer, linears, scheme, inputs[0].abs().max()):
                rounded = outputs(model, group.layer, sets.validation.sequences)
            errors = (rounded - whole).square().sum(1) / whole.square().sum(1)
            assert group.damage[name]["mean"] == pytest.approx(float(errors.mean()), rel=1e-6)
            by_sequence = errors.view(len(sets.validation.sequences), -1).mean(1)
            expected = float(by_sequence.std(correction=1)) / len(by_sequence) ** 0.5
            assert group.damage[name]["standard_error"] == pytest.approx(expected, rel=1e-5)
            compared += 1
    assert compared == 16


# The job


class StoppedError(Exception):
    pass


def stop_before(number: int, work: Callable[[], object]) -> bool:
    """Runs `work`, stopped just before it puts its `number`th file in place; whether it had as many."""
    original, calls = durable.replace_durably, 0

    def stopping(temporary: Path, final: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise StoppedError
        original(temporary, final)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "replace_durably", stopping)
        patch.setattr(walk_folder, "replace_durably", stopping)
        try:
            work()
        except StoppedError:
            return True
    return False


def test_stopped_before_any_commit_it_continues_to_the_same_table(
    one_sensitive: Path, found: fourge.SensitivityResult, tmp_path: Path
) -> None:
    stops = 0
    while True:
        output = tmp_path / str(stops)
        walk = partial(fourge.sensitivity, str(one_sensitive), output, method="max", **FEW)
        if not stop_before(stops + 1, walk):
            break
        walk()
        assert (output / "sensitivity.json").read_bytes() == (found.output / "sensitivity.json").read_bytes()
        left = {path.name for path in output.rglob("*") if path.is_file()}
        assert left == {"sensitivity.json", "job.json", "tokens.safetensors", "metrics.jsonl", "lock"}
        stops += 1
    assert stops > 8, "each of three steps commits two files"


def test_other_settings_are_another_walk(one_sensitive: Path, found: fourge.SensitivityResult) -> None:
    with pytest.raises(InputError, match="begun with method = 'max', now it is 'search'"):
        fourge.sensitivity(str(one_sensitive), found.output, **FEW)
    with pytest.raises(InputError, match="begun with max_seq_length"):
        fourge.sensitivity(str(one_sensitive), found.output, method="max", **FEW | {"max_seq_length": 12})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_bits": 4.4}, r"--target-bits 4.4: this model takes 4.5 \(all in NVFP4\) to less than 16"),
        ({"target_bits": 16.0}, r"--target-bits 16: this model takes 4.5"),
        ({"recipe_file_out": Path("r.yaml")}, "--recipe-file-out r.yaml: a recipe is for a budget"),
        (
            {"recipe_file_out": Path("no/r.yaml"), "target_bits": 5.0},
            "--recipe-file-out no/r.yaml: its folder is not there",
        ),
        ({"method": "gptq"}, "--method gptq: damage is measured by methods without a Hessian: max, search"),
        ({"calibration": "none"}, "--calibration none: damage is measured on text"),
        ({"num_validation_samples": 0}, "--num-validation-samples 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options: dict[str, Any], expected: str, one_sensitive: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        fourge.sensitivity(str(one_sensitive), tmp_path / "out", **FEW | options)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_leaves_nothing_in_fp4(one_sensitive: Path, found: fourge.SensitivityResult) -> None:
    with pytest.raises(InputError, match=r"--target-bits 15\.9 leaves nothing in NVFP4; lower it"):
        fourge.sensitivity(str(one_sensitive), found.output, method="max", target_bits=15.9, **FEW)


def test_what_is_left_out_is_no_candidate(one_sensitive: Path, tmp_path: Path) -> None:
    """The recipe says with which options the other Linears stay left out, and then the bytes are those promised."""
    left_out = ["lm_head", "re:.*mlp", SENSITIVE]
    result = fourge.sensitivity(str(one_sensitive), tmp_path / "out", ignore=left_out, target_bits=6, **FEW)
    assert [group.name for group in result.groups].count("self_attn.o_proj") == 1 and len(result.groups) == 3
    assert result.mixture is not None and "FP8" in result.mixture.groups
    recipe = result.mixture.recipe_file
    assert f" --ignore lm_head --ignore 're:.*mlp' --ignore {SENSITIVE}\n" in recipe.read_text()
    made = fourge.quantize(
        str(one_sensitive), tmp_path / "made", recipe_file=recipe, ignore=left_out, method="max", max_seq_length=8,
        calibration="random", num_calibration_samples=1, num_probe_samples=0, threads=1,
    )  # fmt: skip
    assert made.output_bytes == result.mixture.output_bytes


def test_a_folder_of_something_else_is_refused(one_sensitive: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        fourge.sensitivity(str(one_sensitive), tmp_path, **FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_on_the_command_line(one_sensitive: Path, found: fourge.SensitivityResult) -> None:
    options = "--method max --calibration random --num-calibration-samples 4 --num-validation-samples 6"
    arguments = ["sensitivity", str(one_sensitive), "-o", str(found.output), *options.split(), "--max-seq-length", "16"]
    shown = CliRunner().invoke(app, [*arguments, "--threads", "1", "--target-bits", "5"])
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert "self_attn.o_proj" in lines[2] and "± " in lines[2] and any("bits a weight of 5:" in line for line in lines)
    result = json.loads(CliRunner().invoke(app, [*arguments, "--threads", "1", "--json"]).stdout)
    assert result["groups"][0]["linears"] == [SENSITIVE] and result["mixture"] is None
    stored = json.loads((found.output / "sensitivity.json").read_text())
    assert stored["groups"] == result["groups"] and stored["layers"] == result["layers"]
