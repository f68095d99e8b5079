"""What the regret benchmark sends, keeps and makes of it, on a virtual clock."""

import statistics
from pathlib import Path

import pytest

from client import Timeline
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.topology.shorthand import parse_cluster
from regret_judge import contenders, judge, noise, summarise
from regret_load import Load, figures, make_load
from regret_parts import read_parts, write_part
from regret_scenarios import Job, Option, Scenario, default_scenarios
from simulated_replica import simulated_replica

TWO_H200 = parse_cluster("2xh200-sxm")
LLAMA_8B = "meta-llama/Llama-3.1-8B"
TP2 = Split(tp=2, stage_layers=(4,), max_batch_size=16, chunk_tokens=2048)


def small_model() -> ModelSpec:
    """Llama-3.1-8B with 4 layers."""
    model = read_model(LLAMA_8B)
    (run,) = model.layer_runs
    return model.model_copy(update={"layer_runs": (run.model_copy(update={"count": 4}),)})


def measured(load: Load) -> list[tuple[int, int]]:
    """The requests whose figures count."""
    return load.lengths[load.num_before : load.until]


def test_replicas_serve_the_requests_of_one_between_them() -> None:
    alone = make_load(1024, 128, 128, rounds=2)
    halves = [make_load(1024, 128, 64, rounds=2, replica=one, dp=2) for one in (0, 1)]
    assert sorted(measured(alone)) == sorted(one for half in halves for one in measured(half))


def test_any_eight_measured_requests_are_of_nearly_the_mean_length() -> None:
    load = make_load(1000, 200, 8, rounds=4)
    assert load.num_measured >= 32
    for start in range(0, load.num_measured, 8):
        prompts, outputs = zip(*measured(load)[start : start + 8], strict=True)
        assert statistics.fmean(prompts) == pytest.approx(1000, rel=0.07)
        assert statistics.fmean(outputs) == pytest.approx(200, rel=0.07)


def test_rates_follow_from_the_measured_requests_alone() -> None:
    load = make_load(10, 3, 2, rounds=2)
    line = Timeline()
    for index in range(load.until + 2):
        is_measured = load.num_before <= index < load.until
        line.sent[str(index)] = float(index)
        # Measured: first token after 1 s, two more every 2 s. The others would give other rates.
        line.tokens[str(index)] = [index + (1.0 if is_measured else 9.0) + 2 * t for t in range(3)]
    row = figures(line, load)
    assert (row["ttft_s"], row["tpot_s"], row["request_s"]) == (1.0, 2.0, 5.0)
    assert row["output_tokens_per_s"] == pytest.approx(2 * 3 / 5)


def test_a_short_run_tells_nearly_what_a_long_one_does() -> None:
    rates = []
    for rounds in (2, 8):
        load = make_load(512, 32, 16, rounds=rounds)
        engine = simulated_replica(small_model(), TWO_H200, TP2)
        line = engine.keep(load.lengths, load.in_flight, until=load.until)
        row = figures(line, load)
        rates.append(row["output_tokens_per_s"])
        # Tokens of the window in which the measured requests were sent.
        names = list(line.sent)[load.num_before : load.until]
        start, stop = line.sent[names[0]], line.sent[names[-1]]
        count = sum(start < moment <= stop for one in line.tokens.values() for moment in one)
    assert rates[0] == pytest.approx(rates[1], rel=0.05)
    assert count / (stop - start) == pytest.approx(rates[1], rel=0.03)


def test_a_cache_that_is_full_is_slower() -> None:
    load = make_load(512, 32, 16, rounds=2)
    rates = []
    for blocks in (None, 4 * 10):  # 10 blocks of 64 tokens hold a request
        engine = simulated_replica(small_model(), TWO_H200, TP2, blocks)
        row = figures(engine.keep(load.lengths, load.in_flight, until=load.until), load)
        rates.append(row["output_tokens_per_s"])
    assert rates[1] < 0.9 * rates[0]


JOB = Job(LLAMA_8B, "DP2", 1024, 128, 32)


def test_a_run_counts_when_all_replicas_have_done_it(tmp_path: Path) -> None:
    for number, replica in ((1, 0), (1, 1), (2, 0)):
        row = {"output_tokens_per_s": 10.0, "tpot_s": 0.1 * (replica + 1)}
        write_part(tmp_path, JOB, row, number=number, replica=replica, dp=2)
    assert read_parts(tmp_path) == {JOB: {1: {"output_tokens_per_s": 20.0, "tpot_s": 0.2}}}


SCENARIO = Scenario(LLAMA_8B, 1024, 128, 64, tpot_limit_s=0.010)


def option(label: str, batch_size: int = 64) -> Option:
    """A plan; only its name matters here, and whether it is a pipeline."""
    split = TP2.model_copy(update={"pp": 2, "stage_layers": (2, 2)}) if "PP" in label else TP2
    return Option(label, split, batch_size)


def passes(*rates: float, tpot_s: float = 0.009) -> list[dict[str, float]]:
    """What the passes of a plan gave."""
    return [
        {"output_tokens_per_s": rate, "tpot_s": tpot_s, "ttft_s": 0.1, "request_s": 1.0}
        for rate in rates
    ]


def test_regret_is_against_the_best_mean_that_keeps_the_limit() -> None:
    options = [option("TP2"), option("DP2"), option("PP2"), option("CP2")]
    rows = [passes(95, 97), passes(100, 98), passes(120, 120, tpot_s=0.0104), passes(50)]
    measured = {one.job(SCENARIO): row for one, row in zip(options, rows, strict=True)}
    rules = {"nothing": None, "pipeline": option("PP2")}
    row = judge(SCENARIO, option("TP2"), options, rules, measured)
    assert row["best"] == {"split": "DP2", "batch_size": 64}
    assert row["chosen"]["regret"] == pytest.approx(1 - 96 / 99)
    assert row["lead_over_next_split"] == pytest.approx(1 - 96 / 99)
    # Best of one pass, by the other: DP2 both times, 1 - 97/98 and 1 - 95/100.
    assert row["crossed_regret"] == pytest.approx((1 - 97 / 98 + 1 - 95 / 100) / 2)
    assert row["complete"]
    assert row["rules"]["nothing"] is None
    assert row["rules"]["pipeline"]["breaks_limit"]
    assert {one.label for one in contenders(SCENARIO, options, option("CP2"), measured)} == {
        "TP2",
        "DP2",
        "PP2",  # over the limit by 4 %: another run may say otherwise
        "CP2",  # chosen
    }
    summary = summarise([row, {**row, "complete": False}])
    assert (summary["scenarios"], summary["scenarios_complete"]) == (2, 1)
    assert summary["choices"]["planner"]["worst_regret"] == row["chosen"]["regret"]
    assert summary["choices"]["pipeline"]["limits_broken"] == 1


def test_a_search_without_pipelines_misses_the_best_one() -> None:
    unlimited = Scenario(LLAMA_8B, 1024, 128, 64)
    rates = {"TP2": 80.0, "PP2": 100.0, "DP2": 90.0}
    options = [option(label) for label in rates]
    measured = {one.job(unlimited): passes(rates[one.label]) for one in options}
    row = judge(unlimited, option("PP2"), options, {}, measured)
    assert row["best_of_peer_space"] == pytest.approx(0.1)
    assert summarise([row])["best_of_peer_space"]["worst_regret"] == pytest.approx(0.1)


def test_noise_is_the_spread_of_one_figure() -> None:
    measured = {JOB: passes(99, 101), Job(LLAMA_8B, "TP2", 1, 1, 1): passes(5)}
    assert noise(measured) == pytest.approx(0.02 / 2**0.5)


def test_scenarios_are_not_the_same_twice() -> None:
    scenarios = default_scenarios()
    assert len(set(scenarios)) == len(scenarios) >= 24
