"""``bf16-mixed``: products of the layers in bfloat16, all else in float32, and near float32 on trained weights too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import protea
from conftest import CONFIGS, LoadModel, batch_of, disturb
from protea.checkpoints import hf
from protea.errors import UsageError
from protea.models.attention import AttentionCall
from protea.models.encoder import Encoder
from protea.models.layers import LayerContext
from protea.models.registry import build
from protea.models.transformer import SelfAttention, TransformerLayer
from protea.native.products import supports
from protea.transforms import cpu
from protea.transforms.cpu import is_packed, pack_for_cpu
from protea.transforms.mixed import NarrowLinear, mix, mixed_attention

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_weights" / "esm2_8M_finetuned"
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "G", "ACDEFGHIKLMNPQRSTVWY" * 4, "MK<mask>TXBUZO"]
LYSOZYME = (
    "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVSD"
    "GNGMNAWVAWRNRCKGTDVQAWIRGCRL"
)
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"

needs_bfloat16 = pytest.mark.skipif(
    not supports(torch.bfloat16), reason="the native library does not multiply bfloat16 on this processor"
)


def like_trained(folder: Path, family: str) -> Path:
    """Write a small model that has what random weights lack: a residual stream that grows, and sharp attention.

    Two channels grow to 100, and are damped by norms, as in published models; scores of attention reach 40.
    """
    blank = build(replace(CONFIGS[family], num_hidden_layers=6, hidden_size=64, num_attention_heads=4))
    hf.write_random(folder / "random", blank, seed=3, dtype=torch.float32)
    model = protea.load(folder / "random", device="cpu", trainable=True)
    disturb(model.module)
    channels = [5, 40]
    with torch.no_grad():
        for layer in model.module.layers:
            assert isinstance(layer, TransformerLayer)
            attention = layer.self_attn
            for linear, factor in ((attention.q_proj, 20), (attention.k_proj, 20)):
                linear.weight *= factor
            for linear in (attention.v_proj, attention.out_proj, layer.fc1, layer.fc2):
                linear.weight *= 8
            layer.fc2.bias[channels] += torch.tensor([20.0, -20.0])
            for norm in (layer.self_attn_layer_norm, layer.final_layer_norm):
                norm.weight[channels] *= 0.05
        model.module.get_parameter("emb_layer_norm_after.weight")[channels] *= 0.02
    model.save(folder / "like-trained")
    return folder / "like-trained"


def cosines(ours: list[NDArray[np.float32]], exact: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The cosine of each residue."""
    pairs = zip(ours, exact, strict=True)
    return np.concatenate([(a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1) for a, b in pairs])


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["esm2", "esm1b"])
def test_near_float32_where_the_residual_stream_grows(family: str, tmp_path: Path) -> None:
    folder = like_trained(tmp_path, family)
    states = protea.load(folder, device="cpu").embed(SEQUENCES, layers=[5, -1])
    assert max(np.abs(state[0]).max() for state in states) > 90
    exact = [state[1] for state in states]

    def smallest(dtype: str) -> float:
        return float(cosines(protea.load(folder, device="cpu", dtype=dtype).embed(SEQUENCES), exact).min())

    assert smallest("bf16-mixed") >= 0.9996
    assert smallest("bfloat16") < 0.9996, "this model is too easy to tell anything"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
@pytest.mark.filterwarnings("ignore::protea.ProteaWarning")  # the classifier, which is left out
def test_near_float32_on_published_weights() -> None:
    proteins = [LYSOZYME, UBIQUITIN]
    exact = protea.load(REAL, device="cpu")
    model = protea.load(REAL, device="cpu", dtype="bf16-mixed")
    states, ours = exact.embed(proteins), model.embed(proteins)
    near = cosines(ours, states)
    assert near.min() >= 0.9995
    assert np.quantile(near, 0.01) >= 0.9997
    pooled = [np.stack([state.mean(0) for state in found]) for found in (ours, states)]
    assert cosines(pooled[:1], pooled[1:]).min() >= 0.9999
    np.testing.assert_allclose(model.contacts(UBIQUITIN), exact.contacts(UBIQUITIN), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_and_a_sequence_alone(load_small: LoadModel, name: str) -> None:
    exact = load_small(name)
    model = load_small(name)
    mix(model.module)
    together = model.embed(SEQUENCES)
    assert cosines(together, exact.embed(SEQUENCES)).min() >= 0.9999
    for alone, packed in zip((model.embed([sequence])[0] for sequence in SEQUENCES), together, strict=True):
        assert np.abs(alone - packed).max() <= 2e-2 * np.abs(packed).max()
    for ours, theirs in zip(model.logits(SEQUENCES), exact.logits(SEQUENCES), strict=True):
        assert np.abs(ours - theirs).max() <= 1e-2 * np.abs(theirs).max()


def test_products_round_their_inputs_and_nothing_else() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(40, 24).to(torch.bfloat16)
    x = torch.randn(7, 40)
    exact = x.bfloat16().double() @ linear.weight.double().T + linear.bias.double()
    linear.__class__ = NarrowLinear
    with torch.no_grad():
        y = linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2.0**-8, atol=2.0**-8)


# --- what is in which type -----------------------------------------------------------------------------------------


def test_only_products_are_narrow(tmp_path: Path) -> None:
    folder = like_trained(tmp_path, "esm2")
    model = protea.load(folder, device="cpu", dtype="bf16-mixed").module
    if not is_packed(model):
        narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
        parts = ("self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")
        assert narrow == {
            f"layers.{n}.{part}.{kind}" for n in range(6) for part in parts for kind in ("weight", "bias")
        }
    states: list[Tensor] = []
    calls: list[AttentionCall] = []
    with torch.inference_mode():
        model(
            batch_of(model, *SEQUENCES),
            on_hidden=lambda number, x: states.append(x),
            on_attention=lambda number, call: calls.append(call),
        )
    assert {state.dtype for state in states} == {torch.float32}
    assert {x.dtype for call in calls for x in (call.q, call.k, call.v)} == {torch.float32}
    assert model.precision == "bf16-mixed"
    assert model.compute_dtype == torch.float32


@needs_bfloat16
@pytest.mark.parametrize("family", ["esm2", "esm1b", "esm1nv"])
def test_packing_computes_the_same(load_small: LoadModel, family: str) -> None:
    plain, packed = load_small(family).module, load_small(family).module
    for model in (plain, packed):
        mix(model)
    pack_for_cpu(packed)
    assert is_packed(packed)
    batch = batch_of(plain, *SEQUENCES)
    with torch.inference_mode():
        ours, theirs = packed(batch), plain(batch)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))


@needs_bfloat16
def test_packing_is_nearer_to_float32(tmp_path: Path) -> None:
    """What products return stays in float32, except between the two of the feed-forward block."""
    folder = like_trained(tmp_path, "esm2")
    exact = protea.load(folder, device="cpu").embed(SEQUENCES)
    found = []
    for packed in (True, False):
        model = protea.load(folder, device="cpu", trainable=True)
        mix(model.module)
        if packed:
            pack_for_cpu(model.module)
        found.append(1 - cosines(model.embed(SEQUENCES), exact).min())
    assert found[0] < found[1]


def test_a_cpu_without_bfloat16_leaves_it_plain(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "supports", lambda dtype: dtype != torch.bfloat16)
    model = load_small("esm2").module
    mix(model)
    pack_for_cpu(model)
    assert not is_packed(model)
    assert isinstance(model.layers[0].self_attn, mixed_attention(SelfAttention))


# --- refusals ------------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        return x


def without_products(model: Encoder) -> None:
    model.layers = nn.ModuleList([Shift()])
    mix(model)


@pytest.mark.parametrize(
    ("refused", "remedy"),
    [
        (lambda folder, _: protea.load(folder, dtype="bf16-mixed", trainable=True), "float32"),
        (lambda folder, place: protea.load(folder, dtype="bf16-mixed").save(place / "copy"), "float32"),
        (lambda folder, _: without_products(protea.load(folder, trainable=True).module), "use bfloat16"),
        (lambda folder, _: protea.load(folder, dtype="bf16"), "bf16-mixed"),
    ],
    ids=["training", "saving", "no products", "another name"],
)
def test_refusals(
    refused: Callable[[Path, Path], object], remedy: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="bf16") as caught:
        refused(model_folders["esm2"], tmp_path)
    assert remedy in str(caught.value)
    assert not list(tmp_path.iterdir())
