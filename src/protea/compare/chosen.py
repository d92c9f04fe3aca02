"""The benchmarks that a user chooses by naming their files, with the options of each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from protea.compare.benchmarks import Contacts, Perplexity, Scans
from protea.compare.flip_benchmark import Flip
from protea.compare.measured import ComparedBenchmark
from protea.errors import UsageError
from protea.evaluate.proteingym import Assay, read_assays
from protea.score.effects import Scoring

_BELONGS: Final = {"assays": "proteingym", "method": "proteingym", "task": "flip", "limit": "flip"}
"""The benchmark of each option."""


def chosen_benchmarks(
    *,
    structures: Sequence[Path] | None = None,
    proteingym: Path | None = None,
    sequences: Sequence[str] | None = None,
    flip: Path | None = None,
    **options: Any,
) -> list[ComparedBenchmark]:
    """The benchmarks whose files are named, quick ones first. Arguments are the options of ``protea compare``.

    ``options`` are ``assays`` (a list of names), ``method``, ``task`` and ``limit``; ``None`` means not given. One
    whose benchmark is not chosen is a ``UsageError``.
    """
    given = {name: value for name, value in options.items() if value is not None}
    there = {"proteingym": proteingym, "flip": flip}
    for name in given:
        if there[_BELONGS[name]] is None:
            raise UsageError(f"--{name} is an option of --{_BELONGS[name]}; add --{_BELONGS[name]} DIR")
    benchmarks: list[ComparedBenchmark] = []
    if structures:
        benchmarks.append(Contacts(structures))
    if sequences:
        benchmarks.append(Perplexity(sequences))
    if proteingym is not None:
        assays = _assays(read_assays(proteingym), given.get("assays"))
        benchmarks.append(Scans(proteingym, assays, Scoring(method=given.get("method", "masked-marginals"))))
    if flip is not None:
        benchmarks.append(Flip(flip, given.get("task", ()), given.get("limit")))
    return benchmarks


def _assays(known: Sequence[Assay], names: Collection[str] | None) -> list[Assay]:
    by_name = {assay.name: assay for assay in known}
    if unknown := [name for name in names or () if name not in by_name]:
        raise UsageError(f"--assays {unknown[0]!r}: unknown name; known are {', '.join(sorted(by_name))}")
    return [by_name[name] for name in dict.fromkeys(names or by_name)]
