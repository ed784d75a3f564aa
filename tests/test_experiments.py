"""Every study at every scale, every experiment under every verb: over the files found, so that a new one is tested."""

import functools

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from reflow_lab import parts
from reflow_lab.evaluation import evaluate
from reflow_lab.lrn import pairs
from reflow_lab.networks import files
from reflow_lab.paths import conf_dir, experiments_dirs
from reflow_lab.studies import description, study
from reflow_lab.training import train

(STUDIES,) = [folder for folder in experiments_dirs() if folder.parent == conf_dir().parent]
NAMES = sorted(str(path.relative_to(STUDIES).with_suffix("")) for path in STUDIES.rglob("*.yaml"))
SCALES = sorted(path.stem for path in (conf_dir() / "scale").glob("*.yaml"))
SMALL = [[], *([f"scale={name}"] for name in SCALES if name != "h100_30min")]  # Fashion-MNIST has 10,000 images
EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
T_MAX = f"t_max={80 / 81}"  # null for `evaluate`: the run's own
FOREIGN = ("cifar10", "afhqv2", "ffhq", "imagenet64", "imagenet512")  # whose data are not at hand
SCALED = [name for name in EXPERIMENTS if name.startswith((*FOREIGN, "custom")) and name != "custom_finetune"]
OFFLINE = [name for name in EXPERIMENTS if not name.startswith(FOREIGN)]


@pytest.fixture(scope="module")
def hydra(toy):  # whose own configuration is composed before this one is open
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def needed(toy, tmp_path_factory):
    """What an experiment leaves to the user: one's own images, a teacher."""
    folder = tmp_path_factory.mktemp("folder")
    for i in range(500):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (4, 4, 3), np.uint8)).save(folder / f"{i}.png")

    def needed(name):
        if name == "custom_finetune":
            return [f"data.path={folder}", "data.channels=1", "teacher.path=package:fashion_mnist.safetensors"]
        if name.startswith("custom"):
            return [f"data.path={folder}"]
        if name in FOREIGN:
            return ["teacher.path=none.safetensors"]
        if (data := name.removesuffix("_flow_map")) in FOREIGN:
            return [f"teacher.path={described(data)}"]
        if name in ("flow_map", "adversarial"):
            return ["net=teacher"]
        taught = name in ("toy", "toy_flow_map", "toy_adversarial")
        return [f"teacher.path={toy.teacher}", "net.network.width=32"] if taught else []

    def described(name):
        """A teacher, whose network is all that is looked at."""
        path = folder / f"{name}.safetensors"
        net = parts.plain(compose("train", [f"experiment={name}", "teacher.path=none.safetensors"]).net)
        files.save(torch.nn.Identity(), path, {"net": net})
        return path

    def flow_map(name):
        """A flow map to start from, of which a check reads the description alone."""
        path, cfg = folder / f"{name}.safetensors", compose("train", [f"experiment={name}", *needed(name)])
        parts.settle_net(cfg)
        files.save(torch.nn.Identity(), path, train.description(cfg))
        return path

    def both(name):
        if name.endswith("adversarial"):
            return [*needed(name), f"training.start={flow_map(name.replace('adversarial', 'flow_map'))}"]
        return [*needed(name), *([f"data.path={folder}", "teacher=none"] if name == "custom" else [])]

    return both


def test_the_search_found_the_files():
    assert {"quickstart", "simple_reflow/coupling", "simple_reflow/rectifications", "simple_reflow/own_loss"} <= set(NAMES)
    assert all(description.find(name) == STUDIES / f"{name}.yaml" for name in NAMES)
    assert {"quickstart", "toy", "custom", *FOREIGN} <= set(EXPERIMENTS)
    assert {"mini", "h100_30min", "paper"} <= set(SCALES)


@functools.cache
def planned(name, *given):
    """All rows of a study, composed once for all tests, which run inside `hydra`; on data that are at hand."""
    described = description.read(STUDIES / f"{name}.yaml")
    at_hand = ["experiment=quickstart"] if described.overrides[0].removeprefix("experiment=") in FOREIGN else []
    return described, study.plan(described, [row.name for row in described.rows], [0], [*at_hand, *given])


@pytest.mark.parametrize("scale", SMALL, ids=lambda scale: "".join(scale) or "scale of the study")
@pytest.mark.parametrize("name", NAMES)
def test_all_rows_could_be_trained_and_measured(hydra, name, scale):
    """Composed as the study does, and checked as it does before it trains: pairs, batches, splits, samplers at every NFE."""
    if scale and name == "align_your_flow/gaussian":
        pytest.skip("scales are of images")
    described, plans = planned(name, *scale)
    assert [found.row for found in plans] == list(described.rows)
    for found in plans:
        cfg = found.configs[0]
        assert [c.nfe for c in found.configs] == list(described.nfe)
        is_foreign = described.overrides[0].removeprefix("experiment=") in FOREIGN
        experiment = "experiment=quickstart" if is_foreign else described.overrides[0]
        assert cfg.budget == compose("train", [experiment, *scale]).budget or not scale
        for node in (*cfg.dyn.values(), *cfg.lrn.values(), *cfg.inf.values()):
            assert instantiate(node) is not None


def recipe(planned):
    """What tells a row's run from another's of the same start, which may not be there yet."""
    cfg = planned.training
    return (
        str((parts.plain(cfg.training), parts.plain(cfg.flow_map)))
        if planned.row.teacher or planned.row.start or planned.row.weak
        else train.plan(cfg).key
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_study_differ_and_compare(hydra, name):
    _, plans = planned(name)
    study.require_comparable(plans)
    results = {(p.row.teacher, p.row.start, p.row.weak, recipe(p), str(parts.plain(p.training.inf))) for p in plans}
    assert len(results) == len(plans)


def test_the_ladder_is_cumulative(hydra):
    described, plans = planned("quickstart")
    assert [row.name for row in described.rows] == ["base flow", "BSL", "+DYN", "+LRN", "+INF"] and described.nfe == (1, 2, 4, 9)
    assert [row.against for row in described.rows] == [None, "base flow", "BSL", "+DYN", "+LRN"]
    before = None
    for row, _, cfg, _ in plans[1:]:
        stages = [parts.plain(cfg[stage]) for stage in ("dyn", "lrn", "inf")]
        changed = [a != b for a, b in zip(stages, before or stages, strict=True)]
        assert changed == [row.name == f"+{stage}" for stage in ("DYN", "LRN", "INF")]
        before = stages


@pytest.mark.parametrize("verb", ["train", "pairs", "evaluate"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_into_the_verb(hydra, needed, name, verb):
    cfg = compose(verb, [f"experiment={name}", *needed(name), T_MAX])
    parts.check(cfg)
    parts.settle_net(cfg)
    with torch.device("meta"):
        network = instantiate(cfg.net)
    assert sum(p.numel() for p in network.parameters()) > 1000
    for node in (*cfg.dyn.values(), *cfg.lrn.values(), *cfg.inf.values(), cfg.pairs.solver, cfg.pairs.grid):
        assert instantiate(node) is not None


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", SCALED)
def test_an_experiment_has_every_scale(hydra, needed, name, scale):
    """Its stage takes the budget; half an hour of a GPU is for at most 28M parameters."""
    cfg = compose("train", [f"experiment={name}", f"scale={scale}", *needed(name)])
    parts.check(cfg)
    stage = dict(cfg.budget["base" if "base" in name else "flow_map" if "flow_map" in name else "reflow"])
    if name == "custom_base":
        assert cfg.training.augment >= stage.pop("augment")  # few images need it, however short the training
    for objectives in ("warmup_steps", "share_equal"):
        stage.pop(objectives, None)
    assert {key: cfg.training[key] for key in stage} == stage
    parts.settle_net(cfg)
    with torch.device("meta"):
        size = sum(p.numel() for p in instantiate(cfg.net).parameters())
    assert size <= {"demo": 2e6, "mini": 2e6, "h100_30min": 28e6, "paper": 3e8}[scale]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "custom_finetune"])  # a base flow from a teacher
def test_a_base_flow_starts_from_scratch_and_a_reflow_from_its_teacher(hydra, name):
    cfg = compose("train", [f"experiment={name}"])
    is_base = "base" in name
    assert cfg.training.start == ("scratch" if is_base else "teacher")
    assert (OmegaConf.to_container(cfg.teacher)["path"] is None) == is_base
    is_fresh = is_base or name.endswith(("flow_map", "adversarial"))
    assert (set(instantiate(cfg.lrn.coupling).weights) == {"independent"}) == is_fresh


@pytest.mark.parametrize("name", OFFLINE)
def test_an_experiment_fits_its_data(hydra, needed, name):
    cfg = compose("evaluate", [f"experiment={name}", *needed(name), T_MAX])
    evaluate.check(cfg)
    if cfg.teacher.path is not None:
        assert {pairs.plan(cfg, kind).recipe["kind"] for kind in ("backward", "forward")} == {"backward", "forward"}
    if cfg.teacher.path is not None or "base" in name:
        recipe = train.plan(cfg).recipe
        assert recipe["config"]["training"] | {"start": cfg.training.start} == parts.plain(cfg.training)
