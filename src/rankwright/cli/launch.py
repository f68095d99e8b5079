"""`rankwright launch`: start the ranks of a plan and serve them over HTTP."""

from typing import Annotated

import typer

from rankwright.cli import options
from rankwright.cli.output import status
from rankwright.cli.planning import plan_of
from rankwright.planner.make_plan import Pins


def run(
    model: options.ModelOrPlan,
    cluster: options.Cluster = "auto",
    isl: options.InputTokens = 1024,
    osl: options.OutputTokens = 128,
    concurrency: options.Concurrency = None,
    ttft: options.Ttft = None,
    tpot: options.Tpot = None,
    objective: options.ObjectiveOption = "throughput",
    tp: options.Tp = None,
    pp: options.Pp = None,
    ep: options.Ep = None,
    dp: options.Dp = None,
    backend: options.Backend = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on for HTTP.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for HTTP; 0: any.")] = 8000,
    load_format: options.LoadFormat = "auto",
    model_path: options.ModelPath = None,
    nnodes: Annotated[int, typer.Option(min=1, help="Machines of this launch.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this is.")] = 0,
    master_addr: Annotated[str, typer.Option(help="Address of machine 0.")] = "127.0.0.1",
    master_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port where the ranks meet.  [default: any; 29500 over nodes]"
        ),
    ] = None,
    host_interface: Annotated[
        str | None,
        typer.Option(help="Address on which machine 0 listens for ranks.  [default: master-addr]"),
    ] = None,
    start_timeout: options.StartTimeout = 1800,
    drain: Annotated[
        float, typer.Option(metavar="S", help="For running requests, after a signal to stop.")
    ] = 10,
    model_name: Annotated[
        str | None, typer.Option(help="Name in the API.  [default: the model's]")
    ] = None,
    force: options.Force = False,
) -> None:
    """Serve MODEL or PLAN over an OpenAI-compatible API.

    A model is planned first. SIGINT or SIGTERM ends it.
    """
    if node_rank >= nnodes:
        raise ValueError(f"--node-rank is {node_rank}, of {nnodes} nodes the last is {nnodes - 1}")
    load = options.workload(
        isl=isl, osl=osl, concurrency=concurrency, ttft_ms=ttft, tpot_ms=tpot, objective=objective
    )
    plan, made_now = plan_of(model, cluster, load, pins=Pins(tp=tp, pp=pp, ep=ep, dp=dp))
    if made_now:
        status(f"{plan.model.name} on {plan.cluster.describe()}: {plan.split.label()}")
    # Here, not at the top: a login node has no rankwright[executor], and `--help` works there too.
    from rankwright.executor.launch import launch

    code = launch(
        plan,
        host=host,
        port=port,
        load_format=load_format,
        backend=backend,
        model_path=model_path,
        nnodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        host_interface=host_interface,
        start_timeout_s=start_timeout,
        drain_s=drain,
        force=force,
        model_name=model_name,
    )
    raise typer.Exit(code)
