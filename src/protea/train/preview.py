"""What a recipe takes, told before anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from protea.errors import TrainingError
from protea.text import bytes_text
from protea.train.division import named_layout
from protea.train.estimate import check_memory, estimate, told_lines
from protea.train.metrics import peak_flops
from protea.train.model import TYPES, architecture, planned_device, settle_precision
from protea.train.recipe import Recipe, read_recipe, recipe_names
from protea.train.run_store import check_data


def dry_run(recipe: Recipe) -> list[str]:
    """What a recipe takes, in lines of text, if all sequences have the full length. Refuses training data as a run."""
    device = planned_device(recipe)
    told = settle_precision(recipe, device)
    peak = peak_flops(recipe.log, device, TYPES[told.run.precision])
    model = architecture(told)
    check_data(told, model.alphabet)
    layout = named_layout(told)
    costs = estimate(model, told, told.data.max_tokens, layout)
    try:
        unknown = f"{told.run.device} is not on this machine: whether the memory suffices is not known"
        memory = unknown if device is None else check_memory(costs, device)
    except TrainingError as error:
        memory = str(error)
    peak = None if peak is None else peak * layout.processes
    processes = [] if layout.processes == 1 else [f"{layout.processes} processes: {layout}; memory of each below"]
    return [f"computes in {told.run.precision}", *processes, *told_lines(model, told, costs, device, peak), memory]


def listing() -> Iterator[str]:
    """The recipes that come with Protea, one per line, with what their models and runs take."""
    row = "{:<18} {:<18} {:>10} {:>10} {:>10}".format
    yield row("recipe", "trains", "parameters", "tokens", "memory")
    for name in recipe_names():
        recipe = read_recipe(name)
        title, size, memory = "what init=MODEL is", "", ""
        if recipe.init is None:
            costs = estimate(architecture(recipe), recipe, recipe.data.max_tokens)
            title, size = recipe.name, f"{costs.parameters / 1e6:,.1f} M"
            memory = bytes_text(costs.memory)
        yield row(name, title, size, f"{recipe.run.steps * recipe.batch.packs * recipe.batch.pack:.2g}", memory)
    yield "All need data.store or data.fasta. The memory is for the model and one pack; a"
    yield "smaller batch.pack needs less. RECIPE --dry-run shows whether a run fits."
