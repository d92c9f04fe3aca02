"""Runs the steps of one document in order, in a folder of its own, with stand-ins for what a reader brings."""

from __future__ import annotations

import ast
import glob
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Final

import stand_in_files as files
import stand_in_python as python
from commands import Command, made_small, parse, protea_words, tokens
from document_steps import Step, is_script
from not_run import CODES
from stand_in_models import Models, as_any, names_of_models

import protea
from protea.checkpoints.hub import published_models
from protea.cli import main
from protea.train.recipe import recipe_names

ADDRESS: Final = re.compile(r"\b(localhost|127\.0\.0\.1):8000\b")
OUTPUTS: Final = ("output", "sequences", "residues", "logits", "plot", "target")
"""Parameters that name what a command writes."""
CONTINUES: Final = ("--update", "--accept-changes")


class Failed(AssertionError):
    """A step of a document that did not do what it should."""


def run_protea(words: Sequence[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and all that it printed."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["protea", *words]
    try:
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
            main()
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("a command returns by SystemExit")


class Document:
    """The folder of a document, the services that it started, and the names of its Python."""

    def __init__(self, folder: Path, models: Models, programs: Path, steps: Sequence[Step] = ()) -> None:
        self.variants = [name for step in steps for name in re.findall(r" -v (\S+)", step.text)]
        self.folder, self.models, self.programs = folder, models, programs
        self.services: list[tuple[subprocess.Popen[str], int]] = []
        self.names: dict[str, Any] = {}
        self.tables: set[Path] = set()
        self.job = ""

    # --- steps -----------------------------------------------------------------------------------------------------

    def run(self, step: Step) -> None:
        text = self.adapted(step.text)
        for name in names_of_models(text):
            self.models.download(name)
        if step.kind == "python":
            self.run_python(step, text)
        else:
            self.run_line(step, made_small(text))

    def adapted(self, text: str) -> str:
        """The text with the address of the running service, the id of the last job, and no path at the root."""
        if self.services:
            text = ADDRESS.sub(rf"\1:{self.services[-1][1]}", text)
        text = re.sub(r"/jobs/ID\b", f"/jobs/{self.job}", text)
        if "/shared/" in text:
            (self.folder / "shared").mkdir(exist_ok=True)
        return re.sub(r"(?<=[ =])/shared/", "shared/", text)

    def run_line(self, step: Step, text: str) -> None:
        for words in protea_words(text.replace("$SMALL", "")):
            command = parse(words)
            self.drop_outputs(command, text)
            self.bring(command)
        self.bring_named(text)
        if text.startswith("protea serve"):
            self.serve(step, text)
            return
        if text.startswith("protea ") and not re.search(r"[|;<>$&]", text):
            words = [one for word in protea_words(text)[0] for one in (sorted(glob.glob(word)) or [word])]
            code, printed = run_protea(words)
        else:
            code, printed = self.run_shell(text)
        allowed = next((codes for pattern, (codes, _) in CODES.items() if re.search(pattern, text)), (0,))
        if code not in allowed:
            raise Failed(f"{step.place}: $ {step.text}\nrun as: {text}\nexit code {code}\n{printed}")
        if text.startswith("curl") and '"id"' in printed:
            self.job = str(json.loads(printed)["id"])

    def run_shell(self, text: str) -> tuple[int, str]:
        assignment = re.fullmatch(r"(\w+)=(\"[^\"]*\"|'[^']*'|\S+)", text)
        if assignment:  # it is for the lines that follow
            os.environ[assignment[1]] = assignment[2].strip("\"'")
            return 0, ""
        text = re.sub(r"\bcurl ", "curl --silent --show-error --fail-with-body ", text)
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def environment(self) -> dict[str, str]:
        paths = [str(Path(protea.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(self.models.cache), "CUDA_VISIBLE_DEVICES": ""}
        path = f"{self.programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | settings | {"PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def run_python(self, step: Step, text: str) -> None:
        for name in python.names_of_files(text):
            self.bring_file(name)
        if is_script(text) or "transformers" in text or "peft" in text:
            (self.folder / "script_of_the_page.py").write_text(text)
            code, printed = self.run_shell("python script_of_the_page.py")
            if code:
                raise Failed(f"{step.place}: exit code {code}\n{printed}")
            return
        self.names |= python.values_for(text, self.names, self.folder)
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                exec(compile(ast.parse(text), step.place, "exec"), self.names)
        except Exception as error:
            raise Failed(f"{step.place}: {type(error).__name__}: {error}\n{step.text}") from error

    # --- services --------------------------------------------------------------------------------------------------

    def serve(self, step: Step, text: str) -> None:
        """Start a service as the page does, on a free port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        log = (self.folder / f"service-{port}.log").open("w+")
        command = [sys.executable, "-m", *tokens(text), "--port", str(port)]
        service = subprocess.Popen(
            command, cwd=self.folder, env=self.environment(), stdout=log, stderr=subprocess.STDOUT, text=True
        )
        self.services.append((service, port))
        while service.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise Failed(f"{step.place}: $ {step.text}\n{Path(log.name).read_text()}")
        if "--api-key-file" in text:  # requests on the page have no key
            self.stop(*self.services.pop())

    def stop(self, service: subprocess.Popen[str], _: int) -> None:
        service.terminate()
        service.wait(120)

    def close(self) -> None:
        while self.services:
            self.stop(*self.services.pop())
        os.environ.pop("SMALL", None)

    # --- what a reader brings --------------------------------------------------------------------------------------

    def drop_outputs(self, command: Command, text: str) -> None:
        """Remove what an earlier command of the page wrote under the same name, unless this one continues it."""
        if any(option in text for option in CONTINUES) or command.name in {"merge", "serve"}:
            return
        for parameter in OUTPUTS:
            for name in as_any(command.parameters.get(parameter)):
                if not name.replace(".", "").isdigit() and name.strip("./"):
                    remove(self.folder / name)

    def bring(self, command: Command) -> None:
        """Make every input of a command that is not there."""
        for parameter, value in command.parameters.items():
            if parameter in INPUTS:
                for name in as_any(value):
                    path = self.folder / name
                    absent = not path.exists() and not glob.glob(name)
                    if name not in {"", "-"} and (absent or (parameter == "table" and path in self.tables)):
                        INPUTS[parameter](self, path, name, command)

    def bring_named(self, text: str) -> None:
        """Make FASTA files that other programs of a line read."""
        for name in re.findall(r"[\w./-]+\.fasta(?:\.gz)?\b", text):
            if text.startswith(("zcat", "cat", "curl", "grep")) and not (self.folder / name).exists():
                files.fasta(self.folder / name, files.sequences_for(Path(name), ["embed"], self.variants))

    def bring_file(self, name: str) -> None:
        """Make a file that a block of Python reads, by its name."""
        path = self.folder / name
        makers = {
            "proteins.parquet": ["embed", "in.fasta", "-o", name],
            "proteins.csv": ["embed", "in.fasta", "-o", name],
            "proteins.npz": ["embed", "in.fasta", "-o", name],
            "residues.h5": ["embed", "in.fasta", "-r", name],
            "logits.h5": ["embed", "in.fasta", "--logits", name],
            "out/index.csv": ["embed", "in.fasta", "-o", "out", "-m", "esm2_t6_8M_UR50D"],
        }
        if path.exists():
            return
        if name in makers:
            self.models.download("esm2_t6_8M_UR50D")
            files.fasta(self.folder / "in.fasta", files.records(files.SHORT, name="proteins"))
            self.call(self.folder, *makers[name])
        elif name in {"trained.pt", "model.safetensors"}:
            self.models.checkpoint(path)
        elif name == "FOLDER":
            self.models.checkpoint(self.folder / "sharded.nemo2")
            self.call(self.folder, "convert", "sharded.nemo2", name, "--to", "nemo2")
        elif name == "DIR":
            self.models.store(path)
        elif name == "location/":
            self.models.predictor(path)
        elif name in {"structures/", "proteingym/"}:
            (files.structures if name == "structures/" else files.proteingym)(path)

    @staticmethod
    def call(folder: Path, *words: str) -> None:
        """Run ``protea`` in a folder to make a stand-in."""
        before = Path.cwd()
        os.chdir(folder)
        try:
            code, printed = run_protea(words)
        finally:
            os.chdir(before)
        assert code == 0, f"a stand-in could not be made: protea {' '.join(words)}\n{printed}"


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    for file in path.parent.glob(f"{glob.escape(path.name)}*"):
        if file.is_file() and file.name.removeprefix(path.name) in {"", ".report.tsv", ".run.yaml"}:
            file.unlink()


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
        document.models.predictor(path, lora=bool(command.parameters.get("adapter")))


def folder(document: Document, path: Path, name: str, command: Command) -> None:
    del name
    if command.name == "data info":
        document.models.store(path)
    else:
        (files.flip if "flip" in command.name else files.proteingym)(path)


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


MY_RECIPE: Final = """model: {architecture: esm2_t6_8M_UR50D, num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 4,
  intermediate_size: 64}
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
    "structures": lambda document, path, name, command: files.structures(path),
    **dict.fromkeys(("folder", "data_folder", "proteingym", "flip"), folder),
    "adapter": adapters,
    "outputs": shards,
    "recipe": recipe,
    "changes": changes,
    "exclude": excluded,
    "api_key_file": lambda document, path, name, command: path.write_text("group 0123456789abcdef0123\n"),
    **dict.fromkeys(("mapping", "csv", "train_clusters"), imported),
    "uniref50": lambda document, path, name, command: files.uniref50(path),
    "uniref90": lambda document, path, name, command: files.uniref90(path),
    "members": lambda document, path, name, command: files.mapping(path),
}
"""How to make what a parameter names, if it is not there: by the document, the path, the text and the command."""
