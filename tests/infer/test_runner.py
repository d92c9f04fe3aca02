"""The runner: results come in order from any packs, and errors stay with their jobs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import LoadModel
from messages import check_message
from protea.errors import CapabilityError, DeviceError, NonFiniteError, SequenceTooLongError, UsageError
from protea.infer import runner as memory
from protea.infer.runner import Job, Result, Runner, Wanted, default_budget
from protea.models.attention import HeadMaps
from protea.models.encoder import Encoder
from protea.packing import PackedBatch
from protea.transforms.mixed import mix

pytestmark = pytest.mark.usefixtures("one_thread")


def job(number: int, length: int, wanted: Wanted | None = None) -> Job[int]:
    tokens = np.random.default_rng([number, length]).integers(4, 24, length).astype(np.uint8)
    places = np.arange(length, dtype=np.int64)
    return Job(tokens, wanted or Wanted(layers=(0, 3), places=places), number, f"job {number}")


def check(model: Encoder, result: Result[int]) -> None:
    """A result equals that of its job by itself."""
    (alone,) = Runner(model, 1).run([result.job])
    assert result.states.keys() == {(0, "tokens"), (3, "tokens")}
    for key, value in result.states.items():
        torch.testing.assert_close(value, alone.states[key], rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.log_probabilities, alone.log_probabilities, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.exp(result.log_probabilities).sum(-1), 1, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 40), max_size=12), budget=st.integers(1, 90))
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_come_in_order_and_alone(load_small: LoadModel, lengths: list[int], budget: int) -> None:
    model = load_small("esm2").module
    results = list(Runner(model, budget).run(job(number, length) for number, length in enumerate(lengths)))
    assert [result.job.tag for result in results] == list(range(len(lengths)))
    for result in results:
        check(model, result)


@given(counts=st.lists(st.integers(0, 4), max_size=6), budget=st.integers(1, 60), apart=st.booleans())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_items_get_the_results_of_all_their_jobs(
    load_small: LoadModel, counts: list[int], budget: int, apart: bool
) -> None:
    model = load_small("esm2").module
    done: list[int] = []
    packs: list[set[int]] = []
    forward = model.forward

    def jobs(item: int) -> Iterator[Job[int]]:
        for number in range(counts[item]):
            yield Job(np.full(5 + number, 4 + item, np.uint8), Wanted(layers=(3,)), number, "")

    def watched(batch: PackedBatch, **observers: object) -> torch.Tensor:
        packs.append(set(batch.input_ids.tolist()))
        return forward(batch, **observers)  # type: ignore[arg-type]

    model.forward = watched  # type: ignore[method-assign]
    items = ((item, jobs(item)) for item in range(len(counts)))
    given = list(Runner(model, budget).each(items, apart=apart, advance=done.append))
    assert [item for item, _ in given] == list(range(len(counts)))
    for item, results in given:
        assert [result.job.tag for result in results] == list(range(counts[item]))
        assert all((result.job.tokens == 4 + item).all() for result in results)
    assert sum(done) == sum(counts)
    assert not apart or all(len(pack) == 1 for pack in packs)


def test_jobs_are_taken_as_they_are_needed(load_small: LoadModel) -> None:
    taken: list[int] = []

    def jobs() -> Iterator[Job[int]]:
        for number in range(100):
            taken.append(number)
            yield job(number, 10)

    next(Runner(load_small("esm2").module, 50).run(jobs()))
    assert len(taken) <= 6


def test_a_sequence_that_is_too_long_fails_alone(load_small: LoadModel) -> None:
    model = load_small("esm1nv").module
    good, long, last = Runner(model, 2000).run([job(0, 10), job(1, 513), job(2, 10)])
    check(model, good)
    check(model, last)
    with pytest.raises(SequenceTooLongError, match=r"job 1.*511.*510") as caught:
        long.checked()
    check_message("infer.too_many_tokens", caught.value)
    assert isinstance(long.error, SequenceTooLongError)
    (alone,) = Runner(model, 2000).run([job(1, 513)])
    assert isinstance(alone.error, SequenceTooLongError)


def test_nan_fails_alone(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    with torch.no_grad():
        model.word_embeddings.weight[30] = torch.nan
    bad = Job(np.array([4, 30, 5], np.uint8), Wanted(layers=(3,), places=np.array([0])), 1, "the bad one")
    # No logits: the output matrix is tied, so every row of logits has a column for the damaged letter.
    states = Wanted(layers=(3,))
    good, failed, last = Runner(model, 2000).run([job(0, 10, states), bad, job(2, 12, states)])
    for result in (good, last):
        assert torch.isfinite(result.checked().states[3, "tokens"]).all()
    with pytest.raises(NonFiniteError, match=r"the bad one.*float32") as caught:
        failed.checked()
    check_message("infer.not_finite", caught.value)
    mix(model)
    (failed,) = Runner(model, 2000).run([bad])
    with pytest.raises(NonFiniteError, match="infinities or NaN in bf16-mixed; the weights"):
        failed.checked()
    with pytest.raises(NonFiniteError):
        _ = failed.log_probabilities


def test_what_does_not_fit_fails_alone(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_small("esm2").module
    forward = type(model).forward
    sizes: list[int] = []

    def limited(self: Encoder, batch: PackedBatch, **observers: object) -> torch.Tensor:
        sizes.append(batch.input_ids.numel())
        if sizes[-1] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch, **observers)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "forward", limited)
    results = list(Runner(model, 10_000).run([job(0, 30), job(1, 25), job(2, 61), job(3, 10)]))
    assert [type(result.error) for result in results] == [type(None), type(None), DeviceError, type(None)]
    check_message("infer.too_large", str(results[2].error))
    assert sizes[0] == 126


def test_each_job_keeps_what_it_asked_for(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    seen: list[tuple[int, int, tuple[int, ...]]] = []

    def look(number: int, maps: HeadMaps) -> None:
        seen.append((number, len(maps), tuple(maps[0].shape)))

    wanted = [
        Wanted(layers=(1,), reduce=lambda x: {"first": x[0], "sum": x.sum(0)}),
        Wanted(places=np.array([2, 0])),
        Wanted(watch=lambda: look),
        Wanted(),
    ]
    first, second, third, fourth = Runner(model, 1000).run(job(n, 7 + n, what) for n, what in enumerate(wanted))
    assert set(first.states) == {(1, "first"), (1, "sum")}
    assert first.logits is None
    assert not second.states
    assert second.logits is not None
    assert second.logits.shape == (2, 33)
    assert not third.states
    assert seen == [(1, 5, (9, 9)), (2, 5, (9, 9)), (3, 5, (9, 9))]
    assert (fourth.states, fourth.logits, fourth.error) == ({}, None, None)


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_was_asked_before_a_failure_is_computed(load_small: LoadModel, ahead: int) -> None:
    runner = Runner(load_small("esm2").module, 50)
    runner._ahead = ahead
    done: list[int] = []

    def jobs() -> Iterator[Job[int]]:
        for number in range(9):
            yield job(number, 20)
        raise UsageError("line 10: no sequence")

    with pytest.raises(UsageError, match="line 10: no sequence"):
        done.extend(result.job.tag for result in runner.run(jobs()))
    assert done == list(range(9))


def test_an_empty_input_fails_alone(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    empty = Job(np.array([], np.uint8), Wanted(), 1, "the empty one")
    good, bad, last = Runner(model, 1000).run([job(0, 10), empty, job(2, 9)])
    check(model, good)
    check(model, last)
    with pytest.raises(UsageError, match="the empty one") as caught:
        bad.checked()
    check_message("infer.no_tokens", caught.value)


def test_a_model_without_head_has_no_logits(load_small: LoadModel) -> None:
    model = load_small("esm2").module
    model.lm_head = None
    states, logits = Runner(model, 1000).run([job(0, 5, Wanted(layers=(1,))), job(1, 5)])
    assert states.checked().states
    assert isinstance(logits.error, CapabilityError)


def test_errors_of_observers_belong_to_their_jobs(load_small: LoadModel) -> None:
    def refuse(*_: object) -> dict[str, torch.Tensor]:
        raise UsageError("not this one")

    model = load_small("esm2").module
    wanted = [Wanted(layers=(0, 3), reduce=refuse), Wanted(watch=lambda: refuse), Wanted(layers=(3,))]  # type: ignore[arg-type,return-value]
    first, second, third = Runner(model, 1000).run(job(n, 5, what) for n, what in enumerate(wanted))
    assert str(first.error) == str(second.error) == "not this one"
    assert third.checked().states


def test_each_half_of_a_pack_has_new_watchers(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_small("esm2").module
    forward = type(model).forward

    def limited(self: Encoder, batch: PackedBatch, **observers: object) -> torch.Tensor:
        x = forward(self, batch, **observers)  # type: ignore[arg-type]
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    class Count:
        layers = 0

        def __call__(self, number: int, maps: HeadMaps) -> None:
            self.layers += 1

    monkeypatch.setattr(type(model), "forward", limited)
    results = list(Runner(model, 1000).run(job(n, 6, Wanted(watch=Count)) for n in range(3)))
    assert [result.watcher.layers for result in results] == [3, 3, 3]


def test_the_budget_follows_the_memory(load_small: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_small("esm2").module
    assert default_budget(model) == 4096
    monkeypatch.setattr(memory, "available_memory", lambda: 12_000_000)
    assert default_budget(model) == 1024
    monkeypatch.setattr(memory, "available_memory", lambda: 30_000_000)
    assert 1024 < default_budget(model) < 4096
