"""A model for the commands that compute with one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protea.cli.terminal import tell

if TYPE_CHECKING:
    from protea.infer.loading import LoadedModel


def load_to_compute(model: str, *, device: str, dtype: str, fast: bool) -> LoadedModel:
    """Load a model as the options ``--model``, ``--device``, ``--dtype`` and ``--fast`` say.

    The command notes when ``--fast`` gains nothing, because the hardware has no native bfloat16.
    """
    from protea.infer.loading import computing_dtype, load_model

    computed = computing_dtype(device, dtype, fast=fast)
    if fast and computed == "float32":
        tell("--fast: this hardware has no native bfloat16; computing in float32")
    return load_model(model, device=device, dtype=computed)
