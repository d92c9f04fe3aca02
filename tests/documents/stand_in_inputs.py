"""What commands read, by the parameters of the parser: how to make each input that a page's reader would bring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import stand_in_files as files
from commands import Command

from protea.checkpoints.hub import published_models
from protea.train.recipe import recipe_names

if TYPE_CHECKING:
    from run_document import Document


def absent(path: Path) -> bool:
    """Whether a path, or every file that a pattern means, is not there."""
    return not path.exists() and not ("*" in path.name and any(path.parent.glob(path.name)))


def as_any(value: Any) -> list[str]:
    """The values of a parsed parameter as texts."""
    if value is None or isinstance(value, bool):
        return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def is_known_model(name: str) -> bool:
    return name.removeprefix("facebook/") in published_models()


def model(document: Document, path: Path, name: str, command: Command) -> None:
    if is_known_model(name):
        document.models.download(name.removeprefix("facebook/"))
    elif command.name != "init" and not (command.name == "info" and not name):
        document.models.checkpoint(path)


def sequences(document: Document, path: Path, name: str, command: Command) -> None:
    del name
    single = command.name in {"score", "perplexity"} and command.parameters.get("plot") and "family" not in path.name
    words = [*command.words, "-v"] if single or command.parameters.get("table") else command.words
    files.fasta(path, files.sequences_for(path, words, document.variants))


def labelled(document: Document, path: Path, name: str, command: Command) -> None:
    given = command.parameters
    del document, name
    if given.get("labels"):
        mask = given.get("mask")
        files.labels_of_residues(path, path.parent / given["labels"], path.parent / mask if mask else None)
    else:
        column = given.get("target_column") or "target"
        files.labels(path, column, numbers=column == "fitness" or path.stem in {"stability", "scan"})


def variants(document: Document, path: Path, name: str, command: Command) -> None:
    del name
    given = command.parameters
    document.tables.add(path)
    sequence = files.read_first(document.folder / str(given["proteins"]))
    column = given.get("mutant_column") or ("hgvs_pro" if path.stem == "mavedb" else "mutant")
    files.variants(path, sequence, offset=given.get("offset") or 1, column=column)


def trained(document: Document, path: Path, name: str, command: Command) -> None:
    if command.name == "predict" and name.startswith(("their", "peft")):
        document.models.foreign(path, adapter="adapter" in name)
    elif command.name in {"export", "average"} and path.name.startswith("run"):
        document.models.run(path)
    else:
        document.models.predictor(path, lora=command.name == "export")


def folder(document: Document, path: Path, name: str, command: Command) -> None:
    del name
    if command.name == "data info":
        document.models.store(path)
    else:
        (files.proteingym if command.name == "evaluate proteingym" else files.flip)(path)


def structures(document: Document, path: Path, name: str, command: Command) -> None:
    del document, command
    for part in "abcdefgh" if "*" in name else "a":
        files.structures(path.with_name(path.name.replace("*", f"structure-{part * (ord(part) - 96)}")))


def adapters(document: Document, path: Path, name: str, command: Command) -> None:
    del path
    if command.name == "serve" and not (target := document.folder / name.partition("=")[2]).exists():
        document.models.predictor(target)


def shards(document: Document, path: Path, name: str, command: Command) -> None:
    """Two finished shards of an output."""
    del command
    fasta = path.with_name("in.fasta")
    for old in path.parent.glob(f"{path.stem}.shard-*"):
        old.unlink()
    files.fasta(fasta, files.records(files.SHORT))
    kind = "-r" if name.startswith(("big", "residues")) else "-o"
    for number in (1, 2):
        document.call(path.parent, "embed", fasta.name, kind, path.name, "--shard", f"{number}/2")


def recipe(document: Document, path: Path, name: str, command: Command) -> None:
    del document, command
    if name not in recipe_names():
        path.write_text(MY_RECIPE)
        files.fasta(path.with_name("in.fasta"), files.records(80))


KEY: Final = "0123456789abcdef0123"
"""Of a service that wants one."""

MY_RECIPE: Final = """model: {architecture: esm2_t6_8M_UR50D, num_hidden_layers: 2, hidden_size: 32,
  num_attention_heads: 4, intermediate_size: 64}
data: {fasta: in.fasta, cluster: false}
batch: {tokens: 1024, pack: 1024}
schedule: {warmup: 1}
run: {steps: 2}
"""


def changes(document: Document, path: Path, name: str, command: Command) -> None:
    """What keys of a recipe name: a store, sequences, a model."""
    del path
    key, _, value = name.partition("=")
    target = document.folder / value
    if key == "init":
        model(document, target, value, command)
    elif target.exists():
        return
    elif key == "data.store":
        document.models.store(target)
    elif key == "data.fasta":
        files.fasta(target, files.sequences_for(target, command.words, document.variants))


def excluded(document: Document, path: Path, name: str, command: Command) -> None:
    if name.endswith(".json"):
        document.models.fitted(path)
    else:
        folder_of_structures = document.folder / str(as_any(command.parameters["structures"])[0])
        files.structures(folder_of_structures / f"{name.partition(':')[0]}.pdb")


def imported(document: Document, path: Path, name: str, command: Command) -> None:
    """All sources of ``data import`` at once, since they belong together."""
    del path, name
    given = {key: document.folder / value for key, value in command.parameters.items() if isinstance(value, Path)}
    if "mapping" in given:
        files.mapping(given["mapping"])
        files.uniref50(given["uniref50"])
        files.uniref90(given["uniref90"])
    elif "csv" in given:
        files.bionemo1(given["csv"], given["members_csv"], given["starts"], given["counts"])
    else:
        files.bionemo2(given["train_clusters"], given["valid_clusters"], given["database"])


INPUTS: Final[Mapping[str, Any]] = {
    **dict.fromkeys(("model", "models", "source"), model),
    **dict.fromkeys(("inputs", "proteins"), sequences),
    "data": labelled,
    "table": variants,
    "run": trained,
    "structures": structures,
    **dict.fromkeys(("folder", "data_folder"), folder),
    "compare sequences": sequences,
    "proteingym": lambda document, path, name, command: files.proteingym(path),
    "flip": lambda document, path, name, command: files.flip(path),
    "adapter": adapters,
    "outputs": shards,
    "recipe": recipe,
    "changes": changes,
    "exclude": excluded,
    "api_key_file": lambda document, path, name, command: path.write_text(f"group {KEY}\n"),
    **dict.fromkeys(("mapping", "csv", "train_clusters"), imported),
    "uniref50": lambda document, path, name, command: files.uniref50(path),
    "uniref90": lambda document, path, name, command: files.uniref90(path),
    "members": lambda document, path, name, command: files.mapping(path),
}
"""How to make what a parameter names, if it is not there: by the document, the path, the text and the command."""
