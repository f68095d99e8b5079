"""Measured rates become the planner's, equal devices stay equal, and broken links are named."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.apply_measurements import apply_measurements
from rankwright.topology.cluster import Cluster
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s
from rankwright.topology.measurements import (
    CollectiveTime,
    GemmRate,
    Measurements,
    MemoryRate,
    PairRate,
)
from rankwright.topology.shorthand import parse_cluster

NV18 = 450e9
SOUND = 0.84 * NV18


def pair(a: int, b: int, forth: float = SOUND, back: float | None = None) -> PairRate:
    return PairRate(
        a=a,
        b=b,
        forth_bytes_per_s=forth,
        back_bytes_per_s=forth if back is None else back,
        latency_s=8e-6,
    )


def measured(
    *pairs: PairRate, memory: tuple[float, ...] = (), gemms: tuple[GemmRate, ...] = ()
) -> Measurements:
    rows = tuple(MemoryRate(gpu=i, bytes_per_s=rate) for i, rate in enumerate(memory))
    return Measurements(backend="nccl", pairs=pairs, memory=rows, gemms=gemms)


def gemm(gpu: int, rate: float, dtype: str = "bfloat16", m: int = 8192) -> GemmRate:
    return GemmRate(gpu=gpu, dtype=dtype, m=m, n=8192, k=8192, flops_per_s=rate)


def test_a_machine_that_does_as_its_kind_keeps_the_data_sheets_rates() -> None:
    before = parse_cluster("2xh200-sxm")
    after = apply_measurements(
        before,
        measured(
            pair(0, 1),
            memory=(4.2e12, 4.2e12),
            gemms=(gemm(0, 742e12), gemm(0, 90e12, m=16), gemm(1, 742e12)),
        ),
    )
    gpu = after.nodes[0].gpus[0]
    assert gpu.memory_bytes_per_s == pytest.approx(4.8e12)
    assert flops_per_s(gpu, "bfloat16") == pytest.approx(989e12, rel=0.001)
    assert flops_per_s(gpu, "float8") == flops_per_s(before.nodes[0].gpus[0], "float8")
    assert after.nodes[0].links[0].bytes_per_s == pytest.approx(NV18)
    assert after.notes == ()


def test_the_slower_way_of_a_link_counts_and_the_planner_sees_it() -> None:
    before = parse_cluster("2xa100-sxm")
    after = apply_measurements(before, measured(pair(0, 1, 0.84 * 200e9, 0.84 * 300e9)))
    assert before.bandwidth([(0, 0), (0, 1)]) == 300e9
    assert after.nodes[0].links[0].bytes_per_s == pytest.approx(200e9)


def test_what_was_measured_changes_no_fingerprint() -> None:
    before = parse_cluster("2xh100-sxm")
    after = apply_measurements(before, measured(pair(0, 1, 1e9), memory=(1e12, 2e12)))
    assert after.fingerprint == before.fingerprint
    assert after.measurements is not None
    assert Cluster.model_validate_json(after.model_dump_json()) == after


def test_a_cluster_file_from_before_measurements_loads() -> None:
    old = parse_cluster("2xl4").model_dump(mode="json", exclude={"measurements"})
    assert Cluster.model_validate(old).measurements is None


def test_a_link_far_below_its_class_is_named() -> None:
    pairs = [
        pair(a, b, SOUND * (0.11 if (a, b) == (2, 5) else 1.0))
        for a, b in combinations(range(8), 2)
    ]
    after = apply_measurements(parse_cluster("8xh100-sxm"), measured(*pairs))
    (note,) = after.notes
    assert note.startswith("GPU2-GPU5 runs at 11 % of NV18 ")
    assert "check the bridge" in note
    rates = {(link.a, link.b): link.bytes_per_s for link in after.nodes[0].links}
    assert rates.pop((2, 5)) == pytest.approx(0.11 * NV18)
    assert list(rates.values()) == [pytest.approx(NV18)] * 27


def test_a_slow_pcie_path_gets_the_remedy_for_pcie() -> None:
    after = apply_measurements(parse_cluster("2xl40s"), measured(pair(0, 1, 1.4e9)))
    assert any("of PHB" in note and "ACS" in note for note in after.notes)


def test_a_gpu_with_slow_memory_is_named() -> None:
    after = apply_measurements(parse_cluster("2xh200-sxm"), measured(memory=(4.2e12, 2e12)))
    assert after.notes[0].startswith("GPU1 copies its memory at 48 % of the best of its kind")


def test_nccl_on_host_memory_beside_nvlink_is_said() -> None:
    slow = Measurements(backend="nccl", pairs=(pair(0, 1),), transports=("SHM",))
    after = apply_measurements(parse_cluster("2xh100-sxm"), slow)
    assert any("NCCL_P2P_DISABLE" in note for note in after.notes)


@given(st.lists(st.floats(0.96, 1.04), min_size=8, max_size=8))
@settings(max_examples=30, deadline=None)
def test_noise_leaves_equal_gpus_equal(noise: list[float]) -> None:
    pairs = [pair(a, b, SOUND * noise[a] * noise[b]) for a, b in combinations(range(8), 2)]
    after = apply_measurements(
        parse_cluster("8xh100-sxm"),
        measured(
            *pairs,
            memory=tuple(2.9e12 * each for each in noise),
            gemms=tuple(gemm(i, 650e12 * each) for i, each in enumerate(noise)),
        ),
    )
    node = after.nodes[0]
    assert len({memory_bytes_per_s(gpu) for gpu in node.gpus}) == 1
    assert len({flops_per_s(gpu, "bfloat16") for gpu in node.gpus}) == 1
    near = [link for link in node.links if abs(noise[link.a] * noise[link.b] - 1) < 0.02]
    assert len({link.bytes_per_s for link in near}) <= 1


def test_cpu_ranks_take_their_rates_as_measured() -> None:
    after = apply_measurements(
        parse_cluster("2xcpu"),
        measured(
            pair(0, 1, 1e9),
            memory=(5e9, 7e9),
            gemms=(gemm(0, 50e9, "float32"), gemm(1, 52e9, "float32")),
        ),
    )
    assert [gpu.memory_bytes_per_s for gpu in after.nodes[0].gpus] == [6e9, 6e9]
    assert [flops_per_s(gpu, "float32") for gpu in after.nodes[0].gpus] == [51e9, 51e9]
    assert after.nodes[0].links[0].bytes_per_s == 1e9
    assert after.notes == ()


def test_measurements_of_another_machine_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GPUs \[2\] were measured"):
        apply_measurements(parse_cluster("2xl4"), measured(pair(0, 2)))
    with pytest.raises(ValueError, match="the cluster has 2"):
        apply_measurements(parse_cluster("2x2xl4+eth25"), measured())


@pytest.mark.parametrize(
    ("operation", "bus"),
    [("all_reduce", 1.5e9), ("all_gather", 0.75e9), ("all_to_all", 0.75e9), ("send_recv", 1e9)],
)
def test_bus_bandwidth_is_that_of_nccl_tests(operation: str, bus: float) -> None:
    row = CollectiveTime.model_validate(
        {"operation": operation, "gpus": (0, 1, 2, 3), "size_bytes": 10**6, "seconds": 1e-3}
    )
    assert row.bus_bytes_per_s == pytest.approx(bus)
