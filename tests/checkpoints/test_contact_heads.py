"""Contact heads of both kinds in checkpoints: kept in every format, and a folder with one stays a folder of others."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import protea
from conftest import CONFIGS, LoadModel
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import open_checkpoint
from protea.contacts.predict import contacts
from protea.errors import CheckpointError
from protea.models.encoder import Encoder
from protea.models.layers import BilinearContactHead, ContactHead
from references import load_transformers, run_transformers

KINDS = ("regression", "bilinear")
SEQUENCE = "MKTAYIAKQRGGSPEVLW"


def give_head(model: Encoder, kind: str, rank: int = 6) -> None:
    config = model.config
    if kind == "regression":
        model.contact_head = ContactHead(sum(config.attention_heads))
    else:
        model.contact_head = BilinearContactHead(config.hidden_size, rank)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.contact_head.parameters():
            parameter.normal_(0, 0.5, generator=generator)


def predicted(model: Encoder) -> np.ndarray:
    return contacts(model, model.alphabet.encode(SEQUENCE))


@pytest.fixture
def saved(load_small: LoadModel, tmp_path: Path, name: str, kind: str) -> tuple[protea.LanguageModel, Path]:
    model = load_small(name)
    give_head(model.module, kind)
    model.save(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_gives_the_head_back(saved: tuple[protea.LanguageModel, Path], kind: str) -> None:
    model, folder = saved
    again = protea.load(folder, device="cpu", trainable=True)
    assert type(again.module.contact_head) is type(model.module.contact_head)
    assert "contacts" in again.capabilities
    assert (folder / "extras.safetensors").exists() == (kind == "bilinear")
    np.testing.assert_array_equal(predicted(again.module), predicted(model.module))
    assert set(again.weights_sha256()) == {path.name for path in folder.glob("*.safetensors")}
    narrow = protea.load(folder, device="cpu", dtype="bfloat16")
    np.testing.assert_allclose(predicted(narrow.module), predicted(model.module), atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["esm2", "esm1b"])
def test_transformers_loads_the_folder_as_ever(saved: tuple[protea.LanguageModel, Path], kind: str) -> None:
    model, folder = saved
    theirs = load_transformers(folder)
    ids = torch.tensor([0, *model.alphabet.encode(SEQUENCE), 2])
    with torch.no_grad():
        logits = run_transformers(theirs, ids)[1][1:-1]
        tokens = ids[None]
        found = theirs.predict_contacts(tokens, torch.ones_like(tokens))[0]
    np.testing.assert_allclose(logits, model.logits([SEQUENCE])[0], rtol=1e-4, atol=2e-5)
    if kind == "regression":
        np.testing.assert_allclose(found, predicted(model.module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "to"),
    [
        pair.split()
        for pair in ("esm2 fair-esm", "esm2 nemo", "esm2nv nemo2", "esm2 te", "esm1b fair-esm", "esm1nv nemo")
    ],
)
def test_every_format_keeps_the_head(
    saved: tuple[protea.LanguageModel, Path], tmp_path: Path, name: str, kind: str, to: str
) -> None:
    model, folder = saved
    target = tmp_path / {"fair-esm": f"{name}.pt", "nemo": "model.nemo"}.get(to, "copy")
    report = convert(folder, target, to, peers=False)
    assert report.tensors == len(list(model.module.parameters()))
    apart = [line for line in report.apart if line.startswith("the contact head, in ")]
    assert bool(apart) == (kind == "bilinear" or to in ("nemo", "nemo2", "te"))
    np.testing.assert_array_equal(
        predicted(protea.load(target, device="cpu", trainable=True).module), predicted(model.module)
    )
    convert(target, tmp_path / "back", "hf", peers=False)
    np.testing.assert_array_equal(
        predicted(protea.load(tmp_path / "back", device="cpu", trainable=True).module), predicted(model.module)
    )
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_model_without_head_stays_without(load_small: LoadModel, tmp_path: Path) -> None:
    for name in ("esm1nv", "esm2"):
        model = load_small(name)
        model.module.contact_head = None
        model.save(tmp_path / name)
        assert "contacts" not in protea.load(tmp_path / name, device="cpu").capabilities


@pytest.mark.parametrize(("name", "kind"), [("esm2", "bilinear")])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("contact_head.p_proj.weight", torch.zeros(7, 40)),
        ("contact_head.p_proj.weight", torch.zeros(40)),
        ("contact_head.p_proj.weight", torch.zeros(0, 40)),
        ("contact_head.p_proj.weight", torch.zeros(())),
        ("contact_head.q_proj.weight", torch.zeros(6, 41)),
        ("contact_head.bias", torch.zeros(6)),
        ("contact_head.q_proj.weight", None),
        ("contact_head.p_proj.weight", None),
        ("contact_head.regression.weight", torch.zeros(1, 15)),
        ("contact_head.other", torch.zeros(1)),
    ],
)
def test_half_a_head_is_refused(
    saved: tuple[protea.LanguageModel, Path], name: str, kind: str, key: str, value: torch.Tensor | None
) -> None:
    from safetensors import safe_open

    _, folder = saved
    path = folder / "extras.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118
    tensors.pop(key, None)
    if value is not None:
        tensors[key] = value
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=rf"extras\.safetensors: .*{re.escape(str(folder))}"):
        open_checkpoint(folder)
