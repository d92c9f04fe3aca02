"""``protea plan embed`` and ``finetune``: passes of a model over sequences, on GPUs or CPUs that need not be here.

A forward pass is a third of a training step. A head on a frozen model needs one forward pass over the data; LoRA needs
forward passes and the half of the backward passes that reaches the adapters; training all weights needs whole steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import architecture, find_local, published
from protea.checkpoints.summary import parameter_count
from protea.errors import TrainingError, UsageError
from protea.models.encoder import Encoder
from protea.plan.hardware import GPUS, Cluster
from protea.plan.rates import Rate, cpu_rate, gpu_rate
from protea.text import bytes_text

if TYPE_CHECKING:
    from protea.plan.measure import EmbeddingRate

Method = Literal["frozen", "lora", "full"]

MEAN_LENGTH: Final = 345
"""Mean length of the sequences of UniRef50, in residues, about; docs/many-machines.md says from where."""

_PASSES: Final = {"frozen": 1 / 3, "lora": 2 / 3, "full": 1.0}
"""Time of each method by epoch, in units of training steps over all data; a frozen model computes only once."""

_SHARDS: Final = 4
"""Shards for each worker, so that no worker waits long for the slowest."""

_PACK: Final = 16_384
_CPU_PACK: Final = 4_096


@dataclass(frozen=True)
class PassPlan:
    """Passes over some residues.

    ``memory`` is of each device, by part; ``disk`` is by output; ``rate`` is of a whole worker: a GPU, or all cores.
    """

    model: str
    residues: float
    sequences: float
    workers: int
    where: str
    rate: float  # residues per second of each worker
    label: str
    source: str
    seconds: float
    memory: dict[str, int]
    available: float | None
    disk: dict[str, float]
    utilisation: float | None
    advice: str

    @property
    def fits(self) -> bool | None:
        """Whether the memory suffices; ``None`` if it is unknown."""
        return None if self.available is None else sum(self.memory.values()) <= self.available

    def shown(self) -> dict[str, Any]:
        """The plan as plain values."""
        told = {name: getattr(self, name) for name in ("model", "where", "residues", "sequences", "workers")}
        return told | {
            "residues_per_second_and_worker": self.rate,
            "label": self.label,
            "source": self.source,
            "seconds": self.seconds,
            "days": self.seconds / 86400,
            "worker_hours": self.seconds * self.workers / 3600,
            "utilisation": self.utilisation,
            "memory": {**self.memory, "total": sum(self.memory.values())},
            "fits": self.fits,
            "disk": self.disk,
            "advice": self.advice,
        }


def model_of(name: str) -> Encoder:
    """A model without its weights, by a name that ``protea embed`` takes; downloads nothing for a published name."""
    path = find_local(name)
    if path is None:
        return architecture(published(name))
    with open_checkpoint(path) as checkpoint:
        return checkpoint.model


def plan_embed(
    name: str, residues: float, where: Cluster | int, *, length: float = MEAN_LENGTH, fast: bool = True
) -> PassPlan:
    """What embedding takes on GPUs, or on a number of cores; ``fast`` is ``--fast``, which GPUs are planned with.

    ``TrainingError`` names the smallest GPU on which the model fits, if it does not fit.
    """
    model = model_of(name)
    config = model.config
    sequences = residues / length
    tokens = model.alphabet.frame.tokens(round(length)) / length  # for each residue
    pack = _PACK if isinstance(where, Cluster) else _CPU_PACK
    narrow = fast or isinstance(where, Cluster)
    itemsize = 2 if narrow else 4
    memory = {
        "weights": parameter_count(model) * itemsize,
        "a pack of tokens": pack * config.inference_values * itemsize,
    }
    disk = {
        "-o (one vector a sequence)": 4.0 * sequences * config.hidden_size,
        "-r (one vector a residue)": 4.0 * residues * config.hidden_size,
        "-r, in float16": 2.0 * residues * config.hidden_size,
    }
    if isinstance(where, Cluster):
        rate = gpu_rate(config, where.gpu, length, pack).times(1 / 3)
        workers, available = where.gpus, where.gpu.usable
        each = pack / rate.seconds(pack) / tokens
        utilisation = each * tokens * config.forward_flops(length, 0.0) / where.gpu.flops
        if sum(memory.values()) > available:
            raise TrainingError(_no_room(name, memory, where))
    else:
        rate = cpu_rate(config, where, length, fast=fast)
        workers, available, utilisation = 1, None, None
        each = 1 / rate.token / tokens
    count = workers * _SHARDS
    advice = (
        f"`protea embed --shard i/{count}`: {_SHARDS} shards for each worker, so that none waits long for the slowest"
    )
    if not isinstance(where, Cluster):
        advice = "one process with all threads, or one of `protea embed --shard i/N` for each machine"
    return PassPlan(
        model=name,
        residues=residues,
        sequences=sequences,
        workers=workers,
        where=str(where) if isinstance(where, Cluster) else f"{where} cores",
        rate=each,
        label=rate.label,
        source=_of_inference(rate),
        seconds=residues / each / workers,
        memory=memory,
        available=available,
        disk=disk,
        utilisation=utilisation,
        advice=advice,
    )


def plan_finetune(
    name: str,
    residues: float,
    where: Cluster | int,
    *,
    method: Method = "full",
    epochs: float = 20.0,
    length: float = MEAN_LENGTH,
    recompute: bool = False,
) -> PassPlan:
    """What training a predictor on labelled sequences takes; ``residues`` are those of one epoch."""
    if method not in _PASSES:
        raise UsageError(f"--method {method!r}: use {', '.join(_PASSES)}")
    if isinstance(where, Cluster) and where.gpus > 1:
        gpu = where.gpu.name
        raise UsageError(f"--gpus {where.gpus}x{gpu}: `protea finetune` computes on one GPU; plan with --gpus {gpu}")
    plan = plan_embed(name, residues, where, length=length)
    model = model_of(name)
    count, config = parameter_count(model), model.config
    on_cpu = not isinstance(where, Cluster)
    pack = _CPU_PACK
    memory = plan.memory
    if method != "frozen":
        kept = config.activation_bytes(length, mixed=True, recompute=recompute, on_cpu=on_cpu)
        state = {"weights": 4 * count, "weights in 16 bits": 2 * count, "activations": pack * kept}
        memory = state | ({"gradients and moments": 12 * count} if method == "full" else {})
    # A frozen model computes all vectors once, whatever the number of epochs.
    steps = _PASSES[method] * (1.0 if method == "frozen" else epochs) * (4 / 3 if recompute else 1.0)
    each = plan.rate / 3 / _PASSES[method] / (4 / 3 if recompute else 1.0)
    planned = replace(
        plan,
        workers=1,
        rate=each,
        seconds=3 * steps * residues / plan.rate,
        memory=memory,
        disk={"the predictor": 4.0 * count if method == "full" else 1e6},
        utilisation=None,
        advice="protea finetune computes on one device" + ("" if method != "frozen" else "; its vectors are kept"),
    )
    if planned.fits is False:
        assert isinstance(where, Cluster)
        raise TrainingError(_no_room(name, memory, where))
    return planned


def measured(plan: PassPlan, found: EmbeddingRate) -> PassPlan:
    """The plan at a rate that was measured on this machine."""
    return replace(
        plan,
        where="this machine",
        workers=1,
        rate=found.residues,
        label="measured",
        source=f"on this machine, just now; the model loads in {found.loading:.1f} s",
        seconds=found.loading + plan.residues / found.residues,
        available=None,
        utilisation=None,
        advice="one process with all threads, or one of `protea embed --shard i/N` for each machine",
    )


def _of_inference(rate: Rate) -> str:
    third = "" if rate.launch == 0 else "a third of a training step by "
    return third + rate.source


def _no_room(name: str, memory: dict[str, int], cluster: Cluster) -> str:
    total = sum(memory.values())
    larger = sorted((gpu for gpu in GPUS.values() if gpu.usable >= total), key=lambda gpu: gpu.memory)
    fix = f"the smallest known GPU with enough is the {larger[0].name}" if larger else "no known GPU has enough"
    return (
        f"-m {name}: needs {bytes_text(total)} on each GPU, of which the {cluster.gpu.name} has "
        f"{bytes_text(round(cluster.gpu.usable))}; {fix}"
    )
