"""The forward pass, and what the families share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conftest import CONFIGS, LoadModel, batch_of
from messages import check_message
from protea.errors import CapabilityError, CheckpointError, SequenceTooLongError
from protea.models.encoder import Encoder
from protea.models.esm1b import ESM1bConfig
from protea.models.esm1nv import ESM1nvConfig
from protea.models.esm2 import ESM2, SIZES, ESM2Config
from protea.models.family import EncoderConfig
from protea.models.layers import inverse_frequencies
from protea.models.registry import build, initial_value
from protea.packing import pack

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "M", "GGGGG", "ACDEF", "ACDEFGHIKLMNPQRSTVWYX" * 9]


@torch.no_grad()
def hidden(model: Encoder, sequences: list[str]) -> list[list[Tensor]]:
    """Hidden states by sequence and layer."""
    batch = batch_of(model, *sequences)
    states: list[Tensor] = []
    model(batch, on_hidden=lambda number, x: states.append(x))
    return [[state[start:end] for state in states] for start, end in batch.cu_seqlens.spans()]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sequence_is_the_same_alone_and_in_any_pack(load_small: LoadModel, name: str) -> None:
    model = load_small(name).module
    together = hidden(model, SEQUENCES)
    backwards = hidden(model, SEQUENCES[::-1])[::-1]
    for sequence, packed, reversed_pack in zip(SEQUENCES, together, backwards, strict=True):
        (alone,) = hidden(model, [sequence])
        for a, b, c in zip(alone, packed, reversed_pack, strict=True):
            bound = 1e-5 * max(1.0, a.abs().max().item())
            assert (a - b).abs().max() <= bound
            assert (a - c).abs().max() <= bound


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 0.999), ("float16", 0.99999)])
def test_half_precision_points_the_same_way(load_small: LoadModel, name: str, dtype: str, least: float) -> None:
    exact = hidden(load_small(name).module, SEQUENCES)
    rough = hidden(load_small(name, dtype=dtype).module, SEQUENCES)
    for a, b in zip(exact, rough, strict=True):
        assert b[-1].dtype == getattr(torch, dtype)
        assert torch.cosine_similarity(a[-1], b[-1].float(), dim=-1).min() >= least


@pytest.mark.parametrize("name", CONFIGS)
def test_observing_changes_nothing(load_small: LoadModel, name: str) -> None:
    model = load_small(name).module
    batch = batch_of(model, *SEQUENCES)
    seen: list[int] = []
    with torch.no_grad():
        plain = model(batch)
        observed = model(batch, on_hidden=lambda number, x: seen.append(number))
        attended = model(batch, on_attention=lambda number, maps: None)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(plain, observed)
    assert torch.equal(plain, attended)


def test_rotary_frequencies_keep_their_bits(load_small: LoadModel) -> None:
    """Meta's frequencies are rounded to float16; further rounding would change every position."""
    module = load_small("esm2").module
    assert isinstance(module, ESM2)
    before = module.inv_freq.clone()
    for cast in (torch.bfloat16, torch.float16, torch.float32):
        module.to(cast)
        assert module.word_embeddings.weight.dtype == cast
        assert torch.equal(module.inv_freq, before)
    assert module.to("meta").inv_freq.is_meta


def test_inverse_frequencies() -> None:
    expected = [10000 ** (-2 * i / 16) for i in range(8)]
    torch.testing.assert_close(inverse_frequencies(16, 10000.0), torch.tensor(expected))


@pytest.mark.parametrize("name", ["esm2", "esm1b"])
def test_a_sequence_of_masks_alone_is_finite(load_small: LoadModel, name: str) -> None:
    module = load_small(name).module
    with torch.no_grad():
        assert module(pack([module.alphabet.encode("<mask>" * 4)])).isfinite().all()


@pytest.mark.parametrize(("name", "limit"), [("esm1b", 1024), ("esm1v", 1024), ("esm1nv", 512)])
def test_learned_positions_end(load_small: LoadModel, name: str, limit: int) -> None:
    module = load_small(name).module
    assert module.max_tokens == limit
    with torch.no_grad():
        module(batch_of(module, *["A" * (limit - 2)]))
        with pytest.raises(SequenceTooLongError, match=f"{limit - 1:,} .* {limit - 2:,} "):
            module(batch_of(module, *["A" * (limit - 1), "A"]))


def test_missing_heads_are_named(load_small: LoadModel) -> None:
    module = load_small("esm2").module
    assert module.capabilities == {"attention", "logits", "contacts"}
    module.lm_head = None
    module.contact_head = None
    assert module.capabilities == {"attention"}
    with pytest.raises(CapabilityError) as caught:
        module.head(torch.zeros(1, 40))
    check_message("models.no_logits", caught.value)
    with pytest.raises(CapabilityError) as caught:
        module.require("contacts")
    check_message("models.no_contacts", caught.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_mode_drops_and_has_gradients_everywhere(load_small: LoadModel, name: str) -> None:
    module = load_small(name).module
    config = module.config
    batch = batch_of(module, *SEQUENCES)
    module.train()
    torch.manual_seed(0)
    first, second = module(batch), module(batch)
    drops = config.hidden_dropout_prob > 0
    assert drops == isinstance(config, ESM1nvConfig)
    assert torch.equal(first, second) != drops
    module.contact_head = None
    module.head(first).logsumexp(-1).sum().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_published_sizes() -> None:
    """Layers, width and heads of Lin et al. 2023, table S1; 20B is ours."""
    shapes = {
        name: (size.num_hidden_layers, size.hidden_size, size.num_attention_heads) for name, size in SIZES.items()
    }
    assert shapes == {
        "8M": (6, 320, 20),
        "35M": (12, 480, 20),
        "150M": (30, 640, 20),
        "650M": (33, 1280, 20),
        "3B": (36, 2560, 40),
        "15B": (48, 5120, 40),
        "20B": (64, 5120, 40),
    }
    assert all(size.intermediate_size == 4 * size.hidden_size for size in SIZES.values())


def test_building_takes_no_memory() -> None:
    model = build(SIZES["15B"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("name", CONFIGS)
def test_initialisation(name: str) -> None:
    model = build(CONFIGS[name])
    for parameter_name, parameter in model.named_parameters():
        value = initial_value(model, parameter_name, 3)
        assert value.shape == parameter.shape
        assert value.dtype == torch.float32
        assert torch.equal(value, initial_value(model, parameter_name, 3))
        if parameter_name.endswith("bias"):
            assert not value.any()
        elif "layer_norm" in parameter_name:
            assert (value == 1).all()
        else:
            assert not torch.equal(value, initial_value(model, parameter_name, 4))
            scaled = name == "esm1nv" and parameter_name.endswith(("out_proj.weight", "fc2.weight"))
            std = 0.02 / 6**0.5 if scaled else 0.02
            # Five standard errors of a standard deviation.
            assert value.std().item() == pytest.approx(std, rel=5 / (2 * value.numel()) ** 0.5)
    words = initial_value(model, "word_embeddings.weight", 3)
    assert words[model.alphabet.pad].any() == (name == "esm1nv")


# The same on every machine and with every version of NumPy.
DIGEST = "4cdf26a9f472d1a63870300ce3a4b2e1c816240608cb9f7050b03d232cd4fec4"
PROGRAM = """
import hashlib
from protea.models.registry import build, initial_value
from protea.models.esm2 import SIZES
model = build(SIZES["8M"])
print(hashlib.sha256(initial_value(model, "layers.0.fc1.weight", 3).numpy().tobytes()).hexdigest())
"""


def test_initialisation_is_the_same_on_any_machine(capsys: pytest.CaptureFixture[str]) -> None:
    exec(PROGRAM, {})
    assert capsys.readouterr().out.strip() == DIGEST


@pytest.mark.long
def test_initialisation_is_the_same_on_any_processor() -> None:
    settings = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=settings)
    assert done.stdout.strip() == DIGEST


ODD = {"num_hidden_layers": 1, "hidden_size": 9, "num_attention_heads": 3, "intermediate_size": 4}


@pytest.mark.parametrize(
    ("key", "make"),
    [
        ("models.width", lambda: ESM2Config(**ODD | {"hidden_size": 10})),
        ("models.layers", lambda: ESM2Config(**ODD | {"num_hidden_layers": 0})),
        ("models.head_width", lambda: ESM2Config(**ODD)),
        ("models.rope_theta", lambda: ESM2Config(**ODD | {"hidden_size": 12}, rope_theta=0.5)),
        ("models.epsilon", lambda: ESM2Config(**ODD | {"hidden_size": 12}, layer_norm_eps=2.0)),
        ("models.dropout", lambda: ESM2Config(**ODD | {"hidden_size": 12}, hidden_dropout_prob=1.0)),
        ("models.activation", lambda: ESM1nvConfig(hidden_act="relu")),
        ("models.positions", lambda: ESM1bConfig(**ODD, emb_layer_norm_before=True, max_position_embeddings=2)),
    ],
)
def test_numbers_that_do_not_fit(key: str, make: Callable[[], EncoderConfig]) -> None:
    with pytest.raises(CheckpointError) as caught:
        make()
    check_message(key, caught.value)
