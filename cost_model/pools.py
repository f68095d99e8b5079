"""Separate pools for prefill and decoding: how many workers of each, and what requests see.

A prefill worker computes one prompt after another and hands its KV cache on; a decode worker then
steps without prompts in between. The pools are matched when neither has to wait for the other; with
whole workers one of them does, and sets the rate. A model only: our executor does not run pools.
"""

from dataclasses import dataclass
from math import ceil

from rankwright.cost_model.collectives import Group, find_group
from rankwright.cost_model.intervals import estimate, intervals_of
from rankwright.cost_model.memory import stage_kv_bytes_per_token
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels, check_split, choose_replicas
from rankwright.cost_model.prediction import Estimate
from rankwright.cost_model.serving import micro_batches_of, prompt_tokens
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Cluster

# A queue before the prefill pool is kept below this load, past which waits grow without bound.
_MOST_LOAD = 0.9
# Between nodes: the share of a port that a large transfer reaches (64 MiB over one 400 Gb/s port
# between two DGX H100: 36 of 50 GB/s); inside one, of the link (0.70, NCCL send and receive).
_NETWORK_SHARE, _LINK_SHARE = 0.72, 0.70


@dataclass(frozen=True, slots=True)
class Pools:
    """How many workers of each kind, and what they do together.

    Args:
        prefill_workers: Replicas that compute prompts.
        decode_workers: Replicas that decode.
        num_gpus: Of both.
        requests_per_s: That both keep up with.
        bound: Which pool sets that rate.
        ttft_s: A prompt's wait, its computation, and its cache on the way.
        tpot_s: Of a decode worker at its batch.
        transfer_s: What of TTFT is the cache on the way.
        output_tokens_per_s: Over all workers.
    """

    prefill_workers: int
    decode_workers: int
    num_gpus: int
    requests_per_s: float
    bound: str
    ttft_s: Estimate
    tpot_s: Estimate
    transfer_s: float
    output_tokens_per_s: Estimate


def predict_pools(
    model: ModelSpec,
    cluster: Cluster,
    workload: Workload,
    prefill: Split,
    decode: Split,
    *,
    num_gpus: int | None = None,
    engine: str = "rankwright",
) -> Pools:
    """Return the best match of prefill and decode workers of these splits.

    Args:
        model: What runs.
        cluster: Where.
        workload: Lengths; its rate, where it has one, caps what is served.
        prefill: Cut of a prefill worker; `dp` is not looked at.
        decode: Cut of a decode worker, with its `max_batch_size`.
        num_gpus: To use at most; None: all of the cluster.
        engine: Whose efficiency to assume.

    Raises:
        ValueError: A split is not legal, or one worker of each takes more GPUs than there are.
    """
    models = StageModels(model, cluster, engine)
    first, second = (_one_worker(models, split, engine) for split in (prefill, decode))
    tokens = _prompt_step(workload, prefill)
    steps = ceil(prompt_tokens(workload) / prefill.chunk_tokens)
    prompt_s = first.prompt_s(tokens, steps)
    prefill_rate = 1 / (prompt_s - (len(first.stages) > 1) * _drain_s(first, tokens))
    micro_batches = micro_batches_of(decode.pp, decode.max_batch_size)
    context = workload.input_tokens + workload.output_tokens / 2
    in_step = decode.max_batch_size / micro_batches
    tpot_s = second.round_s(StepTokens(in_step, context), micro_batches)
    decode_rate = decode.max_batch_size / (max(1, workload.output_tokens - 1) * tpot_s)
    available = cluster.num_gpus if num_gpus is None else num_gpus
    x, y = match_pools(
        prefill_rate * _MOST_LOAD,
        decode_rate,
        prefill.gpus_per_replica,
        decode.gpus_per_replica,
        available,
    )
    served = min(x * prefill_rate * _MOST_LOAD, y * decode_rate)
    if workload.request_rate is not None:
        served = min(served, workload.request_rate)
    load = served / (x * prefill_rate)
    # M/D/x after Allen and Cunneen, with Sakasegawa's M/M/x: half of it for equal services.
    wait_s = 0.5 * load ** ((2 * (x + 1)) ** 0.5 - 1) / (x * (1 - load)) * prompt_s
    transfer_s = transfer_seconds(model, cluster, workload, prefill, decode)
    factors = intervals_of(engine, first.stages[0].provenance)
    return Pools(
        prefill_workers=x,
        decode_workers=y,
        num_gpus=x * prefill.gpus_per_replica + y * decode.gpus_per_replica,
        requests_per_s=served,
        bound="prefill" if x * prefill_rate * _MOST_LOAD < y * decode_rate else "decode",
        ttft_s=estimate(wait_s + prompt_s + transfer_s, factors.prompt),
        tpot_s=estimate(tpot_s, factors.tpot),
        transfer_s=transfer_s,
        output_tokens_per_s=estimate(served * workload.output_tokens, factors.rate),
    )


def match_pools(
    prefill_per_s: float, decode_per_s: float, prefill_gpus: int, decode_gpus: int, num_gpus: int
) -> tuple[int, int]:
    """Return the workers of each pool that serve most, and among those the fewest GPUs.

    >>> match_pools(4.0, 1.0, 1, 2, 8)  # one prefill worker feeds three decode workers
    (1, 3)

    Raises:
        ValueError: There is no room for one worker of each.
    """
    if prefill_gpus + decode_gpus > num_gpus:
        raise ValueError(
            f"a prefill worker of {prefill_gpus} GPUs and a decode worker of {decode_gpus} need "
            f"{prefill_gpus + decode_gpus}; there are {num_gpus}"
        )
    choices = [
        (x, y)
        for x in range(1, (num_gpus - decode_gpus) // prefill_gpus + 1)
        for y in range(1, (num_gpus - x * prefill_gpus) // decode_gpus + 1)
    ]
    return max(
        choices,
        key=lambda pair: (
            min(pair[0] * prefill_per_s, pair[1] * decode_per_s),
            -(pair[0] * prefill_gpus + pair[1] * decode_gpus),
        ),
    )


def transfer_seconds(
    model: ModelSpec, cluster: Cluster, workload: Workload, prefill: Split, decode: Split
) -> float:
    """Return the seconds in which one prompt's KV cache reaches its decode worker.

    Every rank of the worker with fewer ranks sends or receives its part at once, over the fabric
    where the cluster has several nodes, else over the slowest link between its GPUs.
    """
    cut = prefill if prefill.tp >= decode.tp else decode
    per_rank = max(stage_kv_bytes_per_token(model, cut, stage=stage) for stage in range(cut.pp))
    size = per_rank * workload.input_tokens * cut.tp / min(prefill.tp, decode.tp)
    gpus = [
        (node, gpu.index) for node in range(cluster.num_nodes) for gpu in cluster.node(node).gpus
    ]
    if len(gpus) < 2:
        return 0.0
    group: Group = find_group(cluster, (gpus[0], gpus[-1]))
    if group.num_nodes > 1:
        return group.network_latency_s + size / (group.network_bytes_per_s * _NETWORK_SHARE)
    return group.latency_s + size / (group.bytes_per_s * _LINK_SHARE)


def _one_worker(models: StageModels, split: Split, engine: str) -> Pipeline:
    check_split(models.spec, split, engine)
    alone = split.model_copy(update={"dp": 1})
    group = choose_replicas(models.cluster, alone)[0]
    return models.pipeline(group, split.stage_layers, split.ep, split.attention, split.cp)


def _prompt_step(workload: Workload, split: Split) -> StepTokens:
    """Return one of the equal chunks of a prompt."""
    new = prompt_tokens(workload)
    steps = ceil(new / split.chunk_tokens)
    context = workload.input_tokens - new / 2
    return StepTokens(prefill=new / steps, prefill_context=context, prompts=1 / steps)


def _drain_s(pipeline: Pipeline, tokens: StepTokens) -> float:
    """Return how long the first stage is free before a prompt leaves the last."""
    busy = [pipeline.stage_s(stage, tokens) for stage in range(len(pipeline.stages))]
    return sum(busy) - max(busy)
