"""Which engine evaluates: the walk, unless a GPU holds either model with room to spare, or servers are named.

A server of the quantized model alone, beside a baseline, drafts for the walk.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fourge.checkpoint.reader import Checkpoint
from fourge.checks.config import check_config
from fourge.errors import InputError
from fourge.evaluation.lm_eval_run import Engine
from fourge.settings import LinearScheme

if TYPE_CHECKING:
    from fourge.evaluation.requests import Role

EngineOption = Literal["auto", "walk", "hf", "vllm"]
_NUMERICS: Mapping[LinearScheme, str] = {"NVFP4": "W4A4", "NVFP4A16": "W4A16", "FP8": "W8A8"}
_ROOM = 1.4
"""Memory that a model is given over its weights: activations, logits of a batch, a cache while it generates."""


def choose_engine(
    asked: EngineOption, models: "Mapping[Role, Path]", urls: "Mapping[Role, str]", device: str
) -> Engine:
    """The engine for models on `device` (resolved: "cpu", "cuda" or "cuda:N").

    Raises InputError for servers that no engine would ask, or the other way round.
    """
    drafting_alone = set(urls) == {"quantized"} and "quantized" in models
    if drafting_alone and (asked == "walk" or (asked == "auto" and "baseline" in models)):
        return "walk"
    if asked == "vllm" or (asked == "auto" and urls):
        missing = [role for role in models if role not in urls]
        if missing:
            raise InputError(f"--engine vllm: where is the {missing[0]} model served? name it with --{missing[0]}-url")
        return "vllm"
    if urls:
        raise InputError(f"--{sorted(urls)[0]}-url is for --engine vllm; --engine {asked} computes itself")
    if asked != "auto":
        return asked
    if not device.startswith("cuda"):
        return "walk"
    return "hf" if max(map(loaded_bytes, models.values())) * _ROOM < _free_bytes(device) else "walk"


def loaded_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's weights in transformers' memory: decompressed to BF16, four times NVFP4's codes, twice
    FP8's."""
    tensors = Checkpoint.open(directory).tensors.values()
    return sum(info.nbytes * {"U8": 4, "F8_E4M3": 2}.get(info.dtype, 1) for info in tensors)


def file_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's weights on disk."""
    return sum(info.nbytes for info in Checkpoint.open(directory).tensors.values())


def _free_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info(torch.device(device))[0])


def emulated_numerics(quantized: Path | None) -> str:
    """What an engine that follows the checkpoint's config computes: activations in FP4 too, or weights alone."""
    if quantized is None:
        return ""
    check, quantization = check_config(Checkpoint.open(quantized).config)
    if quantization is None:
        raise InputError(f"{quantized}: {check.failures[0]}; `fourge verify {quantized}` says all that is wrong")
    return name_numerics(scheme for scheme, _ in quantization.groups)


def name_numerics(schemes: Iterable[LinearScheme]) -> str:
    """`W4A4 emulated`, and of a mixture `W4A4 + W8A8 emulated`."""
    return " + ".join(_NUMERICS[scheme] for scheme in sorted(set(schemes), key=list(_NUMERICS).index)) + " emulated"
