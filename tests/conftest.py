import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two test processes share the cores, and sums keep one order
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch


@pytest.fixture(autouse=True)
def deterministic():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Two moons with a teacher of 50,000 samples."""
    import tiny

    return tiny.lab(tmp_path_factory.mktemp("toy"), "toy", tiny.POINTS, "training.total_kimg=50", "training.batch_size=256")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Fashion-MNIST with an untrained teacher."""
    import tiny

    return tiny.lab(tmp_path_factory.mktemp("images"), "quickstart", tiny.IMAGES, tiny.UNTRAINED)


@pytest.fixture
def no_network(monkeypatch):
    """Any call of a network fails the test."""
    from reflow_lab.networks.precision import InPrecision

    def called(*_, **__):
        raise AssertionError("a network was called")

    monkeypatch.setattr(InPrecision, "forward", called)


@pytest.fixture(autouse=True)
def no_memory():
    """What the cells of a study share in a process does not pass from test to test."""
    yield
    if targets := sys.modules.get("reflow_lab.evaluation.targets"):
        targets._SHARED.clear()
