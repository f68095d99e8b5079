"""Which part of a tensor each rank holds.

The one place where a split becomes index ranges: memory, plan and executor all cut by these
functions, so that what is predicted is what is loaded. Ranges are half-open.
"""

from rankwright.cost_model.model_spec import Attention, ModelSpec

Range = tuple[int, int]  # first, one past the last


def even_range(total: int, parts: int, index: int) -> Range:
    """Return the part `index` of `total` things cut into `parts` that differ by one at most.

    The first `total % parts` parts get one more, so that part 0 is never smaller than another.

    >>> [even_range(10, 4, index) for index in range(4)]
    [(0, 3), (3, 6), (6, 8), (8, 10)]

    Raises:
        ValueError: `parts` is below 1 or `index` is no part.
    """
    if parts < 1 or not 0 <= index < parts:
        raise ValueError(f"part {index} of {parts}: expected 0 <= part < parts")
    size, extra = divmod(total, parts)
    start = index * size + min(index, extra)
    return start, start + size + (index < extra)


def range_size(bounds: Range) -> int:
    """Return how many things are in `bounds`.

    >>> range_size((3, 6))
    3
    """
    return bounds[1] - bounds[0]


def head_ranges(attention: Attention, tp: int, tp_rank: int) -> tuple[Range, Range]:
    """Return the query heads and the KV heads of one rank.

    Query head `i` reads KV head `i // (num_heads // num_kv_heads)`. With more ranks than KV heads,
    `tp // num_kv_heads` neighbours hold the same KV head. MLA has one latent for all heads, which
    every rank holds: its KV range is `(0, 1)`.

    >>> gqa = Attention(kind="gqa", num_heads=32, num_kv_heads=8, head_dim=128, value_head_dim=128)
    >>> head_ranges(gqa, 4, 1)
    ((8, 16), (2, 4))
    >>> head_ranges(gqa, 16, 3)
    ((6, 8), (1, 2))

    Raises:
        ValueError: these heads cannot be cut over `tp` ranks.
    """
    reason = _cannot_cut(attention, tp)
    if reason is not None:
        raise ValueError(reason)
    query = even_range(attention.num_heads, tp, tp_rank)
    if attention.kind == "mla":
        return query, (0, 1)
    group = attention.num_heads // attention.num_kv_heads
    return query, (query[0] // group, (query[1] - 1) // group + 1)


def tp_is_legal(spec: ModelSpec, tp: int) -> str | None:
    """Return why `spec` cannot be cut over `tp` ranks, or None where it can.

    Heads must divide: `tp` divides the query heads, and the KV heads are a multiple or a divisor of
    `tp`. Vocabulary and feed-forward columns may be uneven, but each rank needs one at least.
    """
    if tp < 1:
        return f"tp={tp}: expected 1 or more"
    for run in spec.layer_runs:
        reason = _cannot_cut(run.layer.attention, tp)
        if reason is not None:
            return reason
        block = run.layer.feed_forward
        columns = min(block.intermediate_size, block.shared_intermediate_size or tp)
        if columns < tp:
            return f"tp={tp} leaves ranks without any of the {columns} feed-forward columns"
    if spec.vocab_size < tp:
        return f"tp={tp} leaves ranks without any of the {spec.vocab_size} vocabulary rows"
    return None


def _cannot_cut(attention: Attention, tp: int) -> str | None:
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    if num_heads % tp:
        return f"tp={tp} does not divide the {num_heads} query heads"
    if attention.kind != "mla" and num_kv_heads % tp and tp % num_kv_heads:
        return f"tp={tp} is neither a divisor nor a multiple of the {num_kv_heads} KV heads"
    return None
