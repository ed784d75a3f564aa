import torch

from reflow_lab.networks.mlp import MLP


def test_shape_and_use_of_every_parameter():
    network = MLP(dim=3, num_classes=2, width=16, num_layers=2)
    y = network(torch.randn(5, 3), torch.rand(5), torch.tensor([0, 1, 1, 0, 1]))
    assert y.shape == (5, 3)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert sum(isinstance(m, torch.nn.SiLU) for m in network.layers.modules()) == 2


def test_it_depends_on_time_and_label():
    network, x = MLP(dim=2, num_classes=2), torch.randn(1, 2)
    answers = [network(x, torch.tensor([t]), torch.tensor([y])) for t, y in ((0.1, 0), (0.2, 0), (0.1, 1))]
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[0], answers[2])


def test_dropout_acts_in_training_only():
    network, x, t = MLP(dim=2, dropout=0.5), torch.randn(4, 2), torch.rand(4)
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))
