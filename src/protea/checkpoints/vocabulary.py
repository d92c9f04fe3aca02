"""Vocabularies in checkpoint folders: tokens in the order of their ids, read without running a tokenizer.

``vocab.txt`` has one token a line; ``tokenizer.json`` is that of Hugging Face's tokenizers; ``spiece.model`` is
SentencePiece's ``ModelProto``, of which only the pieces are read. Other files add tokens behind those of the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from protea.alphabet import Alphabet
from protea.checkpoints.region import Region, damaged
from protea.checkpoints.settings_files import read_json, read_text
from protea.errors import CheckpointError

VOCABULARY: Final = "vocab.txt"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
PIECES: Final = "spiece.model"
_ADDED: Final = "added_tokens.json"

FILES: Final = (VOCABULARY, TOKENIZER, TOKENIZER_CONFIG, PIECES, _ADDED)
"""The files that may be part of a vocabulary."""

_MARK: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that SentencePiece writes for the blank before a word."""

_MOST: Final = 1 << 20
_EXTRA_IDS: Final = 100


def stored_tokens(folder: Path) -> tuple[str, ...] | None:
    """The tokens that a folder's files state; ``None`` without such a file."""
    for name, read in ((TOKENIZER, _of_tokenizer), (PIECES, _of_pieces), (VOCABULARY, _of_lines)):
        if os.path.lexists(folder / name):
            tokens = read(folder / name)
            if len(tokens) > _MOST or not all(isinstance(number, int) and 0 <= number < _MOST for number in tokens):
                raise damaged(folder / name, "tokens with impossible numbers")
            last = max(tokens, default=-1)
            return tuple(str(tokens.get(n, f"<unused_{n}>")).removeprefix(_MARK) for n in range(last + 1))
    return None


def check_vocabulary(path: Path, alphabet: Alphabet) -> None:
    """Refuse a ``vocab.txt``, if there is one, with other tokens than the alphabet's."""
    tokens = read_text(Region.of_file(path)).split() if os.path.lexists(path) else alphabet.tokens
    for number, expected in enumerate(alphabet.tokens):
        token = tokens[number] if number < len(tokens) else "nothing"
        if token != expected:
            raise CheckpointError(
                f"{path}: token {number} is {token!r} where the {alphabet.name} alphabet has {expected!r}; models with "
                "another alphabet are not supported"
            )


def _of_lines(path: Path) -> dict[int, Any]:
    return dict(enumerate(read_text(Region.of_file(path)).split()))


def _of_tokenizer(path: Path) -> dict[int, Any]:
    described = read_json(path)
    try:
        vocabulary = described["model"]["vocab"]
        if isinstance(vocabulary, dict):
            tokens = {number: token for token, number in vocabulary.items()}
        else:
            tokens = {number: token for number, (token, _) in enumerate(vocabulary)}
        return tokens | {added["id"]: added["content"] for added in described.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, f"no vocabulary in it: {error!r}") from error


def _of_pieces(path: Path) -> dict[int, Any]:
    """The pieces, T5's additional ids behind them in reverse order, and what other files add."""
    tokens: dict[int, Any] = dict(enumerate(_pieces(Region.of_file(path))))
    config = read_json(path.with_name(TOKENIZER_CONFIG)) if path.with_name(TOKENIZER_CONFIG).exists() else {}
    extra, first = config.get("extra_ids", _EXTRA_IDS), len(tokens)
    extra = extra if isinstance(extra, int) and 0 <= extra <= _MOST else 0
    tokens |= {first + number: f"<extra_id_{extra - 1 - number}>" for number in range(extra)}
    added = read_json(path.with_name(_ADDED)) if path.with_name(_ADDED).exists() else {}
    decoder = config.get("added_tokens_decoder")
    try:
        tokens |= {number: token for token, number in added.items()}
        if isinstance(decoder, dict):
            tokens |= {int(number): token["content"] for number, token in decoder.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path.parent, f"the added tokens in {_ADDED} or {TOKENIZER_CONFIG}: {error!r}") from error
    return tokens


def _pieces(region: Region) -> Iterator[str]:
    """The pieces of a ``ModelProto``: field 1 of each of its fields 1."""
    if region.size > (16 << 20):
        raise CheckpointError(f"{region.name}: {region.size:,} bytes, far beyond a vocabulary of residues; not read")
    try:
        for field, value in _fields(region.read()):
            if field == 1 and isinstance(value, bytes):
                yield next(bytes(text).decode() for number, text in _fields(value) if number == 1)
    except (IndexError, ValueError, StopIteration, TypeError) as error:
        raise damaged(region.name, f"no SentencePiece model: {error!r}") from error


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a protocol buffer's fields."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number without an end")

    while place < len(message):
        tag = number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, number()
            continue
        size = {1: 8, 2: None, 5: 4}[kind] if kind in (1, 2, 5) else -1
        size = number() if size is None else size
        if not 0 <= size <= len(message) - place:
            raise ValueError("a field beyond the end")
        yield tag >> 3, message[place : place + size]
        place += size
