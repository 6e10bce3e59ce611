"""Runs in vLLM's environment: loads checkpoints one after another with vLLM's own loader, and writes what they say.

Usage: `python drive.py jobs.json results.json`. A job is `{"model", "mode", "dtype", "prompts"}` under its name:
`mode` is the value of FOURGE_VLLM_CPU, null for unset, `prompts` are token ids. Its result is the log-probability of
every prompt token but the first, and four greedy tokens; or the error's type and message. The mode "emulation" is
none of ours: it takes our kernel out of the choice, and puts vLLM's own emulation of NVFP4 in its place.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

NEW_TOKENS = 4


def choose_kernel(mode: str | None) -> None:
    os.environ.pop("FOURGE_VLLM_CPU", None)
    os.environ["VLLM_DISABLED_KERNELS"] = ""
    if mode == "emulation":
        from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, register_linear_kernel
        from vllm.platforms import PlatformEnum

        os.environ["VLLM_DISABLED_KERNELS"] = "FourgeCpuNvFp4LinearKernel"
        register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    elif mode is not None:
        os.environ["FOURGE_VLLM_CPU"] = mode


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    choose_kernel(job["mode"])
    llm = LLM(job["model"], dtype=job["dtype"], enforce_eager=True, max_model_len=128, max_num_seqs=4)
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    return {
        "logprobs": [
            [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
            for output, ids in zip(outputs, job["prompts"], strict=True)
        ],
        "generated": [list(output.outputs[0].token_ids) for output in outputs],
    }


def main() -> None:
    jobs, results = (Path(argument) for argument in sys.argv[1:])
    done: dict[str, dict[str, Any]] = {}
    for name, job in json.loads(jobs.read_text()).items():
        began = time.monotonic()
        try:
            done[name] = run(job)
        except Exception as error:  # noqa: BLE001
            # Some of the jobs are there to be refused; the test reads which were, and why.
            traceback.print_exc()
            done[name] = {"error": type(error).__name__, "message": str(error)}
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        gc.collect()
    results.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
