"""Turns what was timed on several machines and between them into one cluster.

Each machine gets its own rates (`apply_measurements.py`) before equal ones are folded; the fabric
gets that of its pairs.
"""

import statistics
from collections.abc import Sequence

from rankwright.topology.apply_measurements import apply_measurements
from rankwright.topology.cluster import Cluster, Fabric
from rankwright.topology.join import join
from rankwright.topology.measurements import Measurements
from rankwright.topology.nccl_note import network_note

# What large messages reach of a sound fabric: operators call 45 of 50 GB/s over InfiniBand of 400
# Gb/s healthy, and an `ib_write_bw` of 388 Gb/s, so the ports themselves carry more.
_FABRIC_SHARE = 0.9
# CPU ranks are timed over gloo, which is what the engine runs on: nothing to scale.
_CPU_SHARE = 1.0
_FAR_BELOW = 0.5


def apply_between(
    found: Sequence[Cluster], measured: Measurements, *, fabric: str | None, source: str
) -> Cluster:
    """Return the machines as one cluster with measured rates and notes on what is out of line.

    Args:
        found: A machine each, in the order of `node` in the measurements.
        measured: On all of them.
        fabric: The network between them, as shorthand has it; None: what their ports say.
        source: Where they came from.

    Raises:
        ValueError: GPUs were measured that the machines do not have.
    """
    each = [
        apply_measurements(cluster, _part_of(measured, node)).model_copy(
            update={"measurements": None}
        )
        for node, cluster in enumerate(found)
    ]
    cluster = join(each, fabric=fabric, source=source)
    notes = [*cluster.notes, *measured.notes]
    names = [cluster.nodes[0].name for cluster in found]
    has_rdma = all(any(nic.rdma for nic in cluster.nodes[0].nics) for cluster in found)
    said = network_note(measured, has_rdma=has_rdma)
    notes += [said] if said is not None else []
    joined = cluster.fabric
    if joined is not None and measured.node_pairs:
        joined, more = _fabric(joined, measured, names)
        notes += more
    return cluster.model_copy(
        update={
            "fabric": joined,
            "measurements": measured,
            "notes": tuple(dict.fromkeys(notes)),
        }
    )


def _part_of(measured: Measurements, node: int) -> Measurements:
    return measured.model_copy(
        update={
            "pairs": tuple(row for row in measured.pairs if row.node == node),
            "node_pairs": (),
            "collectives": tuple(row for row in measured.collectives if row.nodes == (node,)),
            "memory": tuple(row for row in measured.memory if row.node == node),
            "gemms": tuple(row for row in measured.gemms if row.node == node),
            # A way over the network is that between machines here.
            "transports": tuple(way for way in measured.transports if not way.startswith("NET")),
            "notes": (),
        }
    )


def _fabric(
    fabric: Fabric, measured: Measurements, names: Sequence[str]
) -> tuple[Fabric, list[str]]:
    rates = {
        (pair.a, pair.b): min(pair.forth_bytes_per_s, pair.back_bytes_per_s)
        for pair in measured.node_pairs
    }
    share = _CPU_SHARE if measured.backend == "gloo" else _FABRIC_SHARE
    best = max(rates.values())
    notes = [
        f"{names[a]} and {names[b]} reach {100 * rate / best:.0f} % of what the best pair of "
        f"machines does ({rate / 1e9:.3g} of {best / 1e9:.3g} GB/s): check the ports, cables and "
        "switches of the one that is in other slow pairs too"
        for (a, b), rate in rates.items()
        if rate < _FAR_BELOW * best
    ]
    # The median of the pairs, so that one bad cable, which the note names, does not slow all plans.
    middle = statistics.median(rates.values())
    due = share * fabric.bytes_per_s * fabric.ports_per_node
    if middle < _FAR_BELOW * due:
        notes.append(
            f"machines reach {100 * middle / due:.0f} % of what {fabric.ports_per_node} x "
            f"{fabric.bytes_per_s * 8 / 1e9:.0f} Gb/s should carry ({middle / 1e9:.3g} of "
            f"{due / 1e9:.3g} GB/s): see which way {measured.backend} takes between them, and "
            "whether the fabric is what --fabric or the ports say"
        )
    latency_s = statistics.median(pair.latency_s for pair in measured.node_pairs)
    update = {
        "measured_bytes_per_s": middle / share / fabric.ports_per_node,
        "latency_s": latency_s,
    }
    return fabric.model_copy(update=update), notes
