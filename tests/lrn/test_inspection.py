"""The verb `store`: on stores of the exact toy teacher, whole and spoiled."""

import json
import re

import numpy as np
import pytest

from reflow_lab import cli
from reflow_lab.lrn import pairs
from reflow_lab.lrn.store import PairStore
from toy import config, teacher_file

LABELLED = ("data=two_moons", "data.num_points=400", "net.network.num_classes=2")


@pytest.fixture
def teacher(tmp_path):
    return teacher_file(tmp_path / "teacher.safetensors", exact=False)


@pytest.fixture
def folder(tmp_path, teacher):
    def make(kind="backward", *overrides):
        words = ("teacher=run", f"teacher.path={teacher}", f"pairs.kind={kind}", *overrides)
        return pairs.pairs(config("pairs", tmp_path / "outputs", *words))

    return make


@pytest.fixture
def say(capsys):
    def run(*words):
        capsys.readouterr()
        status = cli.main(["store", *map(str, words)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("kind", ["backward", "forward"])
def test_a_whole_store_is_verified_to_the_last_bit(folder, say, kind):
    count = {"backward": 96, "forward": 64}[kind]
    status, out, _ = say("verify", folder(kind), "--batches", 8, "--seed", 3, "--json")
    found = json.loads(out)
    assert status == 0 and found["shards"] == -(-count // 40) and found["identical_pairs"] == found["pairs"] >= 8 * 8
    assert found["largest_difference"] == 0


def test_repeats_flips_and_start_noise_are_drawn_again(folder, say):
    path = folder("forward", "pairs.num_forward=900", "pairs.start_noise=true")
    store = PairStore(path)
    first, again = store.stored(np.arange(400)), store.stored(np.arange(400, 800))
    assert not np.allclose(first, again, atol=1e-4)  # the same images, another start noise
    status, out, _ = say("verify", path, "--batches", 6)
    assert status == 0 and "to the last bit; largest relative difference 0" in out


@pytest.mark.parametrize("place", [130, -1])
def test_a_flipped_byte_is_named(folder, say, place):
    path = folder() / "shard-00001.npy"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    status, _, err = say("verify", path.parent)
    assert status == 2 and f"{path} was changed after it was written" in err and err.count("reflow-lab:") == 1


def test_missing_shards_are_named(folder, say):
    path = folder()
    for number in (0, 2):
        (path / f"shard-0000{number}.npy").unlink()
    status, _, err = say("verify", path)
    assert status == 2 and f"{path}/shard-00000.npy is missing; {path}/shard-00002.npy is missing" in err
    assert f"delete these and {path}/done.json" in err
    status, _, err = say("info", path)
    assert status == 2 and "shard-00000.npy, shard-00002.npy missing; see reflow-lab store verify" in err


def test_pairs_that_the_teacher_would_not_make_are_named(folder, say):
    path = folder()
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["nfe"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = say("verify", path)
    assert status == 2 and re.search(r"pair=\d+: differs by \d\S* from what this teacher makes; at most 0\.05 is allowed", err)


def test_a_manifest_of_another_version_is_named(folder, say):
    path = folder()
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["made_by"]["processor"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = say("info", path)
    assert status == 2 and "made_by lacks processor" in err and err.count("\n") == 1


def test_another_teacher_is_refused(folder, say, tmp_path):
    path, other = folder(), teacher_file(tmp_path / "other.safetensors")
    status, _, err = say("verify", path, "--teacher", other)
    assert status == 2 and re.search(rf"--teacher={other}: has the hash \w+, but these pairs were drawn by \w+", err)
    (tmp_path / "teacher.safetensors").rename(tmp_path / "moved.safetensors")
    assert "no such file" in say("verify", path)[2]
    assert say("verify", path, "--teacher", tmp_path / "moved.safetensors")[0] == 0


def test_info_tells_origin_classes_and_moments(folder, say, tmp_path):
    teacher_file(tmp_path / "teacher.safetensors", *LABELLED, exact=False)
    path = folder("backward", "data=two_moons", "data.num_points=400", "pairs.num_backward=800")
    status, out, text = say("info", path, "--json")
    found = json.loads(out)
    assert status == 0 and "800 backward pairs of 2; x0 stored as float32 in 20 shards" in text
    assert "HeunSigma on EDM (rho 7.0, sigma_min 0.002), 9 NFE" in text and "guidance none; seed 1000, 16 at a time" in text
    assert sum(found["class_counts"]) == 800 and min(found["class_counts"]) > 330
    noise = found["moments"]["x1"]
    assert abs(noise["mean"]) < 0.1 and noise["std"] == pytest.approx(1, abs=0.06) and abs(noise["kurtosis"] - 3) < 0.4
    store = PairStore(path)
    assert found["moments"]["x0"]["mean"] == pytest.approx(store.stored(np.arange(800)).mean().item(), abs=1e-6)


def test_info_of_forward_pairs_finds_their_images_or_says_so(folder, say):
    path = folder("forward")
    _, out, _ = say("info", path)
    assert re.search(r"\n +x0 +x1 +N\(0, I\)\n", out) and "flips False, start noise False" in out
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["made_by"]["data"]["num_points"] = 500
    (path / "manifest.json").write_text(json.dumps(manifest))
    status, out, _ = say("info", path)
    assert (
        status == 0 and re.search(r"\n +x1 +N\(0, I\)\n", out) and "is no longer the data that these pairs were made from" in out
    )
    status, _, err = say("diagnose", path)
    assert status == 2 and "is no longer the data that these pairs were made from" in err


def test_a_manifest_runs_no_code(folder, say, tmp_path):
    path = folder("forward")
    whole = json.loads((path / "manifest.json").read_text())
    harm = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "harm")}
    nested = {**whole["made_by"]["data"], "num_points": {"_target_": "reflow_lab.data.toys.torch.os.system"}}
    for data in (harm, nested):
        spoiled = {**whole, "made_by": {**whole["made_by"], "data": data}}
        (path / "manifest.json").write_text(json.dumps(spoiled))
        assert "manifest.json: data: names" in say("diagnose", path)[2]
    for key in ("solver", "grid"):
        (path / "manifest.json").write_text(json.dumps({**whole, key: {**whole[key], "more": harm}}))
        assert "manifest.json: solver, grid: names pathlib.Path.touch" in say("verify", path)[2]
    assert not (tmp_path / "harm").exists()


def test_diagnose_tells_how_straight_the_coupling_is_and_how_far_its_marginals(folder, say):
    status, out, text = say("diagnose", folder("backward", "pairs.num_backward=800"), "--json", "--seed", 1)
    found = json.loads(out)
    assert status == 0 and "straightness" in text and "x1 to the N(0, I): w2_squared" in text
    assert 0 <= found["neighbour_straightness"]["mean"] < 1 and found["num"] == 800
    noise = found["marginals"]["x1"]
    assert noise["num"] == 200 and noise["distance"] < 3 * noise["floor"]


def test_diagnose_tells_what_a_rectification_adds(folder, say, teacher, tmp_path):
    path = folder("backward", "pairs.num_backward=800")
    status, out, _ = say("diagnose", path, "--velocity", teacher, "--json")
    found = json.loads(out)
    assert status == 0 and abs(found["rectification"]["bias"]) < 1e-3  # the teacher itself, by the store's own solver
    other = teacher_file(tmp_path / "other.safetensors")
    worse = json.loads(say("diagnose", path, "--velocity", other, "--json")[1])
    assert abs(worse["rectification"]["bias"]) > 0.01 and worse["straightness"]["mean"] > found["straightness"]["mean"]
    status, _, err = say("diagnose", path, "--velocity", "package:fashion_mnist.safetensors")
    assert status == 2 and "makes samples of shape [1, 32, 32], the store holds [2]" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info"], "store: the following arguments are required: folder"),
        (["look", "x"], "store: argument what: invalid choice: 'look'"),
        (["info", "nowhere"], "folder=nowhere: holds no finished pair store"),
        (["info", "nowhere", "--pairs", "0"], "--pairs=0: must be at least 1"),
    ],
)
def test_bad_words_are_one_line(say, words, said):
    status, _, err = say(*words)
    assert status == 2 and said in err and err.count("\n") == 1
