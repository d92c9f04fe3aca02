"""Load a model to compute with: find it by name, read it, and make it faster without other numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

import protea
from protea import bundled
from protea.checkpoints.formats import HEAD_RECORD, companion, open_checkpoint
from protea.checkpoints.hub import locate, short_name
from protea.device import DTYPES, MIXED, QUANTIZED, native_bfloat16, resolve_device
from protea.errors import UsageError, warn
from protea.limits import limit_threads
from protea.models.encoder import Encoder
from protea.output import sha256
from protea.progress import SILENT, Progress
from protea.transforms.cpu import pack_for_cpu
from protea.transforms.mixed import mix, narrow_weights


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

    def weights_sha256(self, progress: Progress = SILENT) -> dict[str, str]:
        """SHA-256 of the weight files by name."""
        return {path.name: sha256(path, progress) for path in self.files}

    def circumstances(self) -> dict[str, Any]:
        """What the model's numbers depend on, as plain values for ``OUT.run.yaml``."""
        module = self.module
        on_gpu = module.device.type == "cuda"
        return {
            "version": protea.__version__,
            "torch": str(torch.__version__),
            "files": self.weights_sha256(),
            "computed_in": module.precision,
            "computed_on": torch.cuda.get_device_name(module.device) if on_gpu else module.device.type,
            "threads": torch.get_num_threads(),
        }


def unseen() -> AbstractContextManager[Progress]:
    """Show nothing."""
    return nullcontext(SILENT)


@dataclass(frozen=True)
class ModelLoader:
    """Loads models by name, on one device and to compute in one type; ``showing`` shows how far it is."""

    device: str = "auto"
    dtype: str = "float32"
    showing: Callable[[], AbstractContextManager[Progress]] = unseen

    def __call__(self, model: str) -> LoadedModel:
        """Load a model; see ``load_model``."""
        with self.showing() as progress:
            return load_model(model, device=self.device, dtype=self.dtype, progress=progress)

    def identities(self, models: Iterable[str]) -> dict[str, Any]:
        """The part of ``circumstances`` that the same command repeats, of each model by name; loads no weights."""
        with self.showing() as progress:
            return {model: {"files": stored_weights(model, progress), "computed_in": self.dtype} for model in models}


IN_FLOAT32: Final = ModelLoader()


def stored_weights(model: str, progress: Progress = SILENT) -> dict[str, str]:
    """SHA-256 of a model's weight files by name, without loading them."""
    with open_checkpoint(locate(model)) as checkpoint:
        return {path.name: sha256(path, progress) for path in checkpoint.tensors.paths}


def load_model(
    model: str | Path = bundled.NAME,
    *,
    device: str = "auto",
    dtype: str = "float32",
    trainable: bool = False,
    progress: Progress = SILENT,
) -> LoadedModel:
    """Load a model by a published name, a Hugging Face repository, or the file or folder of a checkpoint.

    ``dtype`` is a name in ``DTYPES``, ``MIXED`` or ``QUANTIZED``. On a CPU, ``pack_for_cpu`` makes it faster, unless
    ``trainable``.
    """
    limit_threads()
    where, mixed = resolve_device(device), dtype == MIXED
    if not mixed and dtype not in (*DTYPES, QUANTIZED):
        raise UsageError(f"unknown dtype {dtype!r}; use {', '.join((*DTYPES, MIXED))} or {QUANTIZED}")
    if dtype in (MIXED, QUANTIZED) and trainable:
        raise UsageError(f"a model in {dtype} cannot be trained; load it in float32 and train it within torch.autocast")
    path = locate(model)
    with open_checkpoint(path) as checkpoint:
        if dtype == QUANTIZED:
            from protea.transforms.quantized import check_quantizable

            check_quantizable(checkpoint.model, where)
        others = narrow_weights(checkpoint.model, where) if mixed else None
        kind = DTYPES.get(dtype, torch.float32)
        module = checkpoint.load(dtype=kind, device=where, others=others, progress=progress)
        files = checkpoint.tensors.paths
    if any(known.name == short_name(model) and not known.contact_head for known in module.published):
        # Published conversions of such models contain a contact head with random weights.
        module.contact_head = None
    if (licensed := module.restricted) is not None:
        warn(
            f"{model}: if these weights come from {licensed.name}, they are {licensed.restriction} ({licensed.licence})"
        )
    if mixed:
        mix(module)
    if dtype == QUANTIZED:
        from protea.transforms.quantized import quantize

        quantize(module)
    if not trainable:
        pack_for_cpu(module, progress)
    return LoadedModel(module, str(model), path, files)


def computing_dtype(device: str, dtype: str, *, fast: bool) -> str:
    """What to compute in: with ``fast``, ``MIXED`` if the hardware multiplies bfloat16 natively."""
    if fast and dtype != "float32":
        raise UsageError(f"--fast chooses the type itself; leave out --dtype {dtype}")
    return MIXED if fast and native_bfloat16(resolve_device(device)) else dtype
