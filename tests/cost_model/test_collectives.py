import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    find_group,
    peer_sum_s,
    reduce_scatter_s,
    send_s,
)
from rankwright.cost_model.efficiency import AllReduce
from rankwright.cost_model.peer_sums import PeerSums, peer_sums
from rankwright.topology.shorthand import parse_cluster

NVLINK = 450e9
BOTH: tuple[AllReduce, ...] = ("library", "one_shot")
H200_PAIR = Group(2, bytes_per_s=NVLINK, latency_s=0.8e-6)


def test_one_rank_exchanges_nothing() -> None:
    alone = Group(1)
    assert all_reduce_s(1e6, alone) == all_gather_s(1e6, alone) == all_to_all_s(1e6, alone) == 0


# Measured on two H200 through torch and NCCL inside a CUDA graph: bytes, microseconds.
@pytest.mark.parametrize(
    ("size", "measured_us"),
    [(64 << 10, 11.3), (256 << 10, 13.1), (1 << 20, 18.6), (4 << 20, 36), (256 << 20, 894)],
)
def test_ring_matches_what_two_h200_measured(size: int, measured_us: float) -> None:
    assert all_reduce_s(size, H200_PAIR) * 1e6 == pytest.approx(measured_us, rel=0.12)


def test_ring_by_hand() -> None:
    # Four ranks, 1 MB: 6 hops of 1 us, 1.5 MB at the low-latency protocol's 160 GB/s, 9.7 us start.
    group = Group(4, bytes_per_s=NVLINK, latency_s=1e-6)
    assert all_reduce_s(1e6, group) == pytest.approx(9.7e-6 + 6e-6 + 1.5e6 / 160e9)


def test_one_shot_wins_when_small_and_the_library_when_large() -> None:
    group = Group(8, bytes_per_s=NVLINK, latency_s=0.8e-6)
    assert all_reduce_s(16 << 10, group, BOTH) < 0.6 * all_reduce_s(16 << 10, group)
    assert all_reduce_s(1 << 30, group, BOTH) == all_reduce_s(1 << 30, group)


def test_sums_over_peer_memory_by_hand() -> None:
    # Four ranks, 1 MB at 0.62 of 500 GB/s: three parts are read, or half as much twice over.
    group = Group(4, bytes_per_s=500e9, latency_s=1e-6)
    assert peer_sum_s("one_shot", 1e6, group) == pytest.approx(4.2e-6 + 3e6 / 310e9 + 2e-6)
    assert peer_sum_s("two_shot", 1e6, group) == pytest.approx(8e-6 + 1.5e6 / 310e9 + 4e-6)
    assert peer_sum_s("library", 1e6, group) == all_reduce_s(1e6, group)


def test_each_size_is_summed_by_the_first_form_that_takes_it() -> None:
    table = PeerSums(one_shot_bytes=8, two_shot_bytes=64)
    assert [table.algorithm(size) for size in (1, 8, 9, 64, 65)] == [
        "one_shot", "one_shot", "two_shot", "two_shot", "library",
    ]  # fmt: skip
    assert table.max_bytes == 64
    assert PeerSums(one_shot_bytes=8).algorithm(9) == "library"
    assert peer_sums(7).max_bytes == 0


def test_a_group_over_two_nodes_pays_for_the_fabric() -> None:
    cluster = parse_cluster("2x8xh100-sxm+ib400")
    near = find_group(cluster, tuple((0, gpu) for gpu in range(8)))
    far = find_group(cluster, tuple((node, gpu) for node in (0, 1) for gpu in range(8)))
    assert (near.num_nodes, near.bytes_per_s) == (1, 450e9)
    assert (far.num_nodes, far.local_size, far.network_bytes_per_s) == (2, 8, 50e9)
    for size in (1 << 10, 1 << 20, 1 << 28):
        assert all_reduce_s(size, far) > all_reduce_s(size, near)


def test_send_between_nodes_by_hand() -> None:
    cluster = parse_cluster("2x8xh100-sxm+ib400")
    pair = find_group(cluster, ((0, 0), (1, 0)))
    # 4.2 us start, 12 us of InfiniBand, 36 MB at 36 GB/s (0.72 of a 400 Gb/s port): 1 ms.
    assert send_s(36e6, pair) == pytest.approx(4.2e-6 + 12e-6 + 1e-3)


groups = st.builds(
    Group,
    size=st.integers(2, 64),
    num_nodes=st.just(1),
    bytes_per_s=st.floats(1e9, 1e12),
    latency_s=st.floats(1e-7, 1e-4),
)


@given(groups, st.floats(1, 1e10), st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(group: Group, size: float, factor: float) -> None:
    faster = Group(group.size, 1, group.bytes_per_s * factor, group.latency_s)
    for collective in (all_reduce_s, all_gather_s, reduce_scatter_s, all_to_all_s, send_s):
        assert collective(size, faster) <= collective(size, group)


@given(groups, st.floats(1, 1e10), st.floats(1.0, 10.0))
def test_more_bytes_are_never_faster(group: Group, size: float, factor: float) -> None:
    assert all_reduce_s(size, group, BOTH) <= all_reduce_s(size * factor, group, BOTH)
    assert all_gather_s(size, group) <= all_gather_s(size * factor, group)
