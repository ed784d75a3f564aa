import json
import types

import pytest
import torch

from reflow_lab import bench, cli
from reflow_lab.errors import UserError
from reflow_lab.inf.sampler import CountCalls
from reflow_lab.inf.solvers import DPM, Euler, Heun


def output(capsys, *argv):
    assert cli.main(["bench", *argv]) == 0
    return json.loads(capsys.readouterr().out)  # fails if anything but JSON was printed


def check(figures, target=None):
    assert 0 < figures["ratio_low"] <= figures["ratio"] <= figures["ratio_high"]
    assert figures.get("target") == target


def test_train_reports_every_contender(capsys, tmp_path):
    found = output(capsys, "train", "--quick", "--device", "cpu", "--out", str(tmp_path / "out.json"))
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["device"] == "cpu" and found["machine"]["threads"] == 1
    contenders = {"ours", "bare"} | ({"torchcfm"} if bench.has("torchcfm") else set())
    for race in (found["quickstart"], found["toy_mlp"]):
        assert contenders < set(race)
        for name in contenders:
            assert race[name]["images_per_s"] == pytest.approx(8000 / race[name]["ms_per_step"])
            assert race[name]["ms_per_step_min"] <= race[name]["ms_per_step"]
    check(found["quickstart"]["ours"]["over_bare"], 1.05)
    toy = found["toy_mlp"]
    assert toy["overhead"]["overhead_ms_per_step"] == pytest.approx(toy["ours"]["ms_per_step"] - toy["bare"]["ms_per_step"])
    assert toy["overhead"]["target_ms_per_step"] == 2.0


def test_sample_reports_every_contender(capsys):
    found = output(capsys, "sample", "--quick", "--device", "cpu", "--repeats", "1")
    assert found["quickstart"]["nfe"] == 3 and found["quickstart"]["repeats"] == 1
    for name in ("ours_euler", "ours_heun", "ours_dpm"):
        check(found["quickstart"][name]["over_bare"], 1.03)
    check(found["free_field"]["ours_euler"]["over_bare"])
    assert "over_bare" not in found["free_field"]["bare"]


def test_pairs_reports_drawing_reading_and_memory(capsys):
    found = output(capsys, "pairs", "--quick", "--device", "cpu", "--repeats", "1")
    drawn = found["generation"]
    assert drawn["ours_pairs_per_s"] / drawn["bare_pairs_per_s"] == pytest.approx(drawn["throughput"])
    assert 0 < drawn["low"] <= drawn["throughput"] <= drawn["high"]
    assert set(found["stores"]) == {"10000", "20000"}
    for store in found["stores"].values():
        assert store["open_s"] < 60 and store["read_per_s"] > 100 and 10 < store["anonymous_mb"] < 5000
    rounding = found["rounding"]
    assert rounding["float32"]["largest"] == 0 < rounding["float16"]["rms"] < rounding["uint8"]["rms"]
    assert found["targets"]["throughput"] == 0.98


def test_data_reports_every_way_to_a_batch(capsys):
    found = output(capsys, "data", "--quick", "--device", "cpu", "--repeats", "1")
    rates = found["images_per_s"]
    assert found["num_images"] == 500 and {"resident", "mapped", "loader_png", "loader_png_2_workers"} < set(rates)
    for mine in ("resident", "mapped"):
        for theirs, figures in found["ours_over_loader"][mine].items():
            check(figures)
            assert figures["ratio"] == pytest.approx(rates[mine] / rates[theirs])


def test_data_comes_the_same_by_every_way(tmp_path):
    """In some order: what the contenders deliver are the images of the zip."""
    from reflow_lab import bench_data

    pixels = bench_data.pixels(8)
    bench_data.write_archive(tmp_path / "x.zip", map(bench_data.encode_png, pixels), None)
    cpu, zipped = torch.device("cpu"), bench_data.Zipped(tmp_path / "x.zip", 8)
    expected = {image.numpy().tobytes() for image in bench_data.to_float(torch.from_numpy(pixels))}
    for workers in (0, 1):
        batch = bench_data.loader(zipped, 8, cpu, workers)()
        assert batch.dtype == torch.float32 and {image.numpy().tobytes() for image in batch} == expected
    held = bench_data.Archive(str(tmp_path / "x.zip")).split("train")
    assert {image.numpy().tobytes() for image in bench_data.ours(held, 8, cpu)()[0]} <= expected


def test_flow_map_reports_steps_and_calls(capsys):
    found = output(capsys, "flow_map", "--quick", "--device", "cpu", "--repeats", "1")
    for objective in ("emd", "lmd"):
        for derivative, target in (("exact", 2.0), ("finite_difference", 1.5)):
            figures = found[f"{objective}_{derivative}"]
            check(figures, target)
            assert figures["ratio"] == pytest.approx(figures["ms"] / found["flow_matching"]["ms"])
            assert figures["peak_mb"] > 0
    assert found["teacher"]["ms"] < found["flow_matching"]["ms"] and found["batch_size"] == 8


def test_a_flow_maps_steps_train_and_ask_no_teacher(monkeypatch, no_network):
    """Only the student's network is called: with its call forbidden, each step fails; and no teacher is loaded."""
    from reflow_lab import bench_flow_map

    monkeypatch.setattr(bench.parts, "teacher", None)
    for make in bench_flow_map.makers().values():
        with pytest.raises(AssertionError, match="a network was called"):
            make("cpu", bench.QUICK)()


def test_a_large_store_wants_room(monkeypatch, capsys):
    from reflow_lab import bench_pairs

    usage = type("usage", (), {"free": 3_000_000_000})
    monkeypatch.setattr(bench_pairs.shutil, "disk_usage", lambda path: usage)
    assert cli.main(["bench", "pairs"]) == 2
    assert "3.1 GB are needed, 3.0 GB are free; TMPDIR names another folder" in capsys.readouterr().err


def test_ways_do_the_same_work():
    velocity, x1 = CountCalls(lambda x, t, s=None, **_: t.expand(len(x))[:, None] * x.sin()), torch.randn(5, 3)
    ways = bench.ways(velocity, x1, {"euler": Euler(), "heun": Heun(), "dpm": DPM()}, nfe=7)
    results = {}
    for name, way in ways.items():
        velocity.calls = 0
        results[name] = way()
        assert velocity.calls == 7, name
    for name in ways.keys() - {"heun", "dpm"}:
        torch.testing.assert_close(results[name], results["bare"])


def test_a_bare_step_trains_its_network(monkeypatch):
    cfg = bench.configured(bench.TOY, "cpu", bench.QUICK)
    network = bench.parts.network(cfg)
    monkeypatch.setattr(bench.parts, "network", lambda cfg: network)
    drawn = torch.rand(8), torch.randn(8, 2), torch.randn(8, 2)
    before = [p.clone() for p in network.parameters()]
    bench.bare_step(cfg, lambda: drawn)()
    assert all(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_turns_alternate_and_rotate(monkeypatch):
    clock, order = iter(range(1000)), []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    turns = bench.Turns({"b": lambda: order.append("b"), "c": lambda: order.append("c")}, steps=2)
    for step in range(7):
        turns.on_train_batch_start(types.SimpleNamespace(global_step=step), None)
    assert order == list("ccbb" + "bbcc" + "ccbb")
    assert turns.times == {"ours": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}


def test_race_gives_each_contender_its_turns():
    calls = []
    times = bench.race({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}
    assert calls == list("abbaabba")


def test_comparisons_are_of_medians_without_the_warm_up():
    ours, bare = [100.0, 2.2, 2.0, 2.4], [50.0, 1.0, 1.1, 1.2]
    assert bench.ratio(ours, bare)["ratio"] == pytest.approx(2.0)
    assert bench.ratio(ours, bare)["ratio_of_minima"] == pytest.approx(2.0)
    found = bench.overhead({"ours": ours, "bare": bare}, per_turn=10)
    assert found["overhead_ms_per_step"] == pytest.approx(110.0)
    assert 80 <= found["overhead_low_ms_per_step"] < 110 < found["overhead_high_ms_per_step"] <= 140 + 1e-9
    assert bench.report({"bare": bare}, "ms_per_step", 8, 10)["bare"]["ms_per_step"] == pytest.approx(110.0)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "what"),
        (["fly"], "fly"),
        (["train", "--sped"], "--sped"),
        (["train", "--repeats", "0"], "--repeats=0"),
        (["train", "--out", "no/x"], "--out=no/x"),
    ],
)
def test_bad_words_are_one_line_and_status_2(argv, word, capsys):
    assert cli.main(["bench", *argv]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--device=cuda"):
        bench.main(["sample", "--device", "cuda"])
