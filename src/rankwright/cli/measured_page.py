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
    node = cluster.nodes[0]
    kinds = {frozenset((link.a, link.b)): link.kind for link in node.links}
    if measured.pairs:
        made = table("pair", "link", "forth", "back", "latency", right=("forth", "back", "latency"))
        for pair in measured.pairs:
            made.add_row(
                f"{pair.a}-{pair.b}",
                kinds.get(frozenset((pair.a, pair.b)), "-"),
                bandwidth(pair.forth_bytes_per_s),
                bandwidth(pair.back_bytes_per_s),
                seconds(pair.latency_s),
            )
        out.print(made)
        out.print()
    _print_collectives(measured, out)
    made = table("device", "memory copy", "best matrix product", right=("memory copy",))
    for gpu in node.gpus:
        copies = [row.bytes_per_s for row in measured.memory if row.gpu == gpu.index]
        best: dict[str, float] = {}
        for row in measured.gemms:
            if row.gpu == gpu.index:
                best[row.dtype] = max(best.get(row.dtype, 0.0), row.flops_per_s)
        made.add_row(
            f"{gpu.index} {gpu.device}",
            bandwidth(copies[0]) if copies else "-",
            ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in best.items()),
        )
    out.print(made)
    ways = f", {', '.join(measured.transports)}" if measured.transports else ""
    out.print(
        f"[dim]{measured.backend}{ways}; {measured.software}; took {measured.seconds:.0f} s[/]"
    )


def _print_collectives(measured: Measurements, out: Console) -> None:
    """Print of each operation and group the smallest size's time and the largest one's rate."""
    rows: dict[tuple[str, tuple[int, ...]], list[CollectiveTime]] = {}
    for row in measured.collectives:
        rows.setdefault((row.operation, row.gpus), []).append(row)
    if not rows:
        return
    made = table("operation", "over", "smallest", "largest", "bus", right=("smallest", "largest"))
    for (operation, gpus), times in rows.items():
        small = min(times, key=lambda row: row.size_bytes)
        large = max(times, key=lambda row: row.size_bytes)
        made.add_row(
            operation.replace("_", "-"),
            ranges(sorted(gpus)),
            f"{small.size_bytes} B {seconds(small.seconds)}",
            f"{large.size_bytes / 2**20:.0f} MiB {seconds(large.seconds)}",
            bandwidth(large.bus_bytes_per_s),
        )
    out.print(made)
    out.print()
