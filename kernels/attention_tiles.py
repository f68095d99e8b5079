"""What the attention kernels do with a tile of keys and values, and with the rows of a program.

Shapes: M query rows of a program, D head dimension, tiles of N context tokens. Sums run over tiles:
`total` is the sum of a row's weights, `acc` that of its weighted values, both relative to
`highest`, the row's largest score so far (base 2: scores come scaled by log2 e).
"""

from __future__ import annotations

from rankwright.kernels.backend import jit, tl


@jit()
def fold_in(scores, v, acc, total, highest, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Return the running sum, total and maximum with one more tile in them.

    Args:
        scores: [M, N]; -inf where a row does not look.
        v: Values of the tile [N, D].
        acc: Running sum [M, D].
        total: [M].
        highest: [M].
        MASKED: Whether a row may have seen nothing yet.
        PRECISION: Of the product.
    """
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # A row that has seen nothing has no maximum: keep inf - inf out of it.
    shift = tl.where(new_highest == -float("inf"), 0.0, new_highest) if MASKED else new_highest
    p = tl.exp2(scores - shift[:, None])
    shrink = tl.exp2(highest - shift)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_highest


@jit()
def attend_tiles(
    q,
    acc,
    total,
    highest,
    start,
    stop,
    k_at,
    v_at,
    table_at,
    k_block_stride,
    k_token_stride,
    v_block_stride,
    v_token_stride,
    scale_log2,
    position,
    window,
    context,
    part,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the running sum, total and maximum after the tiles `start` to `stop`.

    Tiles count what the cache has: every `PARTS`-th block of the sequence from number `part` on.
    """
    n = tl.arange(0, TILE)
    d = tl.arange(0, BLOCK_D)
    # Block numbers are loaded one tile ahead: loaded in place, they would take up pipeline stages
    # that keys and values need. int64: a pool may hold more than 2**31 values.
    next_block = tl.load(table_at + start * TILE // BLOCK_TOKENS, mask=start < stop, other=0)
    for tile in tl.range(start, stop):  # pyright: ignore[reportGeneralTypeIssues]
        first = tile * TILE
        block = next_block.to(tl.int64)
        next_first = first + TILE
        more = tile + 1 < stop
        next_block = tl.load(table_at + next_first // BLOCK_TOKENS, mask=more, other=0)
        offset = first % BLOCK_TOKENS + n
        k_tile = k_at + block * k_block_stride + offset[None, :] * k_token_stride + d[:, None]
        v_tile = v_at + block * v_block_stride + offset[:, None] * v_token_stride + d[None, :]
        token = first + n
        if PARTS > 1:
            token = (first // BLOCK_TOKENS * PARTS + part) * BLOCK_TOKENS + offset
        if MASKED:
            inside = token < context
            k = tl.load(k_tile, mask=inside[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_tile, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(k_tile, mask=(d < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(v_tile, mask=(d < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_tile)
            v = tl.load(v_tile)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale_log2
        if MASKED:
            ahead = position[:, None] - token[None, :]
            scores = tl.where((ahead >= 0) & (ahead < window), scores, -float("inf"))
        acc, total, highest = fold_in(scores, v, acc, total, highest, MASKED, PRECISION)
    return acc, total, highest


@jit()
def attend_rows(
    q,
    first,
    unmasked,
    last,
    k_at,
    v_at,
    table_at,
    k_block_stride,
    k_token_stride,
    v_block_stride,
    v_token_stride,
    scale_log2,
    position,
    window,
    context,
    part,
    PARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return sum, total and maximum of rows over the tiles `first` to `last`.

    Up to `unmasked` every row sees all; with a window that is `first`.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if not HAS_WINDOW:
        acc, total, highest = attend_tiles(
            q, acc, total, highest, first, unmasked, k_at, v_at, table_at,
            k_block_stride, k_token_stride, v_block_stride, v_token_stride,
            scale_log2, position, window, context, part,
            PARTS, HEAD_DIM, BLOCK_D, BLOCK_TOKENS, TILE, False, PRECISION,
        )  # fmt: skip
    return attend_tiles(
        q, acc, total, highest, unmasked, last, k_at, v_at, table_at,
        k_block_stride, k_token_stride, v_block_stride, v_token_stride,
        scale_log2, position, window, context, part,
        PARTS, HEAD_DIM, BLOCK_D, BLOCK_TOKENS, TILE, True, PRECISION,
    )  # fmt: skip


@jit()
def program_rows(
    q_ptr,
    work_ptr,
    q_stride_t,
    q_stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return a program's head, sequence, rows, their number, first position and queries.

    `prefill_config.prefill_work` says which rows. Heads run fastest, so that the heads of a group
    read their keys and values from L2.
    """
    head = tl.program_id(0)
    work = work_ptr + tl.program_id(1) * 4
    sequence = tl.load(work).to(tl.int64)
    first_row = tl.load(work + 1).to(tl.int64)
    num_rows = tl.load(work + 2)
    first_position = tl.load(work + 3)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row = first_row + m
    mask = (m < num_rows)[:, None] & (d < HEAD_DIM)[None, :]
    q_at = q_ptr + row[:, None] * q_stride_t + head * q_stride_h + d[None, :]
    return head, sequence, row, num_rows, first_position, tl.load(q_at, mask=mask, other=0.0)
