"""Sorts the pairs (token, expert) by expert slot, in blocks that a grouped GEMM can take.

Shapes: T tokens, K experts a token, P = T K pairs, S slots, B blocks of M rows.

A GEMM program takes M rows that meet one expert's weights. So the pairs of each slot are padded to
whole blocks of M. How many blocks there are is known on the device only; memory and launches are
sized for the most there can be, so that the host need not wait and a CUDA graph can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwright.kernels.backend import Backend, jit, next_power_of_two, runs_triton, tl


@dataclass(frozen=True, slots=True)
class Alignment:
    """Pairs in blocks of one slot each.

    Args:
        pairs: int32 [B * M]: pair of each row; P marks padding; undefined past the last block.
        block_slots: int32 [B]: slot of each block, -1 past the last.
        block_rows: M.
    """

    pairs: torch.Tensor
    block_slots: torch.Tensor
    block_rows: int

    @property
    def max_blocks(self) -> int:
        """B."""
        return len(self.block_slots)


def max_blocks(num_pairs: int, num_slots: int, block_rows: int) -> int:
    """Return the most blocks that `num_pairs` can fill.

    >>> max_blocks(8, 128, 16), max_blocks(1024, 8, 16)
    (8, 71)
    """
    return min(num_pairs, (num_pairs + num_slots * (block_rows - 1)) // block_rows)


def align_reference(slots_TK: torch.Tensor, num_slots: int, block_rows: int) -> Alignment:
    """Return the alignment; see `align`."""
    slots_P = slots_TK.flatten()
    num_pairs = slots_P.numel()
    num_blocks = max_blocks(num_pairs, num_slots, block_rows)
    pairs = torch.full((num_blocks, block_rows), num_pairs, dtype=torch.int32)
    block_slots = torch.full((num_blocks,), -1, dtype=torch.int32)
    block = 0
    for slot in range(num_slots):
        for part in (slots_P == slot).nonzero().flatten().split(block_rows):
            if part.numel():
                pairs[block, : part.numel()] = part
                block_slots[block] = slot
                block += 1
    device = slots_TK.device
    return Alignment(pairs.flatten().to(device), block_slots.to(device), block_rows)


@jit(do_not_specialize=("num_pairs",))
def _count_kernel(slots_ptr, counts_ptr, num_pairs, BLOCK: tl.constexpr):
    slot = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_pairs, BLOCK):
        found = tl.load(slots_ptr + first + lane, mask=first + lane < num_pairs, other=-1)
        count += (found == slot).to(tl.int32)
    tl.store(counts_ptr + slot, tl.sum(count, axis=0))


@jit(do_not_specialize=("num_pairs", "max_blocks"))
def _place_kernel(
    slots_ptr,
    counts_ptr,
    pairs_ptr,
    block_slots_ptr,
    num_pairs,
    max_blocks,
    NUM_SLOTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0)
    s = tl.arange(0, BLOCK_S)
    counts = tl.load(counts_ptr + s, mask=s < NUM_SLOTS, other=0)
    blocks = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    first_block = tl.sum(tl.where(s < slot, blocks, 0), axis=0)
    num_blocks = tl.sum(tl.where(s == slot, blocks, 0), axis=0)
    lane = tl.arange(0, BLOCK)
    for first in range(0, num_blocks, BLOCK):
        block = first + lane
        tl.store(block_slots_ptr + first_block + block, slot, mask=block < num_blocks)
    if slot == NUM_SLOTS - 1:
        for first in range(first_block + num_blocks, max_blocks, BLOCK):
            block = first + lane
            tl.store(block_slots_ptr + block, -1, mask=block < max_blocks)

    start = first_block * BLOCK_ROWS
    stop = start + num_blocks * BLOCK_ROWS
    for first in range(0, num_pairs, BLOCK):
        pair = first + lane
        here = tl.load(slots_ptr + pair, mask=pair < num_pairs, other=-1) == slot
        before = tl.cumsum(here.to(tl.int32), axis=0)
        tl.store(pairs_ptr + start + before - 1, pair, mask=here)
        start += tl.sum(here.to(tl.int32), axis=0)
    # At most BLOCK_ROWS - 1 rows of padding, after the last pair.
    row = start + tl.arange(0, BLOCK_ROWS)
    tl.store(pairs_ptr + row, tl.zeros_like(row) + num_pairs, mask=row < stop)


# 8 values a thread of 4 warps: 16 experts' worth of 64 tokens in one round.
_BLOCK = 1024


def align(
    slots_TK: torch.Tensor, num_slots: int, block_rows: int, *, backend: Backend = "auto"
) -> Alignment:
    """Return the pairs sorted by slot, those of a slot in order, in blocks of `block_rows`.

    Args:
        slots_TK: int32, contiguous; what is not in 0 to `num_slots - 1` is left out.
        num_slots: S.
        block_rows: M, a power of two.
        backend: What runs it, see `runs_triton`.
    """
    if not runs_triton(slots_TK, backend):
        return align_reference(slots_TK, num_slots, block_rows)
    num_pairs, device = slots_TK.numel(), slots_TK.device
    num_blocks = max_blocks(num_pairs, num_slots, block_rows)
    pairs = torch.empty(num_blocks * block_rows, dtype=torch.int32, device=device)
    block_slots = torch.empty(num_blocks, dtype=torch.int32, device=device)
    counts_S = torch.empty(num_slots, dtype=torch.int32, device=device)
    if num_pairs:
        block = min(_BLOCK, max(128, next_power_of_two(num_pairs)))
        _count_kernel[(num_slots,)](slots_TK, counts_S, num_pairs, BLOCK=block, num_warps=4)
        _place_kernel[(num_slots,)](
            slots_TK,
            counts_S,
            pairs,
            block_slots,
            num_pairs,
            num_blocks,
            NUM_SLOTS=num_slots,
            BLOCK_S=next_power_of_two(num_slots),
            BLOCK_ROWS=block_rows,
            BLOCK=block,
            num_warps=4,
        )
    return Alignment(pairs, block_slots, block_rows)
