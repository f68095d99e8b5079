"""Steady state of a replica under continuous batching with chunked prefill.

A slot of the batch goes round: the prompt of its request is prefilled, in chunks; a token is
decoded in each round; and when the request has ended the next one is let in. Prompts and tokens
flow through the same steps, so that the work of a prompt slows the decoding of all others down.
With

    B  slots of the replica            new  prompt tokens to compute (the rest is cached)
    m  micro-batches, one a stage      C    tokens that a step may take
    b  = B / m slots of a step         n    steps of one prompt: ceil(new / (C - b)), and in a
                                            pipeline at least m where a prompt can be shared out

and steps counted over all micro-batches, a slot takes `n + m - 1` of them for a prompt, whose last
chunk must come out of the pipeline, `m * (osl - 1)` to decode, and 2 until the next request is in
(one step is on its way when a request ends, and one more when the next arrives). With fewer
sequences than stages a step lasts longer than a stage, and chunks follow each other in the stages
that are free: `(n + pp - 1) * m / pp` of them for a prompt. So `r = B / cycle` requests pass a
step. Slots are where they are by chance, since lengths differ: a step is without prompt tokens if
no slot has any, so that a share

    f = 1 - (1 - n / cycle)**B

of the steps has some, and more if they would not hold them otherwise. When requests bring more
tokens than steps can take (`r * (new + osl - 1) > C`), prefill is the bottleneck: every step is
full, `r = C / (new + osl - 1)`, and the slots in excess wait with their prompts, which takes
nothing from a step.

Of the slots without a prompt as many decode as decode on average, and beside prompts what is left
of the mean of all steps. A round takes

    R = F * R(decoding, with prompt tokens) + (1 - F) * R(decoding alone)
    F = f + (m - 1) * (1 - f) * (1 - exp(-r)), at most 1

since in a pipeline the first long step of a run of them, of which `(1 - f) * (1 - exp(-r))` begin a
step, holds up the m - 1 after it. From this `requests/s = m * r / R`, and TTFT is a wait and then
the steps of the prompt. TPOT is `R` as a request sees it that decodes, with the prompts of the
`B - 1` other slots.

The real scheduler, on a clock where steps last what this model says of each, serves within 2.4 % of
these requests/s and 2.0 % of this TPOT on average over 108 loads, and 14 and 17 % at most: four
stages with answers of 16 tokens (`benchmarks/bench_flow.py`).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, expm1, log, sqrt

from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.workload import Workload


def micro_batches_of(pp: int, batch_size: int) -> int:
    """Return the micro-batches to keep in flight: one a stage, so that none is idle.

    Fewer would leave stages idle, more would read the weights more often for the same tokens.

    >>> micro_batches_of(4, 2)
    2
    """
    return min(pp, batch_size)


def prompt_tokens(workload: Workload) -> int:
    """Return the prompt tokens of a request that must be computed."""
    return max(1, round(workload.input_tokens * (1 - workload.shared_prefix)))


_ROUNDING = 1e-9  # of a slot
_NEARLY_FULL = 0.999  # a queue at full load has no mean; this one is longer than any limit


# Prompt tokens that a step of a pipeline takes at once even where fewer would be its share, alone
# and beside tokens that decode: on an H200 16 layers of an 8B model take 4.8 ms to launch, and 6.1
# to compute 512 tokens, so that a short prompt alone is done sooner in one piece.
LEAST_CHUNK_ALONE, LEAST_CHUNK = 512, 256
# Steps after the last of a request until the next request is in.
_TURN_STEPS = 2


@dataclass(frozen=True, slots=True)
class Flow:
    """How requests pass the steps of a replica; see the head of this file.

    Args:
        slots: Of the replica (`B`).
        requests: Requests that one step brings closer to their end by a whole one (`r`).
        plain: A step without prompt tokens.
        mixed: A step with them.
        mixed_share: Share of the steps that carry prompt tokens (`f`).
        prompt_steps: Steps of one prompt (`n`).
        turn_steps: Steps between two requests of a slot.
        waiting: Requests whose prompt waits for others' to be taken.
    """

    slots: int
    requests: float
    plain: StepTokens
    mixed: StepTokens
    mixed_share: float
    prompt_steps: int
    turn_steps: float
    waiting: float


def find_flow(workload: Workload, slots: int, chunk_tokens: int, stages: int = 1) -> Flow:
    """Return the flow through `slots` slots that are always taken.

    Args:
        workload: Lengths.
        slots: Sequences of the replica (`B`).
        chunk_tokens: Tokens of one step at most, decoding ones included.
        stages: Of the pipeline.
    """
    new, input_tokens = prompt_tokens(workload), workload.input_tokens
    return _flow_of(new, input_tokens, workload.output_tokens, slots, chunk_tokens, stages)


@lru_cache(maxsize=4096)  # a search asks for a few hundred flows, tens of thousands of times
def _flow_of(
    new: int, input_tokens: int, output_tokens: int, slots: int, chunk_tokens: int, stages: int
) -> Flow:
    decode_steps = output_tokens - 1
    ways = micro_batches_of(stages, slots)
    filled = ways / stages  # of the pipeline, by steps that decode; prompts fill it
    turn_steps = _TURN_STEPS * (1 - 1 / slots)  # of a request alone nothing is on its way
    other_steps = ways - 1 + ways * decode_steps + turn_steps
    shared_out = min(stages, ceil(new / (LEAST_CHUNK if slots > 1 else LEAST_CHUNK_ALONE)))

    def steps_of(chunks: int) -> float:
        return (chunks + stages - 1) * filled - (ways - 1)

    prompt_steps = max(ceil(new / chunk_tokens), shared_out)
    requests = slots / (steps_of(prompt_steps) + other_steps)
    if requests * (new + decode_steps) * filled > chunk_tokens:
        # Slots whose prompts wait take none of a step's tokens.
        requests = chunk_tokens / filled / (new + decode_steps)
        share, per_chunk = 1.0, requests * new * filled
        prompt_steps = ceil(new / per_chunk)
        alone = beside = requests * decode_steps
    else:
        chunk = max(1, chunk_tokens - ceil(slots / ways))
        prompt_steps = max(ceil(new / chunk), shared_out)
        taken = steps_of(prompt_steps)
        requests = slots / (taken + other_steps)
        by_chance = 1 - (1 - taken / (taken + other_steps)) ** slots
        held = requests * new / (chunk_tokens / filled - requests * decode_steps)
        share = max(by_chance, held)
        per_chunk = requests * new / share * taken / prompt_steps
        # Of slots without a prompt; a step is not run for none of them.
        alone = max(1.0, slots * decode_steps / other_steps) if decode_steps else 0.0
        beside = max(0.0, requests * decode_steps - (1 - share) * alone) / share
    context = input_tokens + output_tokens / 2
    prefill_context = input_tokens - new / 2
    return Flow(
        slots=slots,
        requests=requests,
        plain=StepTokens(decode=alone, decode_context=context),
        mixed=StepTokens(beside, context, per_chunk, prefill_context, per_chunk / new),
        mixed_share=share,
        prompt_steps=prompt_steps,
        turn_steps=turn_steps,
        waiting=max(0.0, slots - requests * (steps_of(prompt_steps) + other_steps)),
    )


@dataclass(frozen=True, slots=True)
class Serving:
    """What one replica does in steady state. Rates are of this replica alone.

    Args:
        ttft_s: Mean time to first token, waiting included.
        wait_s: What of it is waiting.
        tpot_s: Mean time per output token after the first.
        requests_per_s: Requests finished, at the most that the batch allows.
        batch_size: Requests in flight.
        flow: How requests pass its steps.
    """

    ttft_s: float
    wait_s: float
    tpot_s: float
    requests_per_s: float
    batch_size: int
    flow: Flow

    def ttft_at_s(self, percentile: float) -> float:
        """Return the TTFT that `percentile` % of requests stay below.

        Waits are taken to be exponential, as those of a queue in heavy traffic are: the one that
        p % stay below is `ln(1 / (1 - p))` times the mean. Up to the median the mean is kept.
        """
        return self.ttft_s + self.wait_s * max(0.0, -log(1 - percentile / 100) - 1)

    def request_s(self, output_tokens: int) -> float:
        """Return the seconds of one request from arrival to last token."""
        return self.ttft_s + (output_tokens - 1) * self.tpot_s


def mixed_rounds(flow: Flow, micro_batches: int) -> tuple[float, float]:
    """Return the shares of rounds with prompt tokens: of all, and of those of a decoding request.

    >>> flow = find_flow(Workload(input_tokens=1000, output_tokens=101), 1, 2048)
    >>> mixed_rounds(flow, micro_batches=1)[1]
    0.0
    """
    others = (flow.slots - 1) / flow.slots
    seen = 1 - (1 - flow.mixed_share) ** others

    def held_up(share: float, requests: float) -> float:
        return min(1.0, share + (micro_batches - 1) * (1 - share) * -expm1(-requests))

    return held_up(flow.mixed_share, flow.requests), held_up(seen, flow.requests * others)


def burst_prompts(batch_size: int) -> float:
    """Return the prompts that one waits for on average in a run of fixed concurrency.

    Equal requests that follow each other would never meet; but a run starts with all of them at
    once, and they stay bunched. In 45 published runs of vLLM 0.12 with 4 to 64 requests in flight
    (Llama-3.1-70B FP8 on 2, 4 and 8 H100; 1,024 or 8,192 tokens in and out) TTFT exceeded one
    prompt by 0.5, 0.8, 1.2, 2.1 and 3.6 prompts: 0.4, and one for every 16 requests more.
    """
    return 0.4 + (batch_size - 1) / 16 if batch_size > 1 else 0.0


def serve_closed(
    pipeline: Pipeline, workload: Workload, *, batch_size: int, chunk_tokens: int
) -> Serving:
    """Return the steady state with `batch_size` requests always in flight.

    Args:
        pipeline: One replica.
        workload: Lengths; its rate and concurrency are not looked at.
        batch_size: Slots of the replica, all taken.
        chunk_tokens: Tokens of one step at most, decoding ones included.
    """
    micro_batches = micro_batches_of(len(pipeline.stages), batch_size)
    flow = find_flow(workload, batch_size, chunk_tokens, len(pipeline.stages))
    of_all, of_seen = mixed_rounds(flow, micro_batches)
    mixed_s = plain_s = pipeline.round_s(flow.mixed, micro_batches)
    if flow.mixed_share < 1:
        plain_s = pipeline.round_s(flow.plain, micro_batches)
    prompt_s = pipeline.prompt_s(flow.mixed, flow.prompt_steps)
    if micro_batches < len(pipeline.stages):
        # Chunks follow each other as the slowest stage lets them; see `find_flow`.
        mixed_s = prompt_s * len(pipeline.stages) / (flow.prompt_steps + len(pipeline.stages) - 1)
    round_s = of_all * mixed_s + (1 - of_all) * plain_s
    burst_s = burst_prompts(batch_size) * prompt_s / max(1.0, flow.mixed.prompts)
    if flow.waiting > _ROUNDING:
        wait_s = max(burst_s, flow.waiting / flow.requests * round_s)  # Little's law
    else:
        wait_s = burst_s
    return Serving(
        ttft_s=wait_s + prompt_s,
        wait_s=wait_s,
        tpot_s=of_seen * mixed_s + (1 - of_seen) * plain_s,
        requests_per_s=micro_batches * flow.requests / round_s,
        batch_size=batch_size,
        flow=flow,
    )


def serve_open(
    pipeline: Pipeline,
    workload: Workload,
    *,
    requests_per_s: float,
    batch_size: int,
    chunk_tokens: int,
) -> Serving | None:
    """Return the steady state under random arrivals, or None where they outrun the replica.

    The requests in flight are the fewest that finish `requests_per_s`. To their TTFT come two
    waits: for the prefill of others (M/G/1 with equal prompts: `rho * S / (2 * (1 - rho))`), and
    for a slot (M/M/c after Sakasegawa 1977: `rho**(sqrt(2 * (c + 1)) - 1) * S / (c * (1 - rho))`).

    Args:
        pipeline: One replica.
        workload: Lengths.
        requests_per_s: Arrivals at this replica.
        batch_size: Slots of the replica.
        chunk_tokens: Tokens of one step at most.
    """
    full = serve_closed(pipeline, workload, batch_size=batch_size, chunk_tokens=chunk_tokens)
    if full.requests_per_s <= requests_per_s:
        return None
    low, high = 1, batch_size
    found = full
    while low < high:
        middle = (low + high) // 2
        state = serve_closed(pipeline, workload, batch_size=middle, chunk_tokens=chunk_tokens)
        if state.requests_per_s >= requests_per_s:
            high, found = middle, state
        else:
            low = middle + 1
    flow = found.flow
    prompt_s = pipeline.prompt_s(flow.mixed, flow.prompt_steps)
    # One prefill at a time in each micro-batch; prompts spread over them.
    servers = micro_batches_of(len(pipeline.stages), batch_size)
    busy = min(requests_per_s / servers * prompt_s, flow.mixed_share, _NEARLY_FULL)
    load = requests_per_s / full.requests_per_s
    residence_s = prompt_s + (workload.output_tokens - 1) * found.tpot_s
    slot_wait_s = load ** (sqrt(2 * (batch_size + 1)) - 1) * residence_s / (batch_size * (1 - load))
    prefill_wait_s = busy / (2 * (1 - busy)) * prompt_s
    return Serving(
        ttft_s=prompt_s + prefill_wait_s + slot_wait_s,
        wait_s=prefill_wait_s + slot_wait_s,
        tpot_s=found.tpot_s,
        requests_per_s=full.requests_per_s,
        batch_size=high,
        flow=flow,
    )
