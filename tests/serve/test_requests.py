"""Requests that are written in unusual ways: what they mean, and one clear answer to each that means nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import protea
from messages import check_message
from protea.serve.answer_formats import ARROW, BASE64, JSON, NPZ, chosen
from protea.serve.problems import RefusedError
from serving import Running, running, until

JSON_TYPE = {"Content-Type": JSON}


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", JSON),
        ("text/html, */*;q=0.8", JSON),
        ("application/json;q=0.1, application/x-npz", NPZ),
        ("application/json; q=0, APPLICATION/X-NPZ;q=0.001", NPZ),
        (f"{ARROW};q=0.5,{NPZ};q=0.5", ARROW),
        ('application/json ; arrays = "base64" ; q=1.000', BASE64),
        ("application/json; charset=utf-8", JSON),
    ],
)
def test_the_format_that_is_liked_best(accept: str, expected: str) -> None:
    assert chosen(accept) == expected


@pytest.mark.parametrize(
    "accept", ["application/json;q=0", "*/*;q=0.0", "application/json; arrays=b64", "text/*", ";", f"{NPZ};q=nan"]
)
def test_no_format_is_liked(accept: str) -> None:
    with pytest.raises(RefusedError, match="use application/json"):
        chosen(accept)


def test_routes_that_do_not_exist(server: Running) -> None:
    for path in ("/v1/embed/", "/v1/jobs/", "//v1/embed", "/v1/Embed", "/v1/embed%00"):
        answer = server.ask("POST", path, b'{"sequences": ["MK"]}', JSON_TYPE)
        assert (answer.status, "/docs" in answer.json["detail"]) == (404, True)
    check_message("serve.no_route", server.post("/v1/embed/", {}).json["detail"])
    check_message("serve.wrong_method", server.ask("PATCH", "/v1/embed").json["detail"])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"sequences": ["\xff"]}', "UTF-8"),
        (b'{"sequences": ["MK"], "layers": [' + b"1" * 5000 + b"]}", "digits"),
        (b"[" * 100_000, "deeply"),
        (b'{"sequences": ["MK"],}', "double quotes"),
    ],
    ids=["bytes", "digits", "depth", "comma"],
)
def test_why_a_body_is_no_json(server: Running, body: bytes, reason: str) -> None:
    answer = server.ask("POST", "/v1/embed", body, JSON_TYPE)
    assert (answer.status, answer.json["type"]) == (400, "urn:protea:json")
    assert reason in answer.json["detail"]
    assert server.ask("POST", "/v1/embed", b"{}", {"Content-Type": "application/jsonx"}).status == 415


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models", "/openapi.json"])
def test_head_gives_the_head_of_get(server: Running, path: str) -> None:
    whole, head = server.ask("GET", path), server.ask("HEAD", path)
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert server.ask("HEAD", "/v1/embed").status == 405
    assert server.ask("HEAD", "/v1/none").status == 404
    if path == "/health":
        until(lambda: ("HEAD", path) in [(line["method"], line["route"]) for line in server.lines])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/embed", b'{"sequences": ["MK"], "sequences": ["AA"]}', 422),
        ("/v1/contacts", b'{"sequences": [{"id": "a", "sequence": "MK", "id": "b"}]}', 422),
        ("/v1/embeddings", b'{"model": "x", "input": "MK", "input": "AA"}', 400),
        ("/embed", b'{"inputs": "MK", "inputs": "AA"}', 422),
    ],
)
def test_a_member_that_is_named_twice_is_refused(server: Running, path: str, body: bytes, status: int) -> None:
    answer = server.ask("POST", path, body, JSON_TYPE)
    assert answer.status == status
    assert b" twice" in answer.body


def raw(server: Running, head: str) -> bytes:
    received = b""
    with server.connect() as connection:
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode("latin-1"))
        while data := connection.recv(65536):
            received += data
    return received


@pytest.mark.parametrize("host", ["[", "[::1", "localhost/x", "é", "a@localhost", ""])
@pytest.mark.parametrize("path", ["/health", "/v1/none", "/info"])
def test_hosts_that_are_no_hosts(server: Running, host: str, path: str) -> None:
    answer = raw(server, f"GET {path} HTTP/1.1\r\nHost: {host}")
    assert answer.split()[1] == b"421", answer


def test_ids_that_are_repeated(server: Running) -> None:
    """HDF5 would name the last two alike."""
    for one, other in (("a", "a"), ("a/b", "a%2Fb")):
        body = {"sequences": [{"id": one, "sequence": "MK"}, {"id": other, "sequence": "MKT"}]}
        for route in ("embed", "residues", "logits", "contacts", "perplexity"):
            answer = server.post(f"/v1/{route}", body, "application/x-hdf5")
            assert (answer.status, answer.json["sequence"], answer.json["id"]) == (422, 1, other)
            assert "duplicates" not in answer.json["detail"]
    check_message("serve.repeated_id", server.post("/v1/embed", body).json["detail"])


def test_a_protein_without_a_name_is_called_by_its_place(server: Running) -> None:
    asked: list[tuple[str, dict[str, Any]]] = [
        ("score", {"sequence": "M" * 3000, "variants": ["M1A"], "long": "error"}),
        ("score", {"sequence": "MK<mask>", "variants": ["M1A"]}),
    ]
    for route, body in asked:
        answer = server.post(f"/v1/{route}", body).json
        assert (answer["status"], answer["sequence"]) == (422, 0)
        assert answer["detail"].startswith("sequence 0: ")
    places = server.post("/v1/scan", {"sequence": "MK", "positions": "9"}).json["detail"]
    assert places.endswith("of sequence 0")
    advice = server.post("/v1/score", {"sequence": "MKTA", "variants": ["M11A", "T13A"]}).json["advice"]
    assert advice == ["sequence 0: with offset 11, all 2 variants would fit"]
    assert "id 0: no residues" in server.post("/v1/embed", {"sequences": [""]}).json["detail"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "protea-mini", "input": ["MK", "MJ"]}),
        ("/embed", {"inputs": ["MK", "M4"]}),
        ("/v1/biology/meta/protea-mini", {"sequences": ["MK", "MÄ"]}),
    ],
)
def test_routes_of_peers_advise_what_they_take(server: Running, path: str, body: dict[str, Any]) -> None:
    answer = server.post(path, body)
    assert answer.status in (400, 422)
    assert b"sequence 1" in answer.body
    assert b"unknown=" not in answer.body


# ---- jobs ----
def fasta(path: Path, count: int, length: int = 200) -> Path:
    path.write_text("".join(f">p{number}\n{'MKTAYIAKQR' * (length // 10)}\n" for number in range(count)))
    return path


def test_a_cancelled_job_ends_its_events_and_stays_away(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    with running(jobs=folder) as one:
        client = protea.Client(one.url)
        first, second = (client.submit(fasta(tmp_path / "in.fasta", 60), what="residues") for _ in range(2))
        until(lambda: client.job(first)["state"] == "running")
        for name in (second, first):  # one that waits, one that is computed
            with one.connect() as reader:
                reader.sendall(
                    f"GET /v1/jobs/{name}/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
                )
                received = reader.recv(65536)
                while b"data: " not in received:
                    received += reader.recv(65536)
                assert one.ask("DELETE", f"/v1/jobs/{name}").status == 204
                while data := reader.recv(65536):
                    received += data
            assert received.count(b"event: end\n") == 1
            assert b'"state":"cancelled"' in received
            assert one.ask("DELETE", f"/v1/jobs/{name}").status == 404
        until(lambda: not list(folder.iterdir()))


def test_a_job_that_was_cancelled_before_a_kill_does_not_come_back(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 32)
    folder.mkdir()
    job = {"id": folder.name, "client": "x", "what": "embed", "target": "m", "suffix": "h5", "options": {}}
    (folder / "job.json").write_text(json.dumps(job | {"state": "cancelled"}))
    (folder / "result.h5").write_text("")
    with running(jobs=tmp_path) as one:
        assert not folder.exists()
        assert one.ask("GET", "/v1/jobs").json == {"jobs": []}


def test_advice_of_jobs_names_their_options(tmp_path: Path) -> None:
    (tmp_path / "in.fasta").write_text(">a\nMK\n>a\nMK\n")
    with running(jobs=tmp_path / "jobs") as one:
        client = protea.Client(one.url)
        job = client.submit(tmp_path / "in.fasta")
        until(lambda: client.job(job)["state"] == "failed")
        assert "pass duplicates=rename" in client.job(job)["error"]
        job = client.submit(tmp_path / "in.fasta", duplicates="rename")
        until(lambda: client.job(job)["state"] == "done")
        for path in (tmp_path / "jobs" / job).glob("result*"):
            path.unlink()
        for part in ("result", "report"):
            assert one.ask("GET", f"/v1/jobs/{job}/{part}").status == 404
