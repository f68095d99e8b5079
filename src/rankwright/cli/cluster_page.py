"""A `Cluster` as a tree, and its links as a matrix coloured by what they are worth."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rankwright.cli.output import bandwidth, console, gigabytes, ranges, table
from rankwright.link_classes import LINK_CLASSES, link_class
from rankwright.topology.cluster import Cluster, Gpu, Node
from rankwright.topology.graph import islands_of_node
from rankwright.topology.link_kinds import joins_island


def print_cluster(cluster: Cluster, out: Console | None = None) -> None:
    """Print the machines as a tree, then the links of each kind of machine."""
    out = out or console()
    tree = Tree(f"[bold]{cluster.describe()}[/]")
    for node in cluster.nodes:
        _add_node(tree, node)
    if cluster.fabric is not None:
        fabric = cluster.fabric
        rate = fabric.measured_bytes_per_s
        measured = f", planned as {bandwidth(rate)} after measuring" if rate is not None else ""
        tree.add(
            f"fabric: {fabric.kind}, {fabric.ports_per_node} ports a node of "
            f"{bandwidth(fabric.bytes_per_s)}{measured}"
        )
    out.print(tree)
    for node in cluster.nodes:
        if len(node.gpus) > 1 and node.links:
            out.print()
            out.print(_links(node))
    _print_legend(out, {link.kind for node in cluster.nodes for link in node.links})
    for note in cluster.notes:
        out.print(f"[dim]note: {escape(note)}[/]")
    out.print(f"[dim]fingerprint {cluster.fingerprint}[/]")


def print_matrix(
    gpus: Sequence[str],
    matrix: Sequence[Sequence[str]],
    nics: Sequence[str] = (),
    nic_matrix: Sequence[Sequence[str | None]] = (),
    out: Console | None = None,
) -> None:
    """Print link tokens, GPU by GPU and then network port by GPU."""
    out = out or console()
    made = table("", *gpus)
    for name, row in (*zip(gpus, matrix, strict=True), *zip(nics, nic_matrix, strict=True)):
        made.add_row(
            name, *(Text(token or "?", style=link_class(token or "?").style) for token in row)
        )
    out.print(made)
    _print_legend(out, {token for row in (*matrix, *nic_matrix) for token in row if token})


def _add_node(tree: Tree, node: Node) -> None:
    times = f"{node.count} x " if node.count > 1 else ""
    driver = f", driver {node.driver}" if node.driver else ""
    memory = f", {gigabytes(node.host_memory_bytes)} memory" if node.host_memory_bytes else ""
    branch = tree.add(f"{times}[bold]{escape(node.name)}[/]: {node.num_cpus} CPUs{memory}{driver}")
    domains = sorted({gpu.numa_node for gpu in node.gpus}, key=lambda numa: (numa is None, numa))
    for domain in domains:
        inside = branch
        if domain is not None and len(domains) > 1:
            inside = branch.add(f"NUMA {domain}")
        for line in _gpu_lines([gpu for gpu in node.gpus if gpu.numa_node == domain]):
            inside.add(line)
        for nic in node.nics:
            if nic.numa_node == domain or (domain == domains[-1] and nic.numa_node not in domains):
                near = (
                    f", nearest GPUs {ranges(sorted(nic.nearest_gpus))}" if nic.nearest_gpus else ""
                )
                rdma = "RDMA" if nic.rdma else "no RDMA"
                inside.add(f"{escape(nic.name)}: {bandwidth(nic.bytes_per_s)}, {rdma}{near}")
    for line in _island_lines(node):
        branch.add(line)


def _island_lines(node: Node) -> list[str]:
    """Describe the sets of GPUs that fast links join; none where all are on their own."""
    lines: list[str] = []
    for members in islands_of_node(node):
        inside = [
            link
            for link in node.links
            if link.a in members and link.b in members and joins_island(link.kind)
        ]
        if not inside:
            continue
        kinds = sorted({link.kind for link in inside}, key=lambda kind: (len(kind), kind))
        kinds.sort(key=lambda kind: LINK_CLASSES.index(link_class(kind)))
        words = " ".join(f"[{link_class(kind).style}]{kind}[/]" for kind in kinds)
        rates = {link.bytes_per_s for link in inside}
        rate = bandwidth(min(rates))
        if len(rates) > 1:
            rate += f" to {bandwidth(max(rates))}"
        of = "ranks" if node.gpus[0].device == "cpu" else "GPUs"
        lines.append(f"island of {of} {ranges(list(members))}: {words}, {rate} a pair")
    return lines


def _gpu_lines(gpus: list[Gpu]) -> list[str]:
    """Describe GPUs, those that are alike in one line."""
    alike: dict[str, list[int]] = {}
    for gpu in gpus:
        line = f"{gpu.device}, {gigabytes(gpu.memory_bytes)} free of "
        line += gigabytes(gpu.total_memory_bytes)
        if gpu.pcie_generation is not None:
            line += f", PCIe {gpu.pcie_generation}.0 x{gpu.pcie_width}"
        if gpu.num_processes:
            line += f" [yellow](busy: {gpu.num_processes} processes)[/]"
        if gpu.mig:
            line += " [yellow](MIG)[/]"
        alike.setdefault(line, []).append(gpu.index)
    kind = "rank" if gpus and gpus[0].device == "cpu" else "GPU"
    return [f"{kind} {ranges(sorted(indices))}: {line}" for line, indices in alike.items()]


def _links(node: Node) -> Table:
    tokens = {(link.a, link.b): link.kind for link in node.links}
    tokens |= {(link.b, link.a): link.kind for link in node.links}
    indices = [gpu.index for gpu in node.gpus]
    made = table(node.name, *(str(index) for index in indices))
    for a in indices:
        row = ["X" if a == b else tokens.get((a, b), "-") for b in indices]
        made.add_row(str(a), *(Text(token, style=link_class(token).style) for token in row))
    return made


def _print_legend(out: Console, tokens: set[str]) -> None:
    parts: list[str] = []
    for one in LINK_CLASSES:
        seen = sorted(token for token in tokens if link_class(token) is one)
        if seen:
            parts.append(f"[{one.style}]{' '.join(seen)}[/] {one.meaning}")
    if parts:
        out.print("  ".join(parts))
