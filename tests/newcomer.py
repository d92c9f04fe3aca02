"""Goes a newcomer's way with Python, pip, git and make alone: ``python tests/newcomer.py``, or ``make newcomer``.

In an empty folder: a clone of the last commit; README's start, both ways; three tutorials; and the mistakes that
beginners make, whose messages must be one line that names the way out. It takes minutes, for installations; pip's cache
is used. It ends at the first thing that does not go as the pages say. ``--in FOLDER`` keeps the folder, so that another
call goes on with the clone and the environment that are there.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
TUTORIALS: Final = ("embed", "variants", "contacts")
INSTALL: Final = re.compile(r"`(python3 -m pip --python \.venv/bin/python install [^`]+)`")
NO_NETWORK: Final = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DOWNLOAD_TIMEOUT": "2"}
MISTAKES: Final = (
    ("protea embed examples/proteins.fasta -m esm2_t6_8M_UR5OD -o x.parquet", r"did you mean esm2_t6_8M_UR50D"),
    ("protea embed examples/proteins.fasta -m esm2_t6_8M_UR50D -o x.parquet", r"fetch config\.json .* run the same"),
    ("protea embed README.md -o x.parquet", r"README\.md, line 1: not FASTA"),
    (
        "printf '>a\\nMKT4YIAK\\n' > wrong.fasta; protea embed wrong.fasta -o x.parquet",
        r"line 1, .*: 4 at 4",
    ),
    ("protea embed protein.fasta -o x.parquet", r"protein\.fasta.*no such file"),
)
"""Commands, each with what its message must hold."""
WITHOUT_EXTRAS: Final = (
    ("protea evaluate contacts examples/structures", r"install 'protea\[evaluate\]'"),
    ("protea serve", r"install 'protea\[serve\]'"),
)


class Newcomer:
    """Someone with an empty home, and the commands that were typed so far."""

    def __init__(self, home: Path) -> None:
        self.home, self.clone = home, home / "protea"
        cache = Path(os.environ.get("PIP_CACHE_DIR", Path.home() / ".cache" / "pip"))
        kept = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        self.environment = kept | {"HF_HOME": str(home / "huggingface"), "PIP_CACHE_DIR": str(cache)}

    def run(self, line: str, *, where: Path, **settings: str) -> subprocess.CompletedProcess[str]:
        print(f"$ {line}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=where,
            env=self.environment | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"  {time.monotonic() - start:.0f} s, exit code {done.returncode}", flush=True)
        return done

    def does(self, line: str, *, where: Path, **settings: str) -> str:
        """Run a line that must succeed."""
        done = self.run(line, where=where, **settings)
        if done.returncode:
            sys.exit(f"{line}\nfailed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def errs(self, line: str, wanted: str, *, where: Path, **settings: str) -> None:
        """Run a line that must fail with one line on standard error, which tells the way out."""
        done = self.run(line, where=where, **settings)
        lines = done.stderr.strip().splitlines()
        print(*(f"  {text}" for text in lines), sep="\n", flush=True)
        if not done.returncode or len(lines) != 1 or not lines[0].startswith("protea: error: "):
            sys.exit(f"{line}\nmust fail with one line, `protea: error: ...`:\n{done.stdout}{done.stderr}")
        if not re.search(wanted, lines[0]):
            sys.exit(f"{line}\ndoes not say {wanted!r}")

    def path(self, environment: Path) -> Mapping[str, str]:
        """Settings that activate an environment."""
        return {"PATH": f"{environment / 'bin'}{os.pathsep}{self.environment['PATH']}"}


def start_of_readme() -> list[str]:
    """The commands of README that install, in its consoles."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line[2:].partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("make demo", "pip install"))]


def run_page(page: Path) -> None:
    """Run all code of a tutorial in this process, as its notebook has it."""
    written: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "notebooks.py"))
    names: dict[str, Any] = {}
    for cell in written["notebook"](page.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and source.startswith("%%bash\n"):
            subprocess.run(["bash", "-c", source.removeprefix("%%bash\n")], check=True)
        elif cell["cell_type"] == "code":
            exec(compile(source, str(page), "exec"), names)


def go(newcomer: Newcomer) -> None:
    if first := not newcomer.clone.exists():
        newcomer.does(f"git clone --quiet '{ROOT}' protea", where=newcomer.home)
    clone, ours = newcomer.clone, newcomer.path(newcomer.clone / ".venv")
    lines = start_of_readme()
    assert lines, "README.md has no command that installs"
    for line in lines:
        if line.startswith("make demo"):
            print(newcomer.does(line, where=clone))
    for line, wanted in (*(WITHOUT_EXTRAS if first else ()), *MISTAKES):  # a page has installed the extras later
        newcomer.errs(line, wanted, where=clone, **ours, **NO_NETWORK)
    for name in TUTORIALS:
        page = f"docs/tutorials/{name}.md"
        for line in INSTALL.findall((clone / page).read_text(encoding="utf-8")):
            newcomer.does(line, where=clone)
        newcomer.does(f"python tests/newcomer.py {page}", where=clone, **ours, **NO_NETWORK)
    own_environment(newcomer, [line for line in lines if line.startswith("pip ")])


def own_environment(newcomer: Newcomer, lines: list[str]) -> None:
    """README's other way: into an environment of one's own, used outside of the clone."""
    own = newcomer.home / "own"
    newcomer.does(f"{sys.executable} -m venv {own}", where=newcomer.home)
    settings = newcomer.path(own)
    for line in lines:
        done = newcomer.run(line, where=newcomer.clone, **settings)
        if done.returncode and "--index-url" in line:  # the place of PyTorch's builds cannot be reached from here
            version = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert version is not None
            newcomer.does(f"pip install 'torch=={version[1]}+cpu'", where=newcomer.clone, **settings)
        elif done.returncode:
            sys.exit(f"{line}\nfailed:\n{done.stdout}{done.stderr}")
    example = newcomer.clone / "examples" / "proteins.fasta"
    for line in ("protea --version", "protea doctor", f"protea embed {example} -o mine.parquet --overwrite"):
        print(newcomer.does(line, where=newcomer.home, **settings, **NO_NETWORK))
    print("the newcomer arrived")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        Path(sys.argv[2]).mkdir(exist_ok=True)
        go(Newcomer(Path(sys.argv[2]).resolve()))
    elif len(sys.argv) > 1:
        run_page(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
            go(Newcomer(Path(folder)))
