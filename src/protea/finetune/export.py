"""Models for others: a run of ``protea finetune`` as transformers and peft load it.

A head of transformers' kind goes into its class, with the encoder or with the adapter. Any other head stays in the run,
and the encoder or the adapter is written alone. All outputs are functions of the run, so that an existing one is
compared file by file with what would be written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor

from protea.checkpoints import hf
from protea.checkpoints.checkpoint import like
from protea.checkpoints.hf_config import write_config
from protea.checkpoints.layout import APART
from protea.checkpoints.settings_files import CONFIG, read_json, write_json
from protea.errors import FinishedError, OutputError, UsageError
from protea.finetune.adapters import Adapter, has_class, planned
from protea.finetune.foreign import COUNTERPARTS, PROBLEMS, stored_names
from protea.finetune.heads import HF, Head
from protea.finetune.predictor import ADAPTER, HEAD, Predictor, is_predictor, read_predictor, with_encoder
from protea.infer.loading import ModelLoader
from protea.journal import complete
from protea.models.encoder import Encoder
from protea.output import sha256, staged
from protea.progress import SILENT, Progress
from protea.rerun import REMOVE
from protea.transforms.cpu import unpacked

_FOLDS: Final = "fold-*"


@dataclass(frozen=True)
class Exported:
    """The result of an export: a phrase that says what was written, and notes for the user."""

    what: str
    notes: tuple[str, ...] = ()


def is_tuned(run: Path) -> bool:
    """Whether a folder is a run of ``protea finetune``; a ``UsageError`` if it holds one for each fold."""
    if folds := sorted(path for path in run.glob(_FOLDS) if is_predictor(path)):
        raise UsageError(f"{run}: holds {len(folds)} predictors, one for each fold; name one of them, as {folds[0]}")
    return is_predictor(run)


def export(
    run: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    adapter: bool = False,
    base: str | None = None,
    progress: Progress = SILENT,
) -> Exported:
    """Write a run as a Hugging Face folder, or its adapter in peft's layout.

    Raises ``FinishedError`` if the same folder exists; ``OutputError`` if another one does.

    Args:
        run: a folder of ``protea finetune``.
        output: a new folder.
        dtype: of the model's weights; adapters are float32.
        adapter: write the adapter of a run of LoRA instead of the whole model.
        base: the base model, if it is not where it was.
        progress: receives the progress.
    """
    predictor = read_predictor(run)
    if adapter and predictor.method != "lora":
        raise UsageError(f"{run}: was trained with method {predictor.method}, without an adapter; leave out --adapter")
    if adapter and dtype != torch.float32:
        raise UsageError(f"--adapter: adapters are float32; leave out --dtype {str(dtype).removeprefix('torch.')}")
    encoder = with_encoder(predictor, run, ModelLoader("cpu"), base).encoder
    assert encoder is not None
    if not has_class(encoder):
        raise UsageError(
            f"{run}: transformers has no class for {encoder.config.family}; only Protea can use it, as it is"
        )
    bare = (type(encoder).stored[hf.NAME].classes or ("", ""))[1]
    if _is_whole(predictor) and not COUNTERPARTS[predictor.task.unit].name.startswith(bare.removesuffix("Model")):
        raise UsageError(
            f"{run}: transformers has no class with this head for {encoder.config.family}; with another --head, the "
            "encoder alone can be exported"
        )
    what = COUNTERPARTS[predictor.task.unit].name if _is_whole(predictor) else "the encoder alone"
    name = base or predictor.base.name
    if adapter:
        written = f"a peft adapter of {name}" + (f" for {what}" if _is_whole(predictor) else "")
        _write(output, lambda folder: _write_adapter(folder, predictor, encoder, Adapter.read(run / ADAPTER), name))
    else:
        written = what
        _write(output, lambda folder: _write_model(folder, predictor, encoder, dtype, progress))
    notes = []
    if not _is_whole(predictor):
        kind = predictor.head.config.kind
        notes.append(f"the head {kind} is not one of transformers' heads; it stays in {run / HEAD}")
    if adapter and "/" not in name and not (Path(name) / CONFIG).is_file():
        notes.append(
            f"transformers does not know the base model by the name {name}: write it with `protea convert {name} base/ "
            "--to hf`, and load the folder base/ below the adapter"
        )
    return Exported(written, tuple(notes))


def _is_whole(predictor: Predictor) -> bool:
    return predictor.head.config.kind == HF


def _write(output: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, or end because it exists."""
    if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
        with staged(output) as folder:
            write(folder)
        return
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name[:200]}.") as place:
        again = Path(place) / "again"
        write(again)
        for path in sorted(again.rglob("*")):
            known = output / path.relative_to(again)
            if not known.is_file() or sha256(known) != sha256(path):
                raise OutputError(f"{output}: exists already, of another run ({path.name} differs); {REMOVE}")
    raise FinishedError(complete(output))


def _write_model(folder: Path, predictor: Predictor, encoder: Encoder, dtype: torch.dtype, progress: Progress) -> None:
    parameter = unpacked(encoder)
    model = like(encoder)
    # The language model's head does not belong to what was trained, nor does a head that transformers lacks.
    model.lm_head = None
    if any(name in APART for name, _ in model.named_parameters()):
        model.contact_head = None
    tensors = classifier(predictor.head) if _is_whole(predictor) else {}
    beside = planned({key: value.to(dtype) for key, value in tensors.items()})
    hf.write(folder, model, lambda name: parameter(name).to(dtype), dtype, beside=beside, progress=progress)
    _describe(folder, predictor)


def _write_adapter(folder: Path, predictor: Predictor, encoder: Encoder, adapter: Adapter, base: str) -> None:
    if not _is_whole(predictor):
        adapter.write(folder, base)
        return
    adapter.write(folder, base, COUNTERPARTS[predictor.task.unit].task_type, classifier(predictor.head))
    # Neither an adapter nor its base has names of labels: ``EsmConfig.from_pretrained`` finds them here.
    write_config(folder, like(encoder), torch.float32)
    _describe(folder, predictor)


def _describe(folder: Path, predictor: Predictor) -> None:
    """Write the class and its labels into a folder's ``config.json``."""
    if not _is_whole(predictor):
        return
    names = predictor.classes or ("LABEL_0",)
    described: dict[str, Any] = {
        "architectures": [COUNTERPARTS[predictor.task.unit].name],
        "problem_type": PROBLEMS[predictor.task.kind],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
    write_json(folder / CONFIG, read_json(folder / CONFIG) | described)


def classifier(head: Head) -> dict[str, Tensor]:
    """A head of transformers' kind by the keys of its class, float32; its outputs are in the unit of the data."""
    tensors = {key: head.body.get_parameter(name).detach().double() for key, name in stored_names(head).items()}
    if head.task.kind == "value":
        mean, spread = head.target.double()
        last = {name: key for key, name in stored_names(head).items()}
        weight, bias = last["out_proj.weight"], last["out_proj.bias"]
        tensors |= {weight: tensors[weight] * spread, bias: tensors[bias] * spread + mean}
    return {key: value.float() for key, value in tensors.items()}
