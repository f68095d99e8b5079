"""Which part of a tensor each rank holds.

The one place where a split becomes index ranges: memory, plan and executor all cut by these
functions, so that what is predicted is what is loaded. Ranges are half-open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rankwright.cost_model.model_spec import Attention, ModelSpec

Range = tuple[int, int]  # first, one past the last

# Columns that ranks cannot share evenly are cut in units of up to this many, so that each rank's
# matrices keep sides that tensor cores and 16-byte loads like: cuBLAS falls back to slower kernels
# where a side is no multiple of 8 values of two bytes.
_COLUMN_UNIT = 64
# A unit is at most this part of what a rank gets, so that ranks differ by that little.
_UNITS_PER_RANK = 32


@dataclass(frozen=True, slots=True)
class Shares:
    """Unequal parts of a stage's ranks, by `tp_rank`, in layers that are all cut alike.

    Args:
        query_heads: Heads of each rank.
        columns: Feed-forward columns of each rank; in layers with experts, of each expert.
        vocab: Rows of embedding and head of each rank.
    """

    query_heads: tuple[int, ...]
    columns: tuple[int, ...]
    vocab: tuple[int, ...]

    def of(self, tp_rank: int) -> tuple[int, int, int]:
        """Return the heads, columns and rows of one rank."""
        return self.query_heads[tp_rank], self.columns[tp_rank], self.vocab[tp_rank]


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


def sized_range(sizes: Sequence[int], index: int) -> Range:
    """Return the part `index` of parts that have these sizes.

    >>> sized_range((6, 2), 1)
    (6, 8)
    """
    start = sum(sizes[:index])
    return start, start + sizes[index]


def column_unit(total: int, parts: int) -> int:
    """Return the unit that `total` columns are cut in where `parts` ranks do not get equal parts.

    >>> column_unit(14336, 3)
    64
    """
    unit = _COLUMN_UNIT
    while unit > 1 and (total % unit or unit * _UNITS_PER_RANK * parts > total):
        unit //= 2
    return unit


def column_range(total: int, parts: int, index: int, sizes: Sequence[int] | None = None) -> Range:
    """Return the part `index` of `total` rows or columns of a matrix, cut for matrix products.

    Even where it can be; else in units, of which the first parts get one more.

    >>> [column_range(14336, 3, index) for index in range(3)]
    [(0, 4800), (4800, 9600), (9600, 14336)]

    With `sizes`, the parts are of these instead.
    """
    if sizes is not None:
        return sized_range(sizes, index)
    unit = 1 if total % parts == 0 else column_unit(total, parts)
    start, stop = even_range(total // unit, parts, index)
    return start * unit, stop * unit


def head_ranges(
    attention: Attention, tp: int, tp_rank: int, shares: Shares | None = None
) -> tuple[Range, Range]:
    """Return the query heads and the KV heads of one rank; no rank has more than rank 0.

    Query head `i` reads KV head `i // (num_heads // num_kv_heads)`. A rank holds the KV heads that
    its query heads read: as few as can be on the rank with most, because every token is cached for
    each; then as few query heads as can be. So a group of query heads may be cut between ranks,
    which both hold its KV head. MLA has one latent for all heads, which every rank holds: its KV
    range is `(0, 1)`. With `shares`, query heads are those that these say.

    >>> gqa = Attention(kind="gqa", num_heads=32, num_kv_heads=8, head_dim=128, value_head_dim=128)
    >>> head_ranges(gqa, 4, 1)
    ((8, 16), (2, 4))
    >>> head_ranges(gqa, 16, 3)
    ((6, 8), (1, 2))
    >>> [head_ranges(gqa, 6, rank) for rank in (0, 1, 5)]
    [((0, 6), (0, 2)), ((6, 12), (1, 3)), ((27, 32), (6, 8))]

    Raises:
        ValueError: There are more ranks than heads, or no such rank.
    """
    num_heads = attention.num_heads
    if tp > num_heads:
        raise ValueError(_too_many(tp, num_heads))
    if not 0 <= tp_rank < tp:
        raise ValueError(f"part {tp_rank} of {tp}: expected 0 <= part < parts")
    group = num_heads // attention.num_kv_heads
    if shares is not None:
        query = sized_range(shares.query_heads, tp_rank)
    elif attention.kind == "mla":
        query = even_range(num_heads, tp, tp_rank)
    else:
        query = _query_ranges(num_heads, group, tp)[tp_rank]
    if attention.kind == "mla":
        return query, (0, 1)
    return query, (query[0] // group, (query[1] - 1) // group + 1)


@lru_cache(maxsize=4096)
def _query_ranges(num_heads: int, group: int, tp: int) -> tuple[Range, ...]:
    """Return the query heads of every rank."""
    even = tuple(even_range(num_heads, tp, rank) for rank in range(tp))
    most_groups = -(-(num_heads // group) // tp)
    if all(_groups_of(part, group) <= most_groups for part in even):
        return even
    for most_heads in range(-(-num_heads // tp), most_groups * group + 1):
        parts = _filled(num_heads, group, tp, most_groups, most_heads)
        if parts[-1][1] == num_heads:
            return parts
    raise AssertionError("whole groups always fit")


def _filled(
    num_heads: int, group: int, tp: int, most_groups: int, most_heads: int
) -> tuple[Range, ...]:
    """Return ranges that take what they may, one after another, and leave a head for each other."""
    parts: list[Range] = []
    start = 0
    for rank in range(tp):
        last_group = start // group + most_groups
        stop = min(start + most_heads, last_group * group, num_heads - (tp - 1 - rank))
        parts.append((start, stop))
        start = stop
    return tuple(parts)


def _groups_of(heads: Range, group: int) -> int:
    return (heads[1] - 1) // group + 1 - heads[0] // group


def tp_is_legal(spec: ModelSpec, tp: int, *, whole_heads: bool = False) -> str | None:
    """Return why `spec` cannot be cut over `tp` ranks, or None where it can.

    Nothing needs to divide, but each rank needs one at least of query heads, feed-forward columns
    and vocabulary rows.

    Args:
        spec: The model.
        tp: Ranks of a stage.
        whole_heads: Whether every rank has all heads, as under attention DP.
    """
    if tp < 1:
        return f"tp={tp}: expected 1 or more"
    for run in spec.layer_runs:
        if not whole_heads and tp > run.layer.attention.num_heads:
            return _too_many(tp, run.layer.attention.num_heads)
        block = run.layer.feed_forward
        columns = min(block.intermediate_size, block.shared_intermediate_size or tp)
        if columns < tp:
            return f"tp={tp} leaves ranks without any of the {columns} feed-forward columns"
    if spec.vocab_size < tp:
        return f"tp={tp} leaves ranks without any of the {spec.vocab_size} vocabulary rows"
    return None


def _too_many(tp: int, num_heads: int) -> str:
    return f"tp={tp} leaves ranks without any of the {num_heads} query heads"
