import itertools
import math

import pytest
import torch
from torch import Tensor

from reflow_lab.errors import UserError
from reflow_lab.flow import T_MAX, T_MIN
from reflow_lab.gaussian import Gaussian
from reflow_lab.inf.grids import EDM, Grid, Sigmoid, Uniform, ascending
from reflow_lab.inf.sampler import CountCalls
from reflow_lab.inf.solvers import DPM, Adaptive, Euler, FixedStep, Heun, HeunSigma, RFPlusPlus, Solver

DATA = Gaussian(mean=0.3, std=0.5)
TWO_CALL = [Heun(), HeunSigma(), DPM(0.4), DPM(0.5), DPM(1.0)]
FIXED = [Euler(), RFPlusPlus(), *TWO_CALL]


def noise(n: int = 32) -> Tensor:
    return torch.linspace(-3, 3, 2 * n, dtype=torch.float64).reshape(n, 2)


def exact(x: Tensor, t: float, s: float) -> Tensor:
    return DATA.flow_map(x, torch.tensor(t, dtype=x.dtype), torch.tensor(s, dtype=x.dtype))


def orders(solver: Solver, grid: Grid, sizes: list[int], t_max: float) -> list[float]:
    x = t_max * noise()
    errors = [(solver(DATA, x, grid(size, t_max)) - exact(x, t_max, 0.0)).abs().max().item() for size in sizes]
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    ("solver", "grid", "t_max", "order"),
    [
        (Euler(), Uniform(), 1.0, 1),
        (Euler(), Sigmoid(10), T_MAX, 1),
        (Heun(), Uniform(), 1.0, 2),
        (Heun(), Uniform(), T_MAX, 2),
        (Heun(), Sigmoid(10), T_MAX, 2),
        (HeunSigma(), Sigmoid(10), T_MAX, 2),
        (DPM(0.4), Sigmoid(10), T_MAX, 2),
        (DPM(0.5), Sigmoid(10), T_MAX, 2),
        (DPM(1.0), Sigmoid(10), T_MAX, 2),
    ],
)
def test_order_of_convergence(solver: Solver, grid: Grid, t_max: float, order: int) -> None:
    assert orders(solver, grid, [40, 80, 160, 320], t_max) == pytest.approx([order] * 3, abs=0.12)


@pytest.mark.parametrize("solver", [Euler(), *TWO_CALL], ids=repr)
def test_order_of_convergence_upward(solver: Solver) -> None:
    start = (1 - T_MIN) * exact(noise(), 1.0, 0.0)
    errors = [
        (solver(DATA, start, ascending(Sigmoid(10), size, T_MAX)) - exact(start, T_MIN, T_MAX)).abs().max().item()
        for size in (160, 320, 640)
    ]
    order = 1 if isinstance(solver, Euler) else 2
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)] == pytest.approx([order] * 2, abs=0.12)


def in_sigma(r: float, x: Tensor, times: list[float]) -> Tensor:
    """DPM-Solver(r) as the paper writes it: y = x/(1-t), d = (y - D)/sigma; the last step, to sigma = 0, is Euler's."""

    def slope(y: Tensor, sigma: float) -> Tensor:
        t = torch.tensor(sigma / (1 + sigma), dtype=y.dtype)
        return (y - DATA.denoiser(y * (1 - t), t)) / sigma

    sigmas = [t / (1 - t) for t in times]
    y = x / (1 - times[0])
    for sigma, after in itertools.pairwise(sigmas):
        d = slope(y, sigma)
        if after == 0:
            return y + (after - sigma) * d
        sigma_m = sigma ** (1 - r) * after**r
        d_m = slope(y + (sigma_m - sigma) * d, sigma_m)
        y = y + (after - sigma) * ((1 - 1 / (2 * r)) * d + d_m / (2 * r))
    raise AssertionError


@pytest.mark.parametrize("r", [0.3, 0.4, 0.5, 1.0])
def test_dpm_in_t_is_the_published_rule_in_sigma(r: float) -> None:
    grid = EDM()(6, T_MAX)
    torch.testing.assert_close(DPM(r)(DATA, T_MAX * noise(), grid), in_sigma(r, T_MAX * noise(), grid.tolist()))


def test_dpm_of_r_one_is_heun_in_sigma_and_heun_in_t_is_not() -> None:
    x, grid = T_MAX * noise(), Sigmoid(10)(5, T_MAX)
    heun_sigma = HeunSigma()(DATA, x, grid)
    torch.testing.assert_close(DPM(1.0)(DATA, x, grid), heun_sigma)
    assert (Heun()(DATA, x, grid) - heun_sigma).abs().max() > 1e-2


@pytest.mark.parametrize(("t", "t_next"), [(0.9, 0.4), (0.002, 0.1)])
def test_dpm_of_r_half_calls_at_the_geometric_midpoint_once_with_weight_one(t: float, t_next: float) -> None:
    t_m, c = DPM(0.5).stage(t, t_next)
    assert t_m / (1 - t_m) == pytest.approx(math.sqrt(t / (1 - t) * t_next / (1 - t_next)))
    assert c == pytest.approx((1 - t_m) / (1 - t))


def test_euler_is_the_same_in_sigma() -> None:
    x, times = T_MAX * noise(), Sigmoid(10)(5, T_MAX)
    y = x / (1 - times[0])
    for t, after in itertools.pairwise(times):
        d = (y - DATA.denoiser(y * (1 - t), t)) / (t / (1 - t))
        y = y + (after / (1 - after) - t / (1 - t)) * d
    torch.testing.assert_close(Euler()(DATA, x, times), y)


@pytest.mark.parametrize("solver", TWO_CALL, ids=repr)
@pytest.mark.parametrize("nfe", [1, 2])
def test_second_order_rules_are_euler_at_one_and_two_calls(solver: Solver, nfe: int) -> None:
    x, grid = T_MAX * noise(), Sigmoid(10)(nfe, T_MAX)
    assert solver.num_steps(nfe, T_MAX, 0.0) == nfe
    torch.testing.assert_close(solver(DATA, x, grid, nfe=nfe), Euler()(DATA, x, grid, nfe=nfe), rtol=0, atol=0)


@pytest.mark.parametrize("solver", FIXED, ids=repr)
@pytest.mark.parametrize("t_max", [0.5, T_MAX, 1.0])
def test_exact_number_of_calls_down_and_up(solver: Solver, t_max: float) -> None:
    for nfe in range(1, 21):
        counted = CountCalls(DATA)
        grid = Uniform()(solver.num_steps(nfe, t_max, 0.0), t_max)
        assert solver(counted, t_max * noise(), grid, nfe=nfe).isfinite().all()
        assert counted.calls == nfe
        if isinstance(solver, RFPlusPlus):
            continue
        counted = CountCalls(DATA)
        grid = ascending(Uniform(), solver.num_steps(nfe, T_MIN, t_max), t_max)
        assert solver(counted, noise(), grid, nfe=nfe).isfinite().all()
        assert counted.calls == nfe


class Times:
    """A velocity that keeps the times at which it is called."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, x_t: Tensor, t: Tensor, s: object = None, *, label: object = None, lam_guid: object = None) -> Tensor:
        assert t.shape == (len(x_t),)
        assert t.dtype == x_t.dtype
        self.times.append(t[0].item())
        return DATA.velocity(x_t, t)


@pytest.mark.parametrize(
    ("solver", "nfe", "times"),
    [
        (Heun(), 9, [1, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]),
        (Heun(), 8, [1, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]),
        (HeunSigma(), 8, [1, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]),
        (HeunSigma(), 7, [1, 0.8, 0.6, 0.4, 0.4, 0.2, 0.2]),
        (Euler(), 5, [1, 0.8, 0.6, 0.4, 0.2]),
    ],
)
def test_which_steps_are_euler(solver: Solver, nfe: int, times: list[float]) -> None:
    velocity = Times()
    assert solver.num_steps(nfe, 1.0, 0.0) == 5
    solver(velocity, noise(), Uniform()(5, 1.0), nfe=nfe)
    assert velocity.times == pytest.approx(times)


def test_the_left_over_euler_step_upward_is_at_the_noise() -> None:
    velocity = Times()
    Heun()(velocity, noise(), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64), nfe=5)
    assert velocity.times == pytest.approx([0.1, 0.4, 0.4, 0.7, 0.7])


@pytest.mark.parametrize("solver", TWO_CALL, ids=repr)
def test_without_nfe_only_singular_ends_are_euler(solver: Solver) -> None:
    down, up = CountCalls(DATA), CountCalls(DATA)
    solver(down, noise(), Uniform()(5, 0.9))
    solver(up, noise(), ascending(Uniform(), 5, 0.9))
    assert (down.calls, up.calls) == (9, 10)


@pytest.mark.parametrize("solver", [*FIXED, Adaptive()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_type_and_input(solver: Solver, dtype: torch.dtype) -> None:
    x = noise().to(dtype)
    before = x.clone()
    assert solver(DATA, x, Uniform()(4, 0.9)).dtype == dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("solver", [*FIXED, Adaptive(1e-3, 1e-3)], ids=repr)
def test_a_velocity_of_lower_precision_is_accumulated_in_that_of_x(solver: Solver) -> None:
    def velocity(x_t: Tensor, t: Tensor, s: object = None, *, label: object = None, lam_guid: object = None) -> Tensor:
        return DATA.velocity(x_t, t).bfloat16()

    x, grid = 0.9 * noise().float(), Uniform()(4, 0.9)
    low = solver(velocity, x, grid)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, solver(DATA, x, grid), rtol=0, atol=0.03)


def test_float32_agrees_with_float64() -> None:
    grid = Sigmoid(20)(20, T_MAX)
    single = DPM()(DATA, (T_MAX * noise()).float(), grid)
    torch.testing.assert_close(single.double(), DPM()(DATA, T_MAX * noise(), grid), rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", [*FIXED, Adaptive()], ids=repr)
def test_labels_reach_every_call(solver: Solver) -> None:
    label = torch.arange(32)
    seen = []

    def velocity(x_t: Tensor, t: Tensor, s: object = None, *, label: Tensor, lam_guid: object = None) -> Tensor:
        seen.append(label)
        return DATA.velocity(x_t, t)

    solver(velocity, 0.9 * noise(), Uniform()(3, 0.9), label=label)
    assert len(seen) >= 3
    assert all(given is label for given in seen)


@pytest.mark.parametrize("solver", FIXED, ids=repr)
def test_callback_sees_the_state_before_every_step(solver: Solver) -> None:
    seen: list[tuple[int, float, Tensor]] = []
    x, grid = 0.9 * noise(), Uniform()(4, 0.9)
    end = solver(DATA, x, grid, callback=lambda i, t, state: seen.append((i, t, state)))
    assert [(i, t) for i, t, _ in seen] == list(enumerate(grid[:-1].tolist()))
    assert torch.equal(seen[0][2], x)
    t, last = torch.tensor(grid[3].item(), dtype=torch.float64), seen[3][2]
    torch.testing.assert_close(end, DATA.denoiser(last, t))  # all of them end so, at t = 0


def test_rfpp_is_its_rule_and_not_euler() -> None:
    z1, times = noise(), torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    x = 0.9 * z1
    for t, t_next in itertools.pairwise(times):
        x = (1 - t_next) * DATA.denoiser(x, t) + t_next * z1
    torch.testing.assert_close(RFPlusPlus()(DATA, 0.9 * z1, times), x)
    assert (Euler()(DATA, 0.9 * z1, times) - x).abs().max() > 0.05


def test_rfpp_is_euler_on_a_straight_flow_and_in_a_first_step_from_pure_noise() -> None:
    point = Gaussian(mean=0.3, std=0.0)
    x = 0.9 * noise()
    torch.testing.assert_close(RFPlusPlus()(point, x, Uniform()(4, 0.9)), torch.full_like(x, 0.3))
    torch.testing.assert_close(Euler()(point, x, Uniform()(4, 0.9)), torch.full_like(x, 0.3))
    step = torch.tensor([1.0, 0.4], dtype=torch.float64)
    torch.testing.assert_close(RFPlusPlus()(DATA, noise(), step), Euler()(DATA, noise(), step))


def test_rfpp_refuses_to_go_upward() -> None:
    with pytest.raises(UserError, match=r"^solver=rfpp: "):
        RFPlusPlus()(DATA, noise(), ascending(Uniform(), 4, 0.9))


@pytest.mark.parametrize("t_max", [T_MAX, 1.0])
def test_adaptive_follows_the_closed_form_both_ways(t_max: float) -> None:
    solver, velocity = Adaptive(rtol=1e-8, atol=1e-8), Times()
    x = solver(velocity, t_max * noise(), Uniform()(1, t_max))
    torch.testing.assert_close(x, exact(t_max * noise(), t_max, 0.0), rtol=0, atol=2e-5)
    start = (1 - T_MIN) * x
    end = solver(velocity, start, ascending(Uniform(), 1, t_max))
    torch.testing.assert_close(end, exact(start, T_MIN, t_max), rtol=0, atol=1e-6)
    assert min(velocity.times) >= T_MIN - 1e-9
    assert max(velocity.times) <= t_max


def test_adaptive_spends_calls_by_tolerance_and_reports_at_the_grid() -> None:
    calls = []
    for tolerance in (1e-3, 1e-9):
        counted = CountCalls(DATA)
        Adaptive(tolerance, tolerance)(counted, T_MAX * noise(), Uniform()(1, T_MAX))
        calls.append(counted.calls)
    assert calls[0] < calls[1] / 2
    seen: list[tuple[float, Tensor]] = []
    Adaptive(1e-9, 1e-9)(DATA, T_MAX * noise(), Sigmoid(20)(6, T_MAX), callback=lambda i, t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == pytest.approx([*Sigmoid(20)(6, T_MAX)[:-2].tolist(), T_MIN], abs=2e-3)
    for t, x in seen:
        torch.testing.assert_close(x, exact(T_MAX * noise(), T_MAX, t), rtol=0, atol=1e-5)


def test_only_the_adaptive_solver_depends_on_its_batch() -> None:
    assert [solver.fixed_step for solver in (*FIXED, Adaptive())] == [True] * len(FIXED) + [False]


@pytest.mark.parametrize("r", [0, -0.5, 1.5, math.nan])
def test_bad_r_is_named(r: float) -> None:
    with pytest.raises(UserError, match=r"^r="):
        DPM(r)


def test_bad_tolerance_is_named() -> None:
    with pytest.raises(UserError, match=r"^rtol=0"):
        Adaptive(rtol=0)


def test_a_solver_of_ones_own_needs_its_step_only() -> None:
    class Mine(FixedStep):
        def step(self, field, x, t, t_next):  # type: ignore[no-untyped-def]
            return x + (t_next - t) * field(x, t)

    x, grid = 0.9 * noise(), Uniform()(4, 0.9)
    torch.testing.assert_close(Mine()(DATA, x, grid), Euler()(DATA, x, grid))
