"""A `Plan` as tables on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankwright.cli.output import (
    console,
    memory_table,
    prediction_table,
    proof_table,
    ranges,
    seconds,
    table,
)
from rankwright.cost_model.memory import rank_memory
from rankwright.cost_model.shards import range_size
from rankwright.planner.explain import explain as explain_plan
from rankwright.planner.figures import figure
from rankwright.planner.plan import Certificate, ParetoPoint, Plan
from rankwright.planner.plan_shares import gpu_of, has_unequal_shares, memory_of, shares_of

_STAGES_SHOWN = 16  # a screen; the JSON has them all


def print_plan(plan: Plan, out: Console | None = None, *, explain: bool = False) -> None:
    """Print what the plan is, where its ranks are, what it will do, and the proof.

    Args:
        plan: What to print.
        out: Where to; None: stdout.
        explain: Give prediction and proof in words, step by step, instead of as tables.
    """
    out = out or console()
    split, workload = plan.split, plan.workload
    out.print(f"[bold]{escape(plan.model.name)}[/] on {plan.cluster.describe()}: ", end="")
    out.print(f"[bold green]{split.label()}[/], {num_devices(plan)}")
    load = (
        f"{workload.request_rate:g} requests/s"
        if workload.request_rate is not None
        else "one request at a time"
        if workload.concurrency == 1
        else f"up to {workload.concurrency} requests at once"
        if workload.concurrency is not None
        else f"any number of requests, {plan.limits.max_num_seqs} at once in a replica"
    )
    out.print(
        f"for {workload.input_tokens} input and {workload.output_tokens} output tokens, {load}, "
        f"best {workload.objective}"
    )
    out.print()
    out.print(_ranks(plan))
    if has_unequal_shares(plan):
        out.print()
        out.print(_shares(plan))
    if explain:
        out.print()
        out.print(explain_plan(plan), markup=False, soft_wrap=True)
        return
    for part in (
        prediction_table(plan.prediction, plan.num_gpus),
        memory_table(plan.prediction, _capacity_bytes(plan)),
        proof_table(
            plan.certificate,
            f"{plan.certificate.num_candidates} legal candidates, "
            f"{plan.certificate.num_illegal} illegal",
        ),
    ):
        out.print()
        out.print(part)
    if plan.certificate.runners_up:
        out.print()
        out.print(_runners_up(plan.certificate))
    if plan.pareto:
        out.print()
        out.print(_pareto(plan.pareto))
    for note in (*plan.assumptions, *plan.cluster.notes):
        out.print(f"[dim]note: {escape(note)}[/]")


def num_devices(plan: Plan) -> str:
    """Return how many of what the plan takes: `8 GPUs`, `2 CPU ranks`."""
    ranks = plan.ranks
    nodes = {rank.node: plan.cluster.node(rank.node) for rank in ranks}
    is_cpu = all(gpu.device == "cpu" for node in nodes.values() for gpu in node.gpus)
    return f"{len(ranks)} {'CPU rank' if is_cpu else 'GPU'}{'s' if len(ranks) > 1 else ''}"


def _ranks(plan: Plan) -> Table:
    made = table("replica", "stage", "ranks", "GPUs", "layers", "KV cache of a rank")
    stages: dict[tuple[int, int], list[int]] = {}
    for rank in plan.ranks:
        stages.setdefault((rank.replica, rank.stage), []).append(rank.rank)
    tokens = plan.kv_cache.num_tokens
    for (replica, stage), ranks in list(stages.items())[:_STAGES_SHOWN]:
        first, stop = plan.ranks[ranks[0]].layers
        made.add_row(
            str(replica),
            str(stage),
            ranges(ranks),
            places_of(plan, ranks),
            f"{first}-{stop - 1} ({stop - first})",
            f"{plan.kv_cache.num_blocks} blocks of {plan.kv_cache.block_tokens} = {tokens} tokens",
        )
    if len(stages) > _STAGES_SHOWN:
        made.add_row("...", "", "", f"{len(stages) - _STAGES_SHOWN} more: see --json", "", "")
    return made


def _shares(plan: Plan) -> Table:
    """Return what each rank of the groups with unequal shares holds."""
    figures = ("query heads", "KV heads", "FFN columns", "vocabulary", "memory")
    made = table("rank", "GPU", *figures, right=figures)
    unequal = [rank for rank in plan.ranks if shares_of(plan, rank) is not None]
    for rank in unequal[:_STAGES_SHOWN]:
        gpu, taken = gpu_of(plan, rank), sum(part.bytes for part in memory_of(plan, rank))
        made.add_row(
            str(rank.rank),
            gpu.device,
            *(
                str(range_size(held))
                for held in (rank.query_heads, rank.kv_heads, rank.ffn_columns, rank.vocab)
            ),
            f"{taken / 1e9:.1f} of {gpu.memory_bytes / 1e9:.1f} GB",
        )
    if len(unequal) > _STAGES_SHOWN:
        made.add_row("...", f"{len(unequal) - _STAGES_SHOWN} more: see --json", *[""] * 5)
    return made


def places_of(plan: Plan, ranks: list[int]) -> str:
    """Return the GPUs of these ranks by machine."""
    gpus: dict[int, list[int]] = {}
    for rank in ranks:
        gpus.setdefault(plan.ranks[rank].node, []).append(plan.ranks[rank].gpu)
    return ", ".join(f"node {node}: {ranges(sorted(gpus[node]))}" for node in sorted(gpus))


def _capacity_bytes(plan: Plan) -> int:
    """Memory of the GPU of the fullest rank, which is what is shown.

    With equal shares that is the smallest GPU of the stage whose ranks hold most.
    """
    if has_unequal_shares(plan):
        fullest_rank = max(
            plan.ranks,
            key=lambda rank: (
                sum(part.bytes for part in memory_of(plan, rank)) / gpu_of(plan, rank).memory_bytes
            ),
        )
        return gpu_of(plan, fullest_rank).memory_bytes
    fullest = max(range(plan.split.pp), key=lambda stage: _stage_bytes(plan, stage))
    capacity: list[int] = []
    for rank in plan.ranks:
        if rank.stage != fullest:
            continue
        node = plan.cluster.node(rank.node)
        capacity += [gpu.memory_bytes for gpu in node.gpus if gpu.index == rank.gpu]
    return min(capacity)


def _stage_bytes(plan: Plan, stage: int) -> int:
    limits, cache = plan.limits, plan.kv_cache
    parts = rank_memory(
        plan.model,
        plan.split,
        stage=stage,
        kv_tokens=cache.num_tokens,
        max_batched_tokens=max(limits.max_batched_tokens, limits.max_num_seqs),
        max_num_seqs=limits.max_num_seqs,
    )
    return sum(part.bytes for part in parts)


def _pareto(points: tuple[ParetoPoint, ...]) -> Table:
    figures = ("tokens/s a user", "tokens/s a GPU", "TTFT", "batch", "GPUs")
    made = table("no better for both", *figures, right=figures)
    for point in points:
        made.add_row(
            point.label,
            figure(point.tokens_per_s_per_user),
            figure(point.tokens_per_s_per_gpu),
            seconds(point.ttft_s),
            str(point.batch_size),
            str(point.num_gpus),
        )
    return made


def _runners_up(certificate: Certificate) -> Table:
    made = table("runner-up", "objective", "why it lost", right=("objective",))
    for runner_up in certificate.runners_up:
        label = runner_up.split.label()
        made.add_row(label, figure(runner_up.objective_value, 5), runner_up.reason)
    return made
