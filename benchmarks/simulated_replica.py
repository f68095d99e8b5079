"""A replica on a virtual clock: the real scheduler, steps that take what the cost model says.

What a client sees of it (`Timeline`) is what the one in `client.py` sees of GPUs, so that a
measurement can be tried, and its noise and bias known, where there is no GPU. Nothing here imports
torch.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from itertools import islice

from client import Timeline
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.executor.messages import Sampling
from rankwright.executor.scheduler import Scheduler
from rankwright.executor.sequence import Sequence as Decided
from rankwright.executor.step_batch import StepBatch
from rankwright.topology.cluster import Cluster

# Until a client has seen a token and the leader has its next request: one process each.
CLIENT_S = 3e-4
_BLOCK_TOKENS = 64  # of the KV cache of a GPU
_PLENTY = 1_000_000


def step_tokens(batch: StepBatch) -> StepTokens:
    """Return what the cost model wants to know of a batch."""
    lens, contexts = batch.query_lens_S, batch.context_lens_S
    split = batch.num_decodes
    prefill = int(lens[split:].sum())
    # A token of a chunk attends to what is before it: half of the chunk less, on average.
    seen = (lens[split:] * (contexts[split:] - (lens[split:] - 1) / 2)).sum()
    return StepTokens(
        decode=split,
        decode_context=float(contexts[:split].mean()) if split else 0.0,
        prefill=prefill,
        prefill_context=float(seen / prefill) if prefill else 0.0,
        prompts=batch.num_samples - split,
    )


class SimulatedReplica:
    """One replica, always with as many requests as its client keeps on their way.

    Args:
        pipeline: Times its steps.
        scheduler: Decides them.
    """

    def __init__(self, pipeline: Pipeline, scheduler: Scheduler) -> None:
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._now_s = 0.0
        self._free_s = [0.0] * len(pipeline.stages)  # when each stage has done what it was given

    def keep(
        self, lengths: Sequence[tuple[int, int]], in_flight: int, *, until: int | None = None
    ) -> Timeline:
        """Run requests as `Client.keep` does; return when each was sent and its tokens came."""
        line = Timeline()
        scheduler = self._scheduler
        waiting = iter(enumerate(lengths))
        arriving: list[tuple[float, int, int, int]] = []  # moment, number, prompt, output
        awaited = set(range(len(lengths) if until is None else until))

        def send(moment_s: float) -> None:
            for number, (prompt, output) in islice(waiting, 1):
                heapq.heappush(arriving, (moment_s, number, prompt, output))

        for _ in range(in_flight):
            send(self._now_s)
        issued: deque[tuple[float, list[Decided]]] = deque()
        while awaited:
            while arriving and arriving[0][0] <= self._now_s:
                sent_s, number, prompt, output = heapq.heappop(arriving)
                sampling = Sampling(temperature=0, max_tokens=output, ignore_eos=True, seed=0)
                scheduler.add(str(number), [0] * prompt, sampling)
                line.sent[str(number)], line.tokens[str(number)] = sent_s, []
            decided = scheduler.schedule()
            if decided is not None:
                issued.append((self._run(decided[0]), decided[1]))
            if issued and (decided is None or len(issued) >= scheduler.max_in_flight):
                done_s, sampled = issued.popleft()
                self._now_s = max(self._now_s, done_s)
                news = scheduler.complete(sampled, [0] * len(sampled))
                for name in news.request_ids:
                    line.tokens[name].append(self._now_s)
                for place, _ in news.ends:
                    awaited.discard(int(news.request_ids[place]))
                    send(self._now_s + CLIENT_S)
            elif decided is None:
                self._now_s = max(self._now_s, arriving[0][0])
        for name in line.sent:
            scheduler.abort(name)
        for _, sampled in issued:
            scheduler.complete(sampled, [0] * len(sampled))
        return line

    def _run(self, batch: StepBatch) -> float:
        """Return when the tokens of a batch that is given to the first stage now are known."""
        tokens = step_tokens(batch)
        moment_s = self._now_s
        last = len(self._pipeline.stages) - 1
        for stage in range(last + 1):
            moment_s = max(moment_s, self._free_s[stage]) + self._pipeline.stage_s(stage, tokens)
            self._free_s[stage] = moment_s
            if stage < last:
                moment_s += self._pipeline.send_s(stage, tokens)
        return moment_s


def simulated_replica(
    model: ModelSpec, cluster: Cluster, split: Split, kv_blocks: int | None = None
) -> SimulatedReplica:
    """Return one replica of `split`; its batch and chunk are the split's.

    Args:
        model: What runs.
        cluster: Where.
        split: How it is cut.
        kv_blocks: Blocks of each rank's cache; None: as many as are asked for.
    """
    models = StageModels(model, cluster, "rankwright")
    (replicas, *_) = choose_replicas(cluster, split)
    scheduler = Scheduler(
        num_blocks=_PLENTY if kv_blocks is None else kv_blocks,
        block_tokens=_BLOCK_TOKENS * split.cp,
        max_num_seqs=split.max_batch_size,
        max_batched_tokens=split.chunk_tokens,
        max_model_len=model.max_context_tokens,
        depth=split.pp,
        ahead=1,
        num_parts=split.tp if split.attention == "dp" else 1,
    )
    return SimulatedReplica(models.pipeline_of(replicas, split), scheduler)
