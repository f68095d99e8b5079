"""A `Cluster` as a picture: GPUs, their links, NUMA domains and network ports, as one SVG.

Each kind of machine is drawn once. Above its GPUs are the links that bypass PCIe: a bar where all
pairs of an island are alike (NVSwitch), arcs where they are not. Below them is the PCIe tree, a bar
for each set of GPUs that meet at one level. Colours are those of `link_classes.py`, for light and
for dark paper; every link tells its rate when pointed at.
"""

from collections.abc import Iterable, Sequence
from html import escape
from itertools import combinations
from pathlib import Path

from rankwright.cli.output import bandwidth, gigabytes, ranges
from rankwright.link_classes import LINK_CLASSES, OTHER, link_class
from rankwright.svg_canvas import BAR, CHARACTER, Canvas, styles
from rankwright.topology.cluster import Cluster, Gpu, Link, Nic, Node
from rankwright.topology.link_kinds import PCIE_KINDS, is_direct, nvlink_count
from rankwright.topology.whole_file import write_whole

MAX_GPUS, MAX_NODES = 16, 8  # drawn; a note counts the others
# Pixels.
_GPU_WIDTH, _GPU_HEIGHT, _GAP = 112, 78, 10
_PORT_HEIGHT, _LANE = 34, 36
_PAD, _MARGIN, _TITLE = 14, 20, 30
_ARC_STEP, _ARC_BASE = 12, 18
_LABELLED_ARCS = 2  # more labels than this would hide each other

Ends = dict[int, float]  # centre of each GPU that is drawn, by index


def cluster_svg(cluster: Cluster, *, paper: bool = True) -> str:
    """Return the picture as the text of an SVG that needs nothing else.

    Args:
        cluster: The machines.
        paper: Whether it has a background of its own; a page that it stands in has one.
    """
    canvas = Canvas()
    y: float = _MARGIN
    for node in cluster.nodes[:MAX_NODES]:
        bottom = _draw_node(canvas, node, y)
        canvas.machines.append((y, bottom))
        y = bottom + _MARGIN
    right = canvas.width = canvas.width + _PAD
    hidden = len(cluster.nodes) - MAX_NODES
    if hidden > 0:
        canvas.text(_MARGIN, y + 4, f"and {hidden} more kinds of machine", "dim")
        y += _MARGIN
    if cluster.fabric is not None:
        fabric = cluster.fabric
        ports = f"{fabric.ports_per_node} port{'s' if fabric.ports_per_node > 1 else ''}"
        words = f"{fabric.kind}: {ports} a node of {bandwidth(fabric.bytes_per_s)}"
        canvas.line((_MARGIN + right) / 2, y - _MARGIN, y, "network")
        canvas.bar(_MARGIN, right, y, "network", words, f"{words}, between the machines")
        y += BAR + _MARGIN
    y = _draw_legend(canvas, cluster, y)
    width, height = canvas.width + _MARGIN, y + 4
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" '
        'font-family="system-ui, Helvetica, Arial, sans-serif">',
        f"<title>{escape(cluster.describe())}</title>",
        f"<style>{styles()}</style>",
        *([f'<rect width="{width:g}" height="{height:g}" class="rw-paper"/>'] if paper else []),
        *(
            f'<rect x="{_MARGIN}" y="{top:g}" width="{right - _MARGIN:g}" '
            f'height="{bottom - top:g}" rx="10" class="rw-box"/>'
            for top, bottom in canvas.machines
        ),
        *canvas.parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def write_svg(cluster: Cluster, path: Path) -> None:
    """Write the picture to `path`, whole or not at all."""
    write_whole(path, cluster_svg(cluster))


def _draw_node(canvas: Canvas, node: Node, top: float) -> float:
    """Draw one kind of machine and return where it ends."""
    gpus = _in_order(node)[:MAX_GPUS]
    shown = {gpu.index for gpu in gpus}
    links = [link for link in node.links if link.a in shown and link.b in shown]
    domains = _domains(gpus, node.nics)
    framed = len(domains) > 1
    canvas.text(_MARGIN + _PAD, top + 21, _title(node), size=13)

    centres: Ends = {}
    spans: list[tuple[float, float]] = []
    x: float = _MARGIN + _PAD
    for _, members, nics in domains:
        columns = max(len(members), min(len(nics), 4), 1)
        x += _PAD if framed else 0
        for at, gpu in enumerate(members):
            centres[gpu.index] = x + at * (_GPU_WIDTH + _GAP) + _GPU_WIDTH / 2
        right = x + columns * (_GPU_WIDTH + _GAP) - _GAP
        spans.append((x, right))
        canvas.width = max(canvas.width, right + (_PAD if framed else 0))
        x = right + (_PAD if framed else 0) + _GAP

    gpu_top = _draw_direct(canvas, links, centres, top + _TITLE + (12 if framed else 0))
    for gpu in gpus:
        _draw_gpu(canvas, gpu, centres[gpu.index], gpu_top)
    inner = [link for link in links if not (framed and link.kind in ("SYS", "SOC"))]
    lanes_top = gpu_top + _GPU_HEIGHT
    bottom = _draw_pcie(canvas, inner, centres, lanes_top)
    rows = 0
    for (left, right), (_, _, nics) in zip(spans, domains, strict=True):
        columns = max(1, int((right - left + _GAP) // (_GPU_WIDTH + _GAP)))
        rows = max(rows, -(-len(nics) // columns))
        for at, nic in enumerate(nics):
            row, column = divmod(at, columns)
            port_x = left + column * (_GPU_WIDTH + _GAP)
            _draw_port(canvas, nic, port_x, bottom + _GAP + row * (_PORT_HEIGHT + 6))
    bottom += rows * (_PORT_HEIGHT + 6) + _PAD
    if framed:
        bottom = _draw_frames(canvas, domains, spans, links, gpu_top - 8, bottom)
    if len(node.gpus) > len(gpus):
        canvas.text(_MARGIN + _PAD, bottom + 8, f"and {len(node.gpus) - len(gpus)} more", "dim")
        bottom += 16
    return bottom


Domain = tuple[int | None, list[Gpu], list[Nic]]


def _domains(gpus: Sequence[Gpu], nics: Sequence[Nic]) -> list[Domain]:
    """Return NUMA domains with what is on them; ports of unknown place are on the last one."""
    numbers = list(dict.fromkeys(gpu.numa_node for gpu in gpus))
    numbers += [n for n in dict.fromkeys(nic.numa_node for nic in nics) if n not in numbers]
    if None in numbers and len(numbers) > 1 and all(gpu.numa_node is not None for gpu in gpus):
        numbers.remove(None)
    return [
        (
            number,
            [gpu for gpu in gpus if gpu.numa_node == number],
            [
                nic
                for nic in nics
                if nic.numa_node == number
                or (nic.numa_node not in numbers and number == numbers[-1])
            ],
        )
        for number in numbers
    ]


def _in_order(node: Node) -> list[Gpu]:
    """Return the GPUs so that those which meet early in the PCIe tree stand side by side."""
    keys: dict[int, list[int]] = {gpu.index: [] for gpu in node.gpus}
    for kind in reversed(PCIE_KINDS[:5]):
        near = [link for link in node.links if _depth(link.kind) <= _depth(kind)]
        for members in _joined([gpu.index for gpu in node.gpus], near):
            for index in members:
                keys[index].append(members[0])

    def key(gpu: Gpu) -> tuple[bool, int, list[int], int]:
        return gpu.numa_node is None, gpu.numa_node or 0, keys[gpu.index], gpu.index

    return sorted(node.gpus, key=key)


def _depth(kind: str) -> int:
    """Return how far down in the PCIe tree a link goes; past it all: not in the tree."""
    kind = "SYS" if kind == "SOC" else kind
    return PCIE_KINDS.index(kind) if kind in PCIE_KINDS else len(PCIE_KINDS)


def _joined(gpus: Iterable[int], links: Iterable[Link]) -> list[list[int]]:
    """Return the sets of GPUs that links join."""
    sets = {gpu: [gpu] for gpu in gpus}
    for link in links:
        a, b = sets[link.a], sets[link.b]
        if a is not b:
            a += b
            sets.update(dict.fromkeys(b, a))
    return [sorted(members) for members in {id(one): one for one in sets.values()}.values()]


def _title(node: Node) -> str:
    devices: dict[str, int] = {}
    for gpu in node.gpus:
        devices[gpu.device] = devices.get(gpu.device, 0) + 1
    words = [node.name + (f"  \N{MULTIPLICATION SIGN} {node.count}" if node.count > 1 else "")]
    words += [" + ".join(f"{count} x {device}" for device, count in devices.items())]
    words += [f"{node.num_cpus} CPUs"] if node.num_cpus > 1 else []
    words += [f"driver {node.driver}"] if node.driver else []
    return "  \N{MIDDLE DOT}  ".join(words)


def _draw_direct(canvas: Canvas, links: Sequence[Link], centres: Ends, top: float) -> float:
    """Draw the links that bypass PCIe, and return where the GPUs begin."""
    direct = [link for link in links if is_direct(link.kind)]
    order = sorted(centres, key=lambda index: centres[index])
    place = {index: at for at, index in enumerate(order)}
    bars: list[tuple[list[int], Link]] = []
    arcs: list[Link] = []
    for members in _joined(order, direct):
        inside = [link for link in direct if link.a in members]
        pairs = {frozenset((link.a, link.b)) for link in inside}
        alike = len({(link.kind, link.bytes_per_s) for link in inside}) == 1
        if len(members) > 2 and alike and len(pairs) == len(list(combinations(members, 2))):
            bars.append((members, inside[0]))
        else:
            arcs += inside
    lanes = _lanes(arcs, place)
    step = _ARC_STEP if len(arcs) > _LABELLED_ARCS else 20  # 20: room for a line of text
    room = (_ARC_BASE + step * max(lanes, default=0) + 18) if arcs else 0
    bottom = top + max(room, (BAR + 26) if bars else 0, 4)
    for members, link in bars:
        xs = [centres[index] for index in members]
        name = link_class(link.kind).name
        y = bottom - 18 - BAR
        words = f"{link.kind}: {bandwidth(link.bytes_per_s)} each way"
        for x in xs:
            canvas.line(x, y + BAR, bottom, name)
        ends = min(xs) - _GPU_WIDTH / 2, max(xs) + _GPU_WIDTH / 2
        canvas.bar(*ends, y, name, words, f"{words}, between any two of {len(members)}")
    rises = [_ARC_BASE + step * lane for lane in lanes]
    _draw_arcs(canvas, arcs, rises, place, centres, bottom)
    return bottom


def _lanes(arcs: Sequence[Link], place: dict[int, int]) -> list[int]:
    """Return the height of each arc, so that none runs along another; short ones lie low."""
    ends = [sorted((place[link.a], place[link.b])) for link in arcs]
    lanes = [0] * len(arcs)
    taken: list[list[int]] = []  # the arcs on each height
    for at in sorted(range(len(arcs)), key=lambda at: (ends[at][1] - ends[at][0], ends[at][0])):
        left, right = ends[at]
        while lanes[at] < len(taken) and any(
            left <= ends[other][1] and ends[other][0] <= right for other in taken[lanes[at]]
        ):
            lanes[at] += 1
        if lanes[at] == len(taken):
            taken.append([])
        taken[lanes[at]].append(at)
    return lanes


def _draw_arcs(
    canvas: Canvas,
    arcs: Sequence[Link],
    rises: Sequence[int],
    place: dict[int, int],
    centres: Ends,
    bottom: float,
) -> None:
    """Draw links as arcs that leave each GPU side by side, short ones outside: none cross there."""

    def span(link: Link, index: int) -> int:
        return place[link.b if index == link.a else link.a] - place[index]

    starts: dict[tuple[int, int], float] = {}
    for index, centre in centres.items():
        # To the left first, near ones before far ones; then to the right, far ones first.
        mine = [at for at, link in enumerate(arcs) if index in (link.a, link.b)]
        mine.sort(key=lambda at: (span(arcs[at], index) > 0, -span(arcs[at], index)))
        step = min(14.0, (_GPU_WIDTH - 16) / max(len(mine), 1))
        for number, at in enumerate(mine):
            starts[at, index] = centre + (number - (len(mine) - 1) / 2) * step
    for at, link in enumerate(arcs):
        left, right = sorted((starts[at, link.a], starts[at, link.b]))
        high, bend = bottom - rises[at], min(12.0, (right - left) / 2)
        width = 1.6 + 0.8 * min(max(nvlink_count(link.kind) - 1, 0), 4)
        words = f"GPU {link.a} to GPU {link.b}: {link.kind}, {bandwidth(link.bytes_per_s)} each way"
        canvas.add(
            f'<path d="M{left:g} {bottom:g}V{high + bend:g}Q{left:g} {high:g} {left + bend:g} '
            f"{high:g}H{right - bend:g}Q{right:g} {high:g} {right:g} {high + bend:g}V{bottom:g}"
            f'" class="rw-link rw-{link_class(link.kind).name}" style="stroke-width:{width:g}">'
            f"<title>{escape(words)}</title></path>"
        )
        if len(arcs) <= _LABELLED_ARCS:
            words = f"{link.kind}: {bandwidth(link.bytes_per_s)}"
            canvas.text((left + right) / 2, high - 5, words, anchor="middle")


def _draw_pcie(canvas: Canvas, links: Sequence[Link], centres: Ends, top: float) -> float:
    """Draw the tree below the GPUs, a lane for each level that joins some, and return its end."""
    sets = {index: [index] for index in centres}
    anchor = {index: (x, top) for index, x in centres.items()}  # where its set can be reached
    y = top
    for depth in range(5):
        level = [link for link in links if _depth(link.kind) == depth]
        if not level:
            continue
        y += _LANE
        near = [link for link in links if _depth(link.kind) <= depth]
        for members in _joined(centres, near):
            inside = [link for link in level if link.a in members]
            if not inside:
                continue
            ends = sorted({anchor[index] for index in members})
            kind = link_class(inside[0].kind).name
            for x, start in ends:
                canvas.line(x, start, y - BAR, kind)
            slow, fast = (pick(link.bytes_per_s for link in inside) for pick in (min, max))
            words = f"{inside[0].kind}: {bandwidth(slow)}"
            words += f" to {bandwidth(fast)}" if fast > slow else ""
            left, right = ends[0][0] - 12, ends[-1][0] + 12
            canvas.bar(left, right, y - BAR, kind, words, f"{words} each way")
            for index in members:
                sets[index] = members
                anchor[index] = ((left + right) / 2, y)
    return y


def _draw_gpu(canvas: Canvas, gpu: Gpu, centre: float, top: float) -> None:
    warning = f"busy: {gpu.num_processes} processes" if gpu.num_processes else ""
    warning = "MIG" if gpu.mig else warning
    kind = "rw-gpu rw-warned rw-host" if warning else "rw-gpu"
    free = f"{gigabytes(gpu.memory_bytes)} of {gigabytes(gpu.total_memory_bytes)} free"
    canvas.box(centre - _GPU_WIDTH / 2, top, _GPU_WIDTH, _GPU_HEIGHT, kind, f"{gpu.name}, {free}")
    label = "rank" if gpu.device == "cpu" else "GPU"
    canvas.text(centre, top + 19, f"{label} {gpu.index}", size=13, anchor="middle")
    key = gpu.device if len(gpu.device) <= 17 else gpu.device[:16] + "\N{HORIZONTAL ELLIPSIS}"
    canvas.text(centre, top + 36, key, anchor="middle")
    canvas.text(centre, top + 52, f"{gigabytes(gpu.memory_bytes)} free", "dim", 10, "middle")
    last = warning
    if not warning and gpu.pcie_generation is not None:
        last = f"PCIe {gpu.pcie_generation}.0 x{gpu.pcie_width}"
    canvas.text(centre, top + 67, last, "ink" if warning else "dim", 10, "middle")


def _draw_port(canvas: Canvas, nic: Nic, x: float, y: float) -> None:
    rdma = "RDMA" if nic.rdma else "no RDMA"
    words = f"{nic.name}: {bandwidth(nic.bytes_per_s)}, {rdma}"
    if nic.nearest_gpus:
        words += f", nearest GPUs {ranges(sorted(nic.nearest_gpus))}"
    canvas.box(x, y, _GPU_WIDTH, _PORT_HEIGHT, "rw-bar rw-network", words)
    canvas.text(x + _GPU_WIDTH / 2, y + 14, nic.name[:17], anchor="middle")
    canvas.text(x + _GPU_WIDTH / 2, y + 27, f"{bandwidth(nic.bytes_per_s)}", "dim", 10, "middle")


def _draw_frames(
    canvas: Canvas,
    domains: Sequence[Domain],
    spans: Sequence[tuple[float, float]],
    links: Sequence[Link],
    top: float,
    bottom: float,
) -> float:
    """Draw the NUMA domains and what is between them, and return where it ends."""
    bottom += 12
    for (left, right), (number, _, _) in zip(spans, domains, strict=True):
        name = "NUMA domain unknown" if number is None else f"NUMA {number}"
        canvas.box(left - 8, top, right - left + 16, bottom - top, "rw-frame", name)
        canvas.text(left, bottom - 7, name, "dim")
    between = [link for link in links if link.kind in ("SYS", "SOC")]
    if not between:
        return bottom + _PAD
    slowest = min(between, key=lambda link: link.bytes_per_s)
    name = link_class(slowest.kind).name
    joined = {end for link in between for end in (link.a, link.b)}
    y = bottom + _LANE - BAR
    middles = [
        (left + right) / 2
        for (left, right), (_, gpus, _) in zip(spans, domains, strict=True)
        if any(gpu.index in joined for gpu in gpus)
    ]
    for x in middles:
        canvas.line(x, bottom, y, name)
    words = f"{slowest.kind}: {bandwidth(slowest.bytes_per_s)}"
    canvas.bar(min(middles) - 12, max(middles) + 12, y, name, words, f"{words} each way")
    return y + BAR + _PAD


def _draw_legend(canvas: Canvas, cluster: Cluster, y: float) -> float:
    """Explain the colours that are in the picture and return where it ends."""
    rates: dict[str, list[float]] = {}
    for node in cluster.nodes[:MAX_NODES]:
        for link in node.links:
            rates.setdefault(link.kind, []).append(link.bytes_per_s)
    x: float = _MARGIN
    for one in (*LINK_CLASSES, OTHER):
        kinds = sorted(kind for kind in rates if link_class(kind) is one)
        if not kinds:
            continue
        listed = ", ".join(f"{kind} {bandwidth(min(rates[kind]))}" for kind in kinds)
        words = f"{one.meaning}: {listed}"
        width = 26 + len(words) * CHARACTER + 24
        if x > _MARGIN and x + width > max(canvas.width, 640):
            x, y = _MARGIN, y + 18
        canvas.add(f'<path d="M{x:g} {y:g}h18" class="rw-link rw-{one.name}" stroke-width="3"/>')
        canvas.text(x + 26, y + 4, words, "dim")
        x += width
    return y + 14 if rates else y
