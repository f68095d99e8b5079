"""A `DisaggregatedPlan` as tables on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankwright.cli.output import console, gigabytes, proof_table, seconds, table
from rankwright.cli.plan_page import places_of
from rankwright.cost_model.prediction import Estimate
from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.explain_pools import explain_pools

_WORKERS_SHOWN = 8  # of a pool; the JSON has them all


def print_pools(
    plan: DisaggregatedPlan, out: Console | None = None, *, explain: bool = False
) -> None:
    """Print both pools, what they do together, the proof, and the best plan of one pool.

    Args:
        plan: What to print.
        out: Where to; None: stdout.
        explain: Give it in words, step by step, instead of as tables.
    """
    out = out or console()
    if explain:
        out.print(explain_pools(plan), markup=False, soft_wrap=True)
        return
    load = plan.workload
    out.print(f"[bold]{escape(plan.model.name)}[/] on {plan.cluster.describe()}: ", end="")
    out.print(f"[bold green]{plan.label()}[/], {plan.num_gpus} GPUs, on {plan.engine}")
    out.print(
        f"for {load.input_tokens} input and {load.output_tokens} output tokens, "
        f"best {load.objective}"
    )
    for part in (_pools(plan), _places(plan), _prediction(plan), _proof(plan)):
        out.print()
        out.print(part)
    out.print()
    colour = "bold red" if plan.one_pool.is_better else "bold"
    out.print(f"[{colour}]{escape(plan.one_pool.verdict)}[/]")
    for note in (*plan.assumptions, *plan.cluster.notes):
        out.print(f"[dim]note: {escape(note)}[/]")


def _pools(plan: DisaggregatedPlan) -> Table:
    made = table("pool", "workers", "GPUs", "batch", "tokens a step", "KV cache of a rank", "busy")
    loads = (plan.prediction.prefill_load, plan.prediction.decode_load)
    for (role, pool), load in zip(plan.pools.items(), loads, strict=True):
        split = pool.split
        tokens = pool.kv_cache.num_tokens
        made.add_row(
            role,
            f"{split.dp} x {split.model_copy(update={'dp': 1}).label()}",
            str(pool.num_gpus),
            str(pool.limits.max_num_seqs),
            str(pool.limits.max_batched_tokens),
            f"{tokens} tokens",
            f"{load:.0%}",
        )
    return made


def _places(plan: DisaggregatedPlan) -> Table:
    made = table("worker", "GPUs", "layers of its stages", "memory of the fullest rank")
    for role, pool in plan.pools.items():
        memory = gigabytes(pool.prediction.memory_bytes_per_gpu.value)
        layers = ", ".join(map(str, pool.split.stage_layers))
        for worker in range(min(pool.split.dp, _WORKERS_SHOWN)):
            ranks = [rank.rank for rank in pool.ranks if rank.replica == worker]
            made.add_row(f"{role} {worker}", places_of(pool, ranks), layers, memory)
        if pool.split.dp > _WORKERS_SHOWN:
            made.add_row(f"{role} ...", f"{pool.split.dp - _WORKERS_SHOWN} more: see --json")
    return made


def _prediction(plan: DisaggregatedPlan) -> Table:
    made = table("predicted", "value", "interval", right=("value",))
    one = plan.prediction

    def row(name: str, figure: Estimate) -> None:
        made.add_row(
            name, seconds(figure.value), f"{seconds(figure.low)} to {seconds(figure.high)}"
        )

    row("time to first token", one.ttft_s)
    made.add_row("  wait for a worker", seconds(one.wait_s), "")
    made.add_row("  prompt", seconds(one.prompt_s), "")
    made.add_row(
        "  cache on the way", seconds(one.transfer_s), f"{gigabytes(one.transfer_bytes)} a GPU"
    )
    row("time per output token", one.tpot_s)
    rate = one.output_tokens_per_s
    made.add_row("output tokens/s", f"{rate.value:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}")
    made.add_row("output tokens/s per GPU", f"{rate.value / plan.num_gpus:,.0f}", "")
    made.add_row("requests/s", f"{one.requests_per_s:,.3g}", "")
    return made


def _proof(plan: DisaggregatedPlan) -> Table:
    made = proof_table(plan.certificate, f"{plan.certificate.num_candidates} pairs")
    for loser in plan.runners_up:
        made.add_row("runner-up", f"{loser.label}: {loser.reason}")
    return made
