"""Runs MMseqs2, the program that clusters and searches; knows its commands, not what they are for.

Sequences go in under their numbers, so that names of any kind are safe and answers need no look-up.
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
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protea.alphabet import Alphabet
from protea.data.token_table import BATCH_BYTES, TokenRows
from protea.data.work import Watcher
from protea.errors import ProgramError, UsageError

SEARCH_FLAGS: Final = "--min-seq-id 0.5 --alignment-mode 3 --max-seqs 300 -s 7 -c 0.8 --cov-mode 0"
"""The filter that public pipelines agree on, query training set, target validation set."""

REVERSE_FLAGS: Final = SEARCH_FLAGS.replace("--max-seqs 300", "--max-seqs 100000")
"""The same with query and target exchanged: a validation sequence may have many relatives in training."""

MEMBER_FLAGS: Final = "--min-seq-id 0.9 -c 0.8 --cov-mode 1"
CLUSTER_FLAGS: Final = "--min-seq-id 0.5 -c 0.8 --cov-mode 1"
"""As UniRef90 and UniRef50 are made: alignments cover 80 % of the representative, which is the longest member."""

_PROTEINS: Final = "--dbtype 1"
"""Not to be guessed: peptides of A, C, G and T alone are taken for DNA."""

_GUARD: Final = """
exec 3<&0
(read -r _ <&3; kill -KILL -$$) >/dev/null 2>&1 &
guard=$!
"$@" 3<&- </dev/null
code=$?
kill "$guard" 2>/dev/null
exit $code
"""
"""Ends the program and all it started when this process dies, however it dies: the pipe then has an end."""

_SHOWN: Final = 3
_NOISE: Final = re.compile(r"^\s*$|^\[=|^Time for|^mmseqs |^\S.*\t\S")


class MMseqs:
    """The program, once found.

    Args:
        program: its name or path.
        threads: it may use; all by default.
        log: a file for all that it prints.
        watcher: told of every command.

    Raises:
        ProgramError: it is not installed, or does not run.

    Attributes:
        version: as it says.
        commands: run so far, as the manifest has them: with file names alone.
    """

    def __init__(self, program: str, threads: int | None, log: Path, watcher: Watcher) -> None:
        found = shutil.which(program)
        if found is None:
            raise ProgramError(
                f"{program}: MMseqs2 is not installed; install it with `apt-get install mmseqs2`, "
                "`brew install mmseqs2`, or `conda install -c conda-forge -c bioconda mmseqs2`, or name it with "
                "--mmseqs"
            )
        self._program, self._threads, self._log, self._watcher = found, threads, log, watcher
        try:
            answer = subprocess.run([found, "version"], capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            raise ProgramError(f"{found}: does not run as MMseqs2: {error}") from error
        self.version = answer.stdout.strip()
        self.commands: list[str] = []

    def cluster(self, fasta: Path, folder: Path, flags: str) -> Path:
        """Cluster by ``linclust``: a table of representative and member, by number."""
        folder.mkdir()
        self._run("createdb", [fasta, folder / "db"], _PROTEINS)
        self._run("linclust", [folder / "db", folder / "clusters", folder / "tmp"], flags)
        result = folder / "clusters.tsv"
        self._run("createtsv", [folder / "db", folder / "db", folder / "clusters", result])
        return result

    def search(self, queries: Path, targets: Path, folder: Path, flags: str) -> Path:
        """Search each query among the targets: a table of query, target, identity and both coverages."""
        folder.mkdir()
        self._run("createdb", [queries, folder / "queries"], _PROTEINS)
        self._run("createdb", [targets, folder / "targets"], _PROTEINS)
        paths = [folder / "queries", folder / "targets", folder / "hits"]
        self._run("search", [*paths, folder / "tmp"], flags)
        result = folder / "hits.tsv"
        self._run("convertalis", [*paths, result], "--format-output query,target,fident,qcov,tcov")
        return result

    def _run(self, module: str, paths: list[Path], flags: str = "") -> None:
        words = split_flags(flags)
        threads = [] if self._threads is None or module == "createdb" else ["--threads", str(self._threads)]
        self.commands.append(" ".join(["mmseqs", module, *(path.name for path in paths), *map(shlex.quote, words)]))
        command = [self._program, module, *map(str, paths), *words, *threads]
        self._watcher.note(shlex.join(command))
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
            raise ProgramError(_failure(module, code, self._log, start))


def split_flags(flags: str) -> list[str]:
    """Flags as a shell would split them.

    Raises:
        UsageError: a quote is not closed.
    """
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UsageError(f"flags for mmseqs {flags!r}: {error}") from error


def write_fasta(path: Path, batches: Iterable[tuple[TokenRows, NDArray[np.int64]]], alphabet: Alphabet) -> int:
    """Write sequences under their numbers; how many there are is returned."""
    total = 0
    # Gaps, which some alphabets have, are no residues to MMseqs2.
    letters = np.array([ord(token if token.isalpha() else "X") for token in alphabet.tokens], np.uint8)
    with path.open("wb") as stream:
        for batch, names in batches:
            total += len(batch)
            residues = letters[batch.flat()].tobytes()
            ends = np.cumsum(batch.lengths()).tolist()
            pieces, start = [], 0
            for name, end in zip(names.tolist(), ends, strict=True):
                pieces.append(b">%d\n%b\n" % (name, residues[start:end]))
                start = end
            stream.write(b"".join(pieces))
    return total


def read_pairs(path: Path) -> Iterator[NDArray[np.int64]]:
    """The first two columns of a table of numbers, some thousand rows at a time: ``[N, 2]``."""
    with path.open("rb") as stream:
        while lines := stream.readlines(BATCH_BYTES):
            yield np.array([line.split(b"\t", 2)[:2] for line in lines]).astype(np.int64)


def best_hits(path: Path, *, reverse: bool) -> NDArray[np.float64]:
    """The hit of highest identity of each training sequence: ``[K, 5]``.

    Its columns are the training sequence, the validation sequence, identity, and the coverage of each.
    """
    order = [1, 0, 2, 4, 3] if reverse else [0, 1, 2, 3, 4]
    best = np.zeros((0, 5))
    with path.open("rb") as stream:
        while lines := stream.readlines(BATCH_BYTES):
            hits = np.array([line.split() for line in lines]).astype(np.float64)[:, order]
            hits = np.concatenate([best, hits])
            hits = hits[np.lexsort((hits[:, 1], -hits[:, 2], hits[:, 0]))]
            best = hits[np.unique(hits[:, 0], return_index=True)[1]]
    return best


def _failure(module: str, code: int, log: Path, start: int) -> str:
    """What MMseqs2 said last."""
    with log.open("rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").replace("\r", "\n").splitlines()
    said = [line.strip() for line in lines if not _NOISE.match(line)][-_SHOWN:]
    number = code - 128 if code > 128 else -code
    if number > 0:
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        how = f"was killed by {name}" + (" (out of memory?)" if number == signal.SIGKILL else "")
    else:
        how = f"failed with code {code}"
    return (
        f"mmseqs {module} {how}; it said: {' | '.join(said) or 'nothing'}; all of it is in {log}; "
        "the same command goes on with what was done before"
    )
