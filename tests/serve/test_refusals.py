"""What the service refuses: one clear answer each, named places, bounded memory; and it stays up."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import protea
from conftest import Run, fails
from messages import check_message
from protea.serve.problems import RefusedError, refusal
from protea.serve.safety import Keys, Limits, is_local
from protea.serve.server import _Protocol
from serving import UBIQUITIN, Running, running, until

KEY = "0123456789abcdef0123"


def well(server: Running) -> bool:
    return server.post("/v1/embed", {"sequences": ["MKT"]}).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/embed", {"sequences": []}, 422, "invalid"),
        ("/v1/embed", {"sequences": [""]}, 422, "sequences"),
        ("/v1/embed", {"sequences": ["MK4"]}, 422, "unknown-residue"),
        ("/v1/embed", {"sequences": ["MKJ"], "unknown": "error"}, 422, "unknown-residue"),
        ("/v1/embed", {"sequences": ["M" * 1100], "long": "error"}, 422, "sequence-too-long"),
        ("/v1/embed", {"sequences": ["MK"], "layers": [99]}, 422, "invalid"),
        ("/v1/embed", {"sequences": ["MK"], "pool": ["mean", "mean"]}, 422, "invalid"),
        ("/v1/embed", {"sequences": ["MK"], "more": 1}, 422, "invalid"),
        ("/v1/embed", {"sequences": [{"id": "a", "sequence": "M"}, {"id": "a", "sequence": "K"}]}, 422, "sequences"),
        ("/v1/embed", {"sequences": ["M"] * 10_000}, 413, "too-many-sequences"),
        ("/v1/embed", {"sequences": ["MK"], "model": "../../etc/passwd"}, 404, "unknown-model"),
        ("/v1/predict/none", {"sequences": ["MK"]}, 404, "unknown-adapter"),
        ("/v1/score", {"sequence": "MK", "variants": []}, 422, "invalid"),
        ("/v1/score", {"sequence": "M<mask>", "variants": ["M1A"]}, 422, "unknown-residue"),
        ("/v1/scan", {"sequence": "MK", "positions": "9"}, 422, "invalid"),
        ("/v1/jobs", {"sequences": ["MK"]}, 501, "no-jobs"),
        ("/v1/none", {}, 404, "not-found"),
    ],
)
def test_bad_requests_get_a_problem(server: Running, path: str, body: Any, status: int, kind: str) -> None:
    answer = server.post(path, body, "*/*", **{"X-Request-Id": "mine"})
    assert (answer.status, answer.json["type"]) == (status, f"urn:protea:{kind}")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json["detail"]
    assert well(server)


def test_a_protein_of_35000_residues_is_truncated_and_that_is_listed(server: Running) -> None:
    answer = server.post("/v1/embed", {"sequences": ["MK" * 17_500]}).json
    assert answer["records"][0]["truncated_from"] == 35_000
    assert answer["notes"][0]["what"] == "truncated"


def test_a_bad_letter_is_named_by_sequence_and_position(server: Running) -> None:
    answer = server.post("/v1/embed", {"sequences": ["MK", {"id": "x y", "sequence": "MKTA1"}]}).json
    assert (answer["sequence"], answer["id"], answer["position"]) == (1, "x y", 5)
    check_message("serve.bad_letter", answer["detail"])


def test_bodies_that_are_no_json(server: Running) -> None:
    json_type = {"Content-Type": "application/json"}
    for body, status in ((b"{", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b"[]", 422), (b"null", 422)):
        assert server.ask("POST", "/v1/embed", body, json_type).status == status
    assert server.ask("POST", "/v1/embed", b'{"sequences": ["MK"]}', {"Content-Type": "text/plain"}).status == 415
    assert server.post("/v1/embed", {"sequences": ["MK"]}, "image/png").status == 406
    assert server.ask("GET", "/v1/embed").status == 405
    assert server.ask("POST", "/v1/embed", json.dumps({"sequences": ["\ud800"]}).encode(), json_type).status == 422
    assert well(server)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embed", b'{"sequences": [' + b"1," * 200_000 + b"1]}"),
        ("/v1/embed", b"{" + b",".join(b'"m%d": 1' % n for n in range(100_000)) + b"}"),
        ("/v1/embed", b'{"sequences": [{' + b",".join(b'"m%d": 1' % n for n in range(100_000)) + b"}]}"),
        ("/v1/embed", b'{"sequences": ["MK"], "' + b"m" * 1_000_000 + b'": 1}'),
        ("/v1/score", b'{"sequence": "MK", "variants": [' + b"1," * 200_000 + b"1]}"),
        ("/embed", b'{"inputs": [' + b"1," * 200_000 + b"1]}"),
        ("/v1/biology/meta/esm2-650m", b'{"sequences": [' + b"1," * 200_000 + b"1]}"),
    ],
    ids=["sequences", "members", "members of a sequence", "long name", "variants", "inputs", "NVIDIA"],
)
def test_the_first_of_many_faults_ends_the_check(server: Running, path: str, body: bytes) -> None:
    answer = server.ask("POST", path, body, {"Content-Type": "application/json"})
    assert answer.status == 422
    assert len(answer.body) < 5000
    assert len(answer.json.get("errors", [])) <= 2


def test_compressed_bodies_are_refused(server: Running) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    answer = server.ask("POST", "/v1/embed", bomb, {"Content-Type": "application/json", "Content-Encoding": "gzip"})
    assert (answer.status, answer.json["type"]) == (415, "urn:protea:encoding")


def raw(server: Running, *parts: bytes) -> bytes:
    """Send bytes, and return what comes until the service closes the connection."""
    received = b""
    with server.connect() as connection:
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:
            pass  # the service has closed it; what it said may still be read
        try:
            while data := connection.recv(65536):
                received += data
        except OSError:
            pass
    return received


def test_a_body_of_a_gigabyte_is_refused_before_it_is_read(server: Running) -> None:
    head = b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b" 413 " in raw(server, head + b"Content-Length: 1073741824\r\n\r\n")
    more = head.replace(b"embed", b"jobs") + b"Content-Length: 1073741825\r\n\r\n"  # jobs take one, and no byte more
    assert b" 413 " in raw(server, more)
    piece = b"%x\r\n%s\r\n" % (1 << 20, b" " * (1 << 20))
    assert b" 413 " in raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 17) or well(server)
    assert well(server)


def test_a_hundred_thousand_headers_are_refused(server: Running) -> None:
    answer = raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"".join(b"X-%d: 1\r\n" % n for n in range(100_000)))
    assert b" 400 " in answer or not answer
    assert well(server)


def test_slow_clients_are_cut_off() -> None:
    with running(limits=Limits(head_seconds=0.3, body_seconds=0.3, send_seconds=0.5)) as one:
        assert b" 408 " in raw(one)
        assert b" 408 " in raw(one, b"GET / HT")
        head = b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 99\r\n\r\n"
        answer = raw(one, head, b'{"seq')
        assert b" 408 " in answer
        assert b"urn:protea:slow" in answer
        # After an answer, too, the next head must come in time.
        with one.connect() as again:
            again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            received = b""
            while b'"ready"}' not in received:
                received += again.recv(65536)
            again.sendall(b"GET /he")
            assert again.recv(65536).startswith(b"HTTP/1.1 408")
        body = json.dumps({"sequences": ["A" * 1000] * 40}).encode()
        with one.connect() as reader:  # asks for 50 MB and reads nothing
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.sendall(head.replace(b"embed", b"residues").replace(b"99", b"%d" % len(body)) + body)
            until(lambda: any(line["route"] == "/v1/residues" for line in one.lines), 120)
        assert one.service.gate.requests == 0
        assert one.service.gate.tokens == 0
        assert well(one)


def test_a_client_that_goes_is_dropped(server: Running) -> None:
    body = json.dumps({"sequence": UBIQUITIN * 3}).encode()
    with server.connect() as connection:
        head = (
            b"POST /v1/scan HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        connection.sendall(head % len(body) + body)
        until(lambda: server.service.gate.requests)
    until(lambda: not server.service.gate.requests)
    assert server.service.gate.tokens == 0


def test_a_busy_service_says_when_to_come_again() -> None:
    with running(max_queue_tokens=20_000) as one:
        threads = [
            threading.Thread(target=one.post, args=("/v1/scan", {"sequence": UBIQUITIN, "positions": "1-76"}))
            for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        until(lambda: one.service.gate.tokens > 3000)
        answers = [one.post("/v1/embed", {"sequences": ["A" * 1000] * 19}) for _ in range(2)]
        for thread in threads:
            thread.join()
        busy = [answer for answer in answers if answer.status == 429]
        assert busy
        assert int(busy[0].headers["retry-after"]) >= 1
        assert one.post("/v1/embed", {"sequences": ["A" * 1000] * 21}).status == 413
        assert b'protea_rejected_total{reason="busy"}' in one.ask("GET", "/metrics").body


def test_a_service_that_ends_answers_what_it_took() -> None:
    with running() as one:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(one.post("/v1/scan", {"sequence": UBIQUITIN * 2}).status))
        thread.start()
        until(lambda: one.service.gate.requests)
        one.service.drain()
        answer = one.post("/v1/embed", {"sequences": ["MK"]})
        assert (answer.status, answer.json["type"]) == (503, "urn:protea:draining")
        assert one.ask("GET", "/v1/health/ready").status == 503
        assert one.ask("GET", "/v1/health/live").status == 200
        thread.join()
        assert found == [200]


def test_a_full_queue_refuses_at_the_door(server: Running) -> None:
    assert well(server)
    gate = server.service.gate
    with gate.lock:
        gate.tokens += gate.most_tokens
    head = b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
    try:
        # The body is not read: nobody notices that it is no JSON. The connection lives on, also behind a long body.
        for size in (1, 1_000_000):
            answer = raw(server, head % size + b"\r\n" + b"{" * size + head % 1 + b"Connection: close\r\n\r\n{")
            assert answer.count(b" 429 ") == 2
            assert answer.count(b"retry-after: ") == 2
        assert server.ask("GET", "/health").status == 200
        assert server.post("/v1/jobs", {}).status == 501
        assert b'protea_requests_total{code="429",route="/v1/embed"}' in server.ask("GET", "/metrics").body
    finally:
        with gate.lock:
            gate.tokens -= gate.most_tokens
    assert gate.entering == 0
    assert well(server)


def test_a_refused_body_that_is_slow_does_not_keep_the_connection() -> None:
    with running(limits=Limits(body_seconds=0.3), max_requests=0) as one:
        head = b"POST /v1/embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
        answer = raw(one, head, b"{")
        assert b" 408 " in answer
        assert b"urn:protea:slow" in answer


def test_a_body_that_nobody_reads_ends_the_connection(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(KEY)
    with running(api_key_file=tmp_path / "keys") as one:
        answer = raw(one, b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert b" 401 " in answer
        assert b"connection: close" in answer.lower()


def test_answers_do_not_wait_for_acknowledgements(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _Protocol.connection_made
    found: list[int] = []

    def note(self: Any, transport: Any) -> None:
        made(self, transport)
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(_Protocol, "connection_made", note)
    with running() as one:
        assert one.ask("GET", "/health").status == 200
    assert found
    assert all(found)


# ---- keys and hosts ----
def test_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# of the group\nanna {KEY}\n{KEY}x\n")
    with running(api_key_file=tmp_path / "keys") as one:
        body = {"sequences": ["MK"]}
        assert one.post("/v1/embed", body).status == 401
        assert one.post("/v1/embed", body, Authorization="Bearer wrong").status == 401
        assert one.post("/v1/embed", body, Authorization=f"Basic {KEY}").status == 401
        assert one.post("/v1/embed", body, Authorization=f"Bearer {KEY}").status == 200
        assert one.post("/embed", {"inputs": "MK"}).json["error_type"]
        assert one.ask("GET", "/metrics").status == 401
        assert one.ask("GET", "/health").status == 200
        assert protea.Client(one.url, key=KEY).models() == ["protea-mini"]
        until(lambda: [line["client"] for line in one.lines].count("anna") == 2)
        text = json.dumps(one.lines)
        assert KEY not in text
        assert "MK" not in text


def test_key_files_that_are_refused(tmp_path: Path) -> None:
    for content in ("", "# nothing\n", "short\n", f"a b {KEY}\n"):
        (tmp_path / "keys").write_text(content)
        with pytest.raises(protea.ProteaError, match="keys"):
            Keys.read(tmp_path / "keys")
    with pytest.raises(protea.ProteaError, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_commands_in_messages_stay_commands() -> None:
    error = protea.ProteaError("pass --long full, or fit one: protea fit-contacts --head bilinear")
    assert str(refusal(error)) == "pass long=full, or fit one: protea fit-contacts --head bilinear"
    assert str(refusal(protea.ProteaError("--variants '': is empty"))) == "variants '': is empty"


def test_a_key_without_a_name_keeps_its_owner_when_lines_are_put_in(tmp_path: Path) -> None:
    path, authorization = tmp_path / "keys", f"Bearer {KEY}"
    path.write_text(f"{KEY}\n")
    owner = Keys.read(path).owner(authorization)
    path.write_text(f"{'x' * 20}\n{KEY}\n")
    keys = Keys.read(path)
    assert keys.owner(authorization) == owner
    assert keys.owner(f"Bearer {'x' * 20}") != owner


def test_a_public_host_needs_keys(run: Run) -> None:
    result = run("serve", "--host", "0.0.0.0")
    fails(result, 2, "0.0.0.0", "--api-key-file")
    check_message("serve.public_host", result.err.strip())
    assert [
        is_local(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9", "0.0.0.0", "::", "example.org")
    ] == [
        *[True] * 4,
        *[False] * 3,
    ]


def test_wrong_options(run: Run, server: Running) -> None:
    fails(run("serve", "-m", "no-such-model"), 2, "no-such-model")
    fails(run("serve", "--adapter", "x"), 2, "x", "NAME=RUN")
    fails(run("serve", "--port", str(server.port)), 2, str(server.port), "choose another port")
    fails(run("serve", "-m", "protea-mini", "-m", "protea-mini", "--port", "0"), 2, "named twice")


def test_pages_of_other_sites_reach_nothing(server: Running) -> None:
    body = json.dumps({"sequences": ["MK"]}).encode()
    json_type = {"Content-Type": "application/json"}
    assert server.ask("POST", "/v1/embed", body, json_type | {"Host": "evil.example"}).status == 421
    assert server.ask("POST", "/v1/embed", body, json_type | {"Sec-Fetch-Site": "cross-site"}).status == 403
    answer = server.ask("OPTIONS", "/v1/embed", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_refusals_survive_pickling() -> None:
    import pickle

    refused = RefusedError("what", 429, "busy", retry_after=3, more={"sequence": 1})
    copy = pickle.loads(pickle.dumps(refused))
    assert (str(copy), copy.status, copy.kind, copy.retry_after, copy.more) == ("what", 429, "busy", 3, {"sequence": 1})
    assert refusal(protea.ProteaError("x")).status == 500


def test_the_log_names_requests_and_no_sequences(server: Running) -> None:
    server.post("/v1/embed", {"sequences": ["WWWWHHHH", "MK"]}, **{"X-Request-Id": "find-me"})
    line = until(lambda: next((line for line in server.lines if line["id"] == "find-me"), None))
    assert (line["route"], line["status"], line["sequences"], line["tokens"]) == ("/v1/embed", 200, 2, 14)
    assert "WWWW" not in json.dumps(server.lines)


def test_a_log_that_nobody_reads_any_more() -> None:
    """The service goes on, and exits with 0."""
    code = "import sys; sys.stdin.read(); from protea.serve.safety import log_line; log_line({}); log_line({})"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stderr.close()
        process.stdin.close()
    assert process.returncode == 0
