from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.serving import find_flow, micro_batches_of, serve_closed, serve_open
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.workload import Workload


@dataclass
class FixedPace:
    """A pipeline whose step takes 10 ms and 1 ms more for every 100 prompt tokens."""

    num_stages: int = 1

    @property
    def stages(self) -> tuple[None, ...]:
        return (None,) * self.num_stages

    def round_s(self, tokens: StepTokens, micro_batches: int = 1) -> float:
        return 0.010 + 0.001 * tokens.prefill / 100

    def prompt_s(self, tokens: StepTokens, steps: int) -> float:
        return steps * self.round_s(tokens)


def pace(num_stages: int = 1) -> Pipeline:
    return cast(Pipeline, FixedPace(num_stages))


def test_one_request_alone_prefills_and_then_decodes() -> None:
    load = Workload(input_tokens=1000, output_tokens=101)
    state = serve_closed(pace(), load, batch_size=1, chunk_tokens=2001)
    # One step of 10 + 10 ms, then 100 steps of 10 ms.
    assert state.flow.prompt_steps == 1
    assert state.ttft_s == pytest.approx(0.020)
    assert state.wait_s == 0
    assert state.tpot_s == pytest.approx(0.010)
    assert state.requests_per_s == pytest.approx(1 / (100 * 0.010 + 0.020))


def test_throughput_counts_the_work_of_prompts() -> None:
    long = Workload(input_tokens=2000, output_tokens=100)
    short = Workload(input_tokens=100, output_tokens=100)
    rates = [
        serve_closed(pace(), load, batch_size=16, chunk_tokens=2048).requests_per_s
        for load in (short, long)
    ]
    assert rates[1] < rates[0]


def test_prompts_that_outrun_the_chunk_bind_the_throughput() -> None:
    load = Workload(input_tokens=1000, output_tokens=10)
    state = serve_closed(pace(), load, batch_size=64, chunk_tokens=564)
    # 564 tokens a step, of which a request takes 1,000 and 9, whatever else is in flight: 559 of
    # prompts, whose step takes 15.6 ms.
    assert state.flow.mixed_share == 1
    assert state.tpot_s == pytest.approx(0.0156, rel=1e-3)
    assert state.requests_per_s == pytest.approx(564 / 1009 / state.tpot_s)
    # Little's law: what is in flight is either waiting, in its two prefill steps, or decoding.
    in_flight = state.requests_per_s * (state.ttft_s + 9 * state.tpot_s)
    assert in_flight == pytest.approx(64, rel=0.02)


def test_a_shared_prefix_is_not_computed_again() -> None:
    load = Workload(input_tokens=1000, output_tokens=10, shared_prefix=0.9)
    flow = find_flow(load, 1, 4096)
    assert flow.mixed.prefill == pytest.approx(100)
    # Its tokens still attend to the whole prompt before them: 900 cached and half of their own.
    assert flow.mixed.prefill_context == 950


def test_one_token_of_output_needs_no_decode_step() -> None:
    load = Workload(input_tokens=500, output_tokens=1)
    state = serve_closed(pace(), load, batch_size=4, chunk_tokens=4096)
    assert state.flow.plain.decode == 0
    assert state.requests_per_s > 0


def test_a_pipeline_gets_one_micro_batch_a_stage() -> None:
    assert [micro_batches_of(4, batch) for batch in (1, 3, 4, 100)] == [1, 3, 4, 4]
    load = Workload(input_tokens=1, output_tokens=1000)
    one = serve_closed(pace(1), load, batch_size=8, chunk_tokens=512)
    four = serve_closed(pace(4), load, batch_size=8, chunk_tokens=512)
    assert one.flow.plain.decode == pytest.approx(8, rel=0.01)
    assert four.flow.plain.decode == pytest.approx(2, rel=0.01)


def test_arrivals_that_outrun_the_replica_have_no_steady_state() -> None:
    load = Workload(input_tokens=1000, output_tokens=100)
    most = serve_closed(pace(), load, batch_size=8, chunk_tokens=2048).requests_per_s
    slower = serve_open(pace(), load, requests_per_s=0.5 * most, batch_size=8, chunk_tokens=2048)
    assert slower is not None
    assert slower.requests_per_s == most
    assert slower.batch_size < 8
    faster = serve_open(pace(), load, requests_per_s=1.1 * most, batch_size=8, chunk_tokens=2048)
    assert faster is None


def test_a_percentile_stretches_the_wait_and_not_the_prompt() -> None:
    load = Workload(input_tokens=1000, output_tokens=100)
    state = serve_closed(pace(), load, batch_size=16, chunk_tokens=2048)
    prompt_s = state.ttft_s - state.wait_s
    assert state.ttft_at_s(50) == state.ttft_s
    # One request in a hundred waits ln(100) = 4.6 times as long as the mean.
    assert state.ttft_at_s(99) == pytest.approx(prompt_s + 4.605 * state.wait_s, rel=1e-3)


def test_waiting_grows_with_the_rate() -> None:
    load = Workload(input_tokens=1000, output_tokens=100)
    most = serve_closed(pace(), load, batch_size=32, chunk_tokens=2048).requests_per_s
    waits = []
    for share in (0.1, 0.5, 0.9, 0.99):
        state = serve_open(
            pace(), load, requests_per_s=share * most, batch_size=32, chunk_tokens=2048
        )
        assert state is not None
        waits.append(state.wait_s)
    assert waits == sorted(waits)
    assert waits[0] < 0.01 < waits[-1]


loads = st.builds(
    Workload,
    input_tokens=st.integers(1, 20_000),
    output_tokens=st.integers(1, 4000),
    shared_prefix=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(loads, st.integers(1, 512), st.sampled_from([512, 2048, 8192]))
def test_no_flow_takes_more_than_its_slots_and_its_chunk(
    load: Workload, slots: int, chunk: int
) -> None:
    flow = find_flow(load, slots, chunk)
    assert 0 < flow.mixed_share <= 1
    assert flow.mixed.total <= max(chunk, slots) * (1 + 1e-9)
    assert flow.plain.decode <= slots * (1 + 1e-9)
    # Prompt tokens that steps carry are the prompt tokens of the requests that pass.
    carried = flow.mixed_share * flow.mixed.prefill
    prompt = max(1, round(load.input_tokens * (1 - load.shared_prefix)))
    assert carried == pytest.approx(flow.requests * prompt, rel=1e-6)


@given(loads, st.integers(1, 64))
def test_each_slot_has_its_prompt_computed_or_decodes_or_waits_for_a_request(
    load: Workload, slots: int
) -> None:
    state = serve_closed(pace(), load, batch_size=slots, chunk_tokens=8192)
    flow = state.flow
    # Slots are where they are by chance, not where steps can just hold their prompts.
    at_prompts = flow.requests * flow.prompt_steps / slots
    assume(flow.mixed_share == pytest.approx(1 - (1 - at_prompts) ** slots))
    # Little's law: each slot has its prompt computed, decodes, or waits for the next request.
    rounds = load.output_tokens - 1 + flow.turn_steps
    request_s = state.ttft_s - state.wait_s + rounds * state.tpot_s
    assert state.requests_per_s * request_s == pytest.approx(slots, rel=1e-6)


@given(loads, st.integers(1, 256), st.integers(1, 8))
def test_steps_with_prompts_and_without_hold_all_that_decode(
    load: Workload, slots: int, stages: int
) -> None:
    flow = find_flow(load, slots, 8192, stages)
    assume(flow.plain.decode > 1)
    decoding = flow.mixed_share * flow.mixed.decode + (1 - flow.mixed_share) * flow.plain.decode
    assert decoding == pytest.approx(flow.requests * (load.output_tokens - 1), rel=1e-6)
    assert flow.plain.decode <= slots / min(stages, slots) * (1 + 1e-9)


@given(loads, st.integers(1, 256))
def test_more_slots_never_serve_fewer_requests(load: Workload, slots: int) -> None:
    # The chunk is wide enough here that slots do not take room from prompts.
    few = serve_closed(pace(), load, batch_size=slots, chunk_tokens=100_000)
    many = serve_closed(pace(), load, batch_size=2 * slots, chunk_tokens=100_000)
    assert many.requests_per_s >= few.requests_per_s * (1 - 1e-3)


@given(loads, st.integers(2, 512))
def test_slots_whose_prompts_wait_take_nothing_from_others(load: Workload, slots: int) -> None:
    flow = find_flow(load, slots, 1024)
    if flow.waiting > 1:
        assert find_flow(load, 2 * slots, 1024).mixed == flow.mixed
