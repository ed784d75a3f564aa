import pytest
import torch
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.lrn.dropout import Dropout, scale_dropout


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2), nn.Sequential(nn.Dropout(0.1)))


@pytest.mark.parametrize(("fraction", "rates"), [(1.0, [0.2, 0.1]), (0.5, [0.1, 0.05]), (0.0, [0.0, 0.0])])
def test_every_rate_is_scaled(fraction, rates):
    model = network()
    scale_dropout(model, fraction)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == rates


def test_without_dropout_training_and_evaluation_agree():
    model, x = network(), torch.randn(64, 2)
    assert not torch.equal(model(x), model(x))
    scale_dropout(model, 0.0)
    assert torch.equal(model(x), model.eval()(x))


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_bad_fraction_is_refused(fraction):
    with pytest.raises(UserError, match=rf"lrn\.dropout\.fraction={fraction}: must lie in \[0, 1\]"):
        Dropout(fraction)
