"""A family outside the package works with all commands, and no line of the package names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import protea
from conftest import Run, fails
from protea.checkpoints.hub import published_models
from protea.models import registry
from protea.models.layers import BilinearContactHead
from toy_family import PLACE, TOY, Toy
from trials import LETTERS

pytestmark = pytest.mark.usefixtures("toy", "one_thread")

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "G", "ACDEFGHIKLMNPQRSTVWYXBZ" * 3]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The family, registered."""
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, PLACE])
    published_models.cache_clear()
    yield
    published_models.cache_clear()


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    result = run("init", "toy_tiny", "-o", "toy", "--seed", 3)
    assert result.code == 0, result
    return tmp_path / "toy"


def written_out(model: Toy, sequence: str) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Hidden states, logits and attention maps of one sequence in float64, without the package's layers."""
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    ids = torch.tensor([TOY.bos, *TOY.encode(sequence).tolist()])
    heads, width = model.config.num_attention_heads, model.config.head_width
    x = weights["word_embeddings.weight"][ids]
    states, maps = [x], []
    places = torch.arange(len(ids) + 1).double()
    distance = (places[:-1, None] - places).abs().clamp_min(1).log2()
    closeness = (1 - (distance[..., None] - torch.arange(8)).abs()).clamp_min(0)
    bias = torch.einsum("qkn,hn->hqk", closeness, weights["relative_bias"])

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for number in range(3):
        layer = f"layers.{number}"
        norm = torch.nn.functional.layer_norm(
            x, (20,), weights[f"{layer}.norm.weight"], weights[f"{layer}.norm.bias"], 1e-5
        )
        if number == 1:
            kernel, mixed = weights[f"{layer}.mix.weight"], weights[f"{layer}.mix.bias"].expand(len(ids), -1).clone()
            padded = torch.cat((torch.zeros(1, 20), norm, torch.zeros(1, 20)))
            for shift in range(3):
                mixed += padded[shift : shift + len(ids)] @ kernel[:, :, shift].T
            x = x + model.stored_buffers[f"{layer}.gain"] * mixed.clamp_min(0)
        else:
            q, k, v = (linear(norm, f"{layer}.{part}_proj").view(len(ids), heads, width) for part in "qkv")
            k = torch.cat((k, weights[f"{layer}.bias_k"][None]))
            v = torch.cat((v, weights[f"{layer}.bias_v"][None]))
            probabilities = (torch.einsum("qhw,khw->hqk", q, k) * width**-0.5 + bias).softmax(-1)
            maps.append(probabilities[:, :, :-1])
            x = x + linear(torch.einsum("hqk,khw->qhw", probabilities, v).flatten(1), f"{layer}.out_proj")
        states.append(x)
    return states, linear(x, "lm_head.out"), maps


def test_the_package_does_not_name_it() -> None:
    source = Path(protea.__file__).parent
    assert not [path for path in source.rglob("*.py") if re.search(r"\btoy|\bToy", path.read_text())]


def test_numbers_equal_a_plain_computation(folder: Path) -> None:
    for trainable in (True, False):
        model = protea.load(folder, device="cpu", trainable=trainable)
        plain = protea.load(folder, device="cpu", trainable=True).module
        assert isinstance(plain, Toy)
        embedded = model.embed(SEQUENCES, layers=[0, 1, 2, 3])
        logits = model.logits(SEQUENCES)
        for sequence, arrays, values in zip(SEQUENCES, embedded, logits, strict=True):
            states, expected, maps = written_out(plain, sequence)
            for array, state in zip(arrays, states, strict=True):
                np.testing.assert_allclose(array, state[1:], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(values, expected[1:], rtol=1e-4, atol=1e-5)
            attention = model.attention(sequence, layers=[1, 3])
            np.testing.assert_allclose(attention, torch.stack(maps), rtol=1e-4, atol=1e-6)
            assert (attention.sum(-1) < 1).all(), "the added key takes a part"
        with pytest.raises(protea.ProteaError, match="one of the layers \\[2\\] has no attention"):
            model.attention("MKT", layers=[2])


def test_saving_gives_the_same(folder: Path, tmp_path: Path) -> None:
    model = protea.load(folder, device="cpu")
    model.save(tmp_path / "again")
    again = protea.load(tmp_path / "again", device="cpu")
    for array, expected in zip(again.embed(SEQUENCES), model.embed(SEQUENCES), strict=True):
        np.testing.assert_array_equal(array, expected)
    np.testing.assert_array_equal(model.contacts(SEQUENCES[0]), again.contacts(SEQUENCES[0]))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def changed(folder: Path, target: Path) -> protea.LanguageModel:
    """A copy with other buffers than those it was built with."""
    model = protea.load(folder, device="cpu", trainable=True)
    for value in model.module.stored_buffers.values():
        value.mul_(1.5)
    model.save(target)
    return model


def test_conversion_keeps_everything(run: Run, folder: Path, tmp_path: Path) -> None:
    model = changed(folder, tmp_path / "other")
    result = run("convert", "other", "copy")
    assert result.code == 0, result
    assert "logits of 3 sequences identical to the source's" in result.err + result.out
    copy = protea.load(tmp_path / "copy", device="cpu")
    assert model.module.stored_buffers.keys() == {"distances", "layers.1.gain"}
    for name, value in model.module.stored_buffers.items():
        assert torch.equal(copy.module.stored_buffers[name], value), name
    for array, expected in zip(copy.logits(SEQUENCES), model.logits(SEQUENCES), strict=True):
        np.testing.assert_array_equal(array, expected)
    fails(run("convert", "other", "other.pt"), 1, "Toy")


def test_contacts(run: Run, folder: Path, tmp_path: Path) -> None:
    model = protea.load(folder, device="cpu", trainable=True)
    model.module.contact_head = BilinearContactHead(20, 4)
    model.save(tmp_path / "bilinear")
    (tmp_path / "one.fasta").write_text(f">p\n{SEQUENCES[0]}\n")
    for name, expected in (("bilinear", model), (folder, protea.load(folder, device="cpu"))):
        result = run("contacts", "one.fasta", "-m", name, "-o", f"{Path(name).name}.h5")
        assert result.code == 0, result
        with h5py.File(tmp_path / f"{Path(name).name}.h5") as maps:
            np.testing.assert_allclose(maps["p"][()], expected.contacts(SEQUENCES[0]), atol=1e-3)


def test_files_of_embeddings(run: Run, folder: Path, tmp_path: Path) -> None:
    sequences = [*SEQUENCES, "MKT" * 100]
    (tmp_path / "in.fasta").write_text("".join(f">s{n}\n{sequence}\n" for n, sequence in enumerate(sequences)))
    result = run("embed", "in.fasta", "-m", folder, "-o", "o.parquet", "-r", "r.h5", "--long", "window")
    assert result.code == 0, result
    table = pq.read_table("o.parquet")
    model = protea.load(folder, device="cpu")
    expected = model.embed(sequences, pool="mean", long="window")
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected, atol=1e-6)
    assert "300 residues in 4 windows of 127" in Path("o.parquet.report.tsv").read_text()
    refused = run("embed", "in.fasta", "-m", folder, "-o", "e.parquet", "--pool", "mean,std", "--layers", "4")
    fails(refused, 2, "layer 4 does not exist")
    assert run("embed", "in.fasta", "-m", folder, "-o", "b.parquet", "--pool", "bos").code == 0
    assert run("info", folder).code == 0
    assert run("perplexity", "in.fasta", "-m", folder).code == 0


def test_scores(run: Run, folder: Path, tmp_path: Path) -> None:
    sequence = SEQUENCES[0]
    (tmp_path / "one.fasta").write_text(f">p\n{sequence}\n")
    result = run("score", "one.fasta", "-m", folder, "-v", "A4V,M1W:K2R")
    assert result.code == 0, result
    model = protea.load(folder, device="cpu", trainable=True)
    assert isinstance(model.module, Toy)
    expected = []
    for site, wild, new in ((3, "A", "V"), (0, "M", "W"), (1, "K", "R")):
        masked = f"{sequence[:site]}<mask>{sequence[site + 1 :]}"
        logits = written_out(model.module, masked)[1].log_softmax(-1)[site + 1]
        expected.append(float(logits[TOY.encode(new)[0]] - logits[TOY.encode(wild)[0]]))
    scores = model.score(sequence, ["A4V", "M1W:K2R"])
    np.testing.assert_allclose(scores, [expected[0], expected[1] + expected[2]], atol=1e-5)
    assert model.score(sequence, ["A4del"], method="pseudo-likelihood").shape == (1,)
    long = protea.load(folder, device="cpu")
    assert np.isfinite(long.score("MKTAYIAKQR" * 30, ["M1V", "R300K"], method="wildtype-marginals")).all()


def write_recipe(run: Run, tmp_path: Path) -> None:
    """Training data and ``recipe.yaml`` for 6 steps."""
    rng = np.random.default_rng(0)
    records = ["".join(rng.choice(list(LETTERS), rng.integers(10, 60))) for _ in range(80)]
    (tmp_path / "in.fasta").write_text("".join(f">r{n}\n{record}\n" for n, record in enumerate(records)))
    built = run("data", "fasta", "in.fasta", "-o", "store", "--alphabet", "toy", "--no-filter", "--valid", "8")
    assert built.code == 0, built
    (tmp_path / "recipe.yaml").write_text(
        "model: {architecture: toy_tiny}\ndata: {store: store, max_tokens: 40}\nbatch: {tokens: 200, pack: 100}\n"
        "schedule: {name: constant, warmup: 1}\nvalidation: {every: 3, tokens: 200}\nlog: {tensorboard: false}\n"
        "run: {steps: 6, precision: float32, device: cpu, recompute: true}\nsave: {every: 3, newest: 3}\n"
    )


def test_training(run: Run, tmp_path: Path) -> None:
    write_recipe(run, tmp_path)
    assert run("pretrain", "recipe.yaml", "run.steps=2", "-o", "trained").code == 0
    assert run("export", "trained", "-o", "model").code == 0
    assert "toy.distances" in load_file("model/model.safetensors")
    assert protea.load("model", device="cpu").embed(["MKT"])[0].shape == (3, 20)


@pytest.mark.long
def test_training_resumes_exactly(run: Run, tmp_path: Path) -> None:
    write_recipe(run, tmp_path)
    assert run("pretrain", "recipe.yaml", "-o", "whole").code == 0
    assert run("pretrain", "recipe.yaml", "run.steps=3", "-o", "parts").code == 0
    more = run("pretrain", "recipe.yaml", "-o", "parts", "--accept-changes")
    assert more.code == 0, more
    for name in ("whole", "parts"):
        assert run("export", name, "-o", f"{name}-model").code == 0
    whole, parts = (load_file(f"{name}-model/model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert run("export", "whole", "-o", "first", "--checkpoint", "3").code == 0
    first = load_file("first/model.safetensors")
    assert not any(torch.equal(first[name], whole[name]) for name in whole if "weight" in name)
