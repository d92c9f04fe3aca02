"""ProtT5 and ProstT5 beside transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import protea
from conftest import Run, fails
from family_checks import (
    PROTEIN,
    SEQUENCES,
    Outputs,
    check_alone,
    check_lacks,
    check_mixed,
    check_narrow,
    check_packed,
    check_parity,
    check_quantized,
    random_model,
)
from protea.checkpoints import hf
from protea.errors import CheckpointError, ProteaWarning
from protea.models.registry import build
from protea.models.t5 import PROST_T5, PROT_T5_XL, PUBLISHED_TOKENS, T5Config, distance_buckets
from references import logging  # noqa: F401  # quietens transformers

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE: dict[str, Any] = {"num_hidden_layers": 3, "hidden_size": 36, "num_attention_heads": 5, "intermediate_size": 70}
ODD = T5Config(**SHAPE, head_width=12)
KNOWN = [sequence.translate(str.maketrans("UZOB", "XXXX")) for sequence in SEQUENCES]
PROST = replace(ODD, vocab_size=150, tokens=PROST_T5.tokens)


def theirs(folder: Path) -> nn.Module:
    from transformers import T5EncoderModel

    model: nn.Module = T5EncoderModel.from_pretrained(folder, attn_implementation="eager").eval()
    return model


@torch.no_grad()
def run_theirs(model: nn.Module, ids: Tensor) -> Outputs:
    result = model(ids[None], output_hidden_states=True, output_attentions=True)
    return Outputs([state[0] for state in result.hidden_states], None, [each[0] for each in result.attentions])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ODD, id="odd"),
        pytest.param(replace(ODD, relative_attention_num_buckets=8, relative_attention_max_distance=20), id="buckets"),
        pytest.param(PROST, id="ProstT5"),
        pytest.param(replace(PROT_T5_XL, num_hidden_layers=1), marks=pytest.mark.long, id="XL"),
    ],
)
def test_equals_transformers(config: T5Config, tmp_path: Path) -> None:
    model = random_model(config, tmp_path)
    single, double = theirs(tmp_path / "model"), theirs(tmp_path / "model").double()
    check_parity(model, lambda ids: run_theirs(single, ids), lambda ids: run_theirs(double, ids), KNOWN)
    check_alone(model, KNOWN)


def test_packed_for_inference(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    check_packed(tmp_path / "model", KNOWN)


def test_fast(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    check_mixed(tmp_path / "model", KNOWN)
    check_narrow(tmp_path / "model", KNOWN)
    check_quantized(tmp_path / "model", KNOWN)


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 20), (64, 128)])
def test_buckets_are_those_of_transformers(buckets: int, farthest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(ahead, True, buckets, farthest)
    assert torch.equal(distance_buckets(ahead, buckets, farthest), expected)


def test_the_authors_tokens_of_prostt5() -> None:
    """``added_tokens.json`` of ``Rostlab/ProstT5``."""
    added = dict(zip("algvsredtipkfqnymhwc", range(128, 148), strict=True)) | {"<fold2AA>": 148, "<AA2fold>": 149}
    assert {token: number for number, token in enumerate(PROST_T5.tokens) if number >= 128} == added
    assert PROST_T5.vocab_size == 150


def test_parameters_of_the_published_model() -> None:
    """The encoder of T5-3B with 128 rows: 1.2 billion."""
    from transformers import T5Config as TheirConfig
    from transformers import T5EncoderModel

    described = TheirConfig(
        vocab_size=128, d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32, feed_forward_proj="relu"
    )
    with torch.device("meta"):
        expected = T5EncoderModel(described).num_parameters()
    assert sum(parameter.numel() for parameter in build(PROT_T5_XL).parameters()) == expected


def test_the_tokenizer_that_is_saved(tmp_path: Path) -> None:
    """It gives transformers' users the ids that Protea uses."""
    from transformers import AutoTokenizer

    for config in (ODD, PROST):
        model = random_model(config, tmp_path / str(len(config.tokens)))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(len(config.tokens)) / "model")
        alphabet = model.alphabet
        ids = alphabet.frame.around(alphabet.encode("MKTXW")).tolist()
        text = "M K T X W" if alphabet.bos is None else "<AA2fold> M K T X W"
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer("U B J")["input_ids"][:3] == [PUBLISHED_TOKENS.index("U"), PUBLISHED_TOKENS.index("B"), 2]


def test_transformers_4_loads_what_we_save_and_we_what_it_saves(tmp_path: Path) -> None:
    folder = os.environ.get("PROTEA_TRANSFORMERS_4")
    if folder is None:
        pytest.skip("PROTEA_TRANSFORMERS_4 does not name a folder with transformers 4; `make test` sets it")
    model = random_model(ODD, tmp_path)
    code = (
        "import sys, transformers\n"
        "from transformers import AutoTokenizer, T5EncoderModel, T5ForConditionalGeneration\n"
        "assert transformers.__version__.startswith('4.'), transformers.__version__\n"
        "model, report = T5EncoderModel.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(report.values()), report\n"
        "assert AutoTokenizer.from_pretrained(sys.argv[1])('M K')['input_ids'] == [19, 14, 1]\n"
        "model.save_pretrained(sys.argv[2])\n"
        "model.save_pretrained(sys.argv[3], safe_serialization=False)\n"
    )
    places = [str(tmp_path / name) for name in ("model", "theirs", "bin")]
    environment = os.environ | {"PYTHONPATH": folder}
    command = [sys.executable, "-c", code, *places]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for place in places[1:]:
        with hf.open_checkpoint(Path(place)) as checkpoint:
            for name, value in model.named_parameters():
                assert torch.equal(checkpoint.parameter(name), value), name


# --- checkpoints as they are published -----------------------------------------------------------------------------


def write_pieces(path: Path, pieces: list[str]) -> None:
    """A SentencePiece model, written with the message classes of protobuf."""
    from transformers.utils import sentencepiece_model_pb2_new as messages

    model = messages.ModelProto()
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number), type=1 if number > 2 else 3)
    model.trainer_spec.model_prefix = "prot"
    path.write_bytes(model.SerializeToString())


def publish(folder: Path, pieces: list[str], **described: Any) -> nn.Module:
    """A whole T5 with a SentencePiece vocabulary, as transformers writes it."""
    from transformers import T5Config as TheirConfig
    from transformers import T5ForConditionalGeneration

    config = TheirConfig(
        vocab_size=128,
        d_model=36,
        d_kv=12,
        d_ff=70,
        num_layers=2,
        num_heads=5,
        **{"feed_forward_proj": "relu"} | described,
    )
    torch.manual_seed(0)
    model: nn.Module = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    write_pieces(folder / "spiece.model", pieces)
    return model


LETTERS = [*PUBLISHED_TOKENS[:3], *(f"\N{LOWER ONE EIGHTH BLOCK}{letter}" for letter in "ALGVSREDTIPKFQNYMHWCXBOUZ")]


def test_a_whole_t5_gives_its_encoder(tmp_path: Path) -> None:
    whole = publish(tmp_path / "whole", LETTERS)
    with pytest.warns(ProteaWarning, match=r"tensors outside the encoder left out: decoder\."):
        model = protea.load(tmp_path / "whole", device="cpu")
    assert model.alphabet.tokens[3:6] == ("A", "L", "G")
    ids = torch.tensor([[19, 14, 11, 1]])
    with torch.no_grad():
        expected = whole.get_submodule("encoder")(ids).last_hidden_state[0, :-1]
    np.testing.assert_allclose(model.embed(["MKT"])[0], expected, rtol=0, atol=2e-5)


def test_weights_by_any_name_beside_the_configuration(tmp_path: Path) -> None:
    whole = publish(tmp_path / "whole", LETTERS)
    (tmp_path / "whole" / "model.safetensors").unlink()
    encoder = {key: value for key, value in whole.state_dict().items() if key.startswith(("encoder.", "shared."))}
    torch.save(encoder, tmp_path / "whole" / "trained.pt")
    with pytest.warns(ProteaWarning, match=r"read trained\.pt"):
        model = protea.load(tmp_path / "whole", device="cpu")
    del encoder["shared.weight"]
    torch.save(encoder, tmp_path / "whole" / "again.pt")
    again = protea.load(tmp_path / "whole" / "again.pt", device="cpu")
    np.testing.assert_array_equal(again.embed(["MKT"])[0], model.embed(["MKT"])[0])


def test_a_vocabulary_in_another_order_is_believed(tmp_path: Path) -> None:
    whole = publish(tmp_path / "whole", [*LETTERS[:3], *LETTERS[:2:-1]])
    with pytest.warns(ProteaWarning):
        model = protea.load(tmp_path / "whole", device="cpu")
    ids = torch.tensor([[3 + 24 - (number - 3) for number in (19, 14, 11)] + [1]])
    with torch.no_grad():
        expected = whole.get_submodule("encoder")(ids).last_hidden_state[0, :-1]
    np.testing.assert_allclose(model.embed(["MKT"])[0], expected, rtol=0, atol=2e-5)
    model.save(tmp_path / "saved")
    again = protea.load(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.embed(["MKT"])[0], model.embed(["MKT"])[0])


def test_what_added_files_say(tmp_path: Path) -> None:
    """ProstT5's tokens are in files beside the pieces."""
    publish(tmp_path / "whole", LETTERS)
    added = {token: number for number, token in enumerate(PROST_T5.tokens) if number >= 128}
    (tmp_path / "whole" / "added_tokens.json").write_text(json.dumps(added))
    described = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(described | {"vocab_size": 150}))
    config = hf.read_config(tmp_path / "whole")
    assert isinstance(config, T5Config)
    assert config.tokens == PROST_T5.tokens
    assert config.family == "ProstT5"


@pytest.mark.parametrize(
    ("pieces", "described", "parts"),
    [
        ([*LETTERS[:3], "▁the", "▁of", *LETTERS[5:]], {}, ["not a protein vocabulary", "A", "L"]),
        (["<pad>", "</s>", "<unk>", *(f"▁word{number}" for number in range(400))], {}, ["not a protein vocabulary"]),
        (LETTERS, {"feed_forward_proj": "gated-gelu"}, ["gated-gelu"]),
        ([*LETTERS, "A"], {}, ["not a protein vocabulary", "letter A"]),
        (LETTERS[:-1], {"reads": "3di"}, ["not a protein vocabulary"]),
    ],
)
def test_other_t5_models_are_refused(
    tmp_path: Path, pieces: list[str], described: dict[str, Any], parts: list[str]
) -> None:
    publish(tmp_path / "whole", pieces, **described)
    with pytest.raises(CheckpointError) as caught:
        protea.load(tmp_path / "whole", device="cpu")
    assert all(part in str(caught.value) for part in [str(tmp_path), *parts])


def test_a_vocabulary_is_never_assumed(tmp_path: Path) -> None:
    """Without a tokenizer, the encoder of a chat model would pass for ProtT5."""
    publish(tmp_path / "whole", LETTERS)
    path = tmp_path / "whole" / "spiece.model"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no vocabulary: copy the model's tokenizer\.json or spiece\.model"):
        protea.load(tmp_path / "whole", device="cpu")
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"spiece\.model.*pipe"):
        protea.load(tmp_path / "whole", device="cpu")


def test_a_vocabulary_without_additional_ids(tmp_path: Path) -> None:
    """A smaller vocabulary than the published one is believed too."""
    model = random_model(replace(ODD, vocab_size=28, tokens=PUBLISHED_TOKENS[:28]), tmp_path)
    folder = tmp_path / "model"
    described = json.loads((folder / "config.json").read_text())
    for key in ("tokens", "mask_token_id", "pad_token_id"):
        del described[key]
    (folder / "config.json").write_text(json.dumps(described))
    assert protea.load(folder, device="cpu").config == model.config


@pytest.mark.parametrize("width", [-1, 0, 10**30])
def test_impossible_widths_of_heads(tmp_path: Path, width: int) -> None:
    publish(tmp_path / "whole", LETTERS)
    path = tmp_path / "whole" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_kv": width}))
    with pytest.raises(CheckpointError, match=rf"d_kv.*{width}"):
        protea.load(tmp_path / "whole", device="cpu")


def test_damaged_vocabularies(tmp_path: Path) -> None:
    publish(tmp_path / "whole", LETTERS)
    path = tmp_path / "whole" / "spiece.model"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = bytearray(good[: rng.integers(1, len(good))])
        bad[rng.integers(len(bad))] = rng.integers(256)
        path.write_bytes(bytes(bad))
        with suppress(CheckpointError):  # damage may be no damage to the pieces
            hf.read_config(tmp_path / "whole")
    path.write_bytes(good)
    digits = "9" * 5000  # more than Python reads as a number
    for name, content in (
        ("added_tokens.json", '{"x": [1]}'),
        ("added_tokens.json", '{"x": "1"}'),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {digits: {"content": "x"}}})),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
    ):
        path.with_name(name).write_text(content)
        with pytest.raises(CheckpointError, match="tokens"):
            hf.read_config(tmp_path / "whole")
        path.with_name(name).unlink()
    path.unlink()
    for content in (
        "[]",
        "{}",
        '{"model": {"vocab": 3}}',
        '{"model": {"vocab": {"A": -1}}}',
        '{"model": {"vocab": {"A": 1e9}}}',
    ):
        path.with_name("tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            hf.read_config(tmp_path / "whole")


# --- letters and commands ------------------------------------------------------------------------------------------


def test_three_d_states(tmp_path: Path) -> None:
    """With ``reads`` in config.json, letters are states of 3Di, behind the token for this direction."""
    random_model(PROST, tmp_path)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reads": "3di"}))
    model = protea.load(tmp_path / "model", device="cpu")
    alphabet = model.alphabet
    tokens = [PROST_T5.tokens[number] for number in alphabet.frame.around(alphabet.encode("DVLV"))]
    assert tokens == ["<fold2AA>", *"dvlv", "</s>"]
    expected = run_theirs(theirs(tmp_path / "model"), torch.tensor([PROST_T5.tokens.index(token) for token in tokens]))
    np.testing.assert_allclose(model.embed(["DVLV"])[0], expected.states[-1][1:-1], rtol=0, atol=2e-5)


def test_commands(run: Run, tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    (tmp_path / "in.fasta").write_text(f">a\n{PROTEIN}\n>b\nMKTUZOBX\n")
    for command in (
        ("info", "model"),
        ("info", "prot_t5_xl_uniref50"),
        ("embed", "in.fasta", "-m", "model", "-o", "o.parquet", "-r", "r.h5", "--pool", "mean"),
        ("convert", "model", "copy"),
    ):
        result = run(*command)
        assert result.code == 0, result
    report = Path("o.parquet.report.tsv").read_text()
    assert "replaced by X: B at 7; O at 6; U at 4; Z at 5" in report
    (tmp_path / "one.fasta").write_text(f">a\n{PROTEIN}\n")
    for command in (
        ("perplexity", "in.fasta", "-m", "model"),
        ("score", "one.fasta", "-m", "model", "-v", "K2A"),
        ("embed", "in.fasta", "-m", "model", "--logits", "l.h5"),
    ):
        fails(run(*command), 1, "ProtT5", "logits", "ESM-2")
    fails(run("pretrain", "esm1b", "init=model", "model={}", "data.store=x", "-o", "t"), 1, "ProtT5", "logits")
    fails(run("contacts", "in.fasta", "-m", "model", "-o", "c.h5"), 1, "ProtT5", "fit-contacts")
    fails(run("embed", "in.fasta", "-m", "model", "-o", "b.h5", "--pool", "bos"), 2, "bos")
    check_lacks(protea.load("model", device="cpu"), logits=lambda: protea.load("model").logits(["MKT"]))
    assert protea.load("model", device="cpu").attention("MKTW", layers=[2]).shape == (1, 5, 5, 5)
