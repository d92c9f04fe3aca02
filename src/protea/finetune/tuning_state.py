"""How far a tuned model is, in a folder from which a run continues to the same bits.

plan.json       what the run depends on, with the precision and the token budget that ``auto`` chose
checkpoints/    the two newest states, as pre-training writes them (``protea.train.run_checkpoints``)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from protea.errors import CheckpointError, ResumeError
from protea.journal import differences, leaves
from protea.output import write_durably
from protea.progress import Progress
from protea.train.model import Trainable
from protea.train.optim import PREFIX
from protea.train.recipe import SaveSettings
from protea.train.run_checkpoints import (
    CHECKPOINTS,
    MODEL,
    STATE,
    RunCheckpoints,
    SavedCheckpoint,
    newest_intact,
    step_folders,
    step_of,
)
from protea.train.run_state import compare_surroundings, surroundings

SAVE_SECONDS: Final = 60.0
SAVE_SHARE: Final = 0.1
"""Least time between two checkpoints, and the largest share of the time that training waits for them."""

_PLAN: Final = "plan.json"
_BEST: Final = "best."


@dataclass
class TuningState:
    """How far a run is.

    ``best`` is the step of the best validation, whose number and loss are ``selected`` and ``loss``; ``better`` is the
    step of the last one that had a better number, or a lower loss (``least``), than all before. ``total`` and ``count``
    are the training loss since the last validation, and what to divide it by. ``overflows`` counts updates in a row
    whose float16 gradients overflowed.
    """

    step: int = 0
    best: int = 0
    better: int = 0
    least: float = inf
    selected: float = -inf
    loss: float = inf
    total: float = 0.0
    count: float = 0.0
    overflows: int = 0
    ended: bool = False
    curve: list[tuple[int, float, float, float]] = field(default_factory=list)


def settle_plan(
    work: Path, plan: dict[str, Any], precision: str, token_budget: int, progress: Progress
) -> tuple[str, int]:
    """Begin a run in a folder, or check that its run is the same; returns the precision and the token budget.

    ``plan`` is what the run depends on. ``precision`` and ``token_budget`` replace ``auto`` and None in its settings; a
    run that continues keeps what it chose. Another token budget is allowed, with a note.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / _PLAN
    given = plan["settings"]
    settled = {**given, "precision": precision, "token_budget": token_budget, "recompute": None}  # changes no number
    now = json.loads(json.dumps({**plan, "settings": settled}))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        earlier = before["settings"]
    except FileNotFoundError:
        shutil.rmtree(work / CHECKPOINTS, ignore_errors=True)
        write_durably(path, json.dumps(now, indent=1))
        return precision, token_budget
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path}: cannot be read ({error!r}); pass --overwrite to start again") from error
    if given["precision"] == "auto":
        now["settings"]["precision"] = earlier["precision"]
    if given["token_budget"] in (None, earlier["token_budget"]):
        now["settings"]["token_budget"] = earlier["token_budget"]
    else:
        change = f"token_budget was {earlier['token_budget']}, is now {token_budget}"
        progress.note(f"{change}: results will not be the same to the last bit")
        earlier["token_budget"] = token_budget
    if changes := differences(leaves(before), leaves(now)):
        raise ResumeError(f"{work}: the run began with other settings: {changes}; pass --overwrite to start again")
    write_durably(path, json.dumps(now, indent=1))
    return now["settings"]["precision"], now["settings"]["token_budget"]


class TuningCheckpoints:
    """Saves and restores the state of a run; ``trained`` are the tensors that training changes, by name."""

    def __init__(self, work: Path, trainable: Trainable, trained: Mapping[str, Tensor], progress: Progress) -> None:
        self._trainable, self._trained, self._progress = trainable, trained, progress
        self._files = RunCheckpoints(work / CHECKPOINTS, SaveSettings(every=1, newest=2, best=0))
        self._next = time.monotonic() + SAVE_SECONDS

    def restore(self) -> tuple[TuningState, dict[str, Tensor]] | None:
        """The state of the newest intact checkpoint and its best weights; the model and optimizers get theirs."""
        saved = newest_intact(self._files.folder, self._progress)
        if saved is None:
            return None
        try:
            state, best = self._restored(saved)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{saved.folder / STATE}: is not from a tuned model: {error!r}") from error
        self._files.last = state.step
        if not state.ended:
            self._progress.note(f"continues after step {state.step:,}")
        return state, best

    def _restored(self, saved: SavedCheckpoint) -> tuple[TuningState, dict[str, Tensor]]:
        values, trainable = saved.values, self._trainable
        compare_surroundings(values["surroundings"], trainable, self._progress)
        tensors = saved.tensors(self._trained.items())
        with torch.no_grad():
            for name, value in self._trained.items():
                value.copy_(tensors[f"{MODEL}{name}"])
        trainable.optimizers.load({name: tensors[name] for name in tensors if name.startswith(PREFIX)})
        if trainable.precision.scaler.is_enabled() and values["scaler"]:
            trainable.precision.scaler.load_state_dict(values["scaler"])
        best = {name.removeprefix(_BEST): tensors[name].clone() for name in tensors if name.startswith(_BEST)}
        state = TuningState(**values["state"])
        state.curve = [(int(step), *map(float, rest)) for step, *rest in state.curve]  # type: ignore[misc]
        return state, best

    def save(self, state: TuningState, best: Mapping[str, Tensor], *, now: bool = False) -> None:
        """Save if it is time to, or ``now``; a thread writes while training continues."""
        if not now and time.monotonic() < self._next:
            return
        files, trainable = self._files, self._trainable
        began = time.monotonic()
        files.wait()
        if reason := files.failure(state.step):
            self._progress.note(f"a checkpoint could not be written: {reason}; tries again later")
        tensors = {f"{MODEL}{name}": value for name, value in self._trained.items()}
        tensors |= {f"{_BEST}{name}": value for name, value in best.items()}
        values = {
            "validation_loss": None,
            "state": asdict(state),
            "scaler": trainable.precision.scaler.state_dict(),
            "surroundings": surroundings(trainable),
        }
        files.save(state.step, tensors | dict(trainable.optimizers.state()), values)
        taken = time.monotonic() - began
        self._next = time.monotonic() + max(SAVE_SECONDS, taken / SAVE_SHARE)

    def newest(self) -> int:
        """The step of the newest checkpoint when everything is written; 0 if there is none."""
        self.close()
        return max(map(step_of, step_folders(self._files.folder)), default=0)

    def close(self) -> None:
        """Return when everything is written."""
        self._files.wait()
        if reason := self._files.failure(0):
            self._progress.note(f"a checkpoint could not be written: {reason}")
