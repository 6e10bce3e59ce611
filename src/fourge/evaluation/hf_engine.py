"""The `hf` engine: both models in memory, one after the other, in lm-eval's own `hf` model."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourge.evaluation.prompting import END_OF_THOUGHT, load_tokenizer
from fourge.progress import announced

if TYPE_CHECKING:
    from fourge.evaluation.requests import Results, Role, RunLmEval


@dataclass(frozen=True)
class HfEngine:
    """transformers' models in `compute_dtype` ("float32" or "bfloat16") on `device`, `batch_size` requests at once.

    compressed-tensors decompresses quantized weights to BF16 and quantizes the activations of an NVFP4 checkpoint:
    W4A4 emulated. In FP32 those BF16 weights are widened; the walk keeps the bits that BF16 loses.
    """

    models: "Mapping[Role, Path]"
    compute_dtype: str
    device: str
    batch_size: int
    add_bos_token: bool | None = None
    chat_template_args: Mapping[str, Any] = field(default_factory=dict)

    def evaluate(self, run_lm_eval: "RunLmEval") -> "dict[Role, Results]":
        """lm-eval's results of every model; never two of them in memory."""
        return {role: self._evaluate_one(role, directory, run_lm_eval) for role, directory in self.models.items()}

    def _evaluate_one(self, role: "Role", directory: Path, run_lm_eval: "RunLmEval") -> "Results":
        from lm_eval.models.huggingface import HFLM

        with announced(f"{role}: loading {directory}"):
            model = load_model(directory, self.compute_dtype, self.device)
        lm = HFLM(
            pretrained=model,
            tokenizer=load_tokenizer(directory),
            batch_size=self.batch_size,
            add_bos_token=self.add_bos_token,
            chat_template_args=dict(self.chat_template_args),
            think_end_token=END_OF_THOUGHT if any(self.chat_template_args.values()) else None,
        )
        with announced(f"{role}: lm-eval's requests"):
            results = run_lm_eval(lm)
        del lm, model
        release_memory()
        return results


def load_model(directory: Path, compute_dtype: str, device: str) -> Any:
    """transformers' causal model of a source or a quantized checkpoint, ready to run on `device`."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, compute_dtype)
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, device_map={"": device}, local_files_only=True, trust_remote_code=False
    )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        # Decompressed at the first forward otherwise, and then in BF16 under FP32 activations.
        quantizer.compressor.decompress_model(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def release_memory() -> None:
    """Gives back what a model held, on the host and on the GPU."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
