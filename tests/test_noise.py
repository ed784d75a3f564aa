"""Noise keyed by (seed, stream, index): independent of batching, of the right law, and pinned."""

import hashlib
import math

import numpy as np
import pytest
import torch

from reflow_lab import noise
from reflow_lab.noise import batch_indices, bits, normal, permutation, uniform

INDICES = np.arange(100_000)

PINNED_BITS = [[5060240033134708018, 9705456839542942600], [6670413331485392039, 6918226075902535960]]
PINNED_NORMAL = [-0.4794789851, -0.9479747415, 1.437736988]
PINNED_UNIFORM = 0.6754723388163305
PINNED_PERMUTATION = [4, 1, 6, 0, 3, 7, 5, 2]


@pytest.mark.parametrize("words", [1, 4, 5, 11])
def test_bits_are_numpys_philox_at_the_documented_counters(words):
    stream_key = int.from_bytes(hashlib.sha256(b"pairs").digest()[:8], "little")
    blocks = math.ceil(words / 4)
    for index in (0, 1, 12345):
        generator = np.random.Philox(key=np.array([7, stream_key], np.uint64), counter=index * blocks)
        assert bits(7, "pairs", np.array([index]), words)[0].tolist() == generator.random_raw(4 * blocks)[:words].tolist()


def test_values_are_pinned():
    """Whoever changes these numbers makes every stored pair, checkpoint and split worthless."""
    assert bits(0, "pairs", np.array([0, 3]), 2).tolist() == PINNED_BITS
    torch.testing.assert_close(normal(0, "pairs", np.array([5]), (3,))[0], torch.tensor(PINNED_NORMAL), rtol=1e-6, atol=0)
    assert uniform(0, "pairs", np.array([5]))[0, 0].item() == PINNED_UNIFORM
    assert permutation(0, "pairs", 8).tolist() == PINNED_PERMUTATION


def splits():
    rng = np.random.default_rng(0)
    for _ in range(20):
        indices = rng.choice(200, size=60, replace=True)
        yield [part for part in np.split(indices, np.sort(rng.choice(60, size=rng.integers(0, 12)))) if len(part)]


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5, 5)])
def test_any_split_order_and_repetition_gives_the_same_numbers(shape):
    whole = normal(3, "a", np.arange(200), shape)
    for parts in splits():
        for part in parts:
            assert torch.equal(normal(3, "a", part, shape), whole[torch.from_numpy(part)])


def test_uniform_numbers_do_not_depend_on_the_batch():
    whole = uniform(3, "a", np.arange(200), 3)
    for parts in splits():
        assert torch.equal(
            torch.cat([uniform(3, "a", part, 3) for part in parts]), whole[torch.from_numpy(np.concatenate(parts))]
        )


def kolmogorov(values, cdf):
    """sqrt(n) sup |F_n - F|: below 1.95 with probability 0.999."""
    ordered = np.sort(values)
    reached = np.arange(1, len(ordered) + 1) / len(ordered)
    return math.sqrt(len(ordered)) * np.abs(cdf(ordered) - reached + 0.5 / len(ordered)).max()


def test_normal_is_normal():
    z = normal(1, "law", INDICES, (4,)).double()
    assert abs(z.mean().item()) < 0.006 and z.var().item() == pytest.approx(1, abs=0.01)
    assert (z**3).mean().item() == pytest.approx(0, abs=0.02) and (z**4).mean().item() == pytest.approx(3, abs=0.05)
    cdf = torch.special.ndtr
    for column in z.T:
        assert kolmogorov(column.numpy(), lambda v: cdf(torch.from_numpy(v)).numpy()) < 1.95
    torch.testing.assert_close(torch.corrcoef(z.T), torch.eye(4, dtype=torch.float64), rtol=0, atol=0.015)


def test_uniform_is_uniform():
    u = uniform(1, "law", INDICES, 2).numpy()
    assert max(kolmogorov(column, lambda v: v) for column in u.T) < 1.95


def test_uniform_never_reaches_its_ends(monkeypatch):
    for extreme in (0, 2**64 - 1):
        monkeypatch.setattr(noise, "bits", lambda *_, value=extreme: np.array([[value]], np.uint64))
        assert 0 < uniform(0, "a", np.arange(1))[0, 0].item() < 1


def test_normal_is_finite_at_the_extremes(monkeypatch):
    for extreme in (0, 2**64 - 1):
        monkeypatch.setattr(noise, "bits", lambda *_, value=extreme: np.array([[value]], np.uint64))
        assert normal(0, "a", np.arange(1), (2,)).isfinite().all()


@pytest.mark.parametrize(("one", "two"), [((0, "a"), (1, "a")), ((0, "a"), (0, "b")), ((0, "a"), (2**63, "a"))])
def test_seeds_and_streams_are_uncorrelated(one, two):
    a, b = (normal(*key, INDICES, (2,)).double().flatten() for key in (one, two))
    for shift in (0, 1, 2):
        assert abs(torch.corrcoef(torch.stack((a, b.roll(shift))))[0, 1].item()) < 0.01


def test_nothing_asked_nothing_given():
    assert normal(0, "a", np.arange(0), (3,)).shape == (0, 3) and uniform(0, "a", np.arange(0)).shape == (0, 1)


@pytest.mark.parametrize(("batch", "size"), [(5, 20), (7, 20), (20, 20), (30, 20)])
def test_each_epoch_visits_everything_once(batch, size):
    drawn = np.concatenate([batch_indices(0, "b", step, batch, size) for step in range(40)])
    epochs = drawn[: len(drawn) // size * size].reshape(-1, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)


def test_batches_are_a_function_of_the_step_alone():
    forwards = [batch_indices(0, "b", step, 7, 20).tolist() for step in range(10)]
    permutation.cache_clear()
    assert [batch_indices(0, "b", step, 7, 20).tolist() for step in reversed(range(10))] == forwards[::-1]
