"""The part ``flip-lora``: ``protea finetune --method lora`` on the tasks of FLIP that a folder has, with several seeds.

All tasks, by importance, are trained with the first seed, then all with the next one, so that a part that is cut off
leaves a number for as many tasks as possible. Each training is a row, written when it has ended. One that takes longer
than its limit is given up and says so, and its task gets no further seed. Splits, heads and rates are those of the
recipes ``flip/TASK``; epochs and batches are PLANS, chosen so that a training ends in about a minute, and are fewer
than those of Schmirler et al. 2024. There are no baselines, and the states are computed in bf16-mixed.

Two tasks have another split where FLIP's own is absent: ``scl`` the stand-in that ``protea evaluate flip`` leaves in
OUT/scl/, put into FLIP/scl/ (to make it takes minutes), and ``meltome`` its first official split.

Usage: python benchmarks/gpu/lora_flip.py OUT WORK FLIP MODEL [--tasks "NAME ..."] [--seeds "N ..."] [--limit SECONDS]
       [--dry-run]
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_tests import SKIPPED
from records import append

from protea.errors import ProteaError
from protea.finetune.evaluation import OURS
from protea.finetune.finetune_settings import FinetuneSettings, parse
from protea.finetune.finetuning import Finished, finetune
from protea.finetune.flip import NUMBERS
from protea.finetune.flip_data import FILES, find, located, read_recipe
from protea.progress import Progress

PLANS = {
    "gb1": (10.0, 8),
    "secondary_structure": (1.0, 32),
    "scl": (1.0, 32),
    "meltome": (3.0, 16),
    "conservation": (1.0, 32),
}
"""Tasks by importance, with epochs and batch."""
OTHERWISE = {"scl": "scl/stand-in-for-mixed_soft.csv", "meltome": "meltome/clustered_task_2021.csv"}


class TooSlowError(Exception):
    """A training took longer than its limit."""


class Clock(Progress):
    """Gives up at the next sign of progress after a limit of seconds; keeps the seconds of each stage."""

    def __init__(self, limit: float) -> None:
        self.began = time.perf_counter()
        self.limit = limit
        self.stages: dict[str, float] = {}
        self._stage, self._since = "reading", self.began

    def begin(self, task: str, total: int | None = None, *, done: int = 0) -> None:
        """Called at the start of a stage."""
        self.lap()
        self._stage = task
        self.advance(0)

    def advance(self, amount: int = 1) -> None:
        """Called after each unit of work."""
        self.lap()
        if time.perf_counter() - self.began > self.limit:
            raise TooSlowError

    def note(self, message: str) -> None:
        """Show it in the log."""
        print(message, flush=True)

    def lap(self) -> None:
        """Add the time since the last sign of progress to the current stage."""
        now = time.perf_counter()
        self.stages[self._stage] = self.stages.get(self._stage, 0.0) + now - self._since
        self._since = now


def options(folder: Path, task: str) -> dict[str, Any] | None:
    """The options of a task with the files in a folder; ``None`` if they are absent."""
    values = read_recipe(f"flip/{task}")
    if task in OTHERWISE and find(folder, values["data"]) is None:
        values["data"] = OTHERWISE[task]
    if all(find(folder, values[name]) for name in FILES if name in values):
        return located(values, folder)
    return None


def settings_of(given: argparse.Namespace, task: str, values: dict[str, Any], seed: int) -> FinetuneSettings:
    """The settings of one training."""
    epochs, batch = PLANS[task]
    ours = {
        "model": given.model,
        "output": given.work / "flip" / f"{task}-{seed}",
        "method": "lora",
        "seed": seed,
        "epochs": 1.0 if given.dry_run else epochs,
        "batch": batch,
        "baselines": False,
        "device": "cpu" if given.dry_run else "cuda",
        "dtype": "float32" if given.dry_run else "bf16-mixed",
        "precision": "float32" if given.dry_run else "bf16-mixed",
    }
    return parse(values | ours, f"flip/{task}")


def numbers(finished: Finished, task: str) -> dict[str, float | None]:
    """The numbers of FLIP's table on the test part, with the ends of their intervals."""
    found: dict[str, float | None] = {}
    for row in finished.measured.metrics.to_pylist():
        if row["method"] == OURS and row["part"] == finished.measured.part and row["number"] in NUMBERS[task]:
            found[row["number"]] = row["value"]
            found |= {f"{row['number']}_{end}": row[end] for end in ("low", "high") if row[end] is not None}
    return found


def train(given: argparse.Namespace, task: str, values: dict[str, Any], seed: int) -> str | None:
    """Train once and add a row; returns why there are no numbers."""
    settings, clock = settings_of(given, task, values, seed), Clock(given.limit)
    if not given.dry_run:
        torch.cuda.reset_peak_memory_stats()
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    reason = None
    try:
        finished = finetune(settings, progress=clock)
        found = {"tested": finished.measured.examples, **numbers(finished, task)}
        del finished
    except TooSlowError:
        reason = f"longer than its limit of {given.limit:g} s"
    except ProteaError as error:
        reason = str(error)
    row = {"task": task, "split": Path(settings.data[0]).name.partition(".")[0], "seed": seed, "model": settings.model}
    row |= {"epochs": settings.epochs, "batch": settings.batch, "seconds": time.perf_counter() - clock.began}
    clock.lap()
    row["stages"] = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in clock.stages.items())
    row["peak_memory"] = None if given.dry_run else torch.cuda.max_memory_allocated()
    append(given.out, "flip-lora", "flip", **row, reason=reason, **found)
    # Hidden states of all residues can be 14 GB.
    shutil.rmtree(settings.output.parent)
    gc.collect()
    if not given.dry_run:
        torch.cuda.empty_cache()
    return reason


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model")
    parser.add_argument("--tasks", default="", help="these alone, in this order")
    parser.add_argument("--seeds", default="0 1 2")
    parser.add_argument("--limit", type=float, default=150.0, help="most seconds of a training, tests included")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    try:
        import peft  # noqa: F401
    except ImportError as error:
        print(f"peft cannot be imported: carry it and what it needs in WHEELS ({error})")
        sys.exit(SKIPPED)
    tasks = given.tasks.split() or list(PLANS)
    if unknown := [task for task in tasks if task not in PLANS]:
        raise SystemExit(f"no task {unknown[0]!r}; there are {', '.join(PLANS)}")
    there = {task: values for task in tasks if (values := options(given.folder, task)) is not None}
    for task in (task for task in tasks if task not in there):
        append(given.out, "flip-lora", "flip", task=task, model=given.model, reason=f"{given.folder} lacks its files")
    if not there:
        raise SystemExit(f"{given.folder}: nothing of FLIP is here")
    failed: dict[str, str] = {}
    for seed in map(int, given.seeds.split()):
        for task in [task for task in there if task not in failed]:
            if reason := train(given, task, dict(there[task]), seed):
                failed[task] = reason
    if failed:
        print("; ".join(f"{task}: {reason}" for task, reason in failed.items()))
        sys.exit(1)


if __name__ == "__main__":
    main()
