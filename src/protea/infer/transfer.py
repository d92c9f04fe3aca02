"""Tensors from an accelerator to main memory, beside its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def copied(values: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
    """Tensors in page-locked memory, copied at once on a stream of their own, and what waits for them."""
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


_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _copy_streams:
        _copy_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _copy_streams[device]
