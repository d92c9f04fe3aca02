"""Many clients at once: nothing that was taken is lost or wrong, memory stays flat, overload is answered."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import protea
from crowd import Order, finished, started
from serving import LETTERS, Running, running

_RNG = random.Random(11)
POOL = ["".join(_RNG.choices(LETTERS, k=_RNG.choice((8, 30, 60, 120, 250)))) for _ in range(60)]


@pytest.fixture(scope="module")
def order() -> dict[str, Any]:
    """Bodies of one to three sequences, and the vectors of the library for each."""
    vectors = protea.load(device="cpu").embed(POOL, pool="mean").tolist()
    picked = [[_RNG.randrange(len(POOL)) for _ in range(_RNG.randint(1, 3))] for _ in range(100)]
    return {
        "bodies": [json.dumps({"sequences": [POOL[place] for place in places]}) for places in picked],
        "expected": [[vectors[place] for place in places] for places in picked],
    }


def test_fifty_clients(order: dict[str, Any]) -> None:
    with running(max_queue_tokens=3000, max_requests=32) as one:
        found = finished(started(Order(port=one.port, clients=50, seconds=2.0, **order)))
        assert not found["wrong"]
        assert not found["lost"]
        assert set(found["answers"]) == {"200", "429"}
        assert found["answers"]["200"] >= 20
        gate = one.service.gate
        assert (gate.tokens, gate.requests, gate.entering) == (0, 0, 0)


def test_answers_that_are_wrong_would_be_seen(order: dict[str, Any]) -> None:
    spoilt = order["expected"][:4]
    spoilt = [[[*vector[:-1], vector[-1] + 1e-6] for vector in vectors] for vectors in spoilt]
    with running() as one:
        asked = Order(port=one.port, clients=2, bodies=order["bodies"][:4], expected=spoilt)
        assert len(finished(started(asked))["wrong"]) == 4


@pytest.mark.long
def test_a_thousand_clients_for_two_minutes(order: dict[str, Any]) -> None:
    arguments = ["serve", "--port", "0", "--max-queue-tokens", "40000"]
    service = subprocess.Popen([sys.executable, "-m", "protea", *arguments], stderr=subprocess.PIPE, text=True)
    assert service.stderr is not None
    try:
        line = next(line for line in service.stderr if "serving" in line)
        drained = threading.Thread(target=lambda: [None for _ in service.stderr or ()])
        drained.start()
        seconds = float(os.environ.get("PROTEA_LOAD_SECONDS", "120"))
        clients = started(Order(port=int(line.rpartition(":")[2]), clients=1000, seconds=seconds, **order))
        sizes: list[int] = []
        while clients.poll() is None:
            pages = int(Path(f"/proc/{service.pid}/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE") >> 20)
            time.sleep(seconds / 24)
        found = finished(clients)
        print(f"{found}, memory {sizes} MB")
        assert not found["wrong"]
        assert not found["lost"]
        assert set(found["answers"]) == {"200", "429"}
        half = len(sizes) // 2
        assert max(sizes[half:]) < max(sizes[:half]) * 1.15 + 50
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
