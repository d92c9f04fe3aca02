"""The time of a training step on many GPUs: computing, gaps of a pipeline, traffic that nothing hides.

For N bytes of a stage's weights in float32, a step moves 2 N through a network for replicas, and within a shard 2 N, or
3 N for each pack if layers are gathered again in the backward pass; if they are gathered in 16 bits, 1.5 N and 2 N.
Traffic runs while others compute: only what takes longer than the backward passes costs time, except for tensor
parallelism, which waits eight times a layer. Processes of one group on a machine use the machine's network together.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from protea.models.family import EncoderConfig
from protea.plan.hardware import Cluster
from protea.plan.rates import Rate, scaling_loss
from protea.train.division import Division

_BACKWARD: Final = 2 / 3
_WAITS: Final = 8
"""Gatherings and scatterings of hidden states in a layer, forward and backward."""


class StepTime(NamedTuple):
    """Seconds of a step: computing, gaps of the pipeline, exposed traffic, and what many machines lose beside it."""

    compute: float
    gaps: float
    traffic: float
    machines: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def step_time(
    rate: Rate,
    config: EncoderConfig,
    layout: Division,
    cluster: Cluster,
    *,
    packs: int,
    tokens: int,
    weights: int,
    narrow: bool = False,
    stages: int = 1,
) -> StepTime:
    """The time of a step of ``packs`` packs of ``tokens`` tokens.

    ``weights`` are the bytes of the layers in float32, ``narrow`` tells if shards gather them in 16 bits; ``stages``
    are the stages of each process of a pipeline.
    """
    gpu, each = cluster.gpu, packs / layout.data
    parts, lines = layout.tensor, layout.pipeline
    pack = rate.seconds(tokens, parts=parts, stages=lines)
    compute, gaps = each * pack, (lines - 1) / stages * pack
    own = weights / (parts * lines)
    again = layout.shard > 1 and not layout.keeps_layers(round(own))
    moved = 0.0
    if layout.shard > 1:
        share, gathered = (layout.shard - 1) / layout.shard, 0.5 if narrow else 1.0
        rounds = each * (2 * gathered + 1) if again else gathered + 1
        moved += own * share * rounds / _wire(cluster, parts, layout.shard)
    if layout.replicate > 1:
        moved += 2 * own / layout.shard / _wire(cluster, parts * layout.shard, layout.replicate)
    traffic = max(0.0, moved - (compute if again else _BACKWARD * pack))
    if parts > 1:
        bytes_of_pack = (
            _WAITS * config.num_hidden_layers / lines * tokens * config.hidden_size * 2 * (parts - 1) / parts
        )
        traffic += each * bytes_of_pack / _wire(cluster, 1, parts)
    if lines > 1:
        sent = 2 * each * 4 * tokens * config.hidden_size / (gpu.link if cluster.nodes == 1 else gpu.network)
        traffic += max(0.0, sent - compute)
    alone = compute + gaps + traffic
    return StepTime(compute, gaps, traffic, alone * (scaling_loss(cluster.nodes) - 1))


def _wire(cluster: Cluster, apart: int, size: int) -> float:
    """Bytes per second that each process of a group sends; its members are ``apart`` numbers from one another."""
    gpu = cluster.gpu
    if apart * size <= cluster.per_node:
        return gpu.link
    return min(gpu.link, gpu.network * max(1, cluster.per_node // apart))
