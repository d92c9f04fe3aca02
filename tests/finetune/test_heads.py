"""Heads beside PyTorch's own layers on one sequence at a time, and their losses beside scikit-learn's."""

from __future__ import annotations

from math import nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch import nn

from protea.errors import UsageError
from protea.finetune.heads import HEADS, Head, HeadConfig, PackedConv, combined
from protea.finetune.tasks import TASKS


def head_of(kind: str, task: str, outputs: int = 3, width: int = 6) -> Head:
    torch.manual_seed(0)
    head = Head(HeadConfig(kind=kind, task=task, width=width, outputs=outputs, hidden=5))
    head.centre.normal_()
    head.spread.uniform_(0.5, 2)
    return head.eval()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.sampled_from([1, 3, 7, 9]), st.integers(0, 99))
def test_packed_convolution_is_that_of_each_sequence(lengths: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(lengths), 4, generator=generator)
    torch.manual_seed(seed)
    packed = PackedConv(4, 3, width)
    plain = nn.Conv1d(4, 3, width, padding=width // 2)
    plain.load_state_dict(packed.state_dict())
    with torch.no_grad():
        expected = torch.cat([plain(part.T[None])[0].T for part in x.split(lengths)])
        torch.testing.assert_close(packed(x, torch.tensor(lengths)), expected, rtol=1e-5, atol=1e-5)


CASES = [
    (kind, task)
    for task in ("residue-class", "residue-value", "sequence-class", "sequence-value", "multilabel", "pair-class")
    for kind in HEADS[TASKS[task].unit]
]


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_what_shares_a_batch_changes_nothing(kind: str, task: str) -> None:
    head = head_of(kind, task)
    vectors = head.config.reads != "residues"
    lengths = [1, 1, 1, 1, 1, 1] if vectors else [4, 1, 9, 2, 7, 3]
    x = torch.randn(sum(lengths), 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = head(x, torch.tensor(lengths))
        size = 2 if TASKS[task].unit == "pair" else 1
        parts, counts = x.split(lengths), torch.tensor(lengths)
        single = [head(torch.cat(parts[i : i + size]), counts[i : i + size]) for i in range(0, 6, size)]
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-5, atol=1e-6)
    assert together.shape == (sum(lengths) if TASKS[task].unit == "residue" else 6 // size, 3)


def test_the_order_of_a_pair_does_not_matter() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(combined(x), combined(x[[1, 0, 3, 2, 5, 4, 7, 6]]), rtol=0, atol=0)


def test_losses() -> None:
    """Summed over labelled rows alone; the mean is scikit-learn's."""
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    head = head_of("linear", "sequence-class")
    targets = torch.tensor([0, 2, -1, 1, 2, -1])
    total, count = head.loss(outputs, targets)
    known = targets >= 0
    assert count == 4
    assert float(total / count) == pytest.approx(
        log_loss(targets[known], outputs[known].double().softmax(1), labels=[0, 1, 2])
    )
    weights = torch.tensor([1.0, 2.0, 0.5])
    total, count = head.loss(outputs, targets, weights)
    assert float(count) == 1 + 0.5 + 2 + 0.5
    labels = torch.tensor([[1, 0, nan], [nan, nan, nan], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, nan, 0]])
    total, count = head_of("linear", "multilabel").loss(outputs, labels)
    rated = ~labels.isnan()
    assert count == 13
    expected = log_loss(labels[rated], outputs.double()[rated].sigmoid(), labels=[0, 1])
    assert float(total / count) == pytest.approx(expected, rel=1e-5)
    values = head_of("linear", "sequence-value", outputs=1)
    values.target.copy_(torch.tensor([10.0, 2.0]))
    targets = torch.tensor([10.0, nan, 14.0, 8.0, nan, 12.0])
    total, count = values.loss(outputs[:, :1], targets)
    assert count == 4
    error = (values.outcome(outputs[:, :1])[~targets.isnan()] - targets[~targets.isnan()]) / 2
    assert float(total) == pytest.approx(float((error**2).sum()), rel=1e-5)


def test_outcomes_are_probabilities_or_values() -> None:
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    assert head_of("linear", "sequence-class").outcome(outputs).sum(1).tolist() == pytest.approx([1] * 5)
    labels = head_of("linear", "multilabel").outcome(outputs)
    torch.testing.assert_close(labels, outputs.double().sigmoid())


def test_a_head_that_the_task_cannot_have() -> None:
    with pytest.raises(UsageError, match=r"--head cnn.*linear, mlp, light-attention"):
        HeadConfig(kind="cnn", task="sequence-class", width=3, outputs=2)
