"""Counts of classes against plain loops, for classes of sequences and of residues, and for labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protea.finetune.class_counts import class_notes, class_table
from protea.finetune.tasks import PARTS
from tunings import examples


@pytest.mark.parametrize("task", ["sequence-class", "residue-class", "multilabel"])
def test_counts_are_those_of_a_loop(task: str) -> None:
    data = examples(task, 20)
    table = class_table(data)
    for place, name in enumerate(table["class"].to_pylist()):
        for part in PARTS:
            expected = 0
            for example, target in zip(data.examples, data.targets, strict=True):
                for row in target if example.part == part else ():
                    expected += bool(row[place] == 1 if task == "multilabel" else row == place)
            assert table[part][place].as_py() == expected, (name, part)


def test_notes_are_of_examples_not_of_residues() -> None:
    """A class of many residues in one protein has one example; missing residues are of no class."""
    data = examples("residue-class", 3)
    numbers = [np.array([0, 1, -1, 2, 2]), np.array([0, 1, 1]), np.array([0, 1])]
    found = [replace(example, part="test" if place == 2 else "train") for place, example in enumerate(data.examples)]
    data = replace(data, classes=("a", "b c", "B  C"), examples=found, targets=numbers)
    alike, single, absent = class_notes(data)
    assert "'b c' and 'B  C'" in alike
    assert single.endswith("one example: 'B  C'")
    assert absent.endswith("them: 'B  C'")
    assert class_notes(examples("sequence-value", 3)) == []
