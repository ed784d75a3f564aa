import json

import pytest
import torch
from safetensors.torch import save_file

from reflow_lab.artifacts import artifact
from reflow_lab.errors import UserError
from reflow_lab.networks import files
from reflow_lab.networks.mlp import MLP
from reflow_lab.networks.preconditioning import Preconditioned


def net(width=16):
    inner = {"_target_": "reflow_lab.networks.mlp.MLP", "dim": 2, "width": width, "num_layers": 2}
    return {"_target_": "reflow_lab.networks.preconditioning.Preconditioned", "sigma_data": 0.6, "network": inner}


def network(width=16):
    return Preconditioned(MLP(2, width=width, num_layers=2), 0.6)


@pytest.fixture
def saved(tmp_path):
    model, path = network(), tmp_path / "a.safetensors"
    files.save(model, path, {"net": net(), "t_max": 0.5})
    return model, path


def test_what_is_saved_is_loaded(saved):
    model, path = saved
    loaded = files.load(path)
    assert not loaded.training and isinstance(loaded, Preconditioned) and loaded.sigma_data == 0.6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    x, t = torch.randn(4, 2), torch.rand(4)
    assert torch.equal(model.eval()(x, t), loaded(x, t))
    assert files.describe(path)["t_max"] == 0.5


def test_float16_is_half_the_size_and_read_back_as_float32(saved, tmp_path):
    model, path = saved
    half = tmp_path / "half.safetensors"
    files.save(model, half, {"net": net()}, torch.float16)
    loaded = files.load(half)
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.half().float(), b)
    size = sum(p.numel() for p in model.parameters())
    assert path.stat().st_size - half.stat().st_size == pytest.approx(2 * size, abs=64)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.hub.load",
        "reflow_lab.networks",
        "reflow_lab.networks.unet.torch.os.system",
        "reflow_lab.networks.files.Path",
        "reflow_lab.networks.files.instantiate",
        "reflow_lab.networks.files.save",
        "reflow_lab.networks.nothing.Here",
        "reflow_lab.networks.mlp.Nothing",
        "reflow_lab.networks_evil.Net",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_foreign_target_is_refused(tmp_path, target, nested):
    path = tmp_path / "evil.safetensors"
    evil = {"_target_": target, "command": "true"}
    files.save(network(), path, {"net": net() | {"network": evil} if nested else evil})
    with pytest.raises(UserError, match=f"names {target}, but"):
        files.load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    for read in (files.load, files.describe, lambda p: files.load_into(network(), p)):
        with pytest.raises(UserError, match=f"{path}: not a whole weight file") as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    for read in (files.load, files.describe, files.weights_hash):
        with pytest.raises(UserError, match=r"no\.safetensors: no such file"):
            read(tmp_path / "no.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"reflow_lab": "not json"}, {"reflow_lab": "[]"}, {"reflow_lab": "{}"}])
def test_a_file_of_someone_else_is_refused(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    save_file({"w": torch.zeros(2)}, path, metadata)
    with pytest.raises(UserError, match="not a whole weight file of reflow_lab"):
        files.load(path)


def test_the_hash_follows_the_content(saved, tmp_path):
    model, path = saved
    again = tmp_path / "b.safetensors"
    files.save(model, again, {"net": net(), "t_max": 0.5})
    assert files.weights_hash(path) == files.weights_hash(again)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    files.save(model, again, {"net": net(), "t_max": 0.5})
    assert files.weights_hash(path) != files.weights_hash(again)


def test_a_network_of_another_width_lists_its_tensors(saved):
    _, path = saved
    with pytest.raises(UserError, match=r"teacher\.path=.*do not fit the network; 5 tensors differ: network\.layers") as error:
        files.load_into(network(width=24), path, "teacher.path")
    assert "\n" not in str(error.value) and str(error.value).count("network.layers") == 5


def test_at_most_ten_tensors_are_listed(saved):
    _, path = saved
    other = Preconditioned(MLP(3, num_classes=4, width=24, num_layers=8))
    with pytest.raises(UserError, match=r"\d\d tensors differ") as error:
        files.load_into(other, path)
    assert str(error.value).count("network.") == 10 and str(error.value).endswith(", ...")


def run_folder(tmp_path, names, done=True):
    made = artifact(tmp_path, "train", 1)
    (made.folder / "weights").mkdir(parents=True)
    for name in names:
        files.save(network(), made.folder / "weights" / f"{name}.safetensors", {"net": net(), "profile": name})
    if done:
        made.finish()
    return made.folder


def test_a_run_offers_its_profiles(tmp_path):
    folder = run_folder(tmp_path, ["raw", "ema0.05", "ema0.5", "ema0.002"])
    assert files.find(folder).stem == "ema0.5"
    assert files.find(str(folder), "raw").stem == "raw" and files.find(folder, "ema0.002").stem == "ema0.002"
    with pytest.raises(UserError, match=r"profile=ema7: allowed: ema0\.002, ema0\.05, ema0\.5, raw"):
        files.find(folder, "ema7")


def test_without_a_halflife_the_widest_tracked_average_is_the_default_and_a_later_one_is_offered(tmp_path):
    folder = run_folder(tmp_path, ["raw", "sigma0.05", "sigma0.1"])
    (folder / "weights" / "sigma0.15.safetensors").write_bytes((folder / "weights" / "raw.safetensors").read_bytes())
    assert files.find(folder).stem == "sigma0.1" and files.find(folder, "sigma0.15").stem == "sigma0.15"
    assert files.find(run_folder(tmp_path / "both", ["raw", "sigma0.1", "ema0.5"])).stem == "ema0.5"


def test_a_run_without_averages_offers_its_raw_weights(tmp_path):
    assert files.find(run_folder(tmp_path, ["raw"])).stem == "raw"


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished training run"):
        files.find(run_folder(tmp_path, ["raw"], done=False))
    with pytest.raises(UserError, match="holds no finished training run"):
        files.find(tmp_path)


def test_an_edited_run_is_refused(tmp_path):
    folder = run_folder(tmp_path, ["raw"])
    path = folder / "weights" / "raw.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=f"{path}: is missing or was changed"):
        files.find(folder)


def test_a_plain_file_is_itself(tmp_path):
    assert files.find(tmp_path / "x.safetensors") == tmp_path / "x.safetensors"
    assert files.find("package:nothing.safetensors").parts[-3:] == ("data", "weights", "nothing.safetensors")


def test_the_description_is_plain_json(saved):
    _, path = saved
    assert json.loads(json.dumps(files.describe(path))) == {"net": net(), "t_max": 0.5}
