"""Workers of the two pools: every cut of a prefill or a decode worker, with what it does alone.

A prefill worker computes one prompt at a time; a decode worker steps a fixed number of requests.
Those that no memory holds are left out, with the one that comes closest kept as evidence.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.pools import (
    RankCache,
    decode_requests_per_s,
    decode_seconds,
    decode_step,
    prompt_seconds,
    prompt_step,
    rank_cache,
)
from rankwright.cost_model.predict import Replicas
from rankwright.cost_model.serving import micro_batches_of, prompt_tokens
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.planner.balance import StageCosts, balance_layers
from rankwright.planner.candidates import CHUNK_LEVELS, most_sequences
from rankwright.planner.divide import Home, homes_of
from rankwright.planner.pools import Pool
from rankwright.planner.search import Search
from rankwright.planner.shapes import Shape

Role = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Worker:
    """One cut of a worker of one pool.

    Args:
        role: Its pool.
        shape: Degrees.
        home: What it stands on.
        stage_layers: Layers of each stage.
        batch_size: Requests that it holds the cache of.
        chunk_tokens: Tokens of one step.
        latency_s: Of a prompt, or of a token after the first.
        interval_s: Between two requests that it finishes, if it never waits.
        cache: Of one token of a request.
    """

    role: Role
    shape: Shape
    home: Home
    stage_layers: tuple[int, ...]
    batch_size: int
    chunk_tokens: int
    latency_s: float
    interval_s: float
    cache: RankCache

    @property
    def num_gpus(self) -> int:
        """GPUs of one worker."""
        return self.home.num_gpus

    def split(self, count: int) -> Split:
        """Return the split of `count` such workers."""
        return split_of(self.shape, self.stage_layers, self.batch_size, self.chunk_tokens, count)

    def label(self) -> str:
        """Return shape and batch for messages."""
        text = self.shape.label()
        return text if self.role == "prefill" else f"{text} at batch {self.batch_size}"


def split_of(
    shape: Shape, stage_layers: tuple[int, ...], batch_size: int, chunk_tokens: int, count: int = 1
) -> Split:
    """Return the split of `count` workers of `shape`."""
    return Split(
        dp=count,
        pp=shape.pp,
        tp=shape.tp,
        ep=shape.ep,
        cp=shape.cp,
        attention=shape.attention,
        cp_exchange=shape.cp_exchange,
        stage_layers=stage_layers,
        max_batch_size=batch_size,
        chunk_tokens=chunk_tokens,
        micro_batches=micro_batches_of(shape.pp, batch_size),
    )


@dataclass
class Workers:
    """Finds the workers of one pool.

    Args:
        role: Which pool.
        search: Model, cluster, budget and engine; its workload has the lengths of this pool: a
            prompt and one token for prefill.
        tightest: The worker that comes closest to fitting in memory where none does, with the bytes
            that it needs and may use.
    """

    role: Role
    search: Search
    tightest: tuple[Shape, float, float] | None = field(default=None, init=False)

    def find(self, limit_s: float | None) -> list[Worker]:
        """Return every worker that memory holds.

        Args:
            limit_s: Of a decode worker's TPOT: the largest batch that keeps it is among them.
        """
        found: list[Worker] = []
        for shape in self.search.shapes.legal:
            for home in homes_of(shape, self.search.cluster):
                make = self._prefill if self.role == "prefill" else self._decode
                found += make(shape, home, limit_s)
        return found

    def pipeline(self, worker: Worker) -> Pipeline:
        """Return the pipeline of `worker`."""
        return self._pipeline(worker.shape, worker.home, worker.stage_layers)

    def step(self, worker: Worker) -> tuple[StepTokens, int]:
        """Return the step of `worker`, and how many such a prompt or a round takes."""
        if self.role == "prefill":
            return prompt_step(self.search.workload, worker.chunk_tokens)
        return decode_step(self.search.workload, worker.shape.pp, worker.batch_size)

    def costs(
        self, shape: Shape, home: Home, batch_size: int, chunk: int, tokens: StepTokens
    ) -> list[StageCosts]:
        """Return what each stage of a worker costs per layer."""
        pool = Pool((_replicas(shape, home, 1),))
        return self.search.evaluator.stage_costs(shape, pool, batch_size, chunk, tokens)

    def _pipeline(self, shape: Shape, home: Home, layers: tuple[int, ...]) -> Pipeline:
        return self.search.evaluator.pipeline(_replicas(shape, home, 1), layers, shape)

    def _prefill(self, shape: Shape, home: Home, limit_s: float | None) -> Iterator[Worker]:
        """Yield the chunks of which none is faster for one prompt and as fast for many.

        A worker holds the prompts that its stages compute, and as many whose caches leave it.
        """
        del limit_s  # of a prompt too, but a wait and the transfer come to it
        load, batch_size = self.search.workload, 2 * shape.pp
        kept: list[Worker] = []
        for chunk in _prefill_chunks(prompt_tokens(load)):
            tokens, _ = prompt_step(load, chunk)
            layers = self._cut(shape, home, batch_size, chunk, tokens)
            if layers is None:
                break
            prompt_s, interval_s = prompt_seconds(self._pipeline(shape, home, layers), load, chunk)
            if any(w.latency_s <= prompt_s and w.interval_s <= interval_s for w in kept):
                continue
            cache = self._cache(shape, layers)
            kept.append(
                Worker(
                    "prefill", shape, home, layers, batch_size, chunk, prompt_s, interval_s, cache
                )
            )
        yield from kept

    def _decode(self, shape: Shape, home: Home, limit_s: float | None) -> Iterator[Worker]:
        """Yield batches up to the largest that memory and the limit of TPOT allow."""
        known: dict[int, Worker | None] = {}

        def fits(batch_size: int) -> bool:
            if batch_size not in known:
                known[batch_size] = self._decode_at(shape, home, batch_size)
            worker = known[batch_size]
            return worker is not None and (limit_s is None or worker.latency_s <= limit_s)

        low, high = 0, most_sequences(shape) + 1
        while high - low > 1:  # the largest that fits is below `high`
            middle = (low + high) // 2
            if fits(middle):
                low = middle
            else:
                high = middle
        for batch_size in self._batch_levels(low):
            if fits(batch_size):
                worker = known[batch_size]
                assert worker is not None
                yield worker

    def _batch_levels(self, most: int) -> list[int]:
        """Return the batches that are tried: `most`, and lower levels.

        A larger batch costs less a request. Smaller ones only where requests in flight or arrivals
        are few, or where nothing but the latency counts.
        """
        load = self.search.workload
        levels = {2**power for power in range(most.bit_length())}
        levels |= {level * 3 // 2 for level in levels if level >= 16}
        if load.concurrency is not None:
            levels |= {-(-load.concurrency // count) for count in range(1, 65)}
        found = sorted({level for level in levels if level <= most} | {most} - {0})
        if load.concurrency is not None or load.objective == "latency":
            return found
        return found[-3:] if load.request_rate is None else found[-6:]

    def _decode_at(self, shape: Shape, home: Home, batch_size: int) -> Worker | None:
        load = self.search.workload
        chunk = next((level for level in CHUNK_LEVELS if level >= batch_size), batch_size)
        tokens, _ = decode_step(load, shape.pp, batch_size)
        layers = self._cut(shape, home, batch_size, chunk, tokens)
        if layers is None:
            return None
        tpot_s = decode_seconds(self._pipeline(shape, home, layers), load, batch_size)
        interval_s = 1 / decode_requests_per_s(load, batch_size, tpot_s)
        cache = self._cache(shape, layers)
        return Worker("decode", shape, home, layers, batch_size, chunk, tpot_s, interval_s, cache)

    def _cut(
        self, shape: Shape, home: Home, batch_size: int, chunk: int, tokens: StepTokens
    ) -> tuple[int, ...] | None:
        costs = self.costs(shape, home, batch_size, chunk, tokens)
        layers = balance_layers(costs)
        if layers is None:
            self._remember(shape, costs)
        return layers

    def _remember(self, shape: Shape, costs: Sequence[StageCosts]) -> None:
        """Keep the worker that needs least of what its GPUs have."""
        wanted = sum(costs[0].layer_bytes) / shape.pp + max(stage.extra_bytes for stage in costs)
        budget = costs[0].budget_bytes
        if self.tightest is None or wanted / budget < self.tightest[1] / self.tightest[2]:
            self.tightest = shape, wanted, budget

    def _cache(self, shape: Shape, layers: tuple[int, ...]) -> RankCache:
        return rank_cache(self.search.model, split_of(shape, layers, 1, 1))


def _replicas(shape: Shape, home: Home, count: int) -> Replicas:
    return Replicas((home.kind,) * shape.pp, count, shape.pp > 1 and home.machines > 1)


def replicas_of(worker: Worker, count: int) -> Replicas:
    """Return `count` workers as the cost model takes them."""
    return _replicas(worker.shape, worker.home, count)


def _prefill_chunks(tokens: int) -> list[int]:
    """Return the tokens of a step that are tried: up to one that takes a whole prompt."""
    useful = [level for level in CHUNK_LEVELS if level < tokens]
    return list(CHUNK_LEVELS[: len(useful) + 1])
