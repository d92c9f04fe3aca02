"""From labelled examples in parts to a predictor: training, the choice between members, and calibration.

Nothing here looks at the test part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from protea.finetune.calibration import Calibration, calibrate
from protea.finetune.distances import Reference
from protea.finetune.examples import EncodedExamples
from protea.finetune.heads import RESIDUES
from protea.finetune.labelled_data import groups_of
from protea.finetune.members import Member, Trainer, best_member
from protea.finetune.predictor import ADAPTER, Base, Predictor, save_encoder


@dataclass
class Fitted:
    """All trained members, the best of them on the validation part, and the predictor that it makes."""

    members: list[Member]
    best: Member
    calibration: Calibration
    predictor: Predictor

    def save(self, folder: Path) -> None:
        """Write the predictor into an existing folder, with all that ``protea predict`` reads."""
        self.predictor.save(folder)
        if self.best.adapter is not None:
            self.best.adapter.write(folder / ADAPTER, self.predictor.base.name)
        elif self.predictor.method == "full":
            save_encoder(self.best.encoder, folder)


def fit_predictor(trainer: Trainer, prepared: EncodedExamples) -> Fitted:
    """Train on the training part, choose on the validation part, calibrate on the calibration part."""
    members = trainer.members(prepared)
    best = best_member(members)
    vectors = _mean_vectors(best)
    train, validation = (vectors[np.unique(prepared.which[prepared.places(part)])] for part in ("train", "validation"))
    calibrated = _calibrated(best, round(1 - trainer.settings.coverage, 10))
    reference = None if best.head.task.unit == "pair" else Reference.of(train, validation, trainer.settings.seed)
    predictor = replace(
        predictor_of(trainer, best), method=trainer.settings.method, calibration=calibrated, reference=reference
    )
    return Fitted(members, best, calibrated, predictor)


def predictor_of(trainer: Trainer, member: Member) -> Predictor:
    """A member with a frozen model as a predictor, not calibrated."""
    return Predictor(
        head=member.head.eval(),
        classes=member.prepared.labelled.classes,
        layer=member.chosen.layer,
        long=trainer.settings.long,
        unknown=trainer.settings.unknown,
        gaps=trainer.settings.gaps,
        base=Base.of(trainer.loaded),
        method="frozen",
        calibration=None,
        reference=None,
        encoder=member.encoder,
    )


def _calibrated(best: Member, alpha: float) -> Calibration:
    data = best.prepared.labelled.part("calibration")
    if not data.examples:
        return Calibration(data.task, alpha=alpha)  # ``splits.calibration`` has said why
    noun = "protein" if data.groups is None else "cluster"
    return calibrate(data.task, best.predictions("calibration"), data.all_targets(), groups_of(data), alpha, noun)


def _mean_vectors(member: Member) -> np.ndarray[Any, np.dtype[np.float32]]:
    """``[S, D]``: the mean vector of each sequence, or what stands for it, at the layer of the head."""
    features, place = member.chosen.features, member.chosen.place
    if member.head.config.reads != RESIDUES:
        return np.ascontiguousarray(features.values[:, place])
    means = [
        features.values[a:b, place].mean(0) for a, b in zip(features.offsets[:-1], features.offsets[1:], strict=True)
    ]
    return np.stack(means)
