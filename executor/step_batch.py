"""`StepBatch`: what one forward pass computes, as the leader decides it and every rank reads it.

Shape letters: S sequences, T tokens of all of them, R rows to sample, N blocks of a table row.
Sequences that decode one token stand first, then those that prefill a chunk.
A token id below zero stands for a token that an earlier step draws (`from_row`): the step before,
or in a pipeline that of one round before, as many steps as there are stages.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


def from_row(row: int) -> int:
    """Return the id that stands for the token that an earlier step draws in its row `row`.

    >>> from_row(0)
    -1
    """
    return -1 - row


def known_tokens(token_ids_T: Int64, drawn_R: Int64) -> Int64:
    """Return the ids, with those that stand for rows of an earlier step replaced by what it drew.

    >>> known_tokens(np.array([7, from_row(1)]), np.array([20, 21])).tolist()
    [7, 21]
    """
    known: Int64 = token_ids_T.copy()
    unknown = token_ids_T < 0
    known[unknown] = drawn_R[-1 - token_ids_T[unknown]]
    return known


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """What has to be known of a batch beside the one before, whose draws it goes on from.

    Args:
        step: Its number.
        kept_R: Rows that the batch before samples whose sequences go on; None: all.
        grown_3G: For each block more: row of this batch, place in its table, number of the block.
    """

    step: int
    kept_R: Int32 | None
    grown_3G: Int32

    def encode(self) -> bytes:
        """Return it as bytes."""
        num_kept = -1 if self.kept_R is None else len(self.kept_R)
        head = np.array([self.step, num_kept], dtype=np.int64).tobytes()
        kept = b"" if self.kept_R is None else self.kept_R.tobytes()
        return head + kept + self.grown_3G.tobytes()

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Return what `encode` wrote."""
        step, num_kept = np.frombuffer(data, dtype=np.int64, count=2).tolist()
        numbers = np.frombuffer(data, dtype=np.int32, offset=16)
        count = max(num_kept, 0)
        kept_R = None if num_kept < 0 else numbers[:count]
        return cls(step, kept_R, numbers[count:].reshape(3, -1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """One forward pass over T tokens of S sequences, and which R of them to sample after."""

    step: int
    num_decodes: int
    query_lens_S: Int64
    context_lens_S: Int64  # tokens in the cache once this pass is done
    token_ids_T: Int64
    block_tables_SN: Int32
    parts_S: Int64  # which rank attends to the sequence, with attention DP; else 0
    sample_rows_R: Int64  # indices into T
    temperature_R: Float32
    top_p_R: Float32
    top_k_R: Int64
    seeds_R: Int64
    sample_positions_R: Int64  # position of the token to be drawn
    # How it follows from the batch before, where that says it all; it does not travel with a batch.
    continues: Continuation | None = None

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.query_lens_S)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    @property
    def num_samples(self) -> int:
        """R."""
        return len(self.sample_rows_R)

    @property
    def decode_only(self) -> bool:
        """Whether every sequence decodes one token and is sampled: what a CUDA graph captured."""
        return self.num_decodes == self.num_sequences == self.num_samples

    @property
    def greedy(self) -> bool:
        """Whether no row draws at random."""
        return not self.temperature_R.any()

    def positions(self) -> Int64:
        """Return the position of each token in its sequence, [T]."""
        starts = np.cumsum(self.query_lens_S) - self.query_lens_S
        first = self.context_lens_S - self.query_lens_S
        offset = np.arange(self.num_tokens) - np.repeat(starts, self.query_lens_S)
        return np.repeat(first, self.query_lens_S) + offset

    def slots(self, block_tokens: int, positions: Int64 | None = None) -> Int64:
        """Return where each token's key and value go: block * block_tokens + offset, [T].

        Args:
            block_tokens: Tokens of a block.
            positions: What `positions` returns, where it is known.
        """
        if positions is None:
            positions = self.positions()
        sequence = np.repeat(np.arange(self.num_sequences), self.query_lens_S)
        blocks = self.block_tables_SN[sequence, positions // block_tokens].astype(np.int64)
        return blocks * block_tokens + positions % block_tokens

    def encode(self) -> bytes:
        """Return the batch as bytes: a header of sizes, then the arrays."""
        width = self.block_tables_SN.shape[1]
        header = np.array(
            [
                self.step,
                self.num_decodes,
                self.num_sequences,
                self.num_tokens,
                self.num_samples,
                width,
            ],
            dtype=np.int64,
        )
        arrays = [getattr(self, name) for name, _, _ in _ARRAYS]
        return b"".join([header.tobytes(), *(array.tobytes() for array in arrays)])

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Return the batch that `encode` wrote."""
        head = np.frombuffer(data, dtype=np.int64, count=6)
        step, num_decodes, *dims = (int(value) for value in head)
        sizes = dict(zip("STRN", dims, strict=True))
        offset = head.nbytes
        fields: dict[str, npt.NDArray[np.generic]] = {}
        for name, shape, dtype in _ARRAYS:
            extent = [sizes[letter] for letter in shape]
            array = np.frombuffer(data, dtype=dtype, count=math.prod(extent), offset=offset)
            fields[name] = array.reshape(extent)
            offset += array.nbytes
        return cls(step=step, num_decodes=num_decodes, **fields)  # type: ignore[arg-type]


_ARRAYS: tuple[tuple[str, str, type[np.generic]], ...] = (
    ("query_lens_S", "S", np.int64),
    ("context_lens_S", "S", np.int64),
    ("parts_S", "S", np.int64),
    ("token_ids_T", "T", np.int64),
    ("sample_rows_R", "R", np.int64),
    ("top_k_R", "R", np.int64),
    ("seeds_R", "R", np.int64),
    ("sample_positions_R", "R", np.int64),
    ("block_tables_SN", "SN", np.int32),
    ("temperature_R", "R", np.float32),
    ("top_p_R", "R", np.float32),
)


def made_up_batch(
    chunk: int, *, decodes: int, sampled: bool, top_k: int = 0, num_parts: int = 1
) -> StepBatch:
    """Return a batch of a prompt chunk and some decodes for each part, all of them in block 0.

    Args:
        chunk: Tokens of the chunk.
        decodes: Sequences that decode a token.
        sampled: Whether the tokens are drawn, at random.
        top_k: Of what draws them.
        num_parts: Ranks with sequences of their own.
    """
    parts = np.arange(num_parts, dtype=np.int64)
    lens = np.array([1] * (decodes * num_parts) + [chunk] * num_parts, dtype=np.int64)
    rows = np.cumsum(lens) - 1 if sampled else np.array([], dtype=np.int64)
    return StepBatch(
        step=0,
        num_decodes=decodes * num_parts,
        query_lens_S=lens,
        context_lens_S=lens,
        token_ids_T=np.zeros(lens.sum(), dtype=np.int64),
        # Whatever the size of a block, `chunk` of them hold the chunk; those past it are not read.
        block_tables_SN=np.zeros((len(lens), chunk), dtype=np.int32),
        parts_S=np.concatenate([np.repeat(parts, decodes), parts]),
        sample_rows_R=rows,
        temperature_R=np.ones(len(rows), dtype=np.float32),
        top_p_R=np.ones(len(rows), dtype=np.float32),
        top_k_R=np.full(len(rows), top_k, dtype=np.int64),
        seeds_R=np.arange(len(rows)),
        sample_positions_R=np.arange(len(rows)),
    )
