"""Folders of pairs: killed and made again, in a place of one's own, and what else may lie there."""

import multiprocessing

import numpy as np
import pytest
import torch

from reflow_lab import parts
from reflow_lab.errors import UserError
from reflow_lab.lrn import pairs
from toy import config, teacher_file

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["reflow_lab.lrn.pairs", "reflow_lab.training.train", "toy"])


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("finished", [False, True])
def test_a_range_beyond_the_shards_is_refused(tmp_path, finished):
    words = ["teacher=run", f"teacher.path={teacher_file(tmp_path / 'teacher.safetensors')}"]
    if finished:
        pairs.pairs(config("pairs", tmp_path, *words))
    with pytest.raises(UserError, match=r"pairs\.shards=2:4: the store has the shards 0:3"):
        pairs.pairs(config("pairs", tmp_path, *words, "pairs.shards='2:4'"))
    assert pairs.pairs(config("pairs", tmp_path, *words, "pairs.shards='2:3'")).exists()


def make_toy(outputs, teacher):
    torch.set_num_threads(1)
    pairs.pairs(config("pairs", outputs, "teacher=run", f"teacher.path={teacher}", "pairs.num_backward=960", "pairs.nfe=99"))


def test_the_verb_killed_and_restarted_makes_the_same_store(tmp_path):
    teacher = teacher_file(tmp_path / "teacher.safetensors", exact=False)
    rng, killed = np.random.default_rng(1), 0
    for _ in range(4):
        process = processes.Process(target=make_toy, args=(tmp_path / "killed", teacher))
        process.start()
        process.join(rng.uniform(0.1, 0.5))
        killed += process.is_alive()
        process.kill()
        process.join()
    make_toy(tmp_path / "killed", teacher)
    make_toy(tmp_path / "whole", teacher)
    (a,), (b,) = (list((tmp_path / name / "pairs").iterdir()) for name in ("killed", "whole"))
    assert killed and a.name == b.name and files_of(a) == files_of(b) and len(files_of(a)) == 24 + 5


def test_a_folder_of_ones_own_and_what_else_lies_in_it(tmp_path):
    teacher = teacher_file(tmp_path / "teacher.safetensors")
    other = teacher_file(tmp_path / "other.safetensors", exact=False)
    words = ["teacher=run", f"teacher.path={teacher}", f"pairs.folder={tmp_path / 'mine'}"]
    folder = pairs.pairs(config("pairs", tmp_path / "outputs", *words))
    assert folder == tmp_path / "mine" / "backward" and not (tmp_path / "outputs").exists()
    assert pairs.pairs(config("pairs", tmp_path / "outputs", *words)) == folder
    hashes = [parts.teacher(config("pairs", tmp_path, "teacher=run", f"teacher.path={path}")).hash for path in (teacher, other)]
    cases = {
        f"teacher.path={other}": f"teacher: {hashes[0]} there, {hashes[1]} here",
        "pairs.nfe=11": "nfe: 9 there, 11 here",
        "pairs.num_backward=97": "count: 96 there, 97 here",
    }
    for override, said in cases.items():
        with pytest.raises(UserError, match=rf"{folder}: holds something else: {said}"):
            pairs.pairs(config("pairs", tmp_path / "outputs", *words, override))
    cfg = config("pairs", tmp_path / "outputs", *words)
    assert pairs.ensure(cfg, "backward", num_pairs=8, seed=3).folder.parent == tmp_path / "outputs" / "pairs"


def test_a_store_of_another_shape_is_refused(tmp_path):
    words = ["teacher=run", f"teacher.path={teacher_file(tmp_path / 'teacher.safetensors')}", f"pairs.folder={tmp_path / 'mine'}"]
    folder = pairs.pairs(config("pairs", tmp_path, *words))
    wide = ["data.dim=3", f"pairs.folder={tmp_path / 'mine'}"]
    three = config("pairs", tmp_path, *wide, "teacher=run", f"teacher.path={wide_teacher(tmp_path)}")
    with pytest.raises(UserError, match=rf"{folder}: holds something else: shape: \[2\] there, \[3\] here"):
        pairs.pairs(three)


def wide_teacher(tmp_path):
    from hydra.utils import instantiate

    from reflow_lab.networks import files

    cfg = config("train", tmp_path, "teacher=none", "data.dim=3")
    path = tmp_path / "wide.safetensors"
    files.save(instantiate(cfg.net), path, {"net": parts.plain(cfg.net), "shape": [3], "num_classes": 0, "t_max": 80 / 81})
    return path
