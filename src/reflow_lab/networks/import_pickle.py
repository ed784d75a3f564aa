"""The verb `import`: a published network of EDM or EDM2 as safetensors, which any verb takes as teacher, start or weak guide."""

import shutil
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor, nn

from ..arguments import Parser
from ..artifacts import file_hash
from ..data.autoencoder import Codec
from ..errors import UserError, require
from ..flow import T_MAX
from . import files, pickles, published
from .pickles import Persistent


def main(argv: Sequence[str]) -> None:
    """Import one file, or one that a URL names, and say what it is."""
    args = parser().parse_args(argv)
    name = Path(urllib.parse.urlparse(args.source).path if is_url(args.source) else args.source).name
    target = args.out or Path(f"{Path(name).stem or 'network'}.safetensors")
    require(target.parent.is_dir(), "--out", target, "its folder does not exist")
    with at_hand(args.source) as path:
        description = convert(path, target, name)
    print(f"{target}: {summary(description)}; use it as teacher=run teacher.path={target}")


def summary(description: dict[str, Any]) -> str:
    """What was imported, in a few words."""
    kind = description["net"]["network"]["_target_"].rpartition(".")[2]
    size, classes = "x".join(map(str, description["shape"])), description["num_classes"] or "no"
    return f"{kind}, {description['num_parameters']:,} parameters, samples of {size}, {classes} classes"


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab import", description="Read a network of EDM or EDM2, running none of the code in its pickle.")
    made.add_argument("source", metavar="PATH|URL", help="a .pkl as EDM and EDM2 publish and write them")
    made.add_argument("--out", type=Path, metavar="FILE", help="default: the same name with .safetensors, in the working folder")
    return made


def is_url(source: str) -> bool:
    """Whether it is an address of the web."""
    return source.startswith(("http://", "https://"))


@contextmanager
def at_hand(source: str) -> Iterator[Path]:
    """The file itself, or a temporary copy of what a URL names."""
    if not is_url(source):
        yield Path(source)
        return
    with tempfile.NamedTemporaryFile(suffix=".pkl") as copy:
        try:
            with urllib.request.urlopen(source, timeout=60) as answer:
                shutil.copyfileobj(answer, copy)
        except OSError as error:
            reason = f"cannot be fetched ({error}); fetch it where there is a network and give the file"
            raise UserError(f"{source}: {reason}") from None
        copy.flush()
        yield Path(copy.name)


def convert(path: Path, target: Path, name: str) -> dict[str, Any]:
    """Write the network of a pickle as `target`, in the precision it was stored in; its description.

    A target that was made from the same pickle stays as it is; any other file there is refused.
    """
    network, about = read(path)
    description = {**about, "source": {"file": name, "sha256": file_hash(path)}}
    if target.exists():
        require(is_made_from(target, description["source"]), "--out", target, "is there already and holds something else")
        return files.describe(target)
    files.save(network, target, description)
    return description


def read(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The averaged network of a pickle, in the precision it was stored in, and its description."""
    wrapper = network_in(path)
    with legible(path):
        net = published.describe(wrapper)
        network = filled(net, published.state(wrapper))
    inner, count = net["network"], sum(p.numel() for p in network.parameters())
    shape = [inner["in_channels"], inner["resolution"], inner["resolution"]]
    about = {"shape": shape, "num_classes": inner["num_classes"], "t_max": T_MAX, "num_parameters": count}
    latents = {"latents": Codec().about} if inner["in_channels"] == 4 else {}  # EDM2's for ImageNet-512
    return network, {"net": net, **about, **latents}


@contextmanager
def legible(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with it; what is laid out otherwise than theirs fails in any way."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (InstantiationException, LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:100]
        raise UserError(f"{path}: not laid out as EDM's networks are ({reason})") from None


def filled(net: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The network of a description with these tensors, of which none may be missing or left over."""
    with torch.device("meta"):
        network: nn.Module = instantiate(net)
    files.require_fit(network, state, "network", net["network"]["_target_"])
    network.load_state_dict(state, assign=True)
    return network


def is_made_from(target: Path, source: dict[str, str]) -> bool:
    """Whether a file is the import of this pickle."""
    try:
        return files.describe(target).get("source") == source
    except UserError:
        return False


def network_in(path: Path) -> Persistent:
    """The averaged network, key `ema`, of a pickle."""
    found = pickles.read(path)
    network = found.get("ema") if isinstance(found, dict) else None
    require(isinstance(network, Persistent), str(path), type(found).__name__, "holds no network of EDM or EDM2 under the key ema")
    assert isinstance(network, Persistent)
    return network
