"""What is trained: an encoder's adapters or weights, and a head with the scales of its data.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from protea import native
from protea.device import keep_freed_memory, native_bfloat16
from protea.errors import DataError, UsageError
from protea.finetune.adapters import insert, train_adapters
from protea.finetune.examples import Batch, EncodedExamples
from protea.finetune.heads import HF, Head, HeadConfig, combined
from protea.finetune.linear import scale_targets, standardise
from protea.finetune.probe import class_weights
from protea.finetune.tasks import Ints, Part
from protea.finetune.tune_settings import TuneSettings
from protea.finetune.updates import Packer, Updates, head_inputs
from protea.limits import free_memory
from protea.models.encoder import Encoder
from protea.train.model import Precision, Trainable
from protea.train.optim import Optimizers, parameters_to_train
from protea.train.recipe import OptimizerSettings
from protea.transforms.native_adapters import multiply_adapters_natively
from protea.transforms.native_linear import multiply_natively
from protea.transforms.training import recompute_layers

ENCODER: Final = "encoder."
HEAD: Final = "head."
"""How the names of trained tensors begin."""

_UNUSED: Final = ("lm_head.", "contact_head.")  # hidden states do not depend on these
_LAYER: Final = re.compile(r"layers\.(\d+)\.")
_SAMPLE: Final = 32_768  # tokens whose hidden states give the scales of a head's inputs
_BUDGETS: Final = (1024, 8192)  # the least and most tokens of a pack, if no budget is given


@dataclass(frozen=True)
class Tunable:
    """An encoder and a head in training.

    Attributes:
        head: on the encoder's device.
        trainable: the encoder, the optimizers of both, and the precision.
        tensors: what training changes, and the head's scales, by name.
        adapted: peft's settings, for LoRA.
    """

    head: Head
    trainable: Trainable
    tensors: dict[str, Tensor]
    adapted: dict[str, Any] | None

    @property
    def model(self) -> Encoder:
        """The encoder; its own dropout is off."""
        return self.trainable.model

    def mode(self, *, training: bool) -> None:
        """Switch the dropout of head and adapters."""
        self.head.train(training)
        train_adapters(self.model, training=training)

    def batches(self, packer: Packer, examples: Ints) -> Iterator[Batch]:
        """What the head reads of some examples."""
        for pack in packer.packs(examples):
            yield head_inputs(self.model, pack.to(self.model.device), self.head.config.reads, self.trainable.precision)


def choose_parameters(model: Encoder, settings: TuneSettings, seed: int) -> dict[str, Any] | None:
    """Set which parameters of a plain model require gradients; returns peft's settings for LoRA."""
    model.eval()
    if settings.method == "lora":
        rank, alpha = settings.rank, settings.alpha
        return insert(model, rank=rank, alpha=alpha, dora=settings.dora, dropout=settings.lora_dropout, seed=seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(_UNUSED))
        parameter.data = parameter.data.clone()  # it may be mapped from a file, which training must not change
    if not parameters_to_train(model):
        raise UsageError("--method full: no weight of this model can be trained")
    return None


def make_tunable(
    model: Encoder,
    config: HeadConfig,
    settings: TuneSettings,
    *,
    seed: int,
    precision: str,
    adapted: dict[str, Any] | None,
) -> Tunable:
    """The model with a new head, random by the ``seed``, and optimizers; ``adapted`` is from ``choose_parameters``."""
    torch.manual_seed(seed)
    head = Head(config).to(model.device)
    parts = ((ENCODER, parameters_to_train(model)), (HEAD, dict(head.named_parameters())))
    parameters = {f"{start}{name}": value for start, named in parts for name, value in named.items()}
    adamw = OptimizerSettings(lr=settings.rate, betas=(0.9, 0.999), weight_decay=settings.weight_decay)
    optimizers = Optimizers(parameters, adamw, {name: _share(name, len(model.layers), settings) for name in parameters})
    scales = {f"{HEAD}{name}": value for name, value in head.named_buffers()}
    return Tunable(head, Trainable(model, optimizers, Precision(precision, model.device)), parameters | scales, adapted)


def _share(name: str, layers: int, settings: TuneSettings) -> float:
    """A parameter's learning rate, divided by that of the last layer."""
    if name.startswith(HEAD):
        return settings.highest_head_rate / settings.rate
    layer = _LAYER.match(name.removeprefix(ENCODER))
    if layer is not None:
        depth = layers - 1 - int(layer[1])
    else:
        depth = 0 if name.startswith(f"{ENCODER}emb_layer_norm_after.") else layers
    return float(settings.layer_decay**depth)


def scale_head(tunable: Tunable, packer: Packer, train: Ints, updates: Updates) -> None:
    """Scale the head to the hidden states of the untrained encoder, in the first updates, and to the targets."""
    if tunable.head.config.kind != HF:
        _scale_inputs(tunable, packer, train, updates)
    if tunable.head.task.kind == "value":
        scale_targets(tunable.head, all_targets(packer.prepared, train))


def _scale_inputs(tunable: Tunable, packer: Packer, train: Ints, updates: Updates) -> None:
    chosen: list[int] = []
    tokens = 0
    for example in (train[place] for step in range(1, updates.of_epoch + 1) for place in updates[step]):
        tokens += packer.tokens(example)
        if chosen and tokens > _SAMPLE:
            break
        chosen.append(example)
    head = tunable.head
    tunable.mode(training=False)
    with torch.no_grad():
        x = torch.cat([batch.x for batch in tunable.batches(packer, np.sort(chosen))])
        standardise(head, combined(x) if head.task.unit == "pair" else x)


def weights_of_classes(head: Head, prepared: EncodedExamples, train: Ints) -> Tensor | None:
    """Weights ``[C]`` of classes or labels by their numbers in the training part; values have none."""
    kind = head.task.kind
    if kind == "value":
        return None
    return class_weights(all_targets(prepared, train), kind, head.config.outputs).to(head.centre.device)


def all_targets(prepared: EncodedExamples, examples: Ints) -> Tensor:
    """The targets of some examples, one after the other."""
    return torch.from_numpy(prepared.labelled.chosen(examples.tolist()).all_targets().values)


def labelled(prepared: EncodedExamples, part: Part) -> Ints:
    """The examples of a part, of which at least one must have a label."""
    places = prepared.places(part)
    if not prepared.labelled.chosen(places.tolist()).all_targets().known().any():
        raise DataError(f"the {part} part has no label; give more examples, or another split")
    return places


def default_token_budget(model: Encoder, packer: Packer, train: Ints, settings: TuneSettings, precision: str) -> int:
    """Tokens of a pack whose activations take half of the free memory, within bounds."""
    lengths = np.array([packer.tokens(example) for example in train], np.float64)
    kept = model.config.activation_bytes(
        float((lengths**2).sum() / lengths.sum()),
        mixed=precision != "float32",
        recompute=settings.recompute,
        on_cpu=model.device.type == "cpu",
    )
    least, most = _BUDGETS
    return int(np.clip(free_memory(model.device) // 2 // kept // least * least, least, most))


def prepare_device(model: Encoder, settings: TuneSettings, precision: str) -> list[str]:
    """Apply what changes no number: recomputation, memory that is kept, fast products; returns notes for the user."""
    if settings.recompute:
        recompute_layers(model)
    if model.device.type != "cpu":
        return []
    keep_freed_memory()
    multiply_natively(model)
    multiply_adapters_natively(model)
    reason = native.reason()
    if precision == "bf16-mixed" and not native_bfloat16(model.device):
        return ["this processor has no bfloat16 products: --precision float32 trains many times faster"]
    return [] if reason is None else [f"attention uses PyTorch's kernel, which is slower than Protea's: {reason}"]


def digest(prepared: EncodedExamples) -> str:
    """A hash of sequences, parts and targets."""
    hashed = blake2b(digest_size=16)
    for record in prepared.sequences:
        hashed.update(len(record.ids).to_bytes(8, "little") + record.ids.tobytes())
    hashed.update(prepared.which.tobytes())
    for example, target in zip(prepared.labelled.examples, prepared.labelled.targets, strict=True):
        hashed.update(f"{example.part} {target.shape} {target.dtype}".encode() + np.ascontiguousarray(target).tobytes())
    return hashed.hexdigest()
