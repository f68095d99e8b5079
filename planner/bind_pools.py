"""Binds a match to GPUs: the plan of each pool, and the prediction of both together."""

from rankwright.cost_model.fullest import fullest_rank
from rankwright.cost_model.intervals import MEMORY, estimate, intervals_of
from rankwright.cost_model.pools import sent_bytes
from rankwright.cost_model.prediction import Prediction
from rankwright.planner.balance import cache_tokens
from rankwright.planner.bind import assemble_plan, kv_cache_of
from rankwright.planner.disaggregated_plan import PoolsPrediction
from rankwright.planner.divide import Division, Home, Machines
from rankwright.planner.matching import Match
from rankwright.planner.placement import Place, bind_ranks
from rankwright.planner.plan import Certificate, Plan
from rankwright.planner.pool_search import PoolSearch
from rankwright.planner.workers import Worker, Workers, replicas_of

Places = list[list[tuple[Place, ...]]]  # of each worker, of each of its stages


def predict_match(pools: PoolSearch, match: Match) -> PoolsPrediction:
    """Return what requests see of `match`, with intervals."""
    load, engine = pools.workload, pools.search.engine
    provenance = pools.decode.pipeline(match.decode).stages[0].provenance
    factors = intervals_of(engine, provenance)
    prompt = estimate(match.prefill.latency_s + match.transfer_s, factors.prompt)
    wait = estimate(match.wait_s, factors.wait)
    per_token = sent_bytes(match.prefill.cache, match.decode.cache)
    interval_s = max(match.prefill.interval_s, match.transfer_s)
    return PoolsPrediction(
        ttft_s=prompt.model_copy(
            update={"value": match.ttft_s, "low": prompt.low + wait.low}
            | {"high": prompt.high + wait.high}
        ),
        tpot_s=estimate(match.tpot_s, factors.tpot),
        output_tokens_per_s=estimate(match.served * load.output_tokens, factors.rate),
        requests_per_s=match.served,
        wait_s=match.wait_s,
        prompt_s=match.prefill.latency_s,
        transfer_s=match.transfer_s,
        transfer_bytes=round(per_token * load.input_tokens),
        prefill_load=min(1.0, match.served * interval_s / match.num_prefill),
        decode_load=match.served * match.decode.interval_s / match.num_decode,
    )


def pool_plans(
    pools: PoolSearch, match: Match, speed: PoolsPrediction, certificate: Certificate
) -> tuple[Plan, Plan]:
    """Return the plan of each pool, on GPUs of their own."""
    divisions = pools.machines.divisions(match.prefill.home, match.decode.home)
    division = next(
        one
        for one in divisions
        if one.prefill >= match.num_prefill and one.decode >= match.num_decode
    )
    first, second = _place(pools.machines, match, division)
    return (
        _pool_plan(pools, pools.prefill, match.prefill, first, speed, certificate),
        _pool_plan(pools, pools.decode, match.decode, second, speed, certificate),
    )


def _pool_plan(
    pools: PoolSearch,
    workers: Workers,
    worker: Worker,
    places: Places,
    speed: PoolsPrediction,
    certificate: Certificate,
) -> Plan:
    """Return one pool as a plan: its speed is that of both, its memory its own."""
    search, split = workers.search, worker.split(len(places))
    evaluator, model = search.evaluator, search.model
    tokens, repeat = workers.step(worker)
    costs = workers.costs(worker.shape, worker.home, worker.batch_size, worker.chunk_tokens, tokens)
    layer_bytes = evaluator.memory.layer_bytes(worker.shape)
    room_tokens = cache_tokens(costs, worker.stage_layers, *layer_bytes)
    cache = kv_cache_of(evaluator, split.cp, room_tokens)
    stages = [replicas_of(worker, len(places)).stages]
    memory = fullest_rank(model, split, stages, search.workload, cache.num_tokens)
    pipeline, is_prefill = workers.pipeline(worker), worker.role == "prefill"
    parts = pipeline.parts(
        pipeline.slowest_stage(tokens), tokens, repeat=repeat if is_prefill else 1
    )
    return assemble_plan(
        search,
        search.cluster,
        pools.workload,
        split,
        bind_ranks(model, split, places),
        cache,
        batch_size=worker.batch_size,
        chunk_tokens=worker.chunk_tokens,
        prediction=Prediction(
            ttft_s=speed.ttft_s,
            tpot_s=speed.tpot_s,
            output_tokens_per_s=speed.output_tokens_per_s,
            memory_bytes_per_gpu=estimate(sum(part.bytes for part in memory), MEMORY),
            decode_parts=() if is_prefill else parts,
            prefill_parts=parts if is_prefill else (),
            memory_parts=memory,
            batch_size=worker.batch_size,
            engine=search.engine,
        ),
        certificate=certificate,
        assumptions=(
            f"one of two pools, for {worker.role}: speed is that of both, memory its own",
        ),
    )


def _place(machines: Machines, match: Match, division: Division) -> tuple[Places, Places]:
    """Return where the workers of both pools are.

    Machines with most workers of prefill come first. What prefill leaves of a machine is cut for
    decode; machines without prefill are taken before those with.
    """
    spots: list[tuple[int, int, int]] = []  # kind, machine, workers of prefill planned for it
    used: dict[int, int] = {}
    for share in division.shares:
        first = used.get(share.kind, 0)
        used[share.kind] = first + share.count
        indices = [index for run in machines.kinds[share.kind][1] for index in run]
        for index in indices[first : first + share.count]:
            spots.append((share.kind, index, share.prefill))
    taken: dict[int, frozenset[int]] = {}
    prefill = _Filler(match.prefill.home, match.num_prefill)
    for kind, machine, planned in spots:
        for gpus in machines.workers(kind, match.prefill.home)[:planned]:
            if prefill.add(machine, gpus):
                taken[machine] = taken.get(machine, frozenset()) | frozenset(gpus)
    decode = _Filler(match.decode.home, match.num_decode)
    for kind, machine, _ in sorted(spots, key=lambda spot: spot[1] in taken):
        gone = taken.get(machine, frozenset[int]())
        for gpus in machines.workers(kind, match.decode.home, gone):
            decode.add(machine, gpus)
    return prefill.places(), decode.places()


class _Filler:
    """Collects the places of one pool's workers, until there are enough."""

    def __init__(self, home: Home, count: int) -> None:
        self._home = home
        self._parts_each = max(1, home.machines)
        self._most = count * self._parts_each
        self._parts: list[tuple[Place, ...]] = []

    def add(self, machine: int, gpus: tuple[int, ...]) -> bool:
        """Take these GPUs of a machine, if more are wanted."""
        if len(self._parts) == self._most:
            return False
        self._parts.append(tuple((machine, gpu) for gpu in gpus))
        return True

    def places(self) -> Places:
        """Return the places of each worker by stage."""
        assert len(self._parts) == self._most, "a division has room for all workers"
        size, workers = self._home.stage_gpus, list[list[tuple[Place, ...]]]()
        for first in range(0, self._most, self._parts_each):
            flat = [
                place for part in self._parts[first : first + self._parts_each] for place in part
            ]
            workers.append([tuple(flat[i : i + size]) for i in range(0, len(flat), size)])
        return workers
