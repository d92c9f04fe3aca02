"""What scripts use of fair-esm's ``esm.data``: the alphabet, batches of tokens, and FASTA files.

Follows ``esm/data.py`` of fair-esm 2.0.0. Mistakes are ``ProteaError``s instead of ``KeyError``s and assertions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from protea import alphabet as alphabets
from protea.compat.esm.absent import refuse
from protea.errors import FastaError, UnknownResidueError, UsageError
from protea.fasta import Record
from protea.fasta import read_fasta as records_of
from protea.models import registry
from protea.text import shown

_ARCHITECTURES: Final = {"ESM-1": "esm-1", "protein_bert_base": "esm-1", "ESM-1b": "esm", "roberta_large": "esm"}
"""fair-esm's names of architectures, and our names of their alphabets."""

_ABSENT: Final = {"msa": "msa", "invariant_gvp": "if"}

_FILL: Final = re.compile(r"<null_[1-9]\d*>")


class EsmAlphabet:
    """fair-esm's ``Alphabet``: tokens and their ids, and whether sequences begin with ``<cls>`` and end with ``<eos>``.

    Tokens are ``prepend_toks``, ``standard_toks``, as many ``<null_N>`` as make a multiple of 8, and ``append_toks``.
    """

    def __init__(
        self,
        standard_toks: Sequence[str],
        prepend_toks: Sequence[str] = ("<null_0>", "<pad>", "<eos>", "<unk>"),
        append_toks: Sequence[str] = ("<cls>", "<mask>", "<sep>"),
        prepend_bos: bool = True,
        append_eos: bool = False,
        use_msa: bool = False,
    ) -> None:
        if use_msa:
            refuse("Alphabet(use_msa=True)", "msa")
        self.standard_toks, self.prepend_toks, self.append_toks = map(list, (standard_toks, prepend_toks, append_toks))
        self.prepend_bos, self.append_eos, self.use_msa = prepend_bos, append_eos, use_msa
        first = [*self.prepend_toks, *self.standard_toks]
        self.all_toks = [*first, *(f"<null_{i + 1}>" for i in range(-len(first) % 8)), *self.append_toks]
        self.tok_to_idx = {token: number for number, token in enumerate(self.all_toks)}
        self.unk_idx = self.tok_to_idx["<unk>"]
        self.padding_idx, self.eos_idx = self.get_idx("<pad>"), self.get_idx("<eos>")
        self.cls_idx, self.mask_idx = self.get_idx("<cls>"), self.get_idx("<mask>")
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.unique_no_split_tokens = self.all_toks
        known = "|".join(map(re.escape, self.all_toks))
        self._token = re.compile(rf"{known}|(?:(?!{known})\S)+")

    @classmethod
    def from_architecture(cls, name: str) -> EsmAlphabet:
        """The alphabet of ``ESM-1`` or ``ESM-1b``, which ESM-1v and ESM-2 share, also by fairseq's names of these."""
        if kind := next((kind for part, kind in _ABSENT.items() if part in name.lower()), None):
            refuse(f"Alphabet.from_architecture({name!r})", kind)
        if name not in _ARCHITECTURES:
            raise UsageError(f"unknown architecture {name!r}; use {', '.join(_ARCHITECTURES)}")
        return cls.of(registry.alphabets()[_ARCHITECTURES[name]])

    @classmethod
    def of(cls, ours: alphabets.Alphabet) -> EsmAlphabet:
        """The same tokens as one of Protea's alphabets."""
        tokens = [token for token in ours.tokens if not _FILL.fullmatch(token)]
        letters = [number for number, token in enumerate(tokens) if len(token) == 1]
        begin, end = letters[0], letters[-1] + 1
        return cls(
            *(tokens[begin:end], tokens[:begin], tokens[end:]),
            prepend_bos=ours.bos is not None,
            append_eos=ours.eos is not None,
        )

    def __len__(self) -> int:
        return len(self.all_toks)

    def get_idx(self, tok: str) -> int:
        """The id of a token; that of ``<unk>`` for any other text."""
        return self.tok_to_idx.get(tok, self.unk_idx)

    def get_tok(self, ind: int) -> str:
        """The token of an id."""
        return self.all_toks[ind]

    def to_dict(self) -> dict[str, int]:
        """The ids by token, a copy."""
        return dict(self.tok_to_idx)

    def get_batch_converter(self, truncation_seq_length: int | None = None) -> BatchConverter:
        """The function from pairs of label and sequence to a batch."""
        return BatchConverter(self, truncation_seq_length)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The tokens in a text, without blanks; what is no token comes as it is."""
        return self._token.findall(text)

    def encode(self, text: str) -> list[int]:
        """The ids of the tokens in a text; ``UnknownResidueError`` for what is no token."""
        try:
            return [self.tok_to_idx[token] for token in self.tokenize(text)]
        except KeyError as error:
            wrong: str = error.args[0]
            small = wrong != wrong.upper() and all(letter in self.tok_to_idx for letter in wrong.upper())
            advice = "write it in upper case" if small else "write X for an unknown residue"
            place = next(found.start() for found in self._token.finditer(text) if found[0] == wrong)
            raise UnknownResidueError(
                f"{shown(wrong)} at letter {place + 1} is not in the alphabet ({''.join(self.standard_toks)}); "
                f"{advice}, or remove it"
            ) from error


class BatchConverter:
    """Makes a batch of pairs of label and sequence, as in ``[("KRAS", "MTEYK"), ("GFP", "MSKGE")]``."""

    def __init__(self, alphabet: EsmAlphabet, truncation_seq_length: int | None = None) -> None:
        self.alphabet, self.truncation_seq_length = alphabet, truncation_seq_length

    def __call__(self, raw_batch: Sequence[tuple[str, str]]) -> tuple[list[str], list[str], Tensor]:
        """Labels, sequences, and tokens ``[B, T]`` int64, with ``<pad>`` up to the longest sequence."""
        labels, texts, rows = list[str](), list[str](), list[list[int]]()
        for number, pair in enumerate(raw_batch):
            label, text = _pair(number, pair)
            labels.append(label)
            texts.append(text)
            rows.append(self._row(label, str(text)))
        if not rows:
            raise UsageError("the batch is empty; give pairs of label and sequence, as in [('KRAS', 'MTEYK')]")
        tokens = torch.full((len(rows), max(map(len, rows))), self.alphabet.padding_idx, dtype=torch.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = torch.tensor(row, dtype=torch.int64)
        return labels, texts, tokens

    def _row(self, label: str, text: str) -> list[int]:
        alphabet = self.alphabet
        try:
            ids = alphabet.encode(text)
        except UnknownResidueError as error:
            raise UnknownResidueError(f"sequence {shown(label)}: {error}") from error
        ids = ids[: self.truncation_seq_length] if self.truncation_seq_length else ids
        return [alphabet.cls_idx] * alphabet.prepend_bos + ids + [alphabet.eos_idx] * alphabet.append_eos


def _pair(number: int, pair: Any) -> tuple[str, str]:
    items = [] if isinstance(pair, str) or not isinstance(pair, Iterable) else list(pair)
    # Biopython's Seq has the methods of a string, and comes back as it is.
    if len(items) != 2 or isinstance(items[1], bytes) or not hasattr(items[1], "upper"):
        raise UsageError(
            f"entry {number} of the batch is {shown(pair)}; give a pair of label and sequence, as in ('KRAS', 'MTEYK')"
        )
    return items[0], items[1]


class FastaBatchedDataset:
    """Labels and sequences of a FASTA file; an item is a pair. A label is the whole header."""

    def __init__(self, sequence_labels: Iterable[str], sequence_strs: Iterable[str]) -> None:
        self.sequence_labels, self.sequence_strs = list(sequence_labels), list(sequence_strs)

    @classmethod
    def from_file(cls, fasta_file: str | Path) -> FastaBatchedDataset:
        """Read a file, which may be compressed; ``FastaError`` if it is none, or if two records have one label."""
        records = list(records_of([fasta_file]))
        labels = list(map(_label, records))
        if repeated := next((label for label, count in Counter(labels).items() if count > 1), None):
            raise FastaError(f"{fasta_file}: two records are called {shown(repeated)}; give each its own header")
        return cls(labels, (record.sequence for record in records))

    def __len__(self) -> int:
        return len(self.sequence_labels)

    def __getitem__(self, idx: int) -> tuple[str, str]:
        return self.sequence_labels[idx], self.sequence_strs[idx]

    def get_batch_indices(self, toks_per_batch: int, extra_toks_per_seq: int = 0) -> list[list[int]]:
        """The numbers of the sequences of each batch, shortest first, at most ``toks_per_batch`` with padding.

        A longer sequence is a batch by itself. ``extra_toks_per_seq`` is added to each length.
        """
        batches: list[list[int]] = []
        for number in sorted(range(len(self)), key=lambda i: len(self.sequence_strs[i])):
            size = len(self.sequence_strs[number]) + extra_toks_per_seq  # the longest of its batch
            if batches and size * (len(batches[-1]) + 1) <= toks_per_batch:
                batches[-1].append(number)
            else:
                batches.append([number])
        return batches


def _label(record: Record) -> str:
    return f"{record.id} {record.description}".rstrip()


def read_fasta(
    path: str | Path, keep_gaps: bool = True, keep_insertions: bool = True, to_upper: bool = False
) -> Iterator[tuple[str, str]]:
    """Headers and sequences of a FASTA or A3M file; without gaps (``-``) or insertions (lower case) if asked."""
    removed = ("" if keep_gaps else "-") + ("" if keep_insertions else ascii_lowercase)
    table = str.maketrans("", "", removed)
    for record in records_of([path]):
        text = record.sequence.translate(table)
        yield _label(record), text.upper() if to_upper else text


Alphabet = EsmAlphabet


def __getattr__(name: str) -> NoReturn:
    if name in ("MSABatchConverter", "ESMStructuralSplitDataset", "read_alignment_lines"):
        refuse(f"esm.data.{name}", "msa" if "MSA" in name else "other")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
