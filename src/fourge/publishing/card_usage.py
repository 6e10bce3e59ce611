"""How to run the model, with the command that the plan says fits, and what runs it at all."""

import shlex
from typing import TYPE_CHECKING

from fourge.planning.kernels import FP4, KERNELS, MARLIN_WITHOUT_BF16
from fourge.publishing.card_options import CardFacts
from fourge.publishing.card_overview import plan_file
from fourge.publishing.card_section import Section, Trace
from fourge.publishing.markdown import NONE, bullets, code, plain, table

if TYPE_CHECKING:
    from fourge.plan import PlanReport
    from fourge.planning.fit import Fit

_GIB = 1 << 30
_NATIVE = FP4.name


def usage(card: CardFacts) -> Section:
    """Commands for vLLM, transformers and SGLang, on the first GPUs of the plan that hold the model."""
    plan = card.evidence.plan
    chosen = None if plan is None else choose_fit(plan)
    blocks = ["### vLLM", *_vllm(card, chosen), "### transformers", *_transformers(card), "### SGLang"]
    blocks += _sglang(card, chosen)
    return Section("How to use", "\n\n".join(blocks), (_trace(card),) if chosen else ())


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
        "needs beside them is an estimate. More GPUs may be used: tensor-parallel sizes "
        f"{', '.join(map(str, plan.tensor_parallel_sizes))} work."
    )
    kernels = bullets([f"**{kernel.name}**: {kernel.accuracy}; {kernel.speed}." for kernel in plan.kernels])
    reasons = [f"{fit.gpu}: {fit.reason}." for fit in plan.gpus if not fit.holds]
    reasons += [f"{plain(note)}." for note in plan.notes]
    rows = [_hardware_row(fit) for fit in plan.gpus]
    parts = [intro, table(header, rows), kernels, *([bullets(reasons)] if reasons else [])]
    return Section("Hardware", "\n\n".join(parts), (_trace(card),))


def _trace(card: CardFacts) -> Trace:
    return Trace("GPUs, their number, kernels, memory", plan_file(card), "fourge plan OUT")


def choose_fit(plan: "PlanReport") -> "Fit | None":
    """The first GPUs that hold the model and multiply in FP4; without any, the first that hold it."""
    held = [fit for fit in plan.gpus if fit.holds]
    return next((fit for fit in held if fit.kernel == _NATIVE), held[0] if held else None)


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
    return [fit.gpu, str(fit.count), arithmetic, f"{fit.weights / _GIB:.1f} GiB", cache]


def _vllm(card: CardFacts, fit: "Fit | None") -> list[str]:
    plan = card.evidence.plan
    if plan is None or fit is None:
        return ["None of the GPUs below holds it. `fourge plan OUT --gpu NAME:COUNT --max-model-len N` tries others."]
    length = plan.request.max_model_len
    arguments = ["vllm", "serve", card.model_id, "--max-model-len", str(length)]
    options = [f"max_model_len={length}"]
    if fit.count > 1:
        arguments += ["--tensor-parallel-size", str(fit.count)]
        options.append(f"tensor_parallel_size={fit.count}")
    if fit.kernel == MARLIN_WITHOUT_BF16.name:
        arguments += ["--dtype", "half"]
        options.append('dtype="half"')
    holds = "holds" if fit.count == 1 else "hold"
    where = f"On {fit.count} × {fit.gpu} ({fit.kernel}), which {holds} it at its full context length:"
    return [where, code(shlex.join(arguments)), *_vllm_python(card, options)]


def _vllm_python(card: CardFacts, options: list[str]) -> list[str]:
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
    if plan is None or fit is None or fit.kernel != _NATIVE:
        return [
            "SGLang runs compressed-tensors' NVFP4 on GPUs with FP4 tensor cores, with quantized activations; none of "
            "those that the plan knows fits this checkpoint."
        ]
    arguments = ["python", "-m", "sglang.launch_server", "--model-path", card.model_id]
    arguments += ["--context-length", str(plan.request.max_model_len)]
    if fit.count > 1:
        arguments += ["--tp", str(fit.count)]
    note = f"On GPUs with FP4 tensor cores alone, here {fit.count} × {fit.gpu}; the number is what holds it under vLLM:"
    return [note, code(shlex.join(arguments))]
