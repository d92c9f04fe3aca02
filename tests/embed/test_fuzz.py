"""Embed generated FASTA files; compare with a slow, independent implementation of the rules, or expect an error.

``python -m tests.embed.test_fuzz 100000`` runs as many files; the tests run a small part of them.
"""

from __future__ import annotations

import random
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import protea
from protea.checkpoints import hf
from protea.embed.run import EmbedRun
from protea.embed.settings import EmbedSettings
from protea.errors import ProteaError, ProteaWarning
from protea.models.esm2 import ESM2Config
from protea.models.registry import build

TAME = [
    *(b">a", b">b", b">a b", b">c/d", b">c%2Fd", b">\xff", b">..", b">a_2", b">e\tf", b">\x1bz", b">g", b">h", b">i"),
    *(b"MKT", b"ACDEFGHIKL", b"mkt", b"*", b"-", b".", b"J", b"X", b"<mask>", b" ", b"M K", b"QQQQ" * 30, b"J*"),
]
WILD = [b">", b"> ", b">\0", b"1", b"\0", b"\xc3\xa9", b";x", b"#x", b"@r", b"+", b"\xef\xbb\xbf", b"\t", b"!"]
ENDS = [b"\n", b"\r\n", b"\r", b"\n\n", b""]

KNOWN = set("LAGVSERTIDPKQNFYMHWCXBUZO.-")

Outcome = list[tuple[str, str]] | None
"""Ids and sequences as embedded, or ``None`` where an error is due."""


def generate(rng: random.Random) -> bytes:
    """Mostly FASTA, sometimes anything."""
    parts = [b">first\n", b"MKT\n"] if rng.random() < 0.8 else []
    tame = rng.random() < 0.5
    for _ in range(rng.randrange(12)):
        piece = rng.choice(TAME if tame or rng.random() < 0.8 else WILD)
        parts += [piece, rng.choice(ENDS) if not tame and rng.random() < 0.2 else b"\n"]
    return b"".join(parts)


def slow_records(content: bytes) -> list[tuple[str, str]] | None:
    """The format, a line at a time; ``None`` for what is no FASTA."""
    lines = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r", b"\n").split(b"\n")
    records: list[tuple[str, str]] = []
    for line in filter(None, (line.strip() for line in lines)):
        if line.startswith(b">"):
            try:
                header = line[1:].decode("utf-8")
            except UnicodeDecodeError:
                header = line[1:].decode("latin-1")
            if not header.split() or "\0" in header:
                return None
            records.append((header.split()[0], ""))
        elif not records:
            return None
        else:
            records[-1] = (records[-1][0], records[-1][1] + line.decode("latin-1"))
    return records


def slow_reading(content: bytes, unknown: str, duplicates: str) -> Outcome:
    """The rules of the documentation, a record and a letter at a time."""
    records = slow_records(content) or []
    given = [stored(name) for name, _ in records]
    used: set[str] = set()
    kept: list[tuple[str, str]] = []
    for name, sequence in records:
        final = name
        if stored(name) in used:
            if duplicates == "error":
                return None
            if duplicates == "skip":
                continue
            number = 2
            while stored(f"{name}_{number}") in used or stored(f"{name}_{number}") in given:
                number += 1
            final = f"{name}_{number}"
        used.add(stored(final))
        tidy = slow_sequence(sequence, unknown)
        if tidy == "error":
            return None
        if tidy is not None:
            kept.append((final, tidy))
    return kept or None


def stored(name: str) -> str:
    """Ids that HDF5 cannot tell apart are one."""
    return name.replace("/", "%2F")


def slow_sequence(sequence: str, unknown: str) -> str | None:
    """``None`` for a record that is left out."""
    tokens = [token for token in sequence.replace("<mask>", "\1") if token not in " \t\v\f"]
    tokens = [chr(ord(token) - 32) if "a" <= token <= "z" else token for token in tokens]
    while tokens and tokens[-1] == "*":
        tokens.pop()
    strange = [token for token in tokens if token not in KNOWN and token != "\1"]
    if not tokens:
        return "error" if unknown == "error" else None
    if strange:
        if unknown == "skip":
            return None
        if unknown == "error" or any(token not in "JO*" for token in strange):
            return "error"
    return "".join("<mask>" if t == "\1" else t if t in KNOWN else "X" for t in tokens)


def check(content: bytes, rng: random.Random, model: protea.LanguageModel, folder: Path) -> str:
    """Embed one file and compare; returns what came out, for the count."""
    unknown, duplicates = rng.choice(["x", "error", "skip"]), rng.choice(["error", "rename", "skip"])
    budget, output = rng.choice([5, 30, 4096]), folder / f"out{rng.choice(['.h5', '.parquet', ''])}"
    fasta = folder / "in.fasta"
    fasta.write_bytes(content)
    expected = slow_reading(content, unknown, duplicates)
    settings = EmbedSettings(
        inputs=(str(fasta),),
        sequences=output,
        unknown=unknown,  # type: ignore[arg-type]
        duplicates=duplicates,  # type: ignore[arg-type]
        token_budget=budget,
    )
    job = EmbedRun(settings, model.module, {}, overwrite=True)
    if expected is None:
        with pytest.raises(ProteaError, match=r"\A[^\n]+\Z") as caught:
            job()
        return caught.type.__name__
    totals = job()
    from protea.embed.stores import kind_of, read_store

    records = list(read_store(output, kind_of(output, "-o")).records)
    assert [entry.id for entry, _ in records] == [name for name, _ in expected], (content, unknown, duplicates)
    vectors = model.embed([sequence for _, sequence in expected], pool="mean")
    for (entry, arrays), (_, sequence), vector in zip(records, expected, vectors, strict=True):
        assert entry.length == len(sequence.replace("<mask>", "?"))
        assert np.abs(arrays["mean"][0] - vector).max() <= 1e-5 * max(1, np.abs(vector).max())
    report = pd.read_csv(f"{output}.report.tsv", sep="\t", keep_default_na=False, quoting=3)
    raw = content.replace(b"\r", b"\n").count(b"\n>") + content.removeprefix(b"\xef\xbb\xbf").startswith(b">")
    skipped = (report["what"] == "skipped").sum()
    assert totals.records == totals.embedded + skipped
    assert totals.records <= raw + content.count(b">")
    return "embedded"


def tiny_model() -> protea.LanguageModel:
    with tempfile.TemporaryDirectory() as temporary:
        config = ESM2Config(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=16)
        hf.write_random(Path(temporary) / "m", build(config), seed=1, dtype=torch.float32)
        return protea.load(Path(temporary) / "m", device="cpu")


def run(count: int, seed: int, folder: Path) -> dict[str, int]:
    """Check ``count`` files; returns how often each outcome came."""
    model = tiny_model()
    rng = random.Random(seed)
    outcomes: dict[str, int] = {}
    for _ in range(count):
        outcome = check(generate(rng), rng, model, folder)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


@pytest.mark.filterwarnings("ignore:(gaps|DNA):protea.errors.ProteaWarning")
@pytest.mark.parametrize("count", [60, pytest.param(400, marks=pytest.mark.long)])
@pytest.mark.parametrize("seed", [0])
def test_a_slice(tmp_path: Path, count: int, seed: int) -> None:
    outcomes = run(count, seed, tmp_path)
    assert outcomes["embedded"] > count / 5
    assert {"FastaError", "UnknownResidueError"} <= outcomes.keys()


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ProteaWarning)  # of the sequences that are compared
    with tempfile.TemporaryDirectory() as temporary:
        print(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(temporary)))
