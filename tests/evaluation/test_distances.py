import functools
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from reflow_lab.errors import UserError
from reflow_lab.evaluation import metrics
from reflow_lab.evaluation.frechet import Reference
from reflow_lab.evaluation.metrics import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall

DIM, NUM = 12, 240


def drawn(seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(7)) / 3
    return torch.randn(NUM, DIM, generator=generator) @ mixing + shift


MADE, REAL = drawn(1, 0.3), drawn(2)
NUMBERS = np.arange(NUM)


def test_given_the_same_features_the_distance_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (MADE, REAL)), False)["frechet_inception_distance"]
    metric = FrechetDistance(Reference.of(REAL), "inception")
    metric.update(MADE)
    assert float(metric.compute()["fd_inception"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [2, 50, NUM])
def test_given_the_same_subsets_the_kernel_distance_is_torch_fidelitys(size: int) -> None:
    from torch_fidelity.metric_kid import kernel_mmd

    how = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    for number in range(3):
        x, y = MADE[metrics.subset(0, 2 * number, NUM, size)], REAL[metrics.subset(0, 2 * number + 1, NUM, size)]
        assert metrics.kernel_mmd(x, y) == pytest.approx(kernel_mmd(x.double().numpy(), y.double().numpy(), **how), abs=1e-6)
    metric = KernelDistance(REAL, "inception", num_subsets=3, subset_size=size)
    metric.update(MADE, NUMBERS)
    found = metric.compute()
    values = [
        metrics.kernel_mmd(MADE[metrics.subset(0, 2 * i, NUM, size)], REAL[metrics.subset(0, 2 * i + 1, NUM, size)])
        for i in range(3)
    ]
    assert float(found["kid"]) == pytest.approx(np.mean(values)) and float(found["kid_std"]) == pytest.approx(np.std(values))


def test_subsets_are_without_replacement_and_differ() -> None:
    first, second = (metrics.subset(0, number, 100, 30) for number in (0, 1))
    assert len(first.unique()) == 30 and first.max() < 100 and set(first.tolist()) != set(second.tolist())


@pytest.mark.parametrize("batch_size", [7, 4096])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_given_the_same_features_precision_and_recall_are_torch_fidelitys(neighbours: int, batch_size: int) -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    precision, recall = calculate_precision_recall_full(MADE, REAL, neighbours)
    metric = PrecisionRecall(REAL, neighbours, batch_size)
    metric.update(MADE, NUMBERS)
    found = metric.compute()
    assert 0.2 < precision != recall < 1
    assert (float(found["precision"]), float(found["recall"])) == pytest.approx((precision, recall), abs=1e-6)


def test_given_the_same_order_the_inception_score_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * MADE
    for part in metrics.split(logits, 5):
        expected = isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"]
        assert float(metrics.inception_score(part)) == pytest.approx(expected, rel=1e-6)
    metric = InceptionScore(num_splits=5)
    metric.update(logits, NUMBERS)
    found = metric.compute()
    assert found["inception_score"] > 1 and 0 < found["inception_score_std"] < found["inception_score"]


def collection() -> MetricCollection:
    parts = [FrechetDistance(Reference.of(REAL), "lite0"), KernelDistance(REAL, "lite0", 5, 60), PrecisionRecall(REAL)]
    return MetricCollection(parts)


def fed(dealt: list[np.ndarray], batch_size: int) -> dict[str, float]:
    """The values with these samples, in batches."""
    found = collection()
    for numbers in dealt:
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            found.update(features=MADE[batch], indices=batch)
    return {name: float(value) for name, value in found.compute().items()}


@functools.cache
def at_once() -> dict[str, float]:
    return fed([NUMBERS], NUM)


@pytest.mark.parametrize("batch_size", [1, 37, 100])
def test_no_batch_size_changes_a_value(batch_size: int) -> None:
    found = fed([NUMBERS], batch_size)
    assert set(found) == {"fd_lite0", "kd_lite0", "kd_lite0_std", "precision", "recall"}
    assert found == pytest.approx(at_once(), rel=1e-9)


def test_samples_in_another_order_or_seen_twice_change_nothing() -> None:
    shuffled = np.random.default_rng(0).permutation(NUM)
    found, expected = fed([shuffled], 50), at_once()
    assert found == pytest.approx(expected, rel=1e-9)
    metric = PrecisionRecall(REAL)
    metric.update(MADE, NUMBERS)
    metric.update(MADE[:9], NUMBERS[:9])  # as a sampler does that fills up the last batch
    assert float(metric.compute()["precision"]) == expected["precision"]


def process(rank: int, folder: str) -> None:
    """One of two processes, each with samples of its own."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = fed([NUMBERS[rank::2]], 31 + rank)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    spawned = [multiprocessing.get_context("spawn").Process(target=process, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for one in spawned:
        one.start()
    for one in spawned:
        one.join(120)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert found[0] == found[1] == pytest.approx(at_once(), rel=1e-9)


def test_only_inceptions_kernel_distance_is_called_kid_and_no_distance_fid() -> None:
    names = [metrics.kernel_name(network) for network in ("inception", "inception_1234", "lite0")]
    assert names == ["kid", "kd_inception_1234", "kd_lite0"]
    assert FrechetDistance(Reference.of(torch.randn(100, 6)), "inception").name == "fd_inception"


def test_few_samples_are_refused_or_warned_of(capsys) -> None:  # type: ignore[no-untyped-def]
    metric = FrechetDistance(Reference.of(torch.randn(100, 60)), "lite0")
    metric.update(torch.randn(49, 60))
    with pytest.raises(UserError, match="num_images=49: a fd_lite0 needs at least 50"):
        metric.compute()
    metric.update(torch.randn(2, 60))
    metric.compute()
    assert "51 samples for 60 feature dimensions" in capsys.readouterr().err


MISTAKES = {
    "features=": lambda: FrechetDistance(Reference.of(REAL), "a").update(torch.zeros(3, DIM + 1)),
    "features=nan": lambda: PrecisionRecall(REAL).update(torch.full((3, DIM), torch.nan), range(3)),
    "subset_size=1": lambda: KernelDistance(REAL, "a", subset_size=1),
    "subset_size=241": lambda: KernelDistance(REAL, "a", subset_size=241),
    "num_subsets=0": lambda: KernelDistance(REAL, "a", num_subsets=0),
    "neighbours=240": lambda: PrecisionRecall(REAL, neighbours=240),
    "num_splits=0": lambda: InceptionScore(0),
    "samples=0": lambda: PrecisionRecall(REAL).compute(),
    "indices=2": lambda: PrecisionRecall(REAL).update(MADE, range(2)),
    "floor=1": lambda: FrechetDistance(Reference.of(REAL), "a", floor=1),
}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_one_line(message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        MISTAKES[message]()
    assert "\n" not in str(caught.value)
