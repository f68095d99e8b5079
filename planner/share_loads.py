"""Which steps unequal shares are to be best for.

Shares that balance a step with prompts need not balance one without: the one is bound by
arithmetic, the other by memory, and GPUs differ in both.
"""

from dataclasses import dataclass
from math import ceil

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.serving import (
    Flow,
    burst_prompts,
    find_flow,
    micro_batches_of,
    mixed_rounds,
)
from rankwright.cost_model.workload import Workload

# Numbers of layers that the shares of a stage are made for, where a replica has several stages.
_LAYER_LEVELS = 4


@dataclass(frozen=True, slots=True)
class Load:
    """The steps that a stage is timed in, and what its memory must hold.

    Args:
        steps: Kinds of step with how much the seconds of each weigh.
        layers: Of the stage.
        stage: 0 is the first.
        batch_size: Sequences of the replica.
        chunk_tokens: Of a step at most.
        kv_tokens: That the cache of a rank holds.
    """

    steps: tuple[tuple[StepTokens, float], ...]
    layers: int
    stage: int
    batch_size: int
    chunk_tokens: int
    kv_tokens: int


def loads_of(
    workload: Workload, num_layers: int, pp: int, batch_size: int, chunk_tokens: int, kv_tokens: int
) -> list[Load]:
    """Return the loads for which shares are made, of a first stage.

    With one stage the first of them is exact: what is asked for is a weighted sum of the two kinds
    of step. Where limits bind, or requests arrive at a rate, what is best for each kind of step
    alone is looked at too. The stages of a pipeline get layers after their shares, so that shares
    are made for several numbers of layers.
    """
    micro_batches = micro_batches_of(pp, batch_size)
    flow = find_flow(workload, batch_size, chunk_tokens, pp)
    weights = _weights(workload, flow, batch_size, *mixed_rounds(flow, micro_batches))
    limited = workload.ttft_limit_s is not None or workload.tpot_limit_s is not None
    if limited or workload.request_rate is not None:
        weights += [(1.0, 0.0), (0.0, 1.0)]
    loads: list[Load] = []
    for mixed, plain in weights:
        steps = tuple(
            (tokens, weight)
            for tokens, weight in ((flow.mixed, mixed), (flow.plain, plain))
            if weight > 0 and tokens.total
        )
        loads += [
            Load(steps, layers, 0, batch_size, chunk_tokens, kv_tokens)
            for layers in _layer_levels(num_layers, pp)
            if steps
        ]
    return loads


def _weights(
    workload: Workload, flow: Flow, batch_size: int, of_all: float, of_seen: float
) -> list[tuple[float, float]]:
    """Return how much steps with and without prompts weigh in the objective.

    In tokens a second, of a GPU or of all: as often as they come. In the time of a request also the
    steps of its prompt, and of those it waits for; see `serving.serve_closed`.
    """
    if workload.objective != "latency":
        return [(of_all, 1 - of_all)]
    rounds = workload.output_tokens - 1
    decoding, plain = rounds * of_seen, rounds * (1 - of_seen)
    bursts = flow.prompt_steps * (1 + burst_prompts(batch_size) / max(1.0, flow.mixed.prompts))
    weights = [(bursts + decoding, plain)]
    if flow.waiting:
        waits = flow.waiting / flow.requests
        weights.append(
            (flow.prompt_steps + decoding + waits * of_all, plain + waits * (1 - of_all))
        )
    return weights


def _layer_levels(num_layers: int, pp: int) -> list[int]:
    if pp == 1:
        return [num_layers]
    even = ceil(num_layers / pp)
    most = num_layers - pp + 1
    steps = _LAYER_LEVELS - 1
    return sorted({even, *(max(1, most * step // steps) for step in range(1, steps + 1))})
