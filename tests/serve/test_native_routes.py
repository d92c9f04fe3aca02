"""Native routes: the numbers of the commands, to the bit, in every format; everything that was changed is listed."""

from __future__ import annotations

import base64
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from hypothesis.strategies import floats

import protea
from conftest import Run
from protea.serve.answer_formats import rows_as_json
from serving import LETTERS, UBIQUITIN, Running

_RNG = random.Random(5)
PROTEINS = {
    "ubiquitin": UBIQUITIN,
    "long": "".join(_RNG.choices(LETTERS, k=1100)),
    "odd": "mkbzxu*",
    "one": "M",
    **{f"r{number}": "".join(_RNG.choices(LETTERS, k=_RNG.randint(5, 90))) for number in range(6)},
}
SEQUENCES = [{"id": name, "sequence": text} for name, text in PROTEINS.items()]


@pytest.fixture
def proteins(tmp_path: Path) -> Path:
    path = tmp_path / "proteins.fasta"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in PROTEINS.items()))
    return path


def crowd(server: Running, ask: Any) -> Any:
    """What ``ask`` gives while others ask, too."""
    with ThreadPoolExecutor(6) as pool:
        noise = [
            pool.submit(server.post, "/v1/logits", {"sequences": ["".join(random.Random(n).choices(LETTERS, k=n + 9))]})
            for n in range(20)
        ]
        found = pool.submit(ask).result()
        assert all(one.result().status == 200 for one in noise)
    return found


def npz(body: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(body), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("long", ["truncate", "window"])
def test_embed_gives_the_bits_of_the_command(server: Running, run: Run, proteins: Path, long: str) -> None:
    assert run("embed", proteins, "-o", "o.npz", "--pool", "mean,max", "--layers", "3,-1", "--long", long).code == 0
    body = {"sequences": SEQUENCES, "pool": ["mean", "max"], "layers": [3, -1], "long": long}
    mine = crowd(server, lambda: server.post("/v1/embed", body, "application/x-npz"))
    assert mine.status == 200
    found = npz(mine.body)
    with np.load("o.npz") as theirs:
        assert found["id"].tolist() == theirs["ids"].tolist()
        assert found["truncated_from"].tolist() == theirs["truncated_from"].tolist()
        for name in ("embedding_mean_layer3", "embedding_mean_layer6", "embedding_max_layer3", "embedding_max_layer6"):
            assert np.array_equal(found[name], theirs[name])
    notes = {(note["id"], note["what"]) for note in json.loads(str(found["protea"]))["notes"]}
    assert notes == {("long", "truncated" if long == "truncate" else "windowed"), ("odd", "altered")}


def test_residues_and_logits_give_the_bits_of_the_command(server: Running, run: Run, proteins: Path) -> None:
    assert run("embed", proteins, "-r", "r.h5", "--logits", "l.h5").code == 0
    residues = crowd(server, lambda: server.post("/v1/residues", {"sequences": SEQUENCES}, "application/x-hdf5"))
    logits = crowd(server, lambda: server.post("/v1/logits", {"sequences": SEQUENCES}, "application/x-hdf5"))
    for mine, theirs in ((residues, "r.h5"), (logits, "l.h5")):
        assert mine.status == 200
        with h5py.File(io.BytesIO(mine.body)) as one, h5py.File(theirs) as two:
            assert list(one) == list(two)
            for name in two:
                assert np.array_equal(one[name][()], two[name][()])


def test_score_and_scan_give_the_bits_of_the_command(server: Running, run: Run, tmp_path: Path) -> None:
    (tmp_path / "u.fasta").write_text(f">u\n{UBIQUITIN}\n")
    (tmp_path / "v.csv").write_text("mutant\nM1A\nQ2L:I3V\nA1C\n")
    run("score", "u.fasta", "v.csv", "-o", "s.parquet")
    assert run("score", "u.fasta", "--scan", "--positions", "1-4", "-o", "scan.parquet").code == 0
    variants = ["M1A", "Q2L:I3V", "A1C"]
    scored = crowd(server, lambda: server.post("/v1/score", {"sequence": UBIQUITIN, "variants": variants})).json
    assert [row["model_score"] for row in scored["records"]] == pq.read_table("s.parquet")["model_score"].to_pylist()
    assert "position 1 holds M" in scored["records"][2]["reason"]
    scan = crowd(server, lambda: server.post("/v1/scan", {"sequence": UBIQUITIN, "positions": "1-4"})).json
    assert [row["model_score"] for row in scan["records"]] == pq.read_table("scan.parquet")["model_score"].to_pylist()
    matrix = np.array(scan["matrix"], float)
    assert matrix.shape == (76, 20)
    assert matrix[0, scan["letters"].index("A")] == scan["records"][0]["model_score"]


@pytest.mark.parametrize("pseudo", [False, True])
def test_perplexity_gives_the_bits_of_the_command(server: Running, run: Run, tmp_path: Path, pseudo: bool) -> None:
    few = [{"id": "u", "sequence": UBIQUITIN}, {"id": "k", "sequence": "MKTAYIAKQR"}]
    (tmp_path / "few.fasta").write_text("".join(f">{one['id']}\n{one['sequence']}\n" for one in few))
    assert run("perplexity", "few.fasta", "-o", "p.parquet", *(["--pseudo"] if pseudo else [])).code == 0
    mine = crowd(server, lambda: server.post("/v1/perplexity", {"sequences": few, "pseudo": pseudo})).json
    assert mine["records"] == pq.read_table("p.parquet").to_pylist()


def test_contacts_give_the_bits_of_the_command(server: Running, run: Run, tmp_path: Path) -> None:
    (tmp_path / "u.fasta").write_text(f">u\n{UBIQUITIN}\n")
    assert run("contacts", "u.fasta", "-o", "c.h5").code == 0
    body = {"sequences": [{"id": "u", "sequence": UBIQUITIN}]}
    mine = crowd(server, lambda: server.post("/v1/contacts", body, "application/x-npz"))
    with h5py.File("c.h5") as theirs:
        assert np.array_equal(npz(mine.body)["contacts/0"], theirs["u"][()])


def test_all_formats_hold_the_same_numbers(server: Running) -> None:
    body = {"sequences": ["MKTAYIAKQR", "MK"], "layers": [0, -1]}
    names = ["embedding_layer0", "embedding_layer6"]

    def of(accept: str) -> bytes:
        answer = server.post("/v1/residues", body, accept)
        assert answer.status == 200
        assert answer.headers["content-type"] == accept
        return answer.body

    plain = json.loads(of("application/json"))
    wanted = [[np.array(row[name], np.float32) for name in names] for row in plain["records"]]
    coded = json.loads(of("application/json; arrays=base64"))["records"]
    table = pa.ipc.open_stream(of("application/vnd.apache.arrow.stream")).read_all()
    parquet = pq.read_table(io.BytesIO(of("application/vnd.apache.parquet")))
    assert parquet.equals(table)
    arrays = npz(of("application/x-npz"))
    with h5py.File(io.BytesIO(of("application/x-hdf5"))) as file:
        for row, of_row in enumerate(wanted):
            for number, (name, values) in enumerate(zip(names, of_row, strict=True)):
                one = coded[row][name]
                decoded = np.frombuffer(base64.b64decode(one["data"]), "<f4").reshape(one["shape"])
                assert np.array_equal(decoded, values)
                assert np.array_equal(np.array(table[name][row].as_py(), np.float32), values)
                assert np.array_equal(arrays[f"{name}/{row}"], values)
                assert np.array_equal(file[f"{row}" + (f"@{name}" if number else "")][()], values)
    about = json.loads(table.schema.metadata[b"protea"])
    assert about["model"] == plain["model"] == "protea-mini"
    assert about["tokens"] == 16


def test_large_answers_are_streamed(server: Running) -> None:
    answer = server.post("/v1/residues", {"sequences": ["A" * 900] * 4}, "application/vnd.apache.arrow.stream")
    assert answer.headers["transfer-encoding"] == "chunked"
    assert pa.ipc.open_stream(answer.body).read_all().num_rows == 4


def test_predict_gives_the_rows_of_the_command(run: Run, tmp_path: Path) -> None:
    from serving import running

    rng = random.Random(1)
    parts = ["train"] * 12 + ["test"] * 6
    rows = "\n".join(
        f"p{n},{''.join(rng.choices('AVLK' if n % 2 else 'DEGS', k=30))},{'ab'[n % 2]},{part}"
        for n, part in enumerate(parts)
    )
    (tmp_path / "labels.csv").write_text(f"id,sequence,target,set\n{rows}\n")
    assert run("finetune", "labels.csv", "-o", "adapter", "--split", "given").code == 0
    (tmp_path / "in.fasta").write_text(f">u\n{UBIQUITIN}\n>k\nMKTAYIAKQR\n")
    assert run("predict", "adapter", "in.fasta", "-o", "p.parquet").code == 0
    with running(adapters={"mine": tmp_path / "adapter"}, jobs=tmp_path / "jobs") as one:
        body = {"sequences": [{"id": "u", "sequence": UBIQUITIN}, {"id": "k", "sequence": "MKTAYIAKQR"}]}
        assert one.post("/v1/predict/mine", body).json["records"] == pq.read_table("p.parquet").to_pylist()
        assert one.post("/v1/predict/other", body).status == 404
        assert protea.Client(one.url).predict("mine", ["MK"])[0]["id"] == "0"
        served = one.service.served
        assert served is not None
        assert served.adapters["mine"].lane is served.models["protea-mini"].lane  # one copy of the weights
        client = protea.Client(one.url)
        job = client.submit(tmp_path / "in.fasta", what="predict", adapter="mine")
        list(client.wait(job, every=0.05))
        client.fetch(job, tmp_path / "j.parquet")
        assert pq.read_table("j.parquet").to_pylist() == pq.read_table("p.parquet").to_pylist()


def test_the_python_client(server: Running) -> None:
    client, model = protea.Client(server.url), protea.load(device="cpu")
    assert client.models() == ["protea-mini"]
    named = {"u": UBIQUITIN, "k": "MKTAYIAKQR"}
    vectors = client.embed(named)
    assert np.array_equal(vectors["u"], model.embed(UBIQUITIN, pool="mean"))
    assert client.embed(list(named.values())).shape == (2, 320)
    assert np.array_equal(client.residues(["MKTAYIAKQR"])[0], model.embed("MKTAYIAKQR"))
    assert client.logits(named)["k"].shape == (10, 27)
    assert np.array_equal(client.contacts(["MKTAYIAKQR"])[0], model.contacts("MKTAYIAKQR"))
    assert client.score(UBIQUITIN, ["M1A"]) == model.score(UBIQUITIN, ["M1A"])
    assert client.scan("MKT").shape == (3, 20)
    assert client.perplexity([UBIQUITIN]) == model.perplexity([UBIQUITIN])
    with pytest.raises(protea.ProteaError, match="1 at 2") as error:
        client.embed(["M1"], unknown="error")
    assert error.value.status == 422  # type: ignore[attr-defined]
    assert error.value.problem["position"] == 2  # type: ignore[attr-defined]
    with pytest.raises(protea.ProteaError, match="cannot be reached"):
        protea.Client("http://127.0.0.1:9").models()


@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=3, max_side=4), elements=floats(width=32)))
def test_arrays_as_json_are_the_same_a_row_at_a_time(array: Any) -> None:
    found = np.array(json.loads(rows_as_json(array)), np.float32)
    assert np.array_equal(found, np.where(np.isfinite(array), array, np.nan), equal_nan=True)
