"""Every option and every key of a recipe that a text names exists, in the command that the text is about.

Texts are the strings in ``src``, which includes all help, and the lines of the pages.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from protea import cli
from protea.train.recipe import Recipe
from test_structure import MODULES, ROOT, imported, parse

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?![\w-])")
COMMAND = re.compile(r"\bprotea ((?:data|evaluate) [a-z]+|[a-z][a-z-]+)")
KEY = re.compile(r"(?<![\w./`-])`?([a-z]+)\.([a-z_]+)(?==|`| (?:and|or|to)\b|[,;)]|$)")

FOREIGN = {
    *("--min-seq-id", "--alignment-mode", "--max-seqs", "--cov-mode", "--dbtype", "--format-output"),  # MMseqs2
    *("--index-url", "--python", "--editable", "--force-reinstall"),  # pip
    "--cpus",  # Docker
    *("--data-binary", "--silent", "--retry", "--retry-delay", "--retry-connrefused"),  # curl
    *("--target", "--force", "--as-needed"),  # of the linker, and of the program that builds the native library
    *("--array", "--wrap"),  # sbatch
    *("--nproc-per-node", "--max-restarts", "--standalone"),  # torchrun
    *("--no-index", "--find-links"),  # pip
    "--local-dir",  # hf
    *("--include", "--nogpu"),  # esm-extract
    *("--model-location", "--sequence", "--scoring-strategy"),  # fair-esm's scripts
    *("--install-completion", "--show-completion"),  # protea itself
    *("--checkpoint-path", "--data-path", "--results-path", "--include-embeddings", "--include-hiddens"),  # BioNeMo 2
    *("--train-cluster-path", "--train-database-path"),
    "--logdir",  # tensorboard
    "--version",  # of compilers, and of protea itself
    *("--page", "--ink", "--faint", "--rule", "--one", "--two", "--bar"),  # colours of pages
}
"""Options of other programs."""

NEVER_SHOWN = {
    ("protea.checkpoints.formats", "--to"): (  # they write no model
        "average, check, compare, contacts, embed, evaluate contacts, evaluate flip, evaluate proteingym, finetune, "
        "fit-contacts, info, init, merge, perplexity, predict, pretrain, score"
    ),
    ("protea.finetune.export", "--head"): "export",  # it says what another run needs
    ("protea.cli.doctor", "--fast"): "doctor",  # it says what the option does in other commands
    ("protea.doctor", "--fast"): "doctor",
    ("protea.finetune.features", "--overwrite"): "export",
    ("protea.finetune.applicable", "--head-lr"): "compare, evaluate flip",
    ("protea.finetune.applicable", "--head"): "compare, evaluate flip",
    ("protea.finetune.finetuning", "--rank"): "compare, evaluate flip",
    ("protea.finetune.finetune_settings", "--epochs"): "compare, evaluate flip",
    ("protea.finetune.labels", "--task"): "predict",
    ("protea.finetune.finetune_settings", "--head"): "compare, evaluate flip",
    ("protea.finetune.finetune_settings", "--head-lr"): "compare, evaluate flip",
    ("protea.embed.run", "--store"): "predict",
    ("protea.finetune.tuning", "--lr"): "compare, evaluate flip",
    ("protea.train.run_folder", "--accept-changes"): "evaluate flip, finetune",
    ("protea.train.objective", "--accept-changes"): "evaluate flip, finetune",
    ("protea.finetune.tuning", "--token-budget"): "compare",  # frozen models are not tuned
    ("protea.finetune.tuning", "--recompute"): "compare, evaluate flip",
    ("protea.finetune.tunable", "--precision"): "compare, evaluate flip",
    ("protea.finetune.splits", "--split"): "compare, evaluate flip",
    ("protea.finetune.finetuning", "--split"): "compare, evaluate flip",
    ("protea.finetune.labelled_data", "--labels"): "compare, evaluate flip, predict",
    ("protea.finetune.label_fasta", "--labels"): "compare, evaluate flip, predict",
    ("protea.embed.run", "--update"): "predict",
    ("protea.data.build", "--absent"): "evaluate flip, finetune, pretrain, data fasta",  # they read no list of members
    ("protea.data.build", "--empty"): "evaluate flip, finetune, pretrain, data fasta",  # their clusters have members
    (
        "protea.data.build",
        "--valid",
    ): "evaluate flip, finetune, pretrain, data import",  # the default leaves clusters, or nothing is drawn
    ("protea.data.build", "--test"): "evaluate flip, finetune, pretrain, data import",
    ("protea.data.from_fasta", "--members"): "evaluate flip, finetune, pretrain, data fasta, data import",
    ("protea.embed.outputs", "--store"): "predict, merge",  # shards have their type
    (
        "protea.embed.prepare",
        "--duplicates",
    ): "compare, evaluate flip, finetune, merge, perplexity, export",  # by id
    ("protea.embed.finished", "--update"): "predict, merge",
    ("protea.embed.settings", "--dtype"): "predict, merge",
    ("protea.embed.settings", "--logits"): "predict, merge",
    ("protea.embed.settings", "--fast"): "predict, merge",
    ("protea.journal", "--overwrite"): (  # they use only the wording, the differences and the lock
        "pretrain, info, init, fit-contacts, convert, check, export, average"
    ),
    (
        "protea.rerun",
        "--overwrite",
    ): "info, check, init, fit-contacts, convert, export, average, pretrain",  # no pictures
    ("protea.letters", "--unknown"): (  # they write rows of reports only, or say whose option it is
        "info, init, merge, fit-contacts, convert, check, compare, pretrain, export, average, data info, "
        "evaluate contacts, evaluate proteingym, evaluate flip"
    ),
    ("protea.output", "--overwrite"): (  # they use other functions of the module
        "info, init, fit-contacts, convert, check, pretrain, export, average, data info"
    ),
    ("protea.plan.hardware", "--nodes"): "pretrain",  # it finds the GPU by the device's name
    (
        "protea.score.variant_table",
        "--column",
    ): "compare, evaluate proteingym, merge",  # its tables have the columns that it needs
}
"""Commands that import a module, but never show its message with an option."""

PLANS = {"plan embed", "plan finetune", "plan pretrain"}
OF_FILES = {
    *("protea.checkpoints.formats", "protea.data.build", "protea.data.from_fasta", "protea.embed.finished"),
    "protea.embed.outputs",
    *("protea.embed.prepare", "protea.embed.run", "protea.embed.settings", "protea.journal", "protea.letters"),
    *("protea.output", "protea.rerun", "protea.train.loop", "protea.train.objective", "protea.train.run_folder"),
}
"""Modules whose messages with options are about a user's files and runs; plans measure sequences of their own."""


def leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands below a command, each with what is typed after ``protea``."""
    if not hasattr(command, "commands"):
        yield name, command
    for part, below in getattr(command, "commands", {}).items():
        yield from leaves(below, f"{name} {part}".strip())


LEAVES = dict(leaves(typer.main.get_command(cli.application(None)), ""))
OPTIONS = {
    name: {
        "--help",
        *(option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)),
    }
    for name, command in LEAVES.items()
}
SUFFIXES = {"csv", "json", "jsonl", "md", "npz", "parquet", "pkl", "txt", "yaml"}
SECTIONS = {
    name: set(field.annotation.model_fields)  # type: ignore[union-attr]
    for name, field in Recipe.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}
FUNCTIONS = {
    (module, node.name): node
    for module, path in MODULES.items()
    if module.startswith("protea.cli")
    for node in ast.walk(parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}
IMPORTS = {name: imported(path.read_text(), name.rpartition(".")[0]) for name, path in MODULES.items()}


@cache
def reached(command: str) -> set[str]:
    """The modules whose code a command may run: those that its functions import, and what these import."""
    callback = LEAVES[command].callback
    todo, functions = [(callback.__module__, callback.__name__)], set()
    modules: list[str] = []
    while todo:
        place = todo.pop()
        if place in functions:
            continue
        functions.add(place)
        node = FUNCTIONS[place]
        modules += imported(ast.unparse(node), "protea.cli")
        used = {getattr(part, "id", getattr(part, "attr", "")) for part in ast.walk(node)}
        shared = [(module, name) for module, name in FUNCTIONS if name in used and (place[0], name) not in FUNCTIONS]
        todo += [*((place[0], name) for name in used if (place[0], name) in FUNCTIONS), *shared]
    everything: set[str] = set()
    while modules:
        name = modules.pop()
        if name not in everything and not name.startswith("protea.cli"):
            everything.add(name)
            modules += IMPORTS[name]
    return everything


def texts(source: str, *, docstrings: bool) -> Iterator[str]:
    """The strings in a file, f-strings with ``{}`` for values; docstrings are shown by commands alone."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    if not docstrings:
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        statements = [statement for body in bodies for statement in body if isinstance(statement, ast.Expr)]
        parts |= {id(statement.value) for statement in statements}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def code_before(line: str, place: int) -> str:
    """The code that a place in a line belongs to, from its beginning: between backticks, or the whole line."""
    before = line[:place]
    if before.count("`") % 2:
        return before.rpartition("`")[2]
    return before if before.lstrip().startswith(("$ protea ", "protea ")) else ""


def without(text: str, shown_by: set[str], never: dict[str, set[str]] | None = None) -> set[str]:
    """The options in a text that do not exist where it is shown, each with the commands that lack it.

    Code that names a command is about that command. A message that begins with an option is for a user who gave it: one
    command must have it. Any other option must be in all commands that show the text.
    """
    wrong = set()
    for line in text.splitlines():
        for match in OPTION.finditer(line):
            option, named = match.group(), COMMAND.findall(code_before(line, match.start()))
            meant = {name for name in OPTIONS if named and (name == named[-1] or name.startswith(f"{named[-1]} "))}
            commands = meant or shown_by - (never or {}).get(option, set())
            lacking = {name for name in commands if option not in OPTIONS[name]}
            one_suffices = bool(meant) or shown_by == OPTIONS.keys() or text.lstrip().startswith("--")
            if option not in FOREIGN and lacking and (lacking == commands or not one_suffices):
                wrong.add(f"{option}: {', '.join(sorted(lacking))}")
    return wrong


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_MODULES = sorted({f"protea.cli.{module}" for module in cli.COMMANDS.values()})


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_options_in_pages(path: Path) -> None:
    everywhere = set().union(*OPTIONS.values())
    scripts = "".join(script.read_text() for script in sorted((ROOT / "benchmarks").glob("*.py")))
    for line in path.read_text(encoding="utf-8").splitlines():
        for match in OPTION.finditer(line):
            named = [name for name in COMMAND.findall(code_before(line, match.start())) if name in OPTIONS]
            known = set(OPTION.findall(scripts)) if "benchmarks/" in line else FOREIGN
            known = known | (OPTIONS[named[-1]] if named else everywhere)
            assert match.group() in known, line


@pytest.mark.parametrize("module", COMMAND_MODULES)
def test_options_in_commands(module: str) -> None:
    """A command's help and messages name its own options, or those of its module."""
    commands = {name for name, command in LEAVES.items() if command.callback.__module__ == module}
    assert commands
    own = set().union(*(OPTIONS[name] for name in commands))
    for text in texts(MODULES[module].read_text(), docstrings=True):
        assert not {problem for problem in without(text, commands) if problem.partition(":")[0] not in own}, text


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith("protea.cli")])
def test_options_in_messages(module: str) -> None:
    """Below the command line, an option in a message exists in every command that may show the message."""
    commands = {name for name in OPTIONS if module in reached(name)} or set(OPTIONS)
    commands -= PLANS if module in OF_FILES else set()
    # What a service answers has no options; whoever starts it reads what its own modules say.
    if commands != set(OPTIONS) and not module.startswith("protea.serve"):
        commands -= {"serve"}
    never = {option: set(names.split(", ")) for (place, option), names in NEVER_SHOWN.items() if place == module}
    for text in texts(MODULES[module].read_text(), docstrings=False):
        assert not without(text, commands, never), text


@pytest.mark.parametrize("text", ["use --device cpu", "pass --overwrite", "`protea data fasta --valdi 3`", "--mmseqs"])
def test_a_wrong_option_is_seen(text: str) -> None:
    assert without(text, {"pretrain"})


def test_a_right_option_is_accepted() -> None:
    assert not without("use `protea embed --device cpu`, or run.device=cpu; --accept-changes", {"pretrain"})
    assert not without("--count 3: too few", {"fit-contacts", "check"})


@pytest.mark.parametrize("path", [*PAGES, *MODULES.values()], ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_of_recipes(path: Path) -> None:
    """``section.key`` in a message or on a page is a key of recipes."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines() if path.suffix == ".md" else texts(source, docstrings=path.parent.name == "cli")
    for line in lines:
        for section, key in KEY.findall(line):
            if section in SECTIONS and key not in SUFFIXES:
                assert key in SECTIONS[section], line
