"""Values of names that blocks of Python on the pages use without making them."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import pandas as pd
import stand_in_files as files

import protea

LETTERS: Final = "LAGVSERTIDPKQNFYMHWC"


def _table() -> pd.DataFrame:
    proteins = files.records(45, seed=9)
    rows = [(sequence, files.CLASSES[n % 3], f"family{n % 9}") for n, sequence in enumerate(proteins.values())]
    return pd.DataFrame(rows, columns=["sequence", "label", "family"])


def _logs() -> Any:
    numbers = np.random.default_rng(0).normal(size=(40, 20))
    return numbers - np.log(np.exp(numbers).sum(1, keepdims=True))


VALUES: Final[Mapping[str, Callable[[Path], Any]]] = {
    "protea": lambda folder: protea,
    "np": lambda folder: np,
    "pd": lambda folder: pd,
    "h5py": lambda folder: h5py,
    "model": lambda folder: protea.load("esm2_t6_8M_UR50D", device="cpu"),
    "sequences": lambda folder: list(files.records(3).values()),
    "named": lambda folder: files.records(3),
    "table": lambda folder: _table(),
    "sequence": lambda folder: "MKTAYIAKQRMKTAYIAKQRMKTAYIAKQRMKTAYIAKQR",
    "letters": lambda folder: LETTERS,
    "probabilities": lambda folder: np.random.default_rng(0).random((40, 40)),
    "truth": lambda folder: np.random.default_rng(1).random((40, 40)) > 0.9,
    "missing": lambda folder: np.zeros(40, bool),
    "scores": lambda folder: _logs(),
    "logs": lambda folder: _logs(),
    "scans": lambda folder: {"one": ("MKTAYIAKQR" * 4, _logs())},
}
"""By name; each is made in the document's folder when a block first reads it."""


MISSING: Final = {"anndata": r"^.*\bto_anndata\(.*\n"}
"""Optional packages that the tests' environment may lack, each with the lines that need it."""


ENDLESS: Final = re.compile(r"\bin (loader\.batches\(.*\)):")
"""Loops that never end, because training decides when; three rounds are run."""


def runnable(text: str) -> str:
    """The block without the lines that need a package which is not here, and with loops that end."""
    text = ENDLESS.sub(r"in __import__('itertools').islice(\1, 3):", text)
    for package, lines in MISSING.items():
        if importlib.util.find_spec(package) is None:
            text = re.sub(lines, "", text, flags=re.MULTILINE)
    return text


def values_for(text: str, known: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The values that a block reads and that nothing on the page has made."""
    nodes = list(ast.walk(ast.parse(text)))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    made |= {
        (alias.asname or alias.name).split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    return {name: VALUES[name](folder) for name in sorted(read - made - set(known)) if name in VALUES}


def names_of_files(text: str) -> list[str]:
    """The constant texts of a block, among which are names of files."""
    nodes = ast.walk(ast.parse(text))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
