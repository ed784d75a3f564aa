"""A lab for fast generative flow models: Simple ReFlow and Align Your Flow.

`reflow_lab.load(run_or_file)` gives a velocity, `reflow_lab.sample(velocity, num_images, nfe=9)` images; see `reflow_lab.api`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Flow, load, sample

__version__ = "0.1.0"
__all__ = ["Flow", "load", "sample"]


def __getattr__(name: str) -> Any:
    """Import torch only when it is needed: `reflow-lab --help` is not the time."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
