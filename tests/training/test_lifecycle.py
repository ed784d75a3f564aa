import json
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from reflow_lab.errors import UserError
from reflow_lab.training.lifecycle import Checkpoints, Clock, DurableCheckpoints, JSONLines, require_finite


def test_lines_are_json_with_their_step(tmp_path):
    lines = JSONLines(tmp_path / "metrics.jsonl")
    lines.log_metrics({"loss": 0.5}, 3)
    lines.log_metrics({"loss": 0.25}, 6)
    written = [json.loads(line) for line in lines.path.read_text().splitlines()]
    assert written == [{"step": 3, "loss": 0.5}, {"step": 6, "loss": 0.25}]


def test_cutting_back_drops_what_came_after_the_checkpoint_and_half_lines(tmp_path):
    lines = JSONLines(tmp_path / "metrics.jsonl")
    for step in (3, 6, 6, 9):
        lines.log_metrics({"loss": 1.0}, step)
    with lines.path.open("a") as file:
        file.write('{"step": 4, "lo')
    lines.cut_back(6)
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [3, 6, 6]
    lines.cut_back(0)
    assert lines.path.read_text() == ""


def test_a_checkpoint_that_fails_keeps_the_previous_one(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    DurableCheckpoints().save_checkpoint({"step": 1}, path)

    def half(checkpoint, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        DurableCheckpoints().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["loss", "loss_unweighted", "gradient_norm"])
def test_what_is_not_finite_ends_the_run_in_one_line(key, value):
    metrics = {"loss": 1.0, "loss_unweighted": 1.0, "gradient_norm": 1.0}
    require_finite(metrics, SimpleNamespace(global_step=7))
    with pytest.raises(UserError, match=rf"^{key}={value} at step 7: .*training\.lr") as error:
        require_finite(metrics | {key: value}, SimpleNamespace(global_step=7))
    assert "\n" not in str(error.value)


def test_signals_are_given_back_after_an_exception():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    checkpoints = Checkpoints(None, 60)
    checkpoints.on_train_start(None, None)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    checkpoints.on_exception(None, None, RuntimeError())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_first_signal_asks_the_second_insists():
    checkpoints = Checkpoints(None, 60)
    checkpoints.on_train_start(None, None)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # torchrun's, after the terminal's own
        assert checkpoints.came == {signal.SIGINT, signal.SIGTERM}
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        checkpoints.teardown(None, None, "fit")


def test_the_clock_goes_on_where_a_checkpoint_left_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first, second = Clock(), Clock()
    first.on_train_start(None, None)
    now[0] += 7
    kept = first.state_dict()
    now[0] += 50  # lost: no checkpoint holds it
    second.load_state_dict(kept)
    second.on_train_start(None, None)
    now[0] += 2
    assert kept == {"seconds": 7} and second.seconds == 9
