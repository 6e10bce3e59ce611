"""Killed at any instant, a job continues to the very bytes of a run that was never killed."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Zygote, committed_steps, contents, require_same

from fourge.walk.job import INDEX


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote("crash_zygote.py")
    yield process
    process.close()


@pytest.fixture(scope="module")
def whole(
    zygote: Zygote, pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run: its directory and how many operations it took."""
    output = tmp_path_factory.mktemp("whole") / "out"
    answer = zygote.quantize(pico(), output)
    assert answer["killed_by"] is None and answer["operations"] > 40
    return output, answer


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_the_operations_of_every_commit(
    stride: int, zygote: Zygote, whole: tuple[Path, dict[str, Any]], pico: Callable[..., Path], tmp_path: Path
) -> None:
    """Every third operation by default, which is each kind of them in one commit or another; all of them as `slow`."""
    reference, answer = whole
    for point in range(1, answer["operations"] + 1, stride):
        output = tmp_path / f"killed-{point}"
        assert zygote.quantize(pico(), output, kill_before=point)["killed_by"] == signal.SIGKILL
        before = committed_steps(output)
        assert not (output / INDEX).exists() or before == 4, "an index means a finished checkpoint"
        continued = zygote.quantize(pico(), output)
        assert continued["killed_by"] is None, f"killed before operation {point}, it did not continue"
        require_same(output, reference)
        shutil.rmtree(output)


def test_killed_again_and_again_at_random_instants(
    zygote: Zygote, whole: tuple[Path, dict[str, Any]], pico: Callable[..., Path], tmp_path: Path
) -> None:
    reference, answer = whole
    rng = random.Random(5)
    for trial in range(4):
        output = tmp_path / f"trial-{trial}"
        for _ in range(3):
            zygote.quantize(pico(), output, kill_after=rng.uniform(0.01, answer["seconds"]))
        assert zygote.quantize(pico(), output)["killed_by"] is None
        require_same(output, reference)


@pytest.mark.parametrize("method", ["search", "gptq", "replay", "tuned"])
def test_every_method_continues_to_the_same_bytes(
    zygote: Zygote, pico: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    reference = tmp_path / "whole"
    operations = zygote.quantize(pico(), reference, method)["operations"]
    output = tmp_path / "killed"
    for point in range(20, operations, operations // 6):
        zygote.quantize(pico(), output, method, kill_before=point)
    assert zygote.quantize(pico(), output, method)["killed_by"] is None
    require_same(output, reference)


def test_a_mixture_continues_to_the_same_bytes(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    """FP8, BF16 and two methods, smoothed: all that a recipe file decides is decided the same again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rules:\n- {targets: 're:.*down_proj', scheme: FP8}\n- {targets: 're:.*layers.1.*', method: gptq}\n"
        "- {targets: model.layers.0.self_attn.o_proj, scheme: BF16}\n"
    )
    choices: dict[str, Any] = {"method": "search", "smooth": True, "recipe_file": recipe}
    reference = tmp_path / "whole"
    operations = zygote.quantize(pico(), reference, **choices)["operations"]
    output = tmp_path / "killed"
    for point in range(20, operations, operations // 6):
        zygote.quantize(pico(), output, kill_before=point, **choices)
    assert zygote.quantize(pico(), output, **choices)["killed_by"] is None
    require_same(output, reference)


def test_scales_of_the_kv_cache_come_out_the_same(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    reference = tmp_path / "whole"
    operations = zygote.quantize(pico(), reference, kv_cache_scheme="fp8")["operations"]
    output = tmp_path / "killed"
    for point in range(20, operations, operations // 6):
        zygote.quantize(pico(), output, kv_cache_scheme="fp8", kill_before=point)
    assert zygote.quantize(pico(), output, kv_cache_scheme="fp8")["killed_by"] is None
    require_same(output, reference)


def test_smoothing_decides_the_same_again(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    """With GPTQ and an FP8 cache behind it: both look at the folded tensors."""
    choices: dict[str, Any] = {"method": "gptq", "smooth": True, "kv_cache_scheme": "fp8"}
    reference = tmp_path / "whole"
    operations = zygote.quantize(pico(), reference, **choices)["operations"]
    assert b'"kept": true' in contents(reference)[".fourge/job.json"]
    output = tmp_path / "killed"
    for point in range(20, operations, operations // 6):
        zygote.quantize(pico(), output, kill_before=point, **choices)
    assert zygote.quantize(pico(), output, **choices)["killed_by"] is None
    require_same(output, reference)


def test_without_data_a_shard_may_be_under_way(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    """The thread that writes one is killed while the next layer is quantized."""
    choices: dict[str, Any] = {"method": "search", "more": {"scheme": "NVFP4A16", "calibration": "none"}}
    reference = tmp_path / "whole"
    operations = zygote.quantize(pico(), reference, **choices)["operations"]
    output = tmp_path / "killed"
    for point in range(4, operations, operations // 5):
        zygote.quantize(pico(), output, kill_before=point, **choices)
    assert zygote.quantize(pico(), output, **choices)["killed_by"] is None
    require_same(output, reference)
