"""Sum over the GPUs of one machine in two shots: each rank sums a share of the rows for all.

Shapes: T tokens (rows), D hidden size, R ranks.

Row `t` is summed by rank `t % R`: it reads all ranks' parts of it, adds them in rank order (so that
the bits are those of `all_reduce.sum_parts`), adds the residual, and writes what it found into the
memory of every rank. When all have met again, each rank normalises what has arrived. A rank thus
reads and writes (R - 1) / R of the part each, where one shot reads R - 1 times the part; it pays on
more than two ranks, once bytes count and not the second meeting.

The programs of one number take the same rows on all ranks, so that they alone need to meet. A part
may be written again as soon as the sum is done; what arrived, from the next sum's first meeting on:
a rank comes to that when it has done with this sum.
"""

from __future__ import annotations

import torch

from rankwright.kernels.all_reduce import MAX_PROGRAMS, Peers, launch_sum, meet
from rankwright.kernels.backend import ceil_div, jit, tl


@jit(do_not_specialize=("num_tokens",))
def _two_shot_kernel(
    table_address,
    words_ptr,
    epochs_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    num_tokens,
    residual_stride,
    eps,
    PART_OFFSET: tl.constexpr,
    ARRIVALS_OFFSET: tl.constexpr,
    SIGNAL_WORD: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    program = tl.program_id(0)
    stride = tl.num_programs(0) * WORLD
    table = table_address.to(tl.pointer_type(tl.int64))
    d = tl.arange(0, BLOCK_D)
    mask = d < DIM
    out_type = out_ptr.dtype.element_ty
    if HAS_NORM:  # loaded while the peers are on their way
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    meet(table, words_ptr, epochs_ptr, SIGNAL_WORD, program, RANK, WORLD)
    for row_number in range(program * WORLD + RANK, num_tokens, stride):
        row = tl.cast(row_number, tl.int64)
        total = tl.zeros([BLOCK_D], tl.float32)
        for peer in tl.static_range(WORLD):  # pyright: ignore[reportGeneralTypeIssues]
            # Memory of a rank begins at a page; the compiler must know, to load 16 bytes at a time.
            base_ptr = tl.multiple_of(tl.load(table + peer).to(tl.pointer_type(out_type)), 16)
            part_at = base_ptr + PART_OFFSET + row * DIM + d
            total += tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
        # Rounded as a sum that is written and read again is.
        found = total.to(out_type)
        if HAS_NORM:
            at = residual_ptr + row * residual_stride + d
            total = found.to(tl.float32) + tl.load(at, mask=mask, other=0.0).to(tl.float32)
            found = total.to(out_type)
        for step in tl.static_range(WORLD):  # pyright: ignore[reportGeneralTypeIssues]
            peer = (RANK + step) % WORLD  # so that ranks do not all write to the first at once
            base_ptr = tl.multiple_of(tl.load(table + peer).to(tl.pointer_type(out_type)), 16)
            tl.store(base_ptr + ARRIVALS_OFFSET + row * DIM + d, found, mask=mask)
    tl.debug_barrier()  # every thread must read the count that the first meeting left
    meet(table, words_ptr, epochs_ptr, SIGNAL_WORD, program, RANK, WORLD)
    own_ptr = tl.multiple_of(tl.load(table + RANK).to(tl.pointer_type(out_type)), 16)
    for first in range(program * WORLD, num_tokens, stride):
        for offset in tl.static_range(WORLD):  # pyright: ignore[reportGeneralTypeIssues]
            row = tl.cast(first, tl.int64) + offset
            here = mask & (row < num_tokens)
            arrived = tl.load(own_ptr + ARRIVALS_OFFSET + row * DIM + d, mask=here, other=0.0)
            if HAS_NORM:
                tl.store(residual_ptr + row * residual_stride + d, arrived, mask=here)
                x = arrived.to(tl.float32)
                rstd = tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps)
                arrived = ((x * rstd).to(out_type).to(tl.float32) * weight).to(out_type)
            tl.store(out_ptr + row * DIM + d, arrived, mask=here)


def sum_parts_in_two_shots(
    out_TD: torch.Tensor,
    peers: Peers,
    part_offset: int,
    arrivals_offset: int,
    *,
    weight_D: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out_TD`, as `all_reduce.sum_parts` would fill it; ranks must all choose alike.

    Args:
        out_TD: Written; dense rows.
        peers: Whose parts.
        part_offset: Where the part begins in every rank's memory, values of out's dtype.
        arrivals_offset: Where there is room there for as many rows of what others summed, the same.
        weight_D: Factors of the norm; None: only the sum.
        eps: Added to the mean square.
        residual_TD: Becomes `residual_TD + sum` in place; with `weight_D`, of out's dtype, and
            equal on all ranks, as each adds it for all to its share of the rows.
    """
    assert residual_TD is None or residual_TD.dtype == out_TD.dtype
    num_programs = min(ceil_div(len(out_TD), peers.world_size), MAX_PROGRAMS)
    norm = weight_D, eps, residual_TD
    return launch_sum(
        _two_shot_kernel,
        num_programs,
        out_TD,
        peers,
        part_offset,
        *norm,
        {"ARRIVALS_OFFSET": arrivals_offset},
    )
