"""Without a network: torch-fidelity's own extractor around a small network in the hub's place."""

import pytest
import torch
from torch import nn

from reflow_lab.errors import UserError
from reflow_lab.evaluation import dinov2
from reflow_lab.evaluation.dinov2 import DINOv2Features


class Small(nn.Module):
    """Normalised pixels of 224 x 224 to 384 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4, 384)

    def forward(self, x):  # type: ignore[no-untyped-def]
        assert x.shape[1:] == (3, 224, 224)
        return self.layer(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.fixture
def hub(monkeypatch):  # type: ignore[no-untyped-def]
    dinov2.network.cache_clear()
    asked = []
    torch.manual_seed(0)
    made = Small()
    monkeypatch.setattr(torch.hub, "load", lambda *words: asked.append(words) or made)
    yield asked, made
    dinov2.network.cache_clear()


def test_features_are_the_networks_of_normalised_images(hub) -> None:  # type: ignore[no-untyped-def]
    asked, made = hub
    images = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8)  # of the size that others are resized to
    found = DINOv2Features("s", batch_size=2)(images)
    assert asked == [("facebookresearch/dinov2", "dinov2_vits14")] and found.shape == (5, 384)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(found, made((images - mean) / std).detach(), rtol=1e-4, atol=1e-5)
    grey = images[:, :1, :16, :16]
    torch.testing.assert_close(DINOv2Features("s")(grey), DINOv2Features("s")(grey.expand(-1, 3, -1, -1) / 127.5 - 1))


def test_the_hash_is_of_the_weights(hub) -> None:  # type: ignore[no-untyped-def]
    first = DINOv2Features("s").weight_hash
    assert len(first) == 64 and DINOv2Features("s").name == "dinov2_vits14" and DINOv2Features().num_features == 1024
    with torch.no_grad():
        hub[1].layer.bias[0] += 1
    assert DINOv2Features("s").weight_hash != first


def test_without_a_network_it_is_one_line(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def fail(*_):  # type: ignore[no-untyped-def]
        raise OSError("no route\nto host")

    dinov2.network.cache_clear()
    monkeypatch.setattr(torch.hub, "load", fail)
    with pytest.raises(UserError, match=r"evaluation/features=dinov2: needs a network once.*no route to host") as caught:
        DINOv2Features()(torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
    for wrong in ({"size": "xl"}, {"batch_size": 0}):
        with pytest.raises(UserError, match=r"evaluation\.features"):
            DINOv2Features(**wrong)
