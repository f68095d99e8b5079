"""A `PartsPlan` as tables on a terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankwright.cli.output import console, gigabytes, proof_table, seconds, table
from rankwright.planner.explain_parts import explain_parts, gpus_of
from rankwright.planner.parts_plan import PartsPlan, part_label


def print_parts(plan: PartsPlan, out: Console | None = None, *, explain: bool = False) -> None:
    """Print the parts, what they do together, the proof, and the best plan of alike replicas.

    Args:
        plan: What to print.
        out: Where to; None: stdout.
        explain: Give it in words, step by step, instead of as tables.
    """
    out = out or console()
    if explain:
        out.print(explain_parts(plan), markup=False, soft_wrap=True)
        return
    load = plan.workload
    out.print(f"[bold]{escape(plan.model.name)}[/] on {plan.cluster.describe()}: ", end="")
    out.print(f"[bold green]{plan.label()}[/], {plan.num_gpus} GPUs")
    asked = (
        "any number of requests"
        if load.concurrency is None
        else f"up to {load.concurrency} requests at once"
    )
    out.print(
        f"for {load.input_tokens} input and {load.output_tokens} output tokens, {asked}, "
        f"best {load.objective}"
    )
    for part in (_replicas(plan), _speeds(plan), _prediction(plan), _proof(plan)):
        out.print()
        out.print(part)
    out.print()
    out.print(f"[bold]{escape(plan.alike.verdict)}[/] [dim](--mixed-shapes never plans those)[/]")
    for note in (*plan.assumptions, *plan.cluster.notes):
        out.print(f"[dim]note: {escape(note)}[/]")


def _replicas(plan: PartsPlan) -> Table:
    made = table("part", "replica", "shape", "GPUs", "layers of its stages", "KV cache of a rank")
    for number, part in enumerate(plan.parts):
        one = part.split.model_copy(update={"dp": 1}).label()
        tokens = part.kv_cache.num_tokens
        layers = ", ".join(map(str, part.split.stage_layers))
        for replica in range(part.split.dp):
            made.add_row(
                str(number), str(replica), one, gpus_of(part, replica), layers, f"{tokens} tokens"
            )
    return made


def _speeds(plan: PartsPlan) -> Table:
    right = ("batch", "TTFT", "TPOT", "tokens/s", "share")
    made = table("part", "", *right, "memory of the fullest rank", right=right)
    for number, (part, share) in enumerate(zip(plan.parts, plan.shares(), strict=True)):
        one = part.prediction
        made.add_row(
            str(number),
            part_label(part),
            str(part.limits.max_num_seqs),
            seconds(one.ttft_s.value),
            seconds(one.tpot_s.value),
            f"{one.output_tokens_per_s.value:,.0f}",
            f"{share:.0%}",
            gigabytes(one.memory_bytes_per_gpu.value),
        )
    return made


def _prediction(plan: PartsPlan) -> Table:
    made = table("predicted", "value", "interval", right=("value",))
    one = plan.prediction
    for name, figure in (
        ("time to first token, slowest part", one.ttft_s),
        ("time per output token, slowest part", one.tpot_s),
    ):
        made.add_row(
            name, seconds(figure.value), f"{seconds(figure.low)} to {seconds(figure.high)}"
        )
    rate = one.output_tokens_per_s
    made.add_row(
        "output tokens/s, all parts", f"{rate.value:,.0f}", f"{rate.low:,.0f} to {rate.high:,.0f}"
    )
    return made


def _proof(plan: PartsPlan) -> Table:
    words = f"{plan.certificate.num_candidates} candidates for a replica on some set of GPUs"
    return proof_table(plan.certificate, words, nothing="mix")
