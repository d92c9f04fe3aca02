"""CARP beside Microsoft's sequence-models."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import protea
from conftest import Run, fails
from family_checks import (
    ALONE,
    PROTEIN,
    SEQUENCES,
    Outputs,
    check_alone,
    check_bits,
    check_lacks,
    check_mixed,
    check_narrow,
    check_packed,
    check_parity,
    ours,
    random_model,
)
from hostile import Evil
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import open_checkpoint
from protea.errors import CheckpointError, ProteaWarning
from protea.models.carp import ALPHABET, SIZES, CARPConfig
from protea.models.layers import BilinearContactHead
from protea.models.registry import build
from trials import write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = CARPConfig(num_hidden_layers=5, hidden_size=24, inner_width=12, embedding_width=6, max_dilation=10)
SEQUENCES_WITH_GAPS = [*SEQUENCES, "MK-TJ*O--W" * 5, "-", "ACD"]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of sequence-models that loads models."""
    folder = os.environ.get("PROTEA_SEQUENCE_MODELS", "")
    if not Path(folder, "sequence_models").is_dir():
        pytest.skip("PROTEA_SEQUENCE_MODELS does not name a folder with sequence-models; `make test` sets it")
    monkeypatch.setattr(sys, "path", [*sys.path, folder])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sequence_models.pretrained

    module: ModuleType = sequence_models.pretrained
    return module


@torch.no_grad()
def run_theirs(model: nn.Module, ids: Tensor) -> Outputs:
    layers = list(range(1, len(model.model.embedder.layers) + 1))
    result = model(ids[None], repr_layers=[0, *layers], logits=True)
    # Layer 0 is beside the others in the result.
    states = [result[0], *(result["representations"][layer] for layer in layers)]
    return Outputs([state[0] for state in states], result["logits"][0], [])


def test_the_alphabet_is_theirs(reference: ModuleType) -> None:
    letters = reference.PROTEIN_ALPHABET
    spelled = {"<mask>": reference.MASK, "<start>": "@"}
    assert "".join(spelled.get(token, token) for token in ALPHABET.tokens) == letters
    assert letters[ALPHABET.pad] == reference.PAD
    assert letters[ALPHABET.unk] == "X"


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ODD, id="odd"),
        pytest.param(replace(ODD, inner_width=24, kernel_size=3, max_dilation=4, hidden_act="relu"), id="wide, ReLU"),
        pytest.param(SIZES["600k"], marks=pytest.mark.long, id="600k"),
        pytest.param(replace(SIZES["640M"], num_hidden_layers=8), marks=pytest.mark.long, id="640M, 8 layers"),
    ],
)
def test_equals_sequence_models(reference: ModuleType, config: CARPConfig, tmp_path: Path) -> None:
    """Their code loads our file, and gives our numbers of one sequence and of a padded batch."""
    model = random_model(config, tmp_path)
    convert(tmp_path / "model", tmp_path / "carp_odd.pt", "sequence-models")
    theirs, _ = reference.load_model_and_alphabet(str(tmp_path / "carp_odd.pt"))
    exact = reference.load_model_and_alphabet(str(tmp_path / "carp_odd.pt"))[0].double()
    check_parity(model, lambda ids: run_theirs(theirs, ids), lambda ids: run_theirs(exact, ids), SEQUENCES_WITH_GAPS)
    rows = [torch.from_numpy(ALPHABET.encode(sequence).astype(np.int64)) for sequence in SEQUENCES_WITH_GAPS[:4]]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ALPHABET.pad)
    with torch.no_grad():
        batch = theirs(padded, logits=True)["logits"]
    for row, logits, mine in zip(rows, batch, ours(model, SEQUENCES_WITH_GAPS[:4]), strict=True):
        assert mine.logits is not None
        torch.testing.assert_close(mine.logits, logits[: len(row)], rtol=2e-5, atol=2e-5)


def test_a_file_of_theirs(reference: ModuleType, tmp_path: Path) -> None:
    """As their training program saves it."""
    from sequence_models.convolutional import ByteNetLM

    torch.manual_seed(0)
    network = ByteNetLM(30, 6, 24, 5, 5, 10, final_ln=True, slim=True, activation="gelu", padding_idx=28)
    sizes = {"d_embed": 6, "d_model": 24, "n_layers": 5, "kernel_size": 5, "r": 10}
    content = {"model": "carp_tiny", "activation": "gelu", "slim": True, "tokens": 3, **sizes}
    torch.save({**content, "model_state_dict": network.state_dict()}, tmp_path / "carp_tiny.pt")
    theirs, collater = reference.load_model_and_alphabet(str(tmp_path / "carp_tiny.pt"))
    with torch.no_grad():
        expected = theirs(collater([[PROTEIN]])[0])["representations"][5][0]
    model = protea.load(tmp_path / "carp_tiny.pt", device="cpu")
    np.testing.assert_allclose(model.embed([PROTEIN])[0], expected, rtol=0, atol=2e-5)
    assert model.config == ODD
    torch.save({**content, "model": "bigcarp", "model_state_dict": network.state_dict()}, tmp_path / "big.pt")
    torch.save({**content, "d_model": 32, "model_state_dict": network.state_dict()}, tmp_path / "wrong.pt")
    for name, part in (("big", "bigcarp"), ("wrong", "shape")):
        with pytest.raises(CheckpointError, match=rf"{name}\.pt.*{part}"):
            open_checkpoint(tmp_path / f"{name}.pt")


def test_damaged_and_hostile_files(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    convert(tmp_path / "model", tmp_path / "carp.pt", "sequence-models")
    good, bad = (tmp_path / "carp.pt").read_bytes(), tmp_path / "bad.pt"
    for length in range(1, len(good), len(good) // 40):
        bad.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            open_checkpoint(bad)
    content = torch.load(tmp_path / "carp.pt")
    wrong = {
        "n_layers": 10**9,
        "d_model": -1,
        "kernel_size": 4,
        "r": 0,
        "activation": "tanh",
        "d_embed": "8",
        "slim": 3,
    }
    for name, value in wrong.items():
        torch.save({**content, name: value}, bad)
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            open_checkpoint(bad)
    torch.save({**content, "activation": Evil(f"touch {tmp_path / 'marker'}")}, bad)
    with pytest.raises(CheckpointError, match="hostile"):
        open_checkpoint(bad)
    assert not (tmp_path / "marker").exists()


def test_neighbours_in_a_pack_change_nothing(tmp_path: Path) -> None:
    """Convolutions do not read beyond the ends, whatever stands there."""
    model = random_model(ODD, tmp_path)
    check_alone(model, SEQUENCES_WITH_GAPS)
    (alone,) = ours(model, [PROTEIN])
    for neighbours in (["W" * 300, "C" * 300], ["-", "M"], ["<mask>" * 20, PROTEIN]):
        between = ours(model, [neighbours[0], PROTEIN, neighbours[1]])[1]
        for a, b in zip(alone.tensors(), between.tensors(), strict=True):
            assert (a - b).abs().max() <= ALONE * max(1.0, a.abs().max().item())
    check_packed(tmp_path / "model")


def test_the_same_bits_in_every_pack(tmp_path: Path) -> None:
    random_model(replace(SIZES["600k"], num_hidden_layers=9), tmp_path)
    with pytest.warns(ProteaWarning, match="gaps"):
        check_bits(tmp_path / "model", SEQUENCES_WITH_GAPS)


def test_fast(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    check_mixed(tmp_path / "model")
    check_narrow(tmp_path / "model")


def test_parameters_of_the_published_models() -> None:
    """Table S1 of the paper says 600 thousand, 38, 76 and 643 million."""
    counts = [sum(parameter.numel() for parameter in build(config).parameters()) for config in SIZES.values()]
    assert [round(count / 1e5) / 10 for count in counts] == [0.6, 37.9, 75.7, 643.0]


def test_gradients_reach_every_weight(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    model = protea.load(tmp_path / "model", device="cpu", trainable=True).module
    from protea.packing import pack

    batch = pack([ALPHABET.encode(PROTEIN), ALPHABET.encode("MKT-W")])
    model.head(model(batch)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_commands(run: Run, tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    (tmp_path / "in.fasta").write_text(f">a\n{PROTEIN}\n>b\nMKTJUX\n")
    (tmp_path / "one.fasta").write_text(f">a\n{PROTEIN}\n")
    for command in (
        ("info", "model"),
        ("info", "carp_640M"),
        ("embed", "in.fasta", "-m", "model", "-o", "o.parquet", "-r", "r.h5", "--logits", "l.h5", "--pool", "mean"),
        ("perplexity", "in.fasta", "-m", "model"),
        ("score", "one.fasta", "-m", "model", "-v", "K2A,A4V:K8R"),
        ("init", "carp_600k", "-o", "new", "--seed", 1),
        ("convert", "new", "carp_600k.pt", "--to", "sequence-models"),
        ("info", "carp_600k.pt"),
    ):
        result = run(*command)
        assert result.code == 0, result
    with h5py.File("r.h5") as file:
        assert file["b"].shape == (6, 24)
    model = protea.load(tmp_path / "model", device="cpu")
    check_lacks(model, attention=lambda: model.attention(PROTEIN, layers=[1]), contacts=lambda: model.contacts(PROTEIN))
    fails(run("contacts", "one.fasta", "-m", "model", "-o", "c.h5"), 1, "CARP", "--head bilinear")
    fails(run("convert", "model", "carp.pt"), 1, "CARP", "--to hf or sequence-models")
    fails(run("embed", "in.fasta", "-m", "carp_38M", "-o", "p.h5"), 1, "zenodo.org")
    trainable = protea.load(tmp_path / "model", device="cpu", trainable=True)
    trainable.module.contact_head = BilinearContactHead(24, 4)
    trainable.save(tmp_path / "bilinear")
    assert run("contacts", "one.fasta", "-m", "bilinear", "-o", "maps.h5").code == 0
    changes = ("model.num_hidden_layers=2", "model.hidden_size=12", "model.inner_width=6", "run.steps=2")
    sizes = ("batch.tokens=256", "batch.pack=128", "data.max_tokens=64", "schedule.warmup=1", "run.compile=false")
    data = ("data.fasta=many.fasta", "data.cluster=false", "run.precision=float32", "validation.tokens=256")
    write_fasta(tmp_path / "many.fasta", 1000)
    result = run("pretrain", "carp_640M", *changes, *sizes, *data, "log.tensorboard=false", "-o", "trained")
    assert result.code == 0, result
    assert run("export", "trained", "-o", "exported").code == 0
