"""Shards: ranges tile exactly, and each rank holds the KV heads that its query heads read."""

from itertools import combinations, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rankwright.cost_model.model_spec import Attention
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.shards import (
    column_range,
    even_range,
    head_ranges,
    range_size,
    tp_is_legal,
)


def grouped(num_heads: int, num_kv_heads: int) -> Attention:
    return Attention(
        kind="gqa",
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        value_head_dim=64,
    )


@st.composite
def attentions_and_tp(draw: st.DrawFn) -> tuple[Attention, int]:
    """Grouped attention with a TP degree that its heads allow: any up to their number."""
    num_kv_heads = draw(st.integers(1, 12))
    num_heads = num_kv_heads * draw(st.integers(1, 8))
    return grouped(num_heads, num_kv_heads), draw(st.integers(1, num_heads))


def test_ten_over_four_is_three_three_two_two() -> None:
    assert [even_range(10, 4, i) for i in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_fewer_things_than_parts_leaves_the_last_parts_empty() -> None:
    assert [range_size(even_range(2, 4, i)) for i in range(4)] == [1, 1, 0, 0]


@pytest.mark.parametrize(("parts", "index"), [(0, 0), (2, 2), (2, -1)])
def test_a_part_that_is_none_is_refused(parts: int, index: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= part < parts"):
        even_range(8, parts, index)


@given(total=st.integers(0, 500_000), parts=st.integers(1, 300))
def test_even_ranges_tile_and_the_first_is_the_largest(total: int, parts: int) -> None:
    ranges = [even_range(total, parts, index) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    sizes = [range_size(bounds) for bounds in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_kv_heads_are_replicated_when_there_are_more_ranks() -> None:
    assert [head_ranges(grouped(32, 8), 16, r)[1] for r in range(4)] == [
        (0, 1),
        (0, 1),
        (1, 2),
        (1, 2),
    ]


def test_smollm_cuts_nine_and_three_heads_over_three_ranks() -> None:
    attention = read_model("HuggingFaceTB/SmolLM2-135M-Instruct").layers[0].attention
    assert [head_ranges(attention, 3, r) for r in range(3)] == [
        ((0, 3), (0, 1)),
        ((3, 6), (1, 2)),
        ((6, 9), (2, 3)),
    ]
    assert head_ranges(attention, 9, 5) == ((5, 6), (1, 2))


def test_latent_attention_cuts_query_heads_and_replicates_the_latent() -> None:
    attention = read_model("deepseek-ai/DeepSeek-V3").layers[0].attention
    assert head_ranges(attention, 16, 15) == ((120, 128), (0, 1))


@given(attentions_and_tp())
def test_query_ranges_tile_and_kv_ranges_are_what_they_read(case: tuple[Attention, int]) -> None:
    attention, tp = case
    group = attention.num_heads // attention.num_kv_heads
    query_heads: list[int] = []
    kv_heads: set[int] = set()
    for rank in range(tp):
        query, kv = head_ranges(attention, tp, rank)
        query_heads += range(*query)
        kv_heads |= set(range(*kv))
        assert range_size(query) >= 1
        assert {head // group for head in range(*query)} == set(range(*kv))
    assert query_heads == list(range(attention.num_heads))
    assert kv_heads == set(range(attention.num_kv_heads))


@given(attentions_and_tp())
def test_the_fullest_rank_is_the_first_and_holds_as_little_as_can_be(
    case: tuple[Attention, int],
) -> None:
    attention, tp = case
    ranks = [head_ranges(attention, tp, rank) for rank in range(tp)]
    queries, kvs = ([range_size(part) for part in parts] for parts in zip(*ranks, strict=True))
    assert queries[0] == max(queries)
    assert kvs[0] == max(kvs) == -(-attention.num_kv_heads // tp)


@given(num_kv_heads=st.integers(1, 4), group=st.integers(1, 3), tp=st.integers(1, 5))
def test_no_cut_is_better(num_kv_heads: int, group: int, tp: int) -> None:
    num_heads = num_kv_heads * group
    assume(tp <= num_heads)
    attention = grouped(num_heads, num_kv_heads)
    found = [head_ranges(attention, tp, rank) for rank in range(tp)]
    ours = (max(range_size(kv) for _, kv in found), max(range_size(q) for q, _ in found))
    for cuts in combinations(range(1, num_heads), tp - 1):
        parts = list(pairwise((0, *cuts, num_heads)))
        kv = max((stop - 1) // group + 1 - start // group for start, stop in parts)
        assert ours <= (kv, max(stop - start for start, stop in parts))


def test_smollm_heads_over_two_four_and_five_ranks() -> None:
    attention = read_model("HuggingFaceTB/SmolLM2-135M-Instruct").layers[0].attention
    assert [head_ranges(attention, 2, rank) for rank in range(2)] == [
        ((0, 5), (0, 2)),
        ((5, 9), (1, 3)),
    ]
    queries, kvs = zip(*[head_ranges(attention, 4, rank) for rank in range(4)], strict=True)
    assert [range_size(part) for part in queries] == [3, 3, 2, 1]
    assert kvs == ((0, 1), (1, 2), (2, 3), (2, 3))
    assert [range_size(head_ranges(attention, 5, rank)[1]) for rank in range(5)] == [1] * 5


@given(total=st.integers(1, 300_000), parts=st.integers(1, 64))
def test_columns_tile_and_differ_by_little(total: int, parts: int) -> None:
    assume(parts <= total)
    ranges = [column_range(total, parts, index) for index in range(parts)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    sizes = [range_size(bounds) for bounds in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 1
    assert sizes[0] - sizes[-1] <= max(1, sizes[0] / 32)


def test_uneven_columns_keep_sides_that_matrix_products_like() -> None:
    for total, parts in ((14336, 3), (152064, 5), (28672, 7)):
        assert all(column_range(total, parts, i)[1] % 64 == 0 for i in range(parts))


@pytest.mark.parametrize(
    ("model", "tp", "reason"),
    [
        ("meta-llama/Llama-3.1-8B", 33, "leaves ranks without any of the 32 query heads"),
        ("HuggingFaceTB/SmolLM2-135M", 10, "leaves ranks without any of the 9 query heads"),
        ("Qwen/Qwen2.5-7B", 0, "expected 1 or more"),
    ],
)
def test_an_illegal_degree_says_why(model: str, tp: int, reason: str) -> None:
    assert reason in str(tp_is_legal(read_model(model), tp))


@pytest.mark.parametrize("tp", [1, 2, 3, 5, 6, 7, 8, 31, 32])
def test_any_degree_up_to_the_heads_is_legal(tp: int) -> None:
    assert tp_is_legal(read_model("meta-llama/Llama-3.1-8B"), tp) is None


def test_illegal_ranges_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="tp=33 leaves ranks without any of the 32 query heads"):
        head_ranges(grouped(32, 8), 33, 0)
    with pytest.raises(ValueError, match="part 3 of 3: expected 0 <= part < parts"):
        head_ranges(grouped(32, 8), 3, 3)
