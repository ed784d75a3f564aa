"""The verb `export`: the weights of a run as one file, for another machine."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..arguments import Parser
from ..errors import require
from . import files

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def main(argv: Sequence[str]) -> None:
    """Write one profile of a run, or a weight file, as a file of its own."""
    args = parser().parse_args(argv)
    require(args.out.parent.is_dir(), "--out", args.out, "its folder does not exist")
    require(not args.out.exists(), "--out", args.out, "is there already")
    path = files.find(args.source, args.profile)
    network, description = files.load(path), files.describe(path)
    files.save(network, args.out, description, DTYPES[args.dtype])
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {description.get('profile', 'weights')} of {path}, {size:.1f} MB; use it as teacher.path={args.out}")


def parser() -> Parser:
    """The words of the verb."""
    made = Parser(prog="reflow-lab export", description="Weights of a run as one file, which any verb takes.")
    made.add_argument("source", metavar="RUN|FILE", help="a finished run's folder, or a weight file")
    made.add_argument("--out", type=Path, required=True, metavar="FILE", help="e.g. base.safetensors")
    made.add_argument("--profile", help="raw or an average; by default the average with the longest half-life")
    made.add_argument("--dtype", choices=list(DTYPES), default="float16", help="float16 is half the size (default)")
    return made
