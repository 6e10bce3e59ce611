"""How to run the model, with the command that the plan says fits, and what runs it at all."""

import shlex
from typing import TYPE_CHECKING

from fourge.planning.fit import smallest_of
from fourge.planning.kernels import FP4, KERNELS, MARLIN_WITHOUT_BF16
from fourge.progress import format_binary
from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_overview import plan_file
from fourge.publishing.card_section import Section, Trace
from fourge.publishing.markdown import NONE, bullets, code, plain, table

if TYPE_CHECKING:
    from fourge.planning.fit import Fit

_NATIVE = FP4.name


def usage(card: CardFacts) -> Section:
    """Commands for vLLM, transformers and SGLang, on the smallest GPUs of the plan that hold the model."""
    plan = card.evidence.plan
    fits = () if plan is None else plan.gpus
    native, weight_only = smallest_of(fits, native=True), smallest_of(fits, native=False)
    blocks = ["### vLLM", *_vllm(card, native, weight_only), "### transformers", *_transformers(card), "### SGLang"]
    blocks += _sglang(card, native)
    return Section("How to use", "\n\n".join(blocks), (_trace(card),) if native or weight_only else ())


def hardware(card: CardFacts) -> Section:
    """Every known GPU in the smallest number that holds the model at full length, and what it computes in."""
    plan = card.evidence.plan
    if plan is None:
        return Section("Hardware", "Not planned for: see the overview.", missing=f"{card.evidence.plan_failure}")
    request = plan.request
    header = ("GPU", "how many", "arithmetic", "weights each", "KV cache holds")
    intro = (
        f"The fewest GPUs that hold {request.concurrency} sequence of {request.max_model_len:,} tokens under vLLM, "
        f"which may take {request.gpu_memory_utilization:.0%} of each one's memory. Weights are exact; what an engine "
        "needs beside them is an estimate. The model can be cut over "
        f"{', '.join(map(str, plan.tensor_parallel_sizes))} GPUs (tensor-parallel sizes)."
    )
    kernels = bullets([f"**{kernel.name}**: {kernel.accuracy}; {kernel.speed}." for kernel in plan.kernels])
    reasons = [f"{fit.gpu}: {fit.reason}." for fit in plan.gpus if not fit.holds]
    reasons += [f"{plain(note)}." for note in plan.notes]
    rows = [_hardware_row(fit) for fit in plan.gpus]
    parts = [intro, table(header, rows), kernels, *([bullets(reasons)] if reasons else [])]
    return Section("Hardware", "\n\n".join(parts), (_trace(card),))


def _trace(card: CardFacts) -> Trace:
    return Trace("GPUs, their number, kernels, memory", plan_file(card), "fourge plan OUT")


def _arithmetic(name: str | None) -> str:
    kernel = next((kernel for kernel in KERNELS if kernel.name == name), None)
    if kernel is None:
        return "none"
    if kernel.name == _NATIVE:
        return "W4A4, native"
    return f"{'W4A4' if kernel.activations_quantized else 'W4A16, weight-only'} ({kernel.name})"


def _hardware_row(fit: "Fit") -> list[str]:
    arithmetic = _arithmetic(fit.kernel)
    if not fit.holds:
        return [fit.gpu, NONE, arithmetic, NONE, NONE]
    cache = f"{fit.kv_cache_tokens:,} tokens"
    return [fit.gpu, str(fit.count), arithmetic, format_binary(fit.weights), cache]


def _vllm(card: CardFacts, native: "Fit | None", weight_only: "Fit | None") -> list[str]:
    """The command on the smallest GPUs of either kind; the script with the options of the first."""
    plan, best = card.evidence.plan, native or weight_only
    if plan is None or best is None:
        return ["None of the GPUs below holds it. `fourge plan OUT --gpu NAME:COUNT --max-model-len N` tries others."]
    length = plan.request.max_model_len
    blocks = []
    if native is not None:
        blocks += [f"In FP4, at its full context length, on {_gpus(native)} or larger:", _serve(card, native, length)]
    if weight_only is not None:
        where = f"Weight-only (W4A16), on {_gpus(weight_only)} or larger"
        same = native is not None and _serve(card, native, length) == _serve(card, weight_only, length)
        blocks += [f"{where}: the same command."] if same else [f"{where}:", _serve(card, weight_only, length)]
    return [*blocks, *_vllm_python(card, best, length)]


def _gpus(fit: "Fit") -> str:
    return f"{fit.count} × {fit.gpu}"


def _serve(card: CardFacts, fit: "Fit", length: int) -> str:
    arguments = ["vllm", "serve", card.model_id, "--max-model-len", str(length)]
    if fit.count > 1:
        arguments += ["--tensor-parallel-size", str(fit.count)]
    if fit.kernel == MARLIN_WITHOUT_BF16.name:
        arguments += ["--dtype", "half"]
    return code(shlex.join(arguments))


def _vllm_python(card: CardFacts, fit: "Fit", length: int) -> list[str]:
    options = [f"max_model_len={length}"]
    if fit.count > 1:
        options.append(f"tensor_parallel_size={fit.count}")
    if fit.kernel == MARLIN_WITHOUT_BF16.name:
        options.append('dtype="half"')
    chats = has_chat_template(card)
    call = 'llm.chat([{"role": "user", "content": "Why is the sky blue?"}], sampling)'
    if not chats:
        call = 'llm.generate("The sky is blue because", sampling)'
    script = [
        "from vllm import LLM, SamplingParams",
        "",
        f"llm = LLM({', '.join([repr(card.model_id), *options])})".replace("'", '"'),
        "sampling = SamplingParams(max_tokens=256)",
        f"print({call}[0].outputs[0].text)",
    ]
    note = "The model's own chat template is applied:" if chats else "There is no chat template; prompts go in as text:"
    return [note, code("\n".join(script), "python")]


def has_chat_template(card: CardFacts) -> bool:
    """Whether a chat template lies beside the weights, in its own file or in the tokenizer's config."""
    config = card.output / "tokenizer_config.json"
    return (card.output / "chat_template.jinja").is_file() or (
        config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    )


def _transformers(card: CardFacts) -> list[str]:
    script = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'name = "{card.model_id}"',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")',
    ]
    if has_chat_template(card):
        script += [
            'messages = [{"role": "user", "content": "Why is the sky blue?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        script.append('inputs = tokenizer("The sky is blue because", return_tensors="pt").to(model.device)')
    script += [
        "answer = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    needs = (
        "Needs `pip install transformers accelerate compressed-tensors`. It has no FP4 kernels: good for looking at "
    )
    return [f"{needs}the model, not for speed.", code("\n".join(script), "python")]


def _sglang(card: CardFacts, fit: "Fit | None") -> list[str]:
    plan = card.evidence.plan
    if plan is None or fit is None:
        return [
            "SGLang runs compressed-tensors' NVFP4 on GPUs with FP4 tensor cores, with quantized activations; none of "
            "those that the plan knows fits this checkpoint."
        ]
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", card.model_id]
    arguments += ["--context-length", str(plan.request.max_model_len)]
    if fit.count > 1:
        arguments += ["--tp", str(fit.count)]
    note = f"Needs GPUs with FP4 tensor cores. On {_gpus(fit)}, the number that holds it under vLLM:"
    return [note, code(shlex.join(arguments))]
