"""The verb `export`: the weights of a run, or its sampler, as one file, for another machine."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..arguments import Parser
from ..errors import require
from . import files

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def main(argv: Sequence[str]) -> None:
    """Write one profile of a run, or a weight file, as a file of its own: its weights, or with `--sampler` a program."""
    args = parser().parse_intermixed_args(argv)
    require(args.out.parent.is_dir(), "--out", args.out, "its folder does not exist")
    require(not args.out.exists(), "--out", args.out, "is there already")
    path = files.find(args.source, args.profile)
    if args.sampler:
        from ..inf.export import write  # here, since it loads torch.export and stands above this package

        require(args.dtype is None, "--dtype", args.dtype, "is of weights: a sampler's are float32")
        return write(path, args.words, args.out, args.uint8)
    given = args.words or ["--uint8"] * args.uint8
    require(not given, "export", " ".join(given), "is for --sampler")
    return weights(path, args.out, args.dtype or "float16")


def weights(path: Path, out: Path, dtype: str) -> None:
    """Write a weight file in another precision."""
    network, description = files.load(path), files.describe(path)
    files.save(network, out, description, DTYPES[dtype])
    size = out.stat().st_size / 1e6
    print(f"{out}: {description.get('profile', 'weights')} of {path}, {size:.1f} MB; use it as teacher.path={out}")


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab export", description="A run as one file: its weights, which any verb takes, or its sampler.")
    add = made.add_argument
    add("source", metavar="RUN|FILE", help="a finished run's folder, or a weight file")
    add("words", nargs="*", metavar="key=value", help="of the sampler, as `sample` takes them: nfe=4 inf/solver=heun t_max=0.9")
    add("--out", type=Path, required=True, metavar="FILE", help="e.g. base.safetensors, or sampler.pt2")
    add("--profile", help="raw or an average; by default the average with the longest half-life")
    add("--dtype", choices=list(DTYPES), help="of weights: float16 is half the size (default)")
    add("--sampler", action="store_true", help="a program of torch.export, noise to images, that needs torch alone")
    add("--uint8", action="store_true", help="the sampler's images are bytes instead of floats in [-1, 1]")
    return made
