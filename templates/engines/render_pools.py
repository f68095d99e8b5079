"""A plan with separate pools as another engine's workers, and the router in front of them.

Workers are numbered over both pools, prefill first. The router takes requests on `port` of the
first node; worker W has HTTP on `port + 1 + W` of its first node.
"""

from dataclasses import dataclass

import yaml

from rankwright import __version__
from rankwright.cost_model.pool_forms import pair_is_legal
from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates.engines.engine import Engine, Span
from rankwright.templates.engines.fit import refuse
from rankwright.templates.engines.places import nodes_of_a_replica, replica_places
from rankwright.templates.engines.pool_engine import POOL_ENGINES, PoolEngine, Role
from rankwright.templates.engines.render_engine import (
    check_engine_fits,
    config_text,
    engine_environment,
    model_argument,
)
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.fill import fill
from rankwright.templates.layout import (
    NodeShare,
    node_order,
    share_of,
    start_budget_s,
)
from rankwright.templates.options import (
    KUBERNETES_PORT,
    SLURM_PORTS,
    EngineOptions,
    SlurmOptions,
)
from rankwright.templates.plan_text import plan_text
from rankwright.templates.slurm_job import SLURM_FILE, JobFile, fill_job, job_file

SCRIPT = "disaggregated.sh"
ROUTER_FILE = "disagg_config.yaml"


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one worker on one node."""

    worker: int  # over both pools
    number: int  # of the node within the worker
    node_rank: int  # of the node over both pools
    gpus: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool as its template takes it."""

    role: Role
    plan: Plan
    parts: tuple[Part, ...]
    arguments: tuple[tuple[str, ...], ...]
    environment: tuple[EnvironmentVariable, ...]
    span: Span | None
    first_side: int  # of its first worker, counted from the first meeting port
    side_ports: int
    config_file: str | None
    config: str | None

    @property
    def workers(self) -> tuple[tuple[int, int], ...]:
        """Number and first node of each worker."""
        return tuple((part.worker, part.node_rank) for part in self.parts if part.number == 0)


def pools_files(plan: DisaggregatedPlan, options: EngineOptions, *, target: str) -> dict[str, str]:
    """Return the script that starts both pools on `target`, and the files it needs, by name.

    Raises:
        ValueError: The engine cannot express a part of the plan.
    """
    engine, extra = ENGINES[target], POOL_ENGINES[target]
    pools = engine_pools(plan, target)
    nodes = pool_nodes(plan)
    num_workers = sum(len(pool.workers) for pool in pools)
    if options.port + num_workers >= 2**16:
        raise ValueError(
            f"port={options.port} and {num_workers} workers, each on a port of its own, go beyond "
            "65535; expected a lower port"
        )
    model = model_argument(plan.prefill, options.model_path)
    name = plan.model.name
    files = {pool.config_file: pool.config for pool in pools if pool.config_file and pool.config}
    if extra.config is not None:
        files[ROUTER_FILE] = router_config(engine, pools, options.port)
    script = fill(
        "engines/disaggregated.sh.j2",
        rankwright=__version__,
        file=SCRIPT,
        title=engine.title,
        version=engine.version,
        model_name=name,
        label=plan.label(),
        num_nodes=len(nodes),
        num_gpus=plan.num_gpus,
        num_workers=num_workers,
        port=options.port,
        meet_port=KUBERNETES_PORT,
        notes=_notes(engine, extra, plan),
        pools=pools,
        command=engine.command,
        model_flag=engine.model_flag,
        spawns_by_mpi=engine.mpi,
        model=model,
        served_name=None if model == name else name,
        served_name_flag=engine.served_name_flag,
        extra=extra,
        router_file=ROUTER_FILE if extra.config is not None else None,
        start_s=start_budget_s(pool_shares(plan, any_gpus=True)),
        parts=sorted(
            ((part.node_rank, part.worker, pool, part) for pool in pools for part in pool.parts),
            key=lambda row: row[:2],
        ),
        heads={worker: node for pool in pools for worker, node in pool.workers},
    )
    return {SCRIPT: script} | files


def pools_slurm_files(
    plan: DisaggregatedPlan, options: SlurmOptions, *, target: str
) -> dict[str, str]:
    """Return an sbatch script that starts both pools and the router, by file name.

    Nodes that are unlike (other GPUs, other numbers of them) become components of one heterogeneous
    job.

    Raises:
        ValueError: The engine cannot express a part of the plan, or a job cannot place it.
    """
    engine = ENGINES[target]
    own = EngineOptions(model_path=options.model_path, port=options.port)
    files = pools_files(plan, own, target=target)
    pools = engine_pools(plan, target)
    ports = meeting_ports(pools)
    job_files = (
        *(job_file(name, text) for name, text in files.items()),
        JobFile("plan.json", "write_plan", "The plan, to a file that every node reads.",
                "RANKWRIGHT_PLAN", plan_text(plan)),
    )  # fmt: skip
    script = fill_job(
        "slurm/engine.sbatch.j2",
        plan.prefill,
        options,
        job_files,
        pool_shares(plan),
        split=plan.label(),
        on_engine=f" on {engine.title} {engine.version}",
        notes=_notes(engine, POOL_ENGINES[target], plan),
        heads=[0],  # the router alone takes requests
        ports_of_a_launch=ports,
        num_port_sets=len(SLURM_PORTS) // ports,
        script=SCRIPT,
    )
    return {SLURM_FILE: script}


def pool_nodes(plan: DisaggregatedPlan) -> tuple[int, ...]:
    """Return the machines of both pools by node rank: those of prefill first."""
    return tuple(dict.fromkeys(node for pool in plan.pools.values() for node in node_order(pool)))


def pool_shares(plan: DisaggregatedPlan, *, any_gpus: bool = False) -> tuple[NodeShare, ...]:
    """Return what each machine must give for both pools, by node rank.

    Args:
        plan: What runs where.
        any_gpus: Whether the GPUs of a machine may be others than its first ones.

    Raises:
        ValueError: They are, and may not.
    """
    shares: list[NodeShare] = []
    for node_rank, node in enumerate(pool_nodes(plan)):
        held = [
            (rank.gpu, pool.prediction.memory_bytes_per_gpu.high)
            for pool in plan.pools.values()
            for rank in pool.ranks_of_node(node)
        ]
        gpus = sorted(gpu for gpu, _ in held)
        num_bytes = sum(size for _, size in held)
        shares.append(
            share_of(plan.cluster.node(node), node_rank, node, gpus, num_bytes, any_gpus=any_gpus)
        )
    return tuple(shares)


def meeting_ports(pools: tuple[Pool, ...]) -> int:
    """Return the ports that workers meet on: one each, and their side ports."""
    last = pools[-1]
    return last.first_side + len(last.workers) * last.side_ports


def router_config(
    engine: Engine, pools: tuple[Pool, ...], port: int, hosts: dict[int, str] | None = None
) -> str:
    """Return TensorRT-LLM's `disagg_config.yaml`.

    Args:
        engine: Whose title heads the file.
        pools: With their workers.
        port: Of the router.
        hosts: Of the workers' URLs, which have its port too; None: `nodeN`, in whose place the
            script puts addresses, and ports after the router's.
    """
    config: dict[str, object] = {"hostname": "0.0.0.0", "port": port, "backend": "pytorch"}
    for key, pool in zip(("context_servers", "generation_servers"), pools, strict=True):
        urls = [
            f"{hosts[worker]}:{port}" if hosts else f"node{node}:{port + 1 + worker}"
            for worker, node in pool.workers
        ]
        config[key] = {"num_instances": len(urls), "urls": urls}
    title = f"# {engine.title} {engine.version}; read by `trtllm-serve disaggregated -c`.\n"
    return title + yaml.safe_dump(config, sort_keys=False)


def engine_pools(plan: DisaggregatedPlan, target: str) -> tuple[Pool, ...]:
    """Return both pools as `target` takes them, prefill first.

    Raises:
        ValueError: The engine cannot express a part of the plan, or join the two.
    """
    engine, extra = ENGINES[target], POOL_ENGINES[target]
    reason = pair_is_legal(target, plan.prefill.split, plan.decode.split)
    if reason is not None:
        refuse(engine.title, reason, f"plan with --engine {target} --disaggregate")
    numbers = {node: rank for rank, node in enumerate(pool_nodes(plan))}
    made: list[Pool] = []
    first_worker, first_side = 0, plan.prefill.split.dp + plan.decode.split.dp
    roles: tuple[Role, Role] = ("prefill", "decode")
    for role in roles:
        own = plan.pools[role]
        check_engine_fits(engine, own)
        places, order = replica_places(own), node_order(own)
        nodes_each = nodes_of_a_replica(places)
        if engine.mpi and nodes_each > 1:
            refuse(
                engine.title,
                f"a {role} worker on {nodes_each} nodes beside others: MPI would have to join them",
                "plan with a --tp and --pp that fit a node, or with --engine vllm",
            )
        config = None
        if engine.config is not None and extra.config is not None:
            config = config_text(engine, own, engine.config(own) | extra.config(role, own))
        made.append(
            Pool(
                role=role,
                plan=own,
                parts=tuple(
                    Part(
                        first_worker + place.replica,
                        place.part,
                        numbers[order[place.node_rank]],
                        place.gpus,
                    )
                    for place in places
                ),
                arguments=engine.arguments(own) + extra.flags.get(role, ()),
                environment=engine_environment(engine, own),
                span=engine.span(own, nodes_each) if nodes_each > 1 else None,
                first_side=first_side,
                side_ports=extra.side_ports(own),
                config_file=None if config is None else f"{role}_config.yaml",
                config=config,
            )
        )
        first_side += own.split.dp * extra.side_ports(own)
        first_worker += own.split.dp
    return tuple(made)


def _notes(engine: Engine, extra: PoolEngine, plan: DisaggregatedPlan) -> tuple[str, ...]:
    notes = [f"Needs {extra.router_needs}."]
    for pool in plan.pools.values():
        notes += [note for note in engine.notes(pool) if note not in notes]
    return tuple(notes)
