"""The units in which a model is dealt over ranks that get unequal shares.

What the executor can hold and its kernels like: whole groups of heads, so that no key and value
head is cached twice, and columns and rows in multiples of what `shards.column_range` cuts by.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.shards import Shares, column_unit, head_ranges, range_size

# Units of a part at most: a rank's share is then within a percent or two of what is best for it.
_MOST_UNITS = 256


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model as `count` units of `size`, of which the last may be smaller.

    Args:
        total: Heads, columns or rows.
        size: Of a unit.
        count: Units.
        even: What each rank holds where the part is not dealt: each then has one unit.
    """

    total: int
    size: int
    count: int
    even: tuple[int, ...] = ()

    def held(self, units: Sequence[int]) -> tuple[int, ...]:
        """Return what each rank holds, where they have so many units; the last unit is the last's.

        >>> Part(100, 32, 4).held((3, 1))
        (96, 4)
        """
        if self.even:
            return self.even
        held = [number * self.size for number in units]
        held[-1] -= max(0, sum(held) - self.total)
        return tuple(held)


@dataclass(frozen=True, slots=True)
class Parts:
    """Heads, feed-forward columns and rows of the vocabulary."""

    heads: Part
    columns: Part
    rows: Part

    def all(self) -> tuple[Part, Part, Part]:
        """Return the three in the order of `Shares`."""
        return self.heads, self.columns, self.rows

    def shares(self, heads: Sequence[int], columns: Sequence[int], rows: Sequence[int]) -> Shares:
        """Return the shares of ranks with so many units of each."""
        return Shares(self.heads.held(heads), self.columns.held(columns), self.rows.held(rows))


def parts_of(model: ModelSpec, tp: int) -> Parts | None:
    """Return what is dealt to `tp` ranks; None where some would get nothing.

    Heads are dealt with their key and value head, whole: a group cut between ranks would be cached
    on both. Where these are fewer than ranks they stay as they are cut evenly. The latent of MLA
    and the one key and value head of MQA are on every rank anyway, so that there a head is a unit.
    """
    attention = model.layer_runs[0].layer.attention
    columns = _in_units(model.layer_runs[0].layer.feed_forward.intermediate_size, tp)
    rows = _in_units(model.vocab_size, tp)
    if min(columns.count, rows.count) < tp:
        return None
    group = attention.num_heads // attention.num_kv_heads
    size = 1 if attention.kind == "mla" or attention.num_kv_heads == 1 else group
    heads = Part(attention.num_heads, size, attention.num_heads // size)
    if heads.count < tp:
        even = [range_size(head_ranges(attention, tp, rank)[0]) for rank in range(tp)]
        heads = Part(attention.num_heads, size, tp, tuple(even))
    return Parts(heads, columns, rows)


def _in_units(total: int, tp: int) -> Part:
    unit = column_unit(total, tp)
    size = unit * -(-total // (unit * _MOST_UNITS))
    return Part(total, size, -(-total // size))
