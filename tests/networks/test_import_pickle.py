"""Published networks, end to end: pickles in EDM's layout against what the originals computed."""

import edm_format
import filled
import pytest
import torch
from safetensors.torch import load_file

from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX, denoise
from reflow_lab.networks import files
from reflow_lab.networks.import_pickle import main

CASES, OUTPUTS = {}, {}
for which in ("edm", "edm2"):
    cases, outputs = edm_format.original(which)
    CASES |= cases
    OUTPUTS |= outputs


@pytest.fixture
def imported(tmp_path, monkeypatch, capsys):
    """Import what a case or a value pickles to; the working folder is empty, and no file appears in it but the result."""
    monkeypatch.chdir(tmp_path)

    def run(network, **more):
        (tmp_path / "net.pkl").write_bytes(edm_format.dumps({"ema": network, **more}))
        main(["net.pkl"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["net.pkl", "net.safetensors"]
        return tmp_path / "net.safetensors"

    return run


def agree(found, expected):
    return (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_original_computes(imported, name):
    """At float32, sigma from 0.002 to 80, and every label and no label."""
    case = CASES[name]
    settings = case["kwargs"]
    path = imported(edm_format.network(case))
    velocity, about = files.load(path), files.describe(path)
    assert about["t_max"] == T_MAX and about["num_classes"] == settings["label_dim"]
    assert about["shape"] == [settings["img_channels"], settings["img_resolution"], settings["img_resolution"]]
    x, t, label, augment = filled.inputs(name, tuple(about["shape"]), 6, settings["label_dim"], settings.get("augment_dim", 0))
    asked = {"plain": {"label": label}, "no_label": {}, "augmented": {"label": label, "augment": augment}}
    kinds = [kind for kind in asked if f"{name}/{kind}" in OUTPUTS]
    assert ("no_label" in kinds) == (label is not None) and ("augmented" in kinds) == (augment is not None)
    with torch.no_grad():
        for kind in kinds:
            found = x - t[:, None, None, None] * velocity(x, t, **asked[kind])
            assert agree(found, OUTPUTS[f"{name}/{kind}"]), kind


@pytest.mark.parametrize("which, dtype", [("edm", torch.float32), ("edm2", torch.float16)])
def test_a_pickle_that_the_original_machinery_wrote(tmp_path, monkeypatch, capsys, which, dtype):
    """Its embedded code is the only thing that was changed: it would create a file."""
    monkeypatch.chdir(tmp_path)
    source = edm_format.FIXTURES / f"{which}_original.pkl"
    assert b"Path('EXECUTED').touch()" in source.read_bytes()
    main([str(source)])
    assert [p.name for p in tmp_path.iterdir()] == [f"{which}_original.safetensors"]
    assert "5 classes; use it as teacher=run teacher.path=" in capsys.readouterr().out
    assert {t.dtype for t in load_file(f"{which}_original.safetensors").values()} == {dtype}
    x, t, label, _ = filled.inputs(f"{which}_pickle", (3, 8, 8), 6, 5, 9)
    with torch.no_grad():
        found = denoise(files.load(tmp_path / f"{which}_original.safetensors"), x, t, label)
    assert agree(found, load_file(source.with_suffix(".safetensors"))["plain"])
