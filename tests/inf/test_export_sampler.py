import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from reflow_lab.cli import main
from reflow_lab.data.sets import to_uint8
from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX
from reflow_lab.inf import export
from reflow_lab.inf.grids import EDM, Sigmoid, Uniform
from reflow_lab.inf.guidance import Guided
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import DPM, Adaptive, Euler, FlowMap, Heun, RFPlusPlus
from reflow_lab.networks import files
from reflow_lab.networks.adm import ADM
from reflow_lab.networks.ddpmpp import DDPMpp
from reflow_lab.networks.edm2 import EDM2
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.networks.unet import UNet

SHAPE = (3, 8, 8)
PRECONDITIONED = {"_target_": "reflow_lab.networks.preconditioning.Preconditioned", "sigma_data": 0.5}
WIDE = {"channels": 64, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": (8,)}
NETWORKS = {
    "unet": partial(UNet, channels=8, multipliers=(1,)),
    "ddpmpp": partial(DDPMpp, **WIDE),
    "adm": partial(ADM, **WIDE),
    "edm2": partial(EDM2, **WIDE),
}


def velocity(name="unet", num_classes=0, jumps=False):
    """A tiny network with every path alive, which its initialisation is not."""
    made = Preconditioned(NETWORKS[name](3, 8, num_classes=num_classes, jumps=jumps), 0.5).eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return made


def program(made, **changed):
    how = {"solver": DPM(), "grid": Sigmoid(), "nfe": 3, "t_max": T_MAX} | changed
    return export.program(made, SHAPE, **how), how


def loaded(made, path):
    export.save(made, path, {"nfe": 3})
    return torch.export.load(path).module()


@pytest.mark.parametrize("solver", [Heun(), DPM(), pytest.param(RFPlusPlus(), marks=pytest.mark.slow)], ids=repr)
def test_the_images_are_the_samplers_to_the_bit_in_batches_of_any_size(solver, tmp_path):
    made = velocity()
    program_, how = program(made, solver=solver)
    again = loaded(program_, tmp_path / "sampler.pt2")
    for num in (1, 2, 5):
        x1 = torch.randn(num, *SHAPE)
        expected = sample(made, x1, **how)
        assert expected.std() > 0.1
        with torch.inference_mode():
            assert torch.equal(again(x1), expected)


@pytest.mark.parametrize("name", ["edm2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddpmpp", "adm"))])
def test_other_networks_and_labels(name, tmp_path):
    made = velocity(name, num_classes=4)
    program_, how = program(made, num_classes=4, grid=EDM(), nfe=1, as_uint8=True)
    x1, label = torch.randn(3, *SHAPE), torch.tensor([0, 3, 1])
    del how["num_classes"], how["as_uint8"]
    found = loaded(program_, tmp_path / "sampler.pt2")(x1, label)
    expected = [to_uint8(sample(made, x1, label=y, **how)) for y in (label, label.flip(0))]
    assert found.dtype == torch.uint8 and torch.equal(found, expected[0])
    assert not torch.equal(found, expected[1])


ALONE = """
import sys, torch
extra = {"protocol.json": ""}
sampler = torch.export.load(sys.argv[1], extra_files=extra).module()
torch.manual_seed(3)
torch.save(sampler(torch.randn(4, 3, 8, 8)), sys.argv[2])
assert not [name for name in sys.modules if name.startswith("reflow_lab")]
print(extra["protocol.json"])
"""


def test_torch_alone_runs_it(tmp_path):
    made = velocity()
    program_, how = program(made, solver=Euler(), nfe=3)
    export.save(program_, tmp_path / "sampler.pt2", {"nfe": 3, "solver": "Euler"})
    words = [sys.executable, "-c", ALONE, tmp_path / "sampler.pt2", tmp_path / "images.pt"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == {"nfe": 3, "solver": "Euler"}
    torch.manual_seed(3)
    found = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(found, sample(made, torch.randn(4, *SHAPE), **how))


def test_the_jumps_of_a_flow_map(tmp_path):
    made = velocity(jumps=True)
    program_, how = program(made, solver=FlowMap(lam_guid=2), grid=Uniform())
    x1 = torch.randn(3, *SHAPE)
    expected = sample(made, x1, **how)
    assert not torch.equal(expected, sample(made, x1, **how | {"solver": Euler()}))
    with torch.inference_mode():
        assert torch.equal(loaded(program_, tmp_path / "sampler.pt2")(x1), expected)


def test_fresh_noise_cannot_be_written_out():
    with pytest.raises(UserError, match=r"^solver=FlowMap.*draws noise in every step"):
        program(velocity(jumps=True), solver=FlowMap(gamma=0.5))


def test_steps_by_tolerance_cannot_be_written_out():
    with pytest.raises(UserError, match=r"^solver=Adaptive.*depend on the batch"):
        program(velocity(), solver=Adaptive())


def weight_file(path, num_classes=0, **more):
    net = {"_target_": "reflow_lab.networks.unet.UNet", "in_channels": 3, "resolution": 8, "channels": 8, "multipliers": [1]}
    net = {**PRECONDITIONED, "network": {**net, "num_classes": num_classes}}
    description = {"net": net, "shape": [3, 8, 8], "num_classes": num_classes, "t_max": 0.9, "label_dropout": 0.1, **more}
    files.save(velocity(num_classes=num_classes), path, description)
    return path


@pytest.fixture
def run(tmp_path, capsys):
    """Export a tiny flow by the command line; returns the status, what was said and the file."""

    def exported(*words, num_classes=0):
        source = weight_file(tmp_path / "flow.safetensors", num_classes)
        status = main(["export", str(source), "--out", str(tmp_path / "out.pt2"), *words])
        said = capsys.readouterr()
        return status, said.out + said.err, tmp_path / "out.pt2"

    return exported


def test_from_the_command_line_with_its_protocol(run, tmp_path):
    status, said, out = run("--sampler", "nfe=3", "inf/solver=heun", "inf/grid=uniform", "--uint8")
    assert status == 0 and "3 NFE; its images differ from the sampler's by at most 0" in said and "x1 noise (n, 3, 8, 8)" in said
    extra = {export.PROTOCOL: ""}
    found = torch.export.load(out, extra_files=extra).module()
    about = json.loads(extra[export.PROTOCOL])
    assert (about["nfe"], about["solver"], about["images"], about["t_max"]) == (3, "Heun()", "uint8", 0.9)
    assert about["times"] == Uniform()(2, 0.9).tolist()
    x1, flow = torch.randn(4, *SHAPE), files.load(tmp_path / "flow.safetensors")
    assert torch.equal(found(x1), to_uint8(sample(flow, x1, solver=Heun(), grid=Uniform(), nfe=3, t_max=0.9)))


def test_guidance_is_in_the_program(run, tmp_path):
    status, said, out = run("nfe=1", "inf/guidance=cfg", "inf.guidance.weight=2", "--sampler", num_classes=4)
    assert status == 0 and "module()(x1, label)" in said
    x1, label = torch.randn(3, *SHAPE), torch.tensor([2, 0, 3])
    guided = Guided(files.load(tmp_path / "flow.safetensors"), None, weight=2)
    how = {"solver": DPM(), "grid": Sigmoid(), "nfe": 1, "t_max": 0.9}
    torch.testing.assert_close(torch.export.load(out).module()(x1, label), sample(guided, x1, label=label, **how))


MISTAKES = {
    "nfe=0": "nfe=0: an integer of at least 1",
    "inf.solver.q=3": "inf.solver.q=3: no such key",
    "inf/solver=nope": "inf/solver=nope: no such member",
    "inf/solver=adaptive": "its steps depend on the batch",
    "profile=raw": "--sampler=profile=raw: a sampler is told nfe, t_max and inf",
    "inf/solver=flow_map": "needs a flow map",
    "inf/guidance=cfg": "this flow is unconditional",
    "--dtype float16": "--dtype=float16: is of weights",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(run, mistake):
    status, said, out = run("--sampler", *mistake.split())
    assert status == 2 and MISTAKES[mistake] in said and len(said.splitlines()) == 1
    assert not out.exists()


def test_an_interval_of_guidance_cannot_be_written_out(run):
    status, said, _ = run("--sampler", "inf/guidance=cfg", "inf.guidance.high=0.8", num_classes=4)
    assert status == 2 and "cannot be written out; low=0 and high=1 can" in said


@pytest.mark.parametrize("words", [["nfe=4"], ["--uint8"]])
def test_weights_take_no_words_of_a_sampler(run, words):
    status, said, _ = run(*words)
    assert status == 2 and f"export={words[0]}: is for --sampler" in said
