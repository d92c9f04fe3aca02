"""Several models that score as one: whether they can, before any of them computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from protea.alphabet import Alphabet
    from protea.models.encoder import Encoder
    from protea.score.effects import Protein


def ensemble(models: Sequence[str]) -> dict[str, Encoder]:
    """Models without their weights, so that whatever is wrong with one is found before any computes.

    Raises:
        UsageError: one is named twice.
        CapabilityError: one has no language-model head.
        UnknownModelError: there is none of that name.
        CheckpointError: one is damaged.
    """
    from protea.checkpoints.formats import open_checkpoint
    from protea.checkpoints.hub import locate
    from protea.errors import UsageError

    found: dict[str, Encoder] = {}
    places: set[Path] = set()
    for name in models:
        path = locate(name)
        if path.resolve() in places:
            raise UsageError(f"-m {name}: named twice")
        places.add(path.resolve())
        with open_checkpoint(path) as checkpoint:
            checkpoint.model.require("logits")
            found[name] = checkpoint.model
    return found


def common_alphabet(models: Mapping[str, Encoder]) -> Alphabet:
    """The alphabet that all models of an ensemble can read.

    Raises:
        UsageError: none of their alphabets is part of the others.
    """
    from protea.errors import UsageError

    least = min((model.alphabet for model in models.values()), key=lambda alphabet: len(alphabet.residues))
    for name, model in models.items():
        if strange := sorted(set(least.residues) - set(model.alphabet.residues)):
            raise UsageError(f"-m {name}: its alphabet lacks {', '.join(strange)}, which others have; score it apart")
    return least


def check_lengths(models: Mapping[str, Encoder], proteins: Sequence[Protein], long: str) -> None:
    """See that every model of an ensemble takes the proteins, those that insertions make longer too.

    Raises:
        SequenceTooLongError: one does not.
    """
    from protea.score.expected import seen_at_once

    for protein in proteins:
        changed = (one.apply(protein.sequence) for one in protein.variants if not one.is_substitution)
        longest = max(map(len, (protein.sequence, *changed)))
        for model in models.values():
            seen_at_once(model, protein.name, model.alphabet.frame.tokens(longest), long)
