"""Rows on the disk by themselves; what a pair store adds is tested in lrn/."""

import json

import numpy as np
import pytest
import torch

from reflow_lab import filling
from reflow_lab.artifacts import artifact
from reflow_lab.errors import UserError
from reflow_lab.lrn import store
from reflow_lab.shards import ShardStore, read_manifest

CPU = torch.device("cpu")
ROWS = {"count": 7, "shape": [2], "shard_size": 3, "dtype": "float32"}
PAIRS = {"kind": "backward", "half": "x0", "num_classes": 0, "seed": 5, "flips": False}


def draw(indices):
    yield torch.from_numpy(np.stack([indices, indices**2], axis=1)).float()


@pytest.fixture
def made(tmp_path):
    found = artifact(tmp_path, "rows", 1, **ROWS)
    assert filling.fill(found, draw, filling.conditions(CPU), unit="rows", what="test", more={"also": 3})
    return found


def test_rows_come_as_asked_for_across_shards(made):
    held, indices = ShardStore(made.folder), np.array([6, 0, 3, 3, 2])
    assert len(held) == 7 and held.manifest["also"] == 3 and len(held.manifest["shards"]) == 3
    assert torch.equal(held.stored(indices), next(draw(indices)))
    assert held.stored(np.array([], dtype=np.int64)).shape == (0, 2)


def test_rows_are_no_pairs(made):
    with pytest.raises(UserError, match=r"manifest\.json: lacks flips, half, kind, noise_check, num_classes, seed; delete"):
        len(store.PairStore(made.folder))


@pytest.mark.parametrize("missing", ["count", "shards", "made_by"])
def test_a_manifest_without_what_all_have_is_refused(made, missing):
    path = made.folder / "manifest.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != missing}))
    with pytest.raises(UserError, match=rf"lacks {missing}; delete {made.folder}"):
        read_manifest(made.folder)


def test_pair_stores_are_named_and_laid_out_as_ever(tmp_path):
    """Stores that were made by earlier versions are found, and open: neither key nor file may change."""
    made = artifact(tmp_path, "pairs", 3, **ROWS, **PAIRS)
    assert made.key == "b112455d73680952" and store.fill(made, draw, filling.conditions(CPU))
    manifest = json.loads((made.folder / "manifest.json").read_text())
    assert {*manifest} == {*made.recipe, "made_by", "shards", "noise_check"} and len(manifest["noise_check"]) == 6
    sha256 = "894e83622ef53035e344ef3a642482e1b4f99a9278cfcfdbf1536bd45dd78053"
    assert manifest["shards"][2] == {"file": "shard-00002.npy", "count": 1, "sha256": sha256}
    names = {path.name for path in made.folder.iterdir() if not path.name.startswith(".")}
    about = {"manifest.json", "recipe.json", "made_by.json", "version.json", "done.json"}
    assert names == about | {f"shard-0000{i}.npy" for i in range(3)}
    indices = np.array([4])
    x0, x1, label, _ = store.PairStore(made.folder).read(indices)
    assert torch.equal(x0, next(draw(indices))) and torch.equal(x1, store.pair_noise(5, indices, (2,))) and label is None
