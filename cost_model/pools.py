"""Separate pools for prefill and decoding: how fast the workers of each are, and how they match.

A prefill worker computes one prompt after another and hands its KV cache on; a decode worker then
steps without prompts in between. The pools are matched when neither has to wait for the other; with
whole workers one of them does, and sets the rate. `planner/disaggregate.py` searches the splits of
both; `predict_pools` matches two that are given. Our executor does not run pools: other engines do.
"""

from dataclasses import dataclass
from itertools import combinations
from math import ceil, inf, sqrt

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
MOST_LOAD = 0.9
# Between nodes: the share of a port that a large transfer reaches (64 MiB over one 400 Gb/s port
# between two DGX H100: 36 of 50 GB/s); inside one, of the link (0.70, NCCL send and receive).
_NETWORK_SHARE, _LINK_SHARE = 0.72, 0.70
# Machines of so many GPUs have every pair of them looked at for the slowest path.
_EVERY_PAIR = 16


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
    transfer_s = transfer_seconds(model, cluster, workload, prefill, decode)
    prompt_s, interval_s = prompt_seconds(first, workload, prefill.chunk_tokens)
    interval_s = max(interval_s, transfer_s)  # a worker sends one cache after another
    tpot_s = decode_seconds(second, workload, decode.max_batch_size)
    decode_rate = decode_requests_per_s(workload, decode.max_batch_size, tpot_s)
    available = cluster.num_gpus if num_gpus is None else num_gpus
    x, y = match_pools(
        MOST_LOAD / interval_s,
        decode_rate,
        prefill.gpus_per_replica,
        decode.gpus_per_replica,
        available,
    )
    served = min(x * MOST_LOAD / interval_s, y * decode_rate)
    if workload.request_rate is not None:
        served = min(served, workload.request_rate)
    wait_s = queue_wait_s(x, served * interval_s / x, interval_s)
    factors = intervals_of(engine, first.stages[0].provenance)
    return Pools(
        prefill_workers=x,
        decode_workers=y,
        num_gpus=x * prefill.gpus_per_replica + y * decode.gpus_per_replica,
        requests_per_s=served,
        bound="prefill" if x * MOST_LOAD / interval_s < y * decode_rate else "decode",
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


def prompt_step(workload: Workload, chunk_tokens: int) -> tuple[StepTokens, int]:
    """Return one of the equal chunks of a prompt, and how many there are."""
    new = prompt_tokens(workload)
    steps = ceil(new / chunk_tokens)
    context = workload.input_tokens - new / 2
    return StepTokens(prefill=new / steps, prefill_context=context, prompts=1 / steps), steps


def decode_step(workload: Workload, pp: int, batch_size: int) -> tuple[StepTokens, int]:
    """Return a step of one micro-batch of `batch_size` requests, and how many are in flight."""
    micro_batches = micro_batches_of(pp, batch_size)
    context = workload.input_tokens + workload.output_tokens / 2
    return StepTokens(ceil(batch_size / micro_batches), context), micro_batches


def prompt_seconds(
    pipeline: Pipeline, workload: Workload, chunk_tokens: int
) -> tuple[float, float]:
    """Return the seconds of one prompt, and those between two where they follow each other.

    The second is shorter where there are several stages: the first one is free for the next prompt
    before the last one is done.
    """
    tokens, steps = prompt_step(workload, chunk_tokens)
    prompt_s = pipeline.prompt_s(tokens, steps)
    if len(pipeline.stages) == 1:
        return prompt_s, prompt_s
    busy = [pipeline.stage_s(stage, tokens) for stage in range(len(pipeline.stages))]
    return prompt_s, prompt_s - (sum(busy) - max(busy))


def decode_seconds(pipeline: Pipeline, workload: Workload, batch_size: int) -> float:
    """Return the seconds from one token of a request to its next, with `batch_size` requests."""
    tokens, micro_batches = decode_step(workload, len(pipeline.stages), batch_size)
    return pipeline.round_s(tokens, micro_batches)


def decode_requests_per_s(workload: Workload, batch_size: int, tpot_s: float) -> float:
    """Return the requests/s that a decode worker finishes: its first token came with the prompt."""
    return batch_size / (max(1, workload.output_tokens - 1) * tpot_s)


def queue_wait_s(workers: int, load: float, interval_s: float) -> float:
    """Return the mean wait before `workers` workers that are busy for the part `load` of the time.

    M/D/x after Allen and Cunneen, with Sakasegawa's M/M/x: half of it for equal services.

    >>> round(queue_wait_s(1, 0.9, 1.0), 3), round(queue_wait_s(8, 0.9, 1.0), 3)
    (4.5, 0.444)
    """
    if load >= 1:
        return inf
    waiting: float = load ** (sqrt(2 * (workers + 1)) - 1)
    return 0.5 * waiting / (workers * (1 - load)) * interval_s


def transfer_seconds(
    model: ModelSpec, cluster: Cluster, workload: Workload, prefill: Split, decode: Split
) -> float:
    """Return the seconds in which one prompt's KV cache reaches its decode worker.

    All ranks of both workers send or receive at once, over the slowest path that there is between
    two GPUs of the cluster: the network where it has several machines.
    """
    num_bytes = sent_bytes(rank_cache(model, prefill), rank_cache(model, decode))
    return path_seconds(slowest_path(cluster), num_bytes * workload.input_tokens)


@dataclass(frozen=True, slots=True)
class RankCache:
    """KV bytes that a worker holds of one token of a request.

    Args:
        rank_bytes: On the rank that holds most.
        all_bytes: On all of its ranks; what several hold counts as often.
    """

    rank_bytes: float
    all_bytes: float


def rank_cache(model: ModelSpec, split: Split) -> RankCache:
    """Return what the ranks of a worker hold of a token, on average over the context group.

    With data-parallel attention one rank of a stage has all of a request.
    """
    stages = [stage_kv_bytes_per_token(model, split, stage=stage) for stage in range(split.pp)]
    holders = 1 if split.attention == "dp" else split.tp
    return RankCache(max(stages) / split.cp, sum(stages) * holders)


def sent_bytes(prefill: RankCache, decode: RankCache) -> float:
    """Return the bytes of a token that pass the busiest GPU on the way from worker to worker.

    What several decode ranks hold is sent to each, by senders that share the work evenly.

    >>> sent_bytes(RankCache(8, 8), RankCache(2, 16))  # one sender, eight receivers of two heads
    16.0
    """
    copies = max(1.0, decode.all_bytes / prefill.all_bytes)
    return max(prefill.rank_bytes * copies, decode.rank_bytes)


def slowest_path(cluster: Cluster) -> Group | None:
    """Return the slowest path between two GPUs of the cluster; None where there is one GPU."""
    if cluster.num_nodes > 1:
        first, places = 0, list[tuple[int, int]]()
        for node in cluster.nodes:
            gpus = [gpu.index for gpu in node.gpus]
            some = {0, min(1, node.count - 1), node.count - 1}  # the last is furthest in a network
            places += [(first + index, gpus[0]) for index in sorted(some) if gpus]
            first += node.count
        if len(places) > 1:
            return find_group(cluster, tuple(places))
    if cluster.num_gpus < 2:
        return None
    found: list[Group] = []
    first = 0
    for node in cluster.nodes:
        gpus = [gpu.index for gpu in node.gpus]
        near = gpus if len(gpus) <= _EVERY_PAIR else gpus[:1] + gpus[-1:]
        found += [find_group(cluster, ((first, a), (first, b))) for a, b in combinations(near, 2)]
        first += node.count
    return min(found, key=lambda group: (group.bytes_per_s, -group.latency_s))


def path_seconds(path: Group | None, num_bytes: float) -> float:
    """Return the seconds of `num_bytes` over `path`; None is no way at all, and takes no time."""
    if path is None:
        return 0.0
    if path.num_nodes > 1:
        return path.network_latency_s + num_bytes / (path.ring_bytes_per_s * _NETWORK_SHARE)
    return path.latency_s + num_bytes / (path.bytes_per_s * _LINK_SHARE)


def _one_worker(models: StageModels, split: Split, engine: str) -> Pipeline:
    check_split(models.spec, split, engine)
    alone = split.model_copy(update={"dp": 1})
    group = choose_replicas(models.cluster, alone)[0]
    return models.pipeline_of(group, split)
