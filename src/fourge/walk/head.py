"""What the lanes' next-token distributions say, without ever holding the head or a row of logits.

The head is read a block of vocabulary rows at a time, and per row of hidden states a handful of running sums is
kept, rescaled when a larger logit comes along (online softmax). With logits z of the first lane (P) and y of the
second (Q):

    KL(P‖Q) = Σ_v P_v (z_v − y_v) − lse(z) + lse(y)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fourge.walk.statistics import Estimate, clustered_mean

ROWS = 512
"""Of hidden states worked on at once: from a multiple of it, so that the same products are computed by any split."""

_KL_EXPONENTS = (-20, 4)
"""Of the smallest and the largest KL told apart: a millionth of a nat, which is FP32's noise, and 16 nats."""


@dataclass(frozen=True)
class Targets:
    """Which next tokens are scored in which rows: int64 `[pairs]` each, `rows` ascending, one row as often as
    it has tokens to score."""

    rows: Tensor
    tokens: Tensor


class _OnlineSoftmax:
    """Running log-sum-exp, argmax and target logits of rows of logits that come in blocks of vocabulary."""

    def __init__(self, num_rows: int, targets: Targets) -> None:
        device = targets.rows.device
        self.largest = torch.full((num_rows,), -torch.inf, device=device)
        self.sum = torch.zeros_like(self.largest, dtype=torch.float64)
        self.top = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.target_logit = torch.full(targets.rows.shape, -torch.inf, device=device)
        self._targets = targets

    def add(self, logits: Tensor, first: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Takes logits `[n, block]` of vocabulary from `first` on; returns (exp(z − max), rescale of old sums)."""
        block_largest, block_top = logits.max(dim=1)
        old = self.largest[rows]
        largest = torch.maximum(old, block_largest)
        self.top[rows] = torch.where(block_largest > old, block_top + first, self.top[rows])
        rescale = torch.exp(old - largest)
        weights = torch.exp(logits - largest[:, None])
        self.sum[rows] = self.sum[rows] * rescale + weights.sum(dim=1)
        self.largest[rows] = largest
        self._take_targets(logits, first, rows)
        return weights, rescale

    def _take_targets(self, logits: Tensor, first: int, rows: slice) -> None:
        bounds = torch.tensor([rows.start, rows.stop], device=self._targets.rows.device)
        pairs = slice(*torch.searchsorted(self._targets.rows, bounds).tolist())
        target = self._targets.tokens[pairs] - first
        inside = (target >= 0) & (target < logits.shape[1])
        logit = logits[self._targets.rows[pairs] - rows.start, target.clamp(0, logits.shape[1] - 1)]
        self.target_logit[pairs] = torch.where(inside, logit, self.target_logit[pairs])

    @property
    def log_sum_exp(self) -> Tensor:
        return self.largest + torch.log(self.sum)

    def scores(self) -> "LaneScores":
        rows, tokens = self._targets.rows, self._targets.tokens
        log_prob = self.target_logit - self.log_sum_exp[rows]
        top = self.top[rows]
        return LaneScores(_array(log_prob), (top == tokens).cpu().numpy(), top.int().cpu().numpy())


@dataclass(frozen=True)
class LaneScores:
    """One lane's answer a pair: log p of the token, FP64 `[pairs]`, whether it is the argmax, bool `[pairs]`, and the
    argmax itself, `top` int32 `[pairs]`.

    Of equal largest logits the one with the lowest index is the argmax, as in torch.
    """

    log_prob: np.ndarray
    greedy: np.ndarray
    top: np.ndarray


@dataclass(frozen=True)
class Divergence:
    """How far two lanes are apart a row, FP64 `[rows]`: KL in nats, and whether the top tokens agree."""

    kl_div: np.ndarray
    top1_agrees: np.ndarray


def score_heads(
    states: Callable[[slice], tuple[Tensor, ...]],
    num_rows: int,
    targets: Targets,
    heads: Iterable[tuple[Tensor, ...]],
) -> tuple[tuple[LaneScores, ...], Divergence | None]:
    """Scores `targets` in every lane, and with two lanes compares their distributions in every row.

    `states(rows)` gives each lane's final hidden states `[n, hidden]` after the norm for a slice of at most 512
    rows; it is called once per slice and block of the head. `heads` yields each lane's head weight in blocks of
    consecutive vocabulary rows, `[block, hidden]`, from row 0 on. All are in the dtype of the computation; logits
    are widened to FP32 before any exponential, and sums over the vocabulary are kept in FP64.
    """
    lanes: tuple[_OnlineSoftmax, ...] = ()
    cross = torch.zeros(num_rows, dtype=torch.float64, device=targets.rows.device)
    first = 0
    for blocks in heads:
        lanes = lanes or tuple(_OnlineSoftmax(num_rows, targets) for _ in blocks)
        for start in range(0, num_rows, ROWS):
            rows = slice(start, min(start + ROWS, num_rows))
            logits = [(h @ block.T).float() for h, block in zip(states(rows), blocks, strict=True)]
            weights, rescale = lanes[0].add(logits[0], first, rows)
            if len(lanes) == 2:
                cross[rows] = cross[rows] * rescale + (weights * (logits[0] - logits[1])).sum(dim=1)
                lanes[1].add(logits[1], first, rows)
        first += len(blocks[0])
    divergence = None
    if len(lanes) == 2:
        p, q = lanes
        kl_div = cross / p.sum - p.log_sum_exp + q.log_sum_exp
        divergence = Divergence(_array(kl_div), _array(p.top == q.top))
    return tuple(lane.scores() for lane in lanes), divergence


@dataclass(frozen=True)
class HeadMeasures:
    """Per predicted token, FP64 arrays `[n]`: KL in nats, whether the top tokens agree, both lanes' −log p."""

    kl_div: np.ndarray
    top1_agrees: np.ndarray
    nll_bf16: np.ndarray
    nll_nvfp4: np.ndarray

    def to_tensors(self) -> tuple[Tensor, ...]:
        """The four as tensors, in order."""
        return tuple(torch.from_numpy(values) for values in vars(self).values())

    @classmethod
    def joined(cls, parts: Sequence[Sequence[Tensor]]) -> Self:
        """Those of consecutive tokens, each as `to_tensors` gave them."""
        return cls(*(torch.cat(values).numpy() for values in zip(*parts, strict=True)))


def compare_heads(
    states: Callable[[slice], tuple[Tensor, Tensor]], targets: Tensor, head: Iterable[Tensor]
) -> HeadMeasures:
    """Compares both lanes on next tokens `targets` `[rows]`, int64, −1 where a row predicts nothing.

    `states` and `head` as in `score_heads`; both lanes have the one head.
    """
    (rows,) = torch.nonzero(targets >= 0, as_tuple=True)
    heads = ((block, block) for block in head)
    lanes, divergence = score_heads(states, len(targets), Targets(rows, targets[rows]), heads)
    assert divergence is not None
    predicts = rows.cpu().numpy()
    return HeadMeasures(
        kl_div=divergence.kl_div[predicts],
        top1_agrees=divergence.top1_agrees[predicts],
        nll_bf16=-lanes[0].log_prob,
        nll_nvfp4=-lanes[1].log_prob,
    )


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


@dataclass(frozen=True)
class KlHistogram:
    """Tokens by their KL in nats, in bins that double: below `2**lowest_exponent`, from there to its double, and so
    on; the last bin has no end."""

    lowest_exponent: int
    counts: list[int]


@dataclass(frozen=True)
class Fidelity:
    """What held-out tokens say of the quantized model. Perplexities' errors by the delta method from −log p's."""

    kl_div: Estimate
    top1_agreement: Estimate
    perplexity_bf16: Estimate
    perplexity_nvfp4: Estimate
    nll_difference: Estimate
    kl_histogram: KlHistogram


def summarise(measures: HeadMeasures, sequences: np.ndarray) -> Fidelity:
    """Means and standard errors over predicted tokens; `sequences` `[n]` numbers the sequence of each."""
    return Fidelity(
        kl_div=clustered_mean(measures.kl_div, sequences),
        top1_agreement=clustered_mean(measures.top1_agrees, sequences),
        perplexity_bf16=_perplexity(clustered_mean(measures.nll_bf16, sequences)),
        perplexity_nvfp4=_perplexity(clustered_mean(measures.nll_nvfp4, sequences)),
        nll_difference=clustered_mean(measures.nll_nvfp4 - measures.nll_bf16, sequences),
        kl_histogram=count_by_magnitude(measures.kl_div),
    )


def count_by_magnitude(kl_div: np.ndarray) -> KlHistogram:
    """Counts KLs, FP64 `[n]`, by their binary exponent; rounding can make a KL of next to nothing negative."""
    low, high = _KL_EXPONENTS
    exponents = np.frexp(kl_div)[1] - 1  # frexp's mantissa is in [½, 1)
    bins = np.where(kl_div > 0, np.clip(exponents, low - 1, high) - (low - 1), 0)
    return KlHistogram(low, np.bincount(bins, minlength=high - low + 2).tolist())


def _perplexity(nll: Estimate) -> Estimate:
    mean = float(np.exp(nll.mean))
    error = None if nll.standard_error is None else mean * nll.standard_error
    return Estimate(mean, error, nll.tokens)
