"""A `Plan` as one HTML page that needs nothing else: pictures are inline SVG, styles are inside."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rankwright.cli.output import gigabytes, seconds
from rankwright.cli.plan_page import num_devices
from rankwright.cluster_svg import cluster_svg
from rankwright.cost_model.prediction import Estimate
from rankwright.pareto_svg import pareto_svg
from rankwright.planner.explain import explain
from rankwright.planner.plan import Plan, RankPlan
from rankwright.topology.whole_file import write_whole

# Of colour-blind-safe hues (Okabe and Ito, 2008), repeated when a chart has more parts.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#b8a800")
_REPLICAS_SHOWN = 8
_CELL, _GAP, _PER_ROW = 54, 16, 8  # pixels; ranks side by side in a stage
_MARGIN_TOP, _CAPTION = 20, 18


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a stacked bar; lengths in percent of the whole bar."""

    name: str
    amount: str
    start: float
    length: float
    colour: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class RankBox:
    """A rank in the picture."""

    x: int
    y: int
    label: str
    place: str
    title: str
    colour: str


@dataclass(frozen=True, slots=True)
class StageBox:
    """A stage in the picture, around its ranks."""

    x: int
    y: int
    width: int
    height: int
    caption: str


@dataclass(frozen=True, slots=True)
class Picture:
    """Ranks in stages (left to right) of replicas (downwards)."""

    width: int
    height: int
    stages: tuple[StageBox, ...]
    ranks: tuple[RankBox, ...]
    num_hidden: int


def write_report(plan: Plan, path: Path) -> None:
    """Write the page for `plan` to `path`, whole or not at all."""
    write_whole(path, render_report(plan))


def render_report(plan: Plan) -> str:
    """Return the page for `plan`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    prediction = plan.prediction
    capacity_bytes = min(
        gpu.memory_bytes
        for rank in plan.ranks
        for gpu in plan.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    )
    return environment.get_template("report.html.j2").render(
        plan=plan,
        devices=num_devices(plan),
        picture=draw(plan),
        machines=cluster_svg(plan.cluster, paper=False),
        facts=(
            ("time to first token", *_interval(prediction.ttft_s, seconds)),
            ("time per output token", *_interval(prediction.tpot_s, seconds)),
            ("output tokens/s", *_interval(prediction.output_tokens_per_s, "{:,.0f}".format)),
            ("memory of the fullest GPU", *_interval(prediction.memory_bytes_per_gpu, gigabytes)),
        ),
        memory=stack(
            (
                (part.name, part.bytes, gigabytes(part.bytes), "")
                for part in prediction.memory_parts
            ),
            whole=capacity_bytes,
        ),
        capacity=gigabytes(capacity_bytes),
        steps=tuple(
            (
                title,
                seconds(sum(part.seconds for part in parts)),
                stack(
                    (part.name, part.seconds, seconds(part.seconds), part.bound) for part in parts
                ),
            )
            for title, parts in (
                ("One decode step", prediction.decode_parts),
                ("The steps that prefill one prompt", prediction.prefill_parts),
            )
            if parts
        ),
        pareto=pareto_svg(plan.pareto) if plan.pareto else "",
        explanation=explain(plan),
    )


def stack(
    parts: Iterable[tuple[str, float, str, str]], whole: float | None = None
) -> tuple[Segment, ...]:
    """Return the pieces of a bar, largest first, from (name, size, size as text, note).

    >>> [(s.name, s.start, s.length) for s in stack([("a", 1, "1", ""), ("b", 3, "3", "")])]
    [('b', 0.0, 75.0), ('a', 75.0, 25.0)]
    """
    ordered = sorted(parts, key=lambda part: -part[1])
    total = whole or sum(part[1] for part in ordered) or 1.0
    segments: list[Segment] = []
    start = 0.0
    for index, (name, size, amount, note) in enumerate(ordered):
        length = 100 * size / total
        colour = _COLOURS[index % len(_COLOURS)]
        segments.append(Segment(name, amount, round(start, 3), round(length, 3), colour, note))
        start += length
    return tuple(segments)


def draw(plan: Plan) -> Picture:
    """Return where each stage and rank goes; replicas past the first eight are counted only."""
    groups: dict[tuple[int, int], list[RankPlan]] = {}
    for rank in plan.ranks:
        if rank.replica < _REPLICAS_SHOWN:
            groups.setdefault((rank.replica, rank.stage), []).append(rank)
    per_row = min(_PER_ROW, plan.split.tp)
    rows = -(-plan.split.tp // per_row)
    width, height = per_row * _CELL + 8, rows * _CELL + 8 + _CAPTION
    stages: list[StageBox] = []
    boxes: list[RankBox] = []
    for (replica, stage), ranks in groups.items():
        x = stage * (width + _GAP)
        y = _MARGIN_TOP + replica * (height + _GAP)
        first, stop = ranks[0].layers
        caption = f"replica {replica}, stage {stage}: layers {first}-{stop - 1}"
        stages.append(StageBox(x, y, width, height, caption))
        for index, rank in enumerate(ranks):
            row, column = divmod(index, per_row)
            title = (
                f"rank {rank.rank} on node {rank.node}, GPU {rank.gpu}: layers "
                f"{_range(rank.layers)}, query heads {_range(rank.query_heads)}, KV heads "
                f"{_range(rank.kv_heads)}, FFN columns {_range(rank.ffn_columns)}"
            )
            if rank.experts != (0, 0):
                title += f", experts {_range(rank.experts)}"
            boxes.append(
                RankBox(
                    x=x + 4 + column * _CELL,
                    y=y + _CAPTION + 4 + row * _CELL,
                    label=str(rank.rank),
                    place=f"{rank.node}:{rank.gpu}",
                    title=title,
                    colour=_COLOURS[rank.node % len(_COLOURS)],
                )
            )
    shown = min(plan.split.dp, _REPLICAS_SHOWN)
    return Picture(
        width=plan.split.pp * (width + _GAP),
        height=_MARGIN_TOP + shown * (height + _GAP),
        stages=tuple(stages),
        ranks=tuple(boxes),
        num_hidden=plan.split.dp - shown,
    )


def _range(half_open: tuple[int, int]) -> str:
    first, stop = half_open
    return f"{first}-{stop - 1}"


def _interval(estimate: Estimate, show: Callable[[float], str]) -> tuple[str, str]:
    return show(estimate.value), f"{show(estimate.low)} to {show(estimate.high)}"
