"""What was timed between machines becomes the rate of the fabric, and slow pairs are named."""

from itertools import combinations

import pytest

from rankwright.topology.apply_between import apply_between
from rankwright.topology.cluster import Cluster, Nic
from rankwright.topology.graph import port_share_bytes_per_s
from rankwright.topology.measurements import (
    CollectiveTime,
    Measurements,
    MemoryRate,
    NodePairRate,
)
from rankwright.topology.shorthand import parse_cluster

PORT_BYTES_PER_S = 50e9


def machines(count: int) -> list[Cluster]:
    """`count` machines of two GPUs with two ports of 400 Gb/s each."""
    found = []
    for number in range(count):
        cluster = parse_cluster("2xh100-sxm")
        nics = tuple(
            Nic(
                name=f"mlx5_{port}",
                bytes_per_s=PORT_BYTES_PER_S,
                rdma=True,
                link_layer="infiniband",
            )
            for port in range(2)
        )
        node = cluster.nodes[0].model_copy(update={"name": f"n{number}", "nics": nics})
        found.append(cluster.model_copy(update={"nodes": (node,)}))
    return found


def between(count: int, rate: float, slow: tuple[int, ...] = ()) -> Measurements:
    """All pairs at `rate`, those of the machines `slow` at a tenth of it."""
    return Measurements(
        backend="nccl",
        transports=("NET/IB/GDRDMA", "P2P/CUMEM"),
        num_net_channels=4,
        num_gpudirect_channels=4,
        node_pairs=tuple(
            NodePairRate(
                a=a,
                b=b,
                forth_bytes_per_s=rate * (0.1 if {a, b} & set(slow) else 1),
                back_bytes_per_s=rate * 1.01,
                single_bytes_per_s=rate / 2,
                latency_s=14e-6,
            )
            for a, b in combinations(range(count), 2)
        ),
    )


def test_a_sound_fabric_keeps_the_rate_that_its_ports_say() -> None:
    cluster = apply_between(machines(3), between(3, 90e9), fabric=None, source="test")
    assert cluster.num_nodes == 3
    fabric = cluster.fabric
    assert fabric is not None
    assert (fabric.kind, fabric.bytes_per_s, fabric.ports_per_node) == ("infiniband", 50e9, 2)
    assert fabric.measured_bytes_per_s == pytest.approx(50e9)
    assert fabric.latency_s == 14e-6
    assert cluster.notes == (
        "between machines NCCL goes over IB with GPUDirect RDMA on all channels",
    )


def test_plans_go_by_what_was_measured_and_stay_valid() -> None:
    nominal = apply_between(machines(2), between(2, 90e9), fabric=None, source="test")
    slow = apply_between(machines(2), between(2, 18e9), fabric=None, source="test")
    assert port_share_bytes_per_s(slow, slow.node(0), 0) == pytest.approx(10e9)
    assert slow.fingerprint == nominal.fingerprint
    assert any("machines reach 20 % of what 2 x 400 Gb/s" in note for note in slow.notes)


def test_the_machine_with_the_bad_cable_is_in_every_note() -> None:
    cluster = apply_between(machines(4), between(4, 90e9, (2,)), fabric=None, source="test")
    notes = [note for note in cluster.notes if "of what the best pair" in note]
    assert len(notes) == 3
    assert all("n2" in note and "10 %" in note for note in notes)
    assert cluster.fabric is not None
    # Half of the pairs are sound: the median of all is between the two, and no less.
    assert cluster.fabric.measured_bytes_per_s == pytest.approx((90e9 + 9e9) / 2 / 0.9 / 2)


def test_each_machine_gets_its_own_rates_before_equal_ones_are_folded() -> None:
    rates = [3.0e12, 3.0e12, 1.0e12]
    measured = between(3, 90e9).model_copy(
        update={
            "memory": tuple(
                MemoryRate(node=node, gpu=gpu, bytes_per_s=rate)
                for node, rate in enumerate(rates)
                for gpu in range(2)
            ),
            "collectives": (
                CollectiveTime(
                    operation="all_reduce",
                    gpus=(0, 1),
                    nodes=(0, 1),
                    size_bytes=2**20,
                    seconds=1e-3,
                ),
            ),
        }
    )
    cluster = apply_between(machines(3), measured, fabric="ib400x2", source="test")
    assert [node.count for node in cluster.nodes] == [2, 1]
    fast, slow = (node.gpus[0].memory_bytes_per_s for node in cluster.nodes)
    assert fast is not None
    assert slow is not None
    assert slow == pytest.approx(fast / 3)
    assert cluster.measurements == measured
    # Four ranks: an all-reduce moves 2 * 3/4 of the buffer over each one's links.
    assert measured.collectives[0].bus_bytes_per_s == pytest.approx(1.5 * 2**20 / 1e-3)
