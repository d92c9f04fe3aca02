"""The transform for CPUs changes speed, not numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import protea
from conftest import CONFIGS, LoadModel, disturb
from protea.checkpoints import hf
from protea.device import native_bfloat16
from protea.models import build
from protea.models.attention_maps import AttentionMaps
from protea.models.inference import FusedSelfAttention, PackedLinear, for_inference

CPU = torch.device("cpu")
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "G", "ACDEFGHIKLMNPQRSTVWY" * 20, "MK<mask>TXBUZO", "ACDEF" * 3]

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("family", CONFIGS)
def test_same_numbers_in_float32(load_small: LoadModel, family: str) -> None:
    plain, packed = load_small(family), load_small(family)
    for_inference(packed.module)
    assert isinstance(packed.module.layers[0].self_attn, FusedSelfAttention)
    layers = [0, 1, 2, 3]
    for ours, theirs in zip(packed.embed(SEQUENCES, layers=layers), plain.embed(SEQUENCES, layers=layers), strict=True):
        assert np.abs(ours - theirs).max() <= 5e-6 * max(1, np.abs(theirs).max())
    for ours, theirs in zip(packed.logits(SEQUENCES), plain.logits(SEQUENCES), strict=True):
        assert np.abs(ours - theirs).max() <= 5e-6 * max(1, np.abs(theirs).max())


@needs_onednn
@pytest.mark.parametrize("family", CONFIGS)
def test_attention_maps_too(load_small: LoadModel, family: str) -> None:
    maps: list[list[torch.Tensor]] = []
    for packed in (False, True):
        model = load_small(family)
        if packed:
            for_inference(model.module)
        kept: list[torch.Tensor] = []

        def keep(_: int, found: AttentionMaps, kept: list[torch.Tensor] = kept) -> None:
            kept.extend(torch.stack(list(heads)) for heads in found)

        from protea.packing import pack

        batch = pack([model.alphabet.encode("MKTAYIAK"), model.alphabet.encode("GD")], bos=0, eos=2)
        with torch.inference_mode():
            model.module(batch, on_attention=keep)
        maps.append(kept)
    assert len(maps[0]) == 6
    for ours, theirs in zip(*maps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@needs_onednn
@pytest.mark.skipif(not native_bfloat16(CPU), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_stays_near_float32(load_small: LoadModel, family: str) -> None:
    exact = load_small(family).embed(SEQUENCES)
    model = load_small(family, dtype="bfloat16")
    for_inference(model.module)
    together = model.embed(SEQUENCES)
    for number, (ours, theirs) in enumerate(zip(together, exact, strict=True)):
        cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
        assert cosine.min() >= 0.999
        alone = model.embed([SEQUENCES[number]])[0]
        cosine = (ours * alone).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(alone, axis=1))
        assert cosine.min() >= 0.999


@needs_onednn
@pytest.mark.parametrize(("family", "width", "heads"), [("esm1nv", 15, 3), ("esm1b", 15, 5), ("esm2", 24, 2)])
def test_head_widths_off_the_beaten_track(tmp_path: Path, family: str, width: int, heads: int) -> None:
    """Odd widths have no rotary pairs to bring together, and need none."""
    shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    hf.write_random(tmp_path / "m", build(replace(CONFIGS[family], **shape)), seed=0, dtype=torch.float32)
    arrays = []
    for packed in (False, True):
        model = protea.load(tmp_path / "m", device="cpu")
        disturb(model.module)
        if packed:
            for_inference(model.module)
        arrays.append(model.embed(["MKTAYIAKQRQISFVKSHFSRQ", "G"]))
    for ours, theirs in zip(*arrays, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * max(1, np.abs(theirs).max()))


@needs_onednn
def test_a_sequence_alone_and_in_company(load_small: LoadModel) -> None:
    model = load_small("esm2")
    for_inference(model.module)
    for ours, sequence in zip(model.embed(SEQUENCES), SEQUENCES, strict=True):
        (alone,) = model.embed([sequence])
        assert np.abs(ours - alone).max() <= 1e-5 * max(1, np.abs(alone).max())


def test_types_that_are_not_multiplied_stay_as_they_are(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from protea.models import inference

    half = load_small("esm2", dtype="float16")
    for_inference(half.module)
    assert not any(isinstance(module, PackedLinear) for module in half.module.modules())
    monkeypatch.setattr(inference, "native_bfloat16", lambda _: False)
    emulated = load_small("esm2", dtype="bfloat16")
    for_inference(emulated.module)
    assert not any(isinstance(module, PackedLinear) for module in emulated.module.modules())
