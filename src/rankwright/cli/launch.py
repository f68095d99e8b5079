"""`rankwright launch`: start the ranks of a plan and serve them over HTTP."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwright.cli import options
from rankwright.cli.output import status
from rankwright.cost_model.workload import Workload
from rankwright.executor.backends.agent import Agent

if TYPE_CHECKING:
    from rankwright.planner.parts_plan import PartsPlan
    from rankwright.planner.plan import Plan

# What a scheduler's manifest decides: `--set` says it where it can be said.
_OURS = (
    "host",
    "load_format",
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "host_interface",
    "start_timeout",
    "drain",
    "model_name",
    "ray_address",
    "prefix_cache",
    "record_expert_load",
    "force",
)
_THEIRS = ("settings", "detach", "job_dir")


def run(
    context: typer.Context,
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
    backend: options.LaunchBackend = "auto",
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
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray cluster of which this machine is a node.  [default: RAY_ADDRESS, else the "
            "one that runs here]",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the slurm or kubernetes manifest, as for render.",
        ),
    ] = None,
    job_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the manifest.  [default: a new one in ./rankwright-jobs]",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Submit to slurm or kubernetes, and return.")
    ] = False,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Compute what prompts begin with alike once, and keep it while there is room.",
        ),
    ] = True,
    record_expert_load: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Count how often each expert is chosen, and write it at the end, for plan "
            "--expert-load.",
        ),
    ] = None,
    force: options.Force = False,
) -> None:
    """Serve MODEL or PLAN over an OpenAI-compatible API.

    A model is planned first. SIGINT or SIGTERM ends it; a job that was submitted is ended by
    `rankwright stop`, or by Ctrl-C and a yes.
    """
    submits = backend in ("slurm", "kubernetes")
    _refuse(context, backend, _OURS if submits else _THEIRS)
    options.check_positive("--start-timeout", start_timeout, " s")
    if node_rank >= nnodes:
        raise ValueError(f"--node-rank is {node_rank}, of {nnodes} nodes the last is {nnodes - 1}")
    load = options.workload(
        isl=isl, osl=osl, concurrency=concurrency, ttft_ms=ttft, tpot_ms=tpot, objective=objective
    )
    make_plan = partial(_planned, model, cluster, load, tp=tp, pp=pp, ep=ep, dp=dp)
    if submits:
        plan = make_plan()
        from rankwright.cli.render import parse_settings
        from rankwright.executor.submit import submit_and_follow

        given: dict[str, object] = dict(parse_settings(settings or []))
        if _is_given(context, "port"):
            given.setdefault("port", port)
        if model_path is not None:
            given.setdefault("model_path", str(model_path.absolute()))
        code = submit_and_follow(plan, backend, folder=job_dir, settings=given, detach=detach)
        raise typer.Exit(code)
    # It imports PyTorch while we import the planner, plan, and import the server.
    with nullcontext() if backend == "ray" else Agent() as agent:
        plan = make_plan()
        # Here, not at the top: a login node has no rankwright[executor], and `--help` works there.
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
            prefix_cache=prefix_cache,
            record_expert_load=record_expert_load,
            force=force,
            model_name=model_name,
            ray_address=ray_address,
            agent=agent,
        )
    raise typer.Exit(code)


def _planned(
    model: str,
    cluster: str,
    load: Workload,
    *,
    tp: int | None,
    pp: int | None,
    ep: int | None,
    dp: int | None,
) -> "Plan | PartsPlan":
    # Here, not at the top: it takes half of the time until an agent can be started.
    from rankwright.cli.planning import launchable
    from rankwright.planner.make_plan import Pins

    pins = Pins(tp=tp, pp=pp, ep=ep, dp=dp)
    plan, made_now = launchable(model, cluster, load, pins=pins)
    if made_now:
        status(f"{plan.model.name} on {plan.cluster.describe()}: {plan.label()}")
    return plan


def _refuse(context: typer.Context, backend: str, names: tuple[str, ...]) -> None:
    """Refuse the options in `names`, which `backend` cannot honour.

    Raises:
        ValueError: One was given.
    """
    for param in context.command.params:
        if param.name in names and _is_given(context, param.name):
            raise ValueError(
                f"{param.opts[0]} has no meaning with --backend {backend}; leave it out"
                + ("" if param.name in _THEIRS else ", or see the options of --set")
            )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
