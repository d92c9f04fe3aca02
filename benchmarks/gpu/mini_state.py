"""Pack a training run into files to move it: ``run.tar.zst.0`` and following, each of at most PIECE bytes.

The pack holds the newest checkpoint, the recipe and the metrics: everything that the run needs to continue. The bytes
of four-byte numbers are first grouped by position, so that signs and exponents compress well. For a finished run, by
the results of the part ``train``, the pack holds only the exported model.

Usage: python benchmarks/gpu/mini_state.py pack OUT RUN [MODEL]
       python benchmarks/gpu/mini_state.py unpack FROM RUN
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
from records import append, read

NAME = "run.tar.zst"
PIECE = 15 * 2**20
LIMIT = 60e6
LEVEL = 9
WORD = 4
TENSORS = (".distcp", ".safetensors")
"""Files that are mostly numbers of four bytes."""

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def apart(data: bytes) -> bytes:
    """Put the first bytes of all words first, then the second bytes, and so on; an incomplete word stays last."""
    whole = len(data) // WORD * WORD
    return np.frombuffer(data[:whole], np.uint8).reshape(-1, WORD).T.tobytes() + data[whole:]


def together(data: bytes) -> bytes:
    """Undo ``apart``."""
    whole = len(data) // WORD * WORD
    return np.frombuffer(data[:whole], np.uint8).reshape(WORD, -1).T.tobytes() + data[whole:]


def newest(run: Path) -> Path:
    """Return the newest checkpoint.

    Raises:
        SystemExit: there is no checkpoint.
    """
    found = sorted(path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    if not found:
        raise SystemExit(f"{run}: has no checkpoint")
    return found[-1]


def pack(out: Path, run: Path, model: Path | None) -> None:
    """Write the pieces of the run, or of its model if the run is finished."""
    trained = [row for row in read(out) if row["kind"] == "mini"]
    if model is None or not model.is_dir() or not (trained and trained[-1]["finished"]):
        model = None
    roots = [run / "recipe.yaml", run / "metrics.jsonl"]
    if model is None:
        roots += sorted(path for path in newest(run).rglob("*") if path.is_file())
    names = {path: str(path.relative_to(run)) for path in roots}
    if model is not None:
        names |= {path: f"model/{path.name}" for path in sorted(model.iterdir())}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, name in names.items():
            # Models are stored in bfloat16, with two bytes; only checkpoints are float32.
            split = path.suffix in TENSORS and model is None
            data = apart(path.read_bytes()) if split else path.read_bytes()
            entry = tarfile.TarInfo(f"{name}.apart" if split else name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    pressed = zstd.compress(buffer.getvalue(), LEVEL)
    for old in out.glob(f"{NAME}.*"):
        old.unlink()
    pieces = [pressed[first : first + PIECE] for first in range(0, len(pressed), PIECE)]
    for number, piece in enumerate(pieces):
        (out / f"{NAME}.{number}").write_bytes(piece)
    kept = "the exported model" if model is not None else newest(run).name
    append(
        out,
        "pack",
        "carried",
        what=kept,
        bytes=len(pressed),
        pieces=len(pieces),
        uncompressed=len(buffer.getvalue()),
        within_limit=len(pressed) < LIMIT,
    )
    if len(pressed) >= LIMIT:
        raise SystemExit(f"{len(pressed) / 1e6:.1f} MB are more than the {LIMIT / 1e6:.0f} that can be carried")


def unpack(source: Path, run: Path) -> None:
    """Rebuild the run's folder from the pieces."""
    pieces = sorted(source.glob(f"{NAME}.*"), key=lambda path: int(path.suffix[1:]))
    if not pieces:
        raise SystemExit(f"{source}: holds no {NAME}.0")
    data = zstd.decompress(b"".join(path.read_bytes() for path in pieces))
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for entry in tar:
            stream = tar.extractfile(entry)
            content = stream.read() if stream is not None else b""
            path = run / entry.name.removesuffix(".apart")
            if not path.resolve().is_relative_to(run.resolve()):
                raise SystemExit(f"{source}: {entry.name} is outside the run's folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(together(content) if entry.name.endswith(".apart") else content)
    (run / ".lock").touch()
    print(f"{run}: {len(data) / 1e6:.1f} MB from {len(pieces)} pieces")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("one", type=Path, metavar="OUT|FROM")
    parser.add_argument("run", type=Path)
    parser.add_argument("model", type=Path, nargs="?")
    given = parser.parse_args()
    if given.what == "pack":
        pack(given.one, given.run, given.model)
    else:
        unpack(given.one, given.run)


if __name__ == "__main__":
    main()
