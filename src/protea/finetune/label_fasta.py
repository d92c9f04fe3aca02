"""Labelled sequences in FASTA files, in the three forms that benchmarks use.

One file with fields in the headers (FLIP, biotrainer): ``>id TARGET=1.2 SET=train VALIDATION=True``, also ``MASK=`` for
residues and ``INTERACTOR=`` for the partner of a pair. Two or three files with the same ids (FLIP): the sequences, the
residues' labels, and a mask of 0 and 1. Headers of DeepLoc, as FLIP's localisation sets have them: ``>id Nucleus-U
test``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from protea.errors import DataError
from protea.fasta import Record, read_fasta
from protea.finetune.labels import Raw, RawExample
from protea.finetune.tasks import Part, part_of
from protea.letters import ReportRow
from protea.text import counted, shown

_FIELD: Final = re.compile(r"(?:^|\s)([A-Za-z_]\w*)=")
_DEEPLOC: Final = re.compile(r"(\S+)-[MSU](?:\s+(\S+))?\s*")
_BLANK: Final = re.compile(r"\s+")
_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no", "", "nan", "none")


def header_fields(description: str) -> dict[str, str]:
    """The ``KEY=value`` fields of a header, keys in upper case; a value ends where the next field begins."""
    starts = list(_FIELD.finditer(description))
    ends = [*(start.start() for start in starts[1:]), len(description)][: len(starts)]
    return {start[1].upper(): description[start.end() : end].strip() for start, end in zip(starts, ends, strict=True)}


def given_part(set_name: str, validation: str, place: str) -> Part:
    """The part that ``SET`` and ``VALIDATION`` name together, as in FLIP's headers and tables."""
    part, flag = part_of(set_name, place), validation.strip().lower()
    if flag not in (*_TRUE, *_FALSE):
        raise DataError(f"{place}: VALIDATION is {shown(validation)}, must be True or False; correct it")
    if flag in _FALSE or part == "validation":
        return part
    if part not in ("", "train"):
        raise DataError(f"{place}: in the {part} set and VALIDATION=True; a record has one part, correct it")
    return "validation"


def read_headers(path: str) -> Raw:
    """One FASTA file whose headers hold the labels."""
    records = list(read_fasta([path]))
    fields = [header_fields(record.description) for record in records]
    if not any("TARGET" in field for field in fields):
        return _deeploc(path, records)
    examples = [_example(record, field) for record, field in zip(records, fields, strict=True)]
    if any("INTERACTOR" in field for field in fields):
        return _pairs(examples, fields)
    return Raw(examples)


def _example(record: Record, fields: Mapping[str, str]) -> RawExample:
    return RawExample(
        record.id,
        (record.sequence,),
        record.place,
        given_part(fields.get("SET", ""), fields.get("VALIDATION", ""), record.place),
        fields.get("TARGET", ""),
        fields.get("MASK", ""),
    )


def _pairs(examples: list[RawExample], fields: list[dict[str, str]]) -> Raw:
    """Pairs of records that name each other; a pair that both of its records state is one example."""
    singles: dict[str, RawExample] = {}
    for example in examples:
        first = singles.setdefault(example.id, example)
        if first.sequences != example.sequences:
            raise DataError(f"{example.place}: has another sequence than {first.place}; ids must be unique")
    pairs: dict[frozenset[str], RawExample] = {}
    for example, field in zip(examples, fields, strict=True):
        partner = field.get("INTERACTOR", "")
        if partner not in singles:
            what = (
                f"INTERACTOR={partner}: no record has this id" if partner else "no INTERACTOR=, other records have one"
            )
            raise DataError(f"{example.place}: {what}; add it, or remove this record")
        pair = RawExample(
            f"{example.id}&{partner}",
            (*example.sequences, *singles[partner].sequences),
            example.place,
            example.part,
            example.target,
            example.mask,
        )
        first = pairs.setdefault(frozenset((example.id, partner)), pair)
        if (first.target, first.part) != (pair.target, pair.part):
            raise DataError(f"{pair.place}: states the pair otherwise than {first.place}; give both one TARGET and SET")
    return Raw([*pairs.values()])


def _deeploc(path: str, records: list[Record]) -> Raw:
    """Headers with a class, the ending M, S or U, and perhaps a set."""
    examples = []
    for record in records:
        match = _DEEPLOC.fullmatch(record.description)
        if match is None:
            raise DataError(
                f"{record.place}: no label: no header of the file has TARGET=; write headers like `>id TARGET=1.2 "
                "SET=train`, or give the labels of residues as a FASTA file of their own: --labels"
            )
        examples.append(
            RawExample(record.id, (record.sequence,), record.place, part_of(match[2] or "", record.place), match[1])
        )
    note = f"{path}: the endings -M, -S and -U (membrane, soluble, unknown) of the classes are left out"
    return Raw(examples, [note])


def read_separate(records: Iterable[Record], labels: Path, mask: Path | None) -> Raw:
    """Sequences, and in other FASTA files the labels of their residues and a mask, all with the same ids.

    Sequences without labels are left out with a report row; labels or masks without a sequence are an error.
    """
    sequences = by_id(records)
    targets = by_id(read_fasta([labels]))
    masks = {} if mask is None else by_id(read_fasta([mask]))
    for other, path in ((targets, labels), (masks, mask)):
        if strange := next((record for name, record in other.items() if name not in sequences), None):
            count = len(other.keys() - sequences.keys())
            raise DataError(
                f"{strange.place}: no sequence has this id ({counted(count, 'such record')} in {path}); add it"
            )
    if mask is not None and (bare := next((targets[name] for name in targets if name not in masks), None)):
        raise DataError(f"{bare.place}: {mask} has no mask for it; add one, with 1 for residues that count")
    raw = Raw()
    for name, record in sequences.items():
        if name not in targets:
            raw.rows.append(ReportRow(name, "skipped", f"no labels in {labels}"))
            continue
        label = targets[name]
        fields = {**header_fields(record.description), **header_fields(label.description)}
        example = _example(record, fields)
        example.target = _BLANK.sub(" " if ";" in label.sequence else "", label.sequence)
        example.mask = _BLANK.sub("", masks[name].sequence) if masks else example.mask
        raw.examples.append(example)
    if raw.rows:
        raw.notes.append(f"left out: {counted(len(raw.rows), 'sequence')} without labels in {labels}")
    return raw


def by_id(records: Iterable[Record]) -> dict[str, Record]:
    """Records by their ids, which must be unique."""
    found: dict[str, Record] = {}
    for record in records:
        first = found.setdefault(record.id, record)
        if first is not record:
            raise DataError(f"{record.place}: has the id of {first.place}; ids must be unique, rename one")
    return found
