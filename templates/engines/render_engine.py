"""A plan as the command of another engine: a script for every node, and its configuration."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import yaml

from rankwright import __version__
from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.planner.plan_shares import has_unequal_shares
from rankwright.templates.engines.engine import Engine
from rankwright.templates.engines.fit import refuse
from rankwright.templates.engines.places import Place, nodes_of_a_replica, replica_places
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.fill import fill
from rankwright.templates.layout import node_shares
from rankwright.templates.options import (
    KUBERNETES_PORT,
    SLURM_PORTS,
    EngineOptions,
    SlurmOptions,
)
from rankwright.templates.slurm_job import (
    SLURM_FILE,
    fill_job,
    job_components,
    job_file,
    plan_file,
)
from rankwright.templates.variables import checked_environment

CONFIG_FILE = "parallel_config.yaml"


def engine_files(plan: Plan, options: EngineOptions, *, target: str) -> dict[str, str]:
    """Return the script of `target` for `plan`, and the files it needs, by name.

    Raises:
        ValueError: The engine cannot express a part of the plan.
    """
    engine = ENGINES[target]
    check_engine_fits(engine, plan)
    places = replica_places(plan)
    num_nodes = 1 + max(place.node_rank for place in places)
    nodes_each = nodes_of_a_replica(places)
    if options.port + plan.split.dp > 2**16:
        raise ValueError(
            f"port={options.port} and {plan.split.dp} replicas, each on a port of its own, go "
            "beyond 65535; expected a lower port"
        )
    model = model_argument(plan, options.model_path)
    config = None if engine.config is None else engine.config(plan)
    script = fill(
        "engines/serve.sh.j2",
        rankwright=__version__,
        file=script_name(target),
        title=engine.title,
        version=engine.version,
        model_name=plan.model.name,
        split=plan.split.label(),
        size=_size(num_nodes, plan.num_gpus),
        num_nodes=num_nodes,
        num_replicas=plan.split.dp,
        port=options.port,
        meet_port=KUBERNETES_PORT,
        notes=engine.notes(plan),
        environment=engine_environment(engine, plan),
        command=engine.command,
        model_flag=engine.model_flag,
        model=model,
        served_name=None if model == plan.model.name else plan.model.name,
        served_name_flag=engine.served_name_flag,
        arguments=engine.arguments(plan),
        config_file=None if config is None else CONFIG_FILE,
        span=engine.span(plan, nodes_each) if nodes_each > 1 else None,
        places=places,
        heads={place.replica: place.node_rank for place in places if place.part == 0},
    )
    files = {script_name(target): script}
    if config is not None:
        files[CONFIG_FILE] = config_text(engine, plan, config)
    return files


def engine_slurm_files(plan: Plan, options: SlurmOptions, *, target: str) -> dict[str, str]:
    """Return an sbatch script that starts the engine on the nodes of `plan`, by file name.

    Raises:
        ValueError: The engine cannot express a part of the plan, or a job cannot place it.
    """
    engine = ENGINES[target]
    check_engine_fits(engine, plan)
    places = replica_places(plan)
    nodes_each = nodes_of_a_replica(places)
    common: dict[str, object] = {
        "on_engine": f" on {engine.title} {engine.version}",
        "notes": engine.notes(plan),
        "heads": [place.node_rank for place in places if place.part == 0],
        # A port a replica on its first node, where several may meet.
        "ports_of_a_launch": plan.split.dp,
        "num_port_sets": len(SLURM_PORTS) // plan.split.dp,
    }
    if not engine.mpi:
        own = EngineOptions(model_path=options.model_path, port=options.port)
        files = engine_files(plan, own, target=target)
        script = fill_job(
            "slurm/engine.sbatch.j2",
            plan,
            options,
            (job_file(script_name(target), files[script_name(target)]), plan_file(plan)),
            script=script_name(target),
            **common,
        )
        return {SLURM_FILE: script}
    assert engine.config is not None
    if len(job_components(node_shares(plan, told_apart=True), options.gpu_types)) > 1:
        refuse(
            f"{engine.title} on Slurm",
            "nodes that are unlike: its steps are joined by MPI within one component of a job",
            "plan for nodes with as many GPUs of one kind",
        )
    config = config_text(engine, plan, engine.config(plan))
    script = fill_job(
        "slurm/mpi.sbatch.j2",
        plan,
        options,
        (job_file(CONFIG_FILE, config), plan_file(plan)),
        environment=engine_environment(engine, plan),
        command=engine.command,
        model_argument=model_argument(plan, options.model_path),
        config_file=CONFIG_FILE,
        mpi=options.mpi,
        nodes_each=nodes_each,
        ranks_each=plan.split.gpus_per_replica,
        replicas=_replicas(places),
        **common,
    )
    return {SLURM_FILE: script}


def check_engine_fits(engine: Engine, plan: Plan) -> None:
    """Raise for what no engine, or not this one, can express.

    Raises:
        ValueError: It cannot express a part of the plan.
    """
    if plan.expert_slots is not None:
        refuse(
            engine.title,
            "which experts each rank holds, and how often: it places copies of hot ones itself",
            "plan without expert slots",
        )
    engine.limits(plan)
    if has_unequal_shares(plan):
        refuse(
            engine.title,
            "unequal shares of a TP group: it gives every rank an equal part of the model",
            "plan with --engine for it, which looks for equal ones",
        )


@dataclass(frozen=True, slots=True)
class _Replica:
    number: int
    gpus: tuple[int, ...]  # of each of its nodes
    nodes: tuple[int, ...]


def _replicas(places: tuple[Place, ...]) -> tuple[_Replica, ...]:
    parts: dict[int, list[Place]] = {}
    for place in places:
        parts.setdefault(place.replica, []).append(place)
    for number, own in parts.items():
        if len({place.gpus for place in own}) > 1:
            refuse(
                "a step of an MPI job",
                f"other GPUs on each node of replica {number}",
                "plan with a --tp and --pp that fill nodes alike",
            )
    return tuple(
        _Replica(number, own[0].gpus, tuple(place.node_rank for place in own))
        for number, own in parts.items()
    )


def script_name(target: str) -> str:
    """Return the name of the script of `target`."""
    return f"{target}.sh"


def config_text(engine: Engine, plan: Plan, config: dict[str, object]) -> str:
    """Return `config` as YAML, headed by what it is of."""
    title = f"# {engine.title} {engine.version}, {plan.split.label()}; read by `--config`.\n"
    return title + yaml.safe_dump(config, sort_keys=False)


def engine_environment(engine: Engine, plan: Plan) -> tuple[EnvironmentVariable, ...]:
    """Return the plan's variables and the engine's own."""
    return checked_environment(plan) + engine.environment(plan)


def model_argument(plan: Plan, model_path: str | None) -> str:
    """Return the model as a command line takes it.

    Raises:
        ValueError: It could be taken for a flag, or cannot stand on a command line.
    """
    model = model_path or plan.model.name
    if not model.isprintable() or model.startswith("-") or not model:
        raise ValueError(
            f"the model is called {model!r}, and a command line needs a printable name that does "
            "not start with '-'; set model_path"
        )
    if not plan.model.name.isprintable() or not plan.model.name:
        raise ValueError(
            f"the model is called {plan.model.name!r}, which is also its name for clients; "
            "expected a printable name"
        )
    return str(PurePosixPath(model)) if model_path else model


def _size(num_nodes: int, num_gpus: int) -> str:
    nodes = f"{num_nodes} node{'s' * (num_nodes != 1)}"
    return f"{nodes} x {num_gpus // num_nodes} GPU{'s' * (num_gpus // num_nodes != 1)}"
