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
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Final

import stand_in_files as files
import stand_in_python as python
from commands import Command, made_small, parse, protea_words, tokens
from document_steps import Step, is_script
from not_run import CODES
from stand_in_inputs import INPUTS, KEY, absent, as_any
from stand_in_models import Models, names_of_models

import protea
from protea.cli import main

ADDRESS: Final = re.compile(r"\b(localhost|127\.0\.0\.1):8000\b")
OUTPUTS: Final = ("output", "sequences", "residues", "logits", "plot", "target")
"""Parameters that name what a command writes."""
CONTINUES: Final = ("--update", "--accept-changes")


class StepError(AssertionError):
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
            text = text.replace("//host:8000", "//localhost:8000").replace('key="..."', f'key="{KEY}"')
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
        # A profile compiles, which imports what warns.
        if text.startswith("protea ") and not re.search(r"[|;<>$&]|--profile", text):
            words = [one for word in protea_words(text)[0] for one in self.expanded(word)]
            code, printed = run_protea(words)
        else:
            code, printed = self.run_shell(text)
        allowed = next((codes for pattern, (codes, _) in CODES.items() if re.search(pattern, text)), (0,))
        if code not in allowed:
            raise StepError(f"{step.place}: $ {step.text}\nrun as: {text}\nexit code {code}\n{printed}")
        if text.startswith("curl") and "/v1/jobs?" in text:
            self.job = str(json.loads(printed)["id"])

    def expanded(self, word: str) -> list[str]:
        """The files that a pattern means, as a shell finds them."""
        found = sorted(self.folder.glob(word)) if "*" in word else []
        return [str(path.relative_to(self.folder)) for path in found] or [word]

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
        text = python.runnable(text)
        for name in python.names_of_files(text):
            if f'.save("{name}")' in text:
                remove(self.folder / name)
            else:
                self.bring_file(name)
        if is_script(text) or "transformers" in text or "peft" in text:
            (self.folder / "script_of_the_page.py").write_text(text)
            code, printed = self.run_shell("python script_of_the_page.py")
            if code:
                raise StepError(f"{step.place}: exit code {code}\n{printed}")
            return
        self.names |= python.values_for(text, self.names, self.folder)
        try:
            with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                exec(compile(ast.parse(text), step.place, "exec"), self.names)
        except Exception as error:
            raise StepError(f"{step.place}: {type(error).__name__}: {error}\n{step.text}") from error

    # --- services --------------------------------------------------------------------------------------------------

    def serve(self, step: Step, text: str) -> None:
        """Start a service as the page does, on a free port."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        log = self.folder / f"service-{port}.log"
        command = [sys.executable, "-m", *tokens(text), "--port", str(port)]
        with log.open("w") as written:
            service = subprocess.Popen(
                command, cwd=self.folder, env=self.environment(), stdout=written, stderr=subprocess.STDOUT, text=True
            )
        self.services.append((service, port))
        while service.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise StepError(f"{step.place}: $ {step.text}\n{log.read_text()}")
        if "--api-key-file" in text and len(self.services) > 1:  # other requests on the page have no key
            self.stop(*self.services.pop())

    def stop(self, service: subprocess.Popen[str], _: int) -> None:
        service.terminate()
        service.wait(600)

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
            make = INPUTS.get(f"{command.name} {parameter}") or INPUTS.get(parameter)
            if make is not None:
                for name in as_any(value):
                    path = self.folder / name
                    if name not in {"", "-"} and (absent(path) or (parameter == "table" and path in self.tables)):
                        make(self, path, name, command)

    def bring_named(self, text: str) -> None:
        """Make FASTA files that other programs of a line read, and scripts written for fair-esm."""
        for script in re.findall(r"protea\.compat\.esm (?:-m )?(\w+\.\w+)", text):
            path = self.folder / (script if script.endswith(".py") else f"{script.replace('.', '/')}.py")
            files.write(path, "import esm\nassert callable(esm.pretrained.esm2_t6_8M_UR50D)\n")
        for name in re.findall(r"[\w./-]+\.fasta(?:\.gz)?\b", text):
            if text.startswith(("zcat", "cat", "curl", "grep", "python")) and not (self.folder / name).exists():
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
