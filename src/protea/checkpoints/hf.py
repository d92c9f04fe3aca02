"""Hugging Face's layout, which is Protea's own: ``config.json`` beside one or several safetensors files.

Reads what ``transformers`` 4 and 5 write for ``EsmForMaskedLM``, ``EsmModel`` and the classification models, and
writes what both load unchanged. ESM-1nv, which ``transformers`` has no class for, uses the same layout and the same
tensor names with ``model_type`` ``esm1nv``. Weights stay memory-mapped where their type needs no change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import torch

from protea.checkpoints import hf_config
from protea.checkpoints.checkpoint import HEAD, Checkpoint, like
from protea.checkpoints.formats import write_extras
from protea.checkpoints.hf_config import read_config, write_config
from protea.checkpoints.layout import APART, VOCABULARY, Layout, Parameter, plan_of
from protea.checkpoints.region import Region
from protea.checkpoints.settings_files import CONFIG, write_json
from protea.checkpoints.tensors import INDEX, WEIGHTS, Planned, Tensors, open_safetensors, shards, write_safetensors
from protea.checkpoints.wrappers import unwrap
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.models.family import EncoderConfig
from protea.models.registry import family_of, initial_value
from protea.output import staged
from protea.progress import SILENT, Progress
from protea.transforms.cpu import unpacked

NAME: Final = hf_config.NAME
TITLE: Final = "a Hugging Face folder"

MAX_SHARD_BYTES: Final = 5 << 30
"""A larger checkpoint is split, as ``transformers`` does."""

WORDS: Final = "embeddings.word_embeddings.weight"
"""How the key of the word embeddings ends in most families, whatever is before it."""

_ROOT: Final = "esm."
"""How the keys of ``EsmForMaskedLM`` begin, and those of an ``EsmModel`` do not."""

_BARE_ROOTS: Final = ("embeddings.", "encoder.", "contact_head.", "rotary_embeddings.")

# The tied head again, and position embeddings, which rotary models' files carry unused.
_LEFTOVERS: Final = r"lm_head\.decoder\..*|esm\.embeddings\.position_embeddings.*"


def _normalized(key: str, bare: bool, wrapped: bool) -> str:
    """A key as ``EsmForMaskedLM`` of transformers 4 spells it, whichever class and version wrote it.

    All of a bare ``EsmModel`` is its encoder, except heads. Heads of one's own have another place only beside a
    wrapped one, so without a wrapper a name that says head is enough.
    """
    head = HEAD.match(key) or ("head" in key.partition(".")[0] and not wrapped)
    if key.startswith(_BARE_ROOTS) or (bare and not head):
        key = f"{_ROOT}{key}"
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


def layout(family: type[Encoder]) -> Layout:
    """How the format keeps a family's parameters."""
    stored = family.stored[NAME]
    return Layout(keys=stored.keys, leftovers="|".join((_LEFTOVERS, *map(re.escape, stored.repeats))))


def words(family: type[Encoder] | None = None) -> tuple[str, ...]:
    """How the key of the word embeddings may end; without a family, in one with the names of ``EsmForMaskedLM``."""
    place = None if family is None else layout(family).place(VOCABULARY[0])
    if family is None or place is None or place.key == f"{_ROOT}{WORDS}":
        return (WORDS,)
    return (place.key, *(repeat for repeat, key in family.stored[NAME].repeats.items() if key == place.key))


def normalize(tensors: Tensors, family: type[Encoder] | None = None) -> None:
    """Give tensors, whichever class, version and wrapper wrote them, the names of the layout.

    Without a family, it is one with the names of ``EsmForMaskedLM``.
    """
    own, *_ = words(family)
    if family is None or own == WORDS:
        wrapped = bool(unwrap(tensors, WORDS, f"(?:{re.escape(_ROOT)})?"))
        bare = WORDS in tensors
        tensors.rename(lambda key: _normalized(key, bare, wrapped))
        return
    stored = family.stored[NAME]
    instead = {repeat: key for repeat, key in stored.repeats.items() if key not in tensors}
    tensors.rename(lambda key: instead.get(key, key))
    unwrap(tensors, own)
    tensors.outside |= {key for key in tensors if re.fullmatch(stored.outside, key)}


def checkpoint_of(config: EncoderConfig, tensors: Tensors, source: str) -> Checkpoint:
    """The checkpoint of tensors with the names of the layout (see ``Checkpoint``)."""
    family = family_of(config)
    names = layout(family)
    checkpoint = Checkpoint(config, tensors, names, source)
    tied = (("weight", "word_embeddings.weight"), ("bias", "lm_head.bias"))
    places = ((f"lm_head.decoder.{kind}", names.place(name)) for kind, name in tied)
    checkpoint.check_tied(*((repeat, place.key) for repeat, place in places if place is not None))
    checkpoint.check_tied(*family.stored[NAME].repeats.items())
    return checkpoint


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: ``config.json`` and ``model.safetensors``, its shards, or ``pytorch_model.bin``."""
    config = read_config(folder)
    legacy = not any((folder / name).exists() for name in (WEIGHTS, INDEX)) and any(folder.glob("pytorch_model*.bin*"))
    tensors = _open_bin(folder) if legacy else open_safetensors(shards(folder))
    normalize(tensors, family_of(config))
    return checkpoint_of(config, tensors, CONFIG)


def _open_bin(folder: Path) -> Tensors:
    from protea.checkpoints.torch_file import TorchFile, open_state_dicts, state_of

    expected = shards(folder, "pytorch_model.bin", "pytorch_model.bin.index.json")
    files = {path: TorchFile(Region.of_file(path)) for path in expected}
    return open_state_dicts({path: (file, state_of(path, file.content)) for path, file in files.items()}, expected)


def save(model: Encoder, folder: Path) -> None:
    """Write a model to a new or empty folder that Protea and ``transformers`` load unchanged."""
    if model.mixed or model.quantized:
        raise UsageError(f"a model in {model.precision} has lost bits of its weights; load it in float32 to save it")
    with staged(folder) as place:
        # A model that is packed for the CPU does not list its parameters; its copy on the meta device does.
        write(place, like(model), unpacked(model), model.compute_dtype)


def write_random(folder: Path, model: Encoder, *, seed: int, dtype: torch.dtype, progress: Progress = SILENT) -> None:
    """Write a model with random weights, by its family's published initialisation; equal seeds give equal weights.

    The model may be on the meta device.
    """
    from protea.checkpoints.targets import check_target

    def parameter(name: str) -> torch.Tensor:
        return initial_value(model, name, seed).to(dtype)

    check_target(folder, NAME, model, parameter, progress)
    with staged(folder) as place:
        write(place, model, parameter, dtype, progress=progress)


def write(
    folder: Path,
    model: Encoder,
    parameter: Parameter,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    beside: Iterable[Planned] = (),
    progress: Progress = SILENT,
) -> None:
    """Write a checkpoint (see ``Format``). A bilinear contact head, which ``transformers`` ignores, goes beside it.

    ``beside`` are tensors that are no part of the model, such as a classifier's.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    folder.mkdir(exist_ok=True)
    tensors = (*plan_of(model, layout(type(model)), parameter, dtype), *beside)
    plan = {planned.key: planned for planned in tensors}
    split = split_state_dict_into_shards_factory(
        plan,
        get_storage_size=lambda planned: planned.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    progress.begin("writing weights", sum(planned.size for planned in tensors))
    for name, keys in split.filename_to_tensors.items():
        write_safetensors(folder / name, [plan[key] for key in keys], progress=progress)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    write_config(folder, model, dtype)
    if apart := {name: parameter(name) for name, _ in model.named_parameters() if name in APART}:
        with open_checkpoint(folder) as written:
            write_extras(folder, written, model, apart)
