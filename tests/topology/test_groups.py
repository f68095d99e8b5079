"""Groups that avoid slow links, against trying every cut."""

from collections.abc import Iterator, Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster, Gpu, Link, Node
from rankwright.topology.groups import EXACT_GPUS, best_groups, cut_node
from rankwright.topology.link_kinds import link_bytes_per_s, link_latency_s
from rankwright.topology.shorthand import parse_cluster

Pair = tuple[int, int]
Cut = tuple[tuple[int, ...], ...]


def node_of(kinds: dict[Pair, str], devices: Sequence[str]) -> Node:
    gpus = tuple(
        Gpu(index=index, device=device, name="", memory_bytes=1, total_memory_bytes=1)
        for index, device in enumerate(devices)
    )
    links = tuple(
        Link(
            a=a,
            b=b,
            kind=kind,
            bytes_per_s=link_bytes_per_s(kind, gpus[a], gpus[b]),
            latency_s=link_latency_s(kind),
        )
        for (a, b), kind in kinds.items()
    )
    return Node(name="n", gpus=gpus, links=links)


def every_cut(gpus: tuple[int, ...], size: int, spare: int) -> Iterator[Cut]:
    """All ways to make groups of `size` and leave `spare` GPUs over."""
    if len(gpus) == spare:
        yield ()
        return
    first, rest = gpus[0], gpus[1:]
    for others in combinations(rest, size - 1):
        left = tuple(gpu for gpu in rest if gpu not in others)
        for cut in every_cut(left, size, spare):
            yield ((first, *others), *cut)
    if spare:
        yield from every_cut(rest, size, spare - 1)


Worth = tuple[float, float, int, int]


def worth(cluster: Cluster, cut: Cut) -> Worth | None:
    rates: list[float] = []
    mixed = latency = 0
    for group in cut:
        try:
            rates.append(cluster.bandwidth([(0, gpu) for gpu in group]))
            latency += round(cluster.latency([(0, gpu) for gpu in group]) * 1e15)
        except ValueError:
            return None
        mixed += len({cluster.nodes[0].gpus[gpu].device for gpu in group}) > 1
    return min(rates), sum(rates), -mixed, -latency


def check(node: Node, size: int) -> None:
    cluster, gpus = Cluster(nodes=(node,)), tuple(range(len(node.gpus)))
    values = [worth(cluster, cut) for cut in every_cut(gpus, size, len(gpus) % size)]
    possible = [value for value in values if value is not None]
    if not possible:
        with pytest.raises(ValueError, match="too few links"):
            cut_node(node, size)
        return
    found = cut_node(node, size)
    taken = [gpu for group in found for gpu in group]
    assert len(taken) == len(set(taken)) == len(gpus) // size * size
    assert worth(cluster, found) == max(possible)


def test_every_graph_of_four_gpus_in_pairs_and_threes() -> None:
    pairs = list(combinations(range(4), 2))
    for kinds in product((None, "NV2", "SYS"), repeat=6):
        chosen = {pair: kind for pair, kind in zip(pairs, kinds, strict=True) if kind is not None}
        node = node_of(chosen, ["v100-sxm2-32gb"] * 4)
        for size in (2, 3):
            check(node, size)


KINDS = st.sampled_from(["NV1", "NV2", "NV4", "PIX", "PXB", "PHB", "SYS", None])
DEVICES = st.sampled_from(["a100-sxm-80gb", "v100-sxm2-32gb", "l40s"])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(2, 4), num_gpus=st.integers(4, 7))
def test_any_graph_with_any_gpus(data: st.DataObject, size: int, num_gpus: int) -> None:
    pairs = list(combinations(range(num_gpus), 2))
    kinds = data.draw(st.lists(KINDS, min_size=len(pairs), max_size=len(pairs)))
    devices = data.draw(st.lists(DEVICES, min_size=num_gpus, max_size=num_gpus))
    found = zip(pairs, kinds, strict=True)
    check(node_of({pair: kind for pair, kind in found if kind is not None}, devices), size)


@settings(deadline=None, max_examples=8)
@given(data=st.data(), size=st.sampled_from([2, 4]))
def test_eight_gpus_are_cut_exactly(data: st.DataObject, size: int) -> None:
    pairs = list(combinations(range(8), 2))
    kind = st.sampled_from(["NV1", "NV2", "PIX", "SYS"])
    kinds = data.draw(st.lists(kind, min_size=28, max_size=28))
    check(node_of(dict(zip(pairs, kinds, strict=True)), ["v100-sxm2-32gb"] * 8), size)


def test_kinds_of_gpu_are_not_mixed_without_need() -> None:
    pairs = dict.fromkeys(combinations(range(6), 2), "PHB")
    node = node_of(pairs, ["rtx4090", "rtx3090"] * 3)
    assert cut_node(node, 3) == ((0, 2, 4), (1, 3, 5))
    assert cut_node(parse_cluster("2xrtx4090+2xrtx3090").nodes[0], 2) == ((0, 1), (2, 3))


def test_some_gpus_only() -> None:
    node = parse_cluster("8xv100-sxm2").nodes[0]
    assert cut_node(node, 2, [1, 2, 5, 6]) == ((1, 2), (5, 6))
    assert cut_node(node, 4, [1, 2, 5]) == ()
    with pytest.raises(ValueError, match=r"no GPUs \[9\]"):
        cut_node(node, 2, [1, 9])


def test_groups_of_one_take_all() -> None:
    assert cut_node(parse_cluster("4xl40s").nodes[0], 1) == ((0,), (1,), (2,), (3,))


@pytest.mark.parametrize("size", [0, -2])
def test_a_group_of_nobody_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        best_groups(parse_cluster("4xl40s"), size)
    with pytest.raises(ValueError, match="at least 1"):
        cut_node(parse_cluster("4xl40s").nodes[0], size)


def sixteen(order: Sequence[int]) -> Node:
    """Sixteen GPUs, four below each of four switches, of which GPU `order[i]` is number i."""
    switch = {gpu: at // 4 for at, gpu in enumerate(order)}
    kinds = {
        (a, b): "PIX" if switch[a] == switch[b] else "SYS" for a, b in combinations(range(16), 2)
    }
    return node_of(kinds, ["l4"] * 16)


@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(16)), size=st.sampled_from([2, 4]))
def test_the_heuristic_finds_the_switches(order: list[int], size: int) -> None:
    assert len(order) > EXACT_GPUS
    node = sixteen(order)
    cluster = Cluster(nodes=(node,))
    for group in cut_node(node, size):
        assert cluster.latency([(0, gpu) for gpu in group]) == 1.0e-6


def test_left_over_gpus_are_exchanged_for_better_ones() -> None:
    # Thirteen GPUs; the first is far from all others, and one of the thirteen is left over.
    kinds = {(a, b): "SYS" if a == 0 else "PIX" for a, b in combinations(range(13), 2)}
    node = node_of(kinds, ["a100-pcie-80gb"] * 13)
    assert 0 not in {gpu for group in cut_node(node, 4) for gpu in group}


def test_machines_of_several_kinds_are_cut_each_in_its_way() -> None:
    cluster = parse_cluster("1x8xv100-sxm2+2x4xl40s+ib100")
    groups = best_groups(cluster, 2)
    assert groups[0] == ((0, 0), (0, 3))
    assert groups[4:6] == (((1, 0), (1, 1)), ((1, 2), (1, 3)))
    assert len(groups) == 8
    # Eight of the small machines' GPUs make one group over both of them.
    assert best_groups(cluster, 8)[1] == tuple((n, g) for n in (1, 2) for g in range(4))
