"""Rules for the whole package: layers, cycles, names, size, help texts, public names, start-up time."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import pytest
import typer.main

import protea
from protea import cli
from protea.models import registry

SOURCE = Path(protea.__file__).parent
ROOT = Path(__file__).parents[1]

LAYERS = [
    {"errors"},
    {"alphabet", "bundled", "device", "optional", "progress", "settings_errors", "text"},
    {"arguments", "client", "fasta", "limits", "packing", "supported"},
    {"delimited", "letters"},
    {"output"},
    {"journal"},
    {"remote", "rerun", "shards"},
    {"scatter"},
    {"records", "tables"},
    {"native"},
    {"models"},
    {"transforms"},
    {"checkpoints"},
    {"infer"},
    {"embed", "data"},
    {"plan"},
    {"score"},
    {"contacts"},
    {"doctor", "evaluate", "plot", "sequences", "train"},
    {"finetune"},
    {"compare", "language_model"},
    {"trained"},
    {"shared_models"},
    {"estimators"},
    {"sklearn"},
    {"compat", "serve"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
"""Imports go from higher ranks to lower ones, or stay within one package."""


def module_name(path: Path) -> str:
    """Return the name of a file's module; for an ``__init__`` file the name of its package."""
    return ".".join(("protea", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}

parse = cache(ast.parse)


def imported(source: str, package: str) -> set[str]:
    """Return the modules of the package that a file imports, inside functions and for type checking too."""
    paths: set[str] = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Import):
            paths |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            paths |= {f"{module}.{alias.name}" for alias in node.names}
    # A public name counts as an import of the module that defines it.
    public = {f"protea.{name}": module for name, module in protea._HOME.items()}
    modules = set()
    for path in paths:
        name = public.get(path, path)
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        modules.add(name)
    return modules - {"", "protea"}


def layers(source: str, package: str) -> set[str]:
    """Return the layers that a file imports from."""
    return {name.split(".")[1] for name in imported(source, package)}


def package_of(path: Path) -> str:
    return ".".join(("protea", *path.relative_to(SOURCE).parent.parts))


def home(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = [path for path in MODULES.values() if home(path) not in {"__init__", "__main__"}]


def test_every_layer_has_a_rank() -> None:
    assert {home(path) for path in FILES} == RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_left(path: Path) -> None:
    mine = home(path)
    wrong = {name for name in layers(path.read_text(), package_of(path)) if name != mine and RANK[name] >= RANK[mine]}
    assert not wrong, f"{mine} imports {wrong}"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import protea", set()),
        ("import protea, protea.cli", {"cli"}),
        ("import protea.embed.run as run", {"embed"}),
        ("from protea import cli", {"cli"}),
        ("from protea import cli as c, errors", {"cli", "errors"}),
        ("from protea import load", {"language_model"}),
        ("from protea import __version__", set()),
        ("from protea.embed import run", {"embed"}),
        ("from . import attention", {"models"}),
        ("from .attention import attend", {"models"}),
        ("from .. import cli", {"cli"}),
        ("from ..cli import main", {"cli"}),
        ("def f():\n    from ..cli.embed import embed", {"cli"}),
        ("if TYPE_CHECKING:\n    from protea.infer.runner import Runner", {"infer"}),
        ("from torch import nn\nimport numpy.random", set()),
    ],
)
def test_every_way_to_import_is_seen(statement: str, expected: set[str]) -> None:
    assert layers(statement, "protea.models") == expected


def test_no_import_cycles() -> None:
    """Imports inside functions and for type checking count; imports by a string (``import_module``) do not."""
    graph = {name: imported(path.read_text(), package_of(path)) - {name} for name, path in MODULES.items()}
    while leaves := {name for name, others in graph.items() if not others & graph.keys()}:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    # Every module that remains is part of a cycle or imports one that is.
    assert not {name: others & graph.keys() for name, others in graph.items()}


FAMILIES = [place.partition(":") for place in registry.FAMILIES if isinstance(place, str)]


@pytest.mark.parametrize("path", [path for path in FILES if home(path) != "models"], ids=module_name)
def test_no_family_is_known_outside_the_models(path: Path) -> None:
    assert len(FAMILIES) >= 3
    source = path.read_text()
    assert not imported(source, package_of(path)) & {module for module, _, _ in FAMILIES}
    names = {node.id for node in ast.walk(parse(source)) if isinstance(node, ast.Name)}
    assert not names & {f"{name}{end}" for _, _, name in FAMILIES for end in ("", "Config")}


FAMILY_NAMES = re.compile(
    r"ESM[- ]?[12C]\b|ESM[- ]?1(?:b|v|nv)|CARP|Pro[s]?tT5|\bT5\b|esm[12]|esmc|carp|t5_|prost", re.IGNORECASE
)
NAMED = {
    "alphabet.py": "the tables of two alphabets, which reading a store needs without PyTorch",
    "checkpoints/convert.py": "Meta's loader goes by names",
    "checkpoints/hub.py": "the order of the list of models",
    "checkpoints/nemo2.py": "a format of one family",
    "checkpoints/peers.py": "Meta's loader goes by names",
    "checkpoints/sequence_models.py": "a format of one family",
    **dict.fromkeys(
        (f"compat/esm/{name}.py" for name in ("__init__", "absent", "data", "installing", "pretrained", "wrapped")),
        "fair-esm's names of its models and classes",
    ),
    "data/manifest.py": "the two alphabets",
    "data/masking.py": "names of published ways to mask, which users type",
    "serve/compat_routes.py": "NVIDIA's names of models in its interface",
    "train/plans.py": "the models that plans are printed for",
}
"""Files outside the models that name a family in code, and why; the list only gets shorter."""


@pytest.mark.parametrize("path", [path for path in FILES if home(path) != "models"], ids=module_name)
def test_no_text_names_a_family(path: Path) -> None:
    """Neither a message, a condition nor a name; docstrings, where help and its examples are, may."""
    tree = parse(path.read_text())
    texts = {node: node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            texts.pop(node.value, None)  # a docstring
    words = [text for text in texts.values() if isinstance(text, str)]
    words += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    words += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    found = sorted(word for word in words if FAMILY_NAMES.search(word))
    assert bool(found) == (str(path.relative_to(SOURCE)) in NAMED), found


@pytest.mark.parametrize("path", [path for path in FILES if home(path) != "plot"], ids=module_name)
def test_only_the_frame_counts_bos_and_eos(path: Path) -> None:
    """No other code adds 2 for BOS and EOS or cuts them off with ``[1:-1]``."""
    wrong = re.findall(
        r"\b(?:tokens|residues|length|len\([^()]*\))(?:\))? [-+] 2\b|\w\[1:-1\]|\]\[1:-1\]", path.read_text()
    )
    assert not wrong


def test_models_know_nothing_of_parallelism() -> None:
    for path in (SOURCE / "models").rglob("*.py"):
        assert "distributed" not in path.read_text(), path


# ---- names ----
def test_no_class_name_is_defined_twice() -> None:
    homes = defaultdict(list)
    for name, path in MODULES.items():
        for node in ast.walk(parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(name)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_no_two_modules_share_a_name() -> None:
    """Except packages' ``__init__`` and ``__main__``, and a command's module, which has the name of the command."""
    commands = {SOURCE / "cli" / f"{module}.py" for module in cli.COMMANDS.values()}
    homes = defaultdict(list)
    for path in sorted(MODULES.values()):
        if path.stem not in {"__init__", "__main__"} and path not in commands:
            homes[path.stem].append(str(path.relative_to(SOURCE)))
    assert not {name: paths for name, paths in homes.items() if len(paths) > 1}


# ---- help ----
def help_texts(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the help text of a command, of its parameters and of all its subcommands, each with its place."""
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    for key, subcommand in getattr(command, "commands", {}).items():
        yield from help_texts(subcommand, f"{name} {key}")


def test_help_is_a_sentence_of_its_own() -> None:
    """A help text that begins with "Of" needs its option's name to be understood."""
    texts = dict(help_texts(typer.main.get_command(cli.application(None)), "protea"))
    assert len(texts) > 150
    assert not [place for place, text in texts.items() if text.startswith("Of ")]


# ---- wall-clock time ----
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}


def clock_assertions(source: str) -> list[int]:
    """Return the lines of the assertions in a file that read a clock, or a variable that was set from one."""
    tree = parse(source)
    timed: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and reads_clock(node.value, set()):
            timed |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert) and reads_clock(node.test, timed)]


def reads_clock(node: ast.AST, timed: set[str]) -> bool:
    """Whether an expression calls ``time.monotonic`` or its like, or uses one of the variables."""
    return any(
        (isinstance(part, ast.Call) and getattr(part.func, "attr", getattr(part.func, "id", "")) in CLOCKS)
        or (isinstance(part, ast.Name) and part.id in timed)
        for part in ast.walk(node)
    )


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("start = time.monotonic()\nwork()\nassert time.monotonic() - start < 5", [3]),
        ("took = perf_counter() - start\nassert took < 5", [2]),
        ("end = time.monotonic() + 60\nwhile time.monotonic() < end: pass\nassert done", []),
    ],
)
def test_assertions_on_the_clock_are_seen(source: str, lines: list[int]) -> None:
    assert clock_assertions(source) == lines


def test_no_test_asserts_a_time() -> None:
    """A shared machine may take any time for anything."""
    lines = {str(path.relative_to(ROOT)): clock_assertions(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}
    assert not {path: numbers for path, numbers in lines.items() if numbers}


# ---- public names and start-up ----
def test_public_names() -> None:
    for name in protea.__all__:
        assert getattr(protea, name) is not None
    assert dir(protea) == sorted(protea.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = protea.nothing


HEAVY = {"torch", "numpy", "h5py", "pyarrow", "rich", "huggingface_hub", "yaml", "importlib.metadata"}


EVERYTHING = "from protea import cli; cli.application(None)"


@pytest.mark.parametrize("statement", ["import protea", "import protea.cli", EVERYTHING])
def test_importing_stays_light(statement: str) -> None:
    code = f"{statement}; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "protea" in loaded
    assert not HEAVY & set(loaded)


def test_loading_does_not_import_the_compiler(model_folders: dict[str, Path]) -> None:
    """Building on the meta device imports it, which takes a second, if a layer draws random numbers there."""
    folders = [str(folder) for folder in model_folders.values()]
    code = f"import protea, sys\nfor folder in {folders}: protea.load(folder, device='cpu')\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split()


def test_errors_survive_pickling() -> None:
    """Worker processes raise them too."""
    import pickle

    from protea import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, protea.ProteaError)]
    assert len(kinds) >= 9
    for kind in kinds:
        copy = pickle.loads(pickle.dumps(kind("what, where, how to fix it")))
        assert type(copy) is kind
        assert str(copy) == "what, where, how to fix it"


# ---- size: the whole package, and the part that one command runs ----
MOST_LINES_OF_ALL = 48_950


def test_size_of_the_package() -> None:
    """Count every line of Python in ``src``, with docstrings and blank lines."""
    assert sum(len(path.read_text().splitlines()) for path in MODULES.values()) <= MOST_LINES_OF_ALL


MOST_LINES_OF_EMBED = 10_580


def test_embedding_takes_a_part_of_the_package(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """Count the lines of all files that ``protea embed`` imports to go from a Hugging Face folder to Parquet."""
    (tmp_path / "in.fasta").write_text(">a\nMKTAYIAKQR\n")
    code = (
        "import sys; from protea.cli import main\n"
        f"sys.argv = ['protea', 'embed', 'in.fasta', '-m', {str(model_folders['esm2'])!r}, '-o', 'out.parquet']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "modules = [module for name, module in sys.modules.items() if name.partition('.')[0] == 'protea']\n"
        "print(*(module.__file__ for module in modules), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    files = [line for line in done.stdout.splitlines() if line.endswith(".py")]
    assert len(files) > 30
    assert sum(len(Path(file).read_text().splitlines()) for file in files) <= MOST_LINES_OF_EMBED


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_imported_names_exist(folder: str) -> None:
    """Files that only run where there is a GPU are checked too."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "protea" or node.level:
                continue
            module = import_module(node.module or "")
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert hasattr(module, alias.name) or find_spec(name), f"{path}: {name} does not exist"
