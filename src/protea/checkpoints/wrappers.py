"""Names that wrappers put into the keys of a model's tensors, taken out again, with a note."""

from __future__ import annotations

import re
import warnings
from typing import Final

from protea.checkpoints.tensors import Tensors
from protea.errors import CheckpointError, ProteaWarning

_WRAPPER: Final = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What ``torch.compile``, FSDP and PyTorch's recomputation put anywhere into a key."""


def unwrap(tensors: Tensors, words: str, own: str = "") -> str:
    """Remove the names of wrappers from all keys, and return the beginning that was removed.

    Other wrappers (DataParallel, PEFT, a Lightning module) add the beginning of a key. Everything before the key of the
    word embeddings is such a beginning; tensors whose keys do not have it are outside the model.

    ``words`` ends that key in the format, and ``own`` is a pattern of what the format itself may have before it.
    Several encoders in one file are a ``CheckpointError``.
    """
    removed = sorted({name for key in tensors for name in _WRAPPER.findall(key)})
    tensors.rename(lambda key: _WRAPPER.sub("", key))
    embeddings = re.compile(rf"((?:.*?\.)??)(?:{own}){re.escape(words)}")
    starts = sorted({match[1] for key in tensors if (match := embeddings.fullmatch(key))})
    if len(starts) > 1:
        raise CheckpointError(
            f"{tensors.paths[0]}: holds several models, whose tensors begin with {', '.join(map(repr, starts))}; save "
            "one of them alone"
        )
    start = starts[0] if starts else ""
    if start:
        tensors.outside = frozenset(key for key in tensors if not key.startswith(start))
        tensors.rename(lambda key: key.removeprefix(start))
        removed.insert(0, start)
    if removed:
        message = f"{tensors.paths[0]}: removed {' and '.join(map(repr, removed))} from the names of the tensors"
        warnings.warn(message, ProteaWarning, stacklevel=2)
    return start
