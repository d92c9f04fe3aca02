"""The description of a family: its configuration, its form in each checkpoint format, its published models.

Nothing here reads or writes files.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

from protea.alphabet import Alphabet
from protea.errors import CheckpointError

_MAX: Final = {
    "num_hidden_layers": 1_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 20,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 20,
    "max_position_embeddings": 1 << 30,
}
"""Limits far above any model. A damaged number above them is an error before it can fill the memory."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ABC):
    """A model's configuration; field names are those of Hugging Face's ``config.json``.

    Numbers that are out of range or do not fit together are a ``CheckpointError``.

    Attributes:
        model_type: what ``config.json`` calls the family; related families may share it.
        required: fields that a ``config.json`` must have.
        alphabet: the family's; a configuration with a vocabulary of its own overrides it.
        spelled: names in ``config.json`` of fields that have other names there.
        absent: values of fields that a ``config.json`` leaves out, where they differ from the defaults here.
        vocab_size: rows of the embedding matrix; more than the alphabet's tokens if the matrix is padded.
    """

    model_type: ClassVar[str]
    alphabet: ClassVar[Alphabet]
    required: ClassVar[tuple[str, ...]] = ("num_hidden_layers", "hidden_size", "vocab_size")
    absent: ClassVar[Mapping[str, Any]] = {}
    spelled: ClassVar[Mapping[str, str]] = {}

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name, largest in _MAX.items():
            value = getattr(self, name, 1)  # some families lack some fields
            if not 1 <= value <= largest:
                raise CheckpointError(f"{name} must be from 1 to {largest:,}, got {value}")

    @property
    @abstractmethod
    def family(self) -> str:
        """The usual name of such models: ``ESM-2``, ``ESM-1v``, ..."""

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """Most tokens that a sequence may have, with BOS and EOS; ``None`` without a limit."""

    @property
    def trained_tokens(self) -> int:
        """Most tokens of a sequence in the training of the published models; a family without a limit overrides it."""
        assert self.max_tokens is not None
        return self.max_tokens

    @property
    @abstractmethod
    def attention_heads(self) -> tuple[int, ...]:
        """Attention maps of each layer; 0 for a layer without attention."""

    @property
    @abstractmethod
    def inference_values(self) -> int:
        """Numbers that a forward pass holds at once for each token."""

    @abstractmethod
    def forward_flops(self, length: float, predicted: float) -> float:
        """Floating-point operations for each token of a forward pass.

        ``length`` is the mean length, over tokens, of a token's sequence; ``predicted`` is the share of tokens that the
        language-model head computes. The rest of the model computes all tokens.
        """

    def chosen_flops(self, length: float) -> float:
        """The part of ``forward_flops`` for each token that the last layer does only where its output is wanted."""
        return 0.0

    def training_flops(self, length: float, predicted: float) -> float:
        """Operations for each token of a training step: a forward pass, and a backward pass of twice as many."""
        return 3 * (self.forward_flops(length, predicted) - (1 - predicted) * self.chosen_flops(length))

    @abstractmethod
    def activation_bytes(self, length: float, *, mixed: bool, recompute: bool, on_cpu: bool) -> int:
        """Bytes that training keeps for each token for the backward pass.

        With ``mixed``, matrix products use 16 bits; with ``recompute``, layers keep only their inputs.
        """

    def chosen_bytes(self, length: float, *, mixed: bool, on_cpu: bool) -> int:
        """The part of ``activation_bytes`` that the last layer keeps only where its output is wanted."""
        return 0


Keys = Mapping[str, str]
"""Maps our parameter names to a format's. A format does not store parameters without an entry.

``{}`` stands for the number of a layer, ``*`` for what follows the last dot: ``weight`` or ``bias``. If only our name
has ``{}``, one tensor stacks all layers; if only the key has it, a buffer is repeated in each layer. Names with the
same key are fused in it, in the model's order.
"""


class Shapes(Protocol):
    """Shapes of stored parameters, by our names; a missing parameter is a ``CheckpointError``."""

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> tuple[int, ...]: ...


_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")


def key_of(keys: Keys, name: str) -> tuple[str, int | None] | None:
    """The key of a parameter and its index in a stack of layers; ``None`` if the format does not store it."""
    match = _LAYER.fullmatch(name)
    number = None if match is None else int(match[1])
    general = name if match is None else f"layers.{{}}.{match[2]}"
    stem, _, kind = general.rpartition(".")
    key = keys.get(general) or keys.get(f"{stem}.*")
    if key is None:
        return None
    key = key.replace("*", kind)
    if number is None or "{}" not in key:
        return key, number
    return key.replace("{}", str(number)), None


@dataclass(frozen=True, kw_only=True)
class StoredAs:
    """A family in a format.

    Attributes:
        keys: the table of keys.
        accepts: whether a file's settings mean this family; raises CheckpointError if the family lacks a setting.
        config: the configuration, from a file's settings, the sizes that all families of the format store alike, and
            the shapes of stored parameters.
        describe: the settings to write, beside those that all families of the format share.
        unsupported: why the format, or the library that reads it, cannot hold a model; ``None`` if it can.
        padded: whether padding of the vocabulary is part of the architecture and stays.
        classes: the library's classes for a model with and without its language-model head.
        prefix: required start of file names, if the library tells families apart by it.
        roots: what the keys of the encoder, and those of its heads, begin with in files, beside the table's names.
        blanks: keys of one number each that the library's class has and never reads.
        zeroed: rows that the library sets to 0 when it loads, by parameter.
        repeats: keys of tensors that repeat another, which the file may hold instead, by that key.
        outside: pattern of the keys of what a larger model has beside the encoder.
        tokenizer_files: files of the library's tokenizer, by name.
    """

    keys: Keys
    accepts: Callable[[Mapping[str, Any]], bool] = lambda described: True
    config: Callable[[Mapping[str, Any], dict[str, Any], Shapes], EncoderConfig]
    describe: Callable[[Any], dict[str, Any]] = lambda config: {}
    unsupported: Callable[[Any], str | None] = lambda config: None
    padded: bool = False
    classes: tuple[str, str] | None = None
    prefix: str = ""
    roots: tuple[str, str] = ("", "")
    blanks: tuple[str, ...] = ()
    zeroed: Callable[[Any], Mapping[str, int]] = lambda config: {}
    repeats: Mapping[str, str] = field(default_factory=dict)
    outside: str = ""
    tokenizer_files: Callable[[Any], dict[str, Any]] = lambda config: {}


HUB: Final = "https://huggingface.co"
META: Final = "facebook/"
_NGC: Final = "https://catalog.ngc.nvidia.com/orgs/nvidia/teams/clara/models"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint; without published weights, only the first three fields have values.

    Users type its ``name``. ``licence`` is an SPDX id, with ``(not verified)`` behind it if we could not read the
    publisher's own statement, and ``restriction`` says what it forbids that users may not expect. ``format`` is spelled
    as by ``protea convert``, ``repository`` is on Hugging Face, ``elsewhere`` says where users find other weights, and
    ``account`` whether that place asks for an account. Some publishers state a file's SHA-256.
    """

    name: str
    config: EncoderConfig
    publisher: str
    licence: str = ""
    format: str = ""
    repository: str | None = None
    elsewhere: str = ""
    account: bool = False
    restriction: str = ""
    contact_head: bool = False
    sha256: str = ""

    @property
    def place(self) -> str:
        """Where users find the weights; empty without weights."""
        return self.elsewhere if self.repository is None else f"{HUB}/{self.repository}"


def by_meta(name: str, config: EncoderConfig, *, contact_head: bool = True) -> Published:
    """One of Meta's models on Hugging Face."""
    return on_hub(name, config, META + name, publisher="Meta", licence="MIT", contact_head=contact_head)


def on_hub(
    name: str, config: EncoderConfig, repository: str, *, publisher: str, licence: str, contact_head: bool = False
) -> Published:
    """A model on Hugging Face in the layout of transformers."""
    return Published(
        name=name,
        config=config,
        publisher=publisher,
        licence=licence,
        format="hf",
        repository=repository,
        contact_head=contact_head,
    )


def te_recipe(name: str, config: EncoderConfig) -> Published:
    """One of Meta's models on Hugging Face in the layout of NVIDIA's TransformerEngine recipe."""
    return Published(name=name, config=config, publisher="NVIDIA", licence="MIT", format="te", repository=name)


def by_nvidia(name: str, config: EncoderConfig, page: str, form: str = "nemo", sha256: str = "") -> Published:
    """One of NVIDIA's models; an architecture alone if its catalogue has no page for it."""
    if not page:
        return Published(name=name, config=config, publisher="NVIDIA")
    place = f"{_NGC}/{page} ({'.nemo' if form == 'nemo' else '.tar.gz'})"
    return Published(
        name=name,
        config=config,
        publisher="NVIDIA",
        licence="Apache-2.0",
        format=form,
        elsewhere=place,
        account=True,
        sha256=sha256,
    )
