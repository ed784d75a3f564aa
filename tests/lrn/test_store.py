import hashlib
import json

import numpy as np
import pytest
import torch

from reflow_lab.data.sets import ImageSet
from reflow_lab.errors import UserError
from reflow_lab.lrn.store import PairStore, noise_check, own_check, pair_images, pair_labels, pair_noise
from reflow_lab.shards import encode, shard_name, write_manifest, write_shard

SHAPE, SEED = (1, 4, 4), 5
COUNTS = [4, 4, 2]


def images(n=12):
    pixels = torch.arange(n * 16).reshape(n, *SHAPE).to(torch.uint8)
    return ImageSet(pixels, torch.arange(n) % 3, "images")


def make(folder, kind="backward", dtype="float32", num_classes=0, flips=False):
    values = torch.linspace(-1, 1, 10 * 16).reshape(10, *SHAPE)
    shards = []
    for i, part in enumerate(values.split(4)):
        checksum = write_shard(folder / shard_name(i), tuple(part.shape), dtype, encode(part, dtype).split(3))
        shards.append({"file": shard_name(i), "count": len(part), "sha256": checksum})
    recipe = {"kind": kind, "half": "x0" if kind == "backward" else "x1", "count": 10, "shape": list(SHAPE), "seed": SEED}
    recipe |= {"num_classes": num_classes, "dtype": dtype, "flips": flips}
    check = own_check(recipe) if kind == "backward" else None
    write_manifest(folder, recipe | {"noise_check": check}, {"device": "cpu"}, shards)
    return PairStore(folder, images() if kind == "forward" else None), values


def test_backward_noise_is_regenerated_from_seed_and_index(tmp_path):
    store, values = make(tmp_path)
    indices = np.array([9, 0, 3, 4, 3])
    x0, x1, label, _ = store.read(indices)
    assert torch.equal(x0, values[torch.from_numpy(indices)]) and label is None
    assert torch.equal(x1, pair_noise(SEED, np.arange(10), SHAPE)[torch.from_numpy(indices)])
    assert len(store) == 10 and store.kind == "backward"
    again = PairStore(tmp_path).read(indices)
    assert torch.equal(again.x0, x0) and torch.equal(again.x1, x1)


def test_forward_images_are_the_data_sets(tmp_path):
    store, values = make(tmp_path, "forward", num_classes=3)
    x0, x1, label, _ = store.read(np.array([8, 1]))
    expected, labels = images().take(np.array([8, 1]))
    assert torch.equal(x0, expected) and torch.equal(label, labels) and torch.equal(x1, values[[8, 1]])
    (tmp_path / "unlabelled").mkdir()
    assert make(tmp_path / "unlabelled", "forward")[0].read(np.array([8])).label is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["backward", "forward"])
def test_a_batch_lies_where_the_images_lie(tmp_path, kind):
    store = make(tmp_path, kind, num_classes=3)[0]
    expected = store.read(np.array([8, 1]))
    found = PairStore(tmp_path, images().to("cuda")).read(np.array([8, 1]))
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cuda" and torch.equal(a.cpu(), b)


def test_forward_pairs_want_the_data_set(tmp_path):
    make(tmp_path, "forward")
    with pytest.raises(UserError, match="images=None: forward pairs refer to the data set"):
        PairStore(tmp_path).read(np.array([0]))


def test_labels_of_backward_pairs_are_uniform_and_keyed(tmp_path):
    store, _ = make(tmp_path, num_classes=10)
    labels = pair_labels(SEED, np.arange(20_000), 10)
    assert torch.equal(store.read(np.array([7, 2])).label, labels[[7, 2]])
    counts = torch.bincount(labels, minlength=10)
    assert len(counts) == 10 and (counts - 2000).abs().max() < 200


@pytest.mark.parametrize(("dtype", "bound"), [("uint8", 1 / 255 + 1e-6), ("float16", 2.0**-12 + 1e-9), ("float32", 0.0)])
def test_rounding_stays_within_half_a_step(tmp_path, dtype, bound):
    store, values = make(tmp_path, dtype=dtype)
    stored = store.stored(np.arange(10))
    assert stored.dtype == torch.float32 and (stored - values).abs().max() <= bound
    assert np.load(tmp_path / shard_name(0)).dtype == dtype


def test_other_noise_is_refused(tmp_path):
    make(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    noise = pair_noise(SEED, np.array([0, 5, 9]), SHAPE).flatten(1)[:, :4]
    assert manifest["noise_check"] == pytest.approx(noise.flatten().tolist())
    for place in (0, 5, 11):  # of the first pair, of the middle one, of the last
        other = [value + 0.01 * (i == place) for i, value in enumerate(manifest["noise_check"])]
        path.write_text(json.dumps(manifest | {"noise_check": other}))
        with pytest.raises(UserError, match=f"{tmp_path}: this machine regenerates other noise"):
            len(PairStore(tmp_path))
    assert noise_check(SEED, SHAPE, 10) != noise_check(SEED + 1, SHAPE, 10)


def test_a_truncated_missing_or_foreign_shard_is_named(tmp_path):
    make(tmp_path)
    path = tmp_path / shard_name(1)
    whole = path.read_bytes()
    for content in (whole[:-8], whole[:40], b"", b"something else entirely, not an array"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: missing or not a whole shard") as error:
            PairStore(tmp_path).read(np.array([5]))
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: missing or not a whole shard"):
        PairStore(tmp_path).read(np.array([5]))


def test_a_pickled_shard_is_not_opened(tmp_path):
    make(tmp_path)
    np.save(tmp_path / shard_name(0), np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a whole shard"):
        PairStore(tmp_path).read(np.array([0]))


def test_a_shard_of_another_length_is_named(tmp_path):
    make(tmp_path)
    write_shard(tmp_path / shard_name(2), (1, *SHAPE), "float32", [torch.zeros(1, *SHAPE)])
    with pytest.raises(UserError, match=r"shard-00002\.npy=1 of \(1, 4, 4\) float32: the manifest says 2 of"):
        PairStore(tmp_path).read(np.array([0]))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
        len(PairStore(tmp_path))


def test_the_manifest_lists_the_shards_with_their_hashes(tmp_path):
    store, _ = make(tmp_path)
    shards = store.manifest["shards"]
    assert [(s["file"], s["count"]) for s in shards] == [(shard_name(i), n) for i, n in enumerate(COUNTS)]
    assert [s["sha256"] for s in shards] == [hashlib.sha256((tmp_path / s["file"]).read_bytes()).hexdigest() for s in shards]


def test_forward_pairs_repeat_the_images_and_mirror_every_second_pass():
    pixels = torch.arange(3 * 16).reshape(3, *SHAPE).to(torch.uint8)
    held = ImageSet(pixels, torch.tensor([5, 6, 7]), "three")
    indices = np.array([0, 4, 8, 11, 3, 6])
    expected, labels = held.take(indices % 3)
    plain, plain_labels = pair_images(held, indices, flips=False)
    assert torch.equal(plain, expected) and torch.equal(plain_labels, labels)
    mirrored, _ = pair_images(held, indices, flips=True)
    passes = indices // 3 % 2 == 1
    assert torch.equal(mirrored[passes], expected[passes].flip(-1)) and torch.equal(mirrored[~passes], expected[~passes])
    assert passes.tolist() == [False, True, False, True, True, False] and not torch.equal(mirrored, expected)


def test_a_shard_of_another_shape_or_type_is_named(tmp_path):
    make(tmp_path)
    for other in (torch.zeros(4, 4, 4), torch.zeros(4, *SHAPE).double()):
        np.save(tmp_path / shard_name(0), other.numpy())
        with pytest.raises(UserError, match=r"shard-00000\.npy=4 of .*: the manifest says 4 of \(1, 4, 4\) float32"):
            PairStore(tmp_path).read(np.array([0]))


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_a_foreign_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json:"):
        len(PairStore(tmp_path))
