"""Predicts what one split does on one cluster, with its parts and intervals.

`predict` is the public entry; the planner calls `predict_replicas` with the replicas that it has
chosen, so that a plan's figures and a prediction's come from the same lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwright.cost_model.collectives import Group
from rankwright.cost_model.engines import ENGINE_ROWS
from rankwright.cost_model.fullest import fullest_rank
from rankwright.cost_model.held_weights import held_by
from rankwright.cost_model.intervals import (
    LAUNCHED,
    MEMORY,
    Intervals,
    engine_intervals,
    estimate,
    intervals_of,
)
from rankwright.cost_model.layout import (
    SlotKind,
    boundary_groups,
    find_slots,
    replicas_in_nodes,
    speed_of,
    stage_groups,
)
from rankwright.cost_model.legality import cut_is_legal, shares_are_legal
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.ops import Rates, find_rates
from rankwright.cost_model.prediction import Estimate, Part, Prediction
from rankwright.cost_model.serving import Serving, serve_closed, serve_open
from rankwright.cost_model.split import AttentionSplit, CpExchange, Split
from rankwright.cost_model.stage import LAUNCHES, LayerKinds, StageModel
from rankwright.cost_model.step import Pipeline, make_pipeline
from rankwright.cost_model.unlike_stage import UnlikeStage
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas that are alike: `count` pipelines whose stages are on these kinds of slot."""

    stages: tuple[SlotKind, ...]
    count: int
    spread: bool = False


class StageModels:
    """Makes pipelines, and keeps the stage models that many of them share."""

    def __init__(self, spec: ModelSpec, cluster: Cluster, engine: str) -> None:
        """Prepare for one model, cluster and engine."""
        self.spec = spec
        self.cluster = cluster
        self.engine = engine
        self.layers = LayerKinds(spec)
        self._models: dict[tuple[object, ...], tuple[SlotKind, StageModel]] = {}
        self._boundaries: dict[tuple[int, ...], tuple[Group, ...]] = {}

    def stage(
        self,
        kind: SlotKind,
        ep: int,
        attention: AttentionSplit,
        cp: int = 1,
        cp_exchange: CpExchange = "gather",
    ) -> StageModel:
        """Return the model of a stage on a slot of `kind`, which has `tp * cp` GPUs."""
        key = (id(kind), ep, attention, cp, cp_exchange)
        if key not in self._models:
            rates = find_rates(kind.gpu, self.engine)
            group, context = stage_groups(self.cluster, kind, cp)
            if self.is_unlike(kind, ep, attention, cp):
                members = self.member_rates(kind)
                model: StageModel = UnlikeStage(
                    self.spec, self.layers, rates, group, members, kind.shares
                )
            else:
                model = StageModel(
                    self.spec,
                    self.layers,
                    rates,
                    group,
                    ep=ep,
                    attention=attention,
                    context=context,
                    cp_exchange=cp_exchange,
                )
            self._models[key] = kind, model  # keeping the kind keeps its id from being used again
        return self._models[key][1]

    def is_unlike(self, kind: SlotKind, ep: int, attention: AttentionSplit, cp: int) -> bool:
        """Return whether each rank of a slot of `kind` is timed with its own part on its own GPU.

        Where the GPUs are of one kind, or shares must be equal, the slowest sets the pace.
        """
        return bool(kind.members) and (
            shares_are_legal(self.spec, ep=ep, cp=cp, attention=attention, engine=self.engine)
            is None
        )

    def member_rates(self, kind: SlotKind) -> list[Rates]:
        """Return the rates of the GPU of each rank of a slot; one object for GPUs of one kind."""
        found: dict[tuple[object, ...], Rates] = {}
        members: list[Rates] = []
        for gpu in kind.members:
            rates = find_rates(gpu, self.engine)
            members.append(found.setdefault(speed_of(gpu), rates))
        return members

    def forget(self) -> None:
        """Drop every model that was kept."""
        self._models.clear()
        self._boundaries.clear()

    def pipeline(
        self,
        replicas: Replicas,
        stage_layers: tuple[int, ...],
        ep: int,
        attention: AttentionSplit = "tp",
        cp: int = 1,
        cp_exchange: CpExchange = "gather",
    ) -> Pipeline:
        """Return the pipeline of one of `replicas`."""
        kinds = replicas.stages
        stages = tuple(self.stage(kind, ep, attention, cp, cp_exchange) for kind in kinds)
        key = (replicas.spread, *map(id, kinds))
        groups = self._boundaries.get(key)
        if groups is None:
            groups = boundary_groups(self.cluster, kinds, replicas.spread)
            self._boundaries[key] = groups
        return make_pipeline(self.layers, stages, stage_layers, groups)

    def pipeline_of(self, replicas: Replicas, split: Split) -> Pipeline:
        """Return the pipeline of one of `replicas`, cut as `split` says."""
        return self.pipeline(
            replicas, split.stage_layers, split.ep, split.attention, split.cp, split.cp_exchange
        )


def predict(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    split: Split,
    engine: str = "rankwright",
) -> Prediction:
    """Return what `split` does with `workload` on `cluster`.

    The split's `max_batch_size` requests are in flight in each replica, fewer when the workload's
    concurrency or rate asks for fewer.

    Raises:
        ValueError: The split is not legal for the model or does not fit the cluster, or the engine
            is unknown.
    """
    check_split(model, split, engine)
    model = held_by(model, engine)
    groups = choose_replicas(cluster, split)
    models = StageModels(model, cluster, engine)
    if engine in ENGINE_ROWS:
        return _predict_engine(models, workload, split, groups)
    return predict_replicas(models, workload, split, groups)


def _predict_engine(
    models: StageModels, workload: Workload, split: Split, groups: Sequence[Replicas]
) -> Prediction:
    """Return the prediction with the means of a simulated run, as published benchmarks give them.

    Terms of a step and memory are those of the steady state.
    """
    # The simulation is loaded here: plans for our own executor do without it.
    from rankwright.cost_model.engine_run import chunk_tokens, kv_capacity_tokens, run_on_engine

    gpu, engine = groups[0].stages[0].gpu, models.engine
    split = split.model_copy(update={"chunk_tokens": chunk_tokens(split, engine)})
    capacity = kv_capacity_tokens(models.spec, split, gpu, engine)
    tokens = workload.input_tokens + workload.output_tokens
    fitting = max(1, min(split.max_batch_size, int(capacity // tokens)))
    full = split.model_copy(update={"max_batch_size": fitting})
    steady = predict_replicas(models, workload, full, groups)
    update: dict[str, object] = {}
    if workload.concurrency is not None:
        update["concurrency"] = -(-workload.concurrency // split.dp)
    if workload.request_rate is not None:
        update["request_rate"] = workload.request_rate / split.dp
    mine = workload.model_copy(update=update)
    runs = [
        run_on_engine(
            models.pipeline_of(group, split),
            models.spec,
            mine,
            split,
            group.stages[0].gpu,
            engine,
        )
        for group in groups
    ]
    rate = sum(run.requests_per_s * group.count for run, group in zip(runs, groups, strict=True))
    if workload.concurrency is not None:  # a replica's share of it was rounded up
        rate *= workload.concurrency / (split.dp * -(-workload.concurrency // split.dp))
    intervals = engine_intervals(engine, models.spec, gpu)
    return steady.model_copy(
        update={
            "ttft_s": estimate(max(run.ttft_s() for run in runs), intervals.prompt),
            "tpot_s": estimate(max(run.tpot_s() for run in runs), intervals.tpot),
            "output_tokens_per_s": estimate(rate * workload.output_tokens, intervals.rate),
        }
    )


def check_split(model: ModelSpec, split: Split, engine: str = "rankwright") -> None:
    """Raise ValueError where `engine` cannot cut `model` by `split`."""
    if split.pp > model.num_layers or sum(split.stage_layers) != model.num_layers:
        raise ValueError(
            f"stage_layers {split.stage_layers} sum to {sum(split.stage_layers)}, "
            f"{model.name} has {model.num_layers} layers"
        )
    reason = cut_is_legal(
        model,
        tp=split.tp,
        ep=split.ep,
        cp=split.cp,
        pp=split.pp,
        attention=split.attention,
        engine=engine,
    )
    if reason is not None:
        raise ValueError(f"{model.name}: {reason}")


def choose_replicas(cluster: Cluster, split: Split) -> tuple[Replicas, ...]:
    """Return where the replicas of `split` go: the fastest slots first.

    Raises:
        ValueError: The cluster has no room for them.
    """
    kinds = find_slots(cluster, split.tp * split.cp)
    left = split.dp
    groups: list[Replicas] = []
    for kind in kinds:
        count = min(left, kind.count // split.pp)
        if count:
            spread = count > replicas_in_nodes(kind, split.pp)
            groups.append(Replicas((kind,) * split.pp, count, spread))
            left -= count
    total = sum(kind.count for kind in kinds)
    if left and split.dp == 1 and total >= split.pp:
        stages = [kind for kind in kinds for _ in range(kind.count)][: split.pp]
        return (Replicas(tuple(stages), 1, True),)
    if left:
        raise ValueError(
            f"{split.label()} takes {split.num_gpus} GPUs in groups of {split.tp * split.cp}; "
            f"{cluster.describe()} has room for {total} such groups, {split.dp * split.pp} needed"
        )
    return tuple(groups)


def predict_replicas(
    models: StageModels,
    workload: Workload,
    split: Split,
    groups: Sequence[Replicas],
    kv_tokens: int | None = None,
) -> Prediction:
    """Return the prediction of `split` with its replicas placed as `groups` say.

    Rates add up over replicas; latencies and memory are of the worst.

    Args:
        models: Of the model, cluster and engine.
        workload: What is asked.
        split: Its `dp` is the number of replicas in `groups`.
        groups: Where they are.
        kv_tokens: Tokens that each rank's cache holds; None: what the requests in flight need.
    """
    batch = split.max_batch_size
    if workload.concurrency is not None:
        batch = min(batch, -(-workload.concurrency // split.dp))
    served: list[tuple[Serving, Pipeline, Replicas]] = []
    for group in groups:
        pipeline = models.pipeline_of(group, split)
        state = serve(pipeline, workload, split.dp, batch, split.chunk_tokens)
        if state is None:
            full = serve_closed(
                pipeline, workload, batch_size=batch, chunk_tokens=split.chunk_tokens
            )
            raise ValueError(
                f"{split.label()} serves {full.requests_per_s * split.dp:.3g} requests/s at batch "
                f"{batch}, fewer than the {workload.request_rate:g} that arrive"
            )
        served.append((state, pipeline, group))
    requests_per_s = sum(state.requests_per_s * group.count for state, _, group in served)
    requests_per_s = cap_requests(requests_per_s, workload, batch * split.dp)
    worst, pipeline, _ = max(served, key=lambda item: item[0].request_s(workload.output_tokens))
    memory = fullest_rank(
        models.spec, split, [group.stages for group in groups], workload, kv_tokens
    )
    intervals = intervals_of(models.engine, pipeline.stages[0].provenance)
    return Prediction(
        ttft_s=_ttft([(state, pipeline) for state, pipeline, _ in served], intervals),
        tpot_s=estimate(max(state.tpot_s for state, _, _ in served), intervals.tpot),
        output_tokens_per_s=estimate(requests_per_s * workload.output_tokens, intervals.rate),
        memory_bytes_per_gpu=estimate(sum(part.bytes for part in memory), MEMORY),
        decode_parts=decode_parts(pipeline, worst),
        prefill_parts=prefill_parts(pipeline, worst),
        memory_parts=memory,
        batch_size=worst.batch_size,
        engine=models.engine,
    )


def serve(
    pipeline: Pipeline, workload: Workload, dp: int, batch_size: int, chunk_tokens: int
) -> Serving | None:
    """Return the steady state of one of `dp` replicas; None where requests outrun it."""
    if workload.request_rate is None:
        return serve_closed(pipeline, workload, batch_size=batch_size, chunk_tokens=chunk_tokens)
    return serve_open(
        pipeline,
        workload,
        requests_per_s=workload.request_rate / dp,
        batch_size=batch_size,
        chunk_tokens=chunk_tokens,
    )


def cap_requests(requests_per_s: float, workload: Workload, slots: int) -> float:
    """Return the requests/s that are really finished: no more than arrive or are in flight."""
    if workload.concurrency is not None and slots > workload.concurrency:
        requests_per_s *= workload.concurrency / slots
    if workload.request_rate is not None:
        requests_per_s = min(requests_per_s, workload.request_rate)
    return requests_per_s


def _ttft(states: Sequence[tuple[Serving, Pipeline]], intervals: Intervals) -> Estimate:
    """Return the TTFT of the slowest of `states`: its prompt and wait have their own intervals."""
    state, pipeline = max(states, key=lambda one: one[0].ttft_s)
    prompt_s, wait_s = state.ttft_s - state.wait_s, state.wait_s
    is_launched = any(part.name == LAUNCHES for part in prefill_parts(pipeline, state))
    factors = LAUNCHED if is_launched else intervals.prompt
    low, high = (
        prompt_s * prompt + wait_s * wait
        for prompt, wait in zip(factors, intervals.wait, strict=True)
    )
    return Estimate(value=state.ttft_s, low=low, high=high)


def decode_parts(pipeline: Pipeline, state: Serving) -> tuple[Part, ...]:
    """Return the terms of the slowest stage's step without prompt tokens."""
    tokens = state.flow.plain if state.flow.plain.decode else state.flow.mixed
    return pipeline.parts(pipeline.slowest_stage(tokens), tokens)


def prefill_parts(pipeline: Pipeline, state: Serving) -> tuple[Part, ...]:
    """Return the terms of the slowest stage's steps that prefill one prompt."""
    tokens = state.flow.mixed
    return pipeline.parts(pipeline.slowest_stage(tokens), tokens, repeat=state.flow.prompt_steps)
