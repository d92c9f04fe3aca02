"""ESM C beside EvolutionaryScale's esm 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import protea
from conftest import Run, fails
from family_checks import (
    PROTEIN,
    SEQUENCES,
    Outputs,
    check_alone,
    check_bits,
    check_mixed,
    check_narrow,
    check_packed,
    check_parity,
    random_model,
    tokens_of,
)
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import open_checkpoint
from protea.errors import CheckpointError, ProteaWarning
from protea.models.esmc import ALPHABET, SIZES, ESMCConfig
from protea.models.registry import build
from trials import write_fasta

pytestmark = pytest.mark.usefixtures("one_thread")

ODD = ESMCConfig(num_hidden_layers=3, hidden_size=128, num_attention_heads=2, intermediate_size=512)
CHAINS = [*SEQUENCES, "MKT|AYI.-|W"]


def reference(
    weights: Path, config: ESMCConfig, rows: list[list[int]], folder: Path
) -> dict[tuple[bool, int], Outputs]:
    """What their code computes of each row, in float64 or not."""
    packages = os.environ.get("PROTEA_ESM_3", "")
    if not Path(packages, "esm").is_dir():
        pytest.skip("PROTEA_ESM_3 does not name a folder with EvolutionaryScale's esm; `make test` sets it")
    (folder / "tokens.json").write_text(json.dumps(rows))
    script = Path(__file__).parents[1] / "esm3_reference.py"
    sizes = [str(config.num_hidden_layers), str(config.hidden_size)]
    command = [sys.executable, str(script), str(weights), str(folder / "tokens.json"), str(folder / "out.npz"), *sizes]
    environment = os.environ | {"PYTHONPATH": packages}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    arrays = np.load(folder / "out.npz")
    return {
        (exact, number): Outputs(
            list(torch.from_numpy(arrays[f"{kind}/{number}/states"])),
            torch.from_numpy(arrays[f"{kind}/{number}/logits"]),
            [],
        )
        for exact, kind in ((False, "torch.float32"), (True, "torch.float64"))
        for number in range(len(rows))
    }


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ODD, id="odd"),
        pytest.param(replace(SIZES["300m"], num_hidden_layers=2), marks=pytest.mark.long, id="300M, 2 layers"),
    ],
)
def test_equals_their_class(config: ESMCConfig, tmp_path: Path) -> None:
    """Their class loads our file, and gives our numbers."""
    model = random_model(config, tmp_path)
    convert(tmp_path / "model", tmp_path / "weights.pth", "evolutionaryscale")
    rows = [tokens_of(model, sequence).tolist() for sequence in CHAINS]
    outputs = reference(tmp_path / "weights.pth", config, rows, tmp_path)
    places = {tuple(row): number for number, row in enumerate(rows)}

    def lookup(ids: Tensor, exact: bool) -> Outputs:
        return outputs[exact, places[tuple(ids.tolist())]]

    check_parity(model, lambda ids: lookup(ids, False), lambda ids: lookup(ids, True), CHAINS)


def test_a_sequence_alone_and_packed(tmp_path: Path) -> None:
    check_alone(random_model(ODD, tmp_path), CHAINS)
    check_packed(tmp_path / "model")
    check_bits(tmp_path / "model")


def test_fast(tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    check_mixed(tmp_path / "model")
    check_narrow(tmp_path / "model")


def test_published_sizes() -> None:
    """The networks' widths are 8/3 of the width, rounded up to 256."""
    assert [config.intermediate_size for config in SIZES.values()] == [2560, 3072]
    assert (ALPHABET.tokens.index("|"), ALPHABET.mask, len(ALPHABET)) == (31, 32, 33)
    counts = [sum(parameter.numel() for parameter in build(config).parameters()) for config in SIZES.values()]
    assert [round(count / 1e6) for count in counts] == [333, 575]


def test_files(tmp_path: Path) -> None:
    """Of a state dict alone, the sizes are those of the tensors; what else has such tensors is refused."""
    model = random_model(ODD, tmp_path)
    convert(tmp_path / "model", tmp_path / "weights.pth", "evolutionaryscale")
    state = torch.load(tmp_path / "weights.pth")
    assert "transformer.blocks.2.attn.layernorm_qkv.1.weight" in state
    with open_checkpoint(tmp_path / "weights.pth") as checkpoint:
        assert checkpoint.model.config == ODD
        for name, value in model.named_parameters():
            assert torch.equal(checkpoint.parameter(name), value), name
    del state["transformer.blocks.1.ffn.3.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=r"part\.pth.*transformer\.blocks\.1\.ffn\.3\.weight"):
        open_checkpoint(tmp_path / "part.pth")
    good = (tmp_path / "weights.pth").read_bytes()
    for length in range(1, len(good), len(good) // 20):
        (tmp_path / "cut.pth").write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            open_checkpoint(tmp_path / "cut.pth")
    state["transformer.blocks.0.geom_attn.proj.weight"] = torch.zeros(3)
    state["encoder.sequence_embed.weight"] = state.pop("embed.weight")
    torch.save(state, tmp_path / "esm3.pth")
    with pytest.raises(CheckpointError, match=r"esm3\.pth"):
        open_checkpoint(tmp_path / "esm3.pth")


def test_the_licence_is_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("info", "esmc_600m")
    assert "LicenseRef-Cambrian-Non-Commercial (not for commercial use)" in result.out
    assert "not for commercial use" not in run("info", "esmc_300m").out
    known = replace(build(SIZES["600m"]).published[1], config=ODD)
    monkeypatch.setattr(type(build(ODD)), "published", (known,))
    random_model_folder(tmp_path)
    with pytest.warns(ProteaWarning, match="esmc_600m, they are not for commercial use"):
        protea.load(tmp_path / "model", device="cpu")
    assert "not for commercial use" in run("info", "model").out


def random_model_folder(folder: Path) -> None:
    with pytest.warns(ProteaWarning):
        random_model(ODD, folder)


def test_commands(run: Run, tmp_path: Path) -> None:
    random_model(ODD, tmp_path)
    (tmp_path / "in.fasta").write_text(f">a\n{PROTEIN}\n>b\nMKTJUX\n")
    (tmp_path / "one.fasta").write_text(f">a\n{PROTEIN}\n")
    for command in (
        ("info", "model"),
        ("embed", "in.fasta", "-m", "model", "-o", "o.parquet", "-r", "r.h5", "--logits", "l.h5", "--pool", "mean,bos"),
        ("embed", "in.fasta", "-m", "model", "-o", "f.parquet", "--dtype", "bf16-mixed"),
        ("perplexity", "in.fasta", "-m", "model"),
        ("score", "one.fasta", "-m", "model", "-v", "K2A,A4V:K8R"),
    ):
        result = run(*command)
        assert result.code == 0, result
    fails(run("contacts", "one.fasta", "-m", "model", "-o", "c.h5"), 1, "ESM C", "fit-contacts")
    fails(run("embed", "in.fasta", "-m", "esmc_300m", "-o", "p.h5"), 1, "huggingface.co/EvolutionaryScale")
    fails(run("convert", "model", "esmc.pt"), 1, "ESM C", "--to hf or evolutionaryscale")
    shape = ("model.num_hidden_layers=2", "model.hidden_size=16", "model.num_attention_heads=2", "run.steps=2")
    sizes = ("model.intermediate_size=32", "batch.tokens=256", "batch.pack=128", "data.max_tokens=64")
    data = ("data.fasta=many.fasta", "data.cluster=false", "run.precision=float32", "validation.tokens=256")
    rest = ("schedule.warmup=1", "run.compile=false", "log.tensorboard=false", "model.architecture=esmc_300m")
    write_fasta(tmp_path / "many.fasta", 1000)
    result = run("pretrain", "esm1b", *shape, *sizes, *data, *rest, "-o", "trained")
    assert result.code == 0, result
