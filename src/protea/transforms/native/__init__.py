"""Attention for training in bfloat16 on CPUs, in C++, compiled on the machine that runs it.

PyTorch's attention gains nothing from a CPU's bfloat16 instructions. This kernel uses them; it needs a C++ compiler and
a processor with AVX-512 BF16. After ``enable``, ``protea.models.attention`` picks it for calls that need gradients.
"""

from __future__ import annotations

from protea.models.attention import add_kernel, remove_kernel
from protea.transforms.native.functional import NATIVE, parallel
from protea.transforms.native.library import UnavailableError, compiled, load, use

__all__ = ["compiled", "disable", "enable"]


def enable() -> str | None:
    """Compile the kernel or load it from the user's cache, and use it; returns the reason if that is impossible."""
    try:
        loaded = load()
        parallel()  # fails here instead of at the first step
    except UnavailableError as error:
        return str(error)
    except (OSError, AttributeError) as error:
        return f"PyTorch's own OpenMP was not found: {error}"
    use(loaded)
    add_kernel(NATIVE)
    return None


def disable() -> None:
    """Undo ``enable``."""
    remove_kernel(NATIVE)
    use(None)
