"""One run of every part of Protea, on small inputs: ``python tests/smoke.py``, in any environment.

Needs Protea with its extras ``evaluate``, ``finetune``, ``plot``, ``serve``, ``sklearn`` and ``train``, and no test
tools: ``make test-floors`` runs it with the oldest versions of the dependencies that ``pyproject.toml`` allows.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from urllib.request import urlopen

import h5py
import numpy as np
import pyarrow.parquet as pq

import protea
from protea.cli import main
from protea.sklearn import EmbeddingTransformer, ProteaClassifier

EXAMPLES = Path(__file__).parents[1] / "examples"
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ", "GDGTQDNLSGAEKAVQVKVKALPDAQFEVVHSL", "MSDQEAKPSTEDLGDKKEGEYIKLKVIGQ"]


def run(*arguments: object) -> None:
    """Run one ``protea`` command; a failure ends the script with the command's own message."""
    words = [str(argument) for argument in arguments]
    print("$ protea", *words, flush=True)
    sys.argv = ["protea", *words]
    with redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise


def embed(folder: Path, fasta: Path) -> None:
    run("embed", fasta, "-o", folder / "s.parquet", "-r", folder / "r.h5")
    run("embed", fasta, "-o", folder / "s.h5", "-r", folder / "r.parquet", "--compression", 4)
    run("embed", fasta, "-o", folder / "files")
    vectors = pq.read_table(folder / "s.parquet")["embedding"].to_pylist()
    expected = protea.load(device="cpu").embed(SEQUENCES, pool="mean")
    np.testing.assert_allclose(np.array(vectors), expected, rtol=0, atol=1e-5)
    for name in ("s.parquet", "s.h5", "files"):
        np.testing.assert_allclose(protea.read_embeddings(folder / name).to_numpy(), expected, rtol=0, atol=1e-5)
    transformer = EmbeddingTransformer(device="cpu", cache=folder / "cache")
    np.testing.assert_allclose(transformer.fit_transform(SEQUENCES), expected, rtol=0, atol=1e-5)
    with h5py.File(folder / "r.h5") as file:
        assert [file[f"r{number}"].shape[0] for number in range(3)] == [len(sequence) for sequence in SEQUENCES]


def score(folder: Path, fasta: Path) -> None:
    (folder / "variants.csv").write_text("id,mutant\nr0,K2A\nr0,T3V\nr1,D2E\n")
    run("perplexity", fasta)
    run("score", fasta, folder / "variants.csv", "-o", folder / "scored.parquet")
    (folder / "one.fasta").write_text(f">r0\n{SEQUENCES[0]}\n")
    for suffix in ("png", "html"):
        picture = folder / f"scan.{suffix}"
        run("score", folder / "one.fasta", "--scan", "-o", folder / f"scan-{suffix}.csv", "--plot", picture)
        assert picture.stat().st_size > 1000
    run("contacts", fasta, "-o", folder / "maps.h5", "--plot", folder / "maps")
    run("contacts", folder / "one.fasta", "-o", folder / "pairs.csv", "--plot", folder / "map.html")


def train(folder: Path) -> None:
    store, trained = folder / "store", folder / "run"
    run("data", "uniref", "--uniref50", EXAMPLES / "proteins.fasta", "--no-filter", "--valid", 5, "-o", store)
    run("data", "info", store, "--verify", "--plot", folder / "store.png")
    small = ["model.num_hidden_layers=1", "model.hidden_size=16", "model.num_attention_heads=2"]
    sizes = ["model.intermediate_size=64", "batch.tokens=2048", "batch.pack=1024", "run.steps=3", "schedule.warmup=1"]
    options = ["run.precision=float32", "run.device=cpu", "run.compile=false", "validation.tokens=2000"]
    run("pretrain", "esm2_8M", f"data.store={store}", *small, *sizes, *options, "-o", trained)
    run("export", trained, "-o", folder / "model")
    for name in ("esm2mini.pt", "model.nemo", "model-bionemo2", "model-te"):
        kind = {"model-bionemo2": ["--to", "nemo2"], "model-te": ["--to", "te"]}.get(name, [])
        run("convert", folder / "model", folder / name, *kind)
        run("info", folder / name)
        run("convert", folder / name, folder / f"{name}-back")


def contact_heads(folder: Path) -> None:
    """Fit a head on structures and measure it: the parts that need biotite and scikit-learn."""
    run("fit-contacts", EXAMPLES / "structures", "--count", 3, "-o", folder / "head")
    run("evaluate", "contacts", EXAMPLES / "structures", "-m", folder / "head", "-o", folder / "precision.csv")


def predictors(folder: Path) -> None:
    """Train heads, LoRA (by peft) and all weights, predict, and export: the parts that need peft and scikit-learn."""
    table, options = folder / "labels.csv", ["--device", "cpu", "--split", "random"]
    texts = [sequence[start:] for sequence in SEQUENCES for start in range(14)]
    labels = ["many" if text.count("K") > 2 else "few" for text in texts]
    table.write_text("".join(f"{a},{b}\n" for a, b in [("sequence", "label"), *zip(texts, labels, strict=True)]))
    for method in ("frozen", "lora", "full"):
        predictor = folder / method
        epochs = [] if method == "frozen" else ["--epochs", 1]  # a linear head is solved
        run("finetune", table, "-o", predictor, "--method", method, *options, *epochs)
        run("predict", predictor, folder / "in.fasta", "-o", folder / f"{method}.parquet")
        assert pq.read_table(folder / f"{method}.parquet").num_rows == len(SEQUENCES)
        assert (predictor / "report.html").stat().st_size > 1000
    run("export", folder / "lora", "-o", folder / "adapter", "--adapter")
    classifier = ProteaClassifier(device="cpu").fit(texts, labels)
    assert classifier.predict_proba(SEQUENCES).shape == (len(SEQUENCES), 2)


def serve(folder: Path, fasta: Path) -> None:
    """Ask a service and give it a job: the parts that need FastAPI, uvicorn and prometheus-client."""
    words = [sys.executable, "-m", "protea", "serve", "--port", "0", "--jobs", str(folder / "jobs")]
    print("$", *words, flush=True)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            client = protea.Client(next(line for line in process.stderr if "serving" in line).split()[-1])
            expected = protea.load(device="cpu").embed(SEQUENCES, pool="mean")
            np.testing.assert_array_equal(client.embed(SEQUENCES), expected)
            assert client.scan(SEQUENCES[0]).shape == (len(SEQUENCES[0]), 20)
            list(client.wait(job := client.submit(fasta), every=0.1))
            client.fetch(job, folder / "job.parquet")
            assert pq.read_table(folder / "job.parquet").num_rows == len(SEQUENCES)
            for path in ("metrics", "openapi.json", "docs"):
                with urlopen(f"{client.url}/{path}") as answer:
                    assert len(answer.read()) > 100
        finally:
            process.terminate()
    assert process.returncode == 0, process.returncode


def run_all() -> None:
    """Run every part in a temporary folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fasta = folder / "in.fasta"
        fasta.write_text("".join(f">r{number}\n{sequence}\n" for number, sequence in enumerate(SEQUENCES)))
        embed(folder, fasta)
        score(folder, fasta)
        train(folder)
        contact_heads(folder)
        predictors(folder)
        serve(folder, fasta)
    print("all parts ran")


if __name__ == "__main__":
    run_all()
