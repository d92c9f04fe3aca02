"""ESM-1 beside Meta's package."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import protea
from conftest import Run, fails
from family_checks import (
    PROTEIN,
    Outputs,
    check_alone,
    check_mixed,
    check_narrow,
    check_packed,
    check_parity,
    check_quantized,
    random_model,
)
from protea.checkpoints.formats import open_checkpoint
from protea.models.encoder import Encoder
from protea.models.esm1 import ALPHABET, T6, ESM1Config
from protea.models.registry import build
from references import esm
from trials import write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = ESM1Config(num_hidden_layers=3, hidden_size=42, num_attention_heads=3, intermediate_size=130)
NAMES = {
    "word_embeddings.weight": "embed_tokens.weight",
    "lm_head.weight": "embed_out",
    "lm_head.bias": "embed_out_bias",
}


def meta_class(model: Encoder) -> nn.Module:
    """The class of Meta's package with our weights."""
    config = model.config
    assert isinstance(config, ESM1Config)
    args = Namespace(
        arch="protein_bert_base",
        layers=config.num_hidden_layers,
        embed_dim=config.hidden_size,
        ffn_embed_dim=config.intermediate_size,
        attention_heads=config.num_attention_heads,
        token_dropout=config.token_dropout,
        final_bias=config.final_bias,
    )
    theirs = esm.ProteinBertModel(args, esm.data.Alphabet.from_architecture("protein_bert_base"))
    state = {
        NAMES.get(name, name.replace(".bias_", ".self_attn.bias_")): value for name, value in model.named_parameters()
    }
    report = theirs.load_state_dict(state, strict=False)
    assert report.missing_keys == ["embed_positions._float_tensor"]
    assert not report.unexpected_keys
    return theirs.eval()


@torch.no_grad()
def run_meta(model: nn.Module, ids: Tensor) -> Outputs:
    layers = list(range(len(model.layers) + 1))
    result = model(ids[None], repr_layers=layers, need_head_weights=True)
    states = [result["representations"][layer][0] for layer in layers]
    return Outputs(states, result["logits"][0], list(result["attentions"][0]))


def test_the_alphabet_is_metas() -> None:
    theirs = esm.data.Alphabet.from_architecture("ESM-1")
    assert list(ALPHABET.tokens) == theirs.all_toks
    assert (ALPHABET.bos, ALPHABET.pad, ALPHABET.unk, ALPHABET.mask) == (
        theirs.cls_idx,
        theirs.padding_idx,
        theirs.unk_idx,
        theirs.mask_idx,
    )
    assert (theirs.prepend_bos, theirs.append_eos) == (True, False)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ODD, id="odd"),
        pytest.param(replace(ODD, token_dropout=True, final_bias=False), id="token dropout, no bias"),
        pytest.param(T6, marks=pytest.mark.long, id="43M"),
    ],
)
def test_equals_metas_class(config: ESM1Config, tmp_path: Path) -> None:
    model = random_model(config, tmp_path)
    theirs, exact = meta_class(model), meta_class(model).double()
    check_parity(model, lambda ids: run_meta(theirs, ids), lambda ids: run_meta(exact, ids))
    check_alone(model)


def test_packed_for_inference(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    check_packed(tmp_path / "model")


def test_fast(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    check_mixed(tmp_path / "model")
    check_narrow(tmp_path / "model")
    check_quantized(tmp_path / "model")


@torch.no_grad()
def test_contacts_equal_metas(tmp_path: Path) -> None:
    model = random_model(ODD, tmp_path)
    tokens = torch.from_numpy(ALPHABET.frame.around(ALPHABET.encode(PROTEIN)).astype("int64"))
    expected = meta_class(model).predict_contacts(tokens[None])[0]
    ours = protea.load(tmp_path / "model", device="cpu").contacts(PROTEIN)
    torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=0, atol=2e-5)


def test_parameters_of_the_published_models() -> None:
    """As many as Meta's class has."""
    for config, millions in ((T6, 43), (ESM1Config(**{**vars(T6), "num_hidden_layers": 12}), 85)):
        count = sum(parameter.numel() for parameter in build(config).parameters())
        assert round(count / 1e6) == millions


def test_metas_files(run: Run, tmp_path: Path) -> None:
    """A file of ours loads in Meta's package, and one with the names of the published files in ours."""
    model = random_model(ODD, tmp_path)
    result = run("convert", "model", "esm1_odd.pt")
    assert result.code == 0, result
    assert "Meta's esm" in result.out + result.err
    content = torch.load("esm1_odd.pt", weights_only=False)
    head = torch.load("esm1_odd-contact-regression.pt", weights_only=False)
    theirs, alphabet = esm.pretrained.load_model_and_alphabet_core("esm1_odd", content, head)
    assert alphabet.all_toks == list(ALPHABET.tokens)
    ids = torch.from_numpy(ALPHABET.frame.around(ALPHABET.encode(PROTEIN)).astype("int64"))
    with torch.no_grad():
        logits = theirs.eval()(ids[None])["logits"][0]
    torch.testing.assert_close(
        torch.from_numpy(protea.load("esm1_odd.pt").logits([PROTEIN])[0]), logits[1:], rtol=2e-5, atol=2e-5 * 5
    )

    content = torch.load("esm1_odd.pt", weights_only=False)
    content["args"] = Namespace(
        arch="protein_bert_base",
        decoder_layers=3,
        decoder_embed_dim=42,
        decoder_ffn_embed_dim=130,
        decoder_attention_heads=3,
        final_bias=True,
    )
    content["model"]["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    torch.save(content, "published.pt")
    with open_checkpoint(Path("published.pt")) as checkpoint:
        again = checkpoint.load(dtype=torch.float32, device=torch.device("cpu"))
    assert again.contact_head is None
    for name, value in again.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name


def test_commands(run: Run, tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    (tmp_path / "in.fasta").write_text(f">a\n{PROTEIN}\n>b\nMKTJ*OU\n")
    for command in (
        ("info", "model"),
        ("info", "esm1_t34_670M_UR50S"),
        ("embed", "in.fasta", "-m", "model", "-o", "o.parquet", "-r", "r.h5", "--pool", "mean,bos"),
        ("perplexity", "in.fasta", "-m", "model", "--against", "fair-esm"),
        ("contacts", "in.fasta", "-m", "model", "-o", "maps.h5"),
        ("init", "esm1_t6_43M_UR50S", "-o", "new", "--seed", 1),
    ):
        result = run(*command)
        assert result.code == 0, result
    (tmp_path / "one.fasta").write_text(f">a\n{PROTEIN}\n")
    assert run("score", "one.fasta", "-m", "model", "-v", "K2A,A4V:K8R").code == 0
    changes = ("model.num_hidden_layers=2", "model.hidden_size=12", "model.num_attention_heads=2", "run.steps=2")
    sizes = (
        "model.intermediate_size=24",
        "batch.tokens=256",
        "batch.pack=128",
        "data.max_tokens=64",
        "schedule.warmup=1",
    )
    data = (
        "data.fasta=many.fasta",
        "data.cluster=false",
        "run.precision=float32",
        "validation.tokens=256",
        "log.tensorboard=false",
        "run.compile=false",
    )
    write_fasta(tmp_path / "many.fasta", 1000)
    result = run("pretrain", "esm1", *changes, *sizes, *data, "-o", "trained")
    assert result.code == 0, result
    assert run("export", "trained", "-o", "exported").code == 0
    fails(run("convert", "model", "esm1.nemo"), 1, "ESM-1")
    fails(run("embed", "in.fasta", "-m", "esm1_t34_670M_UR50S", "-o", "p.h5"), 1, "dl.fbaipublicfiles.com")
