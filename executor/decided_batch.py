"""Writes down what the scheduler decided, as the batch that ranks read."""

import numpy as np

from rankwright.executor.sequence import Sequence
from rankwright.executor.step_batch import StepBatch, from_row


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
        if sequence.in_flight:
            tokens.append(from_row(sequence.drawn_row))
        else:
            tokens += sequence.tokens[sequence.num_cached : sequence.num_cached + count]
        sequence.num_cached += count
        if sequence.num_cached == sequence.num_tokens:
            sequence.drawn_step, sequence.drawn_row = step, len(sampled)
            sampled.append(sequence)
            rows.append(len(tokens) - 1)
    width = max(len(sequence.blocks) for sequence, _ in entries)
    tables = np.zeros((len(entries), width), dtype=np.int32)
    for index, (sequence, _) in enumerate(entries):
        tables[index, : len(sequence.blocks)] = sequence.blocks
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
