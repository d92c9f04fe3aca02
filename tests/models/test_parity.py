"""Numbers compared with transformers, Meta's esm and float64, on random weights of both initialisations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import disturb
from protea.checkpoints import hf
from protea.models.attention import AttentionCall
from protea.models.encoder import Encoder
from protea.models.esm1b import ESM1B, ESM1bConfig
from protea.models.esm1nv import ESM1NV, ESM1nvConfig
from protea.models.esm2 import SIZES, ESM2Config
from protea.models.family import EncoderConfig
from protea.models.registry import build
from protea.packing import PackedBatch, pack
from references import (
    EsmForMaskedLM,
    Outputs,
    PlainESM1nv,
    from_fair_esm,
    load_transformers,
    new_fair_esm,
    run_fair_esm,
    run_float64,
    run_transformers,
    to_fair_esm,
    transformers_config,
)

TOLERANCE = 2e-5

SEQUENCES = {
    "canonical": (
        "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEGLYTHMKALRPDE"
        "DRLSPLHSVYVDQWDWERVMGDGERQFSTLKSTVEAIWAGIKATEAAVSEEFGLAPFLPDQIHFVHSQELLSRYPDLDAKGRERAIAKDLGAVFLVGIGGKLS"
    ),
    "odd letters": "XBUZO.-ACDEFGHIKLMNPQRSTVWYXX",
    "masked": "MKTAY<mask>AKQRQ<mask><mask>FVKSHFSRQ",
    "single residue": "W",
}
ESM1NV_SEQUENCES = SEQUENCES | {"odd letters": "XBUZOACDEFGHIKLMNPQRSTVWYXX"}

CONFIGS: dict[str, EncoderConfig] = {
    "ESM-2 8M": SIZES["8M"],
    "ESM-2 35M": SIZES["35M"],
    "ESM-2 odd": ESM2Config(num_hidden_layers=3, hidden_size=42, num_attention_heads=3, intermediate_size=168),
    "ESM-1b odd": ESM1bConfig(
        num_hidden_layers=5, hidden_size=72, num_attention_heads=9, intermediate_size=130, emb_layer_norm_before=True
    ),
    "ESM-1v odd": ESM1bConfig(
        num_hidden_layers=4, hidden_size=66, num_attention_heads=3, intermediate_size=264, emb_layer_norm_before=False
    ),
}

ESM1NV_ODD = ESM1nvConfig(num_hidden_layers=3, hidden_size=42, num_attention_heads=3, intermediate_size=101)


def pack_sequences(model: Encoder, sequences: dict[str, str]) -> PackedBatch:
    alphabet = model.alphabet
    return pack([alphabet.frame.around(alphabet.encode(sequence)) for sequence in sequences.values()])


def run_ours(model: Encoder, batch: PackedBatch) -> Outputs:
    states: list[Tensor] = []
    final = model(batch, on_hidden=lambda number, x: states.append(x))
    assert states[-1] is final
    return states, model.head(final)


def random_model(config: EncoderConfig, initialisation: str, tmp_path: Path) -> Encoder:
    torch.manual_seed(0)
    model = build(config)
    if initialisation == "fair-esm":
        from_fair_esm(new_fair_esm(model), model)
    else:
        EsmForMaskedLM(transformers_config(model)).save_pretrained(tmp_path / "initial")
        model = hf.open_checkpoint(tmp_path / "initial").load(dtype=torch.float32, device=torch.device("cpu"))
    disturb(model)
    if isinstance(config, ESM2Config):
        # Meta's files have the frequencies rounded to float16, and both references must use these.
        model.inv_freq = model.inv_freq.half().float()
    return model


def compare(model: Encoder, run_reference: Callable[[Tensor], Outputs], truth: Callable[[Tensor], Outputs]) -> None:
    """Every tensor is close to the reference, and at most twice as far from float64 as the reference."""
    batch = pack_sequences(model, SEQUENCES)
    states, logits = run_ours(model, batch)
    for start, end in batch.cu_seqlens.spans():
        ids = batch.input_ids[start:end]
        their_states, their_logits = run_reference(ids)
        true_states, true_logits = truth(ids)
        assert len(their_states) == len(states)
        rows = zip([*states, logits], [*their_states, their_logits], [*true_states, true_logits], strict=True)
        for number, (ours, theirs, true) in enumerate(rows):
            scale = max(1.0, theirs.abs().max().item())
            mine = ours[start:end].double()
            assert (mine - theirs.double()).abs().max().item() <= TOLERANCE * scale, f"tensor {number}"
            floor = torch.finfo(torch.float32).eps * scale
            our_error = (mine - true).abs().max().item()
            their_error = (theirs.double() - true).abs().max().item()
            assert our_error <= 2 * their_error + floor, f"tensor {number}"


@pytest.mark.parametrize("initialisation", ["transformers", "fair-esm"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "odd" in name else pytest.mark.long) for name in CONFIGS]
)
@torch.no_grad()
def test_equals_transformers_and_fair_esm(name: str, initialisation: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name], initialisation, tmp_path)
    hf.save(model, tmp_path / "saved")
    theirs, fair = load_transformers(tmp_path / "saved"), to_fair_esm(model)
    compare(model, lambda ids: run_transformers(theirs, ids), lambda ids: run_float64(model, ids))
    compare(model, lambda ids: run_fair_esm(fair, ids), lambda ids: run_float64(model, ids))


@pytest.mark.long
@torch.no_grad()
def test_published_esm1b_shape(tmp_path: Path) -> None:
    """All 33 layers of ESM-1b at full width, once."""
    model = random_model(ESM1B, "fair-esm", tmp_path)
    hf.save(model, tmp_path / "saved")
    theirs = load_transformers(tmp_path / "saved")
    compare(model, lambda ids: run_transformers(theirs, ids), lambda ids: run_float64(model, ids))
    fair = to_fair_esm(model)
    compare(model, lambda ids: run_fair_esm(fair, ids), lambda ids: run_float64(model, ids))


@torch.no_grad()
def test_pack_equals_a_padded_batch(tmp_path: Path) -> None:
    """A pack gives the same numbers as a padded batch in transformers."""
    model = random_model(CONFIGS["ESM-2 odd"], "fair-esm", tmp_path)
    hf.save(model, tmp_path / "saved")
    batch = pack_sequences(model, SEQUENCES)
    states, _ = run_ours(model, batch)
    rows = [batch.input_ids[start:end] for start, end in batch.cu_seqlens.spans()]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    result = load_transformers(tmp_path / "saved")(padded, attention_mask=padded != 1, output_hidden_states=True)
    for b, (start, end) in enumerate(batch.cu_seqlens.spans()):
        theirs = result.hidden_states[-1][b, : end - start]
        assert (states[-1][start:end] - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max())


@torch.no_grad()
def test_attention_maps_equal_transformers(tmp_path: Path) -> None:
    model = random_model(CONFIGS["ESM-2 odd"], "transformers", tmp_path)
    hf.save(model, tmp_path / "saved")
    theirs = load_transformers(tmp_path / "saved")
    batch = pack_sequences(model, SEQUENCES)
    maps: dict[int, list[Tensor]] = {}

    def keep(number: int, call: AttentionCall) -> None:
        maps[number] = [torch.stack(list(call.maps(sequence))) for sequence in range(len(batch))]

    model(batch, on_attention=keep)
    assert sorted(maps) == [1, 2, 3]
    for b, (start, end) in enumerate(batch.cu_seqlens.spans()):
        tokens = batch.input_ids[None, start:end]
        attentions = theirs(tokens, attention_mask=torch.ones_like(tokens), output_attentions=True).attentions
        for layer, attention in enumerate(attentions, start=1):
            torch.testing.assert_close(maps[layer][b], attention[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ESM1NV, marks=pytest.mark.long, id="published"),
        pytest.param(ESM1nvConfig(hidden_act="gelu"), marks=pytest.mark.long, id="exact gelu"),
        pytest.param(ESM1NV_ODD, id="odd"),
        pytest.param(replace(ESM1NV_ODD, hidden_act="gelu"), id="odd, exact gelu"),
    ],
)
@torch.no_grad()
def test_esm1nv_equals_a_plain_reading(config: ESM1nvConfig, tmp_path: Path) -> None:
    hf.write_random(tmp_path / "model", build(config), seed=0, dtype=torch.float32)
    model = hf.open_checkpoint(tmp_path / "model").load(dtype=torch.float32, device=torch.device("cpu"))
    disturb(model)
    plain = PlainESM1nv(config).take(model).eval()
    exact = PlainESM1nv(config).take(model).eval().double()
    batch = pack_sequences(model, ESM1NV_SEQUENCES)
    states, logits = run_ours(model, batch)
    rows = [batch.input_ids[start:end] for start, end in batch.cu_seqlens.spans()]
    pad = model.alphabet.pad
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    their_states, their_logits = plain(padded, padded == pad)
    true_states, true_logits = exact(padded, padded == pad)
    rows3 = zip([*states, logits], [*their_states, their_logits], [*true_states, true_logits], strict=True)
    for ours, theirs, true in rows3:
        for b, (start, end) in enumerate(batch.cu_seqlens.spans()):
            their, truth = theirs[b, : end - start].double(), true[b, : end - start]
            scale = max(1.0, their.abs().max().item())
            mine = ours[start:end].double()
            assert (mine - their).abs().max().item() <= TOLERANCE * scale
            floor = torch.finfo(torch.float32).eps * scale
            assert (mine - truth).abs().max().item() <= 2 * (their - truth).abs().max().item() + floor


def test_parameter_counts() -> None:
    """Compared with the card of ESM-1nv, BioNeMo 1's layout of ESM-2nv 650M, and transformers' ESM-2 650M."""
    from protea.checkpoints.hub import architecture, published
    from protea.checkpoints.summary import parameter_count

    assert parameter_count(architecture(published("esm1nv"))) == 43_612_544
    assert parameter_count(architecture(published("esm2nv_650M"))) == 651_164_288
    model = architecture(published("esm2_t33_650M_UR50D"))
    with torch.device("meta"):
        theirs = EsmForMaskedLM(transformers_config(model))
    assert parameter_count(model) == theirs.num_parameters()
