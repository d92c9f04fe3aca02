"""Install the wheel for this machine into an empty environment and run it there, away from the sources.

Usage: python packaging/test_wheel.py DIST FOLDER [EXTRA...]    (``make test-wheel``)

First pip must refuse it for an older Python. Then it runs without any optional part: what needs none must work, and the
rest must name the part that it lacks. Then with each EXTRA alone: its packages are installed, its commands run, and the
packages are removed again. ``all`` runs ``tests/smoke.py``. PyTorch is installed as ``pip`` is configured;
``TORCH=torch==2.13.0+cpu`` names another build.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
TORCH = os.environ.get("TORCH", "torch==2.13.0+cpu")
PRETRAIN = (
    "pretrain esm2_8M data.store=store model.num_hidden_layers=1 model.hidden_size=16 model.num_attention_heads=2 "
    "model.intermediate_size=64 batch.tokens=2048 batch.pack=1024 run.steps=2 schedule.warmup=1 run.precision=float32 "
    "run.device=cpu run.compile=false validation.tokens=2000"
)
SERVE = """
import subprocess, sys, protea
command = [sys.executable, "-m", "protea", "serve", "--port", "0"]
with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
    try:
        url = next(line for line in service.stderr if "serving" in line).split()[-1]
        assert protea.Client(url).embed({"a": "MKTAYIAKQR"})["a"].shape == (320,)
    finally:
        service.terminate()
assert service.returncode == 0, service.returncode
"""
BASE = [
    "--version",
    "doctor",
    "check",
    "info --list",
    "embed in.fasta -o s.parquet -r r.h5",
    "perplexity in.fasta",
    "score in.fasta -v K2A",
    "contacts in.fasta -o maps.h5",
    "convert protea-mini mini.nemo",
    "data uniref --uniref50 many.fasta --no-filter --valid 5 -o store",
    f"{PRETRAIN} -o run",
]
PARTS = {
    "evaluate": ["evaluate contacts structures", "fit-contacts structures --count 3 -o head"],
    "finetune": [
        "finetune labels.csv -o lora --method lora --split random --epochs 1",
        "predict lora in.fasta -o p.csv",
    ],
    "plot": ["contacts in.fasta --plot map.png", "score in.fasta --scan -o scan.csv --plot scan.html"],
    "serve": [],
    "train": [f"{PRETRAIN} -o run-with-board"],
    "ray": ["embed in.fasta -o ray.h5 --ray local --shards 1"],
    "all": [],
}
NEED = {"evaluate": 0, "finetune": 0, "plot": 0, "ray": 0}
"""Commands of ``PARTS`` that must refuse to run without their part."""


class Environment:
    """An empty environment, and a folder with input to work in."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.python, self._work = folder / "bin" / "python", work
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)

    def pip(self, *arguments: str) -> str:
        """Run pip for the environment, from outside."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def installed(self) -> set[str]:
        """The names of the installed packages."""
        return {line.split("==")[0].split(" @ ")[0] for line in self.pip("freeze", "--all").split("\n") if line}

    def run(self, *arguments: object, fails: bool = False) -> str:
        """Run a program of the environment away from the sources, and return what it told on standard error."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{environment['PATH']}"
        command = [str(self.python), *map(str, arguments)]
        done = subprocess.run(command, cwd=self._work, env=environment, capture_output=True, text=True, check=False)
        if (done.returncode != 0) != fails:
            sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stderr

    def protea(self, words: str, *, fails: bool = False) -> str:
        """Run one command of Protea."""
        print("$ protea", words if len(words) < 100 else f"{words[:97]}...", flush=True)
        return self.run("-m", "protea", *words.split(), fails=fails)


def wheel_for_this_machine(dist: Path) -> Path:
    """The wheel whose name ends with this system and processor."""
    ending = f"macosx*_{platform.machine()}" if sys.platform == "darwin" else f"manylinux*_{platform.machine()}"
    found = list(dist.glob(f"protea-*-{ending}.whl"))
    if len(found) != 1:
        sys.exit(f"{dist}: {len(found)} wheels for this machine; `make wheels` builds one")
    return found[0].resolve()


def check_old_python(wheel: Path) -> None:
    """Have pip choose the wheel for the Python before the oldest one; it must say which it needs."""
    options = ["--python-version", "3.10", "--only-binary=:all:", "--no-deps", "--no-index", "--dest", os.devnull]
    command = [sys.executable, "-m", "pip", "download", *options, str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0 or "requires a different Python: 3.10" not in done.stderr:
        sys.exit(f"{' '.join(command)}: pip does not refuse it:\n{done.stdout}{done.stderr}")


def write_input(work: Path) -> None:
    """Write the files that the commands read."""
    (work / "in.fasta").write_text(">a\nMKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ\n")
    (work / "many.fasta").write_bytes((EXAMPLES / "proteins.fasta").read_bytes())
    (work / "structures").symlink_to(EXAMPLES / "structures")
    texts = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ"[start:] for start in range(20)]
    rows = [f"{text},{'even' if number % 2 else 'odd'}\n" for number, text in enumerate(texts)]
    (work / "labels.csv").write_text("sequence,label\n" + "".join(rows))


def test_part(here: Environment, wheel: Path, part: str) -> None:
    """Install a part, run its commands, and remove its packages."""
    before = here.installed()
    here.pip("install", "-qq", f"{wheel}[{part}]")
    new = sorted(here.installed() - before)
    print(f"[{part}] {len(new)} packages: {' '.join(new)}", flush=True)
    for words in PARTS[part]:
        here.protea(words)
    if part == "serve":
        here.run("-c", SERVE)
    if part == "all":
        here.run(ROOT / "tests" / "smoke.py")
    if new:
        here.pip("uninstall", "-qq", "--yes", *new)


def main() -> None:
    """Test the wheel, then each part that is named."""
    dist, folder, *parts = sys.argv[1:]
    wheel = wheel_for_this_machine(Path(dist))
    check_old_python(wheel)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        write_input(work)
        here = Environment(Path(folder).resolve(), work)
        here.pip("install", "-qq", TORCH)
        here.pip("install", "-qq", str(wheel))
        here.run("-c", "import protea, sys; assert protea.__file__.startswith(sys.prefix), protea.__file__")
        here.run("-c", "from protea import native; native.library(); assert native.facts(), native.reason()")
        for words in BASE:
            here.protea(words)
        for part, number in NEED.items():
            told = here.protea(PARTS[part][number], fails=True)
            last = told.splitlines()[-1]
            if not last.startswith("protea: error: ") or f"protea[{part}]" not in last or "Traceback" in told:
                sys.exit(f"without the part {part}: {told}")
        if "protea[serve]" not in here.protea("serve", fails=True):
            sys.exit("protea serve does not name its part")
        for part in parts:
            test_part(here, wheel, part)
    print("the wheel works, alone and with each part")


if __name__ == "__main__":
    main()
