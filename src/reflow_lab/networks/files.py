"""Weight files: safetensors that say which network they belong to."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..artifacts import Artifact, file_hash, read_json, write_atomically
from ..errors import UserError, bad_value

NETWORKS = "reflow_lab.networks."  #: the only place that a file's `_target_` may name


def save(network: nn.Module, path: Path, description: dict[str, Any], dtype: torch.dtype | None = None) -> None:
    """Write a network's weights with its description (key `net`: the configuration that builds it), atomically.

    `dtype` stores the floating-point tensors in another precision; they are read back as float32.
    """
    state = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_state(state, path, description)


def save_state(state: Mapping[str, Tensor], path: Path, description: dict[str, Any]) -> None:
    """Write a network's tensors as `save` does."""
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    metadata = {"reflow_lab": json.dumps(description, sort_keys=True)}
    write_atomically(path, lambda p: save_file(plain, p, metadata))


def describe(path: Path) -> dict[str, Any]:
    """The description of a weight file."""
    try:
        with safe_open(path, "pt") as file:
            description: dict[str, Any] = json.loads((file.metadata() or {})["reflow_lab"])
            description["net"]["_target_"]  # without it nothing can be built: a KeyError says so now
            return description
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run folder or a .safetensors file of reflow_lab is wanted") from None
    except (SafetensorError, KeyError, TypeError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole weight file of reflow_lab ({str(error)[:80]})") from None


def find(source: str | Path, profile: str | None = None) -> Path:
    """The weight file that a run folder or a file name means; `package:NAME` names one that ships with the package.

    In a run folder `profile` picks among raw and the averages; `default_profile` says which it is by default.
    """
    if str(source).startswith("package:"):
        return Path(__file__).parents[1] / "data" / "weights" / str(source).removeprefix("package:")
    path = Path(source)
    if not path.is_dir():
        return path
    files = {p.stem: p for p in sorted((path / "weights").glob("*.safetensors"))}
    if not files or not Artifact(path, {}).is_done():
        raise UserError(f"{path}: holds no finished training run; repeat its train command to resume it")
    name = profile or default_profile(path)
    if name not in files:
        raise bad_value("profile", name, f"allowed: {', '.join(files)}")
    return files[name]


def default_profile(run: Path) -> str:
    """The average with the longest half-life; without one the widest power-function average; without any the raw weights.

    Only what training wrote counts: an average that was reconstructed afterwards does not change the default.
    """
    written = [Path(name) for name in read_json(run / "done.json")["files"]]
    names = [path.stem for path in written if path.parent.name == "weights"]
    for kind in ("ema", "sigma"):
        if found := [name for name in names if name.startswith(kind)]:
            return max(found, key=lambda name: float(name.removeprefix(kind)))
    return "raw"


def is_own(target: str, package: str = NETWORKS) -> bool:
    """Whether a `_target_` is a class that a package of ours, by default reflow_lab.networks, itself defines.

    Its beginning alone shows nothing: `reflow_lab.networks.unet.torch.os.system` would run any command.
    """
    module, _, name = target.rpartition(".")
    if not module.startswith(package):
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__ == module


def require_own(value: Any, package: str, where: object) -> None:
    """Raise a `UserError` unless every `_target_` in what a foreign file says, nested ones too, is a class of the package."""
    targets = [str(item) for key, item in _items(value) if key == "_target_"]
    if foreign := [target for target in targets if not is_own(target, package)]:
        raise UserError(f"{where}: names {foreign[0]}, but it may build only {package}*")


def jumps(description: Mapping[str, Any]) -> bool:
    """Whether a weight file of this description holds a flow map, whose network takes s."""
    net = description["net"]
    return bool(net.get("network", net).get("jumps"))


def load(path: Path) -> nn.Module:
    """Build the network that a weight file describes and load its weights, float32, in evaluation mode."""
    net = describe(path)["net"]
    require_own(net, NETWORKS, path)
    network = instantiate(net)
    load_into(network, path)
    return network.eval()


def load_into(network: nn.Module, path: Path, key: str = "path", fresh: str | None = None) -> None:
    """Copy a file's weights into a network; a difference in names or shapes is a user's error that lists at most ten.

    Weights with `fresh` in their names stay as they are where the file has none.
    """
    state = read_state(path)
    if fresh is not None:
        state = {name: value for name, value in network.state_dict().items() if fresh in name} | state
    require_fit(network, state, key, path)
    network.load_state_dict(state)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, as they are stored."""
    describe(path)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def require_fit(network: nn.Module, state: Mapping[str, Tensor], key: str, value: object) -> None:
    """Raise a `UserError` that lists at most ten tensors if names or shapes of a state are not the network's."""
    own = network.state_dict()
    differing = sorted(n for n in {*own, *state} if n not in own or n not in state or own[n].shape != state[n].shape)
    if differing:
        shown = ", ".join(differing[:10]) + (", ..." if len(differing) > 10 else "")
        raise bad_value(key, value, f"these weights do not fit the network; {len(differing)} tensors differ: {shown}")


def weights_hash(path: Path) -> str:
    """The content hash by which later stages name these weights."""
    if not path.exists():
        raise UserError(f"{path}: no such file; a run folder or a .safetensors file of reflow_lab is wanted")
    return file_hash(path)[:16]


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _items(item)
    elif isinstance(value, list):
        for item in value:
            yield from _items(item)
