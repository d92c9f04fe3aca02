"""The bundled model: its files, transformers reads it, and it prefers proteins to shuffled sequences."""

from __future__ import annotations

import json
import random
import re
import socket
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch.nn import functional as F

import protea
from conftest import Run
from protea.alphabet import ESM
from protea.bundled import FOLDER, NAME
from protea.checkpoints.hub import published
from protea.fasta import read_fasta
from protea.packing import pack
from protea.train.recipe import parse

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "proteins.fasta"
CARD = ROOT / "docs" / "protea-mini.md"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("the bundled model needs no network")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def model() -> protea.LanguageModel:
    return protea.load(device="cpu")


def test_files_are_small_and_agree_with_each_other(model: protea.LanguageModel) -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 16_500_000
    assert model.config == published(NAME).config
    assert parse(yaml.safe_load((FOLDER / "recipe.yaml").read_text()), NAME).config == model.config
    assert json.loads((FOLDER / "data.json").read_text())["format"] == "protea training data"
    log = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert losses[-1] < losses[0]
    # The model card shows the same curve as the log.
    card = CARD.read_text()
    steps, perplexities = (
        [cell.strip() for cell in row.split("|")]
        for row in re.findall(r"^\| (?:step|perplexity) \|(.*)\|$", card, re.M)
    )
    curve = {f"{line['step']:,}": f"{line['validation_perplexity']:.2f}" for line in log if "validation_loss" in line}
    assert {step: curve[step] for step in steps} == dict(zip(steps, perplexities, strict=True))
    assert steps[-1] == f"{log[-1]['step']:,}"


def test_transformers_computes_the_same(model: protea.LanguageModel) -> None:
    from transformers import EsmForMaskedLM

    theirs = EsmForMaskedLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()
    sequence = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
    ids = pack([ESM.frame.around(ESM.encode(sequence))]).input_ids[None]
    with torch.inference_mode():
        output = theirs(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
    for ours, expected in (
        (model.logits([sequence])[0], output.logits[0, 1:-1]),
        (model.embed([sequence])[0], output.hidden_states[-1][0, 1:-1]),
    ):
        np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=3e-6 * float(expected.abs().max()))
    with torch.inference_mode():
        contacts = theirs.predict_contacts(ids, torch.ones_like(ids))[0]
    np.testing.assert_allclose(model.contacts(sequence), contacts.numpy(), rtol=0, atol=2e-5)


def masked_loss(model: protea.LanguageModel, sequences: list[str]) -> float:
    """Mean loss of every seventh residue when it is masked, in nats."""
    total, count = 0.0, 0
    for sequence in sequences:
        places = list(range(3, len(sequence), 7))
        hidden = "".join("<mask>" if i in places else letter for i, letter in enumerate(sequence))
        logits = torch.from_numpy(model.logits([hidden])[0][places])
        truth = torch.from_numpy(ESM.encode("".join(sequence[i] for i in places)).astype(np.int64))
        total += float(F.cross_entropy(logits, truth, reduction="sum"))
        count += len(places)
    return total / count


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_proteins_have_a_lower_loss_than_shuffled_sequences(model: protea.LanguageModel, step: int) -> None:
    sequences = [record.sequence[:500] for record in read_fasta([EXAMPLES])][::step]
    rng = random.Random(0)
    shuffled = ["".join(rng.sample(sequence, len(sequence))) for sequence in sequences]
    # A model that knew only the frequencies of letters would have the same loss on both.
    assert masked_loss(model, sequences) < masked_loss(model, shuffled) - 0.05


def test_commands_run_it_by_default(run: Run, fasta: Path, tmp_path: Path) -> None:
    result = run("embed", fasta, "-o", "s.parquet")
    assert result.code == 0, result.err
    assert pq.read_table(tmp_path / "s.parquet").num_rows == 3
    assert yaml.safe_load((tmp_path / "s.parquet.run.yaml").read_text())["model"] == NAME
    for arguments in ((), (NAME,)):
        result = run("info", *arguments)
        assert result.code == 0
        assert "ESM-2" in result.out
        assert "7,512,384" in result.out
        assert "Apache-2.0" in result.out
    result = run("check")
    assert result.code == 0, result.out
    assert len(re.findall("^pass ", result.out, re.MULTILINE)) == 2
    assert NAME in run("info", "--list").out


def test_a_folder_of_that_name_is_not_used_silently(run: Run, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    result = run("check")
    assert result.code == 0
    assert f"./{NAME}" in result.err
    result = run("check", f"./{NAME}")
    assert result.code == 1
