"""Predicts what the requests of a trace see on a split, by simulating each replica."""

from collections.abc import Sequence

from pydantic import Field

from rankwright.cost_model.intervals import Intervals, estimate, intervals_of
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.percentiles import Percentiles, simulate_trace
from rankwright.cost_model.predict import StageModels, check_split, choose_replicas
from rankwright.cost_model.prediction import Estimate
from rankwright.cost_model.simulate import Outcome, Schedule
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.trace import TraceRow
from rankwright.topology.cluster import Cluster
from rankwright.topology.value import Value

_PERCENTILES = (50, 90, 99)


class TracePrediction(Value):
    """Predicted speed under the requests of a trace; seconds are means over them."""

    ttft_s: Estimate
    tpot_s: Estimate
    output_tokens_per_s: Estimate = Field(description="first arrival to last token")
    ttft_percentiles_s: dict[int, float]
    tpot_percentiles_s: dict[int, float]


def predict_trace(
    model: ModelSpec,
    cluster: Cluster,
    split: Split,
    trace: Sequence[TraceRow],
    *,
    kv_tokens: float = float("inf"),
) -> TracePrediction:
    """Return what the requests of `trace` see on our executor, which takes replicas in turn.

    Args:
        model: What runs.
        cluster: Where.
        split: Its batch and chunk sizes are those of the scheduler.
        trace: By arrival, as `read_trace` gives it; at least one request.
        kv_tokens: Tokens that the KV caches of one replica hold together.

    Raises:
        ValueError: The split is not legal for the model or does not fit the cluster.
    """
    check_split(model, split)
    models = StageModels(model, cluster, "rankwright")
    schedule = Schedule(
        max_batch_size=split.max_batch_size, chunk_tokens=split.chunk_tokens, kv_tokens=kv_tokens
    )
    outcomes: list[Outcome] = []
    prompts_s = 0.0
    replica = 0
    pipelines = [
        (
            group.count,
            models.pipeline_of(group, split),
        )
        for group in choose_replicas(cluster, split)
    ]
    for count, pipeline in pipelines:
        for _ in range(count):
            mine = trace[replica :: split.dp]
            outcomes += simulate_trace(pipeline, mine, schedule).outcomes
            prompts_s += _prompts_s(pipeline, mine, schedule)
            replica += 1
    run = Percentiles(outcomes)
    intervals = intervals_of("rankwright", pipelines[-1][1].stages[0].provenance)
    return TracePrediction(
        ttft_s=_ttft(run.ttft_s(), prompts_s / len(outcomes), intervals),
        tpot_s=estimate(run.tpot_s(), intervals.tpot),
        output_tokens_per_s=estimate(run.output_tokens_per_s, intervals.rate),
        ttft_percentiles_s={percent: run.ttft_s(percent) for percent in _PERCENTILES},
        tpot_percentiles_s={percent: run.tpot_s(percent) for percent in _PERCENTILES},
    )


def _prompts_s(pipeline: Pipeline, trace: Sequence[TraceRow], schedule: Schedule) -> float:
    """Return the seconds that the prompts would take if each came to an idle replica, summed."""
    alone: dict[tuple[int, int], float] = {}
    total = 0.0
    for row in trace:
        key = row.input_tokens, row.cached_tokens
        if key not in alone:
            one = row.model_copy(update={"output_tokens": 1})
            alone[key] = simulate_trace(pipeline, [one], schedule).ttft_s()
        total += alone[key]
    return total


def _ttft(mean_s: float, prompt_s: float, intervals: Intervals) -> Estimate:
    """Return the mean TTFT: its prompt, and what is more, its wait, have their own intervals."""
    wait_s = max(0.0, mean_s - prompt_s)
    low, high = (
        (mean_s - wait_s) * prompt + wait_s * wait
        for prompt, wait in zip(intervals.prompt, intervals.wait, strict=True)
    )
    return Estimate(value=mean_s, low=low, high=high)
