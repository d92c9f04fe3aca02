"""Load a model to compute with: find it by name, read it, and make it faster without other numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import protea
from protea import bundled
from protea.checkpoints.formats import HEAD_RECORD, companion, open_checkpoint
from protea.checkpoints.hub import locate, short_name
from protea.device import native_bfloat16, resolve_device, resolve_dtype
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.transforms.cpu import pack_for_cpu


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, the name that it was loaded by, its checkpoint and the files of its weights."""

    module: Encoder
    name: str
    path: Path
    files: list[Path]

    @property
    def head_record(self) -> Path:
        """The path of the record of its contact head's fit, if there is one."""
        return companion(self.path, HEAD_RECORD)

    def weights_sha256(self) -> dict[str, str]:
        """SHA-256 of the weight files by name."""
        return {path.name: sha256(path) for path in self.files}

    def circumstances(self) -> dict[str, Any]:
        """What the model's numbers depend on, as plain values for ``OUT.run.yaml``."""
        module = self.module
        on_gpu = module.device.type == "cuda"
        return {
            "version": protea.__version__,
            "torch": str(torch.__version__),
            "files": self.weights_sha256(),
            "computed_in": str(module.compute_dtype).removeprefix("torch."),
            "computed_on": torch.cuda.get_device_name(module.device) if on_gpu else module.device.type,
            "threads": torch.get_num_threads(),
        }


def load_model(
    model: str | Path = bundled.NAME, *, device: str = "auto", dtype: str = "float32", trainable: bool = False
) -> LoadedModel:
    """Load a model by a published name, a Hugging Face repository, or the file or folder of a checkpoint.

    On a CPU, ``pack_for_cpu`` makes it faster, unless ``trainable``.
    """
    where, kind = resolve_device(device), resolve_dtype(dtype)
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        module = checkpoint.load(dtype=kind, device=where)
        files = checkpoint.tensors.paths
    if any(known.name == short_name(model) and not known.contact_head for known in module.published):
        # Published conversions of such models contain a contact head with random weights.
        module.contact_head = None
    if not trainable:
        pack_for_cpu(module)
    return LoadedModel(module, str(model), path, files)


def computing_dtype(device: str, dtype: str, *, fast: bool) -> str:
    """The dtype to compute in: with ``fast``, bfloat16 if the hardware multiplies it natively."""
    if fast and dtype != "float32":
        raise UsageError(f"--fast chooses the type itself; leave out --dtype {dtype}")
    return "bfloat16" if fast and native_bfloat16(resolve_device(device)) else dtype
