"""``protea finetune`` and ``protea predict``: from labelled sequences to a predictor, and its predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli import options
from protea.cli.interrupt import interruptible
from protea.cli.options import FASTA, Device, Dtype, Fast, Model, Overwrite, TokenBudget, loader
from protea.cli.scattered import check_shares, on_ray
from protea.cli.terminal import bars, show_table, tell
from protea.errors import UsageError
from protea.text import counted

if TYPE_CHECKING:
    from protea.embed.survey import Totals
    from protea.finetune.measuring import Measurements
    from protea.finetune.tasks import Task
    from protea.progress import Progress

_DATA = typer.Argument(
    metavar="DATA...",
    help="Labelled sequences: FASTA with TARGET= and SET= in its headers, or a table: .csv, .tsv, .parquet.",
    show_default=False,
)
_SHOWN = 4  # numbers of each method in the table


@options.options_of(options.columns, options.letters, options.computing)
def finetune(
    ctx: typer.Context,
    data: Annotated[list[str] | None, _DATA] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="RUN", help="Folder that receives the predictor.")
    ] = None,
    model: Model = bundled.NAME,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="residue-class, residue-value, sequence-class, sequence-value, multilabel, pair-class, pair-value; "
            "auto finds it in the data.",
        ),
    ] = "auto",
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="frozen (a head on the model as it is), lora, or full (all weights are trained)."
        ),
    ] = "frozen",
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="linear, mlp, cnn (residues), light-attention (sequences), hf (as in transformers); default by task.",
        ),
    ] = None,
    layer: Annotated[
        str, typer.Option(metavar="N", help="Layer that the head reads: -1 is the last; auto tries all (frozen).")
    ] = "-1",
    pool: Annotated[
        str, typer.Option(metavar="NAME", help="Vector of a sequence: mean, max, std (over residues), or bos.")
    ] = "mean",
    split: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="given (in the data), random, cluster:0.3 (by identity), kfold:5, cluster-kfold:5:0.3; nested:5:4 and "
            "cluster-nested:5:4:0.3 choose --layer auto or --lr on inner folds.",
        ),
    ] = "given",
    labels: Annotated[
        Path | None, typer.Option(metavar="FASTA", help="Labels of residues, with the ids of DATA.")
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(metavar="FASTA", help="0 for residues whose label does not count, else 1.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of labels; several by comma are labels of 0 and 1.")
    ] = None,
    set_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of train, validation, test.")] = None,
    lr: Annotated[
        str | None,
        typer.Option(metavar="RATES", help="Learning rate of the encoder; of several by comma the best is kept."),
    ] = None,
    head_lr: Annotated[float, typer.Option(metavar="RATE", help="Learning rate of the head.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Weight decay of AdamW.")] = 0.01,
    epochs: Annotated[
        float | None, typer.Option(metavar="N", help="Most passes over the training part; training may stop earlier.")
    ] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Examples of an update.")] = None,
    patience: Annotated[
        float | None, typer.Option(metavar="N", help="Epochs without a better validation, after which training stops.")
    ] = None,
    hidden: Annotated[int, typer.Option(metavar="N", help="Width of the head's hidden layer.")] = 32,
    dropout: Annotated[float, typer.Option(metavar="X", help="Dropout in the head.")] = 0.25,
    rank: Annotated[int, typer.Option(metavar="N", help="Rank of LoRA's matrices.")] = 8,
    lora_alpha: Annotated[int, typer.Option(metavar="N", help="Scale of LoRA's matrices: alpha / rank.")] = 16,
    dora: Annotated[bool, typer.Option("--dora", help="Train DoRA's magnitudes too.")] = False,
    layer_decay: Annotated[
        float, typer.Option(metavar="X", help="Factor on the learning rate from a layer to the one below (full).")
    ] = 1.0,
    recompute: Annotated[bool, typer.Option("--recompute", help="Save memory: compute activations twice.")] = False,
    class_weights: Annotated[bool, typer.Option("--class-weights", help="Give rare classes more weight.")] = False,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of splits and of training.")] = 0,
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Trainings with seeds SEED, SEED+1, ...; keeps the best.")
    ] = 1,
    calibration: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of the validation part that calibrates only; default: half or less."),
    ] = None,
    coverage: Annotated[
        float, typer.Option(metavar="SHARE", help="How often intervals and sets shall hold the truth.")
    ] = 0.9,
    baselines: Annotated[bool, typer.Option(help="Measure baselines beside the predictor.")] = True,
    long: Annotated[
        str,
        typer.Option(metavar="POLICY", help="What to do with a long sequence: truncate, window (frozen), full, error."),
    ] = "truncate",
    dtype: Dtype = "float32",
    fast: Fast = False,
    precision: Annotated[
        str, typer.Option(metavar="TYPE", help="Training of lora and full: auto, float32, bf16-mixed.")
    ] = "auto",
    device: Device = "auto",
    token_budget: TokenBudget = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="YAML", help="Read options from a file, or a recipe such as flip/gb1; flags override them."
        ),
    ] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the files that the config names; .fasta or .csv, also .gz."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder and drop an unfinished run.")
    ] = False,
    **_reading: Any,
) -> None:
    """Train a predictor on labelled sequences and measure it beside baselines.

    The folder RUN holds the predictor, its numbers on the test part with intervals, and its predictions. After an
    interruption the same command continues.

    \b
    Examples:
      protea finetune stability.csv -m esm2_t6_8M_UR50D -o stability/
      protea finetune sequences.fasta --labels labels.fasta --mask mask.fasta -o structure/ --head cnn
      protea finetune scan.csv --target-column fitness --split random -o scan/ --layer auto
      protea finetune proteins.csv -o location/ --split cluster:0.3 --method lora --seeds 3
      protea finetune proteins.csv -o location/ --method lora --head hf
      protea finetune --config flip/gb1 --data-folder FLIP/ -m esm2_t6_8M_UR50D -o gb1/
    """
    from protea.finetune.finetune_settings import parse
    from protea.finetune.finetuning import finetune as run
    from protea.finetune.flip_data import located, read_recipe
    from protea.infer.loading import computing_dtype

    values: dict[str, Any] = {} if config is None else read_recipe(config)
    if data_folder is not None:
        if config is None:
            raise UsageError(f"--data-folder {data_folder}: is for the files that --config names; give DATA in full")
        values = located(values, data_folder)
    given = {name: value for name, value in ctx.params.items() if name not in ("config", "data_folder", "overwrite")}
    given = {name: value for name, value in given.items() if options.is_given(ctx, name)}
    settings = parse(values | given, "protea finetune" if config is None else f"--config {config}", given)
    computed = computing_dtype(settings.device, settings.dtype, fast=settings.fast)
    settings = settings.model_copy(update={"dtype": computed, "fast": False})
    with interruptible(), bars() as progress:
        finished = run(settings, overwrite=overwrite, progress=progress)
    for note in finished.measured.notes:
        if note not in finished.told:
            tell(note)
    predicted, first = finished.predictor.task, finished.folders[0]
    _show(finished.measured, predicted, folds=len(finished.folders))
    page = finished.output / "report.html"
    typer.echo(f"{finished.output}: {predicted.name}; read {page}, predict with `protea predict {first}`")


def _show(finished: Measurements, task: Task, *, folds: int) -> None:
    """The first numbers of each method on the shown part."""
    from protea.finetune.measures import SELECTED, measures

    names = list(dict.fromkeys((SELECTED[task.name][0], *measures(task))))[:_SHOWN]
    cells: dict[str, dict[str, str]] = {}
    for row in finished.metrics.to_pylist():
        if row["part"] == finished.part and row["number"] in names:
            low, high = row["low"], row["high"]
            interval = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
            value = "-" if row["value"] is None or row["value"] != row["value"] else f"{row['value']:.3f}{interval}"
            cells.setdefault(row["method"], {})[row["number"]] = value
    show_table(("method", *names), [(method, *(of[name] for name in names)) for method, of in cells.items()])
    brackets = "95 % intervals" if folds == 1 else f"lowest and highest of {folds} folds"
    typer.echo(f"{finished.part} part, {counted(finished.examples, 'example')}; {brackets} in parentheses")


@options.options_of(options.columns, options.letters, options.computing)
def predict(
    ctx: typer.Context,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that `protea finetune`, transformers or peft wrote.")
    ],
    inputs: Annotated[list[str], FASTA],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Table of predictions: .parquet, .csv, .tsv or .h5.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="The base model, if it is not where it was, or an adapter names none; not for --method full.",
        ),
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="Policy for long sequences: truncate, window, full or error; by default that of training.",
        ),
    ] = None,
    duplicates: Annotated[
        str, typer.Option(metavar="POLICY", help="What to do with a repeated id: error, rename, skip.")
    ] = "error",
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    token_budget: TokenBudget = None,
    shard: options.Shard = None,
    ray: options.Ray = None,
    shards: options.Shards = None,
    cpus_per_shard: options.CpusPerShard = 1,
    overwrite: Overwrite = False,
    **reading: Any,
) -> None:
    """Predict with a trained predictor: one row per sequence, or per residue.

    RUN is a folder of `protea finetune`, of transformers' EsmForSequenceClassification or EsmForTokenClassification, or
    of a peft adapter of one of them.

    After an interruption the same command continues. OUT.report.tsv lists every record that was truncated, altered,
    renamed or skipped.

    \b
    Examples:
      protea predict stability/ proteins.fasta -o predicted.csv
      protea predict structure/ proteins.fasta.gz -o residues.parquet --fast
      protea predict peft-adapter/ proteins.fasta -o predicted.csv -m esm2_t6_8M_UR50D
      protea predict stability/ big.fasta.gz -o predicted.parquet --ray auto --shards 64
    """
    from protea.finetune.predictions import predict as compute

    part = check_shares(ctx, output)
    values = {"inputs": inputs, "sequences": output, "duplicates": duplicates, "token_budget": token_budget}
    values |= {"dtype": dtype, "fast": fast, "device": device, "shard": part}
    policies = reading | {"long": long}  # as in training, unless they are given
    values |= {name: policies[name] for name in policies if options.is_given(ctx, name)}
    load = loader(device=device, dtype=dtype, fast=fast)
    with interruptible(), bars("residues") as progress:
        whole = partial(compute, run, values, load=load, base=model, overwrite=overwrite, progress=progress)
        if ray is None:
            totals, was_complete = whole()
        else:
            totals, was_complete = _on_ray(
                ctx, output, [*inputs, str(run), *([model] if model else [])], whole, progress
            )
    output = output if part is None else part.output(output)
    typer.echo(f"{output}: {counted(totals.embedded, 'sequence')}, {counted(totals.residues, 'residue')}")
    altered = {name: getattr(totals, name) for name in ("truncated", "windowed", "altered", "renamed", "skipped")}
    told = [f"{count:,} {what}" for what, count in altered.items() if count]
    if told and not was_complete:
        tell(f"{', '.join(told)}: see {output}.report.tsv")


def _on_ray(
    ctx: typer.Context, output: Path, files: list[str], whole: Callable[[], tuple[Totals, bool]], progress: Progress
) -> tuple[Totals, bool]:
    from protea.embed.sharded import computed_residues
    from protea.finetune.sharded_predictions import merge_predictions

    def join(output: Path, shards: list[Path], overwrite: bool) -> tuple[Totals, bool]:
        told = {"sequences": str(output)}  # the shards were written elsewhere
        return merge_predictions(output, shards, overwrite=overwrite, settings=told, progress=progress), False

    return on_ray(ctx, output, files, progress, finished=whole, join=join, title="predicting", done=computed_residues)
