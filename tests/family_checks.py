"""What every family of models must pass, whatever its reference is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import protea
from conftest import disturb
from protea.checkpoints import hf
from protea.device import has_matrix_unit
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.registry import build
from protea.native.products import supports
from protea.packing import pack
from protea.transforms.cpu import is_packed
from protea.transforms.mixed import mix

TOLERANCE = 2e-5
ALONE = 1e-5
PROTEIN = (
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSLAKWKRQTLGQHDFSAGEGLYTHMKALRPDE"
    "DRLSPLHSVYVDQWDWERVMGDGERQFSTLKSTVEAIWAGIKATEAAVSEEFGLAPFLPDQIHFVHSQELLSRYPDLDAKGRERAIAKDLGAVFLVGIGGKLS"
)
SEQUENCES = [PROTEIN, "W", "XBUZOACDEFGHIKLMNPQRSTVWYXX", "MKTAY<mask>AKQRQ<mask><mask>FVKSHFSRQ", (PROTEIN * 8)[:1500]]


class Outputs(NamedTuple):
    """Everything that a model computes of one sequence: hidden states ``[T, D]``, logits, maps ``[H, T, T]``."""

    states: list[Tensor]
    logits: Tensor | None
    maps: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.states, *([] if self.logits is None else [self.logits]), *self.maps]


def random_model(config: EncoderConfig, folder: Path, *, seed: int = 1) -> Encoder:
    """A model with random weights and noise in its norms and biases, also written to a folder."""
    hf.write_random(folder / "initial", build(config), seed=seed, dtype=torch.float32)
    model = protea.load(folder / "initial", device="cpu", trainable=True)
    disturb(model.module)
    model.save(folder / "model")
    return model.module


def tokens_of(model: Encoder, sequence: str) -> np.ndarray:
    alphabet = model.alphabet
    return alphabet.frame.around(alphabet.encode(sequence))


@torch.no_grad()
def ours(model: Encoder, sequences: Sequence[str]) -> list[Outputs]:
    """What the model computes of a pack of the sequences."""
    batch = pack([tokens_of(model, sequence) for sequence in sequences])
    states: list[Tensor] = []
    maps: list[list[Tensor]] = []
    last = model(
        batch,
        on_hidden=lambda _, x: states.append(x),
        on_attention=lambda _, call: maps.append([torch.stack(list(call.maps(n))) for n in range(len(batch))]),
    )
    logits = None if model.lm_head is None else model.head(last)
    return [
        Outputs(
            [state[start:end] for state in states],
            None if logits is None else logits[start:end],
            [layer[number] for layer in maps],
        )
        for number, (start, end) in enumerate(batch.cu_seqlens.spans())
    ]


def check_parity(
    model: Encoder,
    reference: Callable[[Tensor], Outputs],
    truth: Callable[[Tensor], Outputs],
    sequences: Sequence[str] = SEQUENCES,
) -> None:
    """Every tensor that the reference gives is close to it, and at most twice as far from float64 as it is."""
    for sequence, computed in zip(sequences, ours(model, sequences), strict=True):
        ids = torch.from_numpy(tokens_of(model, sequence).astype(np.int64))
        theirs, exact = reference(ids), truth(ids)
        mine = computed if theirs.maps else computed._replace(maps=[])
        rows = zip(mine.tensors(), theirs.tensors(), exact.tensors(), strict=True)
        for number, (a, b, c) in enumerate(rows):
            assert a.shape == b.shape
            scale = max(1.0, b.abs().max().item())
            place = f"tensor {number} of {sequence[:20]}"
            assert (a.double() - b.double()).abs().max().item() <= TOLERANCE * scale, place
            floor = torch.finfo(torch.float32).eps * scale
            our_error, their_error = ((x.double() - c.double()).abs().max().item() for x in (a, b))
            assert our_error <= 2 * their_error + floor, f"{place}: {our_error} {their_error} {floor} {scale}"


def check_alone(model: Encoder, sequences: Sequence[str] = SEQUENCES) -> None:
    """A sequence gives the same alone as in any pack."""
    packs = [ours(model, sequences), ours(model, sequences[::-1])[::-1]]
    for number, sequence in enumerate(sequences):
        (alone,) = ours(model, [sequence])
        for together in packs:
            for a, b in zip(alone.tensors(), together[number].tensors(), strict=True):
                assert (a - b).abs().max() <= ALONE * max(1.0, a.abs().max().item())


def check_packed(folder: Path, sequences: Sequence[str] = SEQUENCES) -> None:
    """A model that is loaded for inference gives the numbers of the plain one, and saves the same weights."""
    plain, fast = (protea.load(folder, device="cpu", trainable=trainable) for trainable in (True, False))
    assert is_packed(fast.module) == supports(torch.float32)
    sequences = [sequence for sequence in sequences if "<" not in sequence]
    layers = list(range(len(plain.module.layers) + 1))
    together = fast.embed(sequences, long="full", layers=layers)
    for a, b in zip(plain.embed(sequences, long="full", layers=layers), together, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=ALONE * max(1.0, float(np.abs(a).max())))
    fast.save(folder.with_name("again"))
    name = "model.safetensors"
    assert (folder.with_name("again") / name).read_bytes() == (folder / name).read_bytes()


def check_bits(folder: Path, sequences: Sequence[str] = SEQUENCES) -> None:
    """A packed model gives a sequence the same bits alone, in any pack, and with two threads.

    Where activations are PyTorch's, this is so for widths that 64 divides, as in published models.
    """
    if not supports(torch.float32):
        pytest.skip("no native library")
    model, threads = protea.load(folder, device="cpu"), torch.get_num_threads()
    sequences = [sequence for sequence in sequences if "<" not in sequence]
    layers = list(range(len(model.module.layers) + 1))
    together = model.embed(sequences, long="full", layers=layers)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            again = model.embed(sequences[::-1], long="full", layers=layers)[::-1]
            for one, mine, other in zip(sequences, together, again, strict=True):
                assert np.array_equal(mine, other), one[:20]
                assert np.array_equal(mine, model.embed([one], long="full", layers=layers)[0]), one[:20]
    finally:
        torch.set_num_threads(threads)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def check_mixed(folder: Path, sequences: Sequence[str] = SEQUENCES) -> None:
    """In ``bf16-mixed``, residues and averages have nearly the direction that they have in float32."""
    sequences = [sequence for sequence in sequences if "<" not in sequence]
    expected = protea.load(folder, device="cpu").embed(sequences, long="full")
    plain = protea.load(folder, device="cpu", trainable=True)
    mix(plain.module)
    for model in (plain, protea.load(folder, device="cpu", dtype="bf16-mixed")):
        assert model.module.precision == "bf16-mixed"
        for ours, theirs in zip(model.embed(sequences, long="full"), expected, strict=True):
            assert _cosine(ours, theirs).min() >= 0.9995
            assert _cosine(ours.mean(0), theirs.mean(0)) >= 0.9999


def check_narrow(folder: Path, sequences: Sequence[str] = SEQUENCES) -> None:
    """In bfloat16, residues are as near to float32 with the native library as with PyTorch, or nearer."""
    sequences = [sequence for sequence in sequences if "<" not in sequence]
    expected = protea.load(folder, device="cpu").embed(sequences, long="full")
    distances = []
    for trainable in (True, False):
        model = protea.load(folder, device="cpu", dtype="bfloat16", trainable=trainable)
        assert model.module.precision == "bfloat16"
        found = model.embed(sequences, long="full")
        distances.append([1 - _cosine(*pair) for pair in zip(found, expected, strict=True)])
    plain, fast = map(np.concatenate, distances)
    assert is_packed(model.module) == (supports(torch.bfloat16) and not has_matrix_unit())
    assert plain.max() < 1e-2
    assert fast.mean() <= 1.1 * plain.mean()


def check_quantized(folder: Path, sequences: Sequence[str] = SEQUENCES) -> None:
    """In int8, residues are near those in float32, and have the same bits alone."""
    if not supports(torch.int8):
        pytest.skip("the native library does not multiply int8 on this processor")
    sequences = [sequence for sequence in sequences if "<" not in sequence]
    model = protea.load(folder, device="cpu", dtype="int8")
    found = model.embed(sequences, long="full")
    for ours, theirs in zip(found, protea.load(folder, device="cpu").embed(sequences, long="full"), strict=True):
        assert _cosine(ours, theirs).min() >= 0.999
    assert np.array_equal(model.embed(sequences[:1], long="full")[0], found[0])


def check_lacks(model: protea.LanguageModel, **calls: Callable[[], object]) -> None:
    """Each missing capability is an error that names it, the family, and a way out."""
    for capability, call in calls.items():
        with pytest.raises(protea.ProteaError) as caught:
            call()
        message = str(caught.value)
        assert capability in message, message
        assert model.config.family in message, message
        assert ";" in message, message
