"""`--recipe-file`: which rule decides, what is written, that it can be trusted, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fourge
from fourge.chatting.resident import weights_in_memory
from fourge.checkpoint.reader import Checkpoint
from fourge.errors import InputError
from fourge.evaluation.engine_choice import loaded_bytes
from fourge.recipe_file import read_recipe_file
from fourge.report.text import quantize_summary
from fourge.settings import Rule

FEW: dict[str, Any] = {
    "calibration": "random",
    "num_calibration_samples": 12,
    "num_probe_samples": 2,
    "max_seq_length": 12,
    "threads": 1,
}
DOWN_IN_FP8 = {"targets": "re:.*down_proj", "scheme": "FP8"}


def write(folder: Path, *rules: dict[str, Any]) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps({"rules": rules}))
    return path


def stored(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def quantization_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return config


@pytest.fixture(scope="module")
def mixture(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Source, output and recipe of weights moved by `tuned`, with FP8 and BF16 among them. Not to be written to."""
    folder = tmp_path_factory.mktemp("mixture")
    recipe = write(
        folder,
        DOWN_IN_FP8,
        {"targets": ["model.layers.0.self_attn.o_proj"], "scheme": "BF16"},
        {"targets": "re:.*layers.1.*[qkv]_proj", "method": "max"},
    )
    fourge.quantize(str(pico()), folder / "out", recipe_file=recipe, method="tuned", smooth=True, **FEW)
    return pico(), folder / "out", recipe


# Reading


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    rules = [{"targets": ["re:a", "b"], "scheme": "FP8"}, {"targets": "Linear", "method": "gptq", "scheme": "NVFP4A16"}]
    (tmp_path / "r.json").write_text(json.dumps({"rules": rules}, indent="\t"))
    (tmp_path / "r.yaml").write_text(
        "rules:  # sensitive first\n- targets: ['re:a', b]\n  scheme: FP8\n"
        "- targets: Linear\n  method: gptq\n  scheme: NVFP4A16\n"
    )
    expected = (Rule(("re:a", "b"), "FP8"), Rule(("Linear",), "NVFP4A16", "gptq"))
    assert read_recipe_file(tmp_path / "r.json") == read_recipe_file(tmp_path / "r.yaml") == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("rules: [", "r.yaml: not YAML"),
        ("- targets: Linear", "one key, rules"),
        ("rules: []", "has no rule"),
        ("rules: [Linear]", "rule 1: must be a table"),
        ("rules: [{scheme: FP8}]", "rule 1: must be a table"),
        ("rules: [{targets: Linear, schema: FP8}]", "rule 1: must be a table"),
        ("rules: [{targets: [], scheme: FP8}]", "rule 1: targets"),
        ("rules: [{targets: Linear}]", "rule 1: says nothing of Linear"),
        ("rules: [{targets: Linear, scheme: FP4}]", "scheme 'FP4' is not known; known are: NVFP4, NVFP4A16, FP8, BF16"),
        ("rules: [{targets: Linear, method: [max]}]", "is not known; known are: max, search"),
        ("rules: [{targets: Linear, scheme: FP8, method: max}]", "FP8 has no methods"),
    ],
)
def test_a_file_that_is_none_is_refused(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        read_recipe_file(path)
    assert expected in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([{"targets": "re:.*expert", "scheme": "FP8"}], "rule 1: of what --targets and --ignore leave, re:.*expert"),
        ([{"targets": "lm_head", "scheme": "FP8"}], "lm_head matches no Linear"),
        ([DOWN_IN_FP8, {"targets": "re:(", "scheme": "FP8"}], "rule 2.*not a regular expression"),
        ([{"targets": "Linear", "scheme": "FP8"}], "leaves no Linear in NVFP4"),
        (
            [{"targets": "re:.*k_proj", "scheme": "FP8"}],
            r"model.layers.0.self_attn.q_proj would be NVFP4 and model.layers.0.self_attn.k_proj FP8",
        ),
        ([{"targets": "re:.*gate_proj", "scheme": "BF16"}], "gate_proj would be BF16 and .*up_proj NVFP4"),
        ([{"targets": "re:.*gate_proj", "method": "search"}], "gate_proj and .*up_proj would be quantized by two"),
    ],
)
def test_rules_that_cannot_be_are_refused(
    rules: list[dict[str, Any]], expected: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write(tmp_path, *rules)
    with pytest.raises(InputError, match=expected):
        fourge.quantize(str(pico()), tmp_path / "out", recipe_file=recipe, method="max", **FEW)
    with pytest.raises(InputError, match=expected):
        fourge.plan(str(pico()), recipe_file=recipe, no_probe=True, device="cpu")
    assert not (tmp_path / "out").exists()


def test_what_a_rule_needs_is_asked_for(pico: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write(tmp_path, {"targets": "re:.*down_proj", "method": "tuned"})
    with pytest.raises(InputError, match="num-validation-samples 0: a method of --recipe-file is decided"):
        fourge.quantize(
            str(pico()), tmp_path / "out", recipe_file=recipe, method="max", num_validation_samples=0, **FEW
        )
    with pytest.raises(InputError, match="a method of --recipe-file needs data"):
        fourge.quantize(str(pico()), tmp_path / "out", recipe_file=recipe, scheme="NVFP4A16")
    recipe = write(tmp_path, {"targets": "re:.*down_proj", "scheme": "NVFP4"})
    with pytest.raises(InputError, match="NVFP4 needs data for its input scales"):
        fourge.quantize(str(pico()), tmp_path / "out", recipe_file=recipe, scheme="NVFP4A16")
    # FP8 rounds its inputs by what they are, so it needs none.
    result = fourge.quantize(str(pico()), tmp_path / "out", recipe_file=write(tmp_path, DOWN_IN_FP8), scheme="NVFP4A16")
    assert result.fidelity is None and fourge.verify(result.output, source=str(pico()), threads=1).passed


# What is written


def test_the_first_rule_that_says_something_decides(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Scheme and method each by their own first rule; each Linear is that of a run that quantizes all alike."""
    alike = {}
    for method in ("max", "search"):
        fourge.quantize(str(pico()), tmp_path / method, method=method, **FEW)
        alike[method] = stored(tmp_path / method)
    recipe = write(
        tmp_path,
        {"targets": "model.layers.1.mlp.down_proj", "scheme": "BF16"},
        {"targets": ["re:.*layers.1.mlp", "re:.*o_proj"], "method": "search"},
        {"targets": "re:.*down_proj", "scheme": "FP8"},
        {"targets": "Linear", "method": "max", "scheme": "NVFP4"},
    )
    result = fourge.quantize(str(pico()), tmp_path / "out", recipe_file=recipe, recipe="fast", **FEW)
    ours, source = stored(tmp_path / "out"), stored(pico())
    assert result.quantized_linears == 13
    searched = {f"layers.{name}" for name in ("1.mlp.gate_proj", "1.mlp.up_proj", "0.self_attn.o_proj")}
    searched.add("layers.1.self_attn.o_proj")
    for name, tensor in ours.items():
        linear = name.rpartition(".")[0].removeprefix("model.")
        if linear == "layers.0.mlp.down_proj":
            assert name.endswith(("weight", "weight_scale")) and tensor.dtype == (
                torch.float8_e4m3fn if name.endswith("weight") else torch.bfloat16
            )
        elif name in source:
            assert torch.equal(tensor, source[name])
        else:
            expected = alike["search" if linear in searched else "max"][name]
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
    assert "model.layers.1.mlp.down_proj.weight" in source.keys() & ours.keys()


def test_the_config_is_compressed_tensors_own(mixture: tuple[Path, Path, Path]) -> None:
    """The groups are its presets, and formats those that its compressors say are theirs."""
    written = quantization_config(mixture[1])
    parsed = QuantizationConfig.model_validate(written)
    assert written["format"] == "mixed-precision"
    groups = list(parsed.config_groups.values())
    for group, name in zip(groups, ("NVFP4", "FP8_DYNAMIC"), strict=True):
        preset = preset_name_to_scheme(name, group.targets)
        preset.format = infer_module_format(nn.Linear, preset)
        assert group == preset
    assert groups[1].targets == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert len(groups[0].targets) == 11
    assert parsed.ignore == ["model.layers.0.self_attn.o_proj", "lm_head"]
    dumped = QuantizationConfig(
        config_groups=parsed.config_groups, format="mixed-precision", quantization_status="compressed"
    ).to_dict()
    assert {name: sorted(group) for name, group in written["config_groups"].items()} == {
        name: sorted(group) for name, group in dumped["config_groups"].items()
    }


def test_the_recipe_is_part_of_the_job(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Another file of the same content continues; other content is refused, by name."""
    source, output, recipe = mixture
    options = {"method": "tuned", "smooth": True} | FEW
    again = tmp_path / "again.yaml"
    again.write_text(recipe.read_text())
    result = fourge.quantize(str(source), output, recipe_file=again, **options)
    assert result.continued and result.linears_by_scheme == {"NVFP4": 11, "FP8": 2}
    assert "13 Linears (11 in NVFP4, 2 in FP8), 0 events" in quantize_summary(result)
    with pytest.raises(InputError, match="begun with recipe_file"):
        fourge.quantize(str(source), output, recipe_file=write(tmp_path, DOWN_IN_FP8), **options)
    with pytest.raises(InputError, match="begun with recipe_file"):
        fourge.quantize(str(source), output, **options)


def test_the_plan_counts_a_mixture_to_the_byte(mixture: tuple[Path, Path, Path]) -> None:
    source, output, recipe = mixture
    plan = fourge.plan(str(source), recipe_file=recipe, no_probe=True, device="cpu", method="tuned")
    written = fourge.plan(str(output), no_probe=True, device="cpu")
    on_disk = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    assert plan.scheme == written.scheme == "NVFP4 + FP8"
    assert plan.sizes.shard_bytes == written.sizes.shard_bytes == on_disk
    assert plan.sizes.output_bytes == written.sizes.output_bytes


# Whether it can be trusted


def test_a_mixture_verifies(mixture: tuple[Path, Path, Path]) -> None:
    source, output, _ = mixture
    report = fourge.verify(output, source=str(source), deep=True, threads=1)
    assert report.passed and {check.status for check in report.checks} == {"passed"}
    job = json.loads((output / ".fourge" / "job.json").read_text())
    assert report.fidelity == job["result"]["fidelity"]
    assert "compensation" in job["steps"][1]["measures"], "no weight was moved: the limit below would not be tried"


def moved(weight: Tensor, by: float) -> Tensor:
    """`weight` and noise, `by` of its norm."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return weight.float() + by * noise * weight.float().norm() / noise.norm()


def damage(mixture: tuple[Path, Path, Path], folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> list[str]:
    """What a source check says once `change` was made to tensor `name`, by check."""
    source, output, _ = mixture
    copy = Path(shutil.copytree(output, folder / "copy", ignore=shutil.ignore_patterns("job.json")))
    (path,) = (path for path in copy.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name])}, path, metadata={"format": "pt"})
    report = fourge.verify(copy, source=str(source), threads=1)
    return [
        f"{check.name}: {failure}"
        for check in report.checks
        for failure in check.failures
        if check.name != "provenance"
    ]


DOWN = "model.layers.0.mlp.down_proj"


def test_fp8_gets_nothing_of_what_tuned_may_move(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A tenth of the norm is within what a Linear by `tuned` may be off, and four times what FP8 is."""
    (failure,) = damage(
        mixture, tmp_path, f"{DOWN}.weight", lambda codes: moved(codes, 0.1).clamp(-448, 448).to(codes.dtype)
    )
    assert failure.startswith(f"dequantized: {DOWN}.weight: relative error")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("weight_scale", 0.0, "weight_scale[0] is 0.0"),
        ("weight_scale", torch.nan, "is nan"),
        ("weight", torch.nan, "NaN"),
    ],
)
def test_damaged_values_in_fp8_are_found(
    name: str, value: float, expected: str, mixture: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    def change(tensor: Tensor) -> Tensor:
        wide = tensor.float()
        wide[0, 0] = value
        return wide.to(tensor.dtype)

    failures = damage(mixture, tmp_path, f"{DOWN}.{name}", change)
    assert failures[0].startswith(f"scales: {DOWN}.{name}") and expected in failures[0]


def test_a_group_in_two_schemes_is_found(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The config names k_proj in the other group: its tensors are not there, and engines could not load the group."""
    copy = Path(
        shutil.copytree(mixture[1], tmp_path / "copy", ignore=shutil.ignore_patterns("job.json", "fourge.json"))
    )
    config = json.loads((copy / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"].remove("model.layers.0.self_attn.k_proj")
    groups["group_1"]["targets"].append("model.layers.0.self_attn.k_proj")
    (copy / "config.json").write_text(json.dumps(config))
    found = {check.name: check.failures for check in fourge.verify(copy, threads=1).checks if check.failures}
    assert found.keys() == {"tensors", "fused_groups"}
    assert "k_proj is FP8" in found["fused_groups"][0] and "q_proj is NVFP4" in found["fused_groups"][0]


# Beyond


def test_what_cannot_take_a_mixture_says_so(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, output, _ = mixture
    with pytest.raises(InputError, match=r"a mixture, NVFP4 \+ FP8"):
        fourge.convert(str(output), tmp_path / "there", layout="modelopt")
    with pytest.raises(InputError, match="Linears in FP8"):
        fourge.serve(output, print_command=True)
    assert fourge.serve(output, gpu="b200", print_command=True).numerics == "W4A4"


def test_the_memory_of_a_mixture_in_transformers(mixture: tuple[Path, Path, Path]) -> None:
    """Decompressed, it is the source again, and some scales."""
    source, output, _ = mixture
    whole = sum(tensor.nbytes for tensor in stored(source).values())
    for counted in (loaded_bytes(output), weights_in_memory(Checkpoint.open(output))):
        assert whole <= counted < 1.1 * whole


def test_card_and_page_show_a_mixture(mixture: tuple[Path, Path, Path], tmp_path: Path) -> None:
    output = Path(shutil.copytree(mixture[1], tmp_path / "Mixed-NVFP4"))
    fourge.card(output, base_model="org/base")
    text = (output / "README.md").read_text()
    assert "NVFP4 + FP8" in text and "- w8a8" in text and "--recipe-file recipe.json" in text
    written = text.partition("where `recipe.json` is")[2].partition("```json\n")[2].partition("```")[0]
    (tmp_path / "recipe.json").write_text(written)
    assert read_recipe_file(tmp_path / "recipe.json") == read_recipe_file(mixture[2])
    fourge.page(output)
    assert "by a recipe file" in (output / "fourge.html").read_text()
