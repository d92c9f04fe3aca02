"""A model for the commands that compute with one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protea.cli.terminal import tell

if TYPE_CHECKING:
    from protea.infer.loading import LoadedModel
    from protea.models.encoder import Encoder


def load_to_compute(model: str, *, device: str, dtype: str, fast: bool) -> LoadedModel:
    """A model made ready to compute as fast as its numbers allow, and never again to be trained or changed.

    Args:
        model: as users name it.
        device: likewise.
        dtype: likewise.
        fast: bfloat16 where the hardware multiplies it natively, and a note where it does not.
    """
    from protea.infer.loading import computing_dtype, load_model

    computed = computing_dtype(device, dtype, fast=fast)
    if fast and computed == "float32":
        tell("--fast: this hardware has no native bfloat16; computing in float32")
    return load_model(model, device=device, dtype=computed)


def say_what_fast_gains(model: Encoder, accuracy: str) -> None:
    """Tell, after a float32 run on hardware with native bfloat16, what ``--fast`` would gain.

    Args:
        model: the model that computed.
        accuracy: of the bfloat16 numbers, as measured.
    """
    from protea.device import native_bfloat16

    if model.compute_dtype.itemsize == 4 and native_bfloat16(model.device):
        measured = " (1.3 to 2 times on the CPU it was measured on)" if model.device.type == "cpu" else ""
        tell(f"this hardware computes bfloat16 natively: --fast is faster{measured}, {accuracy}")


def circumstances(model: LoadedModel) -> dict[str, Any]:
    """What a model's numbers depend on, as plain values for ``OUT.run.yaml``."""
    from protea.infer import loading

    return loading.circumstances(model)
