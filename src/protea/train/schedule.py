"""Learning rates as plain functions of the step; the first update is step 1.

    linear       max·s/w up to step w, then straight down to floor·max at step decay·S, and constant after it
    anneal-hold  min + (max - min)·s/w up to step w, then max·(1 - (s - w)/(S - w)), but at least floor·max
    cosine       max·s/w up to step w, then min + (max - min)·(1 + cos(π·(s - w)/(S - c - w)))/2, and min for the
                 last c steps
    constant     max·s/w up to step w, then max
    trapezoid    max·s/w up to step w, then max up to step decay·S, then straight down to floor·max at the last step

Here s is the step, w the warm-up, S the schedule's steps and c its constant steps. ``linear`` is the schedule of Meta's
and NVIDIA's recipes for ESM-2, ``anneal-hold`` is BioNeMo's ``WarmupAnnealDecayHold``, and ``cosine`` is NeMo's
``CosineAnnealing`` with ``constant_steps``, which ESM-1nv used. With ``trapezoid`` (Zhai et al. 2022; Hu et al. 2024) a
run can be extended while the rate is still at its maximum: the steps so far do not depend on where the run ends.
"""

from __future__ import annotations

import math

from protea.train.recipe import ScheduleSettings


def learning_rate(schedule: ScheduleSettings, step: int, *, highest: float, steps: int) -> float:
    """The learning rate of a step.

    Args:
        schedule: which curve.
        step: from 1; steps after the curve's last have its last value.
        highest: the rate at the end of the warm-up.
        steps: of the run, used if the schedule has no number of its own.
    """
    total = schedule.steps or steps
    step = min(step, total)
    warmup = schedule.warmup
    if step <= warmup:
        start = schedule.min_lr if schedule.name == "anneal-hold" else 0.0
        return start + (highest - start) * step / warmup
    match schedule.name:
        case "linear":
            end = max(warmup, round(schedule.decay * total))
            done = 1.0 if step >= end else (step - warmup) / (end - warmup)
            return highest * (1 - (1 - schedule.floor) * done)
        case "anneal-hold":
            return highest * max(schedule.floor, 1 - (step - warmup) / (total - warmup))
        case "cosine":
            end = total - schedule.constant
            done = 1.0 if step >= end else (step - warmup) / (end - warmup)
            return schedule.min_lr + (highest - schedule.min_lr) * (1 + math.cos(math.pi * done)) / 2
        case "trapezoid":
            begin = max(warmup, round(schedule.decay * total))
            done = 0.0 if step <= begin else (step - begin) / (total - begin)
            return highest * (1 - (1 - schedule.floor) * done)
        case "constant":
            return highest
