import urllib.error
from pathlib import Path

import pytest
import torch

from reflow_lab.bench_evaluate import Held, images, random_weights
from reflow_lab.errors import UserError
from reflow_lab.evaluation import inception
from reflow_lab.evaluation.frechet import Reference
from reflow_lab.evaluation.inception import InceptionFeatures
from reflow_lab.evaluation.metrics import FrechetDistance, KernelDistance, PrecisionRecall


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights: the published ones need a network."""
    random_weights(path := tmp_path_factory.mktemp("inception") / "weights.pth")
    return path


def theirs(weights: Path, *names: str) -> torch.nn.Module:
    from torch_fidelity import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3("inception-v3-compat", list(names), weights)


def fidelity(weights: Path, made: torch.Tensor, real: torch.Tensor, **how) -> dict[str, float]:
    """torch-fidelity's own numbers."""
    from torch_fidelity import calculate_metrics

    how = {"fid": True, "cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True} | how
    return calculate_metrics(input1=Held(made), input2=Held(real), feature_extractor_weights_path=str(weights), **how)


def test_features_and_logits_are_torch_fidelitys(weights: Path) -> None:
    """As close as rounding lets a random network be, which enlarges what comes in."""
    batch, network = images(5, "test"), theirs(weights, "2048", "logits_unbiased")
    with torch.inference_mode():
        features, logits = network(batch)
        first = network.Conv2d_1a_3x3.conv.weight
        first.mul_(1 + 2.0**-24 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0)))
        rounding = (network(batch)[0] - features).norm() / features.norm()
    found = InceptionFeatures(weights, batch_size=3).outputs(batch)
    assert found.features.shape == (5, 2048) and found.logits.shape == (5, 1008)
    assert (features - features.mean(0)).norm() / features.norm() > 0.02  # else any network would do
    assert rounding < 1e-4
    assert (found.features - features).norm() / features.norm() < 3 * rounding
    assert (found.logits - logits).norm() / logits.norm() < 3 * rounding
    assert found.features.dtype == torch.float32 and not found.features.is_inference()


def test_floats_are_rounded_unless_told_not_to_and_grey_is_repeated(weights: Path) -> None:
    network, exact = InceptionFeatures(weights), InceptionFeatures(weights, rounding=False)
    grey = images(2, "grey")[:, :1]
    floats = grey / 127.5 - 1
    assert torch.equal(network.pixels(floats + 0.4 / 127.5), grey.float())
    torch.testing.assert_close(exact.pixels(floats + 0.4 / 127.5), grey + 0.4)
    torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)), rtol=1e-5, atol=1e-5)
    assert network.settings == {"rounding": True} != exact.settings


def test_only_published_weights_are_called_inception(weights: Path, tmp_path, monkeypatch) -> None:
    found = InceptionFeatures(weights)
    assert found.weight_hash == inception.file_hash(weights)
    assert found.name == f"inception_{found.weight_hash[:8]}"
    monkeypatch.setattr(inception, "WEIGHT_HASH", found.weight_hash)
    assert found.name == "inception"


def test_the_network_is_loaded_once(weights: Path, monkeypatch) -> None:
    batch = images(1, "once")
    expected = InceptionFeatures(weights)(batch)
    monkeypatch.setattr(inception, "load", lambda *_: pytest.fail("loaded again"))
    assert torch.equal(InceptionFeatures(weights)(batch), expected)


@pytest.mark.slow
def test_metrics_of_2000_images_are_torch_fidelitys(weights: Path) -> None:
    agree(weights, 2000, 1000)


def agree(weights: Path, num: int, subset_size: int) -> None:
    made, real = images(num, "made"), (images(num, "real") * 0.95 + 6).to(torch.uint8)  # which overlap
    prc = {"prc": True, "kid": True, "kid_subset_size": subset_size, "feature_extractor": "inception-v3-compat"}
    expected = fidelity(weights, made, real, **prc)
    network = InceptionFeatures(weights)
    features, reference = network(made), network(real)
    distance = FrechetDistance(Reference.of(reference), network.name)
    kernel, manifold = KernelDistance(reference, network.name, subset_size=subset_size), PrecisionRecall(reference)
    distance.update(features)
    kernel.update(features, range(num))
    manifold.update(features, range(num))
    found = {name: float(value) for metric in (distance, kernel, manifold) for name, value in metric.compute().items()}
    print({"theirs": expected, "ours": found})
    assert distance.name == f"fd_{network.name}"
    assert found[distance.name] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    spread = expected["kernel_inception_distance_std"] / 10 + 1e-6  # other subsets, of which the means differ by about this
    assert found[kernel.name] == pytest.approx(expected["kernel_inception_distance_mean"], abs=6 * spread)
    assert 0.2 < found["precision"] < 0.95 and 0.2 < found["recall"] < 0.95
    assert found["precision"] == pytest.approx(expected["precision"], abs=2 / num)
    assert found["recall"] == pytest.approx(expected["recall"], abs=2 / num)


def test_weights_that_are_missing_wrong_or_harmful_are_one_line(weights: Path, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"evaluation\.features\.weights=.*no such file; weights-inception"):
        InceptionFeatures(tmp_path / "none.pth").name  # noqa: B018
    (cut := tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:5000])
    torch.save({"conv.weight": torch.zeros(3)}, other := tmp_path / "other.pth")
    torch.save({"harm": Harm(tmp_path / "harmed")}, harmful := tmp_path / "harmful.pth")
    for path in (cut, other, harmful):
        with pytest.raises(UserError, match="not Inception's weights") as caught:
            InceptionFeatures(path)(images(1, "wrong"))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(UserError, match=r"batch_size=0"):
        InceptionFeatures(batch_size=0)
    with pytest.raises(UserError, match=r"nan or inf in 2 of 3"):
        InceptionFeatures(weights)(torch.tensor([0.0, float("nan"), float("inf")])[:, None, None, None].expand(3, 3, 8, 8))


class Harm:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_published_weights_are_fetched_once_and_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    there = tmp_path / "checkpoints" / inception.FILE
    failures = {
        urllib.error.URLError("no route"): f"cannot be reached .*no route.*; put that file at {there}, or name it here",
        urllib.error.HTTPError("u", 404, "gone", {}, None): "answers 404",  # type: ignore[arg-type]
        RuntimeError("invalid hash value"): "sha256 is not 6726825d0af5",
    }
    for error, message in failures.items():

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        with pytest.raises(UserError, match=message) as caught:
            InceptionFeatures().weight_hash  # noqa: B018
        assert "\n" not in str(caught.value)
    there.write_bytes(b"something else")
    with pytest.raises(UserError, match=f"{there}: sha256 must be 6726825d0af5.*, is "):
        InceptionFeatures().weight_hash  # noqa: B018


def test_the_constructor_touches_neither_disk_nor_network(monkeypatch) -> None:
    monkeypatch.setattr(inception, "weight_path", lambda *_: pytest.fail("the disk was touched"))
    assert InceptionFeatures("nowhere.pth").settings == {"rounding": True}
