"""`rankwright plan`: the best split of a model over a cluster, with its proof."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwright.cli import options
from rankwright.cli.output import print_json, status
from rankwright.cli.planning import Asked, parts_for, plan_for, pools_for
from rankwright.cost_model.read_model import read_model
from rankwright.planner.make_plan import Pins
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import write_plan
from rankwright.planner.solver import TIME_LIMIT_S

if TYPE_CHECKING:
    from rankwright.cost_model.trace import TraceRow
    from rankwright.planner.disaggregated_plan import DisaggregatedPlan
    from rankwright.planner.parts_plan import PartsPlan


def run(
    model: options.Model,
    cluster: options.Cluster = "auto",
    isl: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Prompt length, tokens.  [default: 1024]"),
    ] = None,
    osl: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens generated a request.  [default: 128]"),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests as they came, JSON Lines or CSV, instead of lengths and load."),
    ] = None,
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    ttft: options.Ttft = None,
    tpot: options.Tpot = None,
    percentile: options.Percentile = 50,
    objective: options.ObjectiveOption = "throughput",
    memory_budget: options.MemoryBudget = None,
    dtype: options.DtypeOption = None,
    kv_dtype: options.KvDtype = None,
    tp: options.Tp = None,
    pp: options.Pp = None,
    ep: options.Ep = None,
    dp: options.Dp = None,
    cp: options.Cp = None,
    attention: options.AttentionOption = None,
    cp_exchange: options.CpExchangeOption = None,
    engine: options.EngineOption = "rankwright",
    disaggregate: Annotated[
        bool,
        typer.Option(
            "--disaggregate", help="Separate pools for prefill and decode, beside one pool."
        ),
    ] = False,
    mixed_shapes: options.MixedShapes = "never",
    calibration: options.CalibrationFile = None,
    expert_slots: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Experts that each rank holds of a layer: hot ones in several."
        ),
    ] = None,
    expert_load: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="How often each was chosen, of launch --record-expert-load."
        ),
    ] = None,
    rebalance_steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps after which experts in slots move."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Runners-up to list, with why they lost.")] = 3,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Also what every batch gives: tokens/s of a GPU and a user."),
    ] = False,
    time_limit: Annotated[
        float,
        typer.Option(metavar="S", help="Of the solver; then the best plan until then, so marked."),
    ] = TIME_LIMIT_S,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, in words.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan here, as JSON.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a page with pictures here, as HTML.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Find the best split of MODEL, and prove it."""
    options.refuse_beside_trace(
        trace, {"--isl": isl, "--osl": osl, "--concurrency": concurrency, "--rate": rate}
    )
    load = options.workload(
        isl=isl or 1024,
        osl=osl or 128,
        concurrency=concurrency,
        rate=rate,
        ttft_ms=ttft,
        tpot_ms=tpot,
        percentile=percentile,
        objective=objective,
    )
    rows: tuple[TraceRow, ...] = ()
    if trace is not None:
        from rankwright.cost_model.trace import read_trace, workload_of  # few plans have one

        rows = read_trace(trace)
        means = workload_of(rows)
        names = ("input_tokens", "output_tokens", "concurrency", "request_rate", "shared_prefix")
        load = load.model_copy(update={name: getattr(means, name) for name in names})
    spec = read_model(model)
    for row in rows:
        if row.input_tokens + row.output_tokens > spec.max_context_tokens:
            raise ValueError(
                f"{trace}: a request of {row.input_tokens} + {row.output_tokens} tokens exceeds "
                f"the context of {spec.name}, {spec.max_context_tokens} tokens; leave it out"
            )
    pins = Pins(tp=tp, pp=pp, ep=ep, dp=dp, cp=cp, attention=attention, cp_exchange=cp_exchange)
    if expert_slots is None and (expert_load or rebalance_steps is not None):
        given = "--expert-load" if expert_load else "--rebalance-steps"
        raise ValueError(f"{given} is for experts in slots; say how many with --expert-slots")
    if disaggregate:
        _refuse_beside_pools(
            {"--trace": trace, "--report": report, "--pareto": pareto or None}
            | {"--expert-slots": expert_slots}
            | {
                f"--{pair.partition('=')[0]}".replace("_", "-"): pair
                for pair in pins.describe().split()
            }
        )
    asked = Asked.read(
        spec,
        cluster,
        load,
        memory_budget_gb=memory_budget,
        dtype=dtype,
        kv_dtype=kv_dtype,
        time_limit_s=time_limit,
        calibration=calibration,
    )
    if disaggregate:
        pools = pools_for(asked, engine=engine, top=top)
        _give(pools, output, as_json=as_json, explain=explain)
        return
    is_plain = engine == "rankwright" and pins == Pins() and not (rows or pareto or report)
    if mixed_shapes == "auto" and is_plain and expert_slots is None:
        _give(parts_for(asked, top=top), output, as_json=as_json, explain=explain)
        return
    plan = plan_for(asked, pins=pins, engine=engine, pareto=pareto, trace=rows, top=top)
    if expert_slots is not None:
        from rankwright.planner.expert_load import read_expert_loads  # few plans have slots
        from rankwright.planner.expert_slots import with_expert_slots

        plan = with_expert_slots(
            plan,
            expert_slots,
            loads=read_expert_loads(expert_load, plan.model.name) if expert_load else None,
            rebalance_steps=rebalance_steps,
        )
    if report is not None:
        from rankwright.report import write_report  # jinja2 costs 30 ms, and few ask for a page

        write_report(plan, report)
        status(f"wrote {report}")
    _give(plan, output, as_json=as_json, explain=explain)
    if is_plain and not as_json and _may_mix(plan):
        status("--mixed-shapes auto also tries replicas of unlike shapes on these GPUs")


def _may_mix(plan: Plan) -> bool:
    """Return whether unlike replicas may serve more: on unlike cards, or on some left over."""
    from rankwright.planner.make_parts import may_mix

    cluster = plan.cluster
    unlike = len({gpu.device for gpu in cluster.nodes[0].gpus}) > 1
    return may_mix(plan.workload, cluster) and (unlike or plan.num_gpus < cluster.num_gpus)


def _give(
    plan: "Plan | PartsPlan | DisaggregatedPlan",
    output: Path | None,
    *,
    as_json: bool,
    explain: bool,
) -> None:
    """Write `plan` to `output`, if given, and print it."""
    if output is not None:
        write_plan(plan, output)
        status(f"wrote {output}")
    if as_json:
        print_json(plan)
        return
    # With rich, which JSON has no use for.
    if isinstance(plan, Plan):
        from rankwright.cli.plan_page import print_plan

        print_plan(plan, explain=explain)
        return
    from rankwright.planner.parts_plan import PartsPlan

    if isinstance(plan, PartsPlan):
        from rankwright.cli.parts_page import print_parts

        print_parts(plan, explain=explain)
    else:
        from rankwright.cli.pools_page import print_pools

        print_pools(plan, explain=explain)


def _refuse_beside_pools(given: Mapping[str, object]) -> None:
    """Raise ValueError where an option in `given`, which is for one pool, has a value."""
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        raise ValueError(f"{name} is for plans with one pool; leave it or --disaggregate out")
