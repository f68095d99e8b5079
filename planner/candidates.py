"""Evaluates every legal shape at every batch level: the columns of the integer program.

A candidate that breaks a limit is kept with what it breaks, because it is the evidence for what
binds: what would be better if only that limit were wider.
"""

from collections.abc import Iterator, Sequence
from math import ceil

from rankwright.cost_model.efficiency import device_class
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import Replicas, StageModels
from rankwright.cost_model.serving import (
    Serving,
    micro_batches_of,
    prompt_tokens,
    serve_closed,
    serve_open,
)
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.workload import Workload
from rankwright.planner.balance import StageCosts
from rankwright.planner.cache_blocks import CacheBlocks
from rankwright.planner.candidate import Candidate, Constraint
from rankwright.planner.cuts import Cut, Cutter
from rankwright.planner.homes import Home, find_home
from rankwright.planner.memory_table import MemoryTable
from rankwright.planner.pools import Pool, find_pools
from rankwright.planner.shapes import Pins, Shape
from rankwright.planner.unlike_slots import UnlikeSlots
from rankwright.topology.cluster import Cluster

# Sequences of a scheduler: the default of vLLM on data-centre GPUs (arg_utils.py). Ranks with
# sequences of their own (attention DP) have one each, there as in SGLang and TensorRT-LLM.
MAX_BATCH = 1024
MAX_BATCH_CPU = 32  # a few cores are busy long before
CHUNK_LEVELS: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
# Replica counts tried under a request rate, where the wait depends on them.
_REPLICA_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)


def most_sequences(shape: Shape) -> int:
    """Return how many sequences a replica on GPUs has at most.

    >>> most_sequences(Shape(8, 2, 1, ())), most_sequences(Shape(8, 2, 8, (), attention="dp"))
    (1024, 8192)
    """
    return MAX_BATCH * (shape.tp if shape.attention == "dp" else 1)


class Evaluator:
    """Evaluates shapes of one model on one cluster under one workload."""

    def __init__(
        self,
        model: ModelSpec,
        cluster: Cluster,
        workload: Workload,
        *,
        memory_budget_bytes: int | None = None,
        pins: Pins | None = None,
        engine: str = "rankwright",
        every_level: bool = False,
        num_sharing: int = 1,
    ) -> None:
        """Prepare.

        Args:
            model: What runs.
            cluster: Where.
            workload: What is asked.
            memory_budget_bytes: Bytes of each GPU that may be used; None: what is free.
            pins: `dp` is looked at here, the other degrees are `find_shapes`'s.
            engine: Whose efficiency constants to use.
            every_level: Whether to look at small batches too where large ones are asked for.
            num_sharing: Unlike replicas, at most, that the requests in flight may be shared by:
                batches that are a part of them are looked at too.
        """
        self.model = model
        self._every_level = every_level
        self._num_sharing = num_sharing
        self.workload = workload
        self.models = StageModels(model, cluster, engine)
        self.memory = MemoryTable(model, memory_budget_bytes)
        self._unlike = UnlikeSlots(self.models, self.memory, workload)
        self._dp = pins.dp if pins else None
        self.is_cpu = all(device_class(gpu) == "cpu" for node in cluster.nodes for gpu in node.gpus)
        self._blocks = CacheBlocks(workload, self.is_cpu)
        self._cutter = Cutter(self.models, self.memory, workload, self._blocks)

    def candidates(self, shape: Shape) -> Iterator[Candidate]:
        """Yield `shape` at every batch level, chunk and pool."""
        levels = self.batch_levels(shape)
        known: dict[tuple[object, ...], list[Cut]] = {}  # pools inside machines and over them
        for pool in find_pools(shape):
            alike = None if self._unlike.is_in(shape, pool) else self._home(shape, pool)
            pipelines: dict[tuple[object, ...], list[Pipeline]] = {}
            for batch_size in levels:
                fits = False
                for chunk in self.chunk_levels(batch_size, shape.pp):
                    homes = (
                        [(pool, alike)] if alike else self._dealt(shape, pool, batch_size, chunk)
                    )
                    cuts: list[tuple[Pool, Home, Cut]] = []
                    for dealt, home in homes:
                        key = (home.kinds, batch_size, chunk)
                        if key not in known:
                            known[key] = self._cutter.cuts(home, batch_size, chunk)
                        cuts += [(dealt, home, cut) for cut in known[key]]
                    able = [one for one in cuts if one[2].fits]
                    for dealt, home, cut in able or cuts:
                        way = (home.kinds, cut.layers)
                        if way not in pipelines:
                            pipelines[way] = [
                                self.pipeline(group, cut.layers, shape) for group in dealt.replicas
                            ]
                        serve = pipelines[way]
                        yield from self._evaluate(shape, dealt, batch_size, chunk, cut, serve)
                    if not able:
                        break  # stays as evidence; larger chunks fit no better
                    fits = True
                if not fits:
                    break  # likewise larger batches

    def _home(self, shape: Shape, pool: Pool) -> Home:
        return find_home(shape, pool, self.models, self.memory, self._unlike)

    def _dealt(
        self, shape: Shape, pool: Pool, batch_size: int, chunk: int
    ) -> list[tuple[Pool, Home]]:
        """Return a pool on unlike GPUs with equal shares, and with unequal ones."""
        tokens = self.kv_tokens(shape, batch_size)
        pools = self._unlike.pools(shape, pool, batch_size, chunk, tokens)
        return [(dealt, self._home(shape, dealt)) for dealt in pools]

    def forget(self) -> None:
        """Drop the times that were kept; what is asked for again is worked out again."""
        self.models.forget()
        self._unlike.forget()
        self._cutter.forget()

    def batch_levels(self, shape: Shape) -> list[int]:
        """Return powers of two, and what the workload's concurrency comes to for a replica."""
        most = MAX_BATCH_CPU if self.is_cpu else most_sequences(shape)
        concurrency = self.workload.concurrency
        levels = {2**power for power in range(most.bit_length()) if 2**power <= most}
        levels |= {level * 3 // 2 for level in levels if 16 <= level * 3 // 2 <= most}
        levels.add(self._fitting_batch(shape, most))
        if concurrency is not None:
            room = max(1, sum(kind.count for kind in shape.kinds) // shape.pp)
            counts = {self._dp} if self._dp else {*range(1, min(room, 64) + 1), room}
            exact = {ceil(concurrency / count) for count in counts}
            levels = {level for level in levels if level < min(exact)}
            exact |= {max(1, concurrency // count) for count in range(2, self._num_sharing + 1)}
            levels |= {min(level, most) for level in exact}
        elif self.workload.objective == "latency" and self.workload.request_rate is None:
            levels = {1}
        if self.workload.request_rate is not None:
            levels = set(sorted(levels)[-6:])
        elif concurrency is None and not self._is_limited and self._wants_many:
            # More requests share each reading of the weights: small batches are not looked at.
            fitting = self._fitting_batch(shape, most)
            levels = set(sorted(level for level in levels if level <= fitting)[-4:])
            levels.add(min(most, 2 * fitting))
        return sorted(level for level in levels if level >= 1)

    @property
    def _is_limited(self) -> bool:
        return self.workload.ttft_limit_s is not None or self.workload.tpot_limit_s is not None

    @property
    def _wants_many(self) -> bool:
        return self.workload.objective != "latency" and not self._every_level

    def _fitting_batch(self, shape: Shape, most: int) -> int:
        """Return about the largest batch that memory allows with even stages."""
        gpu = shape.kinds[0].gpu
        weights, kv = self.memory.layer_bytes(shape)
        fixed = sum(weights) / shape.pp + self.memory.extra_bytes(shape, 0, 1, CHUNK_LEVELS[0], gpu)
        room = self.memory.budget_bytes(gpu) - fixed
        per_sequence = sum(kv) / shape.pp * self.kv_tokens(shape, 1)
        fitting = int(room // per_sequence) if per_sequence else most
        if shape.attention == "dp":
            fitting *= shape.tp  # each rank has sequences of its own
        unequal = self._unlike.fitting_batch(shape, CHUNK_LEVELS[0], self.kv_tokens(shape, 1))
        fitting = max(fitting, unequal)
        return max(1, min(most, fitting))

    def kv_tokens(self, shape: Shape, batch_size: int) -> int:
        """Return the tokens of cache that `batch_size` requests take of a rank, in whole blocks."""
        return self._blocks.kv_tokens(shape, batch_size)

    def block_tokens(self, cp: int) -> int:
        """Return the tokens of a KV block on one rank; see `CacheBlocks.block_tokens`."""
        return self._blocks.block_tokens(cp)

    def chunk_levels(self, batch_size: int, pp: int) -> list[int]:
        """Return the tokens of a step that are tried: up to one that takes a whole prompt."""
        slots = ceil(batch_size / micro_batches_of(pp, batch_size))
        enough = prompt_tokens(self.workload) + slots
        levels = [level for level in CHUNK_LEVELS if level > slots]
        useful = [level for level in levels if level < enough]
        if useful == levels and 2 * slots > CHUNK_LEVELS[-1]:
            levels.append(2 * slots)  # the largest of them would leave prompts too little
        # One more that takes a whole prompt, if there is one.
        return levels[: len(useful) + 1]

    def _evaluate(
        self,
        shape: Shape,
        pool: Pool,
        batch_size: int,
        chunk: int,
        cut: Cut,
        pipelines: list[Pipeline],
    ) -> Iterator[Candidate]:
        for count in self._replica_levels(pool):
            states = [self._serve(pipeline, batch_size, chunk, count) for pipeline in pipelines]
            serving = tuple(
                state
                or serve_closed(pipeline, self.workload, batch_size=batch_size, chunk_tokens=chunk)
                for state, pipeline in zip(states, pipelines, strict=True)
            )
            broken: list[Constraint] = [] if cut.fits else ["memory"]
            if any(state is None for state in states):
                broken.append("rate")
            limits = self.workload
            if limits.ttft_limit_s is not None:
                ttft_s = max(state.ttft_at_s(limits.percentile) for state in serving)
                if ttft_s > limits.ttft_limit_s:
                    broken.append("ttft")
            if limits.tpot_limit_s is not None:
                tpot_s = max(state.tpot_s for state in serving)
                if tpot_s > limits.tpot_limit_s:
                    broken.append("tpot")
            yield Candidate(
                shape,
                pool,
                batch_size,
                chunk,
                cut.layers,
                serving,
                cut.memory_bytes,
                cut.budget_bytes,
                count,
                tuple(broken),
                limits.percentile,
            )

    def stage_costs(
        self, shape: Shape, pool: Pool, batch_size: int, chunk: int, tokens: StepTokens
    ) -> list[StageCosts]:
        """Return what each stage costs per layer, for the placement that is hardest.

        A pool with several kinds of GPU is cut for the slowest and the smallest of each stage.

        Args:
            shape: How it is cut.
            pool: Where.
            batch_size: Slots of one replica, which size its cache.
            chunk: Tokens of one step at most, which size its buffers.
            tokens: Of the step that is timed.
        """
        return self._cutter.stage_costs(self._home(shape, pool), batch_size, chunk, tokens)

    def pipeline(self, replicas: Replicas, stage_layers: tuple[int, ...], shape: Shape) -> Pipeline:
        """Return the pipeline of one of `replicas`, cut as `shape` says."""
        return self.models.pipeline(
            replicas, stage_layers, shape.ep, shape.attention, shape.cp, shape.cp_exchange
        )

    def _replica_levels(self, pool: Pool) -> Sequence[int | None]:
        if self.workload.request_rate is None:
            return [None]
        most = sum(group.count for group in pool.replicas)
        if self._dp is not None:
            return [self._dp]
        return [level for level in _REPLICA_LEVELS if level < most] + [most]

    def _serve(
        self, pipeline: Pipeline, batch_size: int, chunk: int, count: int | None
    ) -> Serving | None:
        rate = self.workload.request_rate
        if rate is None or count is None:
            return serve_closed(pipeline, self.workload, batch_size=batch_size, chunk_tokens=chunk)
        return serve_open(
            pipeline,
            self.workload,
            requests_per_s=rate / count,
            batch_size=batch_size,
            chunk_tokens=chunk,
        )
