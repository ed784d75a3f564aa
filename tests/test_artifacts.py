import multiprocessing
import os
import time

import pytest

import reflow_lab
from reflow_lab.artifacts import artifact, digest, read_json, warn_of_version, write_atomically, write_json
from reflow_lab.errors import UserError


def made(tmp_path, **recipe):
    found = artifact(tmp_path, "stage", 1, **recipe)
    with found.locked():
        found.begin()
        (found.folder / "weights").mkdir()
        (found.folder / "weights" / "raw.bin").write_bytes(b"12345")
        found.finish()
    return found


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": {"c": 2, "d": [1, 2]}}) == digest({"b": {"d": [1, 2], "c": 2}, "a": 1})
    assert len({digest(r) for r in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"a": "1"})}) == 5


def test_the_folder_names_stage_version_and_recipe(tmp_path):
    keys = [artifact(tmp_path, *args, seed=seed).folder for *args, seed in (("a", 1, 0), ("b", 1, 0), ("a", 2, 0), ("a", 1, 1))]
    assert len(set(keys)) == 4 and keys[0].parent == tmp_path / "a"
    assert artifact(tmp_path, "a", 1, seed=0).key == keys[0].name
    assert not any(tmp_path.iterdir())


def test_finished_is_done_and_whole(tmp_path):
    found = artifact(tmp_path, "stage", 1, seed=3)
    assert not found.is_done()
    assert made(tmp_path, seed=3).is_done() and found.is_done()
    assert read_json(found.folder / "recipe.json") == {"stage": "stage", "version": 1, "seed": 3}


@pytest.mark.parametrize("name", ["weights/raw.bin", "recipe.json"])
def test_a_file_edited_by_hand_is_named(tmp_path, name):
    found = made(tmp_path)
    path = found.folder / name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=f"{path}.*changed.*delete {found.folder}"):
        found.is_done()


def test_a_missing_or_shortened_file_is_named(tmp_path):
    found = made(tmp_path)
    path = found.folder / "weights" / "raw.bin"
    path.write_bytes(b"1234")
    with pytest.raises(UserError, match=str(path)):
        found.is_done()
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: is missing"):
        found.is_done()


ODD = ['{"files": {"a": 1}}', '{"files": {"a": [1, "x", 2]}}', '{"files": {"a": "xy"}}', '{"files": {"a": [1, null]}}']


@pytest.mark.parametrize("text", ["{", "[]", '{"key": 1}', *ODD])
def test_a_damaged_done_mark_is_named(tmp_path, text):
    found = made(tmp_path)
    (found.folder / "done.json").write_text(text)
    with pytest.raises(UserError, match=r"done\.json"):
        found.is_done()


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": 2})
    assert read_json(path) == {"x": 2} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_write_atomically_keeps_the_old_file_if_the_writer_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_of_a_new_file(tmp_path, umask):
    def strict(temporary):
        temporary.unlink()
        temporary.touch(0o600)

    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", strict)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_of_another_version_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(reflow_lab, "__version__", "0.0.1")
        found = made(tmp_path)
        assert found.is_done()
    assert capsys.readouterr().err == ""
    warn_of_version.cache_clear()
    assert found.is_done() and found.is_done()
    line = f"{found.folder}: made by reflow_lab 0.0.1, used by {reflow_lab.__version__}; delete it to make it again\n"
    assert capsys.readouterr().err == line


def hold(tmp_path, held, release):
    with artifact(tmp_path, "stage", 1).locked():
        held.set()
        release.wait(20)
        (tmp_path / "order").write_text("first")


def test_two_processes_take_turns(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, release))
    other.start()
    assert held.wait(20)
    release_soon = context.Process(target=lambda: (time.sleep(0.3), release.set()))
    release_soon.start()
    with artifact(tmp_path, "stage", 1).locked():
        assert (tmp_path / "order").read_text() == "first"
    assert "waiting for another process" in capsys.readouterr().out
    other.join()
    release_soon.join()


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    context = multiprocessing.get_context("fork")
    held, never = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, held, never))
    other.start()
    assert held.wait(20)
    other.kill()
    other.join()
    with artifact(tmp_path, "stage", 1).locked():
        pass
