"""``protea plan``: what fits, how long it takes and what it costs, on hardware that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from protea import bundled
from protea.cli import options
from protea.cli.options import AsJson, Commands, Device, Dtype, Fast, Model, loader
from protea.cli.terminal import show_json, show_table
from protea.errors import UsageError
from protea.text import bytes_text, counted, duration_text

if TYPE_CHECKING:
    from protea.plan.hardware import Cluster
    from protea.plan.passes import PassPlan
    from protea.train.plans import PretrainPlan
    from protea.train.recipe import Recipe

_SHOWN = 5  # layouts in the table

plan = typer.Typer(
    name="plan",
    cls=Commands,
    help="Estimate memory, time and price of a run before you rent hardware. It needs no GPU.",
    epilog="docs/planning.md says where the figures come from and how far they can be trusted.",
    rich_markup_mode=None,
)

Gpus = Annotated[
    str | None, typer.Option("--gpus", metavar="NxNAME", help="GPUs, as in 64xH100; see docs/planning.md for names.")
]
Price = Annotated[
    float | None, typer.Option(metavar="X", min=0, max=1e9, help="Price of a GPU for an hour, in any currency.")
]
Residues = Annotated[float, typer.Option(metavar="N", help="Number of residues, as in 1e11.")]
Length = Annotated[
    float, typer.Option("--mean-length", metavar="N", min=1, max=1e6, help="Mean length of the sequences.")
]
Cpus = Annotated[int | None, typer.Option(metavar="N", min=1, help="Number of cores, instead of GPUs.")]


@plan.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _hardware(
    *,
    nodes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Number of machines; by default 8 GPUs are in one.")
    ] = None,
    gpu_tflops: Annotated[
        float | None,
        typer.Option(metavar="X", min=0.001, max=1e9, help="TFLOP/s of bfloat16 of a GPU that is not known."),
    ] = None,
    gpu_memory: Annotated[
        float | None, typer.Option(metavar="GB", min=0.001, max=1e9, help="Memory of a GPU that is not known.")
    ] = None,
    gpu_bandwidth: Annotated[
        float | None,
        typer.Option(metavar="GB/S", min=0.001, max=1e9, help="Memory bandwidth of a GPU that is not known."),
    ] = None,
    network: Annotated[
        float | None, typer.Option(metavar="GB/S", min=0.001, max=1e9, help="Network of each GPU between machines.")
    ] = None,
) -> None:
    """GPUs, and the figures that replace those of data sheets."""


def _cluster(
    gpus: str,
    nodes: int | None,
    gpu_tflops: float | None,
    gpu_memory: float | None,
    gpu_bandwidth: float | None,
    network: float | None,
) -> Cluster:
    from protea.plan.hardware import parse_gpus

    figures = {"flops": gpu_tflops, "memory": gpu_memory, "bandwidth": gpu_bandwidth, "network": network}
    return parse_gpus(gpus, nodes, figures)


@plan.command("pretrain")
@options.options_of(_hardware)
def plan_pretrain(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, as for `protea pretrain`.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change, as in run.steps=100.", show_default=False),
    ] = None,
    gpus: Gpus = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure this machine with a few steps, and tell its time.")
    ] = False,
    price: Price = None,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PICTURE", help="Draw days to train by GPUs: .png, .svg or .html.")
    ] = None,
    **hardware: Any,
) -> None:
    """Plan pre-training by a recipe: memory, layout, time and price on GPUs.

    \b
    Examples:
      protea plan pretrain esm2_650M --gpus 64xH100
      protea plan pretrain esm2_15B --gpus 128xH100 --nodes 16 --price 2.5 --plot days.svg
      protea plan pretrain esm2_3B parallel.replicate=2 parallel.shard=8 --gpus 16xA100 --json
      protea plan pretrain esm2_8M --profile
    """
    from protea.train.recipe import read_recipe

    settings = read_recipe(recipe, changes or [])
    if profile == (gpus is not None):
        raise UsageError("name the hardware: --gpus NxNAME, or --profile for this machine")
    _check_of_gpus(gpus, hardware)
    if gpus is None:
        _profile_training(settings, as_json=as_json)
        return
    from protea.train.plans import card_table, days_by_gpus
    from protea.train.plans import plan_pretrain as planned

    if plot is not None:
        from protea.plot import check_place

        check_place(plot)
    made = planned(settings, _cluster(gpus, **hardware))
    curve = days_by_gpus(settings, made.cluster)
    card = [row._asdict() for row in card_table()]
    rate = made.advised.time.rate
    if as_json:
        shown = {
            "recipe": recipe,
            "gpus": str(made.cluster),
            "label": rate.label,
            "source": rate.source,
            "advised": made.advised.shown(),
            "reason": made.reason,
            "layouts": [one.shown() for one in made.layouts],
            "memory_of_a_pack_in_one_process": {"ours": made.alone, "megatron": made.megatron},
            "price": None if price is None else price * made.advised.shown()["gpu_hours"],
            "days_by_gpus": dict(curve),
            "card": card,
        }
        show_json(shown)
    else:
        _show_pretrain(settings, made, price)
        _show_card(card)
    if plot is not None:
        from protea.plot import days_to_train

        days_to_train(plot, curve, title=f"{settings.name or recipe}: days to train", gpu=made.cluster.gpu.name)


def _show_pretrain(recipe: Recipe, made: PretrainPlan, price: float | None) -> None:
    advised, cluster = made.advised, made.cluster
    steps, tokens = recipe.run.steps, recipe.batch.packs * recipe.batch.pack
    typer.echo(f"{recipe.name}: {advised.costs.parameters:,} parameters, {steps:,} steps of {tokens:,} tokens")
    typer.echo(f"{cluster}: {cluster.gpu.flops / 1e12:g} TFLOP/s and {bytes_text(round(cluster.gpu.memory))} each\n")
    rows = [
        [
            str(one.layout),
            bytes_text(one.costs.memory),
            "yes" if one.fits else "no",
            f"{one.time.tokens_per_second:,.0f}",
            f"{one.time.utilisation:.0%}",
            f"{one.time.seconds / 86400:,.1f}",
            f"{one.time.seconds / 3600 * cluster.gpus:,.0f}",
        ]
        for one in made.layouts[:_SHOWN]
    ]
    show_table(["layout", "memory/GPU", "fits", "tokens/s/GPU", "of peak", "days", "GPU hours"], rows)
    rate = advised.time.rate
    typer.echo(f"\ntokens/s: {rate.label}: {rate.source}")
    told = " ".join(f"parallel.{name}={number}" for name, number in advised.layout._asdict().items())
    typer.echo(f"advice: {told}: {made.reason}")
    step = advised.time.step
    typer.echo(
        f"step: {step.total:.3f} s: {step.compute:.3f} computing, {step.gaps:.3f} gaps of the pipeline, "
        f"{step.traffic:.3f} exposed traffic, {step.machines:.3f} lost between machines"
    )
    if price is not None:
        typer.echo(f"price: {advised.time.seconds / 3600 * cluster.gpus * price:,.0f}")
    typer.echo("\nmemory of a GPU:")
    parts = {**advised.costs.parts, "activations": advised.costs.activations}
    show_table(["part", "bytes"], [[name, bytes_text(size)] for name, size in parts.items()])
    usable = bytes_text(round(cluster.gpu.usable))
    typer.echo(f"of {usable} that tensors may take; in main memory {bytes_text(advised.costs.copies)} for checkpoints")
    typer.echo(
        f"one pack in one process by Megatron's formula: {bytes_text(round(made.megatron))} (18 bytes a parameter, "
        f"34 a token, layer and column); ours: {bytes_text(made.alone)}"
    )


def _show_card(card: list[dict[str, Any]]) -> None:
    typer.echo("\nthe second model card's settings, length 1,024, accumulation 32, in TFLOP/s of each GPU:")
    by_model: dict[str, list[dict[str, Any]]] = {}
    for row in card:
        by_model.setdefault(row["model"], []).append(row)
    cells = [
        [
            *(name, str(rows[0]["sequences"]), str(rows[0]["pipeline"])),
            *(f"{row['tflops']:.0f}" for row in rows),
            rows[0]["label"],
        ]
        for name, rows in by_model.items()
    ]
    columns = [f"{row['gpus']} {row['gpu']}" for row in next(iter(by_model.values()))]
    show_table(["model", "micro-batch", "pipeline", *columns, "rates"], cells)


def _profile_training(recipe: Recipe, *, as_json: bool) -> None:
    from protea.train.timing import training_rate

    rate = training_rate(recipe)
    seconds = recipe.run.steps * recipe.batch.packs * recipe.batch.pack / rate
    if as_json:
        show_json({"tokens_per_second": rate, "seconds": seconds, "label": "measured"})
        return
    typer.echo(f"{recipe.name}: {rate:,.0f} tokens per second on this machine (measured just now)")
    typer.echo(f"{counted(recipe.run.steps, 'step')}: {duration_text(seconds)}")


@plan.command("embed")
@options.options_of(_hardware)
def plan_embed(
    residues: Residues,
    model: Model = bundled.NAME,
    gpus: Gpus = None,
    cpus: Cpus = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure this machine with a short run, and tell its time.")
    ] = False,
    mean_length: Length = 345.0,
    dtype: Dtype = "float32",
    fast: Fast = False,
    device: Device = "auto",
    price: Price = None,
    as_json: AsJson = False,
    **hardware: Any,
) -> None:
    """Plan embedding: time, memory, disk and shards. GPUs are planned with --fast.

    \b
    Examples:
      protea plan embed -m esm2_t33_650M_UR50D --residues 1e11 --gpus 8xA100
      protea plan embed -m esm2_t33_650M_UR50D --residues 1e9 --cpus 64 --fast
      protea plan embed -m esm2_t6_8M_UR50D --residues 1e8 --profile
    """
    from protea.plan import passes

    _check_amount(residues)
    where = _where(gpus, cpus, profile, hardware)
    if not profile and (device, dtype) != ("auto", "float32"):
        option = "--dtype" if device == "auto" else "--device"
        raise UsageError(f"{option} is for --profile; --cpus is planned in float32 or with --fast, --gpus with --fast")
    made = passes.plan_embed(model, residues, where, length=mean_length, fast=fast)
    if profile:
        from protea.plan.measure import embedding_rate

        load = loader(device=device, dtype=dtype, fast=fast)
        made = passes.measured(made, embedding_rate(model, load, length=mean_length))
    _show_passes(made, price, as_json=as_json)


@plan.command("finetune")
@options.options_of(_hardware)
def plan_finetune(
    residues: Residues,
    model: Model = bundled.NAME,
    gpus: Gpus = None,
    cpus: Cpus = None,
    method: Annotated[str, typer.Option(metavar="NAME", help="frozen, lora or full, as for finetune.")] = "full",
    epochs: Annotated[
        float, typer.Option(metavar="N", min=0.01, max=1e6, help="Passes over the training part.")
    ] = 20.0,
    recompute: Annotated[bool, typer.Option("--recompute", help="Save memory: compute activations twice.")] = False,
    mean_length: Length = 345.0,
    price: Price = None,
    as_json: AsJson = False,
    **hardware: Any,
) -> None:
    """Plan the training of a predictor on labelled sequences, whose residues are counted once.

    \b
    Examples:
      protea plan finetune -m esm2_t33_650M_UR50D --residues 3e6 --method lora --gpus A100
      protea plan finetune -m esm2_t36_3B_UR50D --residues 3e6 --method full --gpus H200
    """
    from protea.plan import passes

    _check_amount(residues)
    where = _where(gpus, cpus, False, hardware)
    how: Any = {"method": method, "epochs": epochs, "recompute": recompute}
    made = passes.plan_finetune(model, residues, where, length=mean_length, **how)
    _show_passes(made, price, as_json=as_json, embeds=False)


def _check_amount(residues: float) -> None:
    if not 1 <= residues <= 1e18:
        raise UsageError(f"--residues {residues:g}: expected a number from 1 to 1e18, as in 1e11")


def _where(gpus: str | None, cpus: int | None, profile: bool, hardware: dict[str, Any]) -> Cluster | int:
    if sum((gpus is not None, cpus is not None, profile)) != 1:
        raise UsageError("name the hardware: --gpus NxNAME, --cpus N, or, for embed, --profile for this machine")
    _check_of_gpus(gpus, hardware)
    return _cluster(gpus, **hardware) if gpus is not None else cpus or 1


def _check_of_gpus(gpus: str | None, hardware: dict[str, Any]) -> None:
    """Refuse options that describe GPUs where no GPUs are planned."""
    if gpus is None and (given := [name for name, value in hardware.items() if value is not None]):
        raise UsageError(f"--{given[0].replace('_', '-')} describes --gpus; leave it out, or name the GPUs")


def _show_passes(made: PassPlan, price: float | None, *, as_json: bool, embeds: bool = True) -> None:
    hours = made.seconds * made.workers / 3600
    if as_json:
        show_json(made.shown() | {"price": None if price is None else hours * price})
        return
    utilisation = "" if made.utilisation is None else f", {made.utilisation:.0%} of the peak"
    typer.echo(f"{made.model}: {made.residues:.3g} residues, about {made.sequences:.3g} sequences, on {made.where}")
    typer.echo(
        f"time: {duration_text(made.seconds)}; {hours:,.1f} hours of {'GPUs' if made.available else 'a machine'}"
    )
    typer.echo(f"rate: {made.rate:,.0f} residues/s each{utilisation} ({made.label}: {made.source})")
    if price is not None:
        typer.echo(f"price: {hours * price:,.2f}")
    parts = ", ".join(f"{bytes_text(size)} {name}" for name, size in made.memory.items())
    fits = "" if made.available is None else f" of {bytes_text(round(made.available))}: it fits"
    typer.echo(f"memory: {bytes_text(sum(made.memory.values()))}{fits} ({parts})")
    for name, size in made.disk.items():
        typer.echo(f"disk: {bytes_text(round(size))} for {name}")
    if embeds:
        typer.echo(f"files: one for each output; {made.sequences:.2g} if the output is a folder")
    typer.echo(f"advice: {made.advice}")
