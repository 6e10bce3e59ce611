"""A small Llama trained from nothing on local text: a model whose weights never were quantized.

    python benchmarks/train_llama.py OUTPUT TEXT... [--steps 2000] [--device cuda]

The last part of every text (`--held-out`, a tenth) is held out of the training and of the tokenizer, and written to
OUTPUT-held-out/ as `calibration.txt` (its first halves) and `probe.txt` (its second halves). A run that was stopped
continues from OUTPUT-state.pt; the batches depend on the seed and the step alone, so it sees the ones that it would
have seen.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"


def split_text(text: str, held_out: float) -> tuple[str, str, str]:
    """Training, calibration and probe (half of the share `held_out` each), in the order of the text."""
    first, second = (round(len(text) * (1 - share)) for share in (held_out, held_out / 2))
    return text[:first], text[first:second], text[second:]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text has tokens."""
    tokenizer = ByteLevelBPETokenizer()
    # In pieces: the trainer counts each of its inputs as a whole.
    pieces = [line + "\n" for text in texts for line in text.split("\n")]
    tokenizer.train_from_iterator(
        pieces, vocab_size=vocab_size, min_frequency=2, special_tokens=[BOS, EOS], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token=BOS, eos_token=EOS)


def build_model(options: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with grouped queries and a tied head; initialised as GPT-2 is, deeper outputs smaller."""
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=4 * options.length,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.mul_((2 * options.layers) ** -0.5)
    return model


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear rise over the first twentieth, then a cosine down to a twentieth of the peak."""
    rise = max(1, steps // 20)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def batch_at(tokens: torch.Tensor, step: int, options: argparse.Namespace) -> torch.Tensor:
    """[batch, length] windows of the tokens.

    Every epoch cuts the stream anew, at an offset of its own, and shuffles the pieces.
    """
    pieces = len(tokens) // options.length - 1
    per_epoch = pieces // options.batch
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
    offset = int(torch.randint(options.length, (), generator=generator))
    chosen = torch.randperm(pieces, generator=generator)[place * options.batch : (place + 1) * options.batch]
    starts = offset + chosen * options.length
    return tokens[starts[:, None] + torch.arange(options.length)]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, bfloat16: bool) -> torch.Tensor:
    """Mean cross entropy of the next token, nats."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, options: argparse.Namespace) -> float:
    """Mean cross entropy on 32 evenly spaced pieces of the held-out tokens."""
    starts = torch.linspace(0, len(tokens) - options.length, 32).long()
    ids = tokens[starts[:, None] + torch.arange(options.length)].to(options.device)
    return float(torch.stack([loss_of(model, part, options.bfloat16) for part in ids.split(8)]).mean())


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices, none on the norms."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """The old state stays until the new one is whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, options: argparse.Namespace) -> None:
    """Trains in place; says where it stands and saves its state every `--every` steps."""
    optimizer = make_optimizer(model)
    state_file = Path(f"{options.output}-state.pt")
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=options.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
        print(f"continues at step {first}", flush=True)
    began, recent = time.monotonic(), []
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.rate)
        loss = loss_of(model, batch_at(tokens, step, options).to(options.device), options.bfloat16)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(float(loss.detach()))
        done = step + 1
        if done % 20 == 0:
            left = (time.monotonic() - began) / (done - first) * (options.steps - done)
            mean = sum(recent[-20:]) / len(recent[-20:])
            print(f"step {done}/{options.steps}  loss {mean:.3f}  {left / 60:.0f} min left", flush=True)
        if done % options.every == 0 or done == options.steps:
            print(f"step {done}  held-out loss {held_out_loss(model, held_out, options):.3f}", flush=True)
            save_state(state_file, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", help="UTF-8 text files")
    parser.add_argument("--vocab", type=int, default=6144)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of every text")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    parser.add_argument("--every", type=int, default=100, help="steps between held-out losses and saved states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in BF16 (weights stay FP32)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    parts = [split_text(path.read_text(encoding="utf-8"), options.held_out) for path in options.texts]
    held_out_folder = Path(f"{options.output}-held-out")
    held_out_folder.mkdir(parents=True, exist_ok=True)
    (held_out_folder / "calibration.txt").write_text("".join(part[1] for part in parts), encoding="utf-8")
    (held_out_folder / "probe.txt").write_text("".join(part[2] for part in parts), encoding="utf-8")
    tokenizer = train_tokenizer([part[0] for part in parts], options.vocab)
    options.vocab = len(tokenizer)
    tokens = torch.cat([torch.tensor(tokenizer(part[0])["input_ids"]) for part in parts])
    held_out = torch.cat([torch.tensor(tokenizer(part[1])["input_ids"]) for part in parts])
    model = build_model(options).to(options.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} held out", flush=True)
    train(model, tokens, held_out, options)
    model.to(torch.bfloat16).cpu().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"held-out loss in {options.output}: {held_out_loss(model.to(options.device), held_out, options):.3f}")


if __name__ == "__main__":
    main()
