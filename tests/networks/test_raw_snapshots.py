"""EDM2's raw snapshots, as published: averages of an original network by name, which become one average and a teacher here."""

import edm_format
import filled
import numpy as np
import pytest
import torch
from PIL import Image

from reflow_lab.errors import UserError
from reflow_lab.networks import files
from reflow_lab.training.posthoc import main
from reflow_lab.training.power_ema import Average, weights
from reflow_lab.training.train import train
from tiny import composed

CASE = edm_format.original("edm2")[0]["edm2"]
KIMG, WIDTHS, IMAGES = (16777, 33554, 50331, 67108), (0.05, 0.1), [2**24 * k for k in range(1, 5)]
FIXED = ("unet.emb_fourier.freqs", "unet.emb_fourier.phases")


def value(k, name, shape):
    """A tensor of snapshot k; what is no parameter is the same in all."""
    made = filled.weight(name, shape)
    return made if name in FIXED else made + 0.1 * filled.drawn(f"{name}/{k}", shape)


@pytest.fixture(scope="module")
def contents():
    """Eight snapshots at float16, by name: edm2-img16-t-KIMG-SIGMA.pkl."""
    made = {}
    for k, (kimg, width) in enumerate((kimg, width) for kimg in KIMG for width in WIDTHS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edm_format, "tensor_of", lambda name, shape, k=k: value(k, name, shape))
            network = edm_format.network(CASE, torch.float16)
        made[f"edm2-img16-t-{kimg:07d}-{width:.3f}.pkl"] = edm_format.dumps({"ema": network})
    return made


@pytest.fixture
def folder(contents, tmp_path, monkeypatch):
    """Their folder; the working folder, around it, has to stay empty otherwise."""
    monkeypatch.chdir(tmp_path)
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, content in contents.items():
        (raw / name).write_bytes(content)
    return raw


def test_the_average_is_the_weighted_sum_of_the_pickles(folder):
    main([str(folder), "--sigma-rel", "0.075"])
    made = folder.parent / "edm2-img16-t-0067108-0.075.safetensors"
    assert sorted(folder.parent.iterdir()) == [made, folder]  # the code in the pickles would have made a file
    row = weights([Average(2**26, 0.075)], [Average(images, width) for images in IMAGES for width in WIDTHS])[0]
    found, about = files.read_state(made), files.describe(made)
    for name, shape in CASE["state"].items():
        if not name.startswith("unet.") or name.endswith("resample_filter"):
            continue
        stored = [value(k, name, shape).half().double() for k in range(8)]
        expected = stored[0] if name in FIXED else sum(w * tensor for w, tensor in zip(row, stored, strict=True))
        tensor = found.pop(name.replace("unet.", "network."))
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert not found and about["kimg"] == 2**26 / 1000 and about["shape"] == [3, 16, 16]


def test_it_teaches(folder, tmp_path):
    """A ReFlow of the same network from pairs that the average draws."""
    images = tmp_path / "images"
    images.mkdir()
    for k in range(20):
        noise = filled.drawn(f"image{k}", (16, 16, 3)).clamp(-2, 2).numpy()
        Image.fromarray(((noise + 2) * 60).astype(np.uint8)).save(images / f"{k}.png")
    main([str(folder), "--sigma-rel", "0.075", "--kimg", "67108", "--out", "teacher.safetensors"])
    data = ["data=folder", f"data.path={images}", "data.resolution=16", f"outputs={tmp_path / 'outputs'}"]
    drawn = ["pairs.num_backward=16", "pairs.nfe=3", "pairs.batch_size=8", "pairs.shard_size=8"]
    sizes = ["training.batch_size=4", "training.num_heldout=4", "training.total_kimg=0.008", "lrn=baseline"]
    words = [
        "~experiment",
        "trainer=cpu",
        "net=teacher",
        "teacher=run",
        "teacher.path=teacher.safetensors",
        *data,
        *drawn,
        *sizes,
    ]
    student = files.load(files.find(train(composed("train", *words)), "raw")).state_dict()
    teacher = files.load(tmp_path / "teacher.safetensors").state_dict()
    moved = {name for name in teacher if not torch.equal(student[name], teacher[name])}
    assert "network.out_gain" in moved and not any("emb_fourier" in name for name in moved)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("network.pkl", "source=.*/network.pkl: cannot be placed: a snapshot of EDM2 is named PREFIX-KIMG-SIGMA.pkl"),
        ("edm2-img16-t-0016777-0.100-copy.pkl", "cannot be placed"),
        ("edm2-img16-t-0016777-0.400.pkl", "no average has width 0.4 after 16777216 images"),
        ("edm2-img16-u-0083886-0.050.pkl", "is of edm2-img16-u, but .* is of edm2-img16-t: one training has to be behind all"),
        ("edm2-img16-t-0050331-0.075.pkl", r"0050331-0\.075\.pkl: not a whole pickle of EDM or EDM2"),
    ],
)
def test_what_does_not_belong_there_is_named(folder, name, reason):
    (folder / name).write_bytes(b"garbage")
    with pytest.raises(UserError, match=reason) as error:
        main([str(folder), "--sigma-rel", "0.075"])
    assert "\n" not in str(error.value) and list(folder.parent.iterdir()) == [folder]


def test_another_network_among_them_is_named(folder):
    other = edm_format.original("edm")[0]["ddpmpp"]
    (folder / "edm2-img16-t-0050331-0.075.pkl").write_bytes(edm_format.dumps({"ema": edm_format.network(other)}))
    with pytest.raises(UserError, match=r"0050331-0\.075\.pkl: belongs to another network than .*0016777-0\.050\.pkl"):
        main([str(folder), "--sigma-rel", "0.075"])
