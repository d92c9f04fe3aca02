"""The same masked residues through another implementation: transformers, or Meta's package."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import torch

from protea.checkpoints import fair_esm, hf
from protea.checkpoints.convert import convert
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.peers import Run, has_peer, load_peer
from protea.errors import MissingExtraError, UsageError
from protea.infer.runner import FloatArray
from protea.models.encoder import Encoder
from protea.score.perplexity import Masked

TWINS: Final = {"transformers": (hf.NAME, "transformers"), "fair-esm": (fair_esm.NAME, "esm")}
"""By the name users type: the format that the other library reads, and its module."""


def check_twin(name: str, model: Encoder | None = None) -> None:
    """See that another library is known and installed, and has a model's family where that is known.

    Raises:
        UsageError: no such library, or it has no such model.
        MissingExtraError: it is not installed.
    """
    if name not in TWINS:
        raise UsageError(f"--against {name}: unknown; use {' or '.join(TWINS)}")
    if find_spec(TWINS[name][1]) is None:
        raise MissingExtraError(f"--against {name} needs it installed: pip install {name}")
    if model is not None and not has_peer(TWINS[name][0], type(model)):
        raise UsageError(f"--against {name}: it has no {model.config.family}")


def load_twin(name: str, path: Path) -> Run:
    """A checkpoint of any format as another library's model, float32.

    Args:
        name: of the library, one of ``TWINS``.
        path: of the checkpoint.

    Raises:
        UsageError: no such library, or it has no such model.
        MissingExtraError: it is not installed.
        CheckpointError: the checkpoint is damaged, or the library does not take it.
    """
    check_twin(name)
    kind = TWINS[name][0]
    with tempfile.TemporaryDirectory() as folder:
        with open_checkpoint(path) as checkpoint:
            model = checkpoint.model
        check_twin(name, model)
        # Meta's loader goes by names, and asks only those of ESM-1v for no regression.
        file = f"{type(model).stored[kind].prefix or 'esm1v'}_twin.pt"
        copy = Path(folder) / (file if kind == fair_esm.NAME else "twin")
        convert(path, copy, kind, dtype=torch.float32, peers=False)
        with open_checkpoint(copy) as written:
            return load_peer(kind, copy, written)


def losses(run: Run, masked: Iterable[Masked]) -> Iterator[FloatArray]:
    """Negative log-probability ``[P]`` of the masked tokens of each sequence, in nats."""
    for one in masked:
        logits = run(torch.from_numpy(one.tokens)).float().log_softmax(-1).numpy()
        yield -logits[one.places, one.truth.astype(np.int64)]
