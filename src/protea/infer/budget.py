"""How many tokens to compute at a time, from the free memory."""

from __future__ import annotations

from typing import Final

import torch

from protea.device import available_memory
from protea.models.encoder import Encoder

# Most tokens of a pack. On CPUs, larger packs take more memory and save no time.
_CPU_BUDGET: Final = 4096
_GPU_BUDGET: Final = 65536
_SHARED_GPU_BUDGET: Final = 16384

_MEMORY_SHARE: Final = 4  # a pack takes at most a quarter of the free memory


def default_budget(model: Encoder, *, whatever_is_free: bool = False) -> int:
    """Tokens that a pack should hold, from the free memory of the model's device.

    With ``whatever_is_free`` they do not depend on the free memory, so that several machines make the same packs.
    """
    device = model.device
    on_gpu = device.type == "cuda"
    if whatever_is_free:
        return _SHARED_GPU_BUDGET if on_gpu else _CPU_BUDGET
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    fits = free // (_MEMORY_SHARE * model.config.inference_values * model.compute_dtype.itemsize)
    return max(1024, min(_GPU_BUDGET if on_gpu else _CPU_BUDGET, fits // 1024 * 1024))
