"""``protea plan pretrain``: the layouts of a recipe on GPUs that need not be here, and which of them to choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from protea.checkpoints.hub import published
from protea.errors import TrainingError, UsageError
from protea.models.encoder import Encoder
from protea.models.registry import build
from protea.plan.hardware import GPUS, PER_NODE, Cluster
from protea.plan.rates import gpu_rate
from protea.text import bytes_text, counted
from protea.train.division import Division, named_layout, nearest_layout, plan_layout, product
from protea.train.estimate import Costs, RunTime, estimate, run_time
from protea.train.model import architecture
from protea.train.parallel import STAGES
from protea.train.pipeline import stages_of
from protea.train.recipe import Recipe
from protea.train.step_times import step_time
from protea.train.tensor_parallel import check_tensor_parallel

_TIE: Final = 1.02
"""A layout that takes at most this factor longer than the fastest is preferred if it is simpler."""

_WORTH_TELLING: Final = 0.05
_MOST_GPUS: Final = 4096
_MEGATRON_STATE: Final = 18
_MEGATRON_ACTIVATIONS: Final = 34
"""Bytes for a parameter, and for a token, layer and column of its width, by Megatron's formula."""

_CARD: Final = (
    ("650M", "esm2nv_650M", 16, 1),
    ("3B", "esm2nv_3B", 4, 4),
    ("15B", "esm2nv_15B", 2, 8),
    ("20B", "esm2nv_20B", 1, 8),
)
"""The second model card's table: name, architecture, sequences of a micro-batch, stages of the pipeline."""

_CARD_LENGTH: Final = 1024
_CARD_ACCUMULATION: Final = 32


@dataclass(frozen=True)
class LayoutPlan:
    """A recipe in one layout: what a process needs, and how long the run takes."""

    recipe: Recipe
    layout: Division
    costs: Costs
    time: RunTime
    fits: bool

    def shown(self) -> dict[str, Any]:
        """The plan as plain values."""
        step = self.time.step
        return {
            "layout": {**self.layout._asdict(), "recompute": self.recipe.run.recompute, "pack": self.recipe.batch.pack},
            "memory": {**self.costs.parts, "activations": self.costs.activations, "total": self.costs.memory},
            "main_memory_for_checkpoints": self.costs.copies,
            "fits": self.fits,
            "tokens_per_second_and_gpu": round(self.time.tokens_per_second, 1),
            "utilisation": round(self.time.utilisation, 4),
            "step_seconds": {**{name: round(value, 6) for name, value in step._asdict().items()}, "total": step.total},
            "days": self.time.seconds / 86400,
            "gpu_hours": self.time.seconds / 3600 * self.layout.processes,
        }


class PretrainPlan(NamedTuple):
    """The layouts of a recipe, fastest first, those that fit before the others; the first is the advised one."""

    cluster: Cluster
    layouts: list[LayoutPlan]
    reason: str
    alone: int  # bytes that a pack in one process takes
    megatron: int  # the same by Megatron's formula

    @property
    def advised(self) -> LayoutPlan:
        """The layout to choose."""
        return self.layouts[0]


class CardRow(NamedTuple):
    """A row of the second card's table: TFLOP/s of each GPU."""

    model: str
    gpu: str
    gpus: int
    sequences: int
    pipeline: int
    tflops: float
    label: str


def plan_pretrain(recipe: Recipe, cluster: Cluster) -> PretrainPlan:
    """The layouts that a recipe may have on a cluster.

    If the recipe names a layout, it is the only one. If none fits, layers are computed again, then packs get smaller.
    ``TrainingError`` names the fewest GPUs that are enough, if even that does not fit.
    """
    recipe = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"precision": "bf16-mixed", "device": "cuda"})}
    )
    model = architecture(recipe)
    plans: list[LayoutPlan] = []
    for variant, change in _variants(recipe):
        plans = _planned(model, variant, cluster)
        if plans and plans[0].fits:
            alone = estimate(model, variant, variant.data.max_tokens).memory
            reason = "; ".join(filter(None, (_reason(plans, change), _larger_packs(model, plans[0], cluster))))
            return PretrainPlan(cluster, plans, reason, alone, _megatron(model, variant))
    if not plans:
        # Says which numbers would do.
        plan_layout(recipe, cluster.gpus)
    raise TrainingError(_too_large(model, recipe, cluster, plans))


def days_by_gpus(recipe: Recipe, cluster: Cluster) -> list[tuple[int, float]]:
    """Days to train by the number of GPUs, in powers of two around those of a cluster."""
    found = []
    counts = sorted({1 << power for power in range(11)} | {cluster.gpus})
    for count in counts:
        if count > max(16, 8 * cluster.gpus):
            break
        try:
            plan = plan_pretrain(recipe, Cluster(cluster.gpu, count, -(-count // PER_NODE)))
        except (UsageError, TrainingError):
            continue
        found.append((count, plan.advised.time.seconds / 86400))
    return found


def card_table() -> Iterator[CardRow]:
    """TFLOP/s of each GPU for 8 and 64 of them, in the second model card's settings."""
    for name, architecture_name, sequences, pipeline in _CARD:
        model = build(published(architecture_name).config)
        config = model.config
        weights = 4 * sum(parameter.numel() for parameter in model.layers.parameters())
        flops = 3 * config.forward_flops(_CARD_LENGTH, 1.0)
        for gpu in ("A100", "H100"):
            for count in (8, 64):
                cluster = Cluster(GPUS[gpu], count, count // PER_NODE)
                layout = Division(replicate=count // pipeline, pipeline=pipeline)
                tokens = sequences * _CARD_LENGTH
                rate = gpu_rate(config, cluster.gpu, _CARD_LENGTH, tokens)
                packs = _CARD_ACCUMULATION * layout.data
                step = step_time(rate, config, layout, cluster, packs=packs, tokens=tokens, weights=weights)
                tflops = flops * packs * tokens / step.total / count / 1e12
                yield CardRow(name, gpu, count, sequences, pipeline, tflops, rate.label)


def _variants(recipe: Recipe) -> Iterator[tuple[Recipe, str]]:
    """The recipe, and what it may become if it does not fit, with the change in words."""
    yield recipe, ""
    smaller = recipe.model_copy(update={"run": recipe.run.model_copy(update={"recompute": True})})
    if not recipe.run.recompute:
        yield smaller, "run.recompute=true"
    pack = recipe.batch.pack // 2
    while pack >= recipe.data.max_tokens:
        batch = smaller.batch.model_copy(update={"pack": pack})
        yield smaller.model_copy(update={"batch": batch}), f"run.recompute=true batch.pack={pack}"
        pack //= 2


def _planned(model: Encoder, recipe: Recipe, cluster: Cluster) -> list[LayoutPlan]:
    plans = []
    for layout in _layouts(model, recipe, cluster.gpus):
        told = recipe.model_copy(
            update={"parallel": recipe.parallel.model_copy(update=layout._asdict())},
        )
        costs = estimate(model, told, recipe.data.max_tokens, layout)
        time = run_time(model, told, costs, cluster)
        plans.append(LayoutPlan(told, layout, costs, time, costs.memory <= cluster.gpu.usable))
    plans.sort(key=lambda plan: (not plan.fits, plan.time.seconds))
    if plans and plans[0].fits:
        limit = plans[0].time.seconds * _TIE
        best = min((plan for plan in plans if plan.fits and plan.time.seconds <= limit), key=_kinds)
        plans.remove(best)
        plans.insert(0, best)
    return plans


def _kinds(plan: LayoutPlan) -> tuple[int, float]:
    """How complicated a layout is, and its time."""
    ranks = {"replicate": 0, "shard": 1, "tensor": 3, "pipeline": 3}
    weight = sum(ranks[name] for name, number in plan.layout._asdict().items() if number > 1)
    return weight, plan.time.seconds


def _layouts(model: Encoder, recipe: Recipe, gpus: int) -> Iterator[Division]:
    """The layouts that a recipe allows."""
    if named_layout(recipe) != Division():
        made = nearest_layout(recipe, gpus).processes
        if made != gpus:
            raise UsageError(
                f"{product(recipe)} makes {made} processes, one for each GPU, but --gpus names {gpus}; change parallel "
                f"or --gpus"
            )
        yield plan_layout(recipe, gpus)
        return
    for tensor in (1, 2, 4, 8):
        for pipeline in (1, 2, 4, 8, 16):
            for shard in _divisors(gpus, tensor * pipeline):
                layout = Division(gpus // (tensor * pipeline * shard), shard, tensor, pipeline)
                told = recipe.model_copy(
                    update={"parallel": recipe.parallel.model_copy(update=layout._asdict())},
                )
                try:
                    yield plan_layout(told, gpus)
                    if pipeline > 1:
                        stages_of(model, pipeline, STAGES[recipe.parallel.schedule])
                    if tensor > 1:
                        check_tensor_parallel(model, tensor)
                except UsageError:
                    continue


def _divisors(gpus: int, others: int) -> Iterator[int]:
    rest = gpus // others
    if gpus % others == 0:
        yield from (number for number in range(1, rest + 1) if rest % number == 0)


def _reason(plans: list[LayoutPlan], change: str) -> str:
    advised = plans[0]
    alone = next((plan for plan in plans if plan.layout.data == plan.layout.processes and plan.layout.shard == 1), None)
    words = []
    if change:
        words.append(f"without {change} no layout fits")
    if advised is alone or advised.layout.processes == 1:
        words.append("every GPU holds the whole model, and only gradients are exchanged")
    elif alone is not None and not alone.fits:
        words.append(f"a whole model needs {bytes_text(alone.costs.memory)} a GPU to train, which is too much")
    elif alone is not None:
        words.append(f"replicas alone would take {alone.time.seconds / advised.time.seconds - 1:.0%} longer")
    slower = [plan for plan in plans[1:] if plan.fits]
    if slower:
        words.append(f"the next, {slower[0].layout}, takes {slower[0].time.seconds / advised.time.seconds - 1:+.1%}")
    return "; ".join(words)


def _larger_packs(model: Encoder, advised: LayoutPlan, cluster: Cluster) -> str:
    """What larger packs would gain, if they fit and gain much."""
    recipe, found = advised.recipe, ""
    for factor in (2, 4):
        batch = recipe.batch.model_copy(update={"pack": factor * recipe.batch.pack})
        told = recipe.model_copy(update={"batch": batch})
        if batch.tokens < batch.pack or batch.packs % advised.layout.data:
            break
        costs = estimate(model, told, told.data.max_tokens, advised.layout)
        faster = run_time(model, told, costs, cluster).tokens_per_second / advised.time.tokens_per_second - 1
        if costs.memory <= cluster.gpu.usable and faster > _WORTH_TELLING:
            found = f"batch.pack={batch.pack} would fit and be {faster:.0%} faster"
    return found


def _megatron(model: Encoder, recipe: Recipe) -> int:
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    columns = config.num_hidden_layers * config.hidden_size
    return _MEGATRON_STATE * count + _MEGATRON_ACTIVATIONS * recipe.batch.pack * columns


def _too_large(model: Encoder, recipe: Recipe, cluster: Cluster, plans: list[LayoutPlan]) -> str:
    least = min(plans, key=lambda plan: plan.costs.memory)
    message = (
        f"--gpus {cluster}: no layout fits: {least.layout} with run.recompute=true and packs of "
        f"{least.recipe.batch.pack:,} tokens still needs {bytes_text(least.costs.memory)}; each GPU has "
        f"{bytes_text(round(cluster.gpu.usable))}"
    )
    *_, (smallest, change) = _variants(recipe)
    smallest = smallest.model_copy(update={"parallel": Recipe(model=recipe.model, init=recipe.init).parallel})
    count = 1
    while count <= _MOST_GPUS:
        wider = Cluster(cluster.gpu, count, -(-count // PER_NODE))
        found = [plan for plan in _planned(model, smallest, wider) if plan.fits]
        if found:
            return f"{message}; the smallest that fits is {counted(count, 'GPU')}: {found[0].layout}, {change}"
        count *= 2
    return f"{message}; no number of such GPUs is enough: name GPUs with more memory"
