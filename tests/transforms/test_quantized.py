"""``int8``: products of the layers in bytes; near float32, and the same numbers in every pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mixed import LYSOZYME, REAL, SEQUENCES, UBIQUITIN, cosines, like_trained
from torch import nn

import protea
from conftest import CONFIGS, LoadModel, batch_of
from messages import check_message
from protea.checkpoints import hf
from protea.errors import DeviceError, UsageError
from protea.models.registry import build, families
from protea.native import products
from protea.native.products import Packed, supports
from protea.transforms.cpu import PackedLinear, is_packed, pack_for_cpu
from protea.transforms.quantized import check_quantizable, quantize

needs_int8 = pytest.mark.skipif(
    not supports(torch.int8), reason="the native library does not multiply int8 on this processor"
)


def in_int8(model: protea.LanguageModel) -> protea.LanguageModel:
    quantize(model.module)
    pack_for_cpu(model.module)
    return model


# --- numbers -----------------------------------------------------------------------------------------------------


@needs_int8
@pytest.mark.parametrize("family", CONFIGS)
def test_near_float32(load_small: LoadModel, family: str) -> None:
    exact, model = load_small(family), in_int8(load_small(family))
    assert model.module.precision == "int8"
    parts = [part for part in model.module.layers.modules() if isinstance(part, PackedLinear)]
    assert parts
    assert all(part.weight.dtype == torch.int8 for part in parts)
    assert cosines(model.embed(SEQUENCES), exact.embed(SEQUENCES)).min() >= 0.9997
    for ours, theirs in zip(model.logits(SEQUENCES), exact.logits(SEQUENCES), strict=True):
        assert np.abs(ours - theirs).max() <= 3e-2 * np.abs(theirs).max()


@needs_int8
@pytest.mark.parametrize("family", ["esm2", "esm1b"])
def test_near_float32_where_the_residual_stream_grows(family: str, tmp_path: Path) -> None:
    folder = like_trained(tmp_path, family)
    exact = protea.load(folder, device="cpu").embed(SEQUENCES)
    near = cosines(protea.load(folder, device="cpu", dtype="int8").embed(SEQUENCES), exact)
    assert near.min() >= 0.98
    assert np.median(near) >= 0.997


@needs_int8
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
@pytest.mark.filterwarnings("ignore::protea.ProteaWarning")  # the classifier, which is left out
def test_near_float32_on_published_weights() -> None:
    proteins = [LYSOZYME, UBIQUITIN, LYSOZYME[::-1]]
    exact, model = protea.load(REAL, device="cpu"), protea.load(REAL, device="cpu", dtype="int8")
    states, ours = exact.embed(proteins), model.embed(proteins)
    near = cosines(ours, states)
    assert near.min() >= 0.995
    assert np.median(near) >= 0.9992
    pooled = [np.stack([state.mean(0) for state in found]) for found in (ours, states)]
    assert cosines(pooled[:1], pooled[1:]).min() >= 0.9993


@needs_int8
@pytest.mark.parametrize("family", CONFIGS)
def test_a_sequence_is_the_same_alone_and_in_a_pack(load_small: LoadModel, family: str) -> None:
    model = in_int8(load_small(family))
    together = model.embed(SEQUENCES)
    for sequence, packed in zip(SEQUENCES, together, strict=True):
        assert np.array_equal(model.embed([sequence])[0], packed)


@needs_int8
@pytest.mark.usefixtures("_threads_as_before")
@pytest.mark.parametrize("family", [*CONFIGS, "like trained"])
def test_the_same_bits_with_any_threads(tmp_path: Path, model_folders: dict[str, Path], family: str) -> None:
    folder, found = model_folders.get(family) or like_trained(tmp_path, "esm2"), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(protea.load(folder, device="cpu", dtype="int8").embed(SEQUENCES))
    for others in found[1:]:
        assert all(map(np.array_equal, others, found[0]))


@needs_int8
def test_a_model_with_few_positions(tmp_path: Path) -> None:
    config = replace(CONFIGS["esm1b"], max_position_embeddings=32)
    hf.write_random(tmp_path / "model", build(config), seed=1, dtype=torch.float32)
    exact, model = (protea.load(tmp_path / "model", device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    assert cosines(model.embed(["MKTAYIAK"]), exact.embed(["MKTAYIAK"])).min() >= 0.999


@needs_int8
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_set_apart_changes_nothing_before_rounding(load_small: LoadModel, family: str) -> None:
    """Behind norms, the mean input moves into the bias; elsewhere, the bias makes up for what rounding changes."""
    exact, model = load_small(family).module, load_small(family).module
    quantize(model)
    with torch.no_grad():
        for before, after in zip(exact.layers, model.layers, strict=True):
            for name in ("self_attn.out_proj", "fc2"):
                part, old = after.get_submodule(name), before.get_submodule(name)
                assert not part.get_parameter("bias").equal(old.get_parameter("bias"))
                part.register_parameter("bias", old.bias)  # type: ignore[arg-type]
        batch = batch_of(exact, LYSOZYME)
        torch.testing.assert_close(model(batch), exact(batch), rtol=1e-4, atol=1e-5)
    assert not is_packed(model)


@needs_int8
def test_mean_errors_are_removed(load_small: LoadModel) -> None:
    """The bias makes up for what rounding the weights changes in the mean."""
    model, exact = load_small("esm2").module, load_small("esm2").module
    quantize(model)
    part, old = model.layers[0].fc2, exact.layers[0].fc2
    assert isinstance(part, nn.Linear)
    assert isinstance(old, nn.Linear)
    change = (part.bias - old.bias).detach()
    error = old.weight.detach() - Packed.of(old.weight, torch.int8).unpacked()
    # There is a mean input that explains it.
    mean = torch.linalg.lstsq(error.double(), change.double()[:, None]).solution
    torch.testing.assert_close(
        error.double() @ mean, change.double()[:, None], rtol=0, atol=1e-4 * float(change.abs().max())
    )


# --- refusals -----------------------------------------------------------------------------------------------------


@needs_int8
def test_refusals(model_folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        protea.load(model_folders["esm2"], device="cpu", dtype="int8", trainable=True)
    check_message("int8.trainable", caught.value)
    model = protea.load(model_folders["esm2"], device="cpu", dtype="int8")
    with pytest.raises(UsageError, match="int8") as caught:
        hf.save(model.module, tmp_path / "saved")
    with pytest.raises(UsageError) as caught:
        check_quantizable(build(CONFIGS["esm2"]), torch.device("cuda"))
    check_message("int8.gpu", caught.value)


@needs_int8
def test_families() -> None:
    """Those whose layers are not plain are refused by name."""
    refused = []
    for family in families():
        try:
            check_quantizable(build(family.published[0].config), torch.device("cpu"))
        except UsageError as error:
            refused.append((family.config_type.family, str(error)))
    assert [name for name, _ in refused] == ["CARP", "ESM C"]
    assert all(error.startswith(name) for name, error in refused)


def test_without_the_library(model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_types", lambda: 1)
    with pytest.raises(DeviceError) as caught:
        protea.load(model_folders["esm2"], device="cpu", dtype="int8")
    check_message("int8.processor", caught.value)
