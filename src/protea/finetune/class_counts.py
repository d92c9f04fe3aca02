"""How often each class or label occurs, and what looks like a mistake in it."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from protea.finetune.labelled_data import class_counts
from protea.finetune.tasks import PARTS, Ints, Labelled
from protea.text import shown

_SHOWN: Final = 8


def class_table(data: Labelled) -> pa.Table:
    """Labelled rows of each class, or with each label, in each part."""
    counts = [pa.array(class_counts(data.part(part))) for part in PARTS]
    return pa.table([pa.array(data.classes, pa.string()), *counts], names=["class", *PARTS])


def class_notes(data: Labelled) -> list[str]:
    """Notes on classes with nearly the same name, with one example, and without one in the test part."""
    if not data.classes:
        return []
    noun = "labels" if data.task.kind == "labels" else "classes"
    alike: dict[str, list[str]] = {}
    for name in data.classes:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    notes = [
        f"{noun}: {' and '.join(map(shown, names))} differ only by case or blanks; write them alike if they are one"
        for names in alike.values()
        if len(names) > 1
    ]
    if single := _listed(data, _examples(data) == 1):
        notes.append(f"{noun}: too rare to be both learned and tested, with one example: {single}")
    tested = class_counts(data.part("test"))
    if tested.any() and (absent := _listed(data, tested == 0)):
        notes.append(f"{noun} that the test part lacks, so that its numbers say nothing about them: {absent}")
    return notes


def _listed(data: Labelled, chosen: np.ndarray) -> str:
    names = [shown(data.classes[place]) for place in np.flatnonzero(chosen)]
    more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _examples(data: Labelled) -> Ints:
    """``[C]``: examples with each class or label."""
    if data.task.kind == "labels":
        return class_counts(data)
    targets = data.all_targets()
    pairs = np.unique(np.stack([targets.examples(), targets.values.astype(np.int64)], 1), axis=0)
    return np.asarray(np.bincount(pairs[:, 1][pairs[:, 1] >= 0], minlength=len(data.classes)), np.int64)
