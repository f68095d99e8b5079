"""Runs small enough to follow by hand, and laws that every run keeps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.simulate import (
    Policy,
    Request,
    Schedule,
    closed_loop,
    percentile,
    simulate,
)


def one_second(tokens: StepTokens) -> float:
    """A step takes 1 s, whatever it holds."""
    assert tokens.total > 0
    return 1.0


def by_tokens(tokens: StepTokens) -> float:
    """A prompt token takes 1 ms, a step 10 ms."""
    return 0.010 + 0.001 * tokens.prefill


def test_one_request_by_hand() -> None:
    # Ten prompt tokens in chunks of four: three steps, then four of decoding.
    (seen,) = simulate(
        one_second, Schedule(chunk_tokens=4), closed_loop(10, 5, 10, 1), concurrency=1
    )
    assert (seen.ttft_s, seen.tpot_s, seen.last_token_s) == (3.0, 1.0, 7.0)


def test_prompts_share_steps_with_decoding_when_mixed() -> None:
    schedule = Schedule(policy="mixed", chunk_tokens=4)
    first, second = simulate(one_second, schedule, closed_loop(4, 3, 4, 2), concurrency=2)
    # Step 1: the first prompt. 2: its token and 3 of 4 prompt tokens. 3: its last, and the fourth.
    assert (first.ttft_s, first.last_token_s) == (1.0, 3.0)
    assert (second.ttft_s, second.last_token_s) == (3.0, 5.0)


def test_prompts_stop_decoding_when_they_go_first() -> None:
    schedule = Schedule(policy="prefill_first", chunk_tokens=4)
    first, second = simulate(one_second, schedule, closed_loop(4, 3, 4, 2), concurrency=2)
    assert (first.ttft_s, second.ttft_s) == (1.0, 2.0)
    # Both decode from the third step on: the first waited one step for the second's prompt.
    assert first.last_token_s == second.last_token_s == 4.0
    assert (first.tpot_s, second.tpot_s) == (1.5, 1.0)


def test_equal_requests_stay_in_waves_where_prompts_go_first() -> None:
    schedule = Schedule(policy="prefill_first", chunk_tokens=100)
    seen = simulate(by_tokens, schedule, closed_loop(100, 11, 100, 40), concurrency=8)
    # Eight prompts of 110 ms one after another: 110 to 880 ms, 495 on average, in every wave.
    for wave in range(5):
        part = seen[8 * wave : 8 * wave + 8]
        assert sum(one.ttft_s for one in part) / 8 == pytest.approx(0.495)


def test_a_full_cache_lets_no_more_in() -> None:
    schedule = Schedule(chunk_tokens=100, kv_tokens=25)
    seen = simulate(one_second, schedule, closed_loop(10, 5, 10, 3), concurrency=3)
    # 15 tokens each: one at a time.
    assert [one.first_token_s for one in seen] == [1.0, 6.0, 11.0]
    half = Schedule(chunk_tokens=100, kv_tokens=25, reserved_share=0.5)
    both = simulate(one_second, half, closed_loop(10, 5, 10, 2), concurrency=2)
    assert [one.first_token_s for one in both] == [1.0, 1.0]


def test_a_request_too_large_for_the_cache_runs_alone() -> None:
    (seen,) = simulate(one_second, Schedule(kv_tokens=1), closed_loop(10, 2, 10, 1), concurrency=1)
    assert seen.last_token_s == 2.0


def test_whole_prompts_only() -> None:
    schedule = Schedule(chunk_tokens=6, split_prompts=False)
    seen = simulate(one_second, schedule, closed_loop(4, 1, 4, 2), concurrency=2)
    assert [one.ttft_s for one in seen] == [1.0, 2.0]
    (long,) = simulate(one_second, schedule, closed_loop(20, 1, 20, 1), concurrency=1)
    assert long.ttft_s == 1.0


def test_a_prompt_takes_no_more_than_its_ranks_part_of_a_step() -> None:
    schedule = Schedule(chunk_tokens=8, ranks=2)
    (alone,) = simulate(one_second, schedule, closed_loop(8, 1, 8, 1), concurrency=1)
    assert alone.ttft_s == 2.0  # four tokens a step, on its rank
    both = simulate(one_second, schedule, closed_loop(8, 1, 8, 2), concurrency=2)
    assert [one.ttft_s for one in both] == [2.0, 2.0]  # each on its own


def test_open_arrivals_wait_for_nobody_when_far_apart() -> None:
    requests = [Request(100.0 * i, 4, 3, 4) for i in range(5)]
    seen = simulate(one_second, Schedule(chunk_tokens=4), requests)
    assert [one.arrival_s for one in seen] == [0.0, 100.0, 200.0, 300.0, 400.0]
    assert {(one.ttft_s, one.tpot_s) for one in seen} == {(1.0, 1.0)}


def test_an_arrival_in_the_middle_of_decoding_enters_at_the_next_step() -> None:
    requests = [Request(0.0, 4, 11, 4), Request(3.5, 4, 2, 4)]
    _, late = simulate(one_second, Schedule(chunk_tokens=8), requests)
    # Steps end on whole seconds; the one from 4 s to 5 s takes its prompt.
    assert late.first_token_s == 5.0


def test_cached_prefixes_are_not_computed_again() -> None:
    (seen,) = simulate(by_tokens, Schedule(), closed_loop(1000, 2, 200, 1), concurrency=1)
    assert seen.ttft_s == pytest.approx(0.210)


def test_percentiles_by_hand() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0


lengths = st.tuples(st.integers(1, 300), st.integers(1, 60))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(lengths, min_size=1, max_size=30),
    st.sampled_from(["mixed", "prefill_first"]),
    st.integers(1, 10),
    st.integers(16, 200),
    st.integers(1, 800),
)
def test_every_request_is_served_once_and_in_time(
    shapes: list[tuple[int, int]], policy: Policy, batch: int, chunk: int, cache: int
) -> None:
    schedule = Schedule(policy, batch, chunk, cache)
    requests = [Request(0.0, inputs, outputs, inputs) for inputs, outputs in shapes]
    seen = simulate(by_tokens, schedule, requests, concurrency=4)
    assert [one.output_tokens for one in seen] == [outputs for _, outputs in shapes]
    for one, (inputs, outputs) in zip(seen, shapes, strict=True):
        assert one.ttft_s >= 0.010 + 0.001 * inputs - 1e-9
        assert one.last_token_s - one.first_token_s >= 0.010 * (outputs - 1) - 1e-9
    # No faster than all prompt tokens one after another.
    total = sum(inputs for inputs, _ in shapes)
    assert max(one.last_token_s for one in seen) >= 0.001 * total


def test_tokens_wait_for_the_host_where_the_engine_is_faster() -> None:
    schedule = Schedule(max_batch_size=16, host_token_s=1e-3)
    requests = list(closed_loop(16, 32, 16, 64))
    outcomes = simulate(lambda _: 1e-3, schedule, requests, concurrency=16)
    # 16 tokens a step of 1 ms take the host 16 ms: it decides how fast all goes.
    seconds = max(one.last_token_s for one in outcomes)
    assert seconds == pytest.approx(64 * 32 * 1e-3, rel=0.05)
    free = simulate(lambda _: 1e-3, Schedule(max_batch_size=16), requests, concurrency=16)
    assert max(one.last_token_s for one in free) < 0.2 * seconds


def test_a_longer_answer_of_others_is_waited_for_in_the_host() -> None:
    def mean_ttft_s(output_tokens: int) -> float:
        schedule = Schedule(max_batch_size=16, host_token_s=1e-3)
        requests = [Request(0.0, 16, output_tokens * (1 + i % 5), 16) for i in range(160)]
        outcomes = simulate(lambda _: 1e-3, schedule, requests, concurrency=16)
        return sum(one.ttft_s for one in outcomes) / len(outcomes)

    assert mean_ttft_s(256) > 2 * mean_ttft_s(32)


def test_a_request_reaches_the_engine_when_the_host_has_it_ready() -> None:
    schedule = Schedule(max_batch_size=4, host_request_s=0.5)
    requests = [Request(0.0, 8, 1, 8), Request(0.0, 8, 1, 8)]
    first, second = simulate(lambda _: 0.1, schedule, requests)
    # The host has the second request to do before it hands on the first one's token.
    assert first.ttft_s == pytest.approx(1.0)
    assert second.ttft_s == pytest.approx(1.1)
