"""LoRA adapters: merged, on disk, and as stock peft and transformers load them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForFeatureExtraction, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import EsmForMaskedLM, EsmForSequenceClassification, EsmModel
from transformers.utils import logging

from conftest import SMALL
from protea.errors import CheckpointError, MissingExtraError
from protea.finetune.adapters import CONFIG, WEIGHTS, Adapter, insert
from protea.models.encoder import Encoder
from protea.models.esm1b import ESM1bConfig
from protea.packing import PackedBatch, pack
from protea.train.optim import parameters_to_train
from tunings import loader, write_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft reads it
]
logging.set_verbosity_error()

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("adapted"))


def adapted(folder: Path, **options: Any) -> tuple[Encoder, Adapter]:
    """A model with adapters as if they were trained, and these adapters."""
    model = loader(folder)()
    config = insert(model, **{"rank": 4, "alpha": 8, "seed": 3} | options)
    generator = torch.Generator().manual_seed(5)
    parameters = parameters_to_train(model)
    for parameter in parameters.values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model, Adapter.of(model, parameters, config)


def batch(model: Encoder) -> PackedBatch:
    alphabet = model.alphabet
    return pack([alphabet.frame.around(alphabet.encode(each)) for each in ("MKTAYIAKQRQISFVK", "GGLLA", "W")])


def hidden(model: Encoder) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch(model))


def transformed(model: Any, tokens: PackedBatch) -> torch.Tensor:
    """Hidden states of a transformers model, sequence by sequence."""
    rows = [tokens.input_ids[None, start:end] for start, end in tokens.cu_seqlens.spans()]
    with torch.no_grad():
        return torch.cat([model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0] for ids in rows])


@pytest.mark.parametrize("dora", [False, True])
def test_untrained_adapters_change_nothing(folder: Path, dora: bool) -> None:
    model = loader(folder)()
    expected = hidden(model)
    insert(model, rank=4, alpha=8, dora=dora, seed=0)
    torch.testing.assert_close(hidden(model), expected, rtol=0, atol=TOLERANCE)
    names = parameters_to_train(model)
    assert len(names) == 3 * 6 * (3 if dora else 2)
    assert all("lora_" in name for name in names)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_give_the_same(folder: Path, tmp_path: Path, dora: bool) -> None:
    model, adapter = adapted(folder, dora=dora)
    merged = loader(folder)()
    before = {name: value.clone() for name, value in merged.state_dict().items()}
    assert (hidden(merged) - hidden(model)).abs().max() > 0.01
    adapter.write(tmp_path / "adapter", "small")
    Adapter.read(tmp_path / "adapter").merge_into(merged)
    torch.testing.assert_close(hidden(merged), hidden(model), rtol=0, atol=TOLERANCE)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert len(changed) == 18
    assert all(name.endswith("weight") and "norm" not in name for name in changed)
    for name, value in loader(folder)().state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)  # the file on disk is untouched


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["esm2", "esm1b"])
def test_stock_peft_loads_it(tmp_path: Path, family: str, dora: bool) -> None:
    """Onto ``EsmModel``, and onto the encoder of a class around it: no key is missing or unexpected."""
    config = None if family == "esm2" else ESM1bConfig(**SMALL, emb_layer_norm_before=True)
    folder = write_model(tmp_path, config)
    model, adapter = adapted(folder, dora=dora)
    adapter.write(tmp_path / "adapter", str(folder))
    expected = hidden(model)
    encoder = EsmModel.from_pretrained(folder, add_pooling_layer=False)
    classifier = EsmForSequenceClassification.from_pretrained(folder)
    # peft warns of missing keys, and warnings are errors here.
    loaded = PeftModel.from_pretrained(encoder, tmp_path / "adapter")
    result = loaded.load_adapter(tmp_path / "adapter", "again")
    inside = PeftModel.from_pretrained(classifier.esm, tmp_path / "adapter")
    automatic = AutoPeftModelForFeatureExtraction.from_pretrained(tmp_path / "adapter")
    assert not result.missing_keys
    assert not result.unexpected_keys
    for each in (loaded, inside, automatic, loaded.merge_and_unload()):
        torch.testing.assert_close(transformed(each.eval(), batch(model)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_adapters_that_peft_wrote(folder: Path, tmp_path: Path, options: dict[str, bool]) -> None:
    """For a class around ``EsmModel``, of some of the matrices."""
    base = EsmForMaskedLM.from_pretrained(folder)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["query", "intermediate.dense"], **options)
    wrapped = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(tmp_path / "theirs")
    ours = loader(folder)()
    Adapter.read(tmp_path / "theirs").merge_into(ours)
    expected = transformed(wrapped.eval().base_model.model.esm, batch(ours))
    torch.testing.assert_close(hidden(ours), expected, rtol=0, atol=TOLERANCE)


@settings(max_examples=15)
@example(rank=1, alpha=19, dora=False, seed=934704171)
@given(rank=st.integers(1, 50), alpha=st.integers(1, 64), dora=st.booleans(), seed=st.integers(0, 2**62))
def test_any_rank(folder: Path, rank: int, alpha: int, dora: bool, seed: int) -> None:
    """In float64: a large alpha makes weights so large that models in float32 differ by rounding alone."""
    model, adapter = adapted(folder, rank=rank, alpha=alpha, dora=dora, seed=seed)
    exact = Adapter(adapter.config, {place: tensor.double() for place, tensor in adapter.tensors.items()})
    merged = loader(folder)().double()
    exact.merge_into(merged)
    assert adapter.scale == alpha / rank
    torch.testing.assert_close(hidden(merged), hidden(model.double()), rtol=0, atol=1e-9)


def test_what_is_on_disk(folder: Path, tmp_path: Path) -> None:
    _, adapter = adapted(folder)
    adapter.write(tmp_path, "facebook/esm2_t6_8M_UR50D")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "facebook/esm2_t6_8M_UR50D"
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert not any(target in ("dense", "output") for target in config["target_modules"])  # would wrap a classifier
    assert {"attention.self.query", "attention.output.dense", "output.dense"} < set(config["target_modules"])


def test_the_seed_decides(folder: Path) -> None:
    def initial(seed: int) -> torch.Tensor:
        model = loader(folder)()
        before = torch.random.get_rng_state()
        insert(model, rank=4, alpha=8, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        return next(iter(parameters_to_train(model).values()))

    assert torch.equal(initial(1), initial(1))
    assert not torch.equal(initial(1), initial(2))


def test_without_peft(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"protea\[finetune\]"):
        insert(loader(folder)(), rank=4, alpha=8, seed=0)


def damage_config(folder: Path, **values: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_adapters_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    _, adapter = adapted(folder)

    def refused(*parts: str, **config: object) -> None:
        damage_config(tmp_path / "a", **config)
        with pytest.raises(CheckpointError) as caught:
            Adapter.read(tmp_path / "a").merge_into(loader(folder)())
        assert all(part in str(caught.value) for part in parts), caught.value
        adapter.write(tmp_path / "a", "small")

    adapter.write(tmp_path / "a", "small")
    refused("peft_type", "'IA3'", peft_type="IA3")
    refused("rank_pattern", rank_pattern={"query": 2})
    refused("r must be a number", r=None)
    refused("incomplete", use_dora=True)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "a" / WEIGHTS)
    refused("incomplete", "encoder.layer.0")
    save_file(tensors | {"base_model.model.classifier.weight": torch.ones(2)}, tmp_path / "a" / WEIGHTS)
    refused("classifier.weight")
    save_file({key.replace("layer.0", "layer.9"): value for key, value in tensors.items()}, tmp_path / "a" / WEIGHTS)
    refused("encoder.layer.9", "lacks")
    save_file({key: value[:, :3].contiguous() for key, value in tensors.items()}, tmp_path / "a" / WEIGHTS)
    refused("do not fit")
    (tmp_path / "a" / WEIGHTS).write_bytes(b"torn")
    refused(WEIGHTS)
