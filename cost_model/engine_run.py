"""Simulates one replica of another engine under a workload, with that engine's own scheduling."""

from rankwright.cost_model.engines import ENGINE_ROWS, MOST_REQUESTS, ROUNDS, Engine
from rankwright.cost_model.memory import (
    RESERVED_BYTES,
    activation_bytes,
    stage_kv_bytes_per_token,
    stage_weight_bytes,
)
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.percentiles import Percentiles, simulate_pipeline
from rankwright.cost_model.simulate import Schedule
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.workload import Workload
from rankwright.topology.cluster import Gpu

# Logits of a profiling run: engines size their activations for this many sequences.
_PROFILED_SEQUENCES = 256


def chunk_tokens(split: Split, engine: str) -> int:
    """Return the tokens of a step at most: the split's, where it says, else the engine's own.

    Of all ranks: under attention DP each has a scheduler of its own, in most engines with a whole
    step of its own.
    """
    if engine not in ENGINE_ROWS or "chunk_tokens" in split.model_fields_set:
        return split.chunk_tokens
    row = ENGINE_ROWS[engine]
    schedulers = split.tp if split.attention == "dp" and row.steps_of_ranks else 1
    return row.chunk_tokens * schedulers


def kv_capacity_tokens(spec: ModelSpec, split: Split, gpu: Gpu, engine: str) -> float:
    """Return the tokens of all sequences that a replica's KV cache holds under `engine`.

    Never below one token: a model that does not fit is for the memory figures to tell.
    """
    row = ENGINE_ROWS[engine]
    fixed = RESERVED_BYTES["cuda"] + activation_bytes(
        spec,
        tp=split.tp,
        ep=split.ep,
        attention=split.attention,
        # Experts get the tokens of all ranks, and make room for all pairs of them.
        max_batched_tokens=chunk_tokens(split, engine),
        max_num_seqs=_PROFILED_SEQUENCES,
    )
    tokens = float("inf")
    for stage in range(split.pp):
        left = gpu.memory_bytes * row.memory_share - fixed
        left -= stage_weight_bytes(spec, split, stage=stage)
        tokens = min(
            tokens, left * row.free_share / stage_kv_bytes_per_token(spec, split, stage=stage)
        )
    # Under attention DP each rank caches its own sequences, under CP each its part of all.
    return max(1.0, tokens * split.cp * (split.tp if split.attention == "dp" else 1))


def run_on_engine(
    pipeline: Pipeline, spec: ModelSpec, workload: Workload, split: Split, gpu: Gpu, engine: str
) -> Percentiles:
    """Return what requests see on one replica.

    Args:
        pipeline: Of the replica.
        spec: The model.
        workload: Its rate and concurrency are those of this replica alone.
        split: The cut; `max_batch_size` sequences run at once at most.
        gpu: The replica's.
        engine: Row of `ENGINE_ROWS`.
    """
    row = ENGINE_ROWS[engine]
    # Without a concurrency or a rate there are no clients: all requests are given at once.
    served = workload.concurrency is not None or workload.request_rate is not None
    schedule = Schedule(
        row.policy,
        split.max_batch_size,
        chunk_tokens(split, engine),
        kv_capacity_tokens(spec, split, gpu, engine),
        row.split_prompts,
        row.reserved_share,
        split.tp if split.attention == "dp" else 1,
        row.host_token_s if served else 0.0,
        row.host_request_s if served else 0.0,
    )
    in_flight = split.max_batch_size if workload.concurrency is None else workload.concurrency
    return simulate_pipeline(
        pipeline,
        workload,
        schedule,
        requests=_num_requests(in_flight),
        length_spread=_length_spread(row, workload),
        request_s=row.request_s,
    )


def _num_requests(in_flight: int) -> int:
    return max(2 * in_flight, min(ROUNDS * in_flight, MOST_REQUESTS))


def _length_spread(row: Engine, workload: Workload) -> float:
    return row.length_spread if workload.length_spread is None else workload.length_spread
