"""What drafts answers: a whole model in memory, another model's answers, or the text itself where it repeats."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fourge.evaluation.budget import free_memory
from fourge.evaluation.drafting import Answer, Draft
from fourge.evaluation.lanes import ScoringLane
from fourge.progress import WalkProgress, format_bytes
from fourge.walk.layer import LaneLayer
from fourge.walk.linear import InputSite, LaneLinear
from fourge.walk.skeleton import meta_causal_lm

_WORKING_BYTES = 512 << 20
_MOST_ROWS = 16
_SHARE_OF_MEMORY = 0.5
_MASK_BYTES = 8
_LONGEST_ENDING = 4
_LOOKED_UP = 32
"""Tokens that are taken from where the text repeats: it seldom does for longer."""


@dataclass(frozen=True)
class Fit:
    """Whether a model fits in memory: `form` "widened" (weights in the computation's dtype, fast), "stored" (as the
    files have them, widened at every step), or None; with the bytes that the smallest form needs, and those free."""

    form: str | None
    need: int
    have: int

    def __str__(self) -> str:
        return f"{format_bytes(self.need)} of memory are needed, {format_bytes(self.have)} are there"


def find_fit(lane: ScoringLane, lanes: Sequence[ScoringLane]) -> Fit:
    """How `lane`'s model can be held beside one layer of any of `lanes`, from headers alone."""
    names = _held(lane)
    beside = max(other.layer_bytes for other in lanes) + _WORKING_BYTES
    stored = sum(lane.checkpoint.tensors[name].nbytes for name in _stored_names(lane)) + beside
    widened = sum(prod(lane.layout.shapes[name]) for name in names) * lane.walk.dtype.itemsize + beside
    have = free_memory(lane.walk.device)
    form = "widened" if widened <= have else "stored" if stored <= have else None
    return Fit(form, min(stored, widened), have)


def _head_name(lane: ScoringLane) -> str:
    architecture = lane.layout.architecture
    return f"{architecture.embedding if lane.walk.skeleton.tied_head else architecture.head}.weight"


def _held(lane: ScoringLane) -> list[str]:
    """The weights that a resident model holds, by their names before quantization; embeddings are read as needed."""
    layers = [name for names in lane.layout.steps[1:-1] for name in names]
    return [*layers, _head_name(lane)]


def _stored_names(lane: ScoringLane) -> list[str]:
    layers = f"{lane.layout.architecture.layers}."
    return [name for name in lane.checkpoint.tensors if name.startswith(layers) or name == _head_name(lane)]


class _ResidentLayer(nn.Module):
    """A lane's layer where transformers' model has its own."""

    def __init__(self, layer: LaneLayer, original: nn.Module) -> None:
        super().__init__()
        # Some models look at a layer's attributes to choose its mask.
        for attribute in ("attention_type", "layer_type"):
            if hasattr(original, attribute):
                setattr(self, attribute, getattr(original, attribute))
        self._layer = layer

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return self._layer.run(hidden_states, arguments)


class ResidentModel:
    """A lane's model in memory, in the walk's arithmetic, that decodes greedily with a cache of keys and values."""

    def __init__(self, lane: ScoringLane, widen: bool) -> None:
        self._lane = lane
        walk = lane.walk
        causal_lm = meta_causal_lm(lane.config, walk.device)
        self._decoder = causal_lm.base_model
        layers = []
        with WalkProgress("load", lane.layout.num_layers) as progress:
            for index, original in enumerate(causal_lm.get_submodule(lane.layout.architecture.layers)):
                layer = lane.layer(index, progress)
                if widen:
                    layer.widen()
                layers.append(_ResidentLayer(layer, original))
                progress.finish_step(lane.layout.step_name(index + 1), "", {})
        self._decoder.layers = nn.ModuleList(layers)
        self._decoder.norm = walk.final_norm()
        self._head_input = InputSite()
        weight = lane.checkpoint.read(_head_name(lane)).to(walk.device)
        self._head = LaneLinear(weight, None, self._head_input)
        if widen:
            self._head.widen(walk.dtype)

    @torch.no_grad()
    def decode(self, answers: Sequence[Answer]) -> list[list[int]]:
        """What each answer, none of which has ended, goes on with to its end.

        Prefixes of unlike lengths are padded on the left, where nothing looks; an answer that ends leaves the batch.
        """
        from transformers import DynamicCache

        found: list[list[int]] = [[] for _ in answers]
        tokens, mask = _pad([answer.prefix for answer in answers], self._lane.walk.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache(config=self._lane.config)
        live = list(range(len(answers)))
        while True:
            top = self._step(tokens, mask, positions, cache)
            for place, token in zip(live, top.tolist(), strict=True):
                found[place].append(token)
            kept = [i for i, place in enumerate(live) if not _ends(answers[place], found[place])]
            if not kept:
                return found
            if len(kept) < len(live):
                chosen = torch.tensor(kept, device=mask.device)
                cache.batch_select_indices(chosen)
                live, top, mask, positions = [live[i] for i in kept], top[chosen], mask[chosen], positions[chosen]
            tokens, positions = top[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

    def _step(self, tokens: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The greedy token after each row of `tokens` `[rows, n]`, int64 `[rows]`."""
        walk = self._lane.walk
        name = f"{self._lane.layout.architecture.embedding}.weight"
        states = walk.source.gather_rows(name, tokens.flatten().cpu()).to(walk.device, walk.dtype)
        output = self._decoder(
            inputs_embeds=states.view(*tokens.shape, -1),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = self._head(output.last_hidden_state[:, -1])
        self._head_input.forget()
        return logits.argmax(dim=1)


def _pad(prefixes: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids `[rows, longest]`, padded on the left, and 1 where there is a token; both int64."""
    longest = max(map(len, prefixes))
    tokens = torch.zeros(len(prefixes), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prefix in enumerate(prefixes):
        tokens[row, longest - len(prefix) :] = torch.tensor(prefix)
        mask[row, longest - len(prefix) :] = 1
    return tokens.to(device), mask.to(device)


def _ends(answer: Answer, more: Sequence[int]) -> bool:
    return answer.question.rule.ends([*answer.tokens, *more])


def choose_rows(lane: ScoringLane, answers: Sequence[Answer]) -> int:
    """How many answers are decoded at once: as many as half of the memory that is free holds, 16 at most."""
    prefix = lane.layout.architecture.layer_prefix(0)
    keys = f"{prefix}{lane.layout.architecture.attention}.k_proj.weight"
    shapes = [lane.layout.shapes[f"{prefix}{name}.weight"] for name in lane.layout.architecture.linears]
    values = 2 * lane.layout.num_layers * lane.layout.shapes[keys][0]
    values += 6 * lane.walk.skeleton.hidden_size + 4 * max(rows for rows, _ in shapes)
    length = max(len(answer.prefix) + answer.left for answer in answers)
    row_bytes = length * values * lane.walk.dtype.itemsize + _MASK_BYTES * length**2
    free = free_memory(lane.walk.device)
    return min(_MOST_ROWS, max(1, int(_SHARE_OF_MEMORY * free) // row_bytes))


def batches(answers: Sequence[Answer], rows: int) -> Iterator[list[int]]:
    """The numbers of answers to decode together: of nearly the same length, the longest first."""
    order = sorted(range(len(answers)), key=lambda number: -len(answers[number].question.prompt))
    for first in range(0, len(order), rows):
        yield order[first : first + rows]


def draft_with(model: Callable[[], ResidentModel], rows: int) -> Draft:
    """Drafts every answer to its end with a model, which is loaded when it is first needed."""

    def draft(answers: Sequence[Answer]) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in answers]
        for done, chosen in enumerate(batches(answers, rows)):
            for number, tokens in zip(chosen, model().decode([answers[i] for i in chosen]), strict=True):
                found[number] = tokens
            say_drafted("Drafting", min((done + 1) * rows, len(answers)), len(answers))
        return found

    return draft


def say_drafted(what: str, done: int, count: int) -> None:
    """A line for people."""
    print(f"{what}: {done:,} of {count:,} answers", file=sys.stderr, flush=True)


def draft_following(others: Mapping[int, Answer], otherwise: Draft) -> Draft:
    """Goes on as another model's answer to the same question does, as long as both began alike; else `otherwise`.

    `others` has that model's answers by `id` of ours.
    """

    def draft(answers: Sequence[Answer]) -> list[list[int]]:
        found = [_rest(others[id(answer)].tokens, answer.tokens) for answer in answers]
        left = [number for number, rest in enumerate(found) if not rest]
        if left:
            for number, rest in zip(left, otherwise([answers[i] for i in left]), strict=True):
                found[number] = rest
        return found

    return draft


def _rest(whole: Sequence[int], beginning: Sequence[int]) -> list[int]:
    same = list(whole[: len(beginning)]) == list(beginning)
    return list(whole[len(beginning) :]) if same else []


def draft_by_look_up(others: Mapping[int, Answer]) -> Draft:
    """Goes on as the text did when it last ended like this: first in another model's answer, then in our own text.

    Costs nothing, and guesses well where an answer takes up its question.
    """

    def draft(answers: Sequence[Answer]) -> list[list[int]]:
        return [_look_up(answer, others.get(id(answer))) for answer in answers]

    return draft


def _look_up(answer: Answer, other: Answer | None) -> list[int]:
    prefix = np.array(answer.prefix)
    texts = [prefix[:-1]] if other is None else [np.array(other.tokens), prefix[:-1]]
    for size in range(min(_LONGEST_ENDING, len(prefix) - 1), 0, -1):
        for text in texts:
            if len(text) <= size:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            (found,) = np.nonzero((windows == prefix[-size:]).all(axis=1))
            if len(found):
                after = int(found[-1]) + size
                return [int(token) for token in text[after : after + _LOOKED_UP]]
    return []
