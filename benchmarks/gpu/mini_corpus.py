"""Prepare the training sequences of Protea-mini: select a part to move, and build a store from it without MMseqs2.

``divide`` runs once, on a machine with MMseqs2, on the store that ``protea data fasta part-*.fasta.zst --search-from
valid`` made from the whole corpus. It writes training sequences of that store, under short names, until they fill
MEGABYTES of compressed FASTA, and the store's whole validation split, which neither the model in the package nor the
new one was trained on::

    python benchmarks/gpu/mini_corpus.py divide STORE part-0.fasta.zst part-1.fasta.zst -o CORPUS [--megabytes 40]

``store`` runs on the GPU machine. CORPUS holds part-*.fasta.zst and valid.fasta.zst, written by ``divide``. Without
valid.fasta.zst, one sequence in 200 is held out by a hash of its letters. The model in the package was trained on most
of those, and their relatives stay in training, so their perplexity proves nothing; the results say so. Each sequence is
a cluster of its own, because the corpus has at most two sequences of a cluster at 50 % identity::

    python benchmarks/gpu/mini_corpus.py store OUT WORK CORPUS
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from records import append
from sizes import store_folder
from synthetic import write_shards

VALID = "valid.fasta.zst"
PARTS = "part-*.fasta.zst"
LEVEL = 19
HELD_OUT_OF = 200
Record = tuple[str, str]


def read(paths: Iterable[Path]) -> Iterator[Record]:
    """Yield the ids and sequences of FASTA files, plain or compressed."""
    from xopen import xopen

    for path in paths:
        name, lines = "", list[str]()
        with xopen(path, "rt", threads=0) as stream:
            for line in stream:
                if not line.startswith(">"):
                    lines.append(line.strip())
                    continue
                if name:
                    yield name, "".join(lines)
                name, lines = line[1:].split()[0], []
        if name:
            yield name, "".join(lines)


def ids_of(store: Path, split: str) -> set[str]:
    """Return the ids of a split's sequences; docs/data.md describes the file's columns."""
    import pyarrow as pa

    with pa.memory_map(str(store / split / "sequences.arrow")) as source:
        return set(pa.ipc.open_file(source).read_all().column("id").to_pylist())


def divide(given: argparse.Namespace) -> None:
    """Write the folder that is moved to the GPU machine."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    train, valid = ids_of(given.store, "train"), ids_of(given.store, "valid")
    given.output.mkdir(parents=True)
    held_out = {name: one for name, one in read(given.parts) if name in valid}
    others = sorted(path for path in given.parts[0].parent.glob(PARTS) if path not in given.parts)
    held_out |= {name: one for name, one in read(others) if name in valid}
    text = "".join(f">{name}\n{held_out[name]}\n" for name in sorted(held_out))
    (given.output / VALID).write_bytes(zstd.compress(text.encode(), LEVEL))
    if absent := len(valid) - len(held_out):
        raise SystemExit(f"{absent:,} sequences held out are in none of the parts; name parts of the store's corpus")
    room = given.megabytes * 10**6 - (given.output / VALID).stat().st_size
    press = zstd.ZstdCompressor(LEVEL)
    count = residues = size = 0
    with (given.output / "part-0.fasta.zst").open("wb") as stream:
        for name, one in read(given.parts):
            if name not in train:
                continue
            size += stream.write(press.compress(f">{count:x}\n{one}\n".encode()))
            count, residues = count + 1, residues + len(one)
            if size >= room:
                break
        size += stream.write(press.flush())
    print(f"{given.output}: {count:,} sequences to train on, {residues:,} residues, {size / 1e6:.1f} MB; ", end="")
    print(f"{len(held_out):,} held out, {(given.output / VALID).stat().st_size / 1e6:.1f} MB")


def make_store(given: argparse.Namespace) -> None:
    """Make the store for training."""
    parts = sorted(given.corpus.glob(PARTS))
    if not parts:
        raise SystemExit(f"{given.corpus}: holds no {PARTS}")
    apart = (given.corpus / VALID).exists()
    held_out = list(read([given.corpus / VALID])) if apart else []
    known = {one for _, one in held_out}
    train: list[Record] = []
    for name, one in read(parts):
        number = int.from_bytes(hashlib.sha256(one.encode()).digest()[:8], "big")
        if not apart and number % HELD_OUT_OF == 0:
            held_out.append((name, one))
        elif one not in known:
            train.append((name, one))
    shards = write_shards(given.work / "uf50", {"train": train, "val": held_out})
    command = [sys.executable, "-m", "protea", "data", "import", "--csv", str(shards)]
    subprocess.run([*command, "-o", str(store_folder(given.work))], check=True)
    append(
        given.out,
        "store",
        "corpus",
        parts=len(parts),
        sequences=len(train),
        residues=sum(len(one) for _, one in train),
        held_out=len(held_out),
        held_out_is_apart=apart,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    one = what.add_parser("divide")
    one.add_argument("store", type=Path)
    one.add_argument("parts", type=Path, nargs="+")
    one.add_argument("-o", "--output", type=Path, required=True)
    one.add_argument("--megabytes", type=float, default=40.0)
    one.set_defaults(do=divide)
    other = what.add_parser("store")
    for name in ("out", "work", "corpus"):
        other.add_argument(name, type=Path)
    other.add_argument("--dry-run", action="store_true")
    other.set_defaults(do=make_store)
    given = parser.parse_args()
    given.do(given)


if __name__ == "__main__":
    main()
