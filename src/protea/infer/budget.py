"""How much to compute at a time, from the memory that is free."""

from __future__ import annotations

from typing import Final

import torch

from protea.device import available_memory
from protea.models.encoder import Encoder

_CPU_BUDGET: Final = 4096
"""Tokens a pack holds on a CPU: more gain nothing, and memory grows with them."""

_ACCELERATOR_BUDGET: Final = 65536
"""Tokens a pack holds at most on an accelerator."""

_SHARED_BUDGET: Final = (_CPU_BUDGET, 16384)
"""Tokens a pack holds where machines of different memory, on CPUs or GPUs, must make the same packs."""

_MEMORY_SHARE: Final = 4
"""A pack takes at most one part in four of the memory that is free."""


def default_budget(model: Encoder, *, whatever_is_free: bool = False) -> int:
    """Tokens a pack should hold, from the memory that is free on the model's device.

    On a CPU larger packs gain nothing beyond a few thousand tokens; an accelerator wants as many as fit.

    Args:
        model: on its device.
        whatever_is_free: the same number on every machine, as processes need that share their work by packs.
    """
    device = model.device
    if whatever_is_free:
        return _SHARED_BUDGET[device.type == "cuda"]
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], _ACCELERATOR_BUDGET
    else:
        free, most = available_memory(), _CPU_BUDGET
    fits = free // (_MEMORY_SHARE * model.config.inference_values * model.compute_dtype.itemsize)
    return max(1024, min(most, fits // 1024 * 1024))
