"""The notation of variants: what their names mean.

    A24V                a substitution; several are joined by colons: A24V:G30S
    A24del              a deletion; A24_G30del deletes several residues
    A24_G25insKL        an insertion between two neighbours
    A24_G30delinsKL     a replacement of residues by any number of others
    A24dup, A24_G30dup  the residues once more, behind themselves
    A24=                no change

HGVS (hgvs-nomenclature.org, version 21) writes residues with one or three letters, behind ``p.`` and the name of a
reference sequence, predicted changes in parentheses, and several as ``p.[Ala24Val;Gly30Ser]``. ``p.=`` is the wild
type, as are MaveDB's ``_wt`` and ``_sy``. The name of the reference sequence is not compared with the protein's.

Residues are counted from ``offset``, the number of the first one. Knows nothing of models or tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from protea.alphabet import Alphabet
from protea.errors import VariantError
from protea.score.variants import Edit, Variant, check, explaining_offset
from protea.text import shown

_NAMES: Final = "AlaArgAsnAspCysGlnGluGlyHisIleLeuLysMetPheProSerThrTrpTyrValSecPylAsxGlxXleXaaTer"
_LETTERS: Final = dict(zip(re.findall("[A-Z][a-z]{2}", _NAMES), "ARNDCQEGHILKMFPSTWYVUOBZJX*", strict=True))
_RESIDUE: Final = rf"(?:{'|'.join(_LETTERS)}|[A-Z*])"
_PLACE: Final = r"-?\d{1,9}"
_CHANGE: Final = re.compile(
    rf"(?P<first>{_RESIDUE})(?P<start>{_PLACE})(_(?P<last>{_RESIDUE})(?P<end>{_PLACE}))?"
    rf"(?P<kind>delins|del|ins|dup|=|)(?P<new>{_RESIDUE}*)((?P<why>fs|ext|\?).*)?",
    re.ASCII,
)
_BETWEEN: Final = re.compile(r"[^\w=*?]|_")
_PROTEIN: Final = "p."
_NOT_PROTEIN: Final = re.compile(r"([^:\s]+:)?[cgmnor]\.", re.ASCII)
_UNCHANGED: Final = frozenset(("=", "_wt", "_sy"))
_ADVICE: Final = "to score its sequence, give that in a column mutated_sequence"
_UNSCORABLE: Final = {
    "?": "the effect on the protein is not known",
    "0": "no protein is made",
    "0?": "perhaps no protein is made",
    "fs": f"a frameshift does not name the new residues; {_ADVICE}",
    "ext": f"an extension does not name the new residues; {_ADVICE}",
}
_MOST_LETTERS_SHOWN: Final = 60
_NOTATIONS: Final = "A24V, A24V:G30S, A24del, A24_G30del, A24_G25insKL, A24_G30delinsKL, A24dup or p.Ala24Val"


def parse(text: str, wild: str, offset: int = 1) -> Variant:
    """Read a variant of the protein ``wild``; a ``VariantError`` says what is wrong with the text."""
    if _NOT_PROTEIN.match(text.strip()):
        raise VariantError(f"{text}: is a change of DNA or RNA; write the change of the protein, as in p.Ala24Val")
    parts = [part for part in _parts(text.strip()) if part not in _UNCHANGED]
    edits = sorted(_edit(part, wild, offset, text) for part in parts)
    for before, after in pairwise(edits):
        if after.start < before.end or (before.start, before.end) == (after.start, after.end):
            raise VariantError(f"{text}: changes residue {after.start + offset} twice")
    return Variant(text, tuple(edits))


def parse_all(texts: Sequence[str], sequence: str, alphabet: Alphabet, offset: int = 1) -> list[Variant]:
    """Variants of one protein; a ``VariantError`` names the first that does not fit, and the offset if all would."""
    for text in texts:
        if not isinstance(text, str):
            raise VariantError(f"{shown(text)}: a variant is a string; write 'A24V'")
    variants = [parse(text, sequence, offset) for text in texts]
    for variant in variants:
        try:
            check(variant, sequence, alphabet, offset)
        except VariantError as error:
            better = explaining_offset(variants, sequence, offset)
            advice = "" if better is None else f"; all {len(variants):,} would fit with offset={better}"
            raise VariantError(f"{error}{advice}") from error
    return variants


def _parts(text: str) -> list[str]:
    """The single changes in a name, without the reference sequence, ``p.``, brackets and parentheses."""
    pieces = text.split(":")
    if len(pieces) > 1 and pieces[1].startswith(_PROTEIN) and not any(map(_is_change, _BETWEEN.split(pieces[0]))):
        del pieces[0]  # a reference sequence, which holds no change that would be lost
    parts = []
    for piece in pieces:
        body = _inside("()", piece.removeprefix(_PROTEIN))
        if body in _UNSCORABLE and piece.startswith(_PROTEIN):
            raise VariantError(f"{text}: {_UNSCORABLE[body]}")
        listed = _inside("[]", body)
        parts += [body] if listed == body else [_inside("()", part) for part in _inside("()", listed).split(";")]
    return parts


def _is_change(text: str) -> bool:
    match = _CHANGE.fullmatch(text)
    return match is not None and any(match.group("kind", "new", "why"))  # P04637 and F9 are no changes


def _inside(brackets: str, text: str) -> str:
    """The text without one pair of brackets around all of it."""
    inner = text.removeprefix(brackets[0]).removesuffix(brackets[1])
    return inner if text == f"{brackets[0]}{inner}{brackets[1]}" and not set(brackets) & set(inner) else text


def _edit(text: str, wild: str, offset: int, variant: str) -> Edit:
    match = _CHANGE.fullmatch(text)
    if match is None:
        raise _unknown(text, variant)
    if match["why"]:
        raise VariantError(f"{text}: {_UNSCORABLE[match['why']]}")
    first, new = _one_letter(match["first"]), _one_letter(match["new"])
    last = first if match["last"] is None else _one_letter(match["last"])
    start, kind = int(match["start"]) - offset, match["kind"]
    end = start if match["end"] is None else int(match["end"]) - offset
    if "*" in (first, last):
        raise VariantError(f"{text}: changes the stop codon; models score residues only")
    if kind == "ins" and new and end != start + 1:
        raise VariantError(f"{text}: an insertion lies between two neighbours, as in A24_G25insKL")
    if end < start:
        raise VariantError(f"{text}: ends before it begins; write the smaller position first")
    if kind == "del" and new:
        raise VariantError(f"{text}: a deletion adds no residues; write delins to replace residues by {new}")
    if kind in ("ins", "delins") and not new:
        raise VariantError(f"{text}: names no residues to insert; add them at the end")
    stated = tuple(dict.fromkeys([(start, first), (end, last)]))
    match kind, len(new):
        case (("del" | "delins"), _):
            return Edit(start, end + 1, new, stated)
        case "ins", _:
            return Edit(end, end, new, stated)
        case "dup", 0:
            return Edit(end + 1, end + 1, wild[max(start, 0) : max(end + 1, 0)], stated)
        case "=", 0:
            return Edit(start, start + 1, first, stated)
        case "", 1 if start == end:
            return Edit(start, start + 1, new, stated)
    raise _unknown(text, variant)


def _one_letter(residues: str) -> str:
    """Residues in letters, from names of one or three letters."""
    return "".join(_LETTERS.get(name, name) for name in re.findall(_RESIDUE, residues))


def _unknown(text: str, variant: str) -> VariantError:
    shown = variant if len(variant) <= _MOST_LETTERS_SHOWN else f"{variant[:_MOST_LETTERS_SHOWN]}…"
    part = "" if text == variant.strip() else f"{text!r} is "
    advice = "use upper case and " if text != text.upper() and _CHANGE.fullmatch(text.upper()) else ""
    return VariantError(f"{shown!r}: {part}not a variant; {advice}write {_NOTATIONS}")
