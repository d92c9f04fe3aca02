"""FLIP: ``protea finetune`` on each of its tasks, and one table of our numbers beside published ones.

Tasks and splits are those of NVIDIA's model cards, and those of other published figures where a folder has them. A
split is trained once; sets that were published for the same training set are measured with the same predictor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from protea.device import return_freed_memory
from protea.errors import DataError, FinishedError, UsageError
from protea.finetune import flip_data
from protea.finetune.evaluation import OURS
from protea.finetune.finetune_settings import parse
from protea.finetune.finetuning import RUN, finetune
from protea.finetune.flip_data import FILES, SOURCE
from protea.finetune.further import FurtherSets, with_test
from protea.finetune.tasks import Labelled
from protea.infer.loading import ModelLoader
from protea.journal import REFUSED
from protea.output import check_output, fingerprint, read_run, run_path, write_run
from protea.progress import SILENT, Progress
from protea.rerun import check_same
from protea.tables import read_table, write_table
from protea.text import counted

TABLE: Final = "flip.tsv"
NUMBERS: Final = {
    "secondary_structure": ("accuracy", "accuracy_per_protein"),
    "conservation": ("accuracy", "accuracy_per_protein", "mcc", "macro_f1"),
    "gb1": ("mse", "rmse", "spearman"),
    "scl": ("accuracy", "mcc"),
    "meltome": ("mse", "rmse", "spearman"),
}
"""The tasks, and the numbers of each that the table shows."""

PUBLISHED: Final = Path(__file__).with_name("published.tsv")
"""Published figures, with the split, counts and number that they are of."""

_NO_MODELS: Final = (
    *("task", "split", "train", "validation", "test", "number", "model", "method", "value", "low", "high"),
    *("baseline", "baseline_value", "source", "differs"),
)
_LOWER_IS_BETTER: Final = ("mse", "rmse")
_STAND_IN: Final = "stand-in for "

_TUNED: Final[Mapping[str, Mapping[str, tuple[int, int]]]] = {
    "secondary_structure": {"lora": (5, 1), "full": (5, 1)},
    "conservation": {"lora": (5, 1), "full": (5, 1)},
    "gb1": {"lora": (50, 8), "full": (20, 8)},
    "scl": {"lora": (5, 8), "full": (10, 8)},
    "meltome": {"lora": (20, 8), "full": (10, 8)},
}
"""Epochs and batch for ESM-2 of Schmirler et al. 2024, table S12; conservation, which they have not, as structure."""


@dataclass(frozen=True)
class Benchmark:
    """A split of a task of FLIP; ``files`` are options in place of the recipe's.

    ``further`` are test sets that belong to the same training set, by name: the same options for each, of which the
    test part is read. Of several, the first that the folder has counts.
    """

    task: str
    name: str
    files: Mapping[str, Any] | None = None
    further: Sequence[tuple[str, Mapping[str, str]]] = ()

    @property
    def stands_in(self) -> bool:
        """Whether its training set is not the published one."""
        return self.name.startswith(_STAND_IN)

    @property
    def place(self) -> Path:
        """Where its predictor is, in the folder of an evaluation."""
        return Path(self.task, self.name.replace(" ", "-"))


_LATER: Final = {
    option: f"secondary_structure_2022-12/{name}.fasta"
    for option, name in (("data", "sequences"), ("labels", "sampled"), ("mask", "mask"))
}
_HARD: Final = (("mixed_hard", {"data": "scl/mixed_hard.csv"}), ("mixed_hard", {"data": "scl/setHARD.fasta"}))
SPLITS: Final = (
    Benchmark("secondary_structure", "sampled", further=(("sampled", _LATER),)),
    Benchmark("conservation", "sampled"),
    Benchmark("gb1", "two_vs_rest"),
    Benchmark("gb1", "sampled", {"data": "gb1/sampled.fasta"}),
    Benchmark("gb1", "three_vs_rest", {"data": "gb1/three_vs_rest.fasta"}),
    Benchmark("scl", "mixed_soft", further=_HARD),
    Benchmark("scl", f"{_STAND_IN}mixed_soft", further=[(f"{_STAND_IN}{name}", files) for name, files in _HARD]),
    Benchmark("meltome", "mixed_split"),
    Benchmark("meltome", "clustered_task_2021", {"data": "meltome/clustered_task_2021.csv"}),
)
"""All splits that are looked for."""


@dataclass(frozen=True, kw_only=True)
class FlipRun:
    """An evaluation: the folder with FLIP's files, the folder of the results, and options.

    ``limit`` is the number of training examples, for a quick look. ``options`` are those of ``protea finetune`` that
    take the place of a recipe's: model, method, dtype, device, token_budget.
    """

    folder: Path
    output: Path
    tasks: Sequence[str] = ()
    limit: int | None = None
    options: Mapping[str, Any]
    overwrite: bool = False
    progress: Progress = SILENT

    def __call__(self) -> pa.Table:
        """Train what is not trained yet, and write and return the table.

        The table is written after each split, so that an interrupted evaluation has what is finished.

        Raises:
            DataError: the folder has none of the tasks.
        """
        check_output(self.output, overwrite=True, ours=_is_ours)
        chosen = self.check()
        self._begin()
        rows: list[dict[str, Any]] = []
        for split, values in chosen:
            rows += self._split(split, values)
            write_table(self.output / TABLE, table := _table(rows))
            return_freed_memory()
        return table

    def check(self) -> list[tuple[Benchmark, dict[str, Any]]]:
        """The splits that the folder has, each with the options of its recipe; a ``DataError`` if there are none."""
        if unknown := [name for name in self.tasks if name not in NUMBERS]:
            raise UsageError(f"--task {unknown[0]}: unknown task; use {', '.join(NUMBERS)}")
        if not self.folder.is_dir():
            raise DataError(
                f"{self.folder}: {'is not a folder' if self.folder.exists() else 'no such folder'}; {SOURCE}"
            )
        return self._chosen()

    def _begin(self) -> None:
        """Make the folder, or check that an older evaluation there had the same options."""
        table = self.output / TABLE
        wanted = {"command": "evaluate flip", **self.options, "limit": self.limit}
        if run_path(table).exists() and not self.overwrite:
            check_same(self.output, read_run(table), wanted, REFUSED)
        self.output.mkdir(exist_ok=True)
        write_run(table, wanted)

    def _chosen(self) -> list[tuple[Benchmark, dict[str, Any]]]:
        """The splits for ``check``; absent ones are told."""
        found, absent = [], []
        for split in SPLITS:
            if self.tasks and split.task not in self.tasks and not self._is_finished(split):
                continue
            values = flip_data.read_recipe(f"flip/{split.task}")
            if split.files is not None:
                values = {name: value for name, value in values.items() if name not in FILES} | dict(split.files)
            if split.stands_in:
                has = flip_data.can_stand_in(self.folder) and not flip_data.find(self.folder, values["data"])
            else:
                has = all(flip_data.find(self.folder, values[name]) for name in FILES if name in values)
            if has:
                found.append((split, values))
            elif not split.stands_in:
                absent.append((split, values["data"]))
        if not found:
            names = ", ".join(name for _, name in absent)
            raise DataError(f"{self.folder}: nothing of FLIP is here; looked for {names}; {SOURCE}")
        with_splits = {split.task for split, _ in found}
        for task in dict.fromkeys(split.task for split, _ in absent):
            names = ", ".join(name for split, name in absent if split.task == task)
            what = (
                f"{task}: not in {self.folder} and left out: {names}"
                if task in with_splits
                else (f"{task}: skipped; {self.folder} has no {names}; {SOURCE}")
            )
            self.progress.note(what)
        return found

    def _folder(self, split: Benchmark) -> Path:
        return self.output / split.place

    def _is_finished(self, split: Benchmark) -> bool:
        """Whether the table has a split already, which stays there whatever tasks are asked for now."""
        return not self.overwrite and (self._folder(split) / RUN).is_file()

    def _split(self, split: Benchmark, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Train on one split, and give the rows of the table."""
        folder = self._folder(split)
        folder.parent.mkdir(exist_ok=True)
        self.progress.note(f"{split.task}, {split.name}: {folder}")
        prepared = folder.with_name(f"{folder.name}.csv")
        if split.stands_in:
            flip_data.stand_in(self.folder, prepared, self.limit, self.progress)
            values["data"] = str(prepared)
        else:
            values = flip_data.located(values, self.folder)
        data = flip_data.read(values)
        whole = len(data.part("train").examples)
        if self.limit is not None and not split.stands_in:
            data = flip_data.limited(data, self.limit)
            flip_data.write_labelled(prepared, data, {"limit": self.limit})
            values = {name: value for name, value in values.items() if name not in FILES} | {"data": str(prepared)}
        method = self.options.get("method", "frozen")
        if method != "frozen":
            values["epochs"], values["batch"] = _TUNED[split.task][method]
        settings = parse(values | dict(self.options) | {"output": folder}, f"{split.task}, {split.name}")
        try:
            for note in finetune(settings, overwrite=self.overwrite, progress=self.progress).measured.notes:
                self.progress.note(note)
        except FinishedError as finished:
            self.progress.note(str(finished))
        sets = [(split.name, data, read_table(folder / "metrics.tsv"))]
        sets += list(self._further(split, folder, data))
        trained = len(data.part("train").examples)
        notes = []
        if self.limit is not None:
            of = "" if split.stands_in else f" of {whole:,}"
            notes.append(f"TRAINED ON {trained:,}{of} EXAMPLES (--limit {self.limit})")
        if not data.part("validation").examples:
            notes.append("the validation part is drawn from the training set")
        if split.stands_in:
            notes.append(
                f"the training set is a stand-in: {counted(trained, 'protein')} of DeepLoc 2, under "
                f"{flip_data.IDENTITY:.0%} identical to what is measured"
            )
        known = read_table(PUBLISHED).to_pylist()
        model = {"model": settings.model, "method": method}
        for name, of_set, metrics in sets:
            counts = {part: len(of_set.part(part).examples) for part in ("train", "validation", "test")}
            for number in NUMBERS[split.task]:
                row = {"task": split.task, "split": name, **counts, "number": number, **model}
                yield from _beside(row | _ours(metrics, number), known, notes)

    def _further(self, split: Benchmark, folder: Path, data: Labelled) -> Iterator[tuple[str, Labelled, pa.Table]]:
        """The further test sets of a split: name, data, and the numbers of all methods, which are kept in a file."""
        load = ModelLoader(self.options.get("device", "auto"), self.options.get("dtype", "float32"))
        given = {name: self.options.get(name) for name in ("model", "token_budget")}
        sets = FurtherSets(folder=folder, load=load, progress=self.progress, **given)
        done = set()
        for name, files in split.further:
            if name in done or not all(flip_data.find(self.folder, file) for file in files.values()):
                continue
            done.add(name)
            values = flip_data.located(files, self.folder)
            if split.task == "scl":
                test = flip_data.in_ten_classes(flip_data.read(values | {"task": "sequence-class"}), "test")
            else:
                test = flip_data.read(values | {"task": data.task.name})
            self.progress.note(f"{split.task}, {name}: the same methods on a further test set")
            both = with_test(data, test.part("test"))
            path = folder / f"further-{Path(next(iter(files.values()))).parent.name}-{Path(files['data']).stem}.tsv"
            made_of = {"input": fingerprint([*values["data"], *(values[name] for name in FILES[1:] if name in values)])}
            yield name, both, sets.numbers(path, both, made_of)
        if done:
            for note in sets.notes():
                self.progress.note(note)


def _is_ours(path: Path) -> bool:
    return path.is_dir() and all(
        item.name in NUMBERS or item.name.lstrip(".").startswith(TABLE) for item in path.iterdir()
    )


# ---- the table ----
def _ours(metrics: pa.Table, number: str) -> dict[str, Any]:
    """The predictor's number on the test part with its interval, and the best baseline."""
    rows = [row for row in metrics.to_pylist() if row["number"] == number and row["part"] == "test"]
    values = {row["method"]: float(row["value"]) for row in rows if row["value"] not in ("", "nan")}
    ours = next(row for row in rows if row["method"] == OURS)
    others = {name: value for name, value in values.items() if name != OURS}
    best = (min if number in _LOWER_IS_BETTER else max)(others, key=others.__getitem__, default="")
    ends = {end: float(ours[end]) if ours[end] else None for end in ("low", "high")}
    return {"value": values.get(OURS), **ends, "baseline": best, "baseline_value": others.get(best)}


def _beside(row: dict[str, Any], known: Sequence[Mapping[str, str]], notes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Our row once for each source of published figures of the task and number; once alone if there is none."""
    fitting = [other for other in known if (other["task"], other["number"]) == (row["task"], row["number"])]
    if not fitting:
        yield row | {"source": "", "differs": "; ".join(notes)}
    for other in fitting:
        differs = list(notes)
        if other["split"] != row["split"].removeprefix(_STAND_IN):
            differs.append(f"split {other['split']}")
        differs += [
            f"{noun} of {int(other[part]):,}"
            for part, noun in (("test", "test set"), ("train", "training set"), ("validation", "validation set"))
            if other[part] and int(other[part]) != row[part]
        ]
        differs += [other["differs"]] if other["differs"] else []
        models = {name: float(value) if value else None for name, value in other.items() if name in models_of(known)}
        yield row | {"source": other["source"], "differs": "; ".join(differs) or "same", **models}


def figures(row: Mapping[str, Any]) -> str:
    """The published figures of a row of the table, as in ``650M 0.855, 3B 0.861``."""
    names = models_of([row])
    return ", ".join(f"{name} {row[name]:g}" for name in names if row[name] is not None)


def models_of(known: Sequence[Mapping[str, str]]) -> list[str]:
    """The columns of published figures that are models."""
    return [name for name in known[0] if name not in _NO_MODELS]


def _table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """The rows as a table; a model that no row has is an empty column."""
    names = dict.fromkeys(name for row in rows for name in row)
    order = [*(name for name in names if name not in ("source", "differs")), "source", "differs"]
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in order})
