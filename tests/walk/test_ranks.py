"""Several ranks at one job: the bytes of one process, and what becomes of them when one of them is killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import OPTIONS, Zygote, committed_steps, require_same

from fourge.errors import InputError
from fourge.launch import read_launch
from fourge.methods.hessian import HessianAccumulator
from fourge.recipes import DEFAULT, RECIPES
from fourge.walk.job import INDEX
from fourge.walk.ranks import spans

WALKED: dict[str, Any] = {"micro_batch_tokens": 24, "num_calibration_samples": 13, "num_probe_samples": 5}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = Zygote("rank_zygote.py")
    yield process
    process.close()


def require_any_number_of_ranks(zygote: Zygote, model: Path, folder: Path, counts: list[int], **choices: Any) -> None:
    (alone,) = zygote.quantize(model, folder / "1", ranks=1, more=WALKED, **choices)
    for ranks in counts:
        answers = zygote.quantize(model, folder / str(ranks), ranks=ranks, more=WALKED, **choices)
        assert answers == [alone] * ranks
        require_same(folder / str(ranks), folder / "1")


def test_replay_smoothed_writes_the_same_bytes_with_1_2_and_3_ranks(
    zygote: Zygote, pico: Callable[..., Path], tmp_path: Path
) -> None:
    choices: dict[str, Any] = {"method": "replay", "smooth": True, "kv_cache_scheme": "fp8"}
    require_any_number_of_ranks(zygote, pico(), tmp_path, [2, 3], **choices)


def test_the_default_recipe_writes_the_same_bytes_with_2_ranks(
    zygote: Zygote, pico: Callable[..., Path], tmp_path: Path
) -> None:
    """`tuned` runs all lanes at once, and sums a second matrix."""
    recipe = RECIPES[DEFAULT]
    require_any_number_of_ranks(zygote, pico(), tmp_path, [2], method=recipe.method, smooth=recipe.smooth)


@pytest.mark.slow
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("method", ["max", "search", "gptq", "replay", "tuned"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_every_method_writes_the_same_bytes_with_any_number_of_ranks(
    zygote: Zygote, pico: Callable[..., Path], tmp_path: Path, architecture: str, method: str, smooth: bool
) -> None:
    """With more ranks than there are micro-batches of some sets, too."""
    require_any_number_of_ranks(zygote, pico(architecture), tmp_path, [2, 3, 5], method=method, smooth=smooth)


@pytest.mark.slow
def test_a_mixture_writes_the_same_bytes(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rules:\n- {targets: 're:.*down_proj', scheme: FP8}\n- {targets: 're:.*layers.1.*', method: gptq}\n"
    )
    require_any_number_of_ranks(zygote, pico(), tmp_path, [3], method="search", recipe_file=recipe)


@pytest.mark.slow
def test_weights_alone_write_the_same_bytes(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    scheme = {"scheme": "NVFP4A16", "calibration": "none"}
    for ranks in (1, 3):
        zygote.quantize(pico(), tmp_path / str(ranks), "search", ranks=ranks, more=WALKED | scheme)
    require_same(tmp_path / "3", tmp_path / "1")


@pytest.mark.parametrize("killed", [2, *(pytest.param(rank, marks=pytest.mark.slow) for rank in (0, 1))])
def test_when_a_rank_is_killed_the_others_say_so_and_the_job_goes_on(
    zygote: Zygote, pico: Callable[..., Path], tmp_path: Path, killed: int
) -> None:
    """With another number of ranks, to the bytes of a run that was never killed."""
    output = tmp_path / "out"
    answers = zygote.quantize(pico(), output, ranks=3, more=WALKED, kill_rank=killed, kill_before_write=8)
    assert answers[killed] == {"killed_by": signal.SIGKILL}
    for rank, answer in enumerate(answers):
        if rank != killed:
            assert answer["error"] == "RankLostError"
            assert answer["message"].startswith(f"rank {rank} of 3: another rank is gone (")
            assert "\n" not in answer["message"]
    assert committed_steps(output) == 1 and not (output / INDEX).exists()
    assert len(zygote.quantize(pico(), output, ranks=1 + killed // 2, more=WALKED)) == 1 + killed // 2
    zygote.quantize(pico(), tmp_path / "whole", ranks=1, more=WALKED)
    require_same(output, tmp_path / "whole")


def test_ranks_that_are_not_alike_are_refused(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    """Rank 0 names what differs, the other ends in silence, and nothing is left behind."""
    answers = zygote.quantize(pico(), tmp_path / "out", ranks=2, more=WALKED, of_rank={"1": {"threads": 2}})
    assert answers[0]["message"] == "rank 1 has threads = 2 and rank 0 1: all ranks need the same"
    assert [answer["error"] for answer in answers] == ["TogetherError", "TogetherError"]
    assert not (tmp_path / "out").exists()


def test_what_one_rank_cannot_use_stops_all(zygote: Zygote, pico: Callable[..., Path], tmp_path: Path) -> None:
    elsewhere = {"1": {"ignore": ["re:.*down_proj"], "targets": ["nothing"]}}
    answers = zygote.quantize(pico(), tmp_path / "out", ranks=2, more=WALKED, of_rank=elsewhere)
    assert answers[0]["message"].startswith("rank 1: ")
    assert [answer["error"] for answer in answers] == ["TogetherError", "TogetherError"]


def test_blocks_of_a_hessian_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourge.methods.hessian._COLUMNS_PER_BLOCK", 32)
    inputs = [torch.randn(100, 80, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    whole, parts = HessianAccumulator(80), [HessianAccumulator(80, own=(rank, 2)) for rank in range(2)]
    for x in inputs:
        for accumulator in (whole, *parts):
            accumulator.add(x)
    for i, block in enumerate(parts[0].summed_blocks()):
        block.copy_(parts[i % 2].summed_blocks()[i])
    assert torch.equal(parts[0].matrix, whole.matrix)
    x = torch.cat(inputs).double()
    torch.testing.assert_close(whole.matrix.double(), x.T @ x, rtol=1e-4, atol=1e-3)


def test_spans_are_cut_at_multiples_of_the_unit() -> None:
    assert spans(20, 8, 2) == [slice(0, 8), slice(8, 20)]
    assert spans(20, 8, 5) == [slice(0, 8), slice(8, 16), slice(16, 20)]
    assert spans(7, 8, 3) == [slice(0, 7)]


def test_a_launch_that_says_half_of_what_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start several ranks with torchrun"):
        read_launch()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert read_launch().size == 1


@pytest.mark.slow
def test_torchrun(pico: Callable[..., Path], tmp_path: Path) -> None:
    """The command as it is typed: one voice, the same bytes; and verbs for one process are refused."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | WALKED).items()]
    command = ["-m", "fourge", "quantize", str(pico()), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    subprocess.run([sys.executable, *command, "-o", tmp_path / "alone"], check=True, env=environment)
    done = subprocess.run(
        [*torchrun, *command, "-o", tmp_path / "together"], check=True, env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("top-1 agreement") == done.stderr.count("| layer 0 ") == 1
    require_same(tmp_path / "together", tmp_path / "alone")
    refused = subprocess.run(
        [*torchrun, "-m", "fourge", "verify", tmp_path / "alone"], env=environment, capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "fourge: verify is work for one process: leave torchrun out" in refused.stderr
