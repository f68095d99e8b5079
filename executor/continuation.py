"""A batch made from the one before, and from what a `Continuation` says of it.

While sequences only decode, each batch is the one before with every context a token longer, less
the sequences that have ended and with a block more for the few whose last one is full. Said so, it
is made by a handful of operations on arrays, by the leader and by every rank that has the batch
before; and what the leader tells is some 100 bytes whatever the batch, not 36 kB for 256 sequences.
Shape letters: as of `StepBatch`, and G sequences that get another block.
"""

from functools import lru_cache

import numpy as np

from rankwright.executor.step_batch import Continuation, Int32, Int64, StepBatch


@lru_cache(maxsize=8)
def _ids_of_rows(count: int) -> Int64:
    """Return the ids that stand for the first `count` rows of the step before (`from_row`)."""
    return -1 - np.arange(count, dtype=np.int64)


@lru_cache(maxsize=8)
def _ones(count: int) -> Int64:
    return np.ones(count, dtype=np.int64)


@lru_cache(maxsize=8)
def _counted(count: int) -> Int64:
    return np.arange(count, dtype=np.int64)


def continued(before: StepBatch, how: Continuation) -> StepBatch:
    """Return the batch that follows `before`; arrays that are equal are shared with it."""
    kept = how.kept_R
    rows = kept
    if not before.decode_only:
        ends_S = np.cumsum(before.query_lens_S) - 1
        sampled_R = before.sample_rows_R if kept is None else before.sample_rows_R[kept]
        rows = np.searchsorted(ends_S, sampled_R).astype(np.int32)
    context_lens_S = (before.context_lens_S if rows is None else before.context_lens_S[rows]) + 1
    count = len(context_lens_S)
    return StepBatch(
        step=how.step,
        num_decodes=count,
        query_lens_S=_ones(count),
        context_lens_S=context_lens_S,
        token_ids_T=_ids_of_rows(count) if kept is None else -1 - kept.astype(np.int64),
        block_tables_SN=_tables(before.block_tables_SN, rows, how.grown_3G),
        parts_S=before.parts_S if rows is None else before.parts_S[rows],
        sample_rows_R=_counted(count),
        temperature_R=before.temperature_R if kept is None else before.temperature_R[kept],
        top_p_R=before.top_p_R if kept is None else before.top_p_R[kept],
        top_k_R=before.top_k_R if kept is None else before.top_k_R[kept],
        seeds_R=before.seeds_R if kept is None else before.seeds_R[kept],
        # What is drawn comes behind all that is in the cache then.
        sample_positions_R=context_lens_S,
        continues=how,
    )


def _tables(before_SN: Int32, rows: Int32 | None, grown_3G: Int32) -> Int32:
    """Return the block tables: the very array of the batch before where nothing changes."""
    num_grown = grown_3G.shape[1]
    if rows is None and not num_grown:
        return before_SN
    tables_SN = before_SN if rows is None else before_SN[rows]
    if not num_grown:
        return tables_SN
    count, width = tables_SN.shape
    wider = max(width, int(grown_3G[1].max()) + 1)
    if wider > width or rows is None:
        new_SN = np.zeros((count, wider), dtype=np.int32)
        new_SN[:, :width] = tables_SN
        tables_SN = new_SN
    tables_SN[grown_3G[0], grown_3G[1]] = grown_3G[2]
    return tables_SN
