"""What baselines say where the data say nothing."""

from __future__ import annotations

import warnings

import numpy as np

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
