import numpy as np
import torch

from reflow_lab.flow import NO_LABEL
from reflow_lab.training.label_dropout import drop_labels

POSITIONS = np.arange(20_000)
LABEL = torch.arange(20_000) % 7


def dropped(probability, seed=3, positions=POSITIONS):
    return drop_labels(LABEL[torch.from_numpy(positions % 20_000)], probability, seed, positions)


def test_the_rate():
    found = dropped(0.1)
    missing = found == NO_LABEL
    assert abs(missing.double().mean().item() - 0.1) < 5 * (0.1 * 0.9 / 20_000) ** 0.5
    assert torch.equal(found[~missing], LABEL[~missing]) and found.dtype == torch.int64
    assert torch.equal(dropped(0.0), LABEL) and (dropped(1.0) == NO_LABEL).all()


def test_keyed_by_seed_and_position_and_not_by_the_batch():
    whole = dropped(0.3)
    split = torch.cat([dropped(0.3, positions=part) for part in np.split(POSITIONS, [17, 5000])])
    assert torch.equal(split, whole)
    assert not torch.equal(dropped(0.3, seed=4), whole) and not torch.equal(dropped(0.3, positions=POSITIONS + 20_000), whole)
