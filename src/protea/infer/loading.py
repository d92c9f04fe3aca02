"""A model to compute with: found by its name, read, and made as fast as its numbers allow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import protea
from protea import bundled
from protea.checkpoints.formats import files_of, open_checkpoint
from protea.checkpoints.hub import locate, short_name
from protea.checkpoints.sidecar import head_record_path
from protea.device import native_bfloat16, resolve_device, resolve_dtype
from protea.disk import sha256
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.transforms.cpu import pack_for_cpu


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from.

    Attributes:
        module: on its device.
        name: what it was loaded by.
        path: the checkpoint.
        files: that its weights are in.
    """

    module: Encoder
    name: str
    path: Path
    files: list[Path]

    @property
    def head_record(self) -> Path:
        """Where the record of its contact head's fitting is, if there is one."""
        return head_record_path(self.path)

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of the weight files by name."""
        return {path.name: sha256(path) for path in self.files}


def load_model(
    model: str | Path = bundled.NAME, *, device: str = "auto", dtype: str = "float32", trainable: bool = False
) -> LoadedModel:
    """Load a model.

    On a CPU its weights are put into the order that the processor multiplies fastest, after which it can be neither
    trained nor changed.

    Args:
        model: a published name, a Hugging Face repository, a checkpoint of any format, or the folder of one.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        trainable: leave the model as it is, to be trained or changed.

    Raises:
        UsageError: the device or type is unknown; UnknownModelError for an unknown name.
        CheckpointError: the files are absent, damaged or do not fit together.
        DeviceError: the device is not there.
    """
    where, kind = resolve_device(device), resolve_dtype(dtype)
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        module = checkpoint.load(dtype=kind, device=where)
        files = files_of(path, checkpoint)
    if any(known.name == short_name(model) and not known.contact_head for known in module.published):
        # Published conversions of such models carry the random head their class was born with.
        module.contact_head = None
    if not trainable:
        pack_for_cpu(module)
    return LoadedModel(module, str(model), path, files)


def computing_dtype(device: str, dtype: str, *, fast: bool) -> str:
    """What to compute in: with ``fast``, bfloat16 where the hardware multiplies it natively.

    Raises:
        UsageError: both a type and ``fast`` were asked for, or the device is unknown.
        DeviceError: the device is not there.
    """
    if fast and dtype != "float32":
        raise UsageError(f"--fast chooses the type itself; leave out --dtype {dtype}")
    return "bfloat16" if fast and native_bfloat16(resolve_device(device)) else dtype


def circumstances(model: LoadedModel) -> dict[str, Any]:
    """What a model's numbers depend on, as plain values for ``OUT.run.yaml``."""
    module = model.module
    on_gpu = module.device.type == "cuda"
    return {
        "version": protea.__version__,
        "torch": str(torch.__version__),
        "files": model.weights_sha256(),
        "computed_in": str(module.compute_dtype).removeprefix("torch."),
        "computed_on": torch.cuda.get_device_name(module.device) if on_gpu else module.device.type,
        "threads": torch.get_num_threads(),
    }
