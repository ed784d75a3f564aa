"""Published networks, end to end: pickles in EDM's layout against what the originals computed."""

import io
from pathlib import Path

import edm_format
import filled
import pytest
import torch
from safetensors.torch import load_file

import reflow_lab
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


def case(name="ddpmpp", **changed):
    """A case with other settings."""
    return {**CASES[name], "kwargs": CASES[name]["kwargs"] | changed}


def refused(imported, network, reason):
    with pytest.raises(UserError, match=rf"^net\.pkl: .*{reason}") as error:
        imported(network)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert [p.name for p in Path().iterdir()] == ["net.pkl"]


@pytest.mark.parametrize(
    "name, changed, reason",
    [
        ("ddpmpp", {"decoder_type": "skip"}, "SongUNet with decoder_type=skip is none of EDM's networks"),
        ("ddpmpp", {"encoder_type": "residual"}, "SongUNet with .*encoder_type=residual.* is none of EDM's networks"),
        ("ddpmpp", {"new_option": 7}, "SongUNet with new_option=7 is none of EDM's networks"),
        ("ddpmpp", {"model_type": "DiT"}, "class=DiT: cannot be imported; allowed: SongUNet, DhariwalUNet, UNet"),
        ("edm2", {"res_balance": 0.5}, "UNet with res_balance=0.5 is none of EDM's networks"),
        ("adm", {"num_blocks": -1}, "DhariwalUNet.num_blocks=-1: no network has such a setting"),
        ("adm", {"num_blocks": 10**9}, "DhariwalUNet.num_blocks=1000000000: no network has such a setting"),
        ("adm", {"channel_mult": "abc"}, "DhariwalUNet.channel_mult=abc: no network has such a setting"),
        ("adm", {"dropout": True}, "DhariwalUNet.dropout=True: no network has such a setting"),
        ("adm", {"img_resolution": 17}, "resolution=17: must be a multiple of 4"),
        ("adm", {"model_channels": 36}, "channels=144: must divide into 32 groups"),
    ],
)
def test_settings_that_ours_cannot_have_are_refused(imported, name, changed, reason):
    network = edm_format.network(CASES[name])
    inner = network.state["_modules"]["unet" if name == "edm2" else "model"]
    inner.class_name = changed.pop("model_type", inner.class_name)
    inner.state["_init_kwargs"] |= changed
    refused(imported, network, reason)


def test_the_tensors_that_do_not_fit_are_listed(imported):
    refused(
        imported, edm_format.network(case(model_channels=32)), r"DDPMpp: these .* \d+ tensors differ: network\.dec\..*, \.\.\."
    )


def test_a_missing_and_a_surplus_tensor_are_listed(imported):
    network = edm_format.network(CASES["adm"])
    parameters = network.state["_modules"]["model"].state["_modules"]["map_layer0"].state["_parameters"]
    parameters["new"] = parameters.pop("bias")
    refused(imported, network, r"2 tensors differ: network\.map_layer0\.bias, network\.map_layer0\.new$")


def test_a_filter_that_is_not_the_settings_is_refused(imported):
    network = edm_format.network(CASES["ncsnpp"])
    down = network.state["_modules"]["model"].state["_modules"]["enc"]._modules["8x8_down"]
    down.state["_modules"]["conv0"].state["_buffers"]["resample_filter"] *= 2
    refused(imported, network, "enc.8x8_down.conv0.resample_filter=.* is not the filter of its settings")


@pytest.mark.parametrize("wrapper", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Generator"])
def test_another_preconditioning_is_refused(imported, wrapper):
    network = edm_format.network(CASES["ddpmpp"])
    network.class_name = wrapper
    refused(imported, network, f"class={wrapper}: cannot be imported; allowed: EDMPrecond, Precond")


@pytest.mark.parametrize("part", ["_modules", "sigma_data"])
def test_a_network_without_its_parts_is_refused(imported, part):
    network = edm_format.network(CASES["ddpmpp"])
    del network.state[part]
    refused(imported, network, f"not laid out as EDM's networks are .*{part}")


def test_a_module_inside_itself_is_refused(imported):
    network = edm_format.network(CASES["ddpmpp"])
    container = network.state["_modules"]["model"].state["_modules"]["enc"]
    container._modules["16x16_conv"] = container
    refused(imported, network, "not laid out as EDM's networks are .*RecursionError")


@pytest.mark.parametrize("content", [{"G_ema": 1}, [], None, {"ema": {"weight": torch.ones(1)}}])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "net.pkl"
    path.write_bytes(edm_format.dumps(content))
    with pytest.raises(UserError, match="holds no network of EDM or EDM2 under the key ema"):
        main([str(path), "--out", str(tmp_path / "out.safetensors")])
    assert not (tmp_path / "out.safetensors").exists()


def test_the_same_pickle_again_returns_at_once_and_nothing_is_overwritten(imported, capsys):
    path = imported(edm_format.network(CASES["ddpmpp"]))
    before, said = path.stat().st_mtime_ns, capsys.readouterr().out
    assert said.startswith("net.safetensors: DDPMpp, 148,243 parameters, samples of 3x16x16, no classes; ")
    main(["net.pkl"])
    assert path.stat().st_mtime_ns == before and capsys.readouterr().out == said
    with pytest.raises(UserError, match=r"--out=net\.safetensors: is there already and holds something else"):
        imported(edm_format.network(CASES["ncsnpp"]))


def test_a_url_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = edm_format.dumps({"ema": edm_format.network(CASES["edm2"], torch.float16)})
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(content))
    main(["https://example.org/edm2/net.pkl?download=1"])
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert files.describe(tmp_path / "net.safetensors")["source"]["file"] == "net.pkl"


def test_a_url_that_does_not_answer_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"^http://localhost:9/a\.pkl: cannot be fetched .* fetch it where there is a network and give"
    ):
        main(["http://localhost:9/a.pkl"])
    with pytest.raises(UserError, match=r"^ftp:/+host/a\.pkl: no such file"):
        main(["ftp://host/a.pkl"])
    assert list(tmp_path.iterdir()) == []


def test_words_that_are_wrong():
    for words, reason in (
        (["a.pkl", "--out", "no/where.safetensors"], "--out=no/where.safetensors: its folder"),
        ([], "import: "),
    ):
        with pytest.raises(UserError, match=reason):
            main(words)


def test_the_lab_accepts_the_result(imported):
    """From Python; the verbs go by the same files."""
    flow = reflow_lab.load(imported(edm_format.network(CASES["adm_labels"])))
    assert flow.shape == (3, 16, 16) and flow.num_classes == 5 and flow.t_max == T_MAX
    images = reflow_lab.sample(flow, 3, nfe=2, label=torch.tensor([0, 4, 2]))
    assert images.shape == (3, 3, 16, 16) and images.isfinite().all()
