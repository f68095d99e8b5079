"""What `probe --measure` timed, as short tables."""

from rich.console import Console

from rankwright.cli.output import bandwidth, console, ranges, seconds, table
from rankwright.topology.cluster import Cluster
from rankwright.topology.measurements import CollectiveTime, Measurements


def print_measurements(cluster: Cluster, out: Console | None = None) -> None:
    """Print pairs, collectives, memory and matrix products; nothing where none were measured."""
    measured = cluster.measurements
    if measured is None:
        return
    out = out or console()
    _print_pairs(cluster, measured, out)
    _print_node_pairs(measured, out)
    _print_collectives(measured, out)
    _print_devices(cluster, measured, out)
    ways = f", {', '.join(measured.transports)}" if measured.transports else ""
    out.print(
        f"[dim]{measured.backend}{ways}; {measured.software}; took {measured.seconds:.0f} s[/]"
    )


def _print_pairs(cluster: Cluster, measured: Measurements, out: Console) -> None:
    if not measured.pairs:
        return
    kinds = {
        (number, link.a, link.b): link.kind
        for number in {pair.node for pair in measured.pairs}
        for link in cluster.node(number).links
    }
    made = table("pair", "link", "forth", "back", "latency", right=("forth", "back", "latency"))
    for pair in measured.pairs:
        a, b = min(pair.a, pair.b), max(pair.a, pair.b)
        made.add_row(
            f"{_of_node(cluster, pair.node)}{pair.a}-{pair.b}",
            kinds.get((pair.node, a, b), "-"),
            bandwidth(pair.forth_bytes_per_s),
            bandwidth(pair.back_bytes_per_s),
            seconds(pair.latency_s),
        )
    out.print(made)
    out.print()


def _print_node_pairs(measured: Measurements, out: Console) -> None:
    if not measured.node_pairs:
        return
    columns = ("all GPUs forth", "all back", "one GPU", "latency")
    made = table("machines", *columns, right=columns)
    for pair in measured.node_pairs:
        made.add_row(
            f"{pair.a}-{pair.b}",
            bandwidth(pair.forth_bytes_per_s),
            bandwidth(pair.back_bytes_per_s),
            bandwidth(pair.single_bytes_per_s),
            seconds(pair.latency_s),
        )
    out.print(made)
    out.print()


def _print_devices(cluster: Cluster, measured: Measurements, out: Console) -> None:
    made = table("device", "memory copy", "best matrix product", right=("memory copy",))
    for row in measured.memory:
        gpu = next(gpu for gpu in cluster.node(row.node).gpus if gpu.index == row.gpu)
        best: dict[str, float] = {}
        for product in measured.gemms:
            if (product.node, product.gpu) == (row.node, row.gpu):
                best[product.dtype] = max(best.get(product.dtype, 0.0), product.flops_per_s)
        made.add_row(
            f"{_of_node(cluster, row.node)}{gpu.index} {gpu.device}",
            bandwidth(row.bytes_per_s),
            ", ".join(f"{dtype} {_tera(rate)} TFLOP/s" for dtype, rate in best.items()),
        )
    out.print(made)


def _tera(rate: float) -> str:
    """Return a rate in units of 1e12, to three digits and without an exponent."""
    return f"{rate / 1e12:.0f}" if rate >= 1e14 else f"{rate / 1e12:.3g}"


def _of_node(cluster: Cluster, number: int) -> str:
    """Return what goes before a GPU's index where there are several machines."""
    return f"{number}/" if cluster.num_nodes > 1 else ""


def _print_collectives(measured: Measurements, out: Console) -> None:
    """Print of each operation and group the smallest size's time and the largest one's rate."""
    several = any(row.nodes != (0,) for row in measured.collectives)
    rows: dict[tuple[str, str], list[CollectiveTime]] = {}
    for row in measured.collectives:
        over = ranges(sorted(row.gpus))
        over = f"{ranges(sorted(row.nodes))}/{over}" if several else over
        rows.setdefault((row.operation, over), []).append(row)
    if not rows:
        return
    made = table("operation", "over", "smallest", "largest", "bus", right=("smallest", "largest"))
    for (operation, over), times in rows.items():
        small = min(times, key=lambda row: row.size_bytes)
        large = max(times, key=lambda row: row.size_bytes)
        made.add_row(
            operation.replace("_", "-"),
            over,
            f"{small.size_bytes} B {seconds(small.seconds)}",
            f"{large.size_bytes / 2**20:.0f} MiB {seconds(large.seconds)}",
            bandwidth(large.bus_bytes_per_s),
        )
    out.print(made)
    out.print()
