"""The jumps of a flow map, from deterministic to renoised, on Gaussian data, whose flow map is exact."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import EDM, Sigmoid, Uniform, ascending
from reflow_lab.inf.guidance import ClassifierFree, Unguided
from reflow_lab.inf.sampler import CountCalls, advise, require_suited, sample
from reflow_lab.inf.solvers import Euler, FlowMap, row_keys
from reflow_lab.noise import normal

DATA = Gaussian(mean=0.3, std=0.5)
GAMMAS = (0.0, 0.3, 0.7, 1.0)
IRREGULAR = torch.tensor([1.0, 0.97, 0.4, 0.35, 0.02, 0.0], dtype=torch.float64)
GRIDS = {"uniform": Uniform()(4, 1.0), "sigmoid": Sigmoid(10)(6, T_MAX), "edm": EDM()(5, T_MAX), "irregular": IRREGULAR}


def at(time: float) -> Tensor:
    return torch.tensor(time, dtype=torch.float64)


def started(grid: Tensor, rows: int = 100, dim: int = 2000) -> Tensor:
    """Draws of the marginal at the first time, every coordinate one."""
    t = float(grid[0])
    return (1 - t) * DATA.mean + DATA.spread(at(t)) * normal(7, "tests/flow map", np.arange(rows), (dim,)).double()


def visited(gamma: float, grid: Tensor, x: Tensor) -> list[tuple[float, Tensor]]:
    """Every time with the state at it."""
    found: list[tuple[float, Tensor]] = []
    end = FlowMap(gamma)(DATA, x, grid, callback=lambda i, t, x: found.append((t, x)))
    return [*found, (float(grid[-1]), end)]


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("gamma", GAMMAS)
def test_every_marginal_is_kept(gamma: float, grid: Tensor) -> None:
    """Mean and standard deviation within 4.5 standard errors, at every time of any grid."""
    for t, x in visited(gamma, grid, started(grid)):
        spread, n = float(DATA.spread(at(t))), x.numel()
        assert float(x.mean()) == pytest.approx((1 - t) * 0.3, abs=4.5 * spread / n**0.5)
        assert float(x.std()) == pytest.approx(spread, abs=4.5 * spread / (2 * n) ** 0.5)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_as_much_of_the_noise_is_fresh_as_gamma_says(gamma: float) -> None:
    """A step to s leaves the correlation (1 - s) S(s') / ((1 - s') S(s)) with the state before: S' is that of kept noise."""
    x = started(IRREGULAR)
    states, kept = visited(gamma, IRREGULAR, x), 1.0
    for s, state in states[1:-1]:
        kept_spread = ((1 - gamma**2) * s**2 + (1 - s) ** 2 * 0.25) ** 0.5
        kept *= kept_spread / float(DATA.spread(at(s)))
        found = float(torch.corrcoef(torch.stack((x.flatten(), state.flatten())))[0, 1])
        assert found == pytest.approx(kept, abs=max(4.5 * (1 - kept**2) / x.numel() ** 0.5, 1e-12))
    if gamma:
        assert kept < 0.999


def test_without_fresh_noise_any_grid_is_the_ode() -> None:
    x = started(IRREGULAR, 8, 2)
    for (t, state), grid in itertools.product(visited(0.0, IRREGULAR, x), GRIDS.values()):
        torch.testing.assert_close(state, DATA.flow_map(x, at(1.0), at(t)), rtol=0, atol=1e-12)
        made = sample(DATA, x, solver=FlowMap(), grid=lambda *_, grid=grid: grid, nfe=len(grid) - 1, t_max=float(grid[0]))
        wanted = DATA.flow_map(float(grid[0]) * x, at(float(grid[0])), at(0.0))
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)


def test_gamma_one_is_jump_and_noise_again() -> None:
    """As consistency models are sampled: x0 = f(x, t, 0), x_s = (1 - s) x0 + s z, exactly."""
    grid = IRREGULAR
    x = wanted = started(grid, 8, 3)
    keys = row_keys(x)
    for i, (t, s) in enumerate(itertools.pairwise(grid.tolist())):
        rows = x.new_ones(len(x))
        wanted = wanted + (0 - t) * DATA(wanted, t * rows, 0 * rows)
        if s:
            wanted = (1 - s) * wanted + s * normal(0, f"inf/flow_map/{i}", keys, (3,)).double()
    assert torch.equal(FlowMap(1.0)(DATA, x, grid), wanted)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_sample_does_not_depend_on_its_batch(gamma: float) -> None:
    x = started(IRREGULAR, 9, 2).float()
    whole = FlowMap(gamma)(DATA, x, IRREGULAR)
    parts = [FlowMap(gamma)(DATA, part, IRREGULAR) for part in x.split([1, 3, 5])]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(FlowMap(gamma)(DATA, x.flip(0), IRREGULAR), whole.flip(0))


def test_fresh_noise_differs_between_samples_and_steps() -> None:
    class Vanishing:
        """Forgets all but the noise."""

        def __call__(self, x_t: Tensor, t: Tensor, s: Tensor | None = None, **_: object) -> Tensor:
            return x_t / t[:, None]

    x, seen = started(IRREGULAR, 4, 2), []
    FlowMap(1.0)(Vanishing(), x, IRREGULAR, callback=lambda i, t, x: seen.append(x / t))
    fresh = torch.cat(seen[1:]).flatten()
    assert len(fresh) == 4 * 2 * 4 and len(fresh.round(decimals=6).unique()) == len(fresh)


def test_the_flow_map_is_asked_once_a_step_with_label_guidance_and_aim() -> None:
    asked = []

    class Asked:
        def __call__(self, x_t: Tensor, t: Tensor, s: Tensor | None = None, **more: Tensor | None) -> Tensor:
            label, lam_guid = more["label"], more["lam_guid"]
            assert s is not None and label is not None and lam_guid is not None
            assert len(lam_guid) == len(x_t) and len({*lam_guid.tolist()}) == 1
            asked.append((t[0].item(), s[0].item(), lam_guid[0].item(), label.tolist()))
            return DATA(x_t, t, s)

    counted = CountCalls(Asked())
    label = torch.tensor([1, 0])
    sample(counted, torch.ones(2, 2).double(), solver=FlowMap(0.6, 2.0), grid=Uniform(), nfe=4, t_max=1.0, label=label)
    assert counted.calls == 4
    aims = [0.8 * s / (1 - 0.2 * s) for s in (0.75, 0.5, 0.25, 0.0)]  # sigma' = 0.8 sigma
    assert [t for t, *_ in asked] == [1.0, 0.75, 0.5, 0.25]
    assert [s for _, s, *_ in asked] == pytest.approx(aims)
    assert all(more == [2.0, [1, 0]] for _, _, *more in asked)


def test_upward_is_refused() -> None:
    with pytest.raises(UserError, match=r"inf/solver=flow_map.*noise to data only"):
        FlowMap()(DATA, torch.zeros(2, 2), ascending(Uniform(), 3, T_MAX))


def description(**more: Any) -> dict[str, Any]:
    return {"net": {"network": {"jumps": True}}, "lam_guid": [1.0, 3.0], **more}


def test_guidance_of_a_flow_map_is_its_own() -> None:
    require_suited(FlowMap(), description(), Unguided())
    require_suited(Euler(), description(), ClassifierFree(weight=1.0))
    with pytest.raises(UserError, match=r"^inf/guidance=cfg: guides velocities; .*inf\.solver\.lam_guid"):
        require_suited(FlowMap(), description(), ClassifierFree(weight=1.0))
    with pytest.raises(UserError, match=r"^inf/solver=Euler: solves an ODE, and this consistency model"):
        require_suited(Euler(), description(only_to_data=True))
    with pytest.raises(UserError, match=r"^pairs/solver=flow_map: needs a flow map"):
        require_suited(FlowMap(), {"net": {"network": {}}}, key="pairs")


ADVICE = {
    "a velocity": (Euler(), {"net": {"network": {}}}, ""),
    "as it was trained": (FlowMap(0.5, 2.0), description(), ""),
    "a strength beyond": (FlowMap(0.0, 3.5), description(), "inf.solver.lam_guid=3.5: .* in [[]1, 3[]] only"),
    "as a velocity": (Euler(), description(), "taken as a velocity.*inf=flow_map"),
    "jumps to data": (FlowMap(1.0), description(only_to_data=True), ""),
    "jumps elsewhere": (FlowMap(0.0), description(only_to_data=True), "inf.solver.gamma=0: this consistency model"),
}


@pytest.mark.parametrize("name", ADVICE)
def test_what_a_flow_map_was_not_trained_for_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    solver, about, said = ADVICE[name]
    advise(solver, about)
    err = capsys.readouterr().err
    assert re.search(said, err) if said else not err


@pytest.mark.parametrize("gamma", [-0.1, 1.0001, float("nan")])
def test_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(UserError, match=r"inf.solver.gamma=.*\[0, 1\]"):
        FlowMap(gamma)


def test_lam_guid_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"inf.solver.lam_guid=-1"):
        FlowMap(0.0, -1)
