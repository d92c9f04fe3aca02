"""Compare every output of two versions of Protea, to show that a refactoring changes none of them.

    python benchmarks/same_outputs.py record FOLDER [--models MODELS] [--jobs 2] [--fresh]
    python benchmarks/same_outputs.py compare OLD NEW

``record`` runs the protea that Python finds (``PYTHONPATH=src``) on small random models, sequences and variants, all
from fixed seeds: the commands below and the Python interface, each in a separate process with one thread. FOLDER then
holds their outputs, and their printed text in ``log/``. The models are read from MODELS, or made there the first time;
record both versions with the same models. Each process forks from one that has imported PyTorch; with ``--fresh`` each
is a new ``python -m protea``, which takes twice as long. A command with an unexpected exit code stops the recording.
Recording needs MMseqs2 and the packages of ``pip install -e '.[test]'``.

``compare`` accepts two files as the same if their bytes or their contents are equal: arrays, tables and checkpoints bit
for bit, text letter for letter. It ignores the paths of the folder and of the package, and values that depend on the
machine: speed, memory and utilisation in ``metrics.jsonl`` and ``log/``, hashes of files in ``state.json`` (PyTorch's
files contain random names), and logs of MMseqs2. Arrays of the Python interface may differ by 2e-5 of the largest value
(reported as ``python``), and the printed text of a command may differ (``wording``). Any other difference gives exit
code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.numpy import save_file
from safetensors.torch import load_file

LETTERS = "ACDEFGHIKLMNPQRSTVWY"
STRUCTURES = Path(__file__).resolve().parents[1] / "examples" / "structures"
FIXED = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "NO_COLOR": "1"}
LOG, PATHS, CODES, PYTHON = "log", "paths.json", "codes.json", "python"
IDENTICAL, ROUNDED, WORDING, DIFFERS = "identical", "python", "wording", "DIFFERS"
TOLERANCE = 2e-5
IGNORED = {PATHS, "mmseqs.log", ".lock"}
TIMES = {"tokens_per_second", "utilisation", "peak_memory"}
HASHES = {"files", "sha256"}
SPEED = re.compile(r"in [\d,.]+ s\b|[\d,]+ tokens/s · utilisation [\d.]+%|· [\d.]+ GB\b")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")

# --- commands ----------------------------------------------------------------------------------------------------

COMMANDS = """
train-esm2
data fasta train.fasta -o store-esm2 --valid 20 --seed 3 --threads 1
data info store-esm2
data uniref --uniref50 uniref50.fasta --uniref90 train.fasta --members members.tsv --valid 10 --test 5 --no-filter
  -o store-uniref
pretrain esm2.yaml --dry-run
pretrain esm2.yaml run.steps=10 -o runs/esm2
pretrain esm2.yaml -o runs/esm2 --accept-changes
export runs/esm2 -o runs/esm2-best --checkpoint best
average runs/esm2 --last 3 -o runs/esm2-mean --dtype bfloat16
pretrain esm2.yaml run.precision=bf16-mixed run.recompute=true run.steps=6 optimizer.name=muon -o runs/bf16
export runs/bf16 -o runs/bf16-model
pretrain esm2.yaml model={} init=models/esm2 run.steps=3 -o runs/init

train-esm1nv
data fasta train.fasta -o store-esm1nv --valid 20 --alphabet esm-1nv --max-length 120 --threads 1
pretrain esm1nv.yaml run.steps=10 -o runs/esm1nv
pretrain esm1nv.yaml -o runs/esm1nv --accept-changes
export runs/esm1nv -o runs/esm1nv-newest
average runs/esm1nv --last 2 -o runs/esm1nv-mean

embed esm2 esm1b esm1v esm1nv
embed all.fasta -m models/NAME -o embed/NAME.parquet -r embed/NAME.h5 --pool mean,max,std,bos --layers 0,2,-1
  --duplicates rename
embed all.fasta -m models/NAME -o embed/NAME-window.h5 -r embed/NAME-window.parquet --long window --duplicates skip
embed short.fasta -m models/NAME -o embed/NAME-bf16.parquet -r embed/NAME-bf16.h5 --dtype bfloat16

embed
embed all.fasta -o embed/mini.parquet -r embed/mini.h5 --pool mean,max,std,bos --layers 0,2,-1 --duplicates rename
embed long.fasta -o embed/mini-window.h5 -r embed/mini-window.parquet --long window
embed short.fasta -o embed/mini-fast.parquet -r embed/mini-fast.h5 --fast
embed short.fasta -o embed/mini-bf16.h5 --dtype bfloat16
embed short.fasta -m models/esm2nv -o embed/esm2nv.h5 --dtype float16
embed - -m models/esm2 -o embed/stdin.parquet --store float16 --unknown skip < short.fasta
embed --config embed/stdin.parquet.run.yaml -o embed/again.parquet < short.fasta
embed all.fasta -m models/esm2 -o embed/full.h5 -r embed/folder-r --long full --duplicates skip --token-budget 2048
embed short.fasta -m models/esm1nv -o embed/folder-o -r embed/packed.h5 --compression 4 --store float16
embed all.fasta -m models/esm1b -o embed/shared.parquet -r embed/shared.h5 --shard 1/2 --duplicates rename
embed all.fasta -m models/esm1b -o embed/shared.parquet -r embed/shared.h5 --shard 2/2 --duplicates rename
merge embed/shared.parquet embed/shared.h5

score
score wild.fasta variants.csv -o score/mini.csv
score one.fasta --scan -o score/scan.csv --plot score/scan.html
score wild.fasta variants.csv -m models/esm2 -o score/esm2-masked.parquet
score wild.fasta variants.csv -m models/esm2 --method wildtype-marginals -o score/esm2-wildtype.parquet
score wild.fasta variants.csv -m models/esm2 --method pseudo-likelihood -o score/esm2-pseudo.parquet
score wild.fasta variants.csv -m models/esm1nv --method pseudo-likelihood --column x -o score/esm1nv.tsv
score wild.fasta variants.csv -m models/esm2 -m models/esm1v -m models/esm1b -o score/ensemble.csv
score one.fasta indels.csv -m models/esm2 --method pseudo-likelihood -o score/indels.csv
score one.fasta indels.csv -m models/esm1nv -m models/esm1b --method pseudo-likelihood -o score/indels-ensemble.csv
score long.fasta long.csv -m models/esm1b -o score/long.csv --token-budget 3000
score long.fasta long.csv -m models/esm2 --method wildtype-marginals --long full -o score/full.csv
score long.fasta long.csv -m models/esm1nv --method wildtype-marginals -o score/long-esm1nv.csv
1| score wild.fasta wrong.csv -m models/esm1v -o score/wrong.csv
evaluate proteingym gym -m models/esm2 -m models/esm1b --beside X -o score/gym.csv

perplexity
perplexity all.fasta -m models/esm2 -o perplexity/esm2.csv
perplexity short.fasta -m models/esm1b -o perplexity/esm1b.csv
perplexity short.fasta -m models/esm1nv -o perplexity/esm1nv.csv --long error
perplexity all.fasta -m models/esm1v --masking bionemo2 --seed 7 -o perplexity/esm1v.parquet
perplexity wild.fasta -o perplexity/mini.csv --against transformers
perplexity one.fasta --pseudo -o perplexity/pseudo.csv --plot perplexity/pseudo.svg
perplexity wild.fasta --pseudo -m models/esm1nv -o perplexity/pseudo-esm1nv.parquet
perplexity middle.fasta --pseudo -m models/esm1nv -o perplexity/pseudo-windows.tsv

contacts
contacts wild.fasta -m models/esm2 -o contacts/esm2.h5
contacts wild.fasta -m models/esm1b -o contacts/esm1b.csv --min-probability 0.01 --min-separation 3
contacts one.fasta -o contacts/mini.parquet --plot contacts/mini.html
fit-contacts structures -o contacts/fitted --count 2 --seed 1 --c 20
fit-contacts structures -m models/esm1nv -o contacts/bilinear --count 3 --head bilinear --rank 8
evaluate contacts structures -m contacts/fitted -o contacts/fitted.csv
evaluate contacts structures -m contacts/bilinear --include-fitted --exclude 1ACB_l_B -o contacts/bilinear.parquet
evaluate contacts structures --seed 3 -o contacts/evaluated.tsv
convert contacts/bilinear contacts/bilinear.nemo --no-peers

models
init esm2_t6_8M_UR50D -o init/esm2 --seed 1
init esm1nv -o init/esm1nv --seed 1
init esm2_t6_8M_UR50D -o init/bfloat16 --dtype bfloat16
info --list
info
info models/esm1b --json
check
3| check models/esm2

python
python
"""
"""Chains of commands, which need nothing of one another, each with its name before it; more than one name are a chain
each. ``1| COMMAND`` ends with exit code 1."""

FORMATS = {
    "esm2": ("hf", "fair-esm", "nemo", "nemo2", "te"),
    "esm2nv": ("hf", "nemo2"),
    "esm1b": ("hf", "fair-esm"),
    "esm1v": ("hf", "fair-esm"),
    "esm1nv": ("hf", "nemo"),
}


def commands() -> dict[str, list[str]]:
    """Return all chains of commands by name."""
    found: dict[str, list[str]] = {}
    for block in COMMANDS.strip().replace("\n  ", " ").split("\n\n"):
        head, *lines = block.splitlines()
        title, *names = head.split()
        found |= {f"{title}-{name}": [line.replace("NAME", name) for line in lines] for name in names}
        found |= {} if names else {title: lines}
    return {f"convert-{name}": list(conversions(name)) for name in FORMATS} | found


def conversions(name: str) -> Iterator[str]:
    """Convert each format to each other; the first conversions make the sources of the rest."""

    def place(source: str, to: str) -> str:
        return f"convert/{name}-{source}-{to}{ {'fair-esm': '.pt', 'nemo': '.nemo'}.get(to, '') }"

    first, *others = FORMATS[name]
    for to in others:
        peers = "--peers" if to == "fair-esm" else "--no-peers"
        yield f"convert models/{name} {place(first, to)} --to {to} {peers}"
        yield f"info {place(first, to)}"
    for source in others:
        for to in FORMATS[name]:
            if to != source:
                yield f"convert {place(first, source)} {place(source, to)} --to {to} --no-peers"
    yield f"convert models/{name} convert/{name}-bfloat16 --dtype bfloat16 --no-peers"


# --- models and data ---------------------------------------------------------------------------------------------

SIZE = {"num_hidden_layers": 3, "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 160}
ESM = {"model_type": "esm", "vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1, "token_dropout": True}
ESM1 = ESM | {"position_embedding_type": "absolute", "max_position_embeddings": 1026}
ESM2 = ESM | {"position_embedding_type": "rotary"}
MODELS: dict[str, dict[str, Any]] = {
    "esm2": ESM2,
    "esm2nv": ESM2 | {"vocab_size": 128},
    "esm1b": ESM1 | {"emb_layer_norm_before": True},
    "esm1v": ESM1 | {"emb_layer_norm_before": False},
    "esm1nv": {"model_type": "esm1nv", "vocab_size": 128, "max_position_embeddings": 512},
}
WITH_CONTACTS = ("esm2", "esm1b")


def make_models(folder: Path) -> None:
    """Write a random model of each kind in Hugging Face's layout, without using Protea."""
    for seed, (name, config) in enumerate(MODELS.items()):
        rng = np.random.default_rng(seed)
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(SIZE | config | {"layer_norm_eps": 1e-5}, indent=1))
        tensors = {}
        for key, shape in shapes(name, config):
            scale = 0.1 if len(shape) == 1 else 0.5 if "embeddings" in key or "regression" in key else 0.16
            norm = "norm" in key.lower() and key.endswith("weight")
            tensors[key] = (rng.normal(0, scale, shape) + norm).astype(np.float32)
            if key.endswith("inv_freq"):
                tensors[key] = (1 / 10000 ** (np.arange(0, 8, 2) / 8)).astype(np.float32)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})


def shapes(name: str, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return the tensors of a model by Hugging Face's names."""
    width, inner, words = SIZE["hidden_size"], SIZE["intermediate_size"], config["vocab_size"]
    rotary = config.get("position_embedding_type") == "rotary"
    pairs: dict[str, tuple[int, ...]] = {"embeddings.layer_norm": (width,)} if name == "esm1b" else {}
    for number in range(SIZE["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            pairs[f"{layer}.attention.{part}"] = (width, width)
        pairs |= {f"{layer}.attention.LayerNorm": (width,), f"{layer}.LayerNorm": (width,)}
        pairs |= {f"{layer}.intermediate.dense": (inner, width), f"{layer}.output.dense": (width, inner)}
        if rotary:
            yield f"esm.{layer}.attention.self.rotary_embeddings.inv_freq", (4,)
    pairs["encoder.emb_layer_norm_after"] = (width,)
    if name in WITH_CONTACTS:
        pairs["contact_head.regression"] = (1, SIZE["num_hidden_layers"] * SIZE["num_attention_heads"])
    named = {f"esm.{key}": shape for key, shape in pairs.items()}
    for key, shape in (named | {"lm_head.dense": (width, width), "lm_head.layer_norm": (width,)}).items():
        yield f"{key}.weight", shape
        yield f"{key}.bias", shape[:1]
    yield "lm_head.bias", (words,)
    yield "esm.embeddings.word_embeddings.weight", (words, width)
    if not rotary:
        yield "esm.embeddings.position_embeddings.weight", (config["max_position_embeddings"], width)


def protein(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(LETTERS, k=length))


def substitutions(rng: random.Random, sequence: str, count: int) -> list[str]:
    """Return random variants, a quarter of them with two mutations."""

    def one(place: int) -> str:
        return f"{sequence[place]}{place + 1}{rng.choice(LETTERS.replace(sequence[place], ''))}"

    return [":".join(map(one, sorted(rng.sample(range(len(sequence)), 1 + (n % 4 == 3))))) for n in range(count)]


def make_data(folder: Path) -> None:
    def fasta(name: str, records: list[tuple[str, str]]) -> None:
        (folder / name).write_text("".join(f">{header}\n{sequence}\n" for header, sequence in records))

    def table(name: str, header: str, rows: list[str]) -> None:
        (folder / name).write_text("\n".join([header, *rows, ""]))

    rng = random.Random(5)
    lengths = [1, 2, 3, 7, 509, 510, 511, 700, 1021, 1022, 1023, 1024, 1500, *(rng.randint(5, 200) for _ in range(27))]
    records = [(f"p{number} protein number {number}", protein(rng, length)) for number, length in enumerate(lengths)]
    records += [("p3 the same id again", protein(rng, 30)), ("odd", "MKJJT*AYIAkqrlU-OBZ.X"), ("stop", "MKTAYI**")]
    fasta("all.fasta", records)
    fasta("short.fasta", [records[number] for number in (0, 1, 3, 20, 25, -2)])
    wild = {"one": protein(rng, 60), "two": protein(rng, 33)}
    long = protein(rng, 1200)
    fasta("wild.fasta", list(wild.items()))
    fasta("one.fasta", [("one", wild["one"])])
    fasta("long.fasta", [("long", long)])
    fasta("middle.fasta", [("middle", long[:515])])
    rows = [f"{name},{one},{n}" for name in wild for n, one in enumerate(substitutions(rng, wild[name], 40))]
    table("variants.csv", "id,mutant,note", rows)
    table("wrong.csv", "id,mutant,note", [*rows[:5], "one,W1000A,", "one,,", "nobody,A1C,"])
    table("long.csv", "mutant", [f"{long[place - 1]}{place}{new}" for place in (1, 500, 700, 1200) for new in "AW"])
    a, b, c = list(wild["one"][4:7])
    indels = (f"{a}5del", f"{a}5_{c}7del", f"{a}5_{b}6insWW", f"{a}5_{c}7delinsGGGG", f"{b}6delinsKL:{c}7W")
    table("indels.csv", "mutant", list(indels))
    (folder / "gym").mkdir()
    rows = [f"{name}_scan,{name}.csv,{name},Stability,{sequence},0.4" for name, sequence in wild.items()]
    table("gym/all.csv", "DMS_id,DMS_filename,UniProt_ID,coarse_selection_type,target_seq,spearman X", rows)
    for name, sequence in wild.items():
        rows = [f"{one},{n * n % 7},{n * n % 7 // 4}" for n, one in enumerate(substitutions(rng, sequence, 40))]
        table(f"gym/{name}.csv", "mutant,DMS_score,DMS_score_bin", rows)
    firsts = [protein(rng, rng.randint(20, 150)) for _ in range(100)]
    fasta("uniref50.fasta", [(f"C{n}", first) for n, first in enumerate(firsts)])
    table("members.tsv", "C0\tt0_0,t0_1", [f"C{n}\tt{n}_0,t{n}_1,t{n}_2" for n in range(1, 100)])
    shares = [(n, copy, 0.12 * copy) for n in range(100) for copy in range(3)]
    mutants = [
        (f"t{n}_{copy}", "".join(rng.choice(LETTERS) if rng.random() < share else one for one in firsts[n]))
        for n, copy, share in shares
    ]
    fasta("train.fasta", mutants)
    for name, architecture in (("esm2", "esm2_t6_8M_UR50D"), ("esm1nv", "esm1nv")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, architecture=architecture))
    shutil.copytree(STRUCTURES, folder / "structures")


RECIPE = """
model: {{architecture: {architecture}, num_hidden_layers: 3, hidden_size: 48, num_attention_heads: 3,
  intermediate_size: 192}}
data: {{store: store-{name}, max_tokens: 128}}
batch: {{tokens: 2048, pack: 512}}
optimizer: {{lr: 2.0e-3}}
schedule: {{warmup: 5, steps: 20}}
run: {{steps: 20, precision: float32, device: cpu, seed: 3}}
validation: {{every: 5, tokens: 4096}}
save: {{every: 5, newest: 3}}
log: {{every: 1, tensorboard: false, peak_tflops: 0.1}}
"""

# --- recording ---------------------------------------------------------------------------------------------------


def record(folder: Path, models: Path, jobs: int, *, fresh: bool) -> None:
    folder.mkdir(parents=True)
    if not models.exists():
        make_models(models)
    if models != folder / "models":
        shutil.copytree(models, folder / "models")
    make_data(folder)
    for name in (LOG, "embed", "score", "perplexity", "contacts", "convert", "init", "runs", PYTHON):
        (folder / name).mkdir()
    found = find_spec("protea")
    paths = {"PACKAGE": str(Path(str(found and found.origin)).parent), "FOLDER": str(folder)}
    began = time.monotonic()
    codes = run(folder, commands(), jobs, fresh=fresh)
    (folder / PATHS).write_text(json.dumps(paths))
    (folder / CODES).write_text(json.dumps(codes, indent=1, sort_keys=True))
    print(f"{len(codes)} commands of {paths['PACKAGE']} in {time.monotonic() - began:.0f} s")


def run(folder: Path, chains: Mapping[str, list[str]], jobs: int, *, fresh: bool) -> dict[str, int]:
    """Run chains of commands, several at a time, and return their exit codes."""
    waiting = [deque((f"{name}-{n:02}", line) for n, line in enumerate(lines, 1)) for name, lines in chains.items()]
    running: dict[int, tuple[str, str, float, deque[tuple[str, str]]]] = {}
    codes: dict[str, int] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            chain = waiting.pop(0)
            name, line = chain.popleft()
            running[os.fork() or become(folder, name, line, fresh=fresh)] = (name, line, time.monotonic(), chain)
        pid, status = os.wait()
        name, line, began, chain = running.pop(pid)
        codes[name] = os.waitstatus_to_exitcode(status)
        if codes[name] != int(line.rpartition("| ")[0] or 0):
            printed = "".join((folder / LOG / f"{name}.{kind}").read_text() for kind in ("out", "err"))
            sys.exit(f"{name}: {line}: exit code {codes[name]}\n{printed}")
        print(f"{time.monotonic() - began:5.1f} s  {name}: {line}", flush=True)
        waiting[:0] = [chain] if chain else []
    return codes


def become(folder: Path, name: str, line: str, *, fresh: bool) -> int:
    """Become the process of a command and run it to its end."""
    command, _, source = line.rpartition("| ")[2].partition(" < ")
    os.chdir(folder)
    for number, place in enumerate((source or os.devnull, f"{LOG}/{name}.out", f"{LOG}/{name}.err")):
        os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
    ours = command == PYTHON
    if fresh:
        os.execv(sys.executable, [sys.executable, *([__file__] if ours else ["-m", "protea"]), *shlex.split(command)])
    sys.argv, sys.path[0] = ["protea", *shlex.split(command)], str(folder)
    if ours:
        python()
    else:
        runpy.run_module("protea", run_name="__main__", alter_sys=True)
    sys.exit()


def python() -> None:
    """Write arrays of the Python interface to the current folder."""
    import protea

    rng = random.Random(9)
    sequences = [protein(rng, length) for length in (1, 8, 40, 130, 300)]
    wild, variants = sequences[2], substitutions(rng, sequences[2], 8)
    for name in ("protea-mini", "esm2", "esm1b", "esm1v", "esm1nv"):
        model = protea.load(name if name == "protea-mini" else f"models/{name}", device="cpu")
        found: dict[str, Any] = {
            "embed_mean": model.embed(sequences, pool="mean", token_budget=256),
            "embed_std": model.embed(sequences, pool="std", layers=[0, 1, -1]),
            "perplexity": model.perplexity(sequences, seed=3),
            "pseudo_perplexity": model.pseudo_perplexity(sequences[:3]),
            "scan": model.scan(wild, method="wildtype-marginals"),
            "attention": model.attention(wild, layers=[1, -1], heads=[0, 2]),
        }
        for method in ("masked-marginals", "wildtype-marginals", "pseudo-likelihood"):
            found[f"score_{method}"] = model.score(wild, variants, method=method)
        found |= {f"embed_{n}": one for n, one in enumerate(model.embed(sequences, layers=[0, -1]))}
        found |= {f"logits_{n}": one for n, one in enumerate(model.logits(sequences))}
        if "contacts" in model.capabilities:
            found["contacts"] = model.contacts(sequences[3])
        np.savez(f"{PYTHON}/{name}.npz", **found)
        model.save(f"{PYTHON}/{name}")


# --- comparing ---------------------------------------------------------------------------------------------------


def compare(old: Path, new: Path) -> int:
    places = sorted({place for folder in (old, new) for place in outputs(folder)})
    rows = [(place, *verdict(old, new, place)) for place in places]
    for place, what, detail in rows:
        print(f"{what:<9}  {place}{detail and f': {detail}'}")
    count = Counter(what for _, what, _ in rows)
    commands = len(json.loads((old / CODES).read_text()))
    print(f"{commands} commands, {len(rows)} outputs: " + ", ".join(f"{n} {what}" for what, n in count.items()))
    return int(count[DIFFERS] > 0)


def outputs(folder: Path) -> Iterator[str]:
    """List the files; the tensors of a checkpoint that PyTorch wrote count as one."""
    if not (folder / PATHS).exists():
        sys.exit(f"{folder}: was not recorded to the end")
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in IGNORED:
            distributed = path.name == ".metadata" or path.suffix == ".distcp"
            yield str((path.parent if distributed else path).relative_to(folder))


def verdict(old: Path, new: Path, place: str) -> tuple[str, str]:
    """Compare one output of two recordings: identical or not, and how they differ."""
    x, y = old / place, new / place
    if not (x.exists() and y.exists()):
        return DIFFERS, f"in {old if x.exists() else new} alone"
    if x.is_file() and x.read_bytes() == y.read_bytes():
        return IDENTICAL, ""
    if x.is_dir() or x.suffix in READERS:
        what, detail = differing(arrays_of(x), arrays_of(y), rounding=x.suffix == ".npz")
        return (DIFFERS, detail or "in its header") if x.suffix == ".safetensors" else (what, detail)
    try:
        a, b = text(old, place), text(new, place)
    except UnicodeDecodeError:
        return DIFFERS, "in its bytes"
    if a == b:
        return IDENTICAL, ""
    lines = zip_longest(a.splitlines(), b.splitlines(), fillvalue="")
    detail = next((f"{p.strip()!r}, now {q.strip()!r}" for p, q in lines if p != q), "in the ends of lines")
    p, q = ([float(number) for number in NUMBER.findall(one)] for one in (a, b))
    if len(p) == len(q) and p != q:
        detail += f"; numbers by up to {max(abs(m - n) for m, n in zip(p, q, strict=True)):.1e}"
    return (WORDING if place.startswith(LOG) else DIFFERS), detail


def text(folder: Path, place: str) -> str:
    """Return a file's text without the values that belong to this folder or this run."""
    found = (folder / place).read_text()
    for name, own in json.loads((folder / PATHS).read_text()).items():
        found = found.replace(own, name)
    if place.startswith(LOG):
        return SPEED.sub("SPEED", found)
    kind = Path(place).name
    if kind not in ("metrics.jsonl", "state.json"):
        return found
    values = map(json.loads, found.splitlines() if kind == "metrics.jsonl" else [found])
    return "\n".join(json.dumps({k: v for k, v in one.items() if k not in TIMES | HASHES}) for one in values)


def differing(a: dict[str, Any], b: dict[str, Any], *, rounding: bool) -> tuple[str, str]:
    """Return whether the arrays of two files agree, and their largest difference."""
    details = [f"{name} in one alone" for name in sorted({*a} ^ {*b})[:5]]
    if not details and list(a) != list(b):
        details.append("in another order")
    gaps = {name: found for name in a if name in b and (found := gap(a[name], b[name], relative=rounding)) is not None}
    if gaps:
        worst = max(gaps, key=gaps.__getitem__)
        details.append(f"{len(gaps)} of {len(a)} arrays, {worst} most, by {gaps[worst]:.1e}")
        if rounding and gaps[worst] <= TOLERANCE and len(details) == 1:
            return ROUNDED, details[0]
    return (DIFFERS if details else IDENTICAL), "; ".join(details)


def gap(a: Any, b: Any, *, relative: bool) -> float | None:
    """Return the largest difference: infinite for values that cannot be subtracted, ``None`` for the same bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype:
            return math.inf
        if torch.equal(*(one.contiguous().reshape(-1).view(torch.uint8) for one in (a, b))) and a.shape == b.shape:
            return None
        a, b = a.double().numpy(), b.double().numpy()
    elif not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.dtype.kind not in "fiub":
        same = np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
        return None if same else math.inf
    elif (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()):
        return None
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return math.inf
    x, y = a.astype(float), b.astype(float)
    with np.errstate(invalid="ignore"):
        gaps = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
    largest = float(np.nan_to_num(gaps, nan=math.inf, posinf=math.inf).max())
    return largest / max(1.0, float(np.nanmax(np.abs(x)))) if relative else largest


def arrays_of(path: Path) -> dict[str, Any]:
    """Read the arrays of a file by name, with their types and attributes."""
    if path.is_file():
        return READERS[path.suffix](path)
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as place:
        dcp_to_torch_save(path, f"{place}/all.pt")
        return dict(flat("", torch.load(f"{place}/all.pt", weights_only=False)))


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a dictionary of dictionaries."""
    if not isinstance(value, dict):
        yield name, value
        return
    for key, one in value.items():
        yield from flat(f"{name}.{key}", one)


def read_parquet(path: Path) -> dict[str, Any]:
    table = parquet.read_table(path)
    found: dict[str, Any] = {"schema": str(table.schema), "metadata": str(table.schema.metadata)}
    for name in table.column_names:
        values = table[name].combine_chunks()
        found[f"{name} sizes"] = [len(one) if isinstance(one, list) else None for one in values.to_pylist()]
        while pa.types.is_nested(values.type):
            values = values.flatten()
        found[name] = values.to_numpy(zero_copy_only=False)
        found[f"{name} missing"] = values.is_null().to_pylist()
    return found


def read_hdf5(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def visit(name: str, node: h5py.Dataset | h5py.Group) -> None:
        found.update({f"{name}@{key}": np.asarray(value) for key, value in node.attrs.items()})
        if isinstance(node, h5py.Dataset):
            found[name] = np.asarray(node[()])
            found[f"{name} as stored"] = (str(node.dtype), node.compression, node.compression_opts)

    with h5py.File(path) as file:
        visit("", file)
        file.visititems(visit)
    return found


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".h5": read_hdf5,
    ".parquet": read_parquet,
    ".npz": lambda path: dict(np.load(path)),
    ".npy": lambda path: {"": np.load(path)},
    ".safetensors": lambda path: dict(load_file(path)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("folder", type=Path, help="folder for the outputs; must be new")
    recording.add_argument("--models", type=Path, help="folder of the models; FOLDER/models by default")
    recording.add_argument("--jobs", type=int, default=2, help="number of commands that run at a time")
    recording.add_argument("--fresh", action="store_true", help="start a new Python for each command")
    comparing = actions.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    actions.add_parser(PYTHON)
    options = parser.parse_args()
    if options.action == "compare":
        sys.exit(compare(options.old, options.new))
    if options.action == PYTHON:
        return python()
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    fixed = FIXED | {"PYTHONPATH": os.pathsep.join(paths)}
    if any(os.environ.get(name) != value for name, value in fixed.items()):
        os.execve(sys.executable, sys.orig_argv, os.environ | fixed)  # libraries read them on import
    folder = options.folder.resolve()
    record(folder, (options.models or folder / "models").resolve(), options.jobs, fresh=options.fresh)
    return None


if __name__ == "__main__":
    main()
