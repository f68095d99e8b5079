"""Groups of GPUs that avoid slow links.

Tensor parallelism lives on the slowest link of its group. Cutting a machine by index is right where
all links are alike; a cube mesh, bridged pairs and two sockets need a look at the links.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

from rankwright.topology.graph import (
    GpuId,
    bandwidth_in_node,
    islands_of_node,
    latency_in_node,
)

if TYPE_CHECKING:
    from rankwright.topology.cluster import Cluster, Node

# Machines of so many GPUs are cut exactly: 924 groups of 6 among 12 are judged in 0.1 s, the 12,870
# groups of 8 among 16 would take 2 s. Larger machines are symmetric in practice.
EXACT_GPUS = 12

Cut = tuple[tuple[int, ...], ...]
# Of a group: bytes/s; -1 if its GPUs are of several kinds; -femtoseconds of a hop. More is better,
# and the sums over groups are compared in this order. Whole numbers, since sums of floats depend on
# their order and would split ties.
_Worth = tuple[int, int, int]


def best_groups(cluster: "Cluster", size: int) -> tuple[tuple[GpuId, ...], ...]:
    """Return groups of `size` GPUs that avoid slow links, in order of node and lowest GPU.

    Machines are cut one by one (`cut_node`); a group larger than a machine takes neighbouring whole
    machines with equally many GPUs. GPUs that are left over are in no group.

    >>> from rankwright.topology.shorthand import parse_cluster
    >>> best_groups(parse_cluster("8xv100-sxm2"), 2)[0]
    ((0, 0), (0, 3))

    Raises:
        ValueError: `size` is below 1.
    """
    _check(size)
    found: list[tuple[GpuId, ...]] = []
    waiting: list[GpuId] = []
    first = 0
    for node in cluster.nodes:
        inside = size <= len(node.gpus)
        cut = cut_node(node, size) if inside else ()
        whole = tuple(gpu.index for gpu in node.gpus) if node.gpus and not inside else ()
        for index in range(first, first + node.count):
            found.extend(tuple((index, gpu) for gpu in gpus) for gpus in cut)
            if not whole or size % len(whole):
                waiting = []
                continue
            if waiting and _num_on(waiting, waiting[0][0]) != len(whole):
                waiting = []
            waiting.extend((index, gpu) for gpu in whole)
            if len(waiting) == size:
                found.append(tuple(waiting))
                waiting = []
        first += node.count
    return tuple(found)


def cut_node(node: "Node", size: int, gpus: Iterable[int] | None = None) -> Cut:
    """Return as many groups of `size` GPUs of one machine as there can be, lowest GPU first.

    The slowest group is as fast as it can be; then the groups together have the most bandwidth, as
    few as possible mix kinds of GPU, and hops are quick. Exact for up to `EXACT_GPUS` GPUs and
    where all links are alike. Beyond, islands are cut exactly where they are small enough and in
    order of index where not, what they leave over is joined, and GPUs of different groups are
    exchanged until no exchange helps.

    Args:
        node: The machine.
        size: GPUs a group; none fits if it has fewer.
        gpus: Those to use; all of the machine's by default.

    Raises:
        ValueError: `size` is below 1, `gpus` names one that is not there, or links are missing so
            that the GPUs cannot be cut that way.
    """
    _check(size)
    there = {gpu.index for gpu in node.gpus}
    chosen = sorted(there if gpus is None else set(gpus))
    if not there.issuperset(chosen):
        missing = sorted(set(chosen) - there)
        raise ValueError(f"node {node.name!r} has no GPUs {missing}; it has {sorted(there)}")
    if len(chosen) < size:
        return ()
    if size == 1 or _all_alike(node, chosen):
        return _in_order(chosen, size)
    if len(chosen) <= EXACT_GPUS:
        cut = _exact_cut(node, chosen, size)
    else:
        cut = _improve(node, chosen, _by_islands(node, chosen, size))
    if cut is None:
        raise ValueError(
            f"node {node.name!r}: too few links join GPUs {chosen} for {len(chosen) // size} "
            f"groups of {size}"
        )
    return tuple(sorted(tuple(sorted(group)) for group in cut))


def _check(size: int) -> None:
    if size < 1:
        raise ValueError(f"a group of {size} GPUs; expected at least 1")


def _num_on(group: Sequence[GpuId], node: int) -> int:
    return sum(index == node for index, _ in group)


def _in_order(gpus: Sequence[int], size: int) -> Cut:
    return tuple(
        tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)
    )


def _all_alike(node: "Node", gpus: Sequence[int]) -> bool:
    """Return whether no cut of these GPUs differs from another: one kind, and links of one kind."""
    chosen = set(gpus)
    links = [link for link in node.links if link.a in chosen and link.b in chosen]
    rates = {(link.kind, link.bytes_per_s, link.latency_s) for link in links}
    kinds = {gpu.device for gpu in node.gpus if gpu.index in chosen}
    pairs = {frozenset((link.a, link.b)) for link in links}
    return len(rates) == len(kinds) == 1 and len(pairs) == comb(len(gpus), 2)


def _worth(node: "Node", group: Sequence[int]) -> _Worth | None:
    """Return what a group is worth, `None` where no link joins it."""
    try:
        rate, latency_s = bandwidth_in_node(node, group), latency_in_node(node, group)
    except ValueError:
        return None
    kinds = {gpu.device for gpu in node.gpus if gpu.index in group}
    return round(rate), -(len(kinds) > 1), -round(latency_s * 1e15)


def _sum(values: Iterable[_Worth]) -> _Worth:
    rates, mixed, quickness = zip(*values, strict=True)
    return sum(rates), sum(mixed), sum(quickness)


def _exact_cut(node: "Node", gpus: Sequence[int], size: int) -> Cut | None:
    worth: dict[int, tuple[tuple[int, ...], _Worth]] = {}
    for places in combinations(range(len(gpus)), size):
        value = _worth(node, [gpus[at] for at in places])
        if value is not None:
            worth[sum(1 << at for at in places)] = (places, value)
    rates = sorted({value[0] for _, value in worth.values()})
    best: list[tuple[int, ...]] | None = None
    low, high = 0, len(rates) - 1
    while low <= high:  # the fastest rate at which some cut exists, by halving
        middle = (low + high) // 2
        fast = {group: one for group, one in worth.items() if one[1][0] >= rates[middle]}
        cut = _widest_cut(len(gpus), size, fast)
        if cut is None:
            high = middle - 1
        else:
            best, low = cut, middle + 1
    if best is None:
        return None
    return tuple(tuple(gpus[at] for at in places) for places in best)


def _widest_cut(
    num_gpus: int, size: int, worth: Mapping[int, tuple[tuple[int, ...], _Worth]]
) -> list[tuple[int, ...]] | None:
    """Return the cut with the most bandwidth, least mixing and least latency, in this order.

    GPUs are taken from the lowest: it is left over, or in one of the groups of which it is the
    lowest. What follows depends only on the set that is left, so that each set is solved once.
    """
    everyone = (1 << num_gpus) - 1
    by_lowest: dict[int, list[int]] = {}
    for group in worth:
        by_lowest.setdefault(group & -group, []).append(group)
    solved: dict[int, tuple[_Worth, int] | None] = {}

    def solve(used: int, spare: int) -> tuple[_Worth, int] | None:
        """Return the best sums of the GPUs not in `used`, and the group (or lone GPU) to take."""
        if used == everyone:
            return (0, 0, 0), 0
        if used in solved:
            return solved[used]
        lowest = ~used & (used + 1)
        best: tuple[_Worth, int] | None = None
        for group in by_lowest.get(lowest, ()):
            rest = None if group & used else solve(used | group, spare)
            if rest is not None:
                value = _sum((worth[group][1], rest[0]))
                if best is None or value > best[0]:
                    best = value, group
        if spare:
            rest = solve(used | lowest, spare - 1)
            if rest is not None and (best is None or rest[0] > best[0]):
                best = rest[0], lowest
        solved[used] = best
        return best

    # `spare`, the GPUs that may still be left over, follows from the size of `used`: the ones that
    # were are what it leaves when divided by the group's size.
    spare = num_gpus % size
    found: list[tuple[int, ...]] = []
    used = 0
    while used != everyone:
        step = solve(used, spare)
        if step is None:
            return None
        taken = step[1]
        if taken in worth:
            found.append(worth[taken][0])
        else:
            spare -= 1
        used |= taken
    return found


def _by_islands(node: "Node", gpus: Sequence[int], size: int) -> Cut:
    """Return groups cut island by island, then from what the islands leave over."""
    chosen = set(gpus)
    groups: list[tuple[int, ...]] = []
    left: list[int] = []
    for island in islands_of_node(node):
        members = [gpu for gpu in island if gpu in chosen]
        small = size < len(members) <= EXACT_GPUS and not _all_alike(node, members)
        cut = (_exact_cut(node, members, size) if small else None) or _in_order(members, size)
        groups.extend(cut)
        left.extend(gpu for gpu in members if not any(gpu in group for group in cut))
    return (*groups, *_in_order(left, size))


def _improve(node: "Node", gpus: Sequence[int], cut: Cut) -> Cut | None:
    """Return the groups after exchanging GPUs, also with those left over, until nothing helps."""
    groups = [list(group) for group in cut]
    left = [gpu for gpu in gpus if not any(gpu in group for group in groups)]
    nothing: _Worth = (0, -1, 0)

    def worth(group: Sequence[int]) -> _Worth:
        return _worth(node, group) or nothing

    def total(values: Sequence[_Worth]) -> tuple[int, ...]:
        return min(value[0] for value in values), *_sum(values)

    values = [worth(group) for group in groups]
    improved = True
    while improved:
        improved = False
        for at, other in combinations(range(len(groups) + 1), 2):
            # Past the last group are the GPUs left over, which are worth nothing to anyone.
            pool = groups[other] if other < len(groups) else left
            for i in range(len(groups[at])):
                for j in range(len(pool)):
                    groups[at][i], pool[j] = pool[j], groups[at][i]
                    now = [values[at]] + ([values[other]] if other < len(groups) else [])
                    then = [worth(groups[at])] + ([worth(pool)] if other < len(groups) else [])
                    if total(then) > total(now):
                        values[at] = then[0]
                        if other < len(groups):
                            values[other] = then[1]
                        improved = True
                    else:
                        groups[at][i], pool[j] = pool[j], groups[at][i]
    if any(value == nothing for value in values):
        return None
    return tuple(tuple(group) for group in groups)
