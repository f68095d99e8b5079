"""Tokens to the ranks that hold their experts and back, through memory that GPUs share.

Shapes: T tokens of each rank, K experts a token, R ranks, D hidden size.

For decode-size steps inside CUDA graphs: how many tokens go where is not known to the host, so each
rank has room in every other's memory for all of its tokens, row `source * T + t` for token `t` of
rank `source`.
*Dispatch* writes a token, its slots and its weights into the memory of each rank that holds one of
its experts; where none is, only that: slots of -1, which the grouped products leave out. *Combine*
reads, for each own token, what those ranks made of it, from their memory, and adds it up in the
order of ranks. Both end or begin where all ranks have met (`all_reduce.meet`), so that what was
written is there, and may be written again by the next dispatch: a rank comes to that when all have
been through this combine's meeting, after their products read what arrived. Sums are read behind
that meeting; their owner writes them again behind the meeting of the next dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwright.kernels.all_reduce import MAX_PROGRAMS, meet
from rankwright.kernels.backend import jit, next_power_of_two, tl


@dataclass(frozen=True, slots=True)
class ExchangeMemory:
    """Where everything is in the memory of each rank, equal on all of them.

    Args:
        table_address: On the device, addresses of every rank's memory, int64 [R].
        words: This rank's words that peers tell it by, int32 [MAX_PROGRAMS * R].
        epochs: How often each program has met its peers, int32 [MAX_PROGRAMS].
        signal_word: Where the words begin, int32 values.
        slots_word: Where the slots that arrive begin, int32 values: [R * T, K].
        weights_word: Where their weights begin, float32 values: [R * T, K].
        rows_offset: Where the tokens that arrive begin, values of their dtype: [R * T, D].
        parts_offset: Where begins what this rank made of them, the same: [R * T, D].
        capacity: T at most.
        rank: This rank.
        world_size: R.
        moe_tp: Ranks that share each expert: `rank // moe_tp` says which experts a rank has.
    """

    table_address: int
    words: torch.Tensor
    epochs: torch.Tensor
    signal_word: int
    slots_word: int
    weights_word: int
    rows_offset: int
    parts_offset: int
    capacity: int
    rank: int
    world_size: int
    moe_tp: int


def dispatch_reference(
    tokens: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    slots_of_ranks: list[tuple[int, int]],
    moe_tp: int,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return what arrives at each rank: rows [R T, D], weights and slots [R T, K].

    Rows without an expert there are zeros, as are weights of experts that are elsewhere.

    Args:
        tokens: Of each rank: x [T, D], weights [T, K], slots [T, K] over all ranks.
        slots_of_ranks: First slot, and one past the last, of each `rank // moe_tp`.
        moe_tp: Ranks that share each expert.
    """
    x_ND, weights_NK, slots_NK = (torch.cat(all_ranks) for all_ranks in zip(*tokens, strict=True))
    arrived = []
    for rank in range(len(tokens)):
        first, stop = slots_of_ranks[rank // moe_tp]
        here_NK = (slots_NK >= first) & (slots_NK < stop)
        rows_ND = x_ND * here_NK.any(1, keepdim=True)
        arrived.append((rows_ND, weights_NK * here_NK, (slots_NK - first).where(here_NK, -1)))
    return arrived


def combine_reference(
    parts: list[torch.Tensor],
    slots_TK: torch.Tensor,
    slots_of_ranks: list[tuple[int, int]],
    moe_tp: int,
    rank: int,
) -> torch.Tensor:
    """Return [T, D]: the sum, in float32, of what ranks made of this rank's tokens.

    Args:
        parts: What each rank made of what arrived there, [R T, D].
        slots_TK: Of this rank's tokens, over all ranks.
        slots_of_ranks: As `dispatch_reference` takes it.
        moe_tp: As there.
        rank: This rank.
    """
    num_tokens = len(slots_TK)
    out_TD = torch.zeros(num_tokens, parts[0].shape[1], device=slots_TK.device)
    for peer, made in enumerate(parts):
        first, stop = slots_of_ranks[peer // moe_tp]
        here = ((slots_TK >= first) & (slots_TK < stop)).any(1, keepdim=True)
        mine = made[rank * num_tokens : (rank + 1) * num_tokens].float()
        out_TD += torch.where(here, mine, 0.0)
    return out_TD.to(parts[0].dtype)


@jit()
def held_by(slots, starts_ptr, rank, MOE_TP: tl.constexpr):
    """Return the first slot of a rank, and which of a token's `slots` it holds."""
    first = tl.load(starts_ptr + rank // MOE_TP)
    stop = tl.load(starts_ptr + rank // MOE_TP + 1)
    return first, (slots >= first) & (slots < stop)


@jit(do_not_specialize=("num_tokens",))
def _dispatch_kernel(
    table_address,
    words_ptr,
    epochs_ptr,
    x_ptr,
    weights_ptr,
    slots_ptr,
    starts_ptr,
    num_tokens,
    x_stride,
    SIGNAL_WORD: tl.constexpr,
    SLOTS_WORD: tl.constexpr,
    WEIGHTS_WORD: tl.constexpr,
    ROWS_OFFSET: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    MOE_TP: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    table = table_address.to(tl.pointer_type(tl.int64))
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    for token_number in range(program, num_tokens, tl.num_programs(0)):
        token = tl.cast(token_number, tl.int64)
        slots = tl.load(slots_ptr + token * TOP_K + k, mask=k < TOP_K, other=-1)
        weights = tl.load(weights_ptr + token * TOP_K + k, mask=k < TOP_K, other=0.0)
        x = tl.load(x_ptr + token * x_stride + d, mask=d < DIM)
        row = tl.cast(num_tokens, tl.int64) * RANK + token
        for step in tl.static_range(WORLD):  # pyright: ignore[reportGeneralTypeIssues]
            peer = (RANK + step) % WORLD  # so that ranks do not all write to the first at once
            first, here = held_by(slots, starts_ptr, peer, MOE_TP)
            address = tl.load(table + peer)
            slots_at = address.to(tl.pointer_type(tl.int32)) + SLOTS_WORD + row * TOP_K + k
            tl.store(slots_at, tl.where(here, slots - first, -1), mask=k < TOP_K)
            weights_at = address.to(tl.pointer_type(tl.float32)) + WEIGHTS_WORD + row * TOP_K + k
            tl.store(weights_at, tl.where(here, weights, 0.0), mask=k < TOP_K)
            goes = tl.max(here.to(tl.int32), axis=0) > 0
            base = tl.multiple_of(address.to(tl.pointer_type(x_ptr.dtype.element_ty)), 16)
            tl.store(base + ROWS_OFFSET + row * DIM + d, x, mask=(d < DIM) & goes)
    meet(table, words_ptr, epochs_ptr, SIGNAL_WORD, program, RANK, WORLD)


@jit(do_not_specialize=("num_tokens",))
def _combine_kernel(
    table_address,
    words_ptr,
    epochs_ptr,
    slots_ptr,
    starts_ptr,
    base_ptr,
    out_ptr,
    num_tokens,
    base_stride,
    SIGNAL_WORD: tl.constexpr,
    PARTS_OFFSET: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    MOE_TP: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    program = tl.program_id(0)
    table = table_address.to(tl.pointer_type(tl.int64))
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    out_type = out_ptr.dtype.element_ty
    meet(table, words_ptr, epochs_ptr, SIGNAL_WORD, program, RANK, WORLD)
    for token_number in range(program, num_tokens, tl.num_programs(0)):
        token = tl.cast(token_number, tl.int64)
        row = tl.cast(num_tokens, tl.int64) * RANK + token
        slots = tl.load(slots_ptr + token * TOP_K + k, mask=k < TOP_K, other=-1)
        total = tl.zeros([BLOCK_D], tl.float32)
        for peer in tl.static_range(WORLD):
            _, there = held_by(slots, starts_ptr, peer, MOE_TP)
            went = tl.max(there.to(tl.int32), axis=0) > 0
            base = tl.multiple_of(tl.load(table + peer).to(tl.pointer_type(out_type)), 16)
            part_at = base + PARTS_OFFSET + row * DIM + d
            total += tl.load(part_at, mask=(d < DIM) & went, other=0.0).to(tl.float32)
        # Rounded as a sum that is written and read again is.
        total = total.to(out_type).to(tl.float32)
        if HAS_BASE:
            base_at = base_ptr + token * base_stride + d
            total += tl.load(base_at, mask=d < DIM, other=0.0).to(tl.float32)
        tl.store(out_ptr + token * DIM + d, total.to(out_type), mask=d < DIM)


def dispatch_tokens(
    x_TD: torch.Tensor,
    weights_TK: torch.Tensor,
    slots_TK: torch.Tensor,
    starts: torch.Tensor,
    memory: ExchangeMemory,
) -> None:
    """Write each token to the ranks that hold its experts; return when all ranks' have arrived.

    Args:
        x_TD: Tokens of this rank, as many on every rank; rows may be strided.
        weights_TK: float32, dense.
        slots_TK: int32, dense, over all ranks; -1: none.
        starts: int32, first slot of each rank's experts and one past the last of all.
        memory: Of all ranks.

    Raises:
        ValueError: There are more tokens than room.
    """
    _check_room(len(x_TD), memory)
    num_tokens, dim = x_TD.shape
    _dispatch_kernel[(_num_programs(num_tokens),)](
        memory.table_address,
        memory.words,
        memory.epochs,
        x_TD,
        weights_TK,
        slots_TK,
        starts,
        num_tokens,
        x_TD.stride(0),
        SLOTS_WORD=memory.slots_word,
        WEIGHTS_WORD=memory.weights_word,
        ROWS_OFFSET=memory.rows_offset,
        **_launch_constants(slots_TK.shape[1], dim, memory),
    )


def combine_tokens(
    out_TD: torch.Tensor,
    slots_TK: torch.Tensor,
    starts: torch.Tensor,
    memory: ExchangeMemory,
    *,
    base_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out_TD`, the sum of what all ranks made of this rank's tokens, and of `base_TD`.

    Args:
        out_TD: Written; dense rows.
        slots_TK: As `dispatch_tokens` had it.
        starts: As there.
        memory: Of all ranks.
        base_TD: Added, as what shared experts made of the tokens; rows may be strided.

    Raises:
        ValueError: There are more tokens than room.
    """
    _check_room(len(out_TD), memory)
    num_tokens, dim = out_TD.shape
    _combine_kernel[(_num_programs(num_tokens),)](
        memory.table_address,
        memory.words,
        memory.epochs,
        slots_TK,
        starts,
        out_TD if base_TD is None else base_TD,
        out_TD,
        num_tokens,
        0 if base_TD is None else base_TD.stride(0),
        PARTS_OFFSET=memory.parts_offset,
        HAS_BASE=base_TD is not None,
        **_launch_constants(slots_TK.shape[1], dim, memory),
    )
    return out_TD


def _check_room(num_tokens: int, memory: ExchangeMemory) -> None:
    if num_tokens > memory.capacity:
        raise ValueError(f"{num_tokens} tokens of a rank, and there is room for {memory.capacity}")


def _num_programs(num_tokens: int) -> int:
    # One at least: a rank without tokens still meets the others, who have as many programs.
    return min(max(num_tokens, 1), MAX_PROGRAMS)


def _launch_constants(top_k: int, dim: int, memory: ExchangeMemory) -> dict[str, int]:
    block_d = next_power_of_two(dim)
    return {
        "SIGNAL_WORD": memory.signal_word,
        "RANK": memory.rank,
        "WORLD": memory.world_size,
        "MOE_TP": memory.moe_tp,
        "TOP_K": top_k,
        "BLOCK_K": next_power_of_two(top_k),
        "DIM": dim,
        "BLOCK_D": block_d,
        # 16 bytes a thread and load, as in `all_reduce`.
        "num_warps": min(max(block_d // 256, 1), 16),
    }
