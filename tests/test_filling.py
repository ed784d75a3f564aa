"""Generation by processes that are killed, that work side by side, and on disks that are full: real processes, real signals."""

import multiprocessing
import os
import platform
import resource
import shutil
import signal
import time
from collections import namedtuple

import numpy as np
import pytest
import torch

from reflow_lab import filling
from reflow_lab.artifacts import artifact
from reflow_lab.errors import UserError
from reflow_lab.filling import conditions
from reflow_lab.lrn.store import fill
from reflow_lab.shards import Shards, ShardStore, shard_name

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["reflow_lab.lrn.pairs", "reflow_lab.training.train", "toy"])
RECIPE = {"kind": "backward", "half": "x0", "count": 100, "shape": [3], "num_classes": 0, "seed": 5}
RECIPE |= {"batch_size": 5, "shard_size": 10, "dtype": "float32", "flips": False, "start_noise": False}
CPU = torch.device("cpu")


def made(outputs, **more):
    return artifact(outputs, "pairs", 2, **{**RECIPE, **more})


def draw(indices):
    for chunk in np.split(indices, range(5, len(indices), 5)):
        yield torch.from_numpy(chunk)[:, None] / torch.tensor([1.0, 2.0, 3.0])


def run_slowly(outputs, drawing):
    def slowly(indices):
        drawing.set()
        for values in draw(indices):
            time.sleep(0.06)
            yield values

    run(outputs, slowly)


def run(outputs, how=draw, numbers=None):
    torch.set_num_threads(1)
    return fill(made(outputs), how, conditions(CPU), numbers)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


HIDDEN = [".lock", *(f".shard-{i:05d}.npy.sha256" for i in range(10))]
DEAD = 2**22 + 1  #: a process number that Linux does not give


def hidden(folder):
    return sorted(p.name for p in folder.glob(".*"))


def undisturbed(tmp_path):
    assert run(tmp_path / "undisturbed")
    return files_of(made(tmp_path / "undisturbed").folder)


def test_every_pair_is_drawn_once_in_its_place(tmp_path):
    whole = undisturbed(tmp_path)
    store = ShardStore(made(tmp_path / "undisturbed").folder)
    expected = torch.arange(100)[:, None] / torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(store.stored(np.arange(100)), expected)
    assert set(whole) == {
        *map(shard_name, range(10)),
        "manifest.json",
        "recipe.json",
        "made_by.json",
        "version.json",
        "done.json",
    }


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path):
    expected, rng = undisturbed(tmp_path), np.random.default_rng(0)
    outputs, counts = tmp_path / "killed", []
    for _ in range(40):
        drawing = processes.Event()
        process = processes.Process(target=run_slowly, args=(outputs, drawing))
        process.start()
        assert drawing.wait(60)
        process.join(rng.uniform(0.0, 0.4))
        process.kill()
        process.join()
        counts.append(len(list(made(outputs).folder.glob("shard-*.npy"))))
        if counts[-1] >= 5:
            break
    assert 0 < counts[-1] < 10 and not made(outputs).is_done()
    assert run(outputs)
    assert files_of(made(outputs).folder) == expected and hidden(made(outputs).folder) == HIDDEN


SMALL = {"count": 20}  # two shards


def killed_at(number, outputs):
    """Fill a small store, and die by SIGKILL at the number-th call that the disk sees."""
    calls = iter(range(10**6))

    def deadly(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "open")):
        setattr(owner, name, deadly(getattr(owner, name)))
    torch.set_num_threads(1)
    fill(made(outputs, **SMALL), draw, conditions(CPU))


def test_killed_at_every_call_that_the_disk_sees_it_ends_with_the_same_bytes(tmp_path):
    fill(made(tmp_path / "whole", **SMALL), draw, conditions(CPU))
    expected, moments = files_of(made(tmp_path / "whole", **SMALL).folder), 0
    for number in range(1000):
        outputs = tmp_path / f"killed{number}"
        process = processes.Process(target=killed_at, args=(number, outputs))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        moments += process.exitcode == -signal.SIGKILL
        assert fill(made(outputs, **SMALL), draw, conditions(CPU))
        folder = made(outputs, **SMALL).folder
        assert files_of(folder) == expected, number
        assert hidden(folder) == HIDDEN[:1] + HIDDEN[1:3], number
    assert moments > 20 and process.exitcode == 0


def test_killed_between_a_shard_and_its_mark_draws_it_again(tmp_path):
    expected = undisturbed(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", interrupted)
    folder = made(tmp_path / "killed").folder
    marks = sorted(folder.glob(".shard-*.sha256"))
    assert len(marks) == 3
    marks[1].unlink()
    (folder / f".shard-00003.npy.{platform.node()}.{DEAD}.tmp").write_bytes(b"half of it")
    (folder / ".shard-00004.npy.elsewhere.1.tmp").write_bytes(b"somebody else's, perhaps alive")
    assert run(tmp_path / "killed") and files_of(folder) == expected
    assert [p.name for p in folder.glob("*.tmp")] == [".shard-00004.npy.elsewhere.1.tmp"]


def interrupted(indices):
    if indices[0] == 30:
        raise KeyboardInterrupt
    return draw(indices)


def test_two_processes_share_the_shards_and_write_the_bytes_of_one(tmp_path):
    expected, outputs = undisturbed(tmp_path), tmp_path / "shared"
    both = [processes.Process(target=logged, args=(outputs, tmp_path / name)) for name in ("a", "b")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert files_of(made(outputs).folder) == expected
    drawn = [(tmp_path / name).read_text().split() for name in ("a", "b")]
    assert sorted(drawn[0] + drawn[1], key=int) == [str(10 * i) for i in range(10)] and all(
        drawn
    )  # each shard once, both at work


def logged(outputs, log):
    log.touch()

    def drawing(indices):
        with log.open("a") as file:
            file.write(f"{indices[0]} ")
        time.sleep(0.1)
        return draw(indices)

    run(outputs, drawing)


def test_a_job_array_makes_its_ranges_and_the_last_one_finishes(tmp_path):
    expected, outputs = undisturbed(tmp_path), tmp_path / "array"
    assert not run(outputs, numbers=range(4, 10)) and len(list(made(outputs).folder.glob("shard-*.npy"))) == 6
    assert not made(outputs).is_done()
    assert run(outputs, numbers=range(0, 4)) and files_of(made(outputs).folder) == expected


def test_ranks_begin_at_different_shards(tmp_path, monkeypatch):
    order = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(tmp_path, lambda indices: order.append(int(indices[0])) or draw(indices))
    assert order == [50, 60, 70, 80, 90, 0, 10, 20, 30, 40]


def test_the_threads_of_the_first_process_are_adopted_and_put_back(tmp_path):
    begun = {**conditions(CPU), "threads": 2}
    seen = []
    with pytest.raises(KeyboardInterrupt):
        fill(made(tmp_path), interrupted, begun)
    fill(made(tmp_path), lambda indices: seen.append(torch.get_num_threads()) or draw(indices), conditions(CPU))
    assert set(seen) == {2} and torch.get_num_threads() == 1
    assert ShardStore(made(tmp_path).folder).manifest["made_by"]["threads"] == 2


def test_another_device_type_is_refused_and_another_version_warned_of(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        fill(made(tmp_path), interrupted, {**conditions(CPU), "device": "cuda", "torch": "1.0"})
    with pytest.raises(UserError, match=r"trainer\.accelerator=cpu: .* was begun on cuda, this is cpu"):
        run(tmp_path)
    path = made(tmp_path).folder / "made_by.json"
    path.write_text(path.read_text().replace('"cuda"', '"cpu"'))
    assert run(tmp_path)
    assert "begun with torch 1.0, continued with" in capsys.readouterr().err


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 11_900_000))
    with pytest.raises(UserError, match=r"12\.0 MB are needed for the missing pairs, 11\.9 MB are free"):
        fill(made(tmp_path, shape=[30_000]), None, conditions(CPU))
    assert [p.name for p in made(tmp_path, shape=[30_000]).folder.iterdir()] == [".lock"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1_200))
    assert run(tmp_path)


def with_small_files(outputs, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # a shard of 24,000 bytes does not fit
    torch.set_num_threads(1)
    try:
        fill(made(outputs, shape=[600]), lambda i: iter([torch.zeros(len(i), 600)]), conditions(CPU), range(1))
    except UserError as error:
        queue.put(str(error))


def test_a_disk_that_fills_up_stops_the_work_and_spares_what_is_there(tmp_path):
    recipe = made(tmp_path, shape=[600])
    fill(recipe, lambda i: iter([torch.zeros(len(i), 600)]), conditions(CPU), range(1, 3))
    queue = processes.SimpleQueue()
    process = processes.Process(target=with_small_files, args=(tmp_path, queue))
    process.start()
    process.join(60)
    said = queue.get()
    assert f"{recipe.folder}/shard-00000.npy: cannot be written" in said and "\n" not in said
    assert "the same command goes on" in said and "0.2 MB are needed" in said
    assert sorted(p.name for p in recipe.folder.glob("shard*")) == ["shard-00001.npy", "shard-00002.npy"]
    assert not list(recipe.folder.glob(".*.tmp"))
    assert fill(recipe, lambda i: iter([torch.zeros(len(i), 600)]), conditions(CPU))


def test_what_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(UserError, match="NaN or infinite values among pairs 5 to 9; no shard"):
        run(tmp_path, lambda indices: (v.where(v[:, :1] < 5, torch.nan) for v in draw(indices)))
    assert not list(made(tmp_path).folder.glob("shard*"))


def test_infinity_after_rounding_is_not_written(tmp_path):
    large = made(tmp_path, dtype="float16")
    with pytest.raises(UserError, match="NaN or infinite values among pairs 0 to 4"):
        fill(large, lambda indices: (1e5 + v for v in draw(indices)), conditions(CPU))
    with pytest.raises(UserError, match="NaN or infinite values among pairs 0 to 4"):
        fill(made(tmp_path, dtype="uint8"), lambda indices: (v / 0 for v in draw(indices)), conditions(CPU))


def test_a_damaged_shard_is_drawn_again_by_itself(tmp_path):
    expected, drawn = undisturbed(tmp_path), []
    folder = made(tmp_path / "undisturbed").folder
    (folder / "shard-00003.npy").unlink()
    (folder / "done.json").unlink()
    assert run(tmp_path / "undisturbed", lambda indices: drawn.append(indices[0]) or draw(indices))
    assert drawn == [30] and files_of(folder) == expected


def test_a_shard_damaged_before_the_store_is_finished_is_drawn_again(tmp_path, capsys):
    expected = undisturbed(tmp_path)
    run(tmp_path / "ranges", numbers=range(0, 5))
    folder = made(tmp_path / "ranges").folder
    content = bytearray((folder / "shard-00002.npy").read_bytes())
    content[-1] ^= 1
    (folder / "shard-00002.npy").write_bytes(content)
    assert run(tmp_path / "ranges", numbers=range(5, 10)) and files_of(folder) == expected
    assert "shard-00002.npy changed since drawn; drawn again" in capsys.readouterr().err


def test_the_bar_counts_what_others_draw(tmp_path, capsys):
    """While we draw our first shard somebody else finishes the next three: the bar knows at once."""
    other, seen = made(tmp_path / "other"), []
    run(tmp_path / "other")
    Progress = filling.Bar

    class Watched(Progress):
        def advance(self, count, note=""):
            super().advance(count, note)
            seen.append(self.completed)

    def helped(indices):
        if indices[0] == 0:
            for path in sorted(other.folder.glob("shard-0000[123].npy")) + sorted(
                other.folder.glob(".shard-0000[123].npy.sha256")
            ):
                shutil.copy(path, made(tmp_path).folder)
        return draw(indices)

    filling.Bar = Watched
    try:
        run(tmp_path, helped)
    finally:
        filling.Bar = Progress
    assert seen[:3] == [5, 10, 40] and seen[-1] == 100 and seen == sorted(seen)


def test_ahead_keeps_the_order_and_raises_where_it_should():
    assert list(filling.ahead(iter(range(20)))) == list(range(20)) and list(filling.ahead(iter(()))) == []

    def failing():
        yield 1
        raise ValueError("second")

    items = filling.ahead(failing())
    with pytest.raises(ValueError, match="second"):
        list(items)


def test_sizes_and_names_of_shards(tmp_path):
    shards = Shards(tmp_path, 25, 10, (3, 2), "float16", "rows")
    assert len(shards) == 3 and shards.indices(2).tolist() == [20, 21, 22, 23, 24] and shards.bytes_per_row == 12
    assert shards.missing() == [0, 1, 2] and shards.num_rows([0, 2]) == 15


def test_the_environment_tells_the_rank(monkeypatch):
    from reflow_lab import parallel

    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert (parallel.rank(), parallel.world_size()) == (3, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (parallel.rank(), parallel.world_size()) == (1, 2)
