"""Many clients at once: nothing that was taken is lost or wrong, memory stays flat, overload is answered."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

import protea
from serving import LETTERS, Running, running

_RNG = random.Random(11)
POOL = ["".join(_RNG.choices(LETTERS, k=_RNG.choice((8, 30, 60, 120, 250)))) for _ in range(40)]


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    found: np.ndarray = protea.load(device="cpu").embed(POOL, pool="mean")
    return found


def crowd(port: int, clients: int, seconds: float, truth: np.ndarray) -> tuple[Counter[int], list[str], list[float]]:
    """Let clients ask one after another; count answers, wrong ones, and the times of the 429."""
    codes: Counter[int] = Counter()
    wrong: list[str] = []
    busy: list[float] = []
    lock, end = threading.Lock(), time.monotonic() + seconds

    def one(number: int) -> None:
        rng = random.Random(number)
        connection = HTTPConnection("127.0.0.1", port, timeout=300)
        while time.monotonic() < end:
            picked = [rng.randrange(len(POOL)) for _ in range(rng.randint(1, 3))]
            body = json.dumps({"sequences": [POOL[place] for place in picked]})
            began = time.monotonic()
            connection.request("POST", "/v1/embed", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            took = time.monotonic() - began
            with lock:
                codes[answer.status] += 1
                if answer.status == 200:
                    rows = [np.array(row["embedding"], np.float32) for row in json.loads(text)["records"]]
                    if not all(np.array_equal(row, truth[place]) for row, place in zip(rows, picked, strict=True)):
                        wrong.append(str(picked))
                elif answer.status == 429:
                    busy.append(took)
                else:
                    wrong.append(f"{answer.status} {text[:200]!r}")
            if answer.status == 429:
                time.sleep(0.5 + rng.random())
        connection.close()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes, wrong, busy


def test_fifty_clients(truth: np.ndarray) -> None:
    with running(max_queue_tokens=6000, max_requests=32) as one:
        codes, wrong, _ = crowd(one.port, 50, 2.0, truth)
        assert not wrong
        assert set(codes) <= {200, 429}
        assert codes[200] >= 20
        assert codes[429]
        assert (one.service.gate.tokens, one.service.gate.requests) == (0, 0)


@pytest.mark.long
def test_a_thousand_clients_for_two_minutes(truth: np.ndarray) -> None:
    arguments = ["serve", "--port", "0", "--max-queue-tokens", "40000"]
    service = subprocess.Popen([sys.executable, "-m", "protea", *arguments], stderr=subprocess.PIPE, text=True)
    assert service.stderr is not None
    try:
        line = next(line for line in service.stderr if "serving" in line)
        drained = threading.Thread(target=lambda: [None for _ in service.stderr or ()])
        drained.start()
        sizes: list[int] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(5):
                pages = int(Path(f"/proc/{service.pid}/statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)

        watcher = threading.Thread(target=watch)
        watcher.start()
        seconds = float(os.environ.get("PROTEA_LOAD_SECONDS", "120"))
        codes, wrong, busy = crowd(int(line.rpartition(":")[2]), 1000, seconds, truth)
        stop.set()
        watcher.join()
        shown = np.percentile(busy, [50, 99]).round(3).tolist() if busy else []
        print(f"answers {dict(codes)}, 429 p50 and p99 {shown} s, memory {sizes} MB")
        assert not wrong, wrong[:3]
        assert set(codes) <= {200, 429}
        assert codes[429]
        half = len(sizes) // 2
        assert max(sizes[half:]) < max(sizes[:half]) * 1.25 + 50
    finally:
        service.terminate()
        service.wait(60)
        drained.join()
        service.stderr.close()
    assert service.returncode == 0


# ---- the description of the routes ----
@pytest.mark.parametrize("examples", [2, pytest.param(25, marks=pytest.mark.long)])
def test_no_request_that_the_description_allows_fails(server: Running, examples: int) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis
        from hypothesis import HealthCheck, Phase, given, settings

        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        failed: list[str] = []
        for operation in schema.get_all_operations():
            made = operation.ok()

            @given(made.as_strategy())
            @settings(
                max_examples=examples,
                deadline=None,
                phases=[Phase.generate],
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def ask(case: schemathesis.Case) -> None:
                answer = case.call(timeout=120)
                if answer.status_code >= 500 and answer.status_code != 501:
                    failed.append(f"{case.method} {case.path}: {answer.status_code} {answer.text[:300]}")

            ask()
    assert not failed, failed[:3]
