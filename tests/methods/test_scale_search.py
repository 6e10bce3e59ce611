"""The search against all 126 scales, scored in FP64 by another definition of rounding."""

import pytest
import torch
from method_problems import problem
from textbook_twins import POSITIVE_SCALES, nearest_value
from torch import Tensor

from fourge.methods import scale_search
from fourge.methods.scale_codes import positive_codes, positive_scales
from fourge.methods.scale_search import search_scales
from fourge.nvfp4.backend import using
from fourge.nvfp4.quantize import amax, dequantize_weight, global_scale, group_scales, quantize_weight
from fourge.nvfp4.reference import ZERO_SCALE

# Not Triton's: its interpreter takes its time, and `test_backends.py` holds its search against these, bit for bit.
pytestmark = [
    pytest.mark.usefixtures("every_backend"),
    pytest.mark.parametrize("every_backend", ["torch", "numba"], indirect=True, scope="module"),
]


def group_errors(weight: Tensor, scale: Tensor | float, divisor: Tensor, importance: Tensor) -> Tensor:
    """Σ h (w − ŵ)² of every group `[N, K/16]` in FP64; the step c/G is the FP32 number of the format."""
    groups = weight.double().view(len(weight), -1, 16)
    steps = (torch.as_tensor(scale).float() / divisor).double().expand(groups.shape[:2])[..., None]
    residuals = groups - nearest_value(groups / steps) * steps
    return (residuals.square() * importance.double().view(-1, 16)).sum(-1)


def random_weights(kind: str, seed: int) -> Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(24, 128)
    if kind == "heavy tails":
        weight = torch.distributions.StudentT(2.0).sample((24, 128))
    elif kind == "30 octaves":
        weight *= torch.exp2(-torch.randint(0, 30, (24, 8))).repeat_interleave(16, 1)
    elif kind == "zeros":
        weight[::3] = 0
        weight[:, ::5] = 0
    return weight


def importance_of(spread: float, columns: int) -> Tensor:
    return torch.exp(spread * torch.randn(columns))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "30 octaves", "zeros"])
@pytest.mark.parametrize("spread", [None, 0.5, 3.0, "some zero"])
@pytest.mark.parametrize("seed", range(3))
def test_no_scale_is_better(kind: str, spread: float | str | None, seed: int) -> None:
    weight = random_weights(kind, seed)
    divisor = global_scale(amax(weight))
    importance = importance_of(spread if isinstance(spread, float) else 2.0, 128)
    if spread == "some zero":
        importance[::4] = 0
    elif spread is None:
        importance = torch.ones(128)
    scales = search_scales(weight, divisor, None if spread is None else importance)
    ours = group_errors(weight, scales, divisor, importance)
    best = torch.stack([group_errors(weight, scale, divisor, importance) for scale in POSITIVE_SCALES]).amin(0)
    assert (ours <= best * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("seed", range(20))
def test_objective_is_below_max(seed: int) -> None:
    weight, x = problem(seed)
    importance = x.square().sum(0)
    divisor = global_scale(amax(weight))

    def errors(scales: Tensor | None) -> Tensor:
        restored = dequantize_weight(quantize_weight(weight, divisor, scales)).double()
        return ((weight.double() - restored).square() * importance.double()).view(24, -1, 16).sum(-1)

    searched, plain = errors(search_scales(weight, divisor, importance)), errors(None)
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < 0.9 * plain.sum()


def test_first_of_equals_is_the_max_scale() -> None:
    # On the grid already: the max scale errs nowhere, and neither does half of it for the second group.
    values = torch.tensor([6, -4, 3, 2, 1.5, 1, 0.5, 0, -0.5, -1, -1.5, -2, -3, 4, 6, 0])
    halves = torch.tensor([6.0, 4, 3, 2, 1, 0, -1, -2, -3, -4, -6, 0, 0, 0, 0, 0])
    weight = torch.cat((values, halves, torch.zeros(16)))[None]
    divisor = torch.tensor(64.0)
    assert search_scales(weight, divisor).tolist() == [[64.0, 64.0, ZERO_SCALE]]


def test_of_equals_the_one_nearest_to_the_max_scale() -> None:
    # Only 1.5 counts: 48/64 and 64/64 both hit it, three codes below and one above the max scale, 60.
    weight = torch.zeros(1, 16)
    weight[0, :2] = torch.tensor([1.5, 5.625])
    importance = torch.zeros(16)
    importance[0] = 1
    assert group_scales(weight, torch.tensor(64.0)).item() == 60
    assert search_scales(weight, torch.tensor(64.0), importance).item() == 64


def test_a_silent_outlier_is_clipped() -> None:
    weight = torch.full((1, 16), 1.3)
    weight[0, 5] = 100.0
    importance = torch.ones(16)
    importance[5] = 1e-9
    divisor = torch.tensor(20.0)
    assert search_scales(weight, divisor).item() > 200
    assert search_scales(weight, divisor, importance).item() < 60  # 1.3 is 6, 4, 3 … or ½ steps


def test_chunks_and_input_dtype_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weights("heavy tails", 5).bfloat16()
    importance = importance_of(2.0, 128)
    divisor = global_scale(amax(weight))
    whole = search_scales(weight, divisor, importance)
    monkeypatch.setattr(scale_search, "_CPU_VALUES_PER_CHUNK", 300)
    assert search_scales(weight.float(), divisor.reshape(1), importance).equal(whole)


def test_codes_and_scales_are_inverse() -> None:
    codes = torch.arange(1, 127)
    assert positive_scales(codes).tolist() == POSITIVE_SCALES
    assert positive_codes(positive_scales(codes)).equal(codes.int())
    assert positive_scales(torch.tensor([-3, 0, 127, 200])).tolist() == [2**-9, 2**-9, 448.0, 448.0]
    assert positive_codes(torch.tensor([0.0, 1e-30, 1e30])).tolist() == [1, 1, 126]


@pytest.mark.gpu
@pytest.mark.parametrize("on_gpu", ["torch", "triton"])
def test_gpu_finds_as_good_a_scale(on_gpu: str) -> None:
    weight = random_weights("heavy tails", 2)
    importance = importance_of(2.0, 128)
    divisor = global_scale(amax(weight))
    with using(on_gpu):
        there = search_scales(weight.cuda(), divisor.cuda(), importance.cuda()).cpu()
    torch.testing.assert_close(
        group_errors(weight, there, divisor, importance),
        group_errors(weight, search_scales(weight, divisor, importance), divisor, importance),
        rtol=1e-6,
        atol=0,
    )
