"""Small planning problems at random, and their best plan by trying everything.

What the planner decides is enumerated here afresh: degrees, the kinds of slot under the stages,
every cut of the layers into stages, batches and chunks, numbers of replicas. Shared with the
planner are only the inputs of its decision: the cost model, which slots a cluster has, which cuts
are legal, and the levels of batch and chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement, product
from math import ceil
from random import Random

from rankwright.cost_model.layout import SlotKind, find_slots, replicas_in_nodes
from rankwright.cost_model.legality import cut_is_legal, has_experts
from rankwright.cost_model.memory import rank_memory
from rankwright.cost_model.model_spec import Attention, FeedForward, Layer, LayerRun, ModelSpec
from rankwright.cost_model.predict import Replicas, cached_tokens
from rankwright.cost_model.serving import Serving, serve_closed
from rankwright.cost_model.split import Split
from rankwright.cost_model.workload import Workload
from rankwright.planner.candidates import Evaluator
from rankwright.planner.ilp import burn_per_s
from rankwright.planner.search import Search
from rankwright.planner.shapes import LONG_REQUEST_TOKENS, Shape
from rankwright.topology.cluster import Cluster, Link
from rankwright.topology.shorthand import parse_cluster

CLUSTERS = (
    *("1xl4", "2xrtx4090", "3xl40s", "4xa100-pcie", "5xl40s", "6xh100-sxm", "7xl4", "8xh100-sxm"),
    *("1xl40s+1xl4", "2xl40s+1xl4", "2xrtx4090+2xrtx3090", "3xl4+1xa100-pcie", "2xl4+3xl40s"),
    *("2x2xh100-sxm+ib400", "2x1xl40s+eth25", "2x3xa100-sxm+ib200", "1x4xh100-sxm+1x2xl40s+ib100"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One problem."""

    model: ModelSpec
    cluster: Cluster
    workload: Workload
    memory_budget_bytes: int | None

    def search(self) -> Search:
        """Return the planner's search of it."""
        return Search(self.model, self.cluster, self.workload, self.memory_budget_bytes)

    def describe(self) -> str:
        """Return the problem in one line."""
        load = self.workload
        limits = [
            f"{name} {limit * 1e3:.3g} ms"
            for name, limit in (("TTFT", load.ttft_limit_s), ("TPOT", load.tpot_limit_s))
            if limit is not None
        ]
        budget = self.memory_budget_bytes
        words = [
            f"{self.model.num_layers} layers of {self.model.name} on {self.cluster.describe()}",
            f"{load.input_tokens}+{load.output_tokens} tokens, concurrency {load.concurrency}",
            load.objective,
            *limits,
            "" if budget is None else f"{budget / 1e9:g} GB a GPU",
        ]
        return ", ".join(word for word in words if word)


def random_case(seed: int) -> Case:
    """Return the problem of number `seed`."""
    rng = Random(seed)
    cluster = _unequal_islands(rng, parse_cluster(rng.choice(CLUSTERS)))
    objective = rng.choice(("throughput", "throughput", "latency", "cost", "energy"))
    return Case(
        _random_model(rng, 12 if cluster.num_gpus <= 4 else 8),
        cluster,
        Workload(
            input_tokens=rng.choice((16, 200, 1000, 3000)),
            output_tokens=rng.choice((2, 30, 300)),
            concurrency=rng.choice((None, 1, 3, 8, 40)),
            ttft_limit_s=rng.choice((None, None, None, 0.05, 0.5)),
            tpot_limit_s=rng.choice((None, None, None, 0.004, 0.03)),
            objective=objective,  # type: ignore[arg-type]
        ),
        rng.choice((None, None, 4, 8, 16)) and rng.choice((4, 6, 10, 16)) * 10**9,
    )


def _unequal_islands(rng: Random, cluster: Cluster) -> Cluster:
    """Return `cluster`, at times with NVLink between the first few GPUs of its first machine."""
    node = cluster.nodes[0]
    if len(node.gpus) < 3 or rng.random() < 0.5:
        return cluster
    joined = rng.randint(2, len(node.gpus) - 1)
    links = tuple(
        Link(a=link.a, b=link.b, kind="NV4", bytes_per_s=1e11, latency_s=1e-6)
        if max(link.a, link.b) < joined
        else Link(a=link.a, b=link.b, kind="SYS", bytes_per_s=1.6e10, latency_s=2e-6)
        for link in node.links
    )
    nodes = (node.model_copy(update={"links": links}), *cluster.nodes[1:])
    return cluster.model_copy(update={"nodes": nodes})


def _random_model(rng: Random, most_layers: int) -> ModelSpec:
    num_layers = rng.randint(1, most_layers)
    kv_heads, group = rng.choice(((1, 8), (2, 4), (3, 3), (4, 2), (8, 4)))
    attention = Attention(
        kind="gqa",
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=128,
        value_head_dim=128,
    )
    width = rng.choice((2048, 8192, 28672))
    dense = Layer(
        attention=attention, feed_forward=FeedForward(kind="dense", intermediate_size=width)
    )
    experts = FeedForward(
        kind="moe",
        intermediate_size=width // 4,
        num_experts=rng.choice((4, 6, 8)),
        experts_per_token=2,
        shared_intermediate_size=rng.choice((0, 1024)),
    )
    moe = Layer(attention=attention, feed_forward=experts)
    first = {"dense": num_layers, "moe": 0, "both": rng.randint(0, num_layers)}[
        rng.choice(("dense", "moe", "both"))
    ]
    runs = [LayerRun(count=first, layer=dense)] if first else []
    runs += [LayerRun(count=num_layers - first, layer=moe)] if first < num_layers else []
    return ModelSpec(
        name="a random model",
        family="llama",
        architecture="LlamaForCausalLM",
        hidden_size=rng.choice((1024, 4096, 8192)),
        vocab_size=rng.choice((32_000, 128_256)),
        layer_runs=tuple(runs),
        tie_embeddings=rng.random() < 0.3,
        max_context_tokens=100_000,
    )


# Kinds of slot of the stages, how many such replicas fit, whether they leave machines.
Place = tuple[tuple[SlotKind, ...], int, bool]


def exhaustive(case: Case) -> float | None:
    """Return the best objective of all plans; None where none keeps memory and limits."""
    values = [value for value in _values(case) if value is not None]
    if not values:
        return None
    return min(values) if case.workload.objective == "latency" else max(values)


def _values(case: Case) -> Iterator[float | None]:
    evaluator = case.search().evaluator
    for shape in _all_shapes(case):
        places = list(_places(shape))
        for batch_size in evaluator.batch_levels(shape):
            for chunk in evaluator.chunk_levels(batch_size, shape.pp):
                for layers in compositions(case.model.num_layers, shape.pp):
                    yield from _values_of(case, evaluator, shape, places, batch_size, chunk, layers)


def _values_of(
    case: Case,
    evaluator: Evaluator,
    shape: Shape,
    places: list[Place],
    batch_size: int,
    chunk: int,
    layers: tuple[int, ...],
) -> Iterator[float | None]:
    """Yield the objective of every number of replicas on each of `places`, cut alike."""
    able: list[tuple[tuple[SlotKind, ...], int, Serving]] = []
    for stages, room, spread in places:
        if _fits(case, evaluator, shape, stages, batch_size, chunk, layers):
            pipeline = evaluator.pipeline(Replicas(stages, room, spread), layers, shape)
            state = serve_closed(pipeline, case.workload, batch_size=batch_size, chunk_tokens=chunk)
            able.append((stages, room, state))
            for count in range(1, room + 1):
                yield _value(case, shape, [(stages, state, count)])
    # Replicas on one kind of slot each, of several kinds.
    alike = [one for one in able if len(set(map(id, one[0]))) == 1]
    kinds = {id(stages[0]) for stages, _, _ in alike}
    for size in range(2, len(kinds) + 1):
        for chosen in combinations(alike, size):
            if len({id(stages[0]) for stages, _, _ in chosen}) < size:
                continue  # inside machines and spread over them are the same slots
            for counts in product(*(range(1, room + 1) for _, room, _ in chosen)):
                yield _value(
                    case,
                    shape,
                    [
                        (stages, state, count)
                        for (stages, _, state), count in zip(chosen, counts, strict=True)
                    ],
                )


def _all_shapes(case: Case) -> Iterator[Shape]:
    most = case.cluster.num_gpus
    load = case.workload
    is_long = load.input_tokens + load.output_tokens >= LONG_REQUEST_TOKENS
    splits = ("tp", "dp") if has_experts(case.model) else ("tp",)
    for tp, pp, cp in product(range(1, most + 1), repeat=3):
        if cp & (cp - 1) or (cp > 1 and not is_long):
            continue
        if tp * pp * cp > most or pp > case.model.num_layers:
            continue
        for ep, attention in product(range(1, tp + 1), splits):
            if cut_is_legal(case.model, tp=tp, ep=ep, cp=cp, attention=attention) is None:  # type: ignore[arg-type]
                kinds = find_slots(case.cluster, tp * cp)
                if sum(kind.count for kind in kinds) < pp:
                    continue
                yield Shape(tp, pp, ep, kinds, cp, attention)  # type: ignore[arg-type]


def _places(shape: Shape) -> Iterator[Place]:
    """Yield the kinds of slot of a replica's stages, and how many such replicas there is room for.

    Stages on several kinds are in the order of the kinds, fastest first.
    """
    for chosen in combinations_with_replacement(range(len(shape.kinds)), shape.pp):
        stages = tuple(shape.kinds[index] for index in chosen)
        if len(set(chosen)) == 1:
            inside = replicas_in_nodes(stages[0], shape.pp)
            spread = stages[0].count // shape.pp
            if inside:
                yield stages, inside, False
            if spread > inside:
                yield stages, spread, True
        else:
            room = min(shape.kinds[index].count // chosen.count(index) for index in set(chosen))
            if room:
                yield stages, room, True


@cache
def compositions(total: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Return every way to write `total` as `parts` numbers of 1 or more.

    >>> compositions(4, 2)
    ((1, 3), (2, 2), (3, 1))
    """
    return tuple(
        tuple(b - a for a, b in zip((0, *inner), (*inner, total), strict=True))
        for inner in combinations(range(1, total), parts - 1)
    )


def _fits(
    case: Case,
    evaluator: Evaluator,
    shape: Shape,
    stages: tuple[SlotKind, ...],
    batch_size: int,
    chunk: int,
    layers: tuple[int, ...],
) -> bool:
    split = Split(
        tp=shape.tp,
        pp=shape.pp,
        ep=shape.ep,
        cp=shape.cp,
        attention=shape.attention,
        stage_layers=layers,
    )
    load = case.workload
    block = evaluator.block_tokens(shape.cp)
    tokens = ceil(ceil((load.input_tokens + load.output_tokens) / shape.cp) / block) * block
    kv_tokens = cached_tokens(batch_size, tokens, split.model_copy(update={"cp": 1}))
    return all(
        sum(
            part.bytes
            for part in rank_memory(
                case.model,
                split,
                stage=stage,
                kv_tokens=kv_tokens,
                max_batched_tokens=max(chunk, batch_size),
                max_num_seqs=batch_size,
            )
        )
        <= evaluator.memory.budget_bytes(kind.gpu)
        for stage, kind in enumerate(stages)
    )


def _value(
    case: Case, shape: Shape, used: list[tuple[tuple[SlotKind, ...], Serving, int]]
) -> float | None:
    """Return the objective of so many replicas on each place, None where they break a limit."""
    load = case.workload
    in_flight, tokens = load.concurrency, load.output_tokens
    batch_size = used[0][1].batch_size
    number = sum(count for _, _, count in used)
    for _, state, _ in used:
        if load.ttft_limit_s is not None and state.ttft_at_s(load.percentile) > load.ttft_limit_s:
            return None
        if load.tpot_limit_s is not None and state.tpot_s > load.tpot_limit_s:
            return None
    if in_flight is not None and (batch_size - 1) * number > in_flight - 1:
        return None
    if load.objective == "latency":
        if in_flight is not None and batch_size * number < in_flight:
            return None
        return max(state.request_s(tokens) for _, state, _ in used)
    if load.objective == "throughput":
        served = sum(state.requests_per_s * count for _, state, count in used)
        if in_flight is not None:
            fastest = max(state.requests_per_s for _, state, _ in used)
            served = min(served, in_flight / batch_size * fastest)
        return served * tokens
    return max(
        state.requests_per_s
        * tokens
        / sum(shape.gpus_per_stage * burn_per_s(kind.gpu, load.objective) for kind in stages)
        for stages, state, _ in used
    )
