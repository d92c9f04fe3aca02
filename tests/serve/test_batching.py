"""The engine: packs shared between requests, the same bits as alone, first in first out, fair, failures kept apart."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import protea
from protea.embed import embeddings
from protea.embed.embeddings import Asked
from protea.embed.prepare import RecordPolicies
from protea.infer.runner import Job, Runner, Wanted
from protea.serve.admission import Gate
from protea.serve.batching import Computed, Engine, Lane, SharedRunner
from protea.serve.native import prepared, records_of
from protea.serve.problems import RefusedError
from serving import LETTERS


@pytest.fixture(scope="module")
def model() -> protea.LanguageModel:
    return protea.load(device="cpu")


class Bench:
    def __init__(self, model: protea.LanguageModel, budget: int = 600) -> None:
        self.seen: list[Computed] = []
        self.engine = Engine(self.seen.append)
        self.lane = Lane("mini", model.module, budget)
        self.engine.add(self.lane)
        self.gate = Gate(10**9, 1000, 300)
        self.gate.ready = True

    def runner(self, client: str = "me") -> SharedRunner:
        return self.engine.runner(self.lane, self.gate.admit(client, 0))


@pytest.fixture
def bench(model: protea.LanguageModel) -> Iterator[Bench]:
    made = Bench(model)
    yield made
    made.engine.stop()


def jobs_of(model: protea.LanguageModel, sequences: list[str], places: list[int] | None = None) -> list[Job[int]]:
    alphabet, last = model.alphabet, model.config.num_hidden_layers
    return [
        Job(
            alphabet.frame.around(alphabet.encode(sequence)),
            Wanted(layers=(0, last), places=np.array(places or range(len(sequence) + 2))),
            number,
            f"sequence {number}",
        )
        for number, sequence in enumerate(sequences)
    ]


def drawn(seed: int, count: int, most: int = 120) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=rng.randint(1, most))) for _ in range(count)]


@settings(max_examples=4)
@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(64, 900))
def test_answers_are_the_same_to_the_bit_whatever_shares_the_pack(
    model: protea.LanguageModel, seed: int, clients: int, budget: int
) -> None:
    bench = Bench(model, budget)
    parts = [drawn(seed + number, 4) for number in range(clients)]
    found: dict[int, list[list[torch.Tensor]]] = {}

    def ask(number: int) -> None:
        runner = bench.runner(f"client {number % 2}")
        found[number] = [result.checked().values for result in runner.run(jobs_of(model, parts[number], [number % 2]))]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    bench.engine.start()  # everything waits by now or comes while it computes
    for thread in threads:
        thread.join()
    bench.engine.stop()
    for number, part in enumerate(parts):
        alone = [result.values for result in Runner(model.module, 1).run(jobs_of(model, part, [number % 2]))]
        for mine, other in zip(found[number], alone, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(mine, other, strict=True))
    assert all(pack.tokens <= max(budget, 122) for pack in bench.seen)


def test_all_that_waits_shares_packs(bench: Bench, model: protea.LanguageModel) -> None:
    threads = [
        threading.Thread(target=lambda: list(bench.runner().run(jobs_of(model, ["MKTAYIAKQR"])))) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    while bench.engine.waiting < 20:
        pass
    bench.engine.start()
    for thread in threads:
        thread.join()
    assert [pack.passes for pack in bench.seen] == [20]  # 240 of 600 tokens


def test_a_client_with_much_work_does_not_hold_up_another(bench: Bench, model: protea.LanguageModel) -> None:
    order: list[str] = []

    def ask(client: str, count: int) -> None:
        order.extend(client for _ in bench.runner(client).run(jobs_of(model, ["A" * 298] * count)))

    many = threading.Thread(target=ask, args=("many", 12))
    many.start()
    while bench.engine.waiting < 4:
        pass
    few = threading.Thread(target=ask, args=("few", 1))
    few.start()
    while bench.engine.waiting < 5:
        pass
    bench.engine.start()
    many.join()
    few.join()
    assert order.index("few") <= 4


def test_one_clients_passes_are_computed_in_their_order(model: protea.LanguageModel) -> None:
    bench = Bench(model, 100)
    bench.engine.start()
    tags = [result.job.tag for result in bench.runner().run(jobs_of(model, drawn(3, 30)))]
    bench.engine.stop()
    assert tags == list(range(30))


def test_a_job_that_cannot_be_computed_fails_alone(bench: Bench, model: protea.LanguageModel) -> None:
    good, bad = jobs_of(model, ["MKT"]), [Job(np.empty(0, np.uint8), Wanted(layers=(0,)), 0, "the bad one")]
    bench.engine.start()
    results = list(bench.runner().run([*good, *bad, *good]))
    assert [result.error is None for result in results] == [True, False, True]
    assert "the bad one" in str(results[1].error)


def test_an_unexpected_failure_ends_its_pack_and_not_the_engine(bench: Bench, model: protea.LanguageModel) -> None:
    def explode(_: torch.Tensor) -> dict[str, torch.Tensor]:
        raise RuntimeError("no")

    job = jobs_of(model, ["MKT"])[0]
    bench.engine.start()
    with pytest.raises(protea.ProteaError, match="RuntimeError: no"):
        list(bench.runner().run([Job(job.tokens, Wanted(layers=(0,), reduce=explode), 0, "x")]))
    assert next(iter(bench.runner().run([job]))).error is None


def test_work_of_clients_who_have_gone_is_dropped(bench: Bench, model: protea.LanguageModel) -> None:
    ticket = bench.gate.admit("gone", 0)
    refused: list[str] = []

    def ask() -> None:
        try:
            list(bench.engine.runner(bench.lane, ticket).run(jobs_of(model, ["A" * 300] * 10)))
        except RefusedError as error:
            refused.append(error.kind)

    thread = threading.Thread(target=ask)
    thread.start()
    while not bench.engine.waiting:
        pass
    ticket.close()
    thread.join()
    bench.engine.start()
    list(bench.runner().run(jobs_of(model, ["MKT"])))
    assert refused == ["gone"]
    assert sum(pack.passes for pack in bench.seen) == 1


def test_a_request_that_takes_too_long_is_refused(model: protea.LanguageModel) -> None:
    bench = Bench(model)
    bench.gate.seconds = 0.05
    with pytest.raises(RefusedError) as refused:  # the engine does not run
        list(bench.runner().run(jobs_of(model, ["MKT"])))
    assert refused.value.status == 503
    assert refused.value.headers == {"Retry-After": "5"}


def test_results_do_not_keep_packs_in_memory(bench: Bench, model: protea.LanguageModel) -> None:
    runner = bench.runner()
    encoded = prepared(records_of(["MKT", "A" * 400]), model.module, RecordPolicies(), [])
    bench.engine.start()
    results = list(runner.run(embeddings.jobs_of(encoded[0], Asked(layers=(6,), residues=True), model.alphabet.frame)))
    (state,) = results[0].states.values()
    assert state.untyped_storage().nbytes() <= 2 * state.nbytes


def test_two_models_take_turns(model: protea.LanguageModel) -> None:
    bench = Bench(model, 100)
    second = Lane("again", model.module, 100)
    bench.engine.add(second)
    threads = [
        threading.Thread(
            target=lambda lane=lane: list(
                bench.engine.runner(lane, bench.gate.admit("me", 0)).run(jobs_of(model, ["A" * 90] * 6))
            )
        )
        for lane in (bench.lane, second)
    ]
    for thread in threads:
        thread.start()
    bench.engine.start()
    for thread in threads:
        thread.join()
    bench.engine.stop()
    assert {pack.model for pack in bench.seen} == {"mini", "again"}
    assert len(bench.seen) == 12


# ---- admission ----
def test_the_gate_counts_tokens() -> None:
    gate = Gate(100, 2, None)
    with pytest.raises(RefusedError) as refused:
        gate.admit("a", 1)
    assert refused.value.status == 503
    gate.ready = True
    first = gate.admit("a", 60)
    with pytest.raises(RefusedError) as refused:
        gate.admit("b", 50)
    assert (refused.value.status, refused.value.kind) == (429, "busy")
    assert int(refused.value.headers["Retry-After"]) >= 1
    with pytest.raises(RefusedError) as refused:
        gate.admit("b", 101)
    assert refused.value.status == 413
    first.done(30)
    second = gate.admit("b", 50)
    with pytest.raises(RefusedError):
        gate.admit("c", 1)  # two requests are open
    first.close()
    first.close()
    second.close()
    assert (gate.tokens, gate.requests) == (0, 0)


def test_the_door_stays_shut_until_what_was_refused_has_room() -> None:
    gate = Gate(100, 9, None)
    gate.ready, gate.pack = True, 40
    first = gate.admit("a", 90)
    gate.check_room()
    with pytest.raises(RefusedError):
        gate.admit("b", 30)
    with pytest.raises(RefusedError):
        gate.check_room()
    first.done(10)
    with pytest.raises(RefusedError):
        gate.check_room()
    first.done(10)
    gate.check_room()  # 30 tokens are free
    gate.check_room()
    with pytest.raises(RefusedError):
        gate.admit("b", 95)
    first.done(10)
    gate.check_room()  # no more than a pack must be free


def test_bodies_that_are_being_checked_fill_the_room() -> None:
    gate = Gate(100, 9, None)
    gate.ready = True
    gate.entering = 99
    gate.check_room()
    gate.entering = 100
    with pytest.raises(RefusedError):
        gate.check_room()
