"""How the machines of a cluster can be divided between two pools of workers.

A worker is a replica of one pool. It stands within one machine, or on whole machines. Machines that
are alike are counted: of each kind, some give all their GPUs to prefill, some to decode, and some
are shared. Up to `MOST_MIXED` machines of a kind any combination is looked at; beyond, at most one
machine of a kind is shared, in which nothing is lost where the larger worker's GPUs are a multiple
of the smaller's and divide the machine's.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from rankwright.cost_model.layout import SlotKind, alike_machines, find_slots
from rankwright.planner.shapes import Shape
from rankwright.topology.cluster import Cluster, Node
from rankwright.topology.devices import memory_bytes_per_s

MOST_MIXED = 8

Gpus = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Home:
    """What the workers of one pool stand on.

    Args:
        kind: Slots of their stages; where a machine is shared, slots as fast as these.
        pp: Stages.
        machines: Whole machines of a worker; 0: it is within one, beside others.
    """

    kind: SlotKind
    pp: int
    machines: int

    @property
    def stage_gpus(self) -> int:
        """GPUs of one stage."""
        return self.kind.group.size

    @property
    def num_gpus(self) -> int:
        """GPUs of one worker."""
        return self.stage_gpus * self.pp

    @property
    def key(self) -> tuple[int, int]:
        """What tells homes apart."""
        return id(self.kind), self.pp


@dataclass(frozen=True, slots=True)
class Share:
    """Machines of one kind that are divided alike.

    Args:
        kind: Position of the kind among `Machines.kinds`.
        prefill: Workers of prefill in each; of a worker that takes whole machines, 1 in each.
        count: Machines.
    """

    kind: int
    prefill: int
    count: int


@dataclass(frozen=True, slots=True)
class Division:
    """Room for workers of both pools, and how the machines are divided for it."""

    prefill: int
    decode: int
    shares: tuple[Share, ...]


def homes_of(shape: Shape, cluster: Cluster) -> list[Home]:
    """Return where workers of `shape` can stand: one for each kind of slot.

    None where a worker would take a part of one machine and a part of another.
    """
    found: list[Home] = []
    for kind in shape.kinds:
        size = len(cluster.node(kind.nodes[0][0]).gpus)
        per_machine = sum(map(len, kind.gpus)) if kind.nodes_per_slot == 1 else size
        if kind.nodes_per_slot == 1 and len(kind.gpus) >= shape.pp:
            found.append(Home(kind, shape.pp, 0))
        elif per_machine == size and shape.num_gpus % size == 0:
            machines = shape.num_gpus // size
            if kind.num_nodes >= machines:
                found.append(Home(kind, shape.pp, machines))
    return found


class Machines:
    """The machines of a cluster by kind, and what fits them."""

    def __init__(self, cluster: Cluster) -> None:
        """Find the kinds of `cluster`."""
        self.kinds = alike_machines(cluster)
        self._cuts: dict[tuple[object, ...], tuple[Gpus, ...]] = {}
        self._divisions: dict[tuple[object, ...], list[Division]] = {}

    def divisions(self, prefill: Home, decode: Home) -> list[Division]:
        """Return the divisions of which none has more room for one pool without less for the other.

        Ordered by the workers of prefill; none without room for a worker of each.
        """
        key = (*prefill.key, *decode.key)
        if key not in self._divisions:
            found = [Division(0, 0, ())]
            for number in range(len(self.kinds)):
                mine = self._divisions_of_kind(number, prefill, decode)
                found = _best(
                    Division(a.prefill + b.prefill, a.decode + b.decode, a.shares + b.shares)
                    for a in found
                    for b in mine
                )
            self._divisions[key] = [one for one in found if one.prefill and one.decode]
        return self._divisions[key]

    def workers(self, number: int, home: Home, taken: frozenset[int] = frozenset()) -> list[Gpus]:
        """Return the GPUs of each worker of `home` that one machine of a kind has room for.

        Args:
            number: Position of the kind of machine.
            home: What a worker stands on; one that takes whole machines gets all GPUs, once.
            taken: GPUs that are not to be had.
        """
        node, runs = self.kinds[number]
        if home.machines:
            is_mine = home.kind.nodes == tuple(runs) and not taken
            slots = home.kind.gpus if home.kind.nodes_per_slot == 1 else (_indices(node),)
            return [tuple(gpu for slot in slots for gpu in slot)] if is_mine else []
        slots = self._slots(number, home.kind, taken)
        stages = [slots[first : first + home.pp] for first in range(0, len(slots), home.pp)]
        return [sum(worker, ()) for worker in stages if len(worker) == home.pp]

    def _slots(self, number: int, kind: SlotKind, taken: frozenset[int]) -> tuple[Gpus, ...]:
        """Return the slots in what is left of a machine that are as fast as those of `kind`."""
        key = (number, id(kind), taken)
        if key not in self._cuts:
            node, runs = self.kinds[number]
            if not taken and kind.nodes == tuple(runs):
                self._cuts[key] = kind.gpus
            else:
                self._cuts[key] = _cut(node, kind, taken)
        return self._cuts[key]

    def _divisions_of_kind(self, number: int, prefill: Home, decode: Home) -> list[Division]:
        """Return the best divisions of all machines of one kind."""
        _, runs = self.kinds[number]
        count = sum(map(len, runs))
        first = self.workers(number, prefill)
        patterns: dict[int, int] = {}
        for size in range(len(first) + 1):
            taken = frozenset(gpu for worker in first[:size] for gpu in worker)
            patterns[size] = len(self.workers(number, decode, taken))
        return _best(
            Division(
                sum(size * times for size, times in chosen) // max(1, prefill.machines),
                sum(patterns[size] * times for size, times in chosen) // max(1, decode.machines),
                tuple(Share(number, size, times) for size, times in chosen),
            )
            for chosen in _choices(patterns, count)
        )


def _choices(patterns: dict[int, int], count: int) -> Iterable[tuple[tuple[int, int], ...]]:
    """Yield how `count` machines can be divided: prefill workers of each, and of how many each."""
    most = max(patterns)
    if count <= MOST_MIXED:
        # Of those with the same room for prefill, the one with most room for decode.
        best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
        for _ in range(count):
            grown: dict[int, tuple[int, tuple[int, ...]]] = {}
            for total, (room, chosen) in best.items():
                for size, other in patterns.items():
                    if grown.get(total + size, (-1,))[0] < room + other:
                        grown[total + size] = room + other, (*chosen, size)
            best = grown
        for _, chosen in best.values():
            yield tuple(sorted(Counter(chosen).items(), reverse=True))
        return
    for whole in range(count):
        for shared in patterns:
            times = Counter({most: whole})
            times[shared] += 1
            times[0] += count - whole - 1
            yield tuple(sorted(((size, n) for size, n in times.items() if n), reverse=True))


def _best(divisions: Iterable[Division]) -> list[Division]:
    """Return those of which no other has as much room for one pool and more for the other."""
    ordered = sorted(divisions, key=lambda one: (-one.prefill, -one.decode))
    kept: list[Division] = []
    for one in ordered:
        if not kept or one.decode > kept[-1].decode:
            kept.append(one)
    return kept[::-1]


def _cut(node: Node, kind: SlotKind, taken: frozenset[int]) -> tuple[Gpus, ...]:
    """Return the slots of what is left of `node` whose GPUs and links are as good as `kind`'s."""
    left = tuple(gpu for gpu in node.gpus if gpu.index not in taken)
    if len(left) < kind.group.size:
        return ()
    indices = {gpu.index for gpu in left}
    links = tuple(link for link in node.links if {link.a, link.b} <= indices)
    rest = node.model_copy(update={"gpus": left, "links": links, "nics": (), "count": 1})
    slots: list[Gpus] = []
    for found in find_slots(Cluster(nodes=(rest,)), kind.group.size):
        quick = memory_bytes_per_s(found.gpu) >= memory_bytes_per_s(kind.gpu)
        large = found.gpu.memory_bytes >= kind.gpu.memory_bytes
        near = found.group.bytes_per_s >= kind.group.bytes_per_s
        if found.gpu.device == kind.gpu.device and quick and large and near:
            slots += found.gpus
    return tuple(slots)


def _indices(node: Node) -> Gpus:
    return tuple(gpu.index for gpu in node.gpus)
