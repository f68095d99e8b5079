"""Runs on a real pipeline: rates, percentiles, pipelines of several stages, traces."""

import pytest

from rankwright.cost_model.percentiles import Percentiles, simulate_pipeline, simulate_trace
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.serving import serve_closed
from rankwright.cost_model.simulate import Outcome, Schedule
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.trace import TraceRow
from rankwright.cost_model.workload import Workload
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
LOAD = Workload(input_tokens=1024, output_tokens=256)


def pipeline(pp: int = 1) -> Pipeline:
    cluster = parse_cluster(f"{pp}xh100-sxm")
    split = Split(pp=pp, stage_layers=(32 // pp,) * pp)
    models = StageModels(LLAMA, cluster, "rankwright")
    return models.pipeline(choose_replicas(cluster, split)[0], split.stage_layers, 1)


def test_means_and_percentiles_by_hand() -> None:
    run = Percentiles([Outcome(0.0, 1.0, 3.0, 3), Outcome(0.0, 2.0, 2.0, 1)])
    assert (run.ttft_s(), run.ttft_s(100), run.ttft_s(0)) == (1.5, 2.0, 1.0)
    assert run.tpot_s() == 1.0  # a single token has none
    assert run.requests_per_s == pytest.approx(2 / 3)
    assert run.output_tokens_per_s == pytest.approx(4 / 3)


@pytest.mark.parametrize(("pp", "near"), [(1, 0.12), (2, 0.2)])
def test_a_long_run_comes_near_the_steady_state(pp: int, near: float) -> None:
    stages, batch = pipeline(pp), 32
    steady = serve_closed(stages, LOAD, batch_size=batch, chunk_tokens=2048)
    run = simulate_pipeline(
        stages,
        LOAD,
        Schedule(max_batch_size=batch, chunk_tokens=2048),
        requests=20 * batch,
        length_spread=0.3,
    )
    assert run.tpot_s() == pytest.approx(steady.tpot_s, rel=near)
    assert run.requests_per_s == pytest.approx(steady.requests_per_s, rel=near)


def test_more_load_waits_longer_at_every_percentile() -> None:
    stages, schedule = pipeline(), Schedule(max_batch_size=64, chunk_tokens=2048)
    runs = [
        simulate_pipeline(
            stages, LOAD.model_copy(update={"request_rate": rate}), schedule, requests=300
        )
        for rate in (0.5, 4.0, 12.0)
    ]
    for percent in (50, 90, 99):
        waits = [run.ttft_s(percent) for run in runs]
        assert waits == sorted(waits)
    assert all(run.ttft_s(99) > run.ttft_s(50) for run in runs)


def test_runs_are_the_same_every_time() -> None:
    schedule = Schedule(max_batch_size=8, chunk_tokens=2048)
    first, again = (
        simulate_pipeline(pipeline(), LOAD, schedule, requests=40, length_spread=0.2)
        for _ in range(2)
    )
    assert list(first.outcomes) == list(again.outcomes)


def test_a_trace_is_replayed_with_its_cached_prefixes() -> None:
    rows = [TraceRow(arrival_s=10.0 * i, input_tokens=4096, output_tokens=8) for i in range(2)]
    rows.append(TraceRow(arrival_s=20.0, input_tokens=4096, output_tokens=8, cached_tokens=4000))
    run = simulate_trace(pipeline(), rows, Schedule(), request_s=0.5)
    first, second, cached = run.outcomes
    assert first.ttft_s == pytest.approx(second.ttft_s)
    assert 0.5 < cached.ttft_s < 0.5 + (first.ttft_s - 0.5) / 4
