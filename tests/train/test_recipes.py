"""The recipes beside the numbers that were published, what recipes refuse, and what they say they take."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from runs import CPU, loader, make_store, recipe, take_step, trained
from torch.utils.flop_counter import FlopCounterMode

from conftest import CONFIGS, SMALL, Run, fails
from messages import check_message
from protea.data.loader import TrainingBatch
from protea.data.training_store import TrainingStore
from protea.errors import TrainingError, UsageError
from protea.journal import differences
from protea.models.carp import CARPConfig
from protea.models.esmc import ESMCConfig
from protea.models.family import EncoderConfig
from protea.models.registry import build
from protea.packing import CuSeqlens, PackedBatch, PackedRows
from protea.settings_errors import validate
from protea.train.estimate import check_memory, estimate, mean_length
from protea.train.loop import pretrain
from protea.train.metrics import TrainingProgress
from protea.train.model import Trainable, architecture, settle_precision
from protea.train.objective import masked_loss
from protea.train.recipe import RECIPES, Recipe, flatten, read_recipe, recipe_names
from reference_attention import REFERENCE
from trials import mostly_long

pytestmark = pytest.mark.usefixtures("one_thread")

META = {
    "tokens": 2**21,
    "rate": 4e-4,
    "steps": 500_000,
    "warmup": 2000,
    "schedule": "linear",
    "final": 4e-5,
    "masking": "standard",
    "crop": "random",
    "length": 1024,
    "precision": "auto",
}
META_15B = META | {"tokens": 3.2e6, "rate": 1.6e-4, "steps": 270_000, "final": 1.6e-5}
BIONEMO2 = {"schedule": "anneal-hold", "masking": "bionemo2", "crop": "random-tokens"}

# Lin et al. 2023; BioNeMo 2's WarmupAnnealDecayHold; BioNeMo 1's model card and base_config.yaml.
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "esm2_8M": (META, (6, 320, 20)),
    "esm2_35M": (META, (12, 480, 20)),
    "esm2_150M": (META, (30, 640, 20)),
    "esm2_650M": (META, (33, 1280, 20)),
    "esm2_3B": (META, (36, 2560, 40)),
    "esm2_15B": (META_15B, (48, 5120, 40)),
    "esm1b": (META, (33, 1280, 20)),
    "esm1": (META, (34, 1280, 20)),
    "carp_640M": (META, (56, 1280, 0)),
    "esm2nv_650M": (META | BIONEMO2, (33, 1280, 20)),
    "esm2nv_3B": (META | BIONEMO2, (36, 2560, 40)),
    "esm2nv_15B": (META_15B | BIONEMO2, (48, 5120, 40)),
    "esm2nv_20B": (META_15B | BIONEMO2, (64, 5120, 40)),
    "esm1nv": (
        {
            "tokens": 176 * 370 * 254,
            "rate": 2e-4,
            "steps": 957_610,
            "warmup": 500,
            "schedule": "cosine",
            "final": 2e-5,
            "masking": "bionemo1-esm1nv",
            "crop": "head-tokens",
            "length": 512,
            "precision": "fp16-mixed",
        },
        (6, 768, 12),
    ),
}


def numbers(told: Recipe) -> dict[str, Any]:
    schedule = told.schedule
    return {
        "tokens": told.batch.packs * told.batch.pack,
        "rate": told.optimizer.lr,
        "steps": told.run.steps,
        "warmup": schedule.warmup,
        "schedule": schedule.name,
        "final": schedule.min_lr if schedule.name == "cosine" else schedule.floor * told.optimizer.lr,
        "masking": told.data.masking,
        "crop": told.data.crop,
        "length": told.data.max_tokens,
        "precision": told.run.precision,
    }


def test_every_recipe_is_in_the_table() -> None:
    assert set(recipe_names()) == {*PUBLISHED, "domain-adaptation", "protea-mini", "quickstart"}


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_complete(name: str) -> None:
    told = read_recipe(name)
    written = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    shown = told.shown()
    assert written.keys() == shown.keys()
    for section, values in shown.items():
        if isinstance(values, dict):
            assert written[section].keys() == values.keys(), section
    assert told.name
    assert (told.data.store, told.data.fasta, told.log.wandb) == (None, None, None)
    # What is shown is a recipe, and the same.
    assert validate(Recipe, yaml.safe_load(yaml.safe_dump(shown)), "again") == told
    assert not differences(flatten(shown), flatten(written))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    told = read_recipe(name)
    expected, (layers, width, heads) = PUBLISHED[name]
    found = numbers(told)
    assert found.pop("tokens") == pytest.approx(expected["tokens"], rel=0.005)
    assert found.pop("final") == pytest.approx(expected["final"])
    assert found == {key: value for key, value in expected.items() if key not in {"tokens", "final"}}
    optimizer = told.optimizer
    assert (optimizer.name, optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.clip) == (
        "adamw",
        (0.9, 0.98),
        1e-8,
        0.01,
        1.0,
    )
    assert told.schedule.decay == 0.9
    config = told.config
    assert (config.num_hidden_layers, config.hidden_size, config.attention_heads) == (layers, width, (heads,) * layers)
    if not heads:
        return
    assert config.intermediate_size == 4 * width
    dropout = 0.1 if name == "esm1nv" else 0.0
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == dropout


def test_what_only_some_recipes_have() -> None:
    esm1nv = read_recipe("esm1nv")
    assert esm1nv.schedule.steps == 1_000_000
    assert esm1nv.schedule.constant == 50_000
    assert (esm1nv.data.max_length, esm1nv.run.seed, esm1nv.validation.every, esm1nv.save.best) == (512, 1234, 1500, 10)
    # `protea average --last 47` finds them.
    assert esm1nv.save.newest >= 47
    assert read_recipe("esm2nv_650M").schedule.min_lr == 4e-5
    assert read_recipe("esm2nv_15B").schedule.min_lr == 1.6e-5
    assert read_recipe("domain-adaptation").init == "esm2_t6_8M_UR50D"


@pytest.mark.parametrize("name", mostly_long(PUBLISHED, quick={0, 3, 7, 8, 13}))
def test_parameters(name: str) -> None:
    """By the architectures' formulas; where a number was published, that."""
    told = read_recipe(name)
    _, (layers, width, _) = PUBLISHED[name]
    rows = 33 if name.startswith(("esm2_", "esm1b")) else 35 if name == "esm1" else 128
    block = 4 * width**2 + 4 * width + 2 * 4 * width**2 + 4 * width + width + 4 * width
    head = width**2 + width + 2 * width + rows
    positions = {"esm1b": 1026 * width + 2 * width, "esm1nv": 512 * width}.get(name, 0)
    expected = rows * width + positions + layers * block + 2 * width + head
    if name == "carp_640M":  # two matrices and a kernel of 5 a layer, norms, embeddings of 8, a head with a norm
        block = 7 * width**2 + 3 * width + 6 * width
        expected = 30 * 8 + 9 * width + layers * block + 2 * width + 30 * width + 30
    if name == "esm1":  # an added key and value in each layer, no last norm, an output matrix as the head
        expected = 2 * rows * width + rows + layers * (block + 2 * width)
    found = estimate(architecture(told), told, 100.0).parameters
    assert found == expected
    known = {"esm1nv": 43_612_544, "esm2nv_650M": 651_164_288}
    assert known.get(name, found) == found
    size = name.rsplit("_", maxsplit=1)[-1]
    if size != name:
        rough = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
        assert found == pytest.approx(rough, rel=0.07)


@pytest.mark.parametrize("name", mostly_long(recipe_names(), quick={0, 2}))
def test_dry_run(run: Run, model_folders: dict[str, Path], name: str) -> None:
    changes = [f"init={model_folders['esm2']}"] if name == "domain-adaptation" else []
    result = run("pretrain", name, *changes, "--dry-run")
    assert result.code == 0
    assert yaml.safe_load(result.out) == read_recipe(name, changes).shown()
    remarks = [line for line in result.out.splitlines() if line.startswith("# ")]
    assert len(remarks) == 5
    assert re.fullmatch(r"# this recipe needs about .*B of main memory, (and|but only) .*B are free: .+", remarks.pop())
    told = settle_precision(read_recipe(name, changes), CPU)
    assert remarks.pop(0) == f"# computes in {told.run.precision}"
    assert " of matrix products at " in remarks[1]
    told = read_recipe(name, changes)
    assert f" parameters; {told.run.steps:,} steps of {told.batch.packs * told.batch.pack:,} tokens" in remarks[0]
    assert not list(Path().iterdir())


def test_list(run: Run) -> None:
    lines = run("pretrain", "--list").out.splitlines()
    assert [line.split()[0] for line in lines[1:-2]] == recipe_names()
    assert all(len(line) <= 80 for line in lines)
    rows = {line.split()[0]: line for line in lines}
    for part in ("ESM-2 650M", "651.0 M", "1e+12", "GB"):
        assert part in rows["esm2_650M"]
    assert "init=MODEL" in rows["domain-adaptation"]
    assert "data.fasta" in lines[-2]


def test_a_dry_run_says_whether_it_fits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def remark(*changes: str) -> str:
        return run("pretrain", "esm2_8M", "run.precision=float32", *changes, "--dry-run").out.splitlines()[-1]

    monkeypatch.setattr("protea.train.estimate.available_memory", lambda: 8 * 10**9)
    fits = remark("run.device=cpu")
    assert fits.endswith("of main memory, and 8.0 GB are free: it fits")
    assert remark("run.device=cpu", "batch.pack=600000").endswith(
        "but only 8.0 GB are free: lower batch.pack, or set run.recompute=true"
    )
    assert " the model alone needs " in remark("run.device=cpu", "model.num_hidden_layers=500")
    if not torch.cuda.is_available():
        assert remark("run.device=cuda") == ("# cuda is not on this machine: whether the memory suffices is not known")
    check_message("train.dry_run: fits", fits, needed=fits.split()[5])


REFUSED = [
    ("run.stepps=3", "'run.stepps'", "'steps'"),
    ("optimiser.lr=1e-3", "'optimiser'", "'optimizer'"),
    ("zzz=1", "'zzz'", "name, init, model, data"),
    ("model.hiden_size=3", "'model.hiden_size'", "'hidden_size'"),
    ("model.hidden_size=321", "model.hidden_size 321 ", "model.num_attention_heads 20"),
    ("model.architecture=esm2_t6_8M", "model.architecture: ", "'esm2_t6_8M'", "esm2_t6_8M_UR50D"),
    ("model.hidden_size=big", "model.hidden_size 'big'", "int"),
    ("model.hidden_size=321", "hidden_size 321", "num_attention_heads 20"),
    ("model.num_hidden_layers=0", "num_hidden_layers", "1 to 1,000, got 0"),
    ("model=3", "model 3 ", "dictionary"),
    ("model={}", "model.architecture", "init"),
    ("init=somewhere", "init", "model (architecture)", "model={}"),
    ("run.steps=many", "run.steps 'many'", "integer"),
    ("run.steps=1.5", "run.steps 1.5 ", "integer"),
    ("run.steps=0", "run.steps 0 ", "greater than or equal to 1"),
    ("run.steps=true", "run.steps True ", "true or false"),
    ("optimizer.lr=yes", "optimizer.lr True ", "true or false"),
    ("validation.every=on", "validation.every True ", "true or false"),
    ("model.num_hidden_layers=true", "model.num_hidden_layers True ", "int"),
    ("model.token_dropout=1", "model.token_dropout 1 ", "bool"),
    ("run.steps=null", "run.steps None ", "integer"),
    ("run=fast", "run 'fast' ", "dictionary"),
    ("run.precision=bf16", "run.precision 'bf16' ", "'bf16-mixed', 'fp16-mixed' or 'float32'"),
    ("run.compile=perhaps", "run.compile 'perhaps' ", "boolean"),
    ("run.seed=-1", "run.seed -1 ", "greater than or equal to 0"),
    ("optimizer.lr=.inf", "optimizer.lr inf ", "finite"),
    ("optimizer.lr=-1", "optimizer.lr -1 ", "greater than 0"),
    ("optimizer.name=adam", "optimizer.name 'adam' ", "'adamw' or 'muon'"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas 1.0 ", "less than 1"),
    ("optimizer.betas=0.9", "optimizer.betas 0.9 ", "tuple"),
    ("schedule.name=cosin", "schedule.name 'cosin' ", "'cosine', 'constant' or 'trapezoid'"),
    ("schedule.floor=1.1", "schedule.floor 1.1 ", "less than or equal to 1"),
    ("schedule.min_lr=1", "schedule.min_lr 1 ", "optimizer.lr 0.0004"),
    ("schedule.steps=100", "schedule.warmup 2,000 ", "schedule.constant 0 ", "schedule.steps 100; "),
    ("run.steps=100", "schedule.warmup 2,000 ", "schedule.constant 0 ", "run.steps 100; "),
    ("data.masking=bert", "data.masking 'bert' ", "standard, bionemo2"),
    ("data.crop=tail", "data.crop 'tail' ", "'random', 'head', 'random-tokens' or 'head-tokens'"),
    ("data={store: a, fasta: [b]}", "data.store", "data.fasta"),
    ("batch.pack=1000", "batch.pack 1,000 ", "data.max_tokens 1,024"),
    ("batch.tokens=5000", "batch.tokens 5,000 ", "batch.pack 16,384"),
]


@pytest.mark.parametrize(("change", "parts"), [(change, parts) for change, *parts in REFUSED])
def test_wrong_values_are_refused(change: str, parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe("esm2_8M", [change])
    for part in (f"esm2_8M with {change}: ", *parts):
        assert part in str(caught.value)


WORDING = {
    "unknown key": "run.stepps=3",
    "unknown section": "zzz=1",
    "wrong type": "run.steps=many",
    "boolean": "run.steps=true",
    "choice": "optimizer.name=adam",
    "architecture": "model.hidden_size=big",
    "no model": "model={}",
    "init and model": "init=somewhere",
    "pack": "batch.pack=1000",
    "step": "batch.tokens=5000",
    "warm-up": "schedule.steps=100",
    "not a change": "run.steps",
    "not YAML": "batch.tokens=[1",
}


@pytest.mark.parametrize("key", WORDING)
def test_wording_of_refusals(key: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe("esm2_8M", [WORDING[key]])
    check_message(f"train.recipe: {key}", caught.value)


def test_an_error_names_what_was_given(tmp_path: Path) -> None:
    """A key of the file alone, one beside the conflict, and two in conflict."""
    path = tmp_path / "my.yaml"
    path.write_text("model: {architecture: esm1nv}\nrun: {steps: 100}\n")
    for changes, given in (
        ([], "my.yaml: "),
        (["run.seed=3"], "my.yaml: "),
        (["run.seed=3", "schedule.warmup=200"], "my.yaml with schedule.warmup=200: "),
        (["run.steps=5", "schedule.warmup=9"], "my.yaml with run.steps=5, schedule.warmup=9: "),
        (["schedule={warmup: 200}"], "my.yaml with schedule={warmup: 200}: "),
    ):
        with pytest.raises(UsageError, match=re.escape(f"{given}schedule.warmup ")):
            read_recipe(str(path), changes)


@pytest.mark.parametrize(
    ("change", "part"),
    [("run.steps", "'run.steps'"), ("=3", "'=3'"), ("batch.tokens=[1", "'batch.tokens=[1': not YAML")],
)
def test_changes_that_cannot_be_read(change: str, part: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe("esm2_8M", [change])
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "key: value"),
        ("", "key: value"),
        ("run: {steps: [", "not YAML: "),
        ("run:\n  steps: 3\n", "model.architecture"),
        ("runs:\n  steps: 3\n", "'runs'"),
        (b"\xff\xfe\x00", "cannot be read: "),
        ("model: !!python/object/apply:os.system [touch pwned]", "not YAML: could not determine a constructor"),
    ],
)
def test_files(run: Run, text: str | bytes, message: str) -> None:
    Path("my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(run("pretrain", "my.yaml", "--dry-run"), 2, "my.yaml: ", message)
    assert [path.name for path in Path().iterdir()] == ["my.yaml"]


def test_changes() -> None:
    before = read_recipe("esm2_8M")
    after = read_recipe(
        "esm2_8M",
        [
            "optimizer.lr=1e-3",
            "optimizer.betas=[0.8, 0.9]",
            "optimizer.clip=",
            "run.steps = 3000",
            "model.hidden_dropout_prob=0.1",
            "model.layer_norm_eps=1e-6",
            "model.num_hidden_layers=2",
            "data.fasta=[a.fasta, b.fasta.gz]",
            "validation.every=null",
            "name=mine",
        ],
    )
    assert sorted(differences(flatten(before.shown()), flatten(after.shown())).split("; ")) == [
        "data.fasta nothing -> a.fasta,b.fasta.gz",
        "model.hidden_dropout_prob nothing -> 0.1",
        "model.layer_norm_eps nothing -> 1e-06",
        "model.num_hidden_layers nothing -> 2",
        "name ESM-2 8M -> mine",
        "optimizer.betas 0.9,0.98 -> 0.8,0.9",
        "optimizer.clip 1.0 -> nothing",
        "optimizer.lr 0.0004 -> 0.001",
        "run.steps 500000 -> 3000",
        "validation.every 2000 -> nothing",
    ]
    assert after.config == replace(before.config, hidden_dropout_prob=0.1, layer_norm_eps=1e-6, num_hidden_layers=2)


def test_a_recipe_of_few_words(tmp_path: Path) -> None:
    """What a file leaves out has its default, and nothing of a published recipe."""
    path = tmp_path / "mine.yaml"
    path.write_text("model: {architecture: esm1nv}\noptimizer: {lr: 1.0e-3}\n")
    told = read_recipe(str(path))
    assert told == Recipe(model={"architecture": "esm1nv"}, optimizer={"lr": 1e-3})  # type: ignore[arg-type]
    assert told.optimizer.lr == 1e-3
    with pytest.raises(UsageError, match=r"model\.architecture"):
        validate(Recipe, {}, "nothing")


# --- what a recipe takes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CONFIGS, "esmc", "carp"])
def test_flops(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own count of a forward pass's products, of packs where all sequences are of one length."""
    carp = CARPConfig(num_hidden_layers=4, hidden_size=40, inner_width=20)
    others: dict[str, EncoderConfig] = {"esmc": ESMCConfig(**SMALL), "carp": carp}
    config = replace({**CONFIGS, **others}[family], num_hidden_layers=2)
    model = build(config).to_empty(device="cpu")
    length, sequences, masked = 30, 4, 17
    batch = PackedBatch(torch.full((length * sequences,), 5), CuSeqlens.from_lengths([length] * sequences))
    # Attention written out, whose products are counted on every device.
    monkeypatch.setattr("protea.models.attention.KERNELS", [REFERENCE])
    tokens = length * sequences
    # The embedding of CARP is a product of its vocabulary, once for a pack.
    once = 2 * carp.embedding_width * carp.hidden_size * carp.vocab_size if family == "carp" else 0

    def counted(rows: PackedRows | None) -> float:
        with FlopCounterMode(display=False) as counter:
            model.head(model(batch, rows=rows)[:masked])
        return float(counter.get_total_flops() - once)

    assert counted(None) == pytest.approx(tokens * config.forward_flops(length, masked / tokens))
    # A training step: of the last layer, masked tokens alone, here of three sequences.
    rows = PackedRows.of(np.arange(7, 7 + 4 * masked, 4), batch.cu_seqlens)
    assert 3 * counted(rows) == pytest.approx(tokens * config.training_flops(length, masked / tokens))


def test_flops_by_hand() -> None:
    """ESM-2 650M, a token in a sequence of 1,000: 33 layers of 12 · 1280² weights, two products of 1,000 · 1280."""
    weights = 33 * 12 * 1280**2
    attention = 33 * 2 * 1000 * 1280
    head = 0.15 * (1280**2 + 33 * 1280)
    expected = 3 * 2 * (weights + attention + head)
    config = read_recipe("esm2_650M").config
    assert 3 * config.forward_flops(1000.0, 0.15) == pytest.approx(expected)
    # Training computes queries, keys and values of all tokens in the last layer, and the rest of the masked ones.
    spared = 0.85 * (9 * 1280**2 + 2 * 1000 * 1280)
    assert config.training_flops(1000.0, 0.15) == pytest.approx(expected - 3 * 2 * spared)
    assert expected == pytest.approx(6 * 651e6, rel=0.14)  # six a parameter, attention apart


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_of_state(tmp_path: Path, optimizer: str) -> None:
    told = recipe(optimizer={"name": optimizer})
    ours = trained(told)
    batch = next(loader(told, TrainingStore(make_store(tmp_path), ours.model.alphabet)).batches())
    take_step(ours, told, [batch], 1, 1e-3)
    needs = estimate(architecture(told), told, 50.0)
    parameters = list(ours.model.parameters())
    # A count of steps is a number a parameter.
    moments = sum(each.nbytes for name, each in ours.optimizers.state() if not name.endswith(".step"))
    gradients = sum(each.grad.nbytes for each in parameters if each.grad is not None)
    weights = sum(each.nbytes for each in parameters)
    assert needs.state == weights + gradients + moments
    assert needs.copies == weights + moments
    mixed = estimate(architecture(told), recipe(optimizer={"name": optimizer}, run={"precision": "bf16-mixed"}), 50.0)
    assert mixed.state == needs.state + weights // 2


def _kept(ours: Trainable, batch: TrainingBatch, *, all_rows: bool = False) -> int:
    """Bytes of the storages that a forward pass keeps for the backward one, weights apart."""
    weights = {each.untyped_storage().data_ptr() for each in ours.model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), ours.precision.autocast():
        hidden = ours.model(batch.inputs, rows=None if all_rows else batch.wanted)
        loss = masked_loss(ours.model, hidden[batch.rows] if all_rows else hidden, batch)
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(
    ("family", "dropout", "precision"),
    mostly_long(
        [
            (family, dropout, precision)
            for family, dropout in (("esm2", 0.0), ("esm2", 0.1), ("esm1nv", 0.1))
            for precision in ("float32", "bf16-mixed", "fp16-mixed")
        ],
        quick={0, 7},
    ),
)
def test_bytes_of_activations(tmp_path: Path, family: str, dropout: float, precision: str) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
    both = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    alphabet = "esm-1nv" if family == "esm1nv" else "esm"
    found, wholes = {}, []
    for recompute in (False, True):
        told = recipe(
            family,
            model=sizes | both,
            data={"max_tokens": 250},
            batch={"tokens": 2048, "pack": 2048},
            run={"precision": precision, "recompute": recompute},
        )
        ours = trained(told)
        store = TrainingStore(make_store(tmp_path / str(recompute), high=220, alphabet=alphabet), ours.model.alphabet)
        packs = loader(told, store)
        batch = next(packs.batches())
        share = len(batch.targets) / told.batch.pack
        needs = estimate(architecture(told), told, mean_length(packs.sampler))
        found[recompute] = _kept(ours, batch), needs.activations * share
        wholes.append(_kept(ours, batch, all_rows=True))
    kept, expected = found[False]
    assert expected == pytest.approx(kept, rel=0.25)
    # Of a layer that is computed again, everything is there at once.
    inputs, expected = found[True]
    assert inputs < kept / 3
    assert expected == pytest.approx(inputs + wholes[0] / 4, rel=0.25)


def test_a_model_that_cannot_fit(tmp_path: Path) -> None:
    """ESM-2 15B, and so much deeper that no machine holds it."""
    store = make_store(tmp_path / "data", sequences=20)
    told = read_recipe(
        "esm2_15B",
        [f"data.store={store}", "model.num_hidden_layers=1000", "run.device=cpu", "validation.every=null"],
    )
    with pytest.raises(TrainingError, match=r"the model alone needs [\d,.]+ GB"):
        pretrain(told, tmp_path / "run", TrainingProgress())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_packs_that_cannot_fit() -> None:
    told = read_recipe("esm2_8M", [f"batch.pack={1 << 40}", f"batch.tokens={1 << 40}"])
    with pytest.raises(TrainingError, match=r"batch\.pack.* run\.recompute=true"):
        check_memory(estimate(architecture(told), told, 300.0), CPU)
    small = read_recipe("esm2_8M", ["batch.pack=1024"])
    check_memory(estimate(architecture(small), small, 300.0), CPU)
