"""Traces on whole splits: replicas in turn, room in their caches, intervals."""

import pytest

from rankwright.cost_model.percentiles import simulate_trace
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.cost_model.predict_trace import predict_trace
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.simulate import Schedule
from rankwright.cost_model.split import Split
from rankwright.cost_model.trace import TraceRow
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
PAIR = parse_cluster("2xh100-sxm")


def split_of(dp: int, batch: int = 8) -> Split:
    return Split(dp=dp, stage_layers=(32,), max_batch_size=batch, chunk_tokens=2048)


def burst(count: int, cached: int = 0) -> list[TraceRow]:
    return [
        TraceRow(arrival_s=3.0, input_tokens=1000, output_tokens=50, cached_tokens=cached)
        for _ in range(count)
    ]


def test_one_replica_is_what_its_simulation_says() -> None:
    trace, split = burst(6), split_of(dp=1)
    (group,) = choose_replicas(PAIR, split)
    pipeline = StageModels(LLAMA, PAIR, "rankwright").pipeline(group, split.stage_layers, 1)
    run = simulate_trace(pipeline, trace, Schedule(max_batch_size=8, chunk_tokens=2048))
    found = predict_trace(LLAMA, PAIR, split, trace)
    assert found.ttft_s.value == run.ttft_s()
    assert found.ttft_percentiles_s == {percent: run.ttft_s(percent) for percent in (50, 90, 99)}
    assert found.tpot_percentiles_s[90] == run.tpot_s(90)
    assert found.output_tokens_per_s.value == run.output_tokens_per_s


def test_replicas_take_the_requests_in_turn() -> None:
    both = predict_trace(LLAMA, PAIR, split_of(dp=2), burst(8))
    one = predict_trace(LLAMA, PAIR, split_of(dp=1), burst(4))
    assert both.ttft_s == one.ttft_s
    assert both.output_tokens_per_s.value == pytest.approx(2 * one.output_tokens_per_s.value)
    # Fewer requests than replicas leave one idle.
    assert predict_trace(LLAMA, PAIR, split_of(dp=2), burst(1)).ttft_s.value > 0


def test_a_full_cache_makes_requests_wait() -> None:
    roomy = predict_trace(LLAMA, PAIR, split_of(dp=1), burst(4))
    tight = predict_trace(LLAMA, PAIR, split_of(dp=1), burst(4), kv_tokens=2200)
    assert tight.ttft_percentiles_s[99] > 2 * roomy.ttft_percentiles_s[99]


def test_what_is_cached_is_not_computed_again() -> None:
    cold = predict_trace(LLAMA, PAIR, split_of(dp=1), burst(4))
    warm = predict_trace(LLAMA, PAIR, split_of(dp=1), burst(4, cached=900))
    assert warm.ttft_s.value < cold.ttft_s.value


def test_waits_are_less_certain_than_prompts() -> None:
    alone = predict_trace(LLAMA, PAIR, split_of(dp=1), burst(1)).ttft_s
    queued = predict_trace(LLAMA, PAIR, split_of(dp=1, batch=1), burst(8)).ttft_s
    assert queued.high / queued.value > alone.high / alone.value


def test_a_split_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="DP3 takes 3 GPUs"):
        predict_trace(LLAMA, PAIR, split_of(dp=3), burst(1))
