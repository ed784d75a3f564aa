import os

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
