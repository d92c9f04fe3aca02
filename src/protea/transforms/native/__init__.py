"""Attention for training on CPUs, in C++, compiled where it runs; off until asked for.

PyTorch's attention gains nothing from a CPU's bfloat16 instructions and loses in the backward pass. The kernel here
uses them, where there is a C++ compiler and a processor with AVX-512 BF16. Once ``enable`` has succeeded,
``protea.models.attention`` picks it for calls that need gradients.
"""

from __future__ import annotations

from protea.models.attention import add_kernel, remove_kernel
from protea.transforms.native.functional import NATIVE, parallel
from protea.transforms.native.library import UnavailableError, compiled, load, use

__all__ = ["compiled", "disable", "enable"]


def enable() -> str | None:
    """Compile the kernel, unless it lies compiled in the user's cache, and have attention use it for training.

    Returns:
        ``None``, or in one line why the kernel cannot be had here.
    """
    try:
        loaded = load()
        parallel()  # what is wrong with it is found here rather than at the first step
    except UnavailableError as error:
        return str(error)
    except (OSError, AttributeError) as error:
        return f"PyTorch's own OpenMP was not found: {error}"
    use(loaded)
    add_kernel(NATIVE)
    return None


def disable() -> None:
    """Have attention choose as if ``enable`` had never been called."""
    remove_kernel(NATIVE)
    use(None)
