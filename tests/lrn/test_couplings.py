from itertools import permutations

import numpy as np
import pytest
import torch

from reflow_lab.data.augment import Augmentation
from reflow_lab.data.sets import ImageSet, PointSet
from reflow_lab.data.toys import TwoMoons
from reflow_lab.errors import UserError
from reflow_lab.lrn.couplings import (
    HELD_OUT,
    KINDS,
    Batch,
    Draws,
    IndependentPairs,
    MinibatchOTPairs,
    Mixed,
    Mixture,
    Prefetched,
    assignment,
    shares,
)

SEED = 4


class Numbered:
    """Pairs that say who they are: x0 = (kind, index)."""

    def __init__(self, kind, size, labelled=True):
        self.kind, self.size, self.labelled = kind, size, labelled

    def __len__(self):
        return self.size

    def read(self, indices, position):
        where = torch.from_numpy(indices)
        x0 = torch.stack((torch.full_like(where, self.kind), where), dim=1).float()
        return Batch(x0, -x0, where if self.labelled else None)


SOURCES = {"independent": Numbered(0, 50), "backward": Numbered(1, 40), "forward": Numbered(2, 30)}


@pytest.mark.parametrize(
    ("weights", "batch", "expected"),
    [
        ({"a": 1}, 7, {"a": 7}),
        ({"a": 0.5, "b": 0.5}, 7, {"a": 4, "b": 3}),
        ({"a": 1, "b": 1, "c": 1}, 10, {"a": 4, "b": 3, "c": 3}),
        ({"a": 47, "b": 16, "c": 15.8, "d": 12, "e": 6.1, "f": 3.1}, 10, {"a": 5, "b": 2, "c": 1, "d": 1, "e": 1}),
        ({"a": 0.999, "b": 0.001}, 8, {"a": 8}),
        ({"a": 3, "b": 1}, 8, {"a": 6, "b": 2}),
    ],
)
def test_shares_by_largest_remainder(weights, batch, expected):
    assert shares(weights, batch) == expected


def test_shares_add_up_and_stay_within_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = dict(zip("abc", rng.random(3) * rng.integers(1, 10, 3), strict=True))
        batch = int(rng.integers(1, 600))
        counts = shares(weights, batch)
        assert sum(counts.values()) == batch
        total = sum(weights.values())
        assert all(abs(counts.get(k, 0) - batch * w / total) < 1 for k, w in weights.items())


def opened(batch=12, heldout=6, **weights):
    return Mixture(**weights).open(SOURCES, batch, SEED, heldout)


def kinds(batch):
    return torch.bincount(batch.x0[:, 0].long(), minlength=3).tolist()


def test_a_mixture_holds_its_shares_in_every_batch():
    train, heldout = opened(independent=1, backward=2, forward=3)
    assert all(kinds(train.batch(step)) == [2, 4, 6] for step in range(20))
    assert kinds(heldout.batch(0)) == [1, 2, 3]


def test_the_parts_of_a_pair_stay_together():
    batch = opened(backward=1, forward=1)[0].batch(3)
    assert torch.equal(batch.x1, -batch.x0) and torch.equal(batch.label, batch.x0[:, 1].long())


def test_a_batch_is_a_function_of_the_step():
    train, again = (opened(independent=1, backward=1)[0] for _ in range(2))
    forwards = [train.batch(step).x0 for step in range(8)]
    for step in reversed(range(8)):
        assert torch.equal(again.batch(step).x0, forwards[step])
    assert not torch.equal(forwards[0], forwards[1])
    other = Mixture(independent=1, backward=1).open(SOURCES, 12, SEED + 1, 6)[0]
    assert not torch.equal(other.batch(0).x0, forwards[0])


def test_held_out_rows_are_never_trained_on_and_all_others_are():
    train, heldout = opened(batch=9, heldout=7, backward=2, forward=1)
    rows = {tuple(row) for step in range(40) for row in train.batch(step).x0.tolist()}
    kept = {tuple(row) for row in heldout.batch(0).x0.tolist()}
    assert not rows & kept and len(kept) == 7
    everything = {(1.0, float(i)) for i in range(40)} | {(2.0, float(i)) for i in range(30)}
    assert rows | kept == everything


def test_every_epoch_visits_every_pair_once():
    train = opened(batch=5, heldout=5, backward=1)[0]
    drawn = torch.cat([train.batch(step).x0[:, 1] for step in range(7)])
    assert sorted(drawn.tolist()) == list(range(35))


def test_a_batch_larger_than_the_data_is_refused():
    assert opened(batch=36, heldout=4, backward=1)[0].batch(0).x0.shape == (36, 2)
    with pytest.raises(UserError, match=r"training\.batch_size=37: takes 37 backward samples a batch, but only 36"):
        opened(batch=37, heldout=4, backward=1)
    with pytest.raises(UserError, match=r"training\.batch_size=90: takes 45 forward"):
        opened(batch=90, heldout=4, independent=1, forward=1)


def test_a_kind_that_would_never_be_drawn_is_refused():
    with pytest.raises(UserError, match=r"^lrn\.coupling\.forward=0\.01: .*no forward sample in a batch of 12"):
        opened(backward=1, forward=0.01)


def test_a_batch_of_one_part_is_that_parts_own():
    class One:
        def batch(self, step):
            return given

    given = SOURCES["backward"].read(np.arange(3), 0)
    assert Mixed((One(),)).batch(0) is given


def test_fresh_pairs_are_taken_one_after_the_other():
    """A kind without end is never permuted; held-out ones begin where training never comes."""

    class Endless(Numbered):
        def read(self, indices, position):
            read.append((indices.tolist(), position))
            return super().read(indices, position)

    read = []
    train, heldout = Mixture(online=3, backward=1).open(
        SOURCES | {"online": Endless(5, HELD_OUT, labelled=False)}, batch_size=8, seed=SEED, num_heldout=4
    )
    for coupling, step in ((train, 0), (train, 7), (heldout, 0)):
        coupling.batch(step)
    assert read == [([*range(6)], 0), ([*range(42, 48)], 42), ([*range(HELD_OUT, HELD_OUT + 3)], HELD_OUT)]


def test_labels_are_dropped_where_a_part_has_none():
    sources = SOURCES | {"forward": Numbered(2, 30, labelled=False)}
    assert Mixture(backward=1, forward=1).open(sources, 8, SEED, 4)[0].batch(0).label is None


@pytest.mark.parametrize("weights", [{}, {"backward": -1, "forward": 2}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UserError, match=r"^lrn\.coupling=.*positive|^lrn\.coupling\.backward=-1: a weight must be at least 0"):
        Mixture(**weights)


def test_which_kinds_leave_the_pair_open():
    assert Mixture(**dict.fromkeys(KINDS, 1)).stochastic == ["independent", "minibatch_ot"]
    assert Mixture(backward=1, forward=1, projected=1, online=1).stochastic == []


def points(n=30):
    return PointSet(torch.arange(2.0 * n).reshape(n, 2), torch.arange(n), "points", "points")


def test_an_image_gets_fresh_noise_each_time_and_keeps_its_label():
    coupling = Draws(IndependentPairs(points(), SEED), "independent", 30, SEED, 0, 30)
    first, second = coupling.batch(0), coupling.batch(1)
    order = [batch.label.argsort() for batch in (first, second)]
    assert torch.equal(first.x0[order[0]], second.x0[order[1]])
    assert not (first.x1[order[0]] == second.x1[order[1]]).any()
    assert torch.equal(first.x0, points().take(first.label)[0])


def test_held_out_images_have_noise_of_their_own():
    sources = {"independent": IndependentPairs(points(), SEED)}
    train, heldout = Mixture(independent=1).open(sources, 6, SEED, 6)
    assert not torch.isin(heldout.batch(0).x1, torch.cat([train.batch(step).x1 for step in range(4)])).any()
    assert torch.equal(heldout.batch(0).x1, heldout.batch(0).x1)


def test_independent_noise_is_standard_and_independent_of_the_image():
    pairs = IndependentPairs(points(), SEED)
    x0, x1, _, _ = pairs.read(np.arange(20_000) % 30, 0)
    assert x1.mean().item() == pytest.approx(0, abs=0.02) and x1.std().item() == pytest.approx(1, abs=0.02)
    assert abs(torch.corrcoef(torch.stack((x0[:, 0], x1[:, 0])))[0, 1]) < 0.03


def test_cutting_a_batch_in_two_changes_nothing():
    pairs, indices = IndependentPairs(points(), SEED), np.arange(12)
    whole = pairs.read(indices, 100)
    halves = [pairs.read(indices[:5], 100), pairs.read(indices[5:], 105)]
    assert torch.equal(torch.cat([half.x1 for half in halves]), whole.x1)


def cost(x0, x1):
    return (x0 - x1).double().square().sum().item()


@pytest.mark.parametrize("n", range(1, 7))
def test_the_assignment_is_the_best_of_all_permutations(n):
    for seed in range(5):
        x0, x1 = torch.randn(2, n, 2, 3, generator=torch.Generator().manual_seed(seed)) + 3
        best = min(cost(x0, x1[list(order)]) for order in permutations(range(n)))
        found = assignment(x0, x1)
        assert sorted(found.tolist()) == list(range(n)) and cost(x0, x1[found]) == pytest.approx(best, rel=1e-6)


def test_in_one_dimension_the_assignment_sorts():
    x0, x1 = torch.randn(2, 500, 1)
    assert torch.equal(x1[assignment(x0, x1)].argsort(0), x0.argsort(0))


def test_the_assignment_costs_what_torchcfms_does():
    """Its plan is sampled with replacement, ours is the plan itself: the cost of one pair is compared."""
    sampler = pytest.importorskip("torchcfm.optimal_transport").OTPlanSampler(method="exact")
    x0, x1 = torch.randn(2, 128, 3, 8, 8)
    plan = torch.from_numpy(sampler.get_map(x0, x1))
    theirs = (plan * torch.cdist(x0.flatten(1), x1.flatten(1)).square()).sum().item()
    assert cost(x0, x1[assignment(x0, x1)]) / 128 == pytest.approx(theirs, rel=1e-5)


def test_minibatch_ot_gives_each_image_noise_and_keeps_its_label():
    """The same noise as without the assignment, in another order; fresh at each visit."""
    pairs, plain = MinibatchOTPairs(points(), SEED), IndependentPairs(points(), SEED)
    rows = np.random.default_rng(0).permutation(30)
    batch, again = pairs.read(rows, 60), pairs.read(rows, 60)
    assert torch.equal(batch.label, torch.from_numpy(rows)) and torch.equal(batch.x0, points().take(rows)[0])
    assert torch.equal(batch.x1, again.x1) and not torch.isin(batch.x1, pairs.read(rows, 90).x1).any()
    assert not torch.isin(batch.x1, plain.read(rows, 60).x1).any()  # side by side in a mixture, they draw apart
    reordered = batch.x1[assignment(batch.x0, batch.x1)]
    assert torch.equal(reordered, batch.x1)


def test_minibatch_ot_shortens_the_way_and_keeps_the_noise_normal():
    images = PointSet(0.5 * torch.randn(5000, 2), None, "points", "points")
    train, _ = Mixture(minibatch_ot=1).open({"minibatch_ot": MinibatchOTPairs(images, SEED)}, 100, SEED, 10)
    x0, x1 = (torch.cat(values) for values in zip(*(train.batch(step)[:2] for step in range(40)), strict=True))
    assert x1.mean().item() == pytest.approx(0, abs=0.03) and x1.std().item() == pytest.approx(1, abs=0.02)
    assert cost(x0, x1) / len(x0) < 0.5 * (2 * 0.25 + 2)  # independent: the sum of the variances; W2^2 of the laws is 0.5
    assert cost(x0, x1) / len(x0) > 0.5


def test_batches_drawn_ahead_are_the_same_in_and_out_of_order():
    plain = opened(independent=1, backward=1)[0]
    ahead = Prefetched(opened(independent=1, backward=1)[0])
    for step in (0, 1, 2, 5, 4, 4, 5, 0):
        assert torch.equal(ahead.batch(step).x0, plain.batch(step).x0)


def test_the_next_batch_is_drawn_ahead_and_its_error_waits_for_its_step():
    class Breaks:
        def __init__(self):
            self.drawn = []

        def batch(self, step):
            self.drawn.append(step)
            if step == 2:
                raise UserError("a broken shard")
            return SOURCES["backward"].read(np.arange(3) + step, 0)

    coupling = Breaks()
    ahead = Prefetched(coupling)
    assert ahead.batch(0).x0[0, 1] == 0
    assert ahead.batch(1).x0[0, 1] == 1
    with pytest.raises(UserError, match="a broken shard"):
        ahead.batch(2)
    assert coupling.drawn[:3] == [0, 1, 2]


@pytest.mark.gpu
def test_a_batch_lies_on_one_device():
    images = points().to("cuda")
    batch = IndependentPairs(images, SEED).read(np.arange(5), 0)
    assert all(tensor.device.type == "cuda" for tensor in batch[:3])
    assert torch.equal(batch.x1.cpu(), IndependentPairs(points(), SEED).read(np.arange(5), 0).x1)


def test_minibatch_ot_of_a_conditional_flow_stays_within_the_classes():
    """Across classes each moon would get the noise that lies on its side, while sampling draws the same noise for both."""
    moons = TwoMoons(num_points=2000).split("train")
    means = {}
    for by_class in (False, True):
        pairs = MinibatchOTPairs(moons, SEED, by_class=by_class)
        drawn = [pairs.read(np.arange(128) + 128 * i, 128 * i) for i in range(15)]
        x1, label = torch.cat([b.x1 for b in drawn]), torch.cat([b.label for b in drawn])
        means[by_class] = x1[label == 0].mean(0).abs().max().item()
        plain = torch.cat([IndependentPairs(moons, SEED).read(np.arange(128) + 128 * i, 128 * i).x0 for i in range(15)])
        assert torch.equal(torch.cat([b.x0 for b in drawn]), plain)
    assert means[True] < 0.12 < 0.3 < means[False]


def pictures(n=40):
    pixels = torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(n), "pictures")


BOTH = Augmentation(flips=True, probability=0.5)


@pytest.mark.parametrize("kind", [IndependentPairs, MinibatchOTPairs])
def test_augmentation_is_keyed_by_position_and_leaves_noise_and_labels(kind):
    """In two batches it does what it does in one."""
    plain, pairs, rows = kind(pictures(), SEED), kind(pictures(), SEED, BOTH), np.arange(20)
    given, batch = plain.read(rows, 100), pairs.read(rows, 100)
    assert given.augment is None and batch.augment.shape == (20, 9)
    assert torch.equal(given.label, batch.label)
    assert torch.equal(given.x1.flatten(1).sum(1).sort()[0], batch.x1.flatten(1).sum(1).sort()[0])
    halves = [pairs.read(rows[:7], 100), pairs.read(rows[7:], 107)]
    torch.testing.assert_close(torch.cat([half.x0 for half in halves]), batch.x0, rtol=0, atol=1e-5)
    assert torch.equal(torch.cat([half.augment for half in halves]), batch.augment)
    assert not torch.equal(pairs.read(rows, 120).augment, batch.augment)


def test_minibatch_ot_assigns_the_noise_to_the_images_as_they_are_seen():
    batch = MinibatchOTPairs(pictures(), SEED, BOTH).read(np.arange(20), 0)
    assert torch.equal(batch.x1[assignment(batch.x0, batch.x1)], batch.x1)


def test_held_out_images_stay_as_they_are():
    sources = {"independent": IndependentPairs(pictures(), SEED, BOTH)}
    train, heldout = Mixture(independent=1).open(sources, 10, SEED, 10)
    batch = heldout.batch(0)
    assert batch.augment is None and torch.equal(batch.x0, pictures().take(batch.label)[0])
    assert not torch.equal(train.batch(0).x0, pictures().take(train.batch(0).label)[0])


def test_what_is_not_augmented_has_zero_labels_beside_what_is():
    """A mixture gives them to all or to none."""
    stored = IndependentPairs(pictures(), SEED)
    sources = {"independent": IndependentPairs(pictures(), SEED, BOTH), "backward": stored}
    batch = Mixture(independent=1, backward=1).open(sources, 16, SEED, 8)[0].batch(0)
    assert batch.augment.shape == (16, 9) and batch.augment[:8].any() and not batch.augment[8:].any()
    none = Mixture(independent=1, backward=1).open(sources | {"independent": stored}, 16, SEED, 8)[0].batch(0)
    assert none.augment is None
    assert torch.equal(batch.to(torch.device("cpu")).augment, batch.augment)
