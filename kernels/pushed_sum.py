"""Sum over the GPUs of one machine of few rows, each rank writing its part into its peers' memory.

Shapes: T tokens (rows), D hidden size, W = D / 2 words of two 16-bit values, R ranks.

One shot (`all_reduce.py`) tells the peers that a part is there, waits for theirs, and then reads
over the links and back: of a few kilobytes, latency is the whole cost. Here a word of a part goes
to each peer together with the number of the call, eight bytes that arrive at once or not at all
(as the "low latency" protocol of NCCL sends its data). Whoever waits for a word reads its own
memory until that number is in it, and has the word with it: one way over the links, no fence, no
meeting. Twice the bytes make that the worse way for large parts.

Words of calls alternate between two places. A rank writes those of call n + 2 once it has had every
peer's words of call n + 1, which a peer sends when it has read those of call n. The count of calls
is in memory, so a captured graph counts on. Parts are added in rank order, so that all ranks get
the same bits, those of `all_reduce.sum_parts`.
"""

from __future__ import annotations

import torch

from rankwright.kernels.backend import jit, next_power_of_two, tl
from rankwright.kernels.overlap import let_next_come, overlap, wait_for_last

# Rows of one call at most, a program each: all are on a GPU at once, so none waits for a peer's row
# whose program waits for a place.
MAX_ROWS = 128


def arrivals_words(max_rows: int, dim: int, world_size: int) -> int:
    """Return the int64 words that a rank keeps for what arrives: two places for each rank's part.

    Args:
        max_rows: Of a part.
        dim: 16-bit values of a row; even.
        world_size: Ranks.

    >>> arrivals_words(8, 4096, 2)
    65536
    """
    return 2 * world_size * max_rows * (dim // 2)


@jit()
def _of_words(ptr):
    return ptr.to(tl.pointer_type(tl.int32))


@jit()
def _low(words, VALUE: tl.constexpr):
    return words.to(tl.int16).to(VALUE, bitcast=True).to(tl.float32)


@jit()
def _high(words, VALUE: tl.constexpr):
    return (words >> 16).to(tl.int16).to(VALUE, bitcast=True).to(tl.float32)


@jit()
def _packed(low, high, VALUE: tl.constexpr):
    low_bits = low.to(VALUE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low_bits | (high.to(VALUE).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@jit()
def _arrived(at, epoch):
    """Return the words at `at` (int64), once the number of this call is in each."""
    found = tl.load(at, volatile=True)
    while tl.max(((found >> 32).to(tl.int32) != epoch).to(tl.int32), axis=0) > 0:
        found = tl.load(at, volatile=True)
    return found.to(tl.int32)


@jit()
def _pushed_sum_kernel(
    table_address,
    arrivals_ptr,
    epochs_ptr,
    part_ptr,
    weight_ptr,
    residual_ptr,
    out_ptr,
    part_stride,
    residual_stride,
    eps,
    WORD_OFFSET: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    let_next_come(OVERLAP)
    VALUE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0)
    w = tl.arange(0, BLOCK_W)
    mask = w < NUM_WORDS
    table = table_address.to(tl.pointer_type(tl.int64))
    # What no kernel writes is read while the one before still runs. One address brings its
    # neighbours into the cache.
    next_base = tl.load(table + (RANK + 1) % WORLD)
    if HAS_NORM:
        weight = tl.load(_of_words(weight_ptr) + w, mask=mask, other=0)
    wait_for_last(OVERLAP)
    epoch = tl.load(epochs_ptr + row) + 1
    own = tl.load(_of_words(part_ptr) + row * part_stride + w, mask=mask, other=0)
    if HAS_NORM:
        residual_at = _of_words(residual_ptr) + row * residual_stride + w
        residual = tl.load(residual_at, mask=mask, other=0)
    place = (epoch & 1) * (WORLD * MAX_ROWS)
    message = (epoch.to(tl.int64) << 32) | (own.to(tl.int64) & 0xFFFFFFFF)
    for step in tl.static_range(1, WORLD):  # pyright: ignore[reportGeneralTypeIssues]
        base = next_base if step == 1 else tl.load(table + (RANK + step) % WORLD)
        there = tl.multiple_of(base.to(tl.pointer_type(tl.int64)), 16) + WORD_OFFSET
        there += (place + RANK * MAX_ROWS + row) * NUM_WORDS
        tl.store(there + w, message, mask=mask)
    tl.debug_barrier()  # every word is sent before any is waited for, and the count is read
    tl.store(epochs_ptr + row, epoch)
    low = tl.zeros([BLOCK_W], tl.float32)
    high = tl.zeros([BLOCK_W], tl.float32)
    for source in tl.static_range(WORLD):  # pyright: ignore[reportGeneralTypeIssues]
        if source == RANK:
            words = own
        else:
            here = arrivals_ptr + (place + source * MAX_ROWS + row) * NUM_WORDS
            # A lane past the row must not wait for what nobody sends.
            words = _arrived(here + tl.minimum(w, NUM_WORDS - 1), epoch)
        low += _low(words, VALUE)
        high += _high(words, VALUE)
    if HAS_NORM:
        # Rounded as a sum that is written and read again is, and as the residual is.
        low = low.to(VALUE).to(tl.float32) + _low(residual, VALUE)
        high = high.to(VALUE).to(tl.float32) + _high(residual, VALUE)
        tl.store(residual_at, _packed(low, high, VALUE), mask=mask)
        low = tl.where(mask, low.to(VALUE).to(tl.float32), 0.0)
        high = tl.where(mask, high.to(VALUE).to(tl.float32), 0.0)
        square = tl.sum(low * low + high * high, axis=0)
        rstd = tl.rsqrt(square / (2 * NUM_WORDS) + eps)
        low = (low * rstd).to(VALUE).to(tl.float32) * _low(weight, VALUE)
        high = (high * rstd).to(VALUE).to(tl.float32) * _high(weight, VALUE)
    out_at = _of_words(out_ptr) + row * NUM_WORDS + w
    tl.store(out_at, _packed(low, high, VALUE), mask=mask)


def sum_pushed_parts(
    part_TD: torch.Tensor,
    out_TD: torch.Tensor,
    *,
    table_address: int,
    arrivals: torch.Tensor,
    epochs: torch.Tensor,
    word_offset: int,
    max_rows: int,
    rank: int,
    world_size: int,
    weight_D: torch.Tensor | None = None,
    eps: float = 0.0,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `out_TD`, as `all_reduce.sum_parts` would fill it; ranks must all choose alike.

    Args:
        part_TD: This rank's part, of 16-bit values; D is even.
        out_TD: Written; dense rows.
        table_address: On the device, addresses of every rank's memory, int64 [world_size].
        arrivals: This rank's room for what arrives, int64 [`arrivals_words`]; zeros at first.
        epochs: How often each row has been summed, int32 [max_rows]; zeros at first.
        word_offset: Where the words for arrivals begin in every rank's memory, int64 values.
        max_rows: Rows that there is room for, up to `MAX_ROWS`.
        rank: This rank.
        world_size: Ranks.
        weight_D: Factors of the norm; None: only the sum.
        eps: Added to the mean square.
        residual_TD: Becomes `residual_TD + sum` in place; with `weight_D`, of out's dtype.
    """
    num_tokens, dim = out_TD.shape
    if num_tokens == 0:
        return out_TD
    assert part_TD.shape == out_TD.shape
    assert num_tokens <= max_rows <= MAX_ROWS
    assert dim % 2 == 0
    assert part_TD.element_size() == 2
    has_norm = weight_D is not None
    assert has_norm == (residual_TD is not None)
    rows = [part_TD] + ([] if residual_TD is None else [residual_TD])
    assert all(row.stride(1) == 1 and row.stride(0) % 2 == 0 for row in rows)
    assert all(row.dtype == out_TD.dtype for row in rows)
    block_w = next_power_of_two(dim // 2)
    # 4 words a thread: 16 bytes of the part, 32 of what is sent.
    num_warps = min(max(block_w // 128, 1), 32)
    _pushed_sum_kernel[(num_tokens,)](
        table_address,
        arrivals,
        epochs,
        part_TD,
        out_TD if weight_D is None else weight_D,
        out_TD if residual_TD is None else residual_TD,
        out_TD,
        part_TD.stride(0) // 2,
        0 if residual_TD is None else residual_TD.stride(0) // 2,
        eps,
        WORD_OFFSET=word_offset,
        MAX_ROWS=max_rows,
        RANK=rank,
        WORLD=world_size,
        NUM_WORDS=dim // 2,
        BLOCK_W=block_w,
        HAS_NORM=has_norm,
        num_warps=num_warps,
        **overlap(out_TD),
    )
    return out_TD
