"""`bench evaluate`: features and Fréchet distance of the same images, ours beside torch-fidelity's, which defines them.

Both read one file of random Inception weights and see the same images. What is raced is the features; the whole of
torch-fidelity's `calculate_metrics`, start-up included, is timed once beside ours for how close the results are.
"""

import io
import multiprocessing
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from . import parts
from .bench import QUICKSTART, Sizes, configured, machine, race, ratio, seconds
from .bench_pairs import anonymous_mb
from .evaluation import evaluate, inception
from .evaluation.frechet import Moments, Reference
from .evaluation.inception import InceptionFeatures
from .evaluation.metrics import FrechetDistance
from .noise import uniform

DIM = InceptionFeatures.num_features
TARGETS = {"throughput": 1.5, "distance_s": 2.0, "relative_difference": 1e-3, "growth_mb": 16}


class Held(Dataset):
    """Images (n, c, h, w) as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def measure(device: str, sizes: Sizes) -> dict[str, Any]:
    """All figures, as JSON-able values, with the targets beside them."""
    cfg = configured(QUICKSTART, device, sizes)
    where = parts.device(cfg)
    with tempfile.TemporaryDirectory(prefix="reflow_lab_bench_") as name:
        random_weights(path := Path(name) / "inception.pth")
        found = {"features": race_features(path, where, sizes), "end_to_end": end_to_end(path, where, sizes)}
    memory = {str(num): in_own_process(num, device) for num in (sizes.num_features // 80, sizes.num_features // 8)}
    growth = max(memory.values()) - min(memory.values())
    found |= {"distance": race_distance(sizes), "memory": {"anonymous_mb": memory, "growth_mb": growth}}
    return {"machine": machine(cfg), "targets": TARGETS, **found}


def images(num: int, stream: str) -> Tensor:
    """Random smooth images, uint8 (num, 3, 32, 32)."""
    rough = uniform(0, f"bench evaluate/{stream}", np.arange(num), 3 * 8 * 8).float().reshape(num, 3, 8, 8)
    smooth = nn.functional.interpolate(rough, (32, 32), mode="bilinear", align_corners=False)
    return (smooth * 255).to(torch.uint8)


def random_weights(path: Path, seed: int = 0) -> None:
    """Write Inception's weights drawn at random, its batch norms fitted to random images, so that features differ by image."""
    from torch_fidelity import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: Any, **__: Any) -> Any:
            """Stay as made."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    names: Any = ["2048"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Unloaded("inception-v3-compat", names, empty)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.normal_(module.bias, 0.1, 0.1)
    with torch.inference_mode():
        network.train()(images(8, "weights"))
    torch.save(network.state_dict(), path)


def race_features(weights: Path, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The features of one batch: images/s of both, ours over theirs with a 95 % interval, and how far apart they are."""
    from torch_fidelity import FeatureExtractorInceptionV3

    names: Any = ["2048"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", names, weights).to(device)
    ours, batch = InceptionFeatures(weights), images(sizes.sample_batch, "features").to(device)
    with torch.inference_mode():
        expected = theirs(batch)[0].cpu()
    difference = float((ours(batch) - expected).norm() / expected.norm())
    times = race({"ours": lambda: ours(batch), "torch_fidelity": lambda: theirs(batch)[0].cpu()}, min(sizes.repeats, 5))
    faster = ratio(times["torch_fidelity"], times["ours"])
    rates = {f"{name}_images_per_s": len(batch) / float(np.median(values[1:])) for name, values in times.items()}
    throughput = {"throughput": faster["ratio"], "low": faster["ratio_low"], "high": faster["ratio_high"]}
    return {"batch_size": len(batch), **rates, **throughput, "relative_difference": difference}


def end_to_end(weights: Path, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Two sets of images to one distance, once: seconds of both, start-up included, and how far apart the distances are."""
    made, real = (images(2 * sizes.sample_batch, stream) for stream in ("made", "real"))
    results: dict[str, float] = {}

    def theirs() -> None:
        from torch_fidelity import calculate_metrics

        how: dict[str, Any] = {"fid": True, "cache": False, "verbose": False, "save_cpu_ram": True, "cuda": device.type == "cuda"}
        found = calculate_metrics(input1=Held(made), input2=Held(real), feature_extractor_weights_path=str(weights), **how)
        results["torch_fidelity"] = found["frechet_inception_distance"]

    def ours() -> None:
        inception._network.cache_clear()  # start-up is part of both
        network = InceptionFeatures(weights)
        metric = FrechetDistance(Reference.of(network(real.to(device))), network.name)
        metric.update(network(made.to(device)))
        results["ours"] = float(metric.compute()[metric.name])

    taken = {"torch_fidelity_s": seconds(theirs), "ours_s": seconds(ours)}
    difference = abs(results["ours"] / results["torch_fidelity"] - 1)
    found = {"num_images": len(made), **taken, "throughput": taken["torch_fidelity_s"] / taken["ours_s"]}
    return found | {"distances": results, "relative_difference": difference}


def race_distance(sizes: Sizes) -> dict[str, Any]:
    """One distance to a reference that is there, 2048 dimensions: seconds of ours (median of 3) and of torch-fidelity's, once."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    scale = torch.logspace(0, -1.5, DIM)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sets = [Moments.of(torch.randn(sizes.num_features // 5, DIM, generator=generator) * scale) for generator in generators]
    reference = Reference.of(sets[0])
    ours = float(np.median([seconds(lambda: reference.distance(sets[1])) for _ in range(3)]))
    made, real = ({"mu": m.mean.numpy(), "sigma": m.cov.numpy()} for m in sets)
    if sizes.num_features < DIM:  # a quick look
        return {"dim": DIM, "ours_s": ours}
    results: list[float] = []
    theirs = seconds(lambda: results.append(fid_statistics_to_metric(made, real, False)["frechet_inception_distance"]))
    difference = abs(reference.distance(sets[1]) / results[0] - 1)
    return {"dim": DIM, "ours_s": ours, "torch_fidelity_s": theirs, "relative_difference": difference}


def in_own_process(num: int, device: str) -> float:
    """What `peak_mb` finds, in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_mb, num, device).result()


def peak_mb(num: int, device: str) -> float:
    """Peak anonymous memory, in MB, of `evaluate`: `num` samples of one step, against as many images."""
    torch.set_num_threads(1)
    cfg = configured(QUICKSTART, device, Sizes())
    run, peak = parts.teacher(cfg), [0.0]
    cfg.teacher.path, cfg.nfe, cfg.evaluation.num_images = None, 1, num
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], anonymous_mb())

    watching = threading.Thread(target=watch)
    with tempfile.TemporaryDirectory(prefix="reflow_lab_bench_") as name:
        cfg.outputs = name
        watching.start()
        try:
            evaluate.measured(cfg, run)
        finally:
            ended.set()
            watching.join()
    return peak[0]
