"""Pickles as data: what a network is made of comes out, anything else is refused, and nothing runs."""

import io
import os
import pickle

import edm_format
import numpy as np
import pytest
import torch

from reflow_lab.errors import UserError
from reflow_lab.networks import pickles
from reflow_lab.networks.pickles import Persistent, Record


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read bytes as a file; whatever they are, no other file may appear in the working folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "net.pkl"

    def run(content):
        path.write_bytes(content)
        try:
            return pickles.read(path)
        finally:
            assert [p.name for p in tmp_path.iterdir()] == ["net.pkl"]

    return run


def refused(read, content, reason=""):
    with pytest.raises(UserError, match=f"net.pkl: not a whole pickle of EDM or EDM2 .*{reason}") as error:
        read(content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


class Calls:
    """Calls a function when it is unpickled by pickle itself."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


TOUCH = "open('EXECUTED', 'w').close()"


def test_tensors_and_containers_come_out_whole(read):
    value = {"a": torch.arange(6.0).reshape(2, 3).T, "b": [torch.ones(2, dtype=torch.float16), (1, "x", None, {2.5})]}
    found = read(pickle.dumps(value))
    assert torch.equal(found["a"], value["a"]) and torch.equal(found["b"][0], value["b"][0])
    assert found["b"][0].dtype == torch.float16 and found["b"][1] == value["b"][1]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_protocols_of_python_3(read, protocol):
    network = edm_format.module("Net", {"weight": torch.ones(2, 3), "enc.a.weight": torch.zeros(1)}, dropout=0.1)
    found = read(edm_format.dumps({"ema": network}, protocol))["ema"]
    assert isinstance(found, Persistent) and found.class_name == "Net" and found.state["dropout"] == 0.1
    assert torch.equal(found.state["_parameters"]["weight"], torch.ones(2, 3))
    inside = found.state["_modules"]["enc"].state["_modules"]["a"]
    assert inside.class_name == "Child" and torch.equal(inside.state["_parameters"]["weight"], torch.zeros(1))


def test_numbers_and_arrays_of_numpy_are_kept_as_they_came(read):
    found = read(pickle.dumps({"scale": np.float64(0.5), "bias": np.arange(3.0), "_": edm_format.KINDS}))
    assert type(found["scale"]) is Record and type(found["bias"]) is Record


@pytest.mark.parametrize(
    "evil, name",
    [
        (Calls(os.system, "touch EXECUTED"), "posix.system"),
        (Calls(eval, TOUCH), "builtins.eval"),
        (Calls(exec, TOUCH), "builtins.exec"),
        (Calls(__import__, "os"), "builtins.__import__"),
        (Calls(getattr, "text", "upper"), "builtins.getattr"),
        (Calls(torch.load, "EXECUTED"), "torch.serialization.load"),
        (Calls(torch.hub.load, "owner/name", "net"), "torch.hub.load"),
        (Calls(np.load, "EXECUTED"), "numpy.load"),
        (Calls(io.open, "EXECUTED", "w"), "_?io.open"),
        (Calls(pickle.loads, b""), "_pickle.loads"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("where", [lambda e: e, lambda e: {"ema": e}, lambda e: edm_format.Theirs("Net", scale=[e])])
def test_what_calls_something_is_refused(read, evil, name, where):
    refused(read, edm_format.dumps(where(evil)), f"it asks for {name}, for which a network has no use")


class Storage:
    """A tensor's storage whose inner pickle is ours to choose."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize("inner", [pickle.dumps(Calls(os.system, "touch EXECUTED")), saved(Calls(eval, TOUCH)), b"", b"garbage"])
def test_an_inner_pickle_that_calls_something_is_refused(read, inner):
    refused(read, edm_format.dumps({"ema": Storage(inner)}))


def test_an_inner_pickle_is_a_storage(read):
    refused(read, edm_format.dumps(Storage(saved({"a": 1}))), "a tensor's storage is none")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((0, (2**40,), (0,)), "a tensor is larger than its storage"),
        ((0, (5,), (1,)), "a tensor is larger than its storage"),
        ((3, (4,), (1,)), "setStorage: sizes"),
        ((0, (2,), (1000,)), "setStorage: sizes"),
        ((-1, (2,), (1,)), "invalid storage offset -1"),
    ],
)
def test_a_tensor_stays_in_its_storage(read, arguments, reason):
    _, (storage, *_) = torch.ones(4).__reduce_ex__(2)
    refused(read, pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, storage, *arguments, False, {})), reason)


@pytest.mark.parametrize("keep", [0, 1, 30, 500, -1])
def test_a_truncated_file_is_refused(read, keep):
    whole = edm_format.dumps({"ema": edm_format.module("Net", {"weight": torch.ones(100)})})
    refused(read, whole[:keep])


@pytest.mark.parametrize("content", [b"\x89PNG\r\n", b"<html>", b"PK\x03\x04", saved({"a": torch.ones(2)}), bytes(range(256))])
def test_another_kind_of_file_is_refused(read, content):
    refused(read, content)


def test_what_stands_for_an_object_cannot_be_changed(read):
    """A pickle may set attributes of whatever it names: the class itself, here."""
    change = b"\x80\x02cnumpy\nndarray\nN}X\x08\x00\x00\x00__init__K\x01s\x86b."
    refused(read, change)
    assert Record("a").args == ("a",)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"no\.pkl: no such file"):
        pickles.read(tmp_path / "no.pkl")
    with pytest.raises(UserError, match="not a whole pickle"):
        pickles.read(tmp_path)
