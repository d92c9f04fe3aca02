"""Solved linear heads beside scikit-learn's ridge and logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor

from protea.finetune.heads import Head, HeadConfig
from protea.finetune.linear import RIDGE, LabelledRows, known, solve


def data(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * 3 + 1
    return x, x @ torch.randn(width, 3, generator=torch.Generator().manual_seed(9)) / width


def outcome(head: Head, x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    with torch.no_grad():
        return head.outcome(head(x, torch.ones(len(x)))).numpy()


@pytest.mark.parametrize(("rows", "width"), [(200, 12), (20, 60)])
def test_ridge(rows: int, width: int) -> None:
    x, y = data(rows, width)
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(5))
    target = (y[:, 0] + noise).double()
    held, truth = data(100, width, seed=3)
    config = HeadConfig(kind="linear", task="sequence-value", width=width, outputs=1)
    solved = solve(config, LabelledRows(x, target), LabelledRows(held, truth[:, 0].double()))
    spread = target.std(correction=0)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    # The objective is a mean over rows, scikit-learn's a sum.
    peer = Ridge(alpha=solved.penalty * rows, tol=1e-10).fit(scaled, (target - target.mean()) / spread)
    expected = peer.predict((held - x.mean(0)) / x.std(0, correction=0)) * float(spread) + float(target.mean())
    assert outcome(solved.head, held) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    errors = []
    for penalty in RIDGE:
        other = Ridge(alpha=penalty * rows, tol=1e-10).fit(scaled, target)
        errors.append(np.mean((other.predict((held - x.mean(0)) / x.std(0, correction=0)) - truth[:, 0].numpy()) ** 2))
    assert solved.penalty == RIDGE[int(np.argmin(errors))]


def test_logistic() -> None:
    x, y = data(300, 8)
    noise = torch.randn(300, 3, generator=torch.Generator().manual_seed(6)) * 0.5
    target = (y + noise).argmax(1)
    held, truth = data(200, 8, seed=4)
    config = HeadConfig(kind="linear", task="sequence-class", width=8, outputs=3)
    solved = solve(config, LabelledRows(x, target), LabelledRows(held, truth.argmax(1)))
    scale = lambda z: ((z - x.mean(0)) / x.std(0, correction=0)).double().numpy()  # noqa: E731
    peer = LogisticRegression(C=1 / (solved.penalty * len(x)), tol=1e-8, max_iter=5000).fit(scale(x), target)
    assert outcome(solved.head, held) == pytest.approx(peer.predict_proba(scale(held)), abs=2e-3)


def test_labels_are_solved_one_by_one() -> None:
    x, y = data(300, 8)
    noise = torch.randn(300, 3, generator=torch.Generator().manual_seed(7)) * 0.5
    target = (y + noise > 0).double()
    target[::7, 1] = torch.nan
    held, truth = data(200, 8, seed=4)
    config = HeadConfig(kind="linear", task="multilabel", width=8, outputs=3)
    solved = solve(config, LabelledRows(x, target), LabelledRows(held, (truth > 0).double()))
    scale = lambda z: ((z - x.mean(0)) / x.std(0, correction=0)).double().numpy()  # noqa: E731
    total = int((~target.isnan()).sum())
    for label in range(3):
        rated = ~target[:, label].isnan()
        peer = LogisticRegression(C=1 / (solved.penalty * total), tol=1e-8, max_iter=5000)
        peer.fit(scale(x[rated]), target[rated, label])
        assert outcome(solved.head, held)[:, label] == pytest.approx(peer.predict_proba(scale(held))[:, 1], abs=2e-3)


def test_weights_of_classes() -> None:
    x, y = data(300, 8)
    target = (y + torch.randn(300, 3, generator=torch.Generator().manual_seed(6))).argmax(1)
    weights = torch.tensor([1.0, 3.0, 0.5])
    config = HeadConfig(kind="linear", task="sequence-class", width=8, outputs=3)
    solved = solve(config, LabelledRows(x, target), LabelledRows(x, target), weights)
    scale = lambda z: ((z - x.mean(0)) / x.std(0, correction=0)).double().numpy()  # noqa: E731
    c = 1 / (solved.penalty * float(weights[target].sum()))
    weighed = dict(enumerate(weights.tolist()))
    peer = LogisticRegression(C=c, class_weight=weighed, tol=1e-8, max_iter=5000).fit(scale(x), target)
    assert outcome(solved.head, x) == pytest.approx(peer.predict_proba(scale(x)), abs=5e-3)


def test_rows_without_a_label_are_left_out() -> None:
    x = torch.arange(8.0).reshape(4, 2)
    assert known(x, torch.tensor([0, -1, 2, -1])).x.tolist() == [[0, 1], [4, 5]]
    assert known(x, torch.tensor([0.0, torch.nan, 2, 1])).targets.tolist() == [0, 2, 1]
    assert len(known(x, torch.tensor([[torch.nan, 1.0]] * 2 + [[torch.nan] * 2] * 2)).x) == 2


def test_constant_inputs_do_not_divide_by_zero() -> None:
    x, y = data(50, 5)
    x[:, 2] = 4
    config = HeadConfig(kind="linear", task="sequence-value", width=5, outputs=1)
    found = outcome(solve(config, LabelledRows(x, y[:, 0].double()), LabelledRows(x, y[:, 0].double())).head, x)
    assert np.isfinite(found).all()
