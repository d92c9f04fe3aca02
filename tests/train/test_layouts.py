"""Every layout of several processes trains as one process does: loss, gradients, weights, packs, dropout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, make_store, recipe
from torch import Tensor
from torch import distributed as dist

from conftest import CONFIGS, disturb
from protea.checkpoints import hf
from protea.data.training_store import TrainingStore
from protea.models.registry import build, initial_value
from protea.progress import SILENT
from protea.train import division, parallel
from protea.train.loop import train_step
from protea.train.model import architecture, prepare
from protea.train.objective import Validation, make_loader
from protea.train.recipe import Recipe
from protea.train.world import World, local
from ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
DIVISIBLE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DEEPER = {"num_hidden_layers": 4}
INTERLEAVED = {"pipeline": 2, "schedule": "interleaved"}
Outcome = dict[str, Any]


def told(store: Path, family: str = "esm2", **sections: Any) -> Recipe:
    """Four packs a step, with dropout, norms and clipping that matter."""
    model = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "intermediate_size": 162}
    values: dict[str, Any] = {
        "model": model | sections.pop("model", {}),
        "data": {"store": str(store), "max_tokens": 40},
        "batch": {"tokens": 4 * 128, "pack": 128},
        "optimizer": {"clip": 0.5},
        "validation": {"every": 1, "tokens": 5 * 128},
    }
    return recipe(family, **{name: values.get(name, {}) | sections.pop(name, {}) for name in {*values, *sections}})


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()
    return full


def complete(
    world: World, tensors: Mapping[str, Any], of: Callable[[Any], Any] = lambda each: each
) -> dict[str, Tensor]:
    """Whole tensors of all stages; those that several have are equal to the bit."""
    own = {name: whole(of(each)) for name, each in tensors.items()}
    found: dict[str, Tensor] = {}
    for other in world.gather(own):
        for name, tensor in other.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


def run(world: World, made: Recipe, layout: parallel.Parallel | None = None) -> Outcome:
    """A few steps; everything that must be equal whatever the layout."""
    layout = layout or parallel.join_layout(world, made, CPU)
    trainable = prepare(architecture(made), made, CPU, SILENT, layout)
    store = TrainingStore(Path(str(made.data.store)), trainable.model.alphabet)
    options = {"fill": layout.fixed, "rank": layout.share, "world": layout.layout.data}
    loader = make_loader(store, "train", made, seed=made.run.seed, workers=0, pin=False, **options)
    batches = loader.batches()
    validation = Validation(store, made, layout)
    found: Outcome = {"packs": [], "positions": [], "loss": [], "norm": [], "validation": []}
    for step in range(1, STEPS + 1):
        packs = [next(batches) for _ in range(made.batch.packs // layout.layout.data)]
        result = train_step(trainable, packs, step=step, rate=1e-3, seed=5, clip=made.optimizer.clip)
        assert result is not None
        if step == 1:
            found["gradients"] = complete(world, trainable.optimizers.parameters, lambda each: each.grad)
        found["loss"].append(result[0].item())
        found["norm"].append(result[1].item())
        found["packs"].append([pack.index.tolist() for pack in packs])
        found["positions"].append(packs[-1].position)
        found["validation"].append(validation.loss(trainable.model, trainable.precision))
    found["weights"] = complete(world, dict(trainable.model.named_parameters()))
    found["moments"] = complete(world, dict(trainable.optimizers.state()))
    found["sharded"] = sum(local(each) is not each for each in trainable.model.parameters())
    return found


def runs(world: World, recipes: list[Recipe], kept: int) -> list[Outcome]:
    division._KEPT = kept
    return [run(world, made) for made in recipes]


def assert_equal(results: list[Outcome], one: Outcome, made: Recipe) -> None:
    copies, first = made.parallel.tensor, results[: len(results) // made.parallel.pipeline]
    exact, ranks = 1e-6 if copies == 1 else 1e-5, len(first) // copies
    # Rounding to bfloat16, as Muon does too, magnifies differences from the first update on.
    rounded = made.optimizer.name == "muon" or made.run.precision == "bf16-mixed"
    later, weights = (1e-3, 1e-2) if rounded else (exact, 10 * exact)
    for step in range(STEPS):
        own, packs = [result["packs"][step] for result in first[::copies]], one["packs"][step]
        # Data rank r of d has packs r, r + d, ...
        assert [own[number % ranks][number // ranks] for number in range(len(packs))] == packs
    for result in results:
        assert result["positions"] == one["positions"]
        for name in ("loss", "norm", "validation"):
            assert result[name] == pytest.approx(one[name], rel=later), name
        for name in ("loss", "norm"):
            assert result[name][0] == pytest.approx(one[name][0], rel=exact), name
        for kind, most in {"gradients": exact, "weights": weights, "moments": 2 * weights}.items():
            assert result[kind].keys() == one[kind].keys()
            for name, expected in one[kind].items():
                # The softmax ignores what all keys have in common: the gradient of their bias is rounding alone, which
                # AdamW magnifies.
                of_keys = "k_proj.bias" in name
                if kind == "gradients" or not of_keys:
                    size = expected.norm().clamp(min=1e-2 if of_keys else 1e-12)
                    difference = (result[kind][name] - expected).norm() / size
                    assert difference < most, (kind, name, difference)
        for name, weight in results[0]["weights"].items():
            assert torch.equal(result["weights"][name], weight), name


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {kind: make_store(folder / kind, sequences=160, valid=25, alphabet=kind) for kind in ("esm", "esm-1nv")}


def alone(made: Recipe) -> Outcome:
    return run(World(), made.model_copy(update={"parallel": recipe().parallel}))


def check(size: int, recipes: list[Recipe], *, kept: int = division._KEPT) -> None:
    for made, *results in zip(recipes, *run_ranks(size, runs, recipes, kept), strict=True):
        assert all(result["sharded"] for result in results)
        assert_equal(results, alone(made), made)


def test_two_processes(stores: dict[str, Path]) -> None:
    esm = stores["esm"]
    recipes = [
        told(esm, parallel={"shard": 2}),
        told(esm, parallel={"replicate": 2}),
        told(esm, "esm1b", run={"recompute": True}),
        told(stores["esm-1nv"], "esm1nv"),
        told(esm, model=DIVISIBLE, parallel={"tensor": 2}),
        told(esm, model=DIVISIBLE, parallel={"pipeline": 2}),
        told(stores["esm-1nv"], "esm1nv", model=DEEPER, parallel=INTERLEAVED, run={"recompute": True}),
        told(esm, optimizer={"name": "muon"}, parallel={"replicate": 2}),
    ]
    check(2, recipes)


def both_ways(world: World, made: Recipe, kept: int) -> tuple[Outcome, Outcome]:
    """With weights that are gathered in the type of the products, and in float32."""
    narrow = runs(world, [made], kept)
    division.Division.gathers_narrow = lambda *_: False  # type: ignore[method-assign]
    return narrow[0], run(world, made)


@pytest.mark.parametrize("kept", [division._KEPT, 0])
def test_products_in_bfloat16(stores: dict[str, Path], kept: int) -> None:
    """What one process rounds is rounded before it is sent; norms and sums are exact."""
    bf16 = {"precision": "bf16-mixed"}
    recipes = [
        told(stores["esm"], run=bf16, parallel={"shard": 2}),
        told(stores["esm-1nv"], "esm1nv", run=bf16 | {"recompute": True}),
    ]
    check(2, recipes, kept=kept)
    for narrow, wide in run_ranks(2, both_ways, recipes[0], kept):
        assert narrow["sharded"] < wide["sharded"]
        for name, gradient in wide["gradients"].items():
            if kept or gradient.ndim > 1:
                assert torch.equal(narrow["gradients"][name], gradient), name
            else:  # summed after the last pack, not after each
                torch.testing.assert_close(narrow["gradients"][name], gradient, rtol=1e-5, atol=1e-8)


def test_four_processes_of_a_large_model(stores: dict[str, Path]) -> None:
    """Whole gradients do not fit: each pack's are divided at once. The matrices do not divide equally."""
    esm, batch = stores["esm"], {"tokens": 8 * 128}
    recipes = [
        told(esm, parallel={"replicate": 2, "shard": 2}, batch=batch),
        told(esm, parallel={"shard": 4}, run={"recompute": True}),
    ]
    check(4, recipes, kept=0)


def test_four_processes_of_several_kinds(stores: dict[str, Path]) -> None:
    esm = stores["esm"]
    recipes = [
        told(esm, model=DEEPER, parallel={"pipeline": 2, "shard": 2}),
        told(esm, model=DIVISIBLE, parallel={"pipeline": 2, "tensor": 2}),
    ]
    check(4, recipes)


@pytest.mark.long
def test_more_of_four_processes(stores: dict[str, Path]) -> None:
    esm, esm1nv = stores["esm"], stores["esm-1nv"]
    recipes = [
        told(esm, "esm1b", model=DIVISIBLE, parallel={"tensor": 2, "shard": 2}),
        told(esm, "esm1b", model=DIVISIBLE, parallel={"tensor": 2, "replicate": 2}, run={"recompute": True}),
        told(esm1nv, "esm1nv", model=DIVISIBLE | {"intermediate_size": 164}, parallel={"tensor": 4}),
        told(esm, "esm1b", model=DEEPER, parallel={"pipeline": 4}),
        told(esm1nv, "esm1nv", model=DEEPER, parallel={**INTERLEAVED, "replicate": 2}),
    ]
    check(4, recipes)


# ---- first weights ----
def held(world: World, recipes: list[Recipe]) -> list[tuple[dict[str, Tensor], int, int]]:
    """The first weights, put together; the bytes of this process's parts, and those of the memory that they take."""
    found = []
    for made in recipes:
        layout = parallel.join_layout(world, made, CPU)
        parameters = dict(prepare(architecture(made), made, CPU, SILENT, layout).model.named_parameters())
        parts = [local(each) for each in parameters.values()]
        taken = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in parts}
        found.append((complete(world, parameters), sum(each.nbytes for each in parts), sum(taken.values())))
    return found


@pytest.mark.parametrize("family", ["esm2", "esm1b"])
def test_first_weights(stores: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Those of one process to the bit, drawn or read; no process makes room for more than its part."""
    model = build(CONFIGS[family])
    state = {name: initial_value(model, name, 0) for name, _ in model.named_parameters()}
    model.load_state_dict(state | model.stored_buffers, assign=True)
    disturb(model)
    hf.save(model, tmp_path / "model")
    recipes = [
        told(stores["esm"], family, model=DIVISIBLE | {"intermediate_size": 166}, parallel={kind: 2})
        for kind in ("shard", "tensor", "pipeline")
    ]
    recipes.append(recipe(family, init=str(tmp_path / "model"), parallel={"shard": 2}))
    for made, *ranks in zip(recipes, *run_ranks(2, held, recipes), strict=True):
        one = prepare(architecture(made), made, CPU, SILENT).model
        size = sum(each.nbytes for each in one.parameters())
        assert sum(part for _, part, _ in ranks) < 1.5 * size
        for weights, part, taken in ranks:
            assert taken < 1.05 * part
            assert weights.keys() == dict(one.named_parameters()).keys()
            for name, weight in one.named_parameters():
                expected = initial_value(one, name, 3) if made.init is None else model.get_parameter(name)
                assert torch.equal(weight, expected), name
                assert torch.equal(weights[name], expected), name


def gathered(world: World, made: Recipe, kept: int) -> list[int]:
    """The bytes that each step gathers from the other processes, beginning with the second."""
    division._KEPT = kept
    layout = parallel.join_layout(world, made, CPU)
    trainable = prepare(architecture(made), made, CPU, SILENT, layout)
    store = TrainingStore(Path(str(made.data.store)), trainable.model.alphabet)
    batches = make_loader(
        store, "train", made, seed=3, workers=0, pin=False, rank=layout.share, world=layout.layout.data
    ).batches()
    # As newer versions of PyTorch call it, and as older ones do.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    received, gather = [], getattr(dist, name)

    def counting(output: Tensor, *arguments: Any, **options: Any) -> Any:
        received[-1] += output.nbytes
        return gather(output, *arguments, **options)

    setattr(dist, name, counting)
    for step in range(1, 4):
        received.append(0)
        packs = [next(batches) for _ in range(made.batch.packs // layout.layout.data)]
        train_step(trainable, packs, step=step, rate=1e-3, seed=5, clip=1.0)
    return received[1:]


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bf16-mixed", 2)])
def test_weights_are_gathered_once_in_a_step(stores: dict[str, Path], precision: str, size: int) -> None:
    """Whatever the number of packs; for the forward and the backward pass of each if they do not fit."""
    made = told(stores["esm"], run={"precision": precision}, model={"intermediate_size": 160})
    layers = architecture(made).layers.parameters()
    whole = size * sum(each.numel() for each in layers if size == 4 or each.ndim > 1)
    for kept, times in ((division._KEPT, 1), (0, 4)):
        for found in run_ranks(2, gathered, made, kept):
            assert found == [whole * times] * 2


class Filled(parallel.Parallel):
    """One process with packs of constant size."""

    fixed = True


@pytest.mark.parametrize("family", ["esm2", "esm1b", "esm1nv"])
def test_filled_packs(stores: dict[str, Path], family: str) -> None:
    """All packs have the same number of tokens; the padding counts nowhere, and no position exceeds the limit."""
    store = stores["esm-1nv" if family == "esm1nv" else "esm"]
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = told(store, family, model=none, parallel={"shard": 1})
    one, filled = run(World(), made), run(World(), made, Filled(World(), division.Division()))
    assert_equal([filled], one, made)
    loaded = TrainingStore(store, made.config.alphabet)
    options = {"seed": 3, "workers": 0, "pin": False}
    plain, full = (make_loader(loaded, "train", made, **options, fill=fill).batches(epochs=1) for fill in (False, True))
    padded = 0
    for short, long in zip(plain, full, strict=True):
        assert long.inputs.input_ids.numel() == long.targets.numel() == 128
        assert (long.tokens, long.filling) == (short.tokens, 128 - short.tokens)
        assert torch.equal(long.lengths, short.lengths)
        assert torch.equal(long.rows, short.rows)
        assert torch.equal(long.inputs.input_ids[: short.tokens], short.inputs.input_ids)
        assert (long.inputs.input_ids[short.tokens :] == loaded.alphabet.pad).all()
        assert long.inputs.cu_seqlens.max_length <= 40
        assert long.inputs.cu_seqlens.host_offsets[-1] == 128
        padded += long.filling > 40
    assert padded


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_layers(stores: dict[str, Path]) -> None:
    """With packs of constant size, so that the compiler sees one shape."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 1}
    made = told(stores["esm"], model=none, run={"compile": True}, parallel={"shard": 2})
    results = [result for (result,) in run_ranks(2, runs, [made], division._KEPT, seconds=1800)]
    plain = made.model_copy(update={"run": made.run.model_copy(update={"compile": False})})
    assert_equal(results, alone(plain), made)
