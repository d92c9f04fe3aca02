"""Features beside the embeddings of ``LanguageModel``, continuation of a killed run, and distances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import protea
from conftest import LoadModel
from protea.errors import ResumeError
from protea.finetune import features
from protea.finetune.distances import Reference
from protea.finetune.examples import Examples, prepare
from protea.finetune.features import compute, random_twin
from protea.finetune.tasks import TASKS, Labelled, LabelledExample
from protea.letters import ReportRow
from protea.packing import pack

SEQUENCES = ["MKTAYIAKQR", "G", "ACDEFGHIKLMNPQRSTVWY", "MKTAYIAKQR", "W" * 30]


def labelled(task: str, sequences: list[Any] = SEQUENCES) -> Labelled:
    texts = [(text,) if isinstance(text, str) else text for text in sequences]
    examples = [LabelledExample(f"s{i}", text, "train", f"in.fasta: s{i}") for i, text in enumerate(texts)]
    residue = TASKS[task].unit == "residue"
    targets = [np.zeros(len(text[0]) if residue else 1, np.int64) for text in texts]
    return Labelled(TASKS[task], ("a", "b"), examples, targets)


def test_vectors_and_residues(load_small: LoadModel, tmp_path: Path) -> None:
    model = load_small("esm2")
    prepared = prepare(labelled("sequence-class"), model.module, "truncate", [])
    assert prepared.which.ravel().tolist() == [0, 1, 2, 0, 3]
    layers = (0, 3)
    pooled = compute(tmp_path / "p", model.module, prepared.sequences, reads="mean", layers=layers, identity={})
    whole = compute(tmp_path / "r", model.module, prepared.sequences, reads="residues", layers=layers, identity={})
    expected = model.embed(SEQUENCES, pool="mean", layers=list(layers))
    examples = Examples.of(prepared, "train", pooled, 1)
    np.testing.assert_allclose(examples.batch(np.arange(5)).x, expected[:, 1], atol=1e-5)
    residues = model.embed(SEQUENCES, layers=0)
    batch = Examples.of(prepared, "train", whole, 0).batch(np.array([4, 0]))
    np.testing.assert_allclose(batch.x, np.concatenate([residues[4], residues[0]]), atol=1e-5)
    assert batch.lengths.tolist() == [30, 10]


def test_a_killed_run_continues_with_the_same_bits(
    load_small: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_small("esm2").module
    prepared = prepare(labelled("sequence-class"), model, "truncate", [])
    asked: Any = {"reads": "residues", "layers": (3,), "identity": {"seed": 1}, "token_budget": 20}
    whole = compute(tmp_path / "whole", model, prepared.sequences, **asked)
    monkeypatch.setattr(features, "_COMMIT_SECONDS", 0.0)
    done = 0

    original = features.write_durably

    def stop_after_two(path: Path, text: str) -> None:
        nonlocal done
        original(path, text)
        done += 1
        if done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(features, "write_durably", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "cut", model, prepared.sequences, **asked)
    with (tmp_path / "cut" / "values.f32").open("ab") as stream:
        stream.write(b"torn")
    assert 0 < json.loads((tmp_path / "cut" / "done.json").read_text())["done"] < 4
    monkeypatch.setattr(features, "write_durably", original)
    continued = compute(tmp_path / "cut", model, prepared.sequences, **{**asked, "token_budget": None})
    np.testing.assert_array_equal(continued.values, whole.values)
    with pytest.raises(ResumeError, match="other settings"):
        compute(tmp_path / "cut", model, prepared.sequences, **{**asked, "identity": {"seed": 2}})
    with (tmp_path / "cut" / "values.f32").open("ab") as stream:  # lost bytes are not taken for zeros
        stream.truncate(100)
    with pytest.raises(ResumeError, match="100 of"):
        compute(tmp_path / "cut", model, prepared.sequences, **asked)
    for text in ("{", "{}", "[]"):
        (tmp_path / "cut" / "done.json").write_text(text)
        with pytest.raises(ResumeError, match="damaged"):
            compute(tmp_path / "cut", model, prepared.sequences, **asked)


def test_labels_of_residues_that_are_cut(load_small: LoadModel) -> None:
    model = load_small("esm1nv").module
    rows: list[ReportRow] = []
    prepared = prepare(labelled("residue-class", ["M" * 600, "MK"]), model, "truncate", rows)
    assert [len(target) for target in prepared.labelled.targets] == [510, 2]
    assert [(row.id, row.what) for row in rows] == [("s0", "truncated")]


def test_pairs_share_sequences(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    prepared = prepare(labelled("pair-class", [("MK", "GG"), ("GG", "MK")]), model, "truncate", [])
    assert prepared.which.tolist() == [[0, 1], [1, 0]]
    assert len(prepared.sequences) == 2


def test_a_random_twin_has_the_same_shape_and_other_numbers(model_folders: dict[str, Path]) -> None:
    model = protea.load(model_folders["esm2"], device="cpu").module
    twin, again = random_twin(model, 5), random_twin(model, 5)
    tokens = pack([model.alphabet.frame.around(model.alphabet.encode("MKTAYIAK"))])
    with torch.inference_mode():
        one, other, ours = twin(tokens), again(tokens), model(tokens)
    assert torch.equal(one, other)
    assert one.shape == ours.shape
    assert not torch.allclose(one, ours, atol=0.1)


def test_distances() -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(50, 8)).astype(np.float32) + 3
    near, away = train[:20] + 0.01, -train[:5] * 4
    reference = Reference.of(train, near.astype(np.float32))
    assert reference.distances(train) == pytest.approx(np.zeros(50), abs=1e-5)
    assert (reference.distances(away) > reference.far).all()
    assert (reference.distances(near) <= reference.far).mean() == pytest.approx(0.95, abs=0.051)
    centred = train - train.mean(0)
    directions = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    moved = away - train.mean(0)
    expected = 1 - (moved / np.linalg.norm(moved, axis=1, keepdims=True) @ directions.T).max(1)
    assert reference.distances(away) == pytest.approx(expected, abs=1e-5)
    assert Reference.of(train, train[:0]).far == float("inf")
    assert reference.distances(train[:0]).shape == (0,)
