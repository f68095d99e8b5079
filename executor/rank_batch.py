"""`RankBatch`: what of a step batch one rank computes.

Ranks of a TP group with attention TP compute every token of a batch. Otherwise a rank has a part:

* attention DP: the sequences that the batch assigns to its tp_rank (`StepBatch.parts_S`);
* context parallelism: tokens of prompts whose cache block is its own. Block `j` of a sequence is
  on cp_rank `j % cp`, so that each rank computes and caches every cp-th block, and all have equal
  work under the causal mask. Tokens that decode are computed by every rank of the group, each of
  which attends to its own part of the context.

The `cp` blocks of a sequence that follow each other take the same block number on all ranks, so
that the scheduler's tables hold for every rank, with blocks of `cp` times the tokens.

Collectives need equal shapes, so a part is padded to the largest of its TP group with rows that
attend to nothing (context 0) and write nothing (slot -1).
Shape letters: S sequences, T token rows of this rank, R sampled rows, P pieces of prompts, N blocks
of a table row, M blocks to gather.
"""

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from rankwright.executor.step_batch import Int32, Int64, StepBatch


@dataclass(frozen=True, slots=True)
class Parts:
    """How a stage shares out batches, and which part is this rank's.

    Args:
        block_tokens: Tokens of a cache block on one rank.
        attention_ranks: Ranks with sequences of their own: tp with attention DP, else 1.
        attention_rank: Which of them this is.
        cp: Ranks that share each context.
        cp_rank: Which of them this is.
    """

    block_tokens: int
    attention_ranks: int = 1
    attention_rank: int = 0
    cp: int = 1
    cp_rank: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether this rank computes every token of a batch."""
        return self.attention_ranks == self.cp == 1


@dataclass(frozen=True, slots=True)
class GatherGroup:
    """Prompts whose keys and values are gathered from the CP group at once.

    Rank `r`'s copy of the M blocks becomes blocks `r * M` to `(r + 1) * M - 1` of a pool.

    Args:
        blocks_M: Blocks of these prompts on each rank, one prompt after another.
        rows: First and one past the last of the rank's token rows.
        query_starts: Where each piece's rows start, from 0; one more than pieces.
        context_lens: Tokens up to the end of each piece.
        block_tables_PN: Blocks of each piece's context in the gathered pool.
        part_tables_PN: Those of any one rank's part of it, in a pool of that part alone.
    """

    blocks_M: Int64
    rows: tuple[int, int]
    query_starts: list[int]
    context_lens: list[int]
    block_tables_PN: Int32
    part_tables_PN: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """Token rows of one rank; those that decode stand first, then padding, then prompts.

    Args:
        num_decodes: Rows that decode a token. Padding is counted in, but under context parallelism:
            there all ranks of the group merge as many.
        num_padding: Rows after those that attend to nothing and decode nothing.
        context_lens_S: Tokens in the cache of all ranks once this pass is done.
        sample_rows_R: Rows to sample, padded to the most of any rank with -1; -1 also where another
            rank of the CP group has the row.
        sampled_by_R: For each of the batch's sampled rows, the rank of the TP group that has it and
            its place among that rank's; None where every rank has all.
        gathers: Prompts under context parallelism.
    """

    num_decodes: int
    token_ids_T: Int64
    positions_T: Int64
    slots_T: Int64
    context_lens_S: Int64
    block_tables_SN: Int32
    sample_rows_R: Int64
    sampled_by_R: tuple[Int64, Int64] | None
    prefill_query_starts: list[int]
    prefill_context_lens: list[int]
    num_padding: int = 0
    gathers: list[GatherGroup] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    def sample_order(self, rows_per_rank: int) -> Int64 | None:
        """Return where the batch's sampled rows are among the TP group's, one rank's after another.

        None where they are in order.
        """
        if self.sampled_by_R is None:
            return None
        ranks, places = self.sampled_by_R
        return ranks * rows_per_rank + places


def tokens_before(count: Int64, parts: Parts) -> Int64:
    """Return how many of a sequence's first `count` tokens are in this rank's cache.

    >>> tokens_before(np.array([0, 3, 6, 9]), Parts(4, cp=2, cp_rank=1)).tolist()
    [0, 0, 2, 4]
    """
    size = parts.block_tokens
    full, rest = np.divmod(count, size * parts.cp)
    mine: Int64 = full * size + np.clip(rest - parts.cp_rank * size, 0, size)
    return mine


def rank_batch(batch: StepBatch, parts: Parts, *, max_gathered_blocks: int = 1) -> RankBatch:
    """Return the part of `batch` that one rank computes.

    Args:
        batch: What the replica computes.
        parts: Which part.
        max_gathered_blocks: Blocks of prompts that one gather takes at most, where a single prompt
            does not have more.
    """
    if parts.is_whole and batch.decode_only:
        return _whole_decode(batch, parts.block_tokens)
    if parts.is_whole:
        starts = np.cumsum(batch.query_lens_S[batch.num_decodes :])
        positions = batch.positions()
        return RankBatch(
            num_decodes=batch.num_decodes,
            token_ids_T=batch.token_ids_T,
            positions_T=positions,
            slots_T=batch.slots(parts.block_tokens, positions),
            context_lens_S=batch.context_lens_S,
            block_tables_SN=batch.block_tables_SN,
            sample_rows_R=batch.sample_rows_R,
            sampled_by_R=None,
            prefill_query_starts=[0, *starts.tolist()],
            prefill_context_lens=batch.context_lens_S[batch.num_decodes :].tolist(),
        )
    return _Builder(batch, parts, max_gathered_blocks).build()


def _whole_decode(batch: StepBatch, block_tokens: int) -> RankBatch:
    """Return the batch in which every sequence decodes a token, by fewest operations."""
    positions = batch.context_lens_S - 1
    places, offsets = np.divmod(positions, block_tokens)
    slots = batch.block_tables_SN[batch.sample_rows_R, places] * np.int64(block_tokens) + offsets
    return RankBatch(
        num_decodes=batch.num_decodes,
        token_ids_T=batch.token_ids_T,
        positions_T=positions,
        slots_T=slots,
        context_lens_S=batch.context_lens_S,
        block_tables_SN=batch.block_tables_SN,
        sample_rows_R=batch.sample_rows_R,
        sampled_by_R=None,
        prefill_query_starts=[0],
        prefill_context_lens=[],
    )


def _starts(pieces: list[tuple[int, int, int]]) -> list[int]:
    return [0, *accumulate(rows for _, _, rows in pieces)]


class _Builder:
    """Cuts one batch; token rows are named by their place in the whole batch."""

    def __init__(self, batch: StepBatch, parts: Parts, max_gathered_blocks: int) -> None:
        self._batch = batch
        self._parts = parts
        self._max_gathered_blocks = max_gathered_blocks
        self._positions_T = batch.positions()
        self._sequence_T = np.repeat(np.arange(batch.num_sequences), batch.query_lens_S)
        self._block_T = self._positions_T // parts.block_tokens
        self._is_decode_T = self._sequence_T < batch.num_decodes
        # Where a token's sequence is, and which rank of the CP group has it: -1, all of them.
        self._part_T = batch.parts_S[self._sequence_T]
        self._cp_rank_T = np.where(self._is_decode_T, -1, self._block_T % parts.cp)

    def build(self) -> RankBatch:
        batch, parts = self._batch, self._parts
        rows_of = [self._rows(part) for part in range(parts.attention_ranks)]
        mine = rows_of[parts.attention_rank]
        # A step without a token of its own still takes part in collectives.
        size = max(1, *map(len, rows_of))
        is_decode = self._is_decode_T[mine]
        num_pad = size - len(mine)
        rows_T = np.concatenate([mine[is_decode], np.full(num_pad, -1), mine[~is_decode]])
        is_cut = parts.cp > 1
        num_decodes = int(is_decode.sum()) + (0 if is_cut else num_pad)
        num_padding = num_pad if is_cut else 0
        sequences = np.flatnonzero(batch.parts_S == parts.attention_rank)
        decoding = sequences[sequences < batch.num_decodes]
        prompts = sequences[sequences >= batch.num_decodes]
        width = batch.block_tables_SN.shape[1]
        empty = num_pad - num_padding  # sequences without a context
        pad_lens, pad_tables = np.zeros(empty, np.int64), np.zeros((empty, width), np.int32)
        pieces = self._pieces(mine[~is_decode])
        sampled_by, sample_rows = self._sampled(rows_T)
        return RankBatch(
            num_decodes=num_decodes,
            token_ids_T=self._take(batch.token_ids_T, rows_T, 0),
            positions_T=self._take(self._positions_T, rows_T, 0),
            slots_T=self._take(self._slots(), rows_T, -1),
            context_lens_S=np.concatenate(
                [batch.context_lens_S[decoding], pad_lens, batch.context_lens_S[prompts]]
            ),
            block_tables_SN=np.concatenate(
                [batch.block_tables_SN[decoding], pad_tables, batch.block_tables_SN[prompts]]
            ),
            sample_rows_R=sample_rows,
            sampled_by_R=sampled_by,
            prefill_query_starts=[0] if is_cut else _starts(pieces),
            prefill_context_lens=[] if is_cut else [piece[1] for piece in pieces],
            num_padding=num_padding,
            gathers=(self._gathers(prompts, pieces, num_decodes + num_padding) if is_cut else []),
        )

    def _rows(self, part: int) -> Int64:
        """Return the rows that rank `part` of this rank's TP group computes."""
        here_T = (self._cp_rank_T < 0) | (self._cp_rank_T == self._parts.cp_rank)
        rows: Int64 = np.flatnonzero(here_T & (self._part_T == part))
        return rows

    @staticmethod
    def _take(values_T: Int64, rows: Int64, padding: int) -> Int64:
        return np.where(rows < 0, padding, values_T[np.maximum(rows, 0)])

    def _slots(self) -> Int64:
        """Return the slot of each token on this rank, -1 where another rank has its block."""
        size, cp = self._parts.block_tokens, self._parts.cp
        blocks = self._batch.block_tables_SN[self._sequence_T, self._block_T // cp].astype(np.int64)
        slots = blocks * size + self._positions_T % size
        return np.where(self._block_T % cp == self._parts.cp_rank, slots, -1)

    def _pieces(self, rows: Int64) -> list[tuple[int, int, int]]:
        """Return (sequence, end of its context, rows) of each run of neighbouring tokens."""
        if not len(rows):
            return []
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(self._sequence_T[rows]) != 0)) + 1
        return [
            (int(self._sequence_T[run[0]]), int(self._positions_T[run[-1]]) + 1, len(run))
            for run in np.split(rows, cuts)
        ]

    def _sampled(self, rows_T: Int64) -> tuple[tuple[Int64, Int64] | None, Int64]:
        """Return `sampled_by_R` and `sample_rows_R`."""
        sampled = self._batch.sample_rows_R
        part_of = self._part_T[sampled]
        by_part = [sampled[part_of == part] for part in range(self._parts.attention_ranks)]
        most = max(map(len, by_part))
        place = {int(row): index for index, row in enumerate(rows_T) if row >= 0}
        cp_rank = self._parts.cp_rank
        rows = np.full(most, -1, dtype=np.int64)
        for index, row in enumerate(by_part[self._parts.attention_rank]):
            # What every rank of the CP group has counts once.
            if max(self._cp_rank_T[row], 0) == cp_rank:
                rows[index] = place[int(row)]
        if self._parts.attention_ranks == 1:
            return None, rows
        seen = [0] * self._parts.attention_ranks
        places = []
        for part in part_of.tolist():
            places.append(seen[part])
            seen[part] += 1
        return (part_of, np.array(places, dtype=np.int64)), rows

    def _gathers(
        self, prompts: Int64, pieces: list[tuple[int, int, int]], first_row: int
    ) -> list[GatherGroup]:
        """Return the prompts of this rank's TP part in groups, the same on all of the CP group."""
        groups: list[list[int]] = []
        room = 0
        for sequence in prompts.tolist():
            needed = self._num_blocks(sequence)
            if not groups or needed > room:
                groups.append([])
                room = self._max_gathered_blocks
            groups[-1].append(sequence)
            room -= needed
        found: list[GatherGroup] = []
        for members in groups:
            inside = [piece for piece in pieces if piece[0] in members]
            stop = first_row + sum(piece[2] for piece in inside)
            found.append(self._gather(members, inside, (first_row, stop)))
            first_row = stop
        return found

    def _num_blocks(self, sequence: int) -> int:
        return -(-int(self._batch.context_lens_S[sequence]) // self._super_block_tokens)

    @property
    def _super_block_tokens(self) -> int:
        return self._parts.block_tokens * self._parts.cp

    def _gather(
        self, members: list[int], pieces: list[tuple[int, int, int]], rows: tuple[int, int]
    ) -> GatherGroup:
        cp = self._parts.cp
        counts = [self._num_blocks(sequence) for sequence in members]
        blocks = np.concatenate(
            [
                self._batch.block_tables_SN[sequence, :count]
                for sequence, count in zip(members, counts, strict=True)
            ]
        ).astype(np.int64)
        first_of = dict(zip(members, np.cumsum(counts) - counts, strict=True))
        count_of = dict(zip(members, counts, strict=True))
        tables = np.zeros((len(pieces), max(counts) * cp), dtype=np.int32)
        for index, (sequence, _, _) in enumerate(pieces):
            own = first_of[sequence] + np.arange(count_of[sequence])
            # Blocks of the context in turn: rank 0's first, rank 1's first, ...
            whole = own[:, None] + np.arange(cp) * len(blocks)
            tables[index, : whole.size] = whole.ravel()
        return GatherGroup(
            blocks_M=blocks,
            rows=rows,
            query_starts=_starts(pieces),
            context_lens=[piece[1] for piece in pieces],
            block_tables_PN=tables,
            part_tables_PN=np.ascontiguousarray(tables[:, ::cp]),
        )
