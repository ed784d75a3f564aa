import copy

import pytest
import torch
from torch.nn import functional as F

from reflow_lab.errors import UserError
from reflow_lab.evaluation import features
from reflow_lab.evaluation.features import ConvNorm, Lite0, Lite0Features, as_saved, load_lite0, our_name, weight_path


@pytest.fixture(scope="module")
def network() -> Lite0:
    return load_lite0(weight_path())


def textures(num: int, channels: int = 3, size: int = 32) -> torch.Tensor:
    """Smooth random images in [-1, 1]."""
    rough = torch.randn(num, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(rough, (size, size), mode="bicubic", align_corners=False).clamp(-1, 1)


def test_every_parameter_is_published_and_used(network: Lite0) -> None:
    trained = copy.deepcopy(network).requires_grad_(True)
    trained.classifier(trained(torch.randn(2, 3, 64, 64))).square().sum().backward()
    unused = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused and sum(p.numel() for p in trained.parameters()) == 4_652_008


def test_names_tell_the_norms_of_a_block_from_the_networks_own() -> None:
    assert our_name("_bn1.running_var") == "head.norm.running_var"
    assert our_name("_blocks.0._bn1.bias") == "blocks.0.depthwise.norm.bias"
    assert our_name("_blocks.15._bn2.num_batches_tracked") == "blocks.15.project.norm.num_batches_tracked"


@pytest.mark.parametrize(("kernel", "size", "before"), [(3, 64, 0), (3, 33, 1), (5, 64, 1), (5, 33, 2)])
def test_strided_convolutions_pad_as_tensorflow_does(kernel: int, size: int, before: int) -> None:
    """SAME: the total, (out - 1) * stride + kernel - in, is halved, the odd pixel last."""
    x, layer = torch.randn(1, 2, size, size), ConvNorm(2, 2, kernel, stride=2, act=False)
    out = -(-size // 2)
    expected = F.conv2d(F.pad(x, (before, 9, before, 9)), layer.conv.weight, stride=2)[..., :out, :out]
    found = layer.conv(layer._pad(x))
    assert found.shape[-1] == out
    torch.testing.assert_close(found, expected)


def test_folding_the_norms_keeps_the_features(network: Lite0) -> None:
    x = Lite0Features().preprocess(textures(8))
    with torch.inference_mode():
        plain, folded = network(x), copy.deepcopy(network).fold()(x)
    assert (plain - folded).norm() / plain.norm() < 1e-5
    assert plain.norm() > 100


def test_features_are_those_of_the_network_in_any_batch_size(network: Lite0) -> None:
    images = textures(7)
    extract = Lite0Features(batch_size=3)
    with torch.inference_mode():
        expected = network(extract.preprocess(images))
    found = extract(images)
    assert found.shape == (7, 1280) and found.dtype == torch.float32 and not found.is_inference()
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert (found - Lite0Features(batch_size=7)(images)).norm() / expected.norm() < 1e-5


def test_a_picture_is_recognised(network: Lite0) -> None:
    """An orange ball on green is one of ImageNet's round things: balloon, six kinds of balls, orange."""
    grid = torch.linspace(-1, 1, 224)
    inside = (grid[:, None] ** 2 + grid**2 < 0.5).float()
    shade = 1 - 0.35 * ((grid[:, None] - 0.2) ** 2 + (grid - 0.2) ** 2)
    orange = inside * shade * torch.tensor([255.0, 140.0, 10.0])[:, None, None]
    image = orange + (1 - inside) * torch.tensor([40.0, 90.0, 30.0])[:, None, None]
    logits = network.classifier(Lite0Features(resolution=224)(image[None].to(torch.uint8)))
    assert int(logits.argmax()) in {417, 429, 522, 574, 722, 805, 852, 950}


def test_preprocessing_rounds_repeats_grey_and_scales() -> None:
    grey = textures(2, channels=1, size=32)
    extract = Lite0Features(resolution=32)
    expected = ((as_saved(grey).float() - 127) / 128).expand(-1, 3, -1, -1)
    torch.testing.assert_close(extract.preprocess(grey), expected)
    torch.testing.assert_close(extract(as_saved(grey)), extract(grey))


def test_images_are_rounded_and_clipped() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, 2.0, -3.0, 1 / 127.5, -0.999])
    assert as_saved(values).tolist() == [0, 255, 128, 255, 0, 128, 0]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_saved(every.float() / 127.5 - 1), every)


def test_bf16_is_close_but_another_protocol() -> None:
    images = textures(4)
    exact, rough = Lite0Features()(images), Lite0Features(precision="bf16")(images)
    assert 1e-4 < (exact - rough).norm() / exact.norm() < 0.2


def test_bad_input_is_said_in_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"evaluation\.features\.precision=fp16: fp32 or bf16"):
        Lite0Features(precision="fp16")
    with pytest.raises(UserError, match=r"evaluation\.features\.resolution=big: a whole number of at least 32"):
        Lite0Features(resolution="big")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"evaluation\.features\.batch_size=0: a whole number of at least 1"):
        Lite0Features(batch_size=0)
    with pytest.raises(UserError, match="shape"):
        Lite0Features()(torch.zeros(2, 2, 8, 8))
    with pytest.raises(UserError, match="finite"):
        Lite0Features()(torch.full((1, 3, 8, 8), float("nan")))
    (broken := tmp_path / "lite0.pth").write_bytes(weight_path().read_bytes()[:-1])
    with pytest.raises(UserError, match="sha256"):
        load_lite0(broken)
    with pytest.raises(UserError, match="no such file"):
        load_lite0(tmp_path / "none.pth")


def test_the_constructor_touches_no_disk(monkeypatch) -> None:
    monkeypatch.setattr(features, "weight_path", lambda: pytest.fail("the disk was touched"))
    features._network.cache_clear()
    assert Lite0Features().weight_hash == features.WEIGHT_HASH
