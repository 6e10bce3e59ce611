"""Every check finds what it is for, names it, and no other check is disturbed by it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourge import VerifyReport

LAYER = "model.layers.0"
O_PROJ = f"{LAYER}.self_attn.o_proj"
Q_PROJ = f"{LAYER}.self_attn.q_proj"
UP_PROJ = "model.layers.1.mlp.up_proj"


def failed(report: VerifyReport) -> dict[str, tuple[str, ...]]:
    assert report.passed == (not any(check.status == "failed" for check in report.checks))
    return {check.name: check.failures for check in report.checks if check.status == "failed"}


def assert_only(report: VerifyReport, check: str, *named: str) -> None:
    """`check` alone failed, with one failure, which names all of `named`."""
    found = failed(report)
    assert list(found) == [check], found
    (failure,) = found[check]
    assert all(name in failure for name in named), failure


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Changes the scale at [1, 2] of a matrix, or the one value of a global scale."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        wide = tensor.float()
        wide[(1, 2) if wide.ndim == 2 else 0] = value
        return wide.to(tensor.dtype)

    return change


# Names, dtypes, shapes


def test_a_missing_tensor(copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.replace(f"{O_PROJ}.weight_scale", None)
    assert_only(damaged.verify(), "tensors", f"{O_PROJ}.weight_scale", "missing")


@pytest.mark.parametrize("name", [f"{O_PROJ}.weight", f"{O_PROJ}.bias", "model.layers.0.extra"])
def test_a_tensor_too_many(name: str, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.replace(name, torch.zeros(64, dtype=torch.bfloat16))
    assert_only(damaged.verify(), "tensors", name, "not part of the model")


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        (f"{O_PROJ}.weight_scale", torch.float32, "F32, expected F8_E4M3"),
        (f"{O_PROJ}.weight_packed", torch.int8, "I8, expected U8"),
        (f"{O_PROJ}.weight_global_scale", torch.bfloat16, "BF16, expected F32"),
        (f"{LAYER}.input_layernorm.weight", torch.float64, "F64, expected BF16 or F16 or F32"),
    ],
)
def test_a_wrong_dtype(name: str, dtype: torch.dtype, said: str, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.change(name, lambda tensor: tensor.to(dtype))
    assert_only(damaged.verify(), "tensors", name, said)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        (f"{O_PROJ}.weight_scale", (4, 64), "[4, 64], expected [64, 4]"),
        (f"{O_PROJ}.weight_packed", (32, 64), "[32, 64], expected [64, 32]"),
        (f"{O_PROJ}.input_global_scale", (), "[], expected [1]"),
    ],
)
def test_a_wrong_shape(name: str, shape: tuple[int, ...], said: str, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.change(name, lambda tensor: tensor.reshape(shape))
    assert_only(damaged.verify(), "tensors", name, said)


def test_missing_input_scales_are_named_and_counted(copy: Callable) -> None:
    """Weight-only tensors under a W4A4 config: engines would run with the activations' scale they do not find."""
    damaged = copy(scheme="NVFP4A16")
    damaged.forget_job()
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
    damaged.edit_config(lambda group: group.update(input_activations=arguments))
    found = failed(damaged.verify())
    assert list(found) == ["tensors"]
    assert len(found["tensors"]) == 14
    assert f"{O_PROJ}.input_global_scale is missing" in found["tensors"]


# Scales


@pytest.mark.parametrize(("value", "said"), [(0.0, "0.0"), (float("nan"), "nan"), (-2.0, "-2.0")])
def test_a_bad_group_scale(value: float, said: str, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.change(f"{O_PROJ}.weight_scale", set_first(value))
    assert_only(damaged.verify(), "scales", f"{O_PROJ}.weight_scale[1, 2] is {said}", "(1 of 256")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("which", ["weight_global_scale", "input_global_scale"])
def test_a_bad_global_scale(which: str, value: float, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.change(f"{O_PROJ}.{which}", set_first(value))
    assert_only(damaged.verify(), "scales", f"{O_PROJ}.{which} is {value}")


def test_extreme_but_valid_scales_pass(copy: Callable) -> None:
    """E4M3's smallest and largest positive values, and FP32 subnormals of a global scale, are legal."""
    edited = copy()
    edited.forget_job()
    edited.change(f"{O_PROJ}.weight_scale", set_first(2.0**-9))
    edited.change(f"{LAYER}.mlp.down_proj.weight_scale", set_first(448.0))
    edited.change(f"{O_PROJ}.weight_global_scale", set_first(1e-40))
    assert edited.verify().passed


# Fused groups


@pytest.mark.parametrize("linear", [Q_PROJ, UP_PROJ])
@pytest.mark.parametrize("which", ["weight_global_scale", "input_global_scale"])
def test_a_fused_global_scale_doubled(which: str, linear: str, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.change(f"{linear}.{which}", lambda scale: scale * 2)
    assert_only(damaged.verify(), "fused_groups", which, linear)


def test_a_fused_global_scale_off_by_one_bit(copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.change(f"{Q_PROJ}.input_global_scale", lambda s: torch.nextafter(s, torch.tensor([1e30])))
    assert_only(damaged.verify(), "fused_groups", "input_global_scale", Q_PROJ)


def test_a_fused_group_quantized_in_part(copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.edit_json("config.json", lambda c: c["quantization_config"]["ignore"].append(Q_PROJ))
    for part in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"):
        damaged.replace(f"{Q_PROJ}.{part}", None)
    damaged.replace(f"{Q_PROJ}.weight", torch.zeros(64, 64, dtype=torch.bfloat16))
    assert_only(damaged.verify(), "fused_groups", "q_proj+k_proj+v_proj", Q_PROJ, "not quantized")


# Tensor parallelism


def test_k_that_no_engine_takes(copy: Callable) -> None:
    """48 input columns are three groups, but FP4 kernels step by 32."""
    found = failed(copy("llama", intermediate_size=48).verify())
    assert list(found) == ["tensor_parallel"]
    assert [failure.split()[0] for failure in found["tensor_parallel"]] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


# Files


def test_a_flipped_bit(copy: Callable) -> None:
    damaged = copy()
    path = damaged.shard_of(O_PROJ)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_only(damaged.verify(), "digests", path.name, "SHA-256")


def test_a_shard_that_grew(copy: Callable) -> None:
    damaged = copy()
    path = damaged.shard_of(O_PROJ)
    damaged.replace(f"{O_PROJ}.bias", torch.zeros(64, dtype=torch.bfloat16))
    found = failed(damaged.verify())
    assert list(found) == ["digests", "tensors"]
    assert path.name in found["digests"][0] and "were committed" in found["digests"][0]


@pytest.mark.parametrize("mend", [False, True])
def test_a_truncated_shard(mend: bool, copy: Callable) -> None:
    """Nothing can be looked at, but the digests say which file it is."""
    damaged = copy()
    path = damaged.shard_of(O_PROJ)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    found = failed(damaged.verify())
    assert list(found) == ["files", "digests"]
    assert all(path.name in failure for failures in found.values() for failure in failures)
    if mend:
        path.write_bytes(whole)
        assert damaged.verify().passed


def test_a_missing_shard(copy: Callable) -> None:
    damaged = copy()
    path = damaged.shard_of(O_PROJ)
    path.unlink()
    found = failed(damaged.verify())
    assert list(found) == ["files", "digests"]
    assert path.name in found["files"][0] and path.name in found["digests"][0]


def test_an_index_that_names_a_wrong_file(copy: Callable) -> None:
    damaged = copy()
    wrong = damaged.shard_of(UP_PROJ).name
    name = f"{O_PROJ}.weight_scale"
    damaged.edit_json("model.safetensors.index.json", lambda i: i["weight_map"].update({name: wrong}))
    report = damaged.verify(source=str(damaged.source))
    assert_only(report, "files", name)
    skipped = {check.name: check.detail for check in report.checks if check.status == "skipped"}
    assert skipped["tensors"] == skipped["sidecars"] == "not possible before these pass: files"


def test_an_index_that_leads_out_of_the_directory(copy: Callable) -> None:
    damaged = copy()
    name = f"{O_PROJ}.weight_scale"
    damaged.edit_json("model.safetensors.index.json", lambda i: i["weight_map"].update({name: "../secret.safetensors"}))
    assert_only(damaged.verify(), "files", name, "../secret.safetensors")


def test_weights_beside_the_index(copy: Callable) -> None:
    damaged = copy()
    stray = damaged.directory / "model-00009-of-00009.safetensors"
    stray.write_bytes(damaged.shard_of(O_PROJ).read_bytes())
    assert_only(damaged.verify(), "files", stray.name)


@pytest.mark.parametrize("name", [".fourge/shard.tmp", ".fourge/hidden-00004.bin", ".config.json.tmp"])
def test_leftovers(name: str, copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / name).write_bytes(b"")
    assert_only(damaged.verify(), "files", name)


def test_an_unfinished_job(copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / "model.safetensors.index.json").unlink()
    (damaged.directory / "config.json").unlink()
    assert_only(damaged.verify(), "files", "not finished (4 steps committed)")


def test_a_damaged_manifest(copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / ".fourge" / "job.json").write_text("{")
    assert_only(damaged.verify(), "files", "job.json")


def test_a_config_that_is_no_json(copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / "config.json").write_text("{")
    assert_only(damaged.verify(), "files", "config.json")


# Config


def test_an_unknown_key_in_the_config(copy: Callable) -> None:
    damaged = copy()
    damaged.edit_config(lambda group: group["weights"].update(zero_point="none"))
    assert_only(damaged.verify(), "config", "weights.zero_point", "compressed-tensors rejects it")


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", "float-quantized"), ("quant_method", "modelopt"), ("quantization_status", "frozen")],
)
def test_a_wrong_field_of_the_config(key: str, value: str, copy: Callable) -> None:
    damaged = copy()
    damaged.edit_json("config.json", lambda c: c["quantization_config"].update({key: value}))
    assert_only(damaged.verify(), "config", key, value)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("weights", "num_bits", 8), ("weights", "group_size", 32), ("input_activations", "dynamic", False)],
)
def test_another_scheme_in_the_config(part: str, key: str, value: object, copy: Callable) -> None:
    damaged = copy()
    damaged.edit_config(lambda group: group[part].update({key: value}))
    assert_only(damaged.verify(), "config", f"{part}.{key}", "NVFP4")


def test_a_config_without_groups(copy: Callable) -> None:
    damaged = copy()
    damaged.edit_json("config.json", lambda c: c["quantization_config"].update(config_groups={}))
    assert_only(damaged.verify(), "config", "config_groups")


def test_an_expression_that_does_not_compile(copy: Callable) -> None:
    damaged = copy()
    damaged.edit_json("config.json", lambda c: c["quantization_config"].update(ignore=["re:("]))
    assert_only(damaged.verify(), "config", "ignore", "re:(")


def test_a_linear_that_the_config_forgets_to_ignore(copy: Callable) -> None:
    damaged = copy()
    damaged.edit_json("config.json", lambda c: c["quantization_config"].update(ignore=[]))
    found = failed(damaged.verify())
    assert list(found) == ["tensors"]
    assert "lm_head.weight_packed is missing" in found["tensors"]


# Beside the source


def test_a_changed_sidecar(copy: Callable) -> None:
    damaged = copy()
    with (damaged.directory / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert_only(damaged.verify(source=str(damaged.source)), "sidecars", "tokenizer.json")


def test_a_missing_sidecar(copy: Callable) -> None:
    damaged = copy()
    (damaged.directory / "LICENSE").unlink()
    assert_only(damaged.verify(source=str(damaged.source)), "sidecars", "LICENSE", "missing")


def test_a_changed_config(copy: Callable) -> None:
    damaged = copy()
    damaged.edit_json("config.json", lambda c: c.update(rms_norm_eps=1e-3))
    assert_only(damaged.verify(source=str(damaged.source)), "source_config", "rms_norm_eps", "0.001", "1e-06")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"]
)
def test_a_changed_unquantized_tensor(name: str, copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()

    def flip_a_bit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.int16).view(-1)[-1] ^= 1
        return tensor

    damaged.change(name, flip_a_bit)
    assert_only(damaged.verify(source=str(damaged.source)), "unquantized", name)


def test_an_unquantized_tensor_in_another_dtype(copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    name = "model.norm.weight"
    damaged.change(name, lambda tensor: tensor.float())
    assert_only(damaged.verify(source=str(damaged.source)), "unquantized", name, "F32", "BF16")


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return (packed >> 4) | (packed << 4)


DAMAGED_WEIGHTS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "swapped nibbles": ("weight_packed", swap_nibbles),
    "rows in another order": ("weight_packed", lambda packed: packed.flip(0)),
    "signs turned": ("weight_packed", lambda packed: packed ^ 0x88),
    "scales transposed": ("weight_scale", lambda s: s.view(torch.uint8).reshape(4, 64).T.contiguous().view(s.dtype)),
    "scales a quarter too large": ("weight_scale", lambda scale: (scale.float() * 1.25).to(scale.dtype)),
    "scales doubled": ("weight_scale", lambda scale: (scale.float() * 2).to(scale.dtype)),
    "a multiplier for a divisor": ("weight_global_scale", lambda scale: 1 / scale),
    "all zero": ("weight_packed", torch.zeros_like),
}


@pytest.mark.parametrize("damage", DAMAGED_WEIGHTS)
def test_damaged_weights(damage: str, copy: Callable) -> None:
    part, change = DAMAGED_WEIGHTS[damage]
    damaged = copy()
    damaged.forget_job()
    damaged.change(f"{O_PROJ}.{part}", change)
    assert_only(damaged.verify(source=str(damaged.source)), "dequantized", f"{O_PROJ}.weight_packed")


def test_another_tensors_scales(copy: Callable) -> None:
    from safetensors.torch import load_file

    damaged = copy()
    damaged.forget_job()
    other = load_file(damaged.shard_of(Q_PROJ))[f"{Q_PROJ}.weight_scale"]
    damaged.change(f"{O_PROJ}.weight_scale", lambda _: other)
    assert_only(damaged.verify(source=str(damaged.source)), "dequantized", f"{O_PROJ}.weight_packed")


def test_another_models_source(copy: Callable, pico: Callable[..., Path]) -> None:
    """Same family, other widths: every difference is told, nothing crashes, and nothing is walked."""
    good = copy()
    report = good.verify(source=str(pico("llama", intermediate_size=128)), deep=True)
    found = failed(report)
    assert list(found) == ["source_config", "unquantized", "dequantized"]
    assert any("mlp.down_proj.weight has shape [64, 128]" in failure for failure in found["dequantized"])
    assert "another model" in next(check.detail for check in report.checks if check.name == "deep")


def test_many_failures_are_cut_off_and_counted(copy: Callable) -> None:
    damaged = copy()
    damaged.forget_job()
    damaged.edit_json("config.json", lambda c: c.update(num_hidden_layers=4))
    (failures,) = failed(damaged.verify()).values()
    # Two layers more: seven Linears with four tensors each, and two norms.
    assert len(failures) == 21
    assert failures[-1] == f"and {2 * (7 * 4 + 2) - 20} more"


# --deep


def test_a_kl_that_was_not_recorded_so(copy: Callable) -> None:
    damaged = copy()
    recorded = json.loads((damaged.directory / ".fourge" / "job.json").read_text())["result"]["fidelity"]["kl_div"][
        "mean"
    ]

    def worsen(job: dict) -> None:
        job["result"]["fidelity"]["kl_div"]["mean"] = recorded * 1.02

    damaged.edit_json(".fourge/job.json", worsen)
    report = damaged.verify(source=str(damaged.source), deep=True)
    assert_only(report, "deep", f"{recorded:.6g}", f"{recorded * 1.02:.6g}")


def test_scales_that_overflow_the_walk(copy: Callable) -> None:
    """All stored numbers are finite, the products are not: found by running them."""
    damaged = copy()
    damaged.forget_job()
    damaged.change(f"{O_PROJ}.weight_global_scale", set_first(1e-38))
    damaged.change(f"{LAYER}.mlp.down_proj.weight_global_scale", set_first(1e-38))
    found = failed(damaged.verify(source=str(damaged.source), deep=True, probe="random"))
    assert list(found) == ["dequantized", "deep"]
    assert "layer 0" in found["deep"][0] and "nvfp4 lane" in found["deep"][0]
