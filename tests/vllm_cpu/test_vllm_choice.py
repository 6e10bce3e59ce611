"""What the plugin decides before vLLM is involved: which arithmetic, and that on a GPU it keeps out of the way."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from fourge.errors import InputError
from fourge.serving.vllm_cpu import chosen_mode, quantizes_activations, register


def test_the_variable() -> None:
    assert chosen_mode({}) is None
    assert chosen_mode({"FOURGE_VLLM_CPU": ""}) is None
    assert chosen_mode({"FOURGE_VLLM_CPU": "w4a16"}) == "w4a16"
    with pytest.raises(InputError, match="FOURGE_VLLM_CPU=W4A4 is not known; set it to w4a4 or w4a16"):
        chosen_mode({"FOURGE_VLLM_CPU": "W4A4"})


def test_which_linears_quantize_their_input() -> None:
    assert quantizes_activations(None, has_input_scale=True)
    assert not quantizes_activations(None, has_input_scale=False)
    assert quantizes_activations("w4a4", has_input_scale=True)
    assert not quantizes_activations("w4a16", has_input_scale=True)
    assert not quantizes_activations("w4a16", has_input_scale=False)
    with pytest.raises(InputError, match="weight-only"):
        quantizes_activations("w4a4", has_input_scale=False)


def test_on_a_gpu_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even read the variable; all it touches of vLLM is the question of the platform."""
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: False)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("FOURGE_VLLM_CPU", "nonsense")
    register()
    assert "fourge.serving.vllm_cpu_kernel" not in sys.modules
