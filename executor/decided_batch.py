"""Writes down what the scheduler decided, as the batch that ranks read."""

from itertools import chain

import numpy as np

from rankwright.executor.sequence import Sequence
from rankwright.executor.step_batch import Int32, StepBatch, from_row


def decided_batch(
    step: int, entries: list[tuple[Sequence, int]], *, num_decodes: int
) -> tuple[StepBatch, list[Sequence]]:
    """Return the batch, and the sequences whose next token it draws, in the order of its rows.

    What each sequence has in the cache, and where it is drawn, is noted in it.

    Args:
        step: Number of the batch.
        entries: Sequences and how many tokens of each are computed; they have the blocks for it.
        num_decodes: The first so many go on from a token that was drawn.
    """
    tokens: list[int] = []
    rows: list[int] = []
    sampled: list[Sequence] = []
    for sequence, count in entries:
        pending = sequence.num_pending
        if pending:
            tokens.append(from_row(sequence.drawn_row))
        else:
            tokens += sequence.tokens[sequence.num_cached : sequence.num_cached + count]
        sequence.num_cached += count
        if sequence.num_cached == len(sequence.tokens) + pending:
            sequence.drawn_step, sequence.drawn_row = step, len(sampled)
            sampled.append(sequence)
            rows.append(len(tokens) - 1)
    tables = _padded([sequence.blocks for sequence, _ in entries])
    sampling = [sequence.sampling for sequence in sampled]
    batch = StepBatch(
        step=step,
        num_decodes=num_decodes,
        query_lens_S=np.array([count for _, count in entries], dtype=np.int64),
        context_lens_S=np.array([sequence.num_cached for sequence, _ in entries], np.int64),
        token_ids_T=np.array(tokens, dtype=np.int64),
        block_tables_SN=tables,
        parts_S=np.array([sequence.part for sequence, _ in entries], dtype=np.int64),
        sample_rows_R=np.array(rows, dtype=np.int64),
        temperature_R=np.array([one.temperature for one in sampling], dtype=np.float32),
        top_p_R=np.array([one.top_p for one in sampling], dtype=np.float32),
        top_k_R=np.array([one.top_k for one in sampling], dtype=np.int64),
        seeds_R=np.array([sequence.seed for sequence in sampled], dtype=np.int64),
        sample_positions_R=np.array([sequence.num_tokens for sequence in sampled], np.int64),
    )
    return batch, sampled


def _padded(rows: list[list[int]]) -> Int32:
    """Return the rows with zeros behind the shorter ones."""
    lens = np.array([len(row) for row in rows])
    out = np.zeros((len(rows), lens.max()), dtype=np.int32)
    # All at once: an assignment a row takes three times as long for 256 rows of 17.
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=lens.sum())
    out[np.arange(out.shape[1]) < lens[:, None]] = values
    return out
