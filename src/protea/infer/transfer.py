"""Copies from an accelerator to main memory, while the accelerator computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor


def copied(values: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
    """Tensors in page-locked memory, which a separate stream fills, and a function that waits for the end."""
    device = values[0].device
    flat = torch.cat([value.reshape(-1) for value in values])
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        host.copy_(flat, non_blocking=True)
        flat.record_stream(stream)
        event = stream.record_event()
    parts = torch.split(host, [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)], event.synchronize


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
