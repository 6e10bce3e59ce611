"""The streamed head against a textbook softmax in FP64."""

import numpy as np
import pytest
import torch

from fourge.walk.head import compare_heads, count_by_magnitude, summarise
from fourge.walk.statistics import clustered_mean


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_streamed_measures_are_the_textbook_ones(block: int) -> None:
    torch.manual_seed(0)
    rows, hidden, vocabulary = 1030, 24, 211
    bf16 = torch.randn(rows, hidden) * 2
    nvfp4 = bf16 + 0.3 * torch.randn(rows, hidden)
    head = torch.randn(vocabulary, hidden)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[::10] = -1
    measures = compare_heads(lambda r: (bf16[r], nvfp4[r]), targets, head.split(block))

    keep = targets >= 0
    p = (bf16 @ head.T).double().log_softmax(1)[keep]
    q = (nvfp4 @ head.T).double().log_softmax(1)[keep]
    expected = (p.exp() * (p - q)).sum(1).numpy()
    index = targets[keep][:, None]
    np.testing.assert_allclose(measures.kl_div, expected, atol=2e-5)
    np.testing.assert_allclose(measures.nll_bf16, -p.gather(1, index)[:, 0].numpy(), atol=2e-5)
    np.testing.assert_allclose(measures.nll_nvfp4, -q.gather(1, index)[:, 0].numpy(), atol=2e-5)
    np.testing.assert_array_equal(measures.top1_agrees, (p.argmax(1) == q.argmax(1)).double().numpy())


def test_equal_lanes_have_no_divergence_at_all() -> None:
    torch.manual_seed(1)
    states, head = torch.randn(50, 8), torch.randn(90, 8)
    measures = compare_heads(lambda r: (states[r], states[r]), torch.arange(50), head.split(32))
    assert np.all(measures.kl_div == 0)
    assert np.all(measures.top1_agrees == 1)
    assert np.array_equal(measures.nll_bf16, measures.nll_nvfp4)


def test_perplexity_is_the_exponential_of_the_mean() -> None:
    torch.manual_seed(2)
    states, head = torch.randn(40, 8), torch.randn(30, 8)
    targets = torch.arange(40) % 30
    measures = compare_heads(lambda r: (states[r], states[r]), targets, [head])
    fidelity = summarise(measures, np.repeat(np.arange(4), 10))
    expected = float(torch.nn.functional.cross_entropy(states @ head.T, targets).exp())
    assert fidelity.perplexity_bf16.mean == pytest.approx(expected, rel=1e-5)
    assert fidelity.nll_difference.mean == 0


def test_clustered_error_covers_what_repeated_sampling_shows() -> None:
    """Over many draws of clustered data the reported error is the true spread; the naive one is far too small."""
    rng = np.random.default_rng(4)
    means, clustered, naive = [], [], []
    for _ in range(400):
        sizes = rng.integers(5, 30, 40)
        clusters = np.repeat(np.arange(40), sizes)
        values = rng.normal(0, 1, 40)[clusters] + rng.normal(0, 1, len(clusters))
        estimate = clustered_mean(values, clusters)
        assert estimate.standard_error is not None
        means.append(estimate.mean)
        clustered.append(estimate.standard_error)
        naive.append(values.std(ddof=1) / np.sqrt(len(values)))
    spread = np.std(means)
    assert np.mean(clustered) == pytest.approx(spread, rel=0.12)
    assert np.mean(naive) < 0.6 * spread


def test_one_sequence_has_no_standard_error() -> None:
    assert clustered_mean(np.ones(5), np.zeros(5)).standard_error is None


def test_kl_is_counted_by_its_power_of_two() -> None:
    values = np.array([-1e-9, 0.0, 2.0**-21, 2.0**-20, 0.3, 0.25, 0.49999, 0.5, 1.0, 15.9, 16.0, 1e9])
    counted = count_by_magnitude(values)
    edges = [-np.inf, *(2.0**exponent for exponent in range(counted.lowest_exponent, 5)), np.inf]
    assert counted.lowest_exponent == -20
    assert counted.counts == np.histogram(values, edges)[0].tolist()
