import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from reflow_lab.data.sets import to_uint8
from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX
from reflow_lab.inf import export
from reflow_lab.inf.grids import EDM, Sigmoid
from reflow_lab.inf.sampler import sample
from reflow_lab.inf.solvers import DPM, Adaptive, Euler, Heun, RFPlusPlus
from reflow_lab.networks.adm import ADM
from reflow_lab.networks.ddpmpp import DDPMpp
from reflow_lab.networks.edm2 import EDM2
from reflow_lab.networks.preconditioning import Preconditioned
from reflow_lab.networks.unet import UNet

SHAPE = (3, 8, 8)
WIDE = {"channels": 64, "multipliers": (1,), "num_blocks": 1, "attention_resolutions": (8,)}
NETWORKS = {
    "unet": partial(UNet, channels=8, multipliers=(1,)),
    "ddpmpp": partial(DDPMpp, **WIDE),
    "adm": partial(ADM, **WIDE),
    "edm2": partial(EDM2, **WIDE),
}


def velocity(name="unet", num_classes=0):
    """A tiny network with every path alive, which its initialisation is not."""
    made = Preconditioned(NETWORKS[name](3, 8, num_classes=num_classes), 0.5).eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5)
    return made


def program(made, **changed):
    how = {"solver": DPM(), "grid": Sigmoid(), "nfe": 3, "t_max": T_MAX} | changed
    return export.program(made, SHAPE, **how), how


def loaded(made, path):
    export.save(made, path, {"nfe": 3})
    return torch.export.load(path).module()


@pytest.mark.parametrize("solver", [Euler(), Heun(), DPM(), pytest.param(RFPlusPlus(), marks=pytest.mark.slow)], ids=repr)
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


@pytest.mark.parametrize("name", ["ddpmpp", pytest.param("adm", marks=pytest.mark.slow), "edm2"])
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
    program_, how = program(made, nfe=2)
    export.save(program_, tmp_path / "sampler.pt2", {"nfe": 2, "solver": "DPM"})
    words = [sys.executable, "-c", ALONE, tmp_path / "sampler.pt2", tmp_path / "images.pt"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == {"nfe": 2, "solver": "DPM"}
    torch.manual_seed(3)
    found = torch.load(tmp_path / "images.pt", weights_only=True)
    assert torch.equal(found, sample(made, torch.randn(4, *SHAPE), **how))


def test_steps_by_tolerance_cannot_be_written_out():
    with pytest.raises(UserError, match=r"^solver=Adaptive.*depend on the batch"):
        program(velocity(), solver=Adaptive())
