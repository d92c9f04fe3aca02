"""The run behind ``protea evaluate contacts``: one model, structures, and a table of precisions that is made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from protea.checkpoints.formats import HEAD_RECORD, companion
from protea.checkpoints.hub import locate
from protea.contacts.precision import ChainPrecision, fitted_on, measure, select_chains, write_precisions
from protea.contacts.structures import Chain, structure_files
from protea.infer.loading import IN_FLOAT32, ModelLoader
from protea.infer.runner import FloatArray
from protea.letters import ReportRow
from protea.output import fingerprint
from protea.progress import SILENT, Progress
from protea.rerun import INPUT, PLOT
from protea.tables import check_output

Draw = Callable[[Chain, FloatArray], None]


def _no_pictures(names: Sequence[str]) -> Draw:
    return lambda chain, probabilities: None


def evaluate_structures(
    structures: Sequence[Path],
    rows: list[ReportRow],
    *,
    model: str,
    exclude: Sequence[str] = (),
    include_fitted: bool = False,
    seed: int = 0,
    plot: Path | None = None,
    drawing: Callable[[Sequence[str]], Draw] = _no_pictures,
    output: Path | None = None,
    overwrite: bool = False,
    load: ModelLoader = IN_FLOAT32,
    progress: Progress = SILENT,
) -> list[ChainPrecision]:
    """Measure a model's contacts against structures, and write the output.

    Arguments are the options of the command. ``rows`` receives what was skipped or is odd. ``drawing`` is called with
    the names of the chains before any is computed, and gives what draws one of them; ``plot`` is where. A
    ``FinishedError`` says that the same call has written the output already.
    """
    run: dict[str, Any] = {"command": "evaluate contacts", "structures": list(map(str, structures))}
    run |= {"exclude": list(exclude), "include_fitted": include_fitted, "seed": seed, PLOT: plot and str(plot)}
    record = companion(locate(model), HEAD_RECORD)
    if output is not None:
        lists = [*(Path(name) for name in exclude if name.endswith(".json")), record]
        run[INPUT] = fingerprint([*structure_files(structures), *filter(Path.exists, lists)])
        check_output(output, run, lambda: load.identities([model]), overwrite=overwrite)
    loaded = load(model)
    chains = select_chains(
        loaded.module,
        structures,
        rows,
        exclude=exclude,
        fitted=fitted_on(record) if record.exists() and not include_fitted else (),
        reason=f"the contact head was fitted on them ({record}); `protea evaluate contacts --include-fitted` keeps "
        "them",
        progress=progress,
    )
    precisions = measure(loaded.module, chains, drawing([chain.name for chain in chains]), progress)
    if output is not None:
        run["models"] = {model: loaded.circumstances()}
        write_precisions(output, precisions, rows, run)
    return precisions
