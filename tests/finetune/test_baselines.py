"""What baselines say where the data say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from protea.finetune import baselines, linear
from protea.finetune.baselines import BASELINES
from protea.finetune.tasks import TASKS, Labelled, LabelledExample


def test_a_label_without_any_training_label() -> None:
    """Nothing is known of it, and the other labels keep their numbers."""
    texts = ["MKTAYIAK", "GGHHKLMA", "WWYYACDE", "MKTAYIAR", "GGHHKLMV", "WWYYACDF"]
    parts = ["train"] * 3 + ["validation"] * 2 + ["test"]
    examples = [
        LabelledExample(f"p{n}", (text,), part, f"row {n}")  # type: ignore[arg-type]
        for n, (text, part) in enumerate(zip(texts, parts, strict=True))
    ]
    targets = [np.array([[n % 2, np.nan if part == "train" else 1.0]]) for n, part in enumerate(parts)]
    data = Labelled(TASKS["multilabel"], ("known", "unknown"), examples, [*targets])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name: predict(data, ["test"])["test"] for name, predict in BASELINES.items()}
    np.testing.assert_allclose(found["constant"], [[1 / 3, 0.5]])
    assert all(np.isfinite(values).all() for values in found.values())


LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def every_position(data: Labelled) -> Tensor:
    """``[.., L * 21]``: all residues of all positions."""
    texts = [text for example in data.examples for text in example.sequences]
    numbers = torch.tensor([[LETTERS.find(letter) % 21 for letter in text] for text in texts])
    return torch.nn.functional.one_hot(numbers, 21).flatten(1).float()


def variants(task: str, seed: int, length: int, positions: int, count: int) -> Labelled:
    """Variants of one protein, a third of which are held out; these also have X and residues that training lacks."""
    rng = np.random.default_rng(seed)
    wild = rng.choice(list(LETTERS), length)
    places = rng.choice(length, positions, replace=False)
    pair = task.startswith("pair")
    examples, targets = [], []
    for number in range(count):
        part = ("train", "train", "validation", "test")[number % 4]
        texts = []
        for _ in range(2 if pair else 1):
            text = wild.copy()
            text[places] = rng.choice(list("ACDX" if part == "train" else LETTERS + "X"), positions)
            texts.append("".join(text))
        examples.append(LabelledExample(f"v{number}", tuple(texts), part, f"row {number}"))  # type: ignore[arg-type]
        value = sum(text.count("A") - text.count("D") for text in texts) + 0.3 * rng.normal()
        targets.append(np.array([value]) if task.endswith("value") else np.array([int(value > 0)]))
    return Labelled(TASKS[task], () if task.endswith("value") else ("low", "high"), examples, [*targets])


@pytest.mark.parametrize("task", ["sequence-value", "sequence-class", "pair-value", "pair-class"])
@given(seed=st.integers(0, 1000), length=st.integers(4, 30), count=st.integers(16, 60))
def test_columns_that_never_vary_change_nothing(task: str, seed: int, length: int, count: int) -> None:
    """Beside the model of all residues of all positions: up to rounding, and the tolerance of L-BFGS.

    At weaker penalties, the iterations of logistic regression end before it converges.
    """
    data = variants(task, seed, length, 4, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LOGISTIC", (1.0, 0.1))
        expected = baselines._linear(data, ["validation", "test"], every_position)
        found = BASELINES["one-hot"](data, ["validation", "test"])
    for part, values in expected.items():
        np.testing.assert_allclose(found[part], values, rtol=0, atol=1e-4 if task.endswith("value") else 5e-3)


def test_inputs_are_what_varies_in_the_training_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four positions of 265 vary, among A, C, D and X; equal training sequences leave one input."""
    widths = []

    def seen(solve: Callable[..., object]) -> Callable[..., object]:
        return lambda config, *rest: widths.append(config.width) or solve(config, *rest)  # type: ignore[func-returns-value]

    monkeypatch.setattr(baselines, "solve", seen(linear.solve))
    BASELINES["one-hot"](variants("sequence-value", 0, 265, 4, 100), ["test"])
    same = variants("sequence-value", 0, 265, 4, 100)
    for example in same.examples:
        object.__setattr__(example, "sequences", same.examples[0].sequences)
    found = BASELINES["one-hot"](same, ["test"])["test"]
    assert widths == [16, 1]
    np.testing.assert_allclose(found, BASELINES["constant"](same, ["test"])["test"], atol=1e-5)
