import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import reflow_lab
import tiny
from reflow_lab.artifacts import read_json
from reflow_lab.cli import main
from reflow_lab.data import autoencoder, encode
from reflow_lab.data.autoencoder import Codec
from reflow_lab.data.latents import Latents, LatentSet
from reflow_lab.data.sets import ImageSet
from reflow_lab.data.sources import decoded, has_pixels
from reflow_lab.data.zips import encode_png, write_archive
from reflow_lab.errors import UserError
from reflow_lab.evaluation import targets
from reflow_lab.lrn.couplings import IndependentPairs
from reflow_lab.noise import permutation

SIDE, FACTOR, NUM, KEPT = 64, 4, 204, 60
NET = ["net=unet_small", "net.network.channels=8", "net.network.num_classes=3", "precision=32-true", "training.num_heldout=2"]
NET += ["training.batch_size=8", "training.total_kimg=0.016"]
CLASSES = ("n00000001", "n00000002", "n00000003")


def pixels(seed: int) -> np.ndarray:
    rough = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(rough).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny autoencoder with random weights, and a folder of images laid out as ImageNet's."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `latents` is not installed")
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = diffusers.AutoencoderKL(block_out_channels=[4, 8, 8], norm_num_groups=4, latent_channels=4, **blocks)
    vae.save_pretrained(folder / "vae")
    for number in range(NUM):
        path = folder / "images" / CLASSES[number % 3] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(number)).save(path)
    return folder


def words(work: Path, out: Path, *more: str) -> list[str]:
    given = ["--source", work / "images", "--autoencoder", work / "vae", "--resolution", SIDE, "--out", out, "--workers", 1]
    return ["data", "imagenet512", *map(str, given), "--originals", str(KEPT), *more]


@pytest.fixture(scope="module")
def made(work):
    assert main(words(work, work / "made")) == 0
    return work / "made"


def source(work: Path, path: Path, **more) -> Latents:
    how = {"resolution": SIDE // FACTOR, "num_classes": 3, "mean": [0.5, -0.5, 0.1, 0.0], "std": [0.5, 1.0, 2.0, 0.25]}
    return Latents(str(path), str(work / "vae"), **{**how, **more})


def refused(capsys, command: list[str]) -> str:
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reflow-lab: ")]
    return line.removeprefix("reflow-lab: ")


def in_order() -> list[tuple[int, int]]:
    """(seed of the picture, class) by row, as the folder has them: sorted by name, then in the fixed random order."""
    names = sorted((number % 3, number) for number in range(NUM))
    return [(names[row][1], names[row][0]) for row in permutation(0, "latents", NUM)]


def test_rows_are_the_encoders_means_and_deviations(work, made):
    """Against diffusers called by hand: pixels in [0, 1], moments as float16, the first originals as bytes, classes."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae")
    rows = in_order()
    stored = np.load(made / "latents.npy")
    assert stored.shape == (NUM, 8, 16, 16) and stored.dtype == np.float16
    for row in (0, 11, NUM - 1):
        image = torch.from_numpy(pixels(rows[row][0]).copy()).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            posterior = vae.encode(image).latent_dist
        expected = torch.cat((posterior.mean, posterior.logvar.mul(0.5).exp()), dim=1)[0]
        assert torch.allclose(torch.from_numpy(stored[row]).float(), expected, rtol=2e-3, atol=2e-3)
        assert expected.std() > 0.01
    originals = np.load(made / "originals.npy")
    assert originals.shape == (KEPT, 3, SIDE, SIDE)
    assert all((originals[row] == pixels(rows[row][0]).transpose(2, 0, 1)).all() for row in range(KEPT))
    assert np.load(made / "labels.npy").tolist() == [label for _, label in rows]


def test_a_sample_is_mean_plus_deviation_times_noise(work, made):
    """(mean + std z - data.mean) / data.std / 2, z standard normal: many draws of one image, whose law is known."""
    held = source(work, made).split("train")
    assert isinstance(held, LatentSet) and held.shape == (4, 16, 16) and len(held) == NUM
    draws, _ = held.drawn(np.zeros(4000, np.int64), 7, np.arange(4000))
    mean, std = torch.from_numpy(np.load(made / "latents.npy")[0]).float().chunk(2)
    shift = torch.tensor([0.5, -0.5, 0.1, 0.0])[:, None, None]
    scale = torch.tensor([0.5, 1.0, 2.0, 0.25])[:, None, None]
    z = (draws * 2 * scale + shift - mean) / std
    assert z.mean().abs() < 4 / (4000 * 1024) ** 0.5
    assert (z.std() - 1).abs() < 0.002
    assert (z.mean(0).abs() < 6 / 4000**0.5).all()
    assert torch.allclose(held.to_float(held.held[:1])[0], (mean - shift) / scale / 2, atol=1e-6)


def test_training_draws_anew_and_everything_else_the_same(work, made):
    held = source(work, made).split("train")
    rows = np.array([3, 5])
    assert torch.equal(held.take(rows)[0], held.take(torch.tensor([3, 5]))[0])
    assert torch.equal(held.take(rows)[0][1:], held.take(rows[1:])[0])
    pairs = IndependentPairs(held, seed=0)
    first, again, later = pairs.read(rows, 0), pairs.read(rows, 0), pairs.read(rows, 2)
    assert torch.equal(first.x0, again.x0) and not torch.equal(first.x0, later.x0)
    assert torch.equal(first.label, held.labels[rows])
    noise = (first.x0 - held.to_float(held.held[rows])).flatten()
    assert abs(torch.corrcoef(torch.stack((noise, first.x1.flatten())))[0, 1]) < 0.1  # latent's noise is not the flow's


def test_splits(work, made):
    """Reference are originals; a floor is cut off the end, or is another folder."""
    whole, cut = source(work, made), source(work, made, train_fraction=0.75)
    assert [len(whole.split(name)) for name in ("train", "reference", "floor")] == [204, 60, 0]
    assert [len(cut.split(name)) for name in ("train", "reference", "floor")] == [153, 60, 51]
    assert isinstance(cut.split("reference"), ImageSet) and isinstance(cut.split("floor"), LatentSet)
    assert torch.equal(cut.split("floor").held, whole.split("train").held[153:])
    other = source(work, made, floor=str(made))
    assert len(other.split("floor")) == NUM
    hashes = {split.content_hash for split in (*map(whole.split, ("train", "floor")), *map(cut.split, ("train", "floor")))}
    assert len(hashes) == 4
    assert source(work, made, std=[1, 1, 1, 1]).split("train").content_hash not in hashes
    assert source(work, made, num_classes=0).split("train").labels is None


def test_decode_undoes_the_standardisation(work, made):
    """Against diffusers by hand, from raw latents; in more than one batch; images are passed through."""
    from diffusers import AutoencoderKL

    held = source(work, made)
    latents, _ = held.split("train").take(np.arange(autoencoder.BATCH + 2))
    raw = held.codec.raw(latents)
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(work / "vae").decode(raw).sample.clamp(0, 1) * 2 - 1
    images = decoded(held, latents)
    assert images.shape == (10, 3, SIDE, SIDE) and torch.allclose(images, expected, atol=1e-5) and images.std() > 0.01
    assert torch.allclose(held.codec.standardised(raw), latents, atol=1e-5)
    assert decoded(held, images) is images and not has_pixels(held)


def test_an_archive_gives_the_same_latents(work, made, tmp_path):
    """A zip in EDM's format, as its tool makes of ImageNet at 512 pixels; its classes are those of dataset.json."""
    names = sorted((number % 3, number) for number in range(NUM))
    write_archive(tmp_path / "x.zip", [encode_png(pixels(n).transpose(2, 0, 1)) for _, n in names], [c for c, _ in names])
    assert main([*words(work, tmp_path / "made"), "--source", str(tmp_path / "x.zip")]) == 0
    for file in ("latents.npy", "labels.npy", "originals.npy"):
        assert (tmp_path / "made" / file).read_bytes() == (made / file).read_bytes()


def test_an_interrupted_command_goes_on(work, made, tmp_path, monkeypatch, capsys):
    """What was saved is not encoded again, and the files come out the same."""
    monkeypatch.setattr("reflow_lab.data.prepare.CHUNK", 4)
    monkeypatch.setattr(encode, "SAVE_EVERY", 8)
    original, seen = autoencoder.moments, []

    def moments(model, images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return original(model, images)

    monkeypatch.setattr(autoencoder, "moments", moments)
    assert main(words(work, tmp_path / "made")) == 130
    assert read_json(tmp_path / "made" / encode.PROGRESS) == {"row": 12} and not (tmp_path / "made" / "latents.npy").exists()
    with pytest.raises(UserError, match=r"data\.path=.*is not finished"):
        source(work, tmp_path / "made").split("train")
    (tmp_path / "made" / encode.PROGRESS).write_text('{"row": 8}')  # as if killed outright: what came after is written again
    count = []
    monkeypatch.setattr(autoencoder, "moments", lambda model, images: count.append(len(images)) or original(model, images))
    assert main(words(work, tmp_path / "made")) == 0 and sum(count) == NUM - 8
    for file in ("latents.npy", "labels.npy", "originals.npy"):
        assert (tmp_path / "made" / file).read_bytes() == (made / file).read_bytes()
    assert main(words(work, tmp_path / "made")) == 0 and sum(count) == NUM - 8  # done: nothing more to do
    capsys.readouterr()
    assert "originals: 60 there, 3 here" in refused(capsys, words(work, tmp_path / "made", "--originals", "3"))


def test_a_command_that_died_at_the_end_goes_on(work, made, tmp_path, monkeypatch, capsys):
    """The files have their names, but the mark that they are whole is missing; or what was saved has been lost."""

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("reflow_lab.artifacts.Artifact.finish", killed)
        assert main(words(work, tmp_path / "made")) == 130
    assert (tmp_path / "made" / "latents.npy").exists()
    assert main(words(work, tmp_path / "made")) == 0
    assert (tmp_path / "made" / "latents.npy").read_bytes() == (made / "latents.npy").read_bytes()
    capsys.readouterr()
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "recipe.json").write_text((made / "recipe.json").read_text())
    (tmp_path / "lost" / encode.PROGRESS).write_text('{"row": 8}')
    assert "is shorter than what was saved" in refused(capsys, words(work, tmp_path / "lost"))


def test_mistakes_are_one_line(work, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    line = refused(capsys, words(work, out, "--autoencoder", str(tmp_path / "nowhere")))
    assert line.startswith(f"--autoencoder={tmp_path / 'nowhere'}: no such folder; must be a folder that AutoencoderKL")
    line = refused(capsys, words(work, out, "--autoencoder", str(work / "images")))
    assert line.startswith(f"--autoencoder={work / 'images'}: not a readable autoencoder")
    assert "--resolution=66: is no multiple of 4" in refused(capsys, words(work, out, "--resolution", "66"))
    assert "--batch-size=0: must be at least 1" in refused(capsys, words(work, out, "--batch-size", "0"))
    assert "--autoencoder=x: is for imagenet512" in refused(capsys, ["data", "ffhq", "--autoencoder", "x"])
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    assert "is there already and holds something else" in refused(capsys, words(work, tmp_path / "mine"))
    for problem, more in {
        r"data\.path=.*holds latents of \[4, 16, 16\], data\.channels and data\.resolution say \[4, 64, 64\]": {"resolution": 64},
        r"data\.num_classes=1000: .* has 3 classes": {"num_classes": 1000},
        r"data\.path=.*nothing: no latents there": {"path": tmp_path / "nothing"},
        r"data\.train_fraction=0\.001: leaves no latent": {"train_fraction": 0.001},
    }.items():
        with pytest.raises(UserError, match=problem):
            source(work, **{"path": made, **more}).split("train")
    for problem, more in {
        r"data\.mean=\[1\]: must be one number for each of data\.channels=4": {"mean": [1]},
        r"data\.std=.*must be positive": {"std": [1, 1, 1, 0]},
        r"data\.train_fraction=0\.5: must be 1 where": {"train_fraction": 0.5, "floor": "x"},
    }.items():
        with pytest.raises(UserError, match=problem):
            source(work, made, **more)


def test_another_autoencoder_does_not_decode(work, made, tmp_path):
    """One of other weights, though of the same shapes; also by Python, from a weight file's description."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(work / "vae")
    vae.decoder.conv_out.bias.data += 1
    vae.save_pretrained(tmp_path / "vae")
    held = source(work, made)
    held.autoencoder = str(tmp_path / "vae")
    with pytest.raises(UserError, match=r"data\.autoencoder=.*vae: has other weights"):
        held.decode(held.split("train").take(np.arange(1))[0])
    copy = Codec.described(json.loads(json.dumps(source(work, made).codec.about)), str(tmp_path / "vae"))
    with pytest.raises(UserError, match="has other weights"):
        copy.decode(torch.zeros(1, 4, 16, 16))


def test_without_diffusers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"data\.autoencoder=.*: latents need diffusers: pip install 'reflow_lab\[latents\]'"):
        autoencoder.load(str(tmp_path))


def test_edm2s_numbers():
    """(5.81, ...) and (4.17, ...) by channel, to mean 0 and standard deviation 0.5."""
    raw = torch.tensor([5.81 + 4.17, 3.25 - 4.62, 0.12, -2.15 + 2 * 3.28])[None, :, None, None]
    assert torch.allclose(Codec().standardised(raw).flatten(), torch.tensor([0.5, -0.5, 0.0, 1.0]), atol=1e-6)


def test_codecs_compare():
    one = Codec("here", weights="a")
    assert one.suits(Codec("there", weights="a")) and one.suits(Codec("there")) and Codec().suits(one)
    assert not one.suits(Codec("here", weights="b")) and not one.suits(Codec("here", std=(1, 1, 1, 1), weights="a"))


@pytest.mark.parametrize("kept", [KEPT, NUM])
def test_only_a_whole_set_makes_a_fid(work, tmp_path, monkeypatch, kept):
    """50,000 samples in Inception's features against all kept originals are a FID if no image was left out."""
    assert main(words(work, tmp_path / "made", "--originals", str(kept))) == 0
    published = SimpleNamespace(name="inception", settings={"rounding": True})
    monkeypatch.setattr(targets, "feature_network", lambda _: published)
    data = ["experiment=imagenet512", f"data.path={tmp_path / 'made'}", "data.resolution=16", "data.num_classes=3"]
    cfg = tiny.composed("evaluate", *data, "evaluation.num_images=50000", "evaluation.reference=all")
    assert targets.distance_name(cfg) == ("fid" if kept == NUM else "fd_inception")


@pytest.fixture(scope="module")
def lab(work, made):
    """A base flow of a kilo-image on these latents."""
    outputs = work / "outputs"
    numbers = {"mean": "[0.5,-0.5,0.1,0]", "std": "[0.5,1,2,0.25]"}
    data = {"path": made, "autoencoder": work / "vae", "resolution": 16, "num_classes": 3, "train_fraction": 0.75, **numbers}
    common = [*(f"data.{key}={value}" for key, value in data.items()), f"outputs={outputs}", "trainer=cpu", "debug=tiny"]
    net = ["net=unet_small", "net.network.channels=8", "net.network.num_classes=3", "precision=32-true", "training.num_heldout=2"]
    assert (
        main(["train", "experiment=imagenet512_base", *common, *net, "training.batch_size=8", "training.total_kimg=0.016"]) == 0
    )
    (run,) = (outputs / "train").iterdir()
    return common, run


def test_a_flow_of_latents_trains_and_samples_images(work, lab, tmp_path, capsys):
    _, run = lab
    assert Image.open(run / "few_step.png").size == (2 * SIDE, SIDE)
    flow = reflow_lab.load(run)
    assert flow.shape == (4, 16, 16) and flow.description["latents"]["autoencoder"] == str(work / "vae")
    assert flow.decode(reflow_lab.sample(flow, 3, nfe=1)).shape == (3, 3, SIDE, SIDE)
    draw = ["sample", f"run={run}", "num_images=4", "nfe=2", "trainer=cpu"]
    assert main([*draw, f"out={tmp_path / 'x.png'}"]) == 0
    assert Image.open(tmp_path / "x.png").size == (2 * SIDE, 2 * SIDE)
    (work / "vae").rename(work / "elsewhere")  # as on another machine
    try:
        autoencoder.load.cache_clear()
        assert "data.autoencoder=" in refused(capsys, [*draw, f"out={tmp_path / 'y.npz'}"])
        assert main([*draw, f"out={tmp_path / 'y.npz'}", f"autoencoder={work / 'elsewhere'}"]) == 0
    finally:
        (work / "elsewhere").rename(work / "vae")
    samples = np.load(tmp_path / "y.npz")["samples"]
    assert samples.shape == (4, SIDE, SIDE, 3) and samples.dtype == np.uint8 and samples.std() > 0


def test_a_flow_of_latents_is_measured_as_images(lab, capsys):
    """Reference: original images. Floor: held-out latents, decoded. Pairs of a ReFlow are latents."""
    common, run = lab
    words = ["evaluate", "experiment=imagenet512", *common, f"run={run}", f"teacher.path={run}", "precision=32-true", "nfe=2"]
    few = ["evaluation.num_images=50", "evaluation.features.resolution=32", "evaluation.straightness.num_images=2"]
    assert main([*words, *few]) == 0
    (folder,) = Path(run).parents[1].joinpath("evaluate").iterdir()
    found = read_json(folder / "metrics.json")
    assert np.load(folder / "samples.npy").shape == (50, 3, SIDE, SIDE)
    assert found["fd_lite0"] > 0 and found["floor"] > 0 and found["protocol"]["reference"]["num_images"] == 50
    (store,) = Path(run).parents[1].joinpath("pairs").iterdir()
    assert read_json(store / "manifest.json")["shape"] == [4, 16, 16]


def test_what_latents_cannot(lab, capsys):
    common, run = lab
    words = [*common, f"teacher.path={run}", "precision=32-true"]
    pairs = ["pairs", "experiment=imagenet512", *words]
    assert "pairs.dtype=uint8: holds images only" in refused(capsys, [*pairs, "pairs.dtype=uint8"])
    assert "pairs.flips=True: points have no left and right, latents" in refused(capsys, [*pairs, "pairs.flips=true"])
    gone = ["train", "experiment=imagenet512_base", *common, *NET, "data.autoencoder=/nowhere", "seed=1"]
    assert refused(capsys, gone).startswith("data.autoencoder=/nowhere: no such folder")  # though only pictures need it
    flip = ["train", "experiment=imagenet512_base", *common, "training.flips=true"]
    assert "training.flips=True: is for images" in refused(capsys, flip)
    other = [*pairs, "data.std=[1,1,1,1]"]
    assert f"teacher.path={run}" in (line := refused(capsys, other)) and "of another data.mean or data.std" in line
    look = ["inspect", "experiment=imagenet512", *words, f"run={run}"]
    assert "copies are found among images" in refused(capsys, look)
