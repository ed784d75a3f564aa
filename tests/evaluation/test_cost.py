import time

import pytest
import torch

from reflow_lab.evaluation.cost import Cost, cost, markdown

CPU = torch.device("cpu")


def test_warm_up_is_left_out_and_the_median_is_of_the_repeats() -> None:
    waits = iter([0.5, 0.0, 0.02, 0.1, 0.02])
    found = cost(lambda: (time.sleep(next(waits)), torch.zeros(4))[1], None, CPU, batch_size=4, nfe=3, repeats=3)
    assert len(found.ms) == 3 and found.ms_per_image == sorted(found.ms)[1]
    assert 5 <= found.ms_per_image < 25 <= max(found.ms)
    assert (found.batch_size, found.nfe) == (4, 3)


@pytest.mark.parametrize("num", [1000, 4000])
def test_memory_is_the_weights_and_what_is_held_at_once(num: int) -> None:
    network = torch.nn.Linear(10, 10, bias=False)
    found = cost(lambda: torch.zeros(num, 10) + torch.ones(num, 10), network, CPU, num, 1, repeats=1)
    assert found.peak_memory_mb == pytest.approx((3 * num * 40 + 400) / 1e6)


def test_the_table_has_a_row_a_batch_size_and_a_column_a_number_of_calls() -> None:
    cells = [Cost(size, nfe, size * nfe / 10, 1000.0 * size, []) for size in (1, 8) for nfe in (1, 4)]
    asked = [(size, nfe) for size in (1, 8, 64) for nfe in (1, 4)]
    text = markdown(cells, asked, "a machine")
    assert text.startswith("Sampling on a machine\n\n| ms an image | 1 NFE | 4 NFE |\n|---|---:|---:|\n")
    assert "| batch 8 | 0.8 | 3.2 |" in text and "| batch 1 | 1000 | 1000 |" in text
    assert text.count("| batch 64 | no memory | no memory |") == 2


@pytest.mark.gpu
def test_on_a_gpu_the_time_is_until_it_is_done() -> None:
    device, matrix = torch.device("cuda"), torch.randn(4096, 4096, device="cuda")

    def make() -> torch.Tensor:
        x = matrix
        for _ in range(20):
            x = x @ matrix
        return x

    found = cost(make, None, device, 1, 1, repeats=3)
    assert found.ms_per_image > 20 * 2 * 4096**3 / 1e15 * 1000  # no GPU does 10^15 a second in float32
    assert found.peak_memory_mb >= 4096**2 * 4 / 1e6
