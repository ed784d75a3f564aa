"""Guidance: a velocity v led away from a weaker one (Simple ReFlow, arXiv 2410.07815).

    v_w = v + w (v - v_ref)   where low <= t <= high,   v elsewhere

w = 0 is none; EDM2 and Align Your Flow write lam_guid = 1 + w. Classifier-free guidance takes as v_ref the same network without
its label, autoguidance any second velocity. Outside the interval (Kynkäänniemi et al., arXiv 2404.07724) v alone is called.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import require
from ..flow import NO_LABEL, MeanVelocity, append_dims
from ..networks import files
from ..networks.precision import InPrecision

Rows = slice | Tensor  #: all samples of a batch, or a mask (n,) of some


@dataclass(frozen=True)
class Unguided:
    """No guidance."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strong guidance is, and at which times: `weight` is any finite w, 0 <= low < high <= 1."""

    kind: ClassVar[str]
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        for key in ("weight", "low", "high"):
            value = getattr(self, key)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            require(number, f"guidance.{key}", value, "must be a finite number")
        require(0 <= self.low < 1, "guidance.low", self.low, "must lie in [0, 1)")
        require(self.low < self.high <= 1, "guidance.high", self.high, f"must lie above guidance.low={self.low} and be at most 1")


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    """v_ref is the same network without its label (Ho and Salimans, arXiv 2207.12598)."""

    kind = "cfg"


@dataclass(frozen=True, kw_only=True)
class Auto(Guidance):
    """v_ref is the weaker velocity of a run folder or weight file (autoguidance: Karras et al., arXiv 2406.02070)."""

    kind = "auto"
    path: str | Path | None
    profile: str | None = None


class Guided(nn.Module):
    """The guided velocity, a `MeanVelocity`; `reference` None: the same velocity without its label, both in one batched call.

    A lam_guid, (n,) or (), given to a call stands there for 1 + weight. An interval shorter than [0, 1] looks at t, for which the
    CPU waits for a GPU.
    """

    velocity: MeanVelocity
    reference: MeanVelocity | None

    def __init__(
        self, velocity: MeanVelocity, reference: MeanVelocity | None, weight: float, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__()
        self.velocity, self.reference = velocity, reference
        self.weight, self.low, self.high = weight, low, high

    def forward(
        self, x_t: Tensor, t: Tensor, s: Tensor | None = None, *, label: Tensor | None = None, lam_guid: Tensor | None = None
    ) -> Tensor:
        """v + w (v - v_ref), or v outside the interval and for w = 0; see `MeanVelocity`."""
        rows = self.rows(x_t, t, lam_guid)
        if rows is None:
            return self.velocity(x_t, t, s, label=label)
        v, reference = self._both(rows, x_t, each(t, x_t), None if s is None else each(s, x_t), label)
        w = self.weight if lam_guid is None else append_dims(each(lam_guid - 1, x_t)[rows].to(v.dtype), v)
        guided = v.clone()
        guided[rows] += w * (v[rows] - reference)
        return guided

    def rows(self, x_t: Tensor, t: Tensor, lam_guid: Tensor | None = None) -> Rows | None:
        """The samples whose v_ref is asked for; None where it is nobody's."""
        if self.weight == 0 and lam_guid is None:
            return None
        if self.low == 0 and self.high == 1:
            return slice(None)
        inside = each((t >= self.low) & (t <= self.high), x_t)
        found = int(inside.sum())
        return (slice(None) if found == x_t.shape[0] else inside) if found else None

    def num_guided(self, x_t: Tensor, t: Tensor, lam_guid: Tensor | None = None) -> int:
        """How many samples of this call take a second one: what guidance costs."""
        rows = self.rows(x_t, t, lam_guid)
        return 0 if rows is None else len(x_t[rows])

    def _both(self, rows: Rows, x_t: Tensor, t: Tensor, s: Tensor | None, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """v of all samples, v_ref of `rows`."""
        x_ref, t_ref, s_ref = x_t[rows], t[rows], None if s is None else s[rows]
        if self.reference is not None:
            label_ref = None if label is None else label[rows]
            return self.velocity(x_t, t, s, label=label), self.reference(x_ref, t_ref, s_ref, label=label_ref)
        assert label is not None, "classifier-free guidance leads away from no label, so it wants labels"
        labels = torch.cat((label, torch.full_like(label[rows], NO_LABEL)))
        both_s = None if s is None or s_ref is None else torch.cat((s, s_ref))
        both = self.velocity(torch.cat((x_t, x_ref)), torch.cat((t, t_ref)), both_s, label=labels)
        return both[: x_t.shape[0]], both[x_t.shape[0] :]


def each(values: Tensor, x_t: Tensor) -> Tensor:
    """Values (n,) or () as one for each sample, (n,)."""
    return values.expand(x_t.shape[0])


class Checked(NamedTuple):
    """Guidance that suits a flow, its guide found; nothing is loaded yet. `how` None: there is none, or its weight is 0."""

    how: Guidance | None
    guide: Path | None = None
    guide_hash: str | None = None

    @property
    def recipe(self) -> dict[str, Any] | None:
        """All that it changes: kind, weight, interval and the guide's hash; None for none."""
        if self.how is None:
            return None
        strength = {key: float(getattr(self.how, key)) for key in ("weight", "low", "high")}
        return {"kind": self.how.kind, **strength, "guide": self.guide_hash}

    @property
    def origin(self) -> dict[str, Any]:
        """Where the guide was found, for a manifest."""
        return {} if self.guide is None else {"guide_path": str(self.guide.absolute())}

    def velocity(self, velocity: nn.Module, precision: str, device: torch.device) -> nn.Module:
        """The velocity guided, in evaluation mode; the guide, where there is one, comes in this precision and on this device."""
        if self.how is None:
            return velocity
        guide = None if self.guide is None else InPrecision(files.load(self.guide), precision).to(device)
        return Guided(velocity, guide, self.how.weight, self.how.low, self.how.high).eval()


def check(how: Guidance | Unguided | None, description: Mapping[str, Any], key: str = "guidance") -> Checked:
    """Find what guides a flow of this description (of its weight file) and check that it can; `UserError` otherwise."""
    if not isinstance(how, Guidance):
        return Checked(None)
    if isinstance(how, ClassifierFree):
        require_droppable_label(how, description, key)
    guide = fitting_guide(how, description, key) if isinstance(how, Auto) else None
    if how.weight == 0:
        return Checked(None)
    return Checked(how, guide, None if guide is None else files.weights_hash(guide))


def require_droppable_label(how: ClassifierFree, description: Mapping[str, Any], key: str) -> None:
    """Raise a `UserError` unless the flow takes labels and was trained without them too."""
    classes, dropped = int(description["num_classes"]), float(description.get("label_dropout", 0))
    require(classes > 0, key, how.kind, "this flow is unconditional: it has no label to leave out; auto guides any flow")
    untaught = "this flow was trained without training.label_dropout, so it never saw a missing label; auto guides any flow"
    require(dropped > 0, key, how.kind, untaught)


def fitting_guide(how: Auto, description: Mapping[str, Any], key: str) -> Path:
    """The guide's weight file; raises a `UserError` unless it has the flow's shape and takes its classes or none."""
    given = isinstance(how.path, str | Path)
    require(given, f"{key}.path", how.path, "needs a run folder or a weight file: of the weaker velocity")
    path = files.find(str(how.path), how.profile)
    guide = files.describe(path)
    shape, own = tuple(guide["shape"]), tuple(description["shape"])
    require(shape == own, f"{key}.path", path, f"makes samples of shape {shape}, but the flow that it guides makes {own}")
    classes, known = int(guide["num_classes"]), int(description["num_classes"])
    require(classes in (0, known), f"{key}.path", path, f"takes {classes} classes, but the flow that it guides {known or 'none'}")
    return path


def again(recipe: Mapping[str, Any] | None, origin: Mapping[str, Any], description: Mapping[str, Any]) -> Checked:
    """The guidance of a store's manifest; raises a `UserError` if its guide is gone or another one."""
    if recipe is None:
        return Checked(None)
    strength = {key: recipe[key] for key in ("weight", "low", "high")}
    is_auto = recipe["kind"] == Auto.kind
    how = Auto(path=origin["guide_path"], **strength) if is_auto else ClassifierFree(**strength)
    found = check(how, description)
    changed = f"has another hash than the guide of these pairs, {recipe['guide']}"
    require(found.recipe == recipe, "guidance", found.guide or recipe["kind"], changed)
    return found


def in_words(recipe: Mapping[str, Any] | None) -> str:
    """A recipe for people, e.g. `cfg 0.4 for t in [0.2, 0.8]`."""
    if recipe is None:
        return "none"
    interval = "" if (recipe["low"], recipe["high"]) == (0, 1) else f" for t in [{recipe['low']:g}, {recipe['high']:g}]"
    return f"{recipe['kind']} {recipe['weight']:g}{interval}" + (f" by {recipe['guide']}" if recipe["guide"] else "")
