"""Which GPUs of a machine can take each other's place, and so which sets of them are alike.

Two GPUs are twins if they are of one kind and have the same link to every other GPU: exchanging
them changes nothing. Sets with as many GPUs of each class of twins then do the same, so that the
255 sets of eight GPUs below one NVSwitch are eight kinds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from rankwright.topology.cluster import Cluster, Gpu, Link, Node

# Facts of a GPU on which neither speed nor memory of a rank depends.
_NAMES_ONLY = {
    *("index", "name", "uuid", "numa_node", "num_processes", "mig"),
    *("pcie_generation", "pcie_width", "nvlink_version", "total_memory_bytes"),
}

Gpus = tuple[int, ...]
Counts = tuple[int, ...]


@dataclass(frozen=True)
class Twins:
    """The GPUs of one machine by what they can be exchanged for.

    Args:
        node: The machine.
    """

    node: Node

    @cached_property
    def classes(self) -> tuple[Gpus, ...]:
        """Indices of the GPUs of each class, ascending; classes by their first GPU."""
        found: list[list[int]] = []
        for gpu in sorted(self.node.gpus, key=lambda one: one.index):
            home = next((twins for twins in found if self._are_twins(twins[0], gpu.index)), None)
            if home is None:
                found.append([gpu.index])
            else:
                home.append(gpu.index)
        return tuple(map(tuple, found))

    @property
    def num_kinds(self) -> int:
        """Kinds of sets of GPUs, those without any left out."""
        total = 1
        for twins in self.classes:
            total *= len(twins) + 1
        return total - 1

    def kinds(self) -> Iterator[Counts]:
        """Yield for each kind of set how many GPUs of each class are in it."""
        sizes = [range(len(twins) + 1) for twins in self.classes]
        yield from (counts for counts in product(*sizes) if any(counts))

    def first(self, counts: Counts) -> Gpus:
        """Return the first set of a kind, its GPUs class by class."""
        pairs = zip(self.classes, counts, strict=True)
        return tuple(gpu for twins, count in pairs for gpu in twins[:count])

    def signature(self, gpus: Gpus) -> tuple[object, ...]:
        """Return what is alike for sets of which one can be laid over the other in its order."""
        order = {gpu: position for position, gpu in enumerate(gpus)}
        links = sorted(
            (*sorted((order[link.a], order[link.b])), *_link_facts(link))
            for link in self.node.links
            if link.a in order and link.b in order
        )
        return tuple(self._facts[gpu] for gpu in gpus), tuple(links)

    @cached_property
    def _facts(self) -> dict[int, str]:
        return {gpu.index: gpu_facts(gpu) for gpu in self.node.gpus}

    @cached_property
    def _links(self) -> dict[int, dict[int, tuple[object, ...]]]:
        """Facts of each GPU's links by the GPU at their other end."""
        ends: dict[int, dict[int, tuple[object, ...]]] = {gpu.index: {} for gpu in self.node.gpus}
        for link in self.node.links:
            ends[link.a][link.b] = ends[link.b][link.a] = _link_facts(link)
        return ends

    def _are_twins(self, one: int, other: int) -> bool:
        mine, theirs = dict(self._links[one]), dict(self._links[other])
        mine.pop(other, None)
        theirs.pop(one, None)
        return self._facts[one] == self._facts[other] and mine == theirs


def part_of(cluster: Cluster, gpus: Gpus) -> Cluster:
    """Return the cluster of these GPUs of a machine alone, with the links among them."""
    (node,) = cluster.nodes
    chosen = tuple(gpu for gpu in node.gpus if gpu.index in gpus)
    links = tuple(link for link in node.links if link.a in gpus and link.b in gpus)
    part = node.model_copy(update={"gpus": chosen, "links": links, "nics": ()})
    return Cluster(nodes=(part,), source=cluster.source)


def gpu_facts(gpu: Gpu) -> str:
    """Return what of a GPU speed and memory of a rank depend on, as text to compare."""
    return gpu.model_dump_json(exclude=_NAMES_ONLY)


def _link_facts(link: Link) -> tuple[str, float, float]:
    return link.kind, link.bytes_per_s, link.latency_s
