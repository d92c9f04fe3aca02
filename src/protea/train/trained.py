"""A finished model made ready for training: what is applied to it from outside, its optimizers, its precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch

from protea.errors import DeviceError
from protea.models.encoder import Encoder
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.recipe import BatchSettings, Optimizer, RunSettings
from protea.train.watcher import Watcher
from protea.transforms import native
from protea.transforms.compile import compile_layers
from protea.transforms.recompute import recompute_layers

_TYPES: Final = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


class Precision:
    """What products are computed in.

    Args:
        name: ``bf16-mixed``, ``fp16-mixed`` or ``float32``.
        device: where.
        packs: of a step, whose number the first loss scale is in proportion to.

    Attributes:
        dtype: of products.
        scaler: of the loss, for float16, whose gradients would vanish without; switched off otherwise.
    """

    def __init__(self, name: str, device: torch.device, packs: int = 1) -> None:
        self.dtype = _TYPES.get(name, torch.float32)
        self._device = device
        # A pack's gradient is a small share of its step's: it must not vanish before the scale has grown.
        scale = 2.0 ** (16 + (packs - 1).bit_length())
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=self.dtype == torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it, products take and give the narrow type; norms and the residual stream keep float32."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self._device.type, self.dtype)


@dataclass(frozen=True)
class Trained:
    """What is trained, and with what.

    Attributes:
        model: in training mode.
        optimizers: over those of its parameters that require gradients.
        precision: of products.
    """

    model: Encoder
    optimizers: Optimizers
    precision: Precision


def prepare(model: Encoder, run: RunSettings, optimizer: Optimizer, batch: BatchSettings, watcher: Watcher) -> Trained:
    """Make a finished model ready for training, in place; parameters and their names stay.

    Parameters that require gradients are trained. The others stay as they are, and are saved with the rest.

    Args:
        model: on its device, with its weights.
        run: says how it is computed.
        optimizer: says how weights follow gradients.
        batch: says how many packs a step has.
        watcher: told what makes training slower than it could be.

    Raises:
        DeviceError: there is nothing to compile with.
    """
    # A pipeline's stage is cut out here, so that everything below sees only the layers of this process.
    # LoRA goes here, around whole projections.
    # Tensor parallelism goes here: it shards projections, and their adapters with them.
    if run.recompute:
        recompute_layers(model)
    if run.compile:
        try:
            compile_layers(model)
        except DeviceError as error:
            raise DeviceError(f"run.compile: {error}, or run.compile=false") from error
    # FSDP2 goes here: it shards what a layer has become by now.
    narrow = run.precision == "bf16-mixed"
    if narrow and model.device.type == "cpu" and (reason := native.enable()) is not None:
        watcher.note(f"attention runs PyTorch's own kernel, which trains several times slower: {reason}")
    return Trained(
        model.train(),
        Optimizers(parameters_to_train(model), optimizer),
        Precision(run.precision, model.device, batch.packs),
    )
