"""Several models that score as one: everything that could be wrong with one is found before any of them computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from protea.alphabet import Alphabet
from protea.checkpoints.formats import open_checkpoint
from protea.checkpoints.hub import locate
from protea.errors import UsageError
from protea.models.encoder import Encoder
from protea.score.effects import Protein
from protea.score.expected import tokens_seen_at_once


def open_ensemble(names: Sequence[str]) -> dict[str, Encoder]:
    """Models by name, without their weights; each must have a language-model head, and none may be named twice."""
    models: dict[str, Encoder] = {}
    places: set[Path] = set()
    for name in names:
        path = locate(name)
        if path.resolve() in places:
            raise UsageError(f"-m {name}: this model is named twice; name each model once")
        places.add(path.resolve())
        with open_checkpoint(path) as checkpoint:
            checkpoint.model.require("logits")
            models[name] = checkpoint.model
    return models


def common_alphabet(models: Mapping[str, Encoder]) -> Alphabet:
    """The smallest alphabet; a ``UsageError`` if another model cannot read it."""
    smallest = min((model.alphabet for model in models.values()), key=lambda alphabet: len(alphabet.residues))
    for name, model in models.items():
        if missing := sorted(set(smallest.residues) - set(model.alphabet.residues)):
            raise UsageError(
                f"-m {name}: its alphabet lacks {', '.join(missing)}, which the other models have; score it separately"
            )
    return smallest


def check_lengths(models: Mapping[str, Encoder], proteins: Sequence[Protein], long: str) -> None:
    """Refuse a protein that is too long for a model, even if only an insertion makes it so."""
    for protein in proteins:
        mutants = (variant.apply(protein.sequence) for variant in protein.variants if not variant.is_substitution)
        longest = max(map(len, (protein.sequence, *mutants)))
        for model in models.values():
            tokens_seen_at_once(model, protein.name, model.alphabet.frame.tokens(longest), long)
