"""How far the two lanes' next-token distributions are apart, without ever holding the head or a row of logits.

The head is read a block of vocabulary rows at a time, and per token a handful of running sums is kept, rescaled
when a larger logit comes along (online softmax). With logits z of the bf16 lane (P) and y of the nvfp4 lane (Q):

    KL(P‖Q) = Σ_v P_v (z_v − y_v) − lse(z) + lse(y)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fourge.walk.statistics import Estimate, clustered_mean

_ROWS = 512


class _OnlineSoftmax:
    """Running log-sum-exp, argmax and target logit of rows of logits that come in blocks of vocabulary."""

    def __init__(self, targets: Tensor) -> None:
        self.largest = torch.full(targets.shape, -torch.inf, device=targets.device)
        self.sum = torch.zeros_like(self.largest, dtype=torch.float64)
        self.top = torch.zeros_like(targets)
        self.target_logit = torch.zeros_like(self.largest)
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
        target = self._targets[rows] - first
        inside = (target >= 0) & (target < logits.shape[1])
        logit = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.target_logit[rows] = torch.where(inside, logit, self.target_logit[rows])
        return weights, rescale

    @property
    def log_sum_exp(self) -> Tensor:
        return self.largest + torch.log(self.sum)


@dataclass(frozen=True)
class HeadMeasures:
    """Per predicted token, FP64 arrays `[n]`: KL in nats, whether the top tokens agree, both lanes' −log p."""

    kl_div: np.ndarray
    top1_agrees: np.ndarray
    nll_bf16: np.ndarray
    nll_nvfp4: np.ndarray


def compare_heads(
    states: Callable[[slice], tuple[Tensor, Tensor]], targets: Tensor, head: Iterable[Tensor]
) -> HeadMeasures:
    """Compares both lanes on next tokens `targets` `[rows]`, int64, −1 where a row predicts nothing.

    `states(rows)` gives both lanes' final hidden states `[n, hidden]` after the norm for a slice of at most 512
    rows; it is called once per slice and block of the head. `head` yields the head's weight in blocks of
    consecutive vocabulary rows, `[block, hidden]`, from row 0 on. Both are in the dtype of the computation;
    logits are widened to FP32 before any exponential, and sums over the vocabulary are kept in FP64.
    """
    p, q = _OnlineSoftmax(targets), _OnlineSoftmax(targets)
    cross = torch.zeros_like(p.sum)
    first = 0
    for block in head:
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, min(start + _ROWS, len(targets)))
            bf16, nvfp4 = states(rows)
            z, y = (bf16 @ block.T).float(), (nvfp4 @ block.T).float()
            weights, rescale = p.add(z, first, rows)
            cross[rows] = cross[rows] * rescale + (weights * (z - y)).sum(dim=1)
            q.add(y, first, rows)
        first += len(block)
    kl_div = cross / p.sum - p.log_sum_exp + q.log_sum_exp
    predicts = targets >= 0
    return HeadMeasures(
        kl_div=_array(kl_div[predicts]),
        top1_agrees=_array((p.top == q.top)[predicts]),
        nll_bf16=_array((p.log_sum_exp - p.target_logit)[predicts]),
        nll_nvfp4=_array((q.log_sum_exp - q.target_logit)[predicts]),
    )


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


@dataclass(frozen=True)
class Fidelity:
    """What held-out tokens say of the quantized model. Perplexities' errors by the delta method from −log p's."""

    kl_div: Estimate
    top1_agreement: Estimate
    perplexity_bf16: Estimate
    perplexity_nvfp4: Estimate
    nll_difference: Estimate


def summarise(measures: HeadMeasures, sequences: np.ndarray) -> Fidelity:
    """Means and standard errors over predicted tokens; `sequences` `[n]` numbers the sequence of each."""
    return Fidelity(
        kl_div=clustered_mean(measures.kl_div, sequences),
        top1_agreement=clustered_mean(measures.top1_agrees, sequences),
        perplexity_bf16=_perplexity(clustered_mean(measures.nll_bf16, sequences)),
        perplexity_nvfp4=_perplexity(clustered_mean(measures.nll_nvfp4, sequences)),
        nll_difference=clustered_mean(measures.nll_nvfp4 - measures.nll_bf16, sequences),
    )


def _perplexity(nll: Estimate) -> Estimate:
    mean = float(np.exp(nll.mean))
    error = None if nll.standard_error is None else mean * nll.standard_error
    return Estimate(mean, error, nll.tokens)
