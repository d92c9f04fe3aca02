"""Tensors in memory that ends where no process may read: a function that reads further ends the process."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor

needs_guards = pytest.mark.skipif(sys.platform != "linux", reason="pages are guarded on Linux alone")


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy whose last byte is followed by a page that cannot be read or written."""
    size = x.numel() * x.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    nothing_allowed = 0
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, nothing_allowed) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size).view(x.shape)
    return copy.copy_(x.detach())
