"""Which GPUs form TP groups, and which TP groups a pipeline.

TP talks most, so that a TP group stays inside an island where it can; then stages of a pipeline
stay inside a machine where they can. Machines that are alike are counted, not listed: 2,048 nodes
cost as much as one.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rankwright.cost_model.collectives import Group, Place, all_gather_s, find_group
from rankwright.cost_model.shards import Shares
from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.devices import flops_per_s, memory_bytes_per_s
from rankwright.topology.graph import islands_of_node
from rankwright.topology.groups import cut_node
from rankwright.topology.levels import block_sizes, cut_runs, distance

# GPUs whose free memory differs by less are of one kind: what other processes hold comes and goes.
_EQUAL_MEMORY = 0.9


@dataclass(frozen=True, slots=True)
class SlotKind:
    """Groups of the `tp * cp` GPUs of a stage ("slots") that are alike.

    Args:
        gpus: GPU indices of each slot of a machine, or of one machine of a slot that spans several.
        nodes_per_slot: Machines that one slot spans; 1 when a machine holds it.
        nodes: Machines of this kind, in order.
        gpu: The slowest and smallest of their GPUs, which sets the pace of all.
        group: The links inside a slot; the slowest slot's.
        members: The GPU of each rank of a slot, where they are of several kinds; else empty.
        shares: Parts of the model that the ranks hold; None: equal ones.
    """

    gpus: tuple[tuple[int, ...], ...]
    nodes_per_slot: int
    nodes: tuple[range, ...]
    gpu: Gpu
    group: Group
    members: tuple[Gpu, ...] = ()
    shares: Shares | None = None

    @property
    def num_nodes(self) -> int:
        """Machines of this kind."""
        return sum(len(run) for run in self.nodes)

    @property
    def count(self) -> int:
        """Slots of this kind."""
        return self.num_nodes // self.nodes_per_slot * len(self.gpus)

    def node_of(self, slot: int) -> int:
        """Return the position, among the machines of this kind, of the first that `slot` is on."""
        return slot // len(self.gpus) * self.nodes_per_slot

    def places(self, slot: int) -> tuple[Place, ...]:
        """Return where the ranks of `slot` are, in order of `tp_rank`."""
        first = self.node_of(slot)
        gpus = self.gpus[slot % len(self.gpus)]
        return tuple(
            (self._node(node), gpu)
            for node in range(first, first + self.nodes_per_slot)
            for gpu in gpus
        )

    def _node(self, position: int) -> int:
        for run in self.nodes:
            if position < len(run):
                return run[position]
            position -= len(run)
        raise IndexError(f"slot kind has no node {position}")


def find_slots(cluster: Cluster, tp: int) -> tuple[SlotKind, ...]:
    """Return the groups of `tp` ranks that the cluster has room for, fastest kind first.

    A machine is cut island by island; GPUs left over in several islands are joined, those of one
    kind first. A group larger than a machine takes whole machines: `tp` is a multiple of one. They
    are of one rack where it holds them, else below one switch; what is left over is joined.
    """
    found: list[SlotKind] = []
    for node, runs in alike_machines(cluster):
        size = len(node.gpus)
        if tp <= size:
            for gpus in _cut_node(node, tp):
                found.append(_slot_kind(cluster, node, gpus, 1, runs))
        elif size and tp % size == 0 and sum(len(run) for run in runs) >= tp // size:
            whole = (tuple(gpu.index for gpu in node.gpus),)
            cuts = cut_runs(cluster, runs, tp // size) if block_sizes(cluster) else [runs]
            found += [_slot_kind(cluster, node, whole, tp // size, cut) for cut in cuts]
    return tuple(sorted(found, key=_speed, reverse=True))


def stage_groups(cluster: Cluster, kind: SlotKind, cp: int) -> tuple[Group, Group | None]:
    """Return the slowest TP group and the slowest context group of a slot of `kind`.

    Ranks of a slot count TP first, so that a TP group is `tp` neighbours.
    """
    if cp == 1:
        return kind.group, None
    tp = kind.group.size // cp
    tensor: list[tuple[Place, ...]] = []
    context: list[tuple[Place, ...]] = []
    for slot in range(len(kind.gpus)):
        places = kind.places(slot)
        tensor += [places[first : first + tp] for first in range(0, len(places), tp)]
        context += [places[first::tp] for first in range(tp)]
    return _slowest_of(cluster, tensor), _slowest_of(cluster, context)


def _slowest_of(cluster: Cluster, groups: Sequence[tuple[Place, ...]]) -> Group:
    """Return the links of the group that takes longest to gather 1 MB."""
    found = [find_group(cluster, places) for places in groups]
    return max(found, key=lambda group: all_gather_s(1e6, group))


def replicas_in_nodes(kind: SlotKind, pp: int) -> int:
    """Return how many pipelines of `pp` slots fit without leaving a machine."""
    if kind.nodes_per_slot > 1:
        return kind.count if pp == 1 else 0
    return kind.num_nodes * (len(kind.gpus) // pp)


def replica_slots(kind: SlotKind, pp: int, spread: bool = False) -> Iterator[tuple[int, ...]]:
    """Yield the slots of each pipeline of `pp` stages.

    Those that fit a machine are cut there; with `spread`, what each machine has left is strung
    together over machines.
    """
    per_node = len(kind.gpus)
    inside = per_node // pp if kind.nodes_per_slot == 1 or pp == 1 else 0
    left: list[int] = []
    for first in range(0, kind.count, per_node):
        for replica in range(inside):
            yield tuple(range(first + replica * pp, first + (replica + 1) * pp))
        if spread:
            left.extend(range(first + inside * pp, first + per_node))
            while len(left) >= pp:
                yield tuple(left[:pp])
                del left[:pp]


def crossings(kind: SlotKind, pp: int) -> int:
    """Return the most hand-overs between machines that one spread pipeline has."""
    if pp == 1:
        return 0
    if kind.nodes_per_slot > 1:
        return pp - 1
    per_node = len(kind.gpus)
    left = per_node % pp if per_node >= pp else per_node
    if left == 0:
        return 0
    if pp % left == 0:
        return pp // left - 1
    # Slots of one pipeline come `left` to a machine; an unlucky one starts in the middle of one.
    return min(pp - 1, (pp - 2) // left + 1)


def boundary_groups(
    cluster: Cluster, stages: tuple[SlotKind, ...], spread: bool
) -> tuple[Group, ...]:
    """Return the links between neighbouring stages of the worst placed pipeline.

    Args:
        cluster: The machines.
        stages: The kind of slot of each stage.
        spread: Whether pipelines may leave a machine.
    """
    first = stages[0]
    if len(set(map(id, stages))) > 1:
        return _mixed_boundaries(cluster, stages)
    away = crossings(first, len(stages)) if spread else 0
    if away and block_sizes(cluster):
        return _furthest_boundaries(cluster, first, len(stages))
    groups: list[Group] = []
    if away:
        pair = (first.places(0)[0], first.places(len(first.gpus))[0])
        groups += [find_group(cluster, pair)] * away
    near = len(stages) - 1 - away
    if near:
        pair = (first.places(0)[0], first.places(1)[0])
        groups += [find_group(cluster, pair)] * near
    return tuple(groups)


def _furthest_boundaries(cluster: Cluster, kind: SlotKind, pp: int) -> tuple[Group, ...]:
    """Return the links of the pipeline whose stages lie furthest apart in racks and switches."""
    sizes = block_sizes(cluster)
    nodes = [node for run in kind.nodes for node in run]
    worst, furthest = tuple[int, ...](), tuple[int, ...]()
    for slots in replica_slots(kind, pp, spread=True):
        homes = [nodes[kind.node_of(slot)] for slot in slots]
        apart = ((a != b) + distance(sizes, a, b) for a, b in pairwise(homes))
        far = tuple(sorted(apart, reverse=True))
        if far > furthest:
            worst, furthest = slots, far
    pairs = pairwise([kind.places(slot)[0] for slot in worst])
    return tuple(find_group(cluster, pair) for pair in pairs)


def _mixed_boundaries(cluster: Cluster, stages: tuple[SlotKind, ...]) -> tuple[Group, ...]:
    """Return the links of a pipeline over several kinds of slot, which are taken in order."""
    used: dict[int, int] = {}
    places: list[Place] = []
    for kind in stages:
        slot = used.get(id(kind), 0)
        used[id(kind)] = slot + 1
        places.append(kind.places(slot)[0])
    return tuple(
        find_group(cluster, (places[index], places[index + 1])) for index in range(len(stages) - 1)
    )


def alike_machines(cluster: Cluster) -> list[tuple[Node, list[range]]]:
    """Return the kinds of machine, each with the runs of machines that are of it."""
    kinds: dict[object, tuple[Node, list[range]]] = {}
    first = 0
    for node in cluster.nodes:
        key = (
            tuple((gpu.index, *_gpu_key(gpu)) for gpu in node.gpus),
            tuple(sorted((link.a, link.b, link.kind, link.bytes_per_s) for link in node.links)),
        )
        kinds.setdefault(key, (node, []))[1].append(range(first, first + node.count))
        first += node.count
    return list(kinds.values())


def _gpu_key(gpu: Gpu) -> tuple[object, ...]:
    return (gpu.memory_bytes, *speed_of(gpu))


def alike_ranks(members: Sequence[Gpu]) -> list[list[int]]:
    """Return the ranks on GPUs of equal speed and about equal memory, together."""
    kinds: list[list[int]] = []
    for rank, gpu in enumerate(members):
        for ranks in kinds:
            other = members[ranks[0]]
            least, most = sorted((gpu.memory_bytes, other.memory_bytes))
            if speed_of(gpu) == speed_of(other) and least >= _EQUAL_MEMORY * most:
                ranks.append(rank)
                break
        else:
            kinds.append([rank])
    return kinds


def speed_of(gpu: Gpu) -> tuple[object, ...]:
    """Return what GPUs that take equal times for equal work have in common."""
    return (gpu.device, memory_bytes_per_s(gpu), flops_per_s(gpu, "bfloat16"))


def _cut_node(node: Node, tp: int) -> list[tuple[tuple[int, ...], ...]]:
    """Return the slots of one machine, those that are alike together."""
    by_index = {gpu.index: gpu for gpu in node.gpus}
    alike: dict[object, list[tuple[int, ...]]] = {}
    left: dict[tuple[object, int], list[int]] = {}
    for number, island in enumerate(islands_of_node(node)):
        by_kind: dict[object, list[int]] = {}
        for index in island:
            by_kind.setdefault(_gpu_key(by_index[index]), []).append(index)
        for key, members in by_kind.items():
            slots = cut_node(node, tp, members)
            if slots:
                alike.setdefault((key, "island", len(island)), []).extend(slots)
            taken = {index for slot in slots for index in slot}
            left.setdefault((key, number), []).extend(
                index for index in members if index not in taken
            )
    joined: dict[object, list[int]] = {}
    for (key, _), members in left.items():
        joined.setdefault(key, []).extend(members)
    rest: list[int] = []
    for key, members in joined.items():
        slots = cut_node(node, tp, members)
        if slots:
            alike.setdefault((key, "joined"), []).extend(slots)
        taken = {index for slot in slots for index in slot}
        rest.extend(index for index in members if index not in taken)
    for slot in cut_node(node, tp, rest):
        mix = tuple(_gpu_key(by_index[index]) for index in slot)
        alike.setdefault(("mixed", mix), []).append(slot)
    return [tuple(slots) for slots in alike.values()]


def _slot_kind(
    cluster: Cluster,
    node: Node,
    gpus: tuple[tuple[int, ...], ...],
    nodes_per_slot: int,
    runs: list[range],
) -> SlotKind:
    groups = [
        find_group(cluster, tuple((index, gpu) for index in nodes for gpu in slot))
        for slot in gpus
        for nodes in _unlike_slots(cluster, runs, nodes_per_slot)
    ]
    by_index = {gpu.index: gpu for gpu in node.gpus}
    members = tuple(by_index[index] for index in gpus[0]) * nodes_per_slot
    is_mixed = len(alike_ranks(members)) > 1
    return SlotKind(
        gpus,
        nodes_per_slot,
        tuple(runs),
        _slowest(members),
        _worst(groups),
        members if is_mixed else (),
    )


def _unlike_slots(cluster: Cluster, runs: list[range], nodes_per_slot: int) -> list[list[int]]:
    """Return the machines of the first slot, and of those that lie otherwise in racks or switches.

    Without either, and inside one machine, all lie alike.
    """
    nodes = [index for run in runs for index in run]
    sizes = block_sizes(cluster)
    if nodes_per_slot == 1 or not sizes:
        return [nodes[:nodes_per_slot]]
    unlike: dict[object, list[int]] = {}
    for first in range(0, len(nodes) - nodes_per_slot + 1, nodes_per_slot):
        slot = nodes[first : first + nodes_per_slot]
        parts = tuple(
            tuple(sorted(Counter(node // size for node in slot).values())) for size in sizes
        )
        unlike.setdefault(parts, slot)
    return list(unlike.values())


def _worst(groups: list[Group]) -> Group:
    return min(
        groups,
        key=lambda group: (
            -group.num_nodes,
            group.ring_bytes_per_s,
            group.bytes_per_s,
            -group.network_latency_s,
            -group.latency_s,
        ),
    )


def _slowest(gpus: Sequence[Gpu]) -> Gpu:
    """Return a GPU with the least of everything that any of `gpus` has."""
    slow = min(gpus, key=memory_bytes_per_s)
    if len({_gpu_key(gpu) for gpu in gpus}) == 1:
        return slow
    dtypes = ("float32", "float16", "bfloat16", "float8")
    return slow.model_copy(
        update={
            "memory_bytes": min(gpu.memory_bytes for gpu in gpus),
            "flops_per_s": {
                dtype: min(flops_per_s(gpu, dtype) for gpu in gpus) for dtype in dtypes
            },
        }
    )


def _speed(kind: SlotKind) -> float:
    return memory_bytes_per_s(kind.gpu)
