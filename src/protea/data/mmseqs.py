"""Runs MMseqs2, which clusters and searches sequences.

Sequences are named by their numbers, so that ids of any kind are safe and results need no look-up.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.token_table import BATCH_BYTES, flat_of, lengths_of
from protea.errors import ProgramError, UsageError
from protea.progress import Progress

SEARCH_FLAGS: Final = "--min-seq-id 0.5 --alignment-mode 3 --max-seqs 300 -s 7 -c 0.8 --cov-mode 0"
"""The filter that public pipelines agree on: queries are training sequences, targets are validation sequences."""

REVERSE_FLAGS: Final = SEARCH_FLAGS.replace("--max-seqs 300", "--max-seqs 100000")
"""With queries and targets exchanged. A validation sequence may be similar to many training sequences."""

MEMBER_FLAGS: Final = "--min-seq-id 0.9 -c 0.8 --cov-mode 1"
CLUSTER_FLAGS: Final = "--min-seq-id 0.5 -c 0.8 --cov-mode 1"
"""As for UniRef90 and UniRef50: alignments cover 80 % of the representative, which is the longest member."""

_PROTEINS: Final = "--dbtype 1"
"""Without this, MMseqs2 takes peptides of A, C, G and T for DNA."""

_GUARD: Final = """
exec 3<&0
(read -r _ <&3; kill -KILL -$$) >/dev/null 2>&1 &
guard=$!
"$@" 3<&- </dev/null
code=$?
kill "$guard" 2>/dev/null
exit $code
"""
"""Kills the program and all its children when this process dies: its end of the pipe on standard input closes."""

_LINES_SHOWN: Final = 3
_NOISE: Final = re.compile(r"^\s*$|^\[=|^Time for|^mmseqs |^\S.*\t\S")
_INSTALL: Final = (
    "install it with `apt-get install mmseqs2`, `brew install mmseqs2`, or "
    "`conda install -c conda-forge -c bioconda mmseqs2`, or give its path (`protea data fasta --mmseqs PATH`)"
)


class MMseqs:
    """The program, by name or path. All that it prints goes to ``log``.

    Attributes:
        version: the version that the program states.
        commands: the commands run so far, with file names instead of paths, for the manifest.
    """

    def __init__(self, program: str, threads: int | None, log: Path, progress: Progress) -> None:
        path = shutil.which(program)
        if path is None:
            raise ProgramError(f"{program}: MMseqs2 is not installed; {_INSTALL}")
        self._program, self._threads, self._log, self._progress = path, threads, log, progress
        try:
            answer = subprocess.run([path, "version"], capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            raise ProgramError(f"{path}: does not run as MMseqs2: {error}; {_INSTALL}") from error
        self.version = answer.stdout.strip()
        self.commands: list[str] = []

    def cluster(self, fasta: Path, folder: Path, flags: str) -> Path:
        """Cluster with ``linclust``: a table of representatives and members."""
        folder.mkdir()
        self._run("createdb", [fasta, folder / "db"], _PROTEINS)
        self._run("linclust", [folder / "db", folder / "clusters", folder / "tmp"], flags)
        self._run("createtsv", [folder / "db", folder / "db", folder / "clusters", folder / "clusters.tsv"])
        return folder / "clusters.tsv"

    def search(self, queries: Path, targets: Path, folder: Path, flags: str) -> Path:
        """Search for each query among the targets: a table of query, target, identity and both coverages."""
        folder.mkdir()
        self._run("createdb", [queries, folder / "queries"], _PROTEINS)
        self._run("createdb", [targets, folder / "targets"], _PROTEINS)
        databases = [folder / "queries", folder / "targets", folder / "hits"]
        self._run("search", [*databases, folder / "tmp"], flags)
        self._run("convertalis", [*databases, folder / "hits.tsv"], "--format-output query,target,fident,qcov,tcov")
        return folder / "hits.tsv"

    def _run(self, module: str, paths: list[Path], flags: str = "") -> None:
        words = split_flags(flags)
        threads = [] if self._threads is None or module == "createdb" else ["--threads", str(self._threads)]
        self.commands.append(shlex.join(["mmseqs", module, *(path.name for path in paths), *words]))
        command = [self._program, module, *map(str, paths), *words, *threads]
        self._progress.note(shlex.join(command))
        with self._log.open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            guarded = ["sh", "-c", _GUARD, "sh", *command]
            with subprocess.Popen(
                guarded, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            ) as process:
                try:
                    code = process.wait()
                except BaseException:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise
        if code:
            raise self._failure(module, code, start)

    def _failure(self, module: str, code: int, start: int) -> ProgramError:
        """The error for a failed command, with the command's last lines in the log, where it began at ``start``."""
        with self._log.open("rb") as stream:
            stream.seek(start)
            lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
        last = " | ".join([line.strip() for line in lines if not _NOISE.match(line)][-_LINES_SHOWN:]) or "nothing"
        number = code - 128 if code > 128 else -code
        how = f"failed with code {code}"
        if number > 0:
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            how = f"was killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")
        return ProgramError(
            f"mmseqs {module} {how}; its last output: {last}; the log is {self._log}; run the same command again to "
            "continue after the last finished step"
        )


def split_flags(flags: str) -> list[str]:
    """Split flags as a shell would."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UsageError(f"flags for mmseqs {flags!r}: {error}") from error


def write_fasta(path: Path, batches: Iterable[tuple[pa.RecordBatch, NDArray[np.int64]]], alphabet: Alphabet) -> int:
    """Write sequences, each named by its number; return how many there are."""
    total = 0
    # MMseqs2 does not know the gaps that some alphabets have.
    letters = np.array([ord(token if token.isalpha() else "X") for token in alphabet.tokens], np.uint8)
    with path.open("wb") as stream:
        for batch, numbers in batches:
            total += len(batch)
            residues = letters[flat_of(batch.column("tokens"))].tobytes()
            start = 0
            for number, end in zip(numbers.tolist(), np.cumsum(lengths_of(batch)).tolist(), strict=True):
                stream.write(b">%d\n%b\n" % (number, residues[start:end]))
                start = end
    return total


def read_rows(path: Path, dtype: type[Any]) -> Iterator[NDArray[Any]]:
    """The rows of a table of numbers, thousands at a time: ``[N, columns]``."""
    with path.open("rb") as stream:
        while lines := stream.readlines(BATCH_BYTES):
            yield np.loadtxt(lines, dtype, ndmin=2)


def best_hits(path: Path, *, reverse: bool) -> NDArray[np.float64]:
    """The hit of highest identity of each training sequence: ``[K, 5]``.

    Columns: the training sequence, the validation sequence, identity, and the coverage of each.
    """
    order = [1, 0, 2, 4, 3] if reverse else [0, 1, 2, 3, 4]
    best = np.zeros((0, 5))
    for rows in read_rows(path, np.float64):
        hits = np.concatenate([best, rows[:, order]])
        hits = hits[np.lexsort((hits[:, 1], -hits[:, 2], hits[:, 0]))]
        best = hits[np.unique(hits[:, 0], return_index=True)[1]]
    return best
