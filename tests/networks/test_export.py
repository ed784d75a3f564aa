import pytest
import torch

from reflow_lab import api
from reflow_lab.cli import main
from reflow_lab.networks import files


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_becomes_one_file_that_answers_the_same(toy, tmp_path, capsys, dtype):
    out = tmp_path / "base.safetensors"
    assert main(["export", str(toy.teacher), "--out", str(out), "--dtype", dtype]) == 0
    line = capsys.readouterr().out
    assert str(out) in line and "teacher.path=" in line
    ours, theirs = (api.sample(api.load(path), 64, nfe=3) for path in (out, toy.teacher))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if dtype == "float32" else 2e-2)
    assert (ours != theirs).any() == (dtype == "float16")
    assert files.describe(out) == files.describe(files.find(toy.teacher))


def test_float16_is_half_the_size_and_raw_weights_are_others(toy, tmp_path):
    sizes = {}
    for dtype in ("float32", "float16"):
        assert main(["export", str(toy.teacher), "--out", str(tmp_path / dtype), "--dtype", dtype, "--profile", "raw"]) == 0
        sizes[dtype] = (tmp_path / dtype).stat().st_size - len(str(files.describe(tmp_path / dtype)))
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert files.describe(tmp_path / "float16")["profile"] == "raw"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "no/such/x.safetensors"], "its folder does not exist"),
        (["--out", "there.safetensors"], "is there already"),
        (["--out", "x.safetensors", "--profile", "ema9"], "profile=ema9"),
        (["--out", "x.safetensors", "--dtype", "int8"], "int8"),
        ([], "--out"),
    ],
)
def test_wrong_words_are_one_line(toy, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    assert main(["export", str(toy.teacher), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there.safetensors"}
