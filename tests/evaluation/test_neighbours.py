from pathlib import Path

import numpy as np
import pytest
import torch

from reflow_lab.data.sets import ImageSet, to_float
from reflow_lab.evaluation.memory import LiveTensors
from reflow_lab.evaluation.neighbours import Nearest, copies, nearest, pixels


def image_set(num: int = 50) -> ImageSet:
    return ImageSet(torch.randint(0, 256, (num, 3, 4, 4), dtype=torch.uint8), None, "random")


def found(queries, samples, embeds, batch_size: int) -> dict[str, Nearest]:  # type: ignore[no-untyped-def]
    *_, (_, last) = nearest(queries, samples, embeds, batch_size)
    return last


def brute(queries: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances = ((queries[:, None] - vectors[None]) ** 2).sum(2) ** 0.5
    return distances.min(1), distances.argmin(1)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_the_nearest_of_all_in_every_space_whatever_the_batch(batch_size: int) -> None:
    samples, weights = image_set(), torch.randn(48, 5)
    embeds = {"pixels": pixels, "other": lambda x: x.flatten(1) @ weights}
    asked = to_float(torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8))
    best = found({name: embed(asked) for name, embed in embeds.items()}, samples, embeds, batch_size)
    for name, embed in embeds.items():
        distance, index = brute(embed(asked).double().numpy(), embed(to_float(samples.images)).double().numpy())
        assert best[name].index.tolist() == index.tolist()
        np.testing.assert_allclose(best[name].distance, distance, rtol=1e-6)


def test_a_copy_is_found_at_distance_0_and_its_neighbour_at_what_differs() -> None:
    samples = image_set()
    asked = to_float(samples.images[[41, 3]])
    asked[1, 0, 0, 0] += 0.5
    best = found({"pixels": pixels(asked)}, samples, {"pixels": pixels}, 16)["pixels"]
    assert best.index.tolist() == [41, 3]
    assert best.distance[0] == 0
    assert best.distance[1].item() == pytest.approx(0.5 / 48**0.5, rel=1e-5)


def test_every_sample_is_counted_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, taken = image_set(), []
    take = ImageSet.take
    monkeypatch.setattr(ImageSet, "take", lambda self, indices, *where: taken.append(indices) or take(self, indices, *where))
    steps = list(nearest({"pixels": pixels(torch.zeros(1, 3, 4, 4))}, samples, {"pixels": pixels}, 16))
    assert [num for num, _ in steps] == [16, 16, 16, 2]
    assert np.concatenate(taken).tolist() == list(range(50))


def test_memory_does_not_grow_with_the_set_which_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    peaks = []
    for num in (100, 1000):
        np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (num, 3, 4, 4), dtype=np.uint8))
        mapped = np.load(tmp_path / "images.npy", mmap_mode="r+")
        samples = ImageSet(torch.from_numpy(mapped), None, "mapped")
        asked = pixels(to_float(samples.images[:5]))
        with LiveTensors({}) as live:
            best = found({"pixels": asked}, samples, {"pixels": pixels}, 20)["pixels"]
        assert best.index.tolist() == [0, 1, 2, 3, 4]
        peaks.append(live.peak)
    assert peaks[1] < 1.5 * peaks[0]


def test_copies_are_a_share_beyond_chance_and_novel_samples_are_not() -> None:
    held_out = 1 + torch.rand(1000)
    novel = 1 + torch.rand(500)
    copied = torch.cat((novel[:450], torch.rand(50)))
    fair, caught = copies(novel, held_out), copies(copied, held_out)
    assert fair.threshold == caught.threshold == held_out.sort().values[9].item()
    assert fair.share < 0.03 and fair.p_value > 0.05 and fair.low < fair.expected < fair.high
    assert caught.share == pytest.approx(0.1, abs=0.03) and caught.p_value < 1e-6 and caught.low > 2 * caught.expected


def test_the_interval_is_clopper_and_pearsons() -> None:
    """Of 20 none: 1 - 0.025^(1/20); the beta-binomial of r = 1 by hand."""
    found = copies(torch.ones(20), torch.zeros(99) + 0.5)
    assert (found.share, found.low) == (0, 0) and found.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert found.expected == 0.01 and found.p_value == pytest.approx(1)
    below = copies(torch.tensor([0.1, 0.9]), torch.linspace(0.5, 1, 99))
    assert below.share == 0.5 and below.p_value == pytest.approx(1 - 99 / 101)


def test_under_one_law_the_p_value_is_uniform_enough() -> None:
    values = torch.rand(600, 400)
    found = np.array([copies(row[:200], row[200:]).p_value for row in values])
    assert 0.02 < (found <= 0.05).mean() <= 0.06
