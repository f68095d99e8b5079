"""Sum over the GPUs of one machine, each reading its peers' memory, with what follows it fused in.

Shapes: T tokens (rows), D hidden size.

One-shot: every rank waits until all ranks have their parts ready, then reads all parts and adds
them up in rank order, so that all ranks get the same bits. On two GPUs that moves as many bytes as
any other algorithm; on more it pays while latency counts, not bytes. The residual addition and the
RMSNorm that come after a sum in every decoder layer run on the rows while they are in registers.

Ranks meet at words of each other's memory: a program tells its peers' programs of the same number
that it has come to call number `epoch`, by a store that needs no answer, and waits for theirs. The
count is kept in memory, so a captured graph counts on. What makes it safe to write a part again is
the caller's: a rank may do so once it has been through another call since (`PeerMemory`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rankwright.kernels.backend import jit, next_power_of_two, tl
from rankwright.kernels.overlap import overlap, take_turn

# Programs of one call at most: each has a word for every rank. 4 on each of an H100's 132
# multiprocessors keep its links busy, as each waits for one row at a time.
MAX_PROGRAMS = 512


@jit()
def meet(
    table, words_ptr, epochs_ptr, signal_word, program, RANK: tl.constexpr, WORLD: tl.constexpr
):
    """Return when the programs of this number of all ranks are here.

    What they wrote before, also into this rank's memory, is then seen here.
    """
    epoch = tl.load(epochs_ptr + program) + 1
    tl.debug_barrier()
    for step in tl.static_range(1, WORLD):  # pyright: ignore[reportGeneralTypeIssues]
        peer = (RANK + step) % WORLD
        base = tl.load(table + peer).to(tl.pointer_type(tl.int32))
        there = base + signal_word + program * WORLD + RANK
        tl.atomic_xchg(there, epoch, sem="release", scope="sys")
    for step in tl.static_range(1, WORLD):  # pyright: ignore[reportGeneralTypeIssues]
        peer = (RANK + step) % WORLD
        here = words_ptr + program * WORLD + peer
        # A peer may already be one call further. The difference counts through an overflow.
        while tl.atomic_add(here, 0, sem="acquire", scope="sys") - epoch < 0:
            pass
    tl.store(epochs_ptr + program, epoch)


@jit(do_not_specialize=("num_tokens",))
def _sum_kernel(
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
    SIGNAL_WORD: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    program = tl.program_id(0)
    table = table_address.to(tl.pointer_type(tl.int64))
    d = tl.arange(0, BLOCK_D)
    mask = d < DIM
    if HAS_NORM:  # loaded while the peers are on their way
        weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    take_turn(OVERLAP)  # a peer is told of parts that are written
    meet(table, words_ptr, epochs_ptr, SIGNAL_WORD, program, RANK, WORLD)
    out_type = out_ptr.dtype.element_ty
    for row_number in range(program, num_tokens, tl.num_programs(0)):
        row = tl.cast(row_number, tl.int64)
        total = tl.zeros([BLOCK_D], tl.float32)
        for peer in tl.static_range(WORLD):
            # Memory of a rank begins at a page; the compiler must know, to load 16 bytes at a time.
            base_ptr = tl.load(table + peer).to(tl.pointer_type(out_type))
            part_ptr = tl.multiple_of(base_ptr, 16) + PART_OFFSET
            total += tl.load(part_ptr + row * DIM + d, mask=mask, other=0.0).to(tl.float32)
        # Rounded as a sum that is written and read again is.
        total = total.to(out_type).to(tl.float32)
        if HAS_NORM:
            at = residual_ptr + row * residual_stride + d
            total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            rounded = total.to(residual_ptr.dtype.element_ty)
            tl.store(at, rounded, mask=mask)
            x = rounded.to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x * x, axis=0) / DIM + eps)
            total = (x * rstd).to(out_type).to(tl.float32) * weight
        tl.store(out_ptr + row * DIM + d, total.to(out_type), mask=mask)


@dataclass(frozen=True, slots=True)
class Peers:
    """Ranks that sum together, as one of them sees them; the same in all its sums.

    Args:
        table_address: On the device, addresses of every rank's memory, int64 [world_size].
        words: This rank's words that peers tell it by, int32 [MAX_PROGRAMS * world_size].
        epochs: How often each program has met its peers, int32 [MAX_PROGRAMS].
        signal_word: Where the words begin in every rank's memory, int32 values.
        rank: This rank.
        world_size: Ranks.
    """

    table_address: int
    words: torch.Tensor
    epochs: torch.Tensor
    signal_word: int
    rank: int
    world_size: int


def sum_parts(
    out_TD: torch.Tensor,
    peers: Peers,
    part_offset: int,
    *,
    weight_D: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out_TD`, the sum of all ranks' parts, or the RMSNorm of `residual_TD` plus that.

    Args:
        out_TD: Written; dense rows.
        peers: Whose parts.
        part_offset: Where the part begins in every rank's memory, values of out's dtype.
        weight_D: Factors of the norm; None: only the sum.
        eps: Added to the mean square.
        residual_TD: Becomes `residual_TD + sum` in place; with `weight_D`.
    """
    num_programs = min(len(out_TD), MAX_PROGRAMS)
    norm = weight_D, eps, residual_TD
    return launch_sum(_sum_kernel, num_programs, out_TD, peers, part_offset, *norm, overlap(out_TD))


def launch_sum(
    kernel: Any,
    num_programs: int,
    out_TD: torch.Tensor,
    peers: Peers,
    part_offset: int,
    weight_D: torch.Tensor | None,
    eps: float,
    residual_TD: torch.Tensor | None,
    constants: Mapping[str, int],
) -> torch.Tensor:
    """Return `out_TD`, filled by `kernel`, whose arguments are those of `_sum_kernel`.

    Args:
        kernel: With `constants` besides.
        num_programs: Of the launch.
        out_TD: As of `sum_parts`, and so are the others.
        peers: See there.
        part_offset: See there.
        weight_D: See there.
        eps: See there.
        residual_TD: See there.
        constants: What only this kernel takes, and options of its launch.
    """
    num_tokens, dim = out_TD.shape
    if num_tokens == 0:
        return out_TD
    block_d = next_power_of_two(dim)
    has_norm = weight_D is not None
    assert has_norm == (residual_TD is not None)
    assert residual_TD is None or (residual_TD.shape == out_TD.shape and residual_TD.stride(1) == 1)
    kernel[(num_programs,)](
        peers.table_address,
        peers.words,
        peers.epochs,
        out_TD if weight_D is None else weight_D,
        out_TD if residual_TD is None else residual_TD,
        out_TD,
        num_tokens,
        0 if residual_TD is None else residual_TD.stride(0),
        eps,
        PART_OFFSET=part_offset,
        SIGNAL_WORD=peers.signal_word,
        RANK=peers.rank,
        WORLD=peers.world_size,
        DIM=dim,
        BLOCK_D=block_d,
        HAS_NORM=has_norm,
        # 16 bytes a thread and load, as in `rms_norm`.
        num_warps=min(max(block_d // 256, 1), 16),
        **constants,
    )
    return out_TD
