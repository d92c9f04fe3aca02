"""Learning rates beside numbers worked out by hand from the formulas, and PyTorch's and transformers' schedulers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, PolynomialLR
from transformers import optimization

from protea.train.optim import learning_rate
from protea.train.recipe import ScheduleSettings

ESM2 = ScheduleSettings(name="linear", warmup=2000)
ESM2NV = ScheduleSettings(name="anneal-hold", warmup=2000, min_lr=4e-5)
ESM1NV = ScheduleSettings(name="cosine", warmup=500, steps=1_000_000, min_lr=2e-5, constant=50_000)

# Reached and left at: linear falls from 2,000 to 450,000 of 500,000 steps, or to 243,000 of 270,000; anneal-hold is at
# its floor after 2,000 + 0.9 · 498,000 steps; cosine falls from 500 to 950,000, its quarters 237,375 steps each.
TABLE: list[tuple[ScheduleSettings, float, int, dict[int, float]]] = [
    (
        ESM2,
        4e-4,
        500_000,
        {
            1: 2e-7,
            1000: 2e-4,
            2000: 4e-4,
            114_000: 3.1e-4,
            226_000: 2.2e-4,
            450_000: 4e-5,
            450_001: 4e-5,
            500_000: 4e-5,
            900_000: 4e-5,
        },
    ),
    (ESM2, 1.6e-4, 270_000, {500: 4e-5, 2000: 1.6e-4, 122_500: 8.8e-5, 243_000: 1.6e-5, 270_000: 1.6e-5}),
    (
        ESM2NV,
        4e-4,
        500_000,
        {
            1: 4.018e-5,
            1000: 2.2e-4,
            2000: 4e-4,
            126_500: 3e-4,
            251_000: 2e-4,
            375_500: 1e-4,
            450_200: 4e-5,
            475_100: 4e-5,
            500_000: 4e-5,
            500_001: 4e-5,
        },
    ),
    (
        ESM1NV,
        2e-4,
        957_610,
        {
            1: 4e-7,
            250: 1e-4,
            500: 2e-4,
            237_875: 1.736396103067893e-4,
            317_000: 1.55e-4,
            475_250: 1.1e-4,
            633_500: 6.5e-5,
            712_625: 4.636038969321072e-5,
            950_000: 2e-5,
            957_610: 2e-5,
            1_000_000: 2e-5,
            1_100_000: 2e-5,
        },
    ),
    (
        ScheduleSettings(name="constant", warmup=100),
        5e-5,
        2000,
        {1: 5e-7, 50: 2.5e-5, 100: 5e-5, 101: 5e-5, 3000: 5e-5},
    ),
    (
        ScheduleSettings(name="trapezoid", warmup=10, floor=0.0, decay=0.75),
        8.0,
        100,
        {1: 0.8, 10: 8.0, 11: 8.0, 75: 8.0, 76: 7.68, 80: 6.4, 99: 0.32, 100: 0.0, 101: 0.0},
    ),
    (ScheduleSettings(name="trapezoid", warmup=0, floor=0.5, decay=1.0), 1.0, 10, {1: 1.0, 10: 1.0, 11: 1.0}),
    (ScheduleSettings(name="trapezoid", warmup=9, floor=0.5, decay=0.1), 1.0, 10, {9: 1.0, 10: 0.5}),
    # Without warm-up; the whole of it; no way from warm-up's end to decay's.
    (
        ScheduleSettings(name="linear", warmup=0, floor=0.2, decay=0.5),
        1.0,
        100,
        {1: 0.984, 25: 0.6, 50: 0.2, 100: 0.2},
    ),
    (ScheduleSettings(name="cosine", warmup=0, min_lr=0.0), 1.0, 4, {1: 0.8535533905932737, 2: 0.5, 4: 0.0, 5: 0.0}),
    (ScheduleSettings(name="anneal-hold", warmup=10, min_lr=0.5), 1.0, 10, {5: 0.75, 10: 1.0, 11: 1.0}),
    (ScheduleSettings(name="linear", warmup=95), 1.0, 100, {94: 94 / 95, 95: 1.0, 96: 0.1}),
    (ScheduleSettings(name="cosine", warmup=40, min_lr=0.1, constant=60), 1.0, 100, {40: 1.0, 41: 0.1, 100: 0.1}),
]


@pytest.mark.parametrize(("schedule", "highest", "steps", "rates"), TABLE)
def test_by_hand(schedule: ScheduleSettings, highest: float, steps: int, rates: dict[int, float]) -> None:
    ours = {step: learning_rate(schedule, step, highest=highest, steps=steps) for step in rates}
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-18)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleSettings, float, int]:
    """Any schedule that a recipe may hold, its highest rate, and the run's steps."""
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    highest = draw(st.floats(1e-6, 1.0))
    schedule = ScheduleSettings(
        name=draw(st.sampled_from(["linear", "anneal-hold", "cosine", "constant", "trapezoid"])),
        warmup=warmup,
        steps=draw(st.sampled_from([None, steps])),
        min_lr=highest * draw(st.floats(0, 1)),
        floor=draw(st.floats(0, 1)),
        decay=draw(st.floats(0.01, 1)),
        constant=draw(st.integers(0, steps - warmup)),
    )
    return schedule, highest, steps


@given(schedules())
def test_shape(made: tuple[ScheduleSettings, float, int]) -> None:
    schedule, highest, steps = made
    rates = [learning_rate(schedule, step, highest=highest, steps=steps) for step in range(1, steps + 4)]
    slack = 1e-12 * highest
    assert all(0 <= rate <= highest + slack for rate in rates)
    rising, falling = rates[: schedule.warmup], rates[max(schedule.warmup - 1, 0) :]
    assert rising == sorted(rising)
    assert all(after <= before + slack for before, after in pairwise(falling))
    if schedule.warmup:
        assert rates[schedule.warmup - 1] == pytest.approx(highest)
    assert rates[steps:] == [rates[steps - 1]] * 3
    low = {"linear": schedule.floor * highest, "cosine": schedule.min_lr}.get(schedule.name)
    if low is not None and schedule.warmup < steps:
        assert rates[-1] == pytest.approx(low, abs=slack)


def _rates(make: Callable[[torch.optim.Optimizer], LRScheduler], rate: float, steps: int) -> list[float]:
    """What a scheduler gives after so many of its steps, from 0 on."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


RATE, WARMUP, STEPS = 3e-4, 20, 120
OTHERS: dict[str, tuple[Callable[[torch.optim.Optimizer], LRScheduler], ScheduleSettings]] = {
    "transformers' linear": (
        lambda o: optimization.get_linear_schedule_with_warmup(o, WARMUP, STEPS),
        ScheduleSettings(name="linear", warmup=WARMUP, floor=0.0, decay=1.0),
    ),
    "transformers' cosine": (
        lambda o: optimization.get_cosine_schedule_with_warmup(o, WARMUP, STEPS),
        ScheduleSettings(name="cosine", warmup=WARMUP),
    ),
    "transformers' cosine to a rate": (
        lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, WARMUP, STEPS, min_lr=5e-5),
        ScheduleSettings(name="cosine", warmup=WARMUP, min_lr=5e-5),
    ),
    "transformers' constant": (
        lambda o: optimization.get_constant_schedule_with_warmup(o, WARMUP),
        ScheduleSettings(name="constant", warmup=WARMUP),
    ),
    "transformers' warm-up, stable rate and decay": (
        lambda o: optimization.get_wsd_schedule(o, WARMUP, 30, num_training_steps=STEPS, decay_type="linear"),
        ScheduleSettings(name="trapezoid", warmup=WARMUP, floor=0.0, decay=0.75),
    ),
    "PyTorch's linear": (
        lambda o: LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=90),
        ScheduleSettings(name="linear", warmup=0, floor=0.1, decay=0.75),
    ),
    "PyTorch's cosine": (
        lambda o: CosineAnnealingLR(o, T_max=STEPS, eta_min=5e-5),
        ScheduleSettings(name="cosine", warmup=0, min_lr=5e-5),
    ),
    "PyTorch's polynomial": (
        lambda o: PolynomialLR(o, total_iters=STEPS, power=1.0),
        ScheduleSettings(name="anneal-hold", warmup=0, floor=0.0),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_beside_other_schedulers(name: str) -> None:
    make, schedule = OTHERS[name]
    expected = _rates(make, RATE, STEPS)[1:]
    ours = [learning_rate(schedule, step, highest=RATE, steps=STEPS) for step in range(1, STEPS + 1)]
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-12)
