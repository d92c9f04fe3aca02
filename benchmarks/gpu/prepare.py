"""The part ``prepare``: write models with random weights and training data on the CPU while the GPU does other work.

Models are written in bfloat16, in the order in which other parts need them; each gets its name when it is complete.
``protea data import --csv``, which does not need MMseqs2, makes the store from synthetic sequences.

Usage: python benchmarks/gpu/prepare.py OUT WORK SIZE... [--dry-run]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from records import append
from sizes import DONE, SIZES, TOY, architecture, model_folder, store_folder
from synthetic import sequences, write_shards

TRAINED, DRY_TRAINED = 60_000, 300
HELD_OUT = 20


def protea(*arguments: object) -> None:
    """Run a Protea command in a separate process, so that several can run at once.

    Raises:
        CalledProcessError: the command failed and printed the reason.
    """
    subprocess.run([sys.executable, "-m", "protea", *map(str, arguments)], check=True)


def make_store(work: Path, *, dry: bool) -> dict[str, float | int]:
    """Make the training data."""
    count = DRY_TRAINED if dry else TRAINED
    found = sequences(count + HELD_OUT, seed=2)
    named = [(f"s{number}", one) for number, one in enumerate(found)]
    shards = write_shards(work / "uf50", {"train": named[HELD_OUT:], "val": named[:HELD_OUT]})
    aside = work / "store.partial"
    protea("data", "import", "--csv", shards, "-o", aside)
    aside.rename(store_folder(work))
    return {"sequences": count, "bytes": sum(len(one) for one in found[HELD_OUT:])}


def keep_one_layer(folder: Path) -> None:
    """Reduce a model to its first layer."""
    from safetensors.numpy import load_file, save_file

    config = architecture(folder)
    layer, head = "esm.encoder.layer.", "esm.contact_head.regression.weight"
    tensors = load_file(folder / "model.safetensors")
    kept = {name: each for name, each in tensors.items() if not name.startswith(layer) or f"{layer}0." in name}
    if head in kept:
        kept[head] = kept[head][:, : config["num_attention_heads"]].copy()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")


def make_model(work: Path, size: str, *, dry: bool) -> dict[str, float | int]:
    """Write a model's folder."""
    folder = model_folder(work, size)
    folder.parent.mkdir(exist_ok=True)
    aside = folder.with_name(f"{size}.partial")
    if dry:
        protea("init", TOY.name, "-o", aside)
        keep_one_layer(aside)
    else:
        protea("init", SIZES[size].name, "-o", aside, "--dtype", "bfloat16")
    aside.rename(folder)
    return {"sequences": 0, "bytes": sum(path.stat().st_size for path in folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("sizes", nargs="+")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    wrong = []
    for what in ("store", *given.sizes):
        began = time.perf_counter()
        try:
            if what == "store":
                made = make_store(given.work, dry=given.dry_run)
            elif what in SIZES:
                made = make_model(given.work, what, dry=given.dry_run)
            else:
                raise ValueError(f"no size {what!r}; there are {', '.join(SIZES)}")
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            wrong.append(f"{what} was not made: {error}")
            continue
        append(given.out, "prepare", "prepared", what=what, seconds=time.perf_counter() - began, **made)
    (given.work / DONE).touch()
    print("; ".join(wrong) or "all is there")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
