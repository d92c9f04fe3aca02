"""Forward hooks on parts of a model, which see padded batches as in fair-esm; hooks that cannot are refused.

Protea's parts compute packed rows ``[N, D]``. A hook gets them padded, with 0 for padding, and what it returns, or
changes in place, is packed again. In and behind the layers fair-esm puts tokens first, elsewhere sequences.

Shapes: B sequences, T tokens of the longest with padding, N tokens that are not padding, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, NoReturn

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from protea.compat.esm.absent import refuse
from protea.compat.esm.padded import PaddedBatch

Hook = Callable[..., Any]

_BEFORE: Final = "register_forward_pre_hook"
_KINDS: Final = (
    *("register_forward_hook", _BEFORE, "register_backward_hook"),
    *("register_full_backward_hook", "register_full_backward_pre_hook"),
)

_batch: ContextVar[PaddedBatch | None] = ContextVar("batch", default=None)


@contextmanager
def of_batch(batch: PaddedBatch | None) -> Iterator[None]:
    """Let hooks see what is computed inside as rows of a batch, or as it is."""
    before = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(before)


def adapt_hooks(model: nn.Module) -> None:
    """Give each part of a model its own ways to register hooks."""
    for name, part in model.named_modules():
        if name in ("", "layers"):  # hooks of the model itself see what fair-esm's see; nothing calls the list
            continue
        first = name.partition(".")[0]
        not_called = first == "contact_head" or name.endswith(".self_attn")
        tokens_first = first in ("layers", "emb_layer_norm_after")
        for kind in _KINDS:
            # Positions are numbered before their embedding is called; fair-esm's embedding gets tokens.
            if not_called or "backward" in kind or (name, kind) == ("embed_positions", _BEFORE):
                vars(part)[kind] = partial(_refuse, kind, name)
            else:
                vars(part)[kind] = partial(_before if kind == _BEFORE else _after, part, tokens_first)


def _refuse(kind: str, name: str, *args: object, **kwargs: object) -> NoReturn:
    refuse(f"model.{name}.{kind}", "hooks")


def _after(
    part: nn.Module, tokens_first: bool, hook: Hook, *, with_kwargs: bool = False, **options: bool
) -> RemovableHandle:
    """Register a forward hook; it gets a layer's output as a pair, as in fair-esm, but with None for the attention."""

    def run(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        batch = _batch.get()
        keywords: list[dict[str, Any]] = [{}] if with_kwargs else []
        if batch is None:
            return hook(module, args, *keywords, output)
        x, is_layer = _wide(batch, output, tokens_first), len(args) > 1
        with of_batch(None):
            result = hook(module, (_wide(batch, args[0], tokens_first),), *keywords, (x, None) if is_layer else x)
        # Also without a result: a hook may have changed its tensor in place.
        return _narrow(batch, x if result is None else result[0] if is_layer else result, tokens_first)

    return nn.Module.register_forward_hook(part, run, **options)


def _before(
    part: nn.Module, tokens_first: bool, hook: Hook, *, with_kwargs: bool = False, **options: bool
) -> RemovableHandle:
    """Register a hook that runs before a part, and may replace its input."""

    def run(module: nn.Module, args: tuple[Any, ...]) -> Any:
        batch = _batch.get()
        x = args[0] if batch is None else _wide(batch, args[0], tokens_first)
        with of_batch(None):
            result = hook(module, (x,), {}) if with_kwargs else hook(module, (x,))
        if with_kwargs and result is not None:
            result = result[0]
        if result is not None:
            x = result[0] if isinstance(result, tuple) else result
        return (x if batch is None else _narrow(batch, x, tokens_first), *args[1:])

    return nn.Module.register_forward_pre_hook(part, run, **options)


def _wide(batch: PaddedBatch, x: Tensor, tokens_first: bool) -> Tensor:
    if x.dim() == 1:  # ids
        return batch.tokens
    padded = batch.padded(x)
    return padded.transpose(0, 1) if tokens_first else padded


def _narrow(batch: PaddedBatch, x: Tensor, tokens_first: bool) -> Tensor:
    return (x.transpose(0, 1) if tokens_first else x)[batch.present]
