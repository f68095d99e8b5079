"""Another engine on Kubernetes: the objects of our own target, with its image and its command.

Each replica of the plan is a server of its own. One that fits a machine is a pod of a Deployment;
one on several machines has a StatefulSet for its head and one for the rest, or is a group of a
LeaderWorkerSet. A Service spreads requests over all of them.
"""

from collections import Counter

from rankwright.planner.plan import Plan
from rankwright.templates.engines.engine import Engine
from rankwright.templates.engines.fit import refuse
from rankwright.templates.engines.places import Place, nodes_of_a_replica, replica_places
from rankwright.templates.engines.render_engine import (
    CONFIG_FILE,
    check_engine_fits,
    config_text,
    engine_environment,
    model_argument,
)
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_flavors import (
    FLAVORS,
    Group,
    PodShare,
    check_queue,
    flavor_name,
    for_name,
)
from rankwright.templates.kubernetes_objects import (
    fill_objects,
    model_volume,
    pairs,
    pod_environment,
    pod_notes,
    quantity,
    startup_failures,
)
from rankwright.templates.kubernetes_options import EngineKubernetesOptions
from rankwright.templates.layout import (
    CPUS_PER_GPU_RANK,
    CPUS_PER_LAUNCHER,
    HOST_BYTES_PER_GPU_RANK,
    SHM_BYTES_PER_RANK,
    node_shares,
)
from rankwright.templates.options import default_name

MOUNT = "/etc/rankwright"


def engine_kubernetes_files(
    plan: Plan, options: EngineKubernetesOptions, *, target: str
) -> dict[str, str]:
    """Return the objects that serve `plan` with the engine, as one YAML file, by file name.

    Raises:
        ValueError: The engine or the flavor cannot express a part of the plan.
    """
    engine = ENGINES[target]
    check_engine_fits(engine, plan)
    config = None if engine.config is None else engine.config(plan)
    return engine_objects(
        plan,
        options,
        options.name or default_name(plan),
        target=target,
        flavor=options.flavor,
        config=None if config is None else config_text(engine, plan, config),
        failures=startup_failures(node_shares(plan, told_apart=options.gpu_types is not None)),
    )


def engine_objects(
    plan: Plan,
    options: EngineKubernetesOptions,
    name: str,
    *,
    target: str,
    flavor: str,
    config: str | None,
    failures: int,
    role: str = "",
    flags: tuple[tuple[str, ...], ...] = (),
    **own: object,
) -> dict[str, str]:
    """Return the objects of the engine's servers, as one YAML file, by file name.

    Args:
        plan: What they serve.
        options: What was said about pods.
        name: Of the deployment.
        target: Name of the engine.
        flavor: Of `FLAVORS`, or "auto".
        config: What stands in the engine's configuration file, if it has one.
        failures: How often a startup probe may fail.
        role: What the servers are for, where there are others.
        flags: Words of the command besides those of the plan.
        own: Further values of the template.

    Raises:
        ValueError: The flavor cannot express a part of the plan.
    """
    engine = ENGINES[target]
    places = replica_places(plan)
    nodes_each = nodes_of_a_replica(places)
    kind = flavor_name(flavor, nodes_each)
    types = gpu_labels(plan, options.gpu_types)
    check_pods(engine, kind, options, places, types)
    environment, left_out = pod_environment(engine_environment(engine, plan))
    model_mount, model_path, host_path = model_volume(plan, options)
    share = pod_share(plan, len(places[0].gpus))
    return fill_objects(
        plan,
        options,
        name,
        for_name(FLAVORS[kind], name),
        pod_groups(name, kind, nodes_each, share, types),
        app=target,
        engine=engine,
        engine_words=pod_words(engine, plan, options.port, model_path, config is not None, flags),
        span=engine.span(plan, nodes_each) if nodes_each > 1 else None,
        on_engine=f" on {engine.title} {engine.version}{role and f', for {role}'}",
        config_files={} if config is None else {CONFIG_FILE: config},
        size=size_in_words(len(types), nodes_each, share.num_gpus),
        notes=(*engine.notes(plan), *pod_notes(options, left_out, host_path)),
        needs=FLAVORS[kind].needs,
        num_nodes=nodes_each,
        num_replicas=len(types),
        flavor=kind,
        image=options.image or engine.image,
        run_as_user=options.run_as_user,
        health=engine.health,
        environment=environment,
        max_replicas=1,
        model_mount=model_mount,
        model_host_path=host_path,
        startup_failures=failures,
        **own,
    )


def size_in_words(num_replicas: int, nodes_each: int, num_gpus: int) -> str:
    """Return the pods of all replicas in words."""

    def many(count: int, what: str) -> str:
        return f"{count} {what}{'s' * (count != 1)}"

    pods, gpus = many(nodes_each, "pod"), many(num_gpus, "GPU")
    return f"{many(num_replicas, 'replica')} of {pods} with {gpus}{' each' * (nodes_each > 1)}"


def pod_words(
    engine: Engine,
    plan: Plan,
    port: int,
    model_path: str | None,
    has_config: bool,
    extra: tuple[tuple[str, ...], ...] = (),
) -> tuple[str, ...]:
    """Return the arguments after the command; a flag and its value are one word."""
    model = model_argument(plan, model_path)
    words = [model if engine.model_flag is None else f"{engine.model_flag}={model}"]
    if model != plan.model.name and engine.served_name_flag is not None:
        words.append(f"{engine.served_name_flag}={plan.model.name}")
    words += ["=".join(flag) for flag in (*engine.arguments(plan), *extra)]
    if has_config:
        words.append(f"--config={MOUNT}/{CONFIG_FILE}")
    return (*words, "--host=0.0.0.0", f"--port={port}")


def gpu_labels(plan: Plan, gpu_types: str | None) -> tuple[str | None, ...]:
    """Return the label value of each replica's GPUs; None where no option names them.

    Raises:
        ValueError: `gpu_types` does not name a kind of GPU of the plan.
    """
    types = dict(pairs(gpu_types))
    kinds: list[str] = []
    for replica in range(plan.split.dp):
        rank = next(rank for rank in plan.ranks if rank.replica == replica)
        gpus = plan.cluster.node(rank.node).gpus
        kinds.append(next(gpu.device for gpu in gpus if gpu.index == rank.gpu))
    unnamed = [kind for kind in dict.fromkeys(kinds) if types and kind not in types]
    if unnamed:
        raise ValueError(
            f"the plan runs on {', '.join(dict.fromkeys(kinds))}; expected a type in gpu_types "
            f"for each, and {unnamed[0]} has none"
        )
    return tuple(types.get(kind) for kind in kinds)


def check_pods(
    engine: Engine,
    kind: str,
    options: EngineKubernetesOptions,
    places: tuple[Place, ...],
    types: tuple[str | None, ...],
) -> None:
    """Check that pods of one kind of workload can be what the plan says.

    Raises:
        ValueError: They cannot.
    """
    nodes_each = nodes_of_a_replica(places)
    if nodes_each not in FLAVORS[kind].num_nodes:
        raise ValueError(
            f"flavor={kind} is for one machine, each replica has {nodes_each}; use statefulset, "
            "or auto"
        )
    check_queue(kind, options)
    if kind == "leaderworkerset" and len(set(types)) > 1:
        raise ValueError(
            "flavor=leaderworkerset makes all replicas alike, and the plan's are on several kinds "
            "of GPU; use auto"
        )
    if nodes_each > 1 and max(Counter(place.node_rank for place in places).values()) > 1:
        refuse(
            f"{engine.title} on Kubernetes",
            "a machine that two replicas share where each is on several machines",
            "plan with a --tp and --pp that fill machines alike",
        )
    if options.monitor and not engine.has_metrics:
        refuse(
            engine.title,
            "metrics at /metrics, which a PodMonitor reads, with these settings",
            "leave monitor out",
        )


def pod_share(plan: Plan, num_gpus: int) -> PodShare:
    """Return what a pod of `num_gpus` asks for: its part of the smallest machine at most."""
    shm_bytes = SHM_BYTES_PER_RANK * num_gpus
    machines = [plan.cluster.node(node) for node in plan.nodes_used()]
    parts = [each.num_cpus * num_gpus // len(each.gpus) for each in machines if each.num_cpus > 1]
    return PodShare(
        num_cpus=max(1, min([CPUS_PER_GPU_RANK * num_gpus + CPUS_PER_LAUNCHER, *parts])),
        num_gpus=num_gpus,
        memory=quantity(HOST_BYTES_PER_GPU_RANK * num_gpus + shm_bytes),
        shm=quantity(shm_bytes),
    )


def pod_groups(
    name: str, kind: str, nodes_each: int, share: PodShare, types: tuple[str | None, ...]
) -> tuple[Group, ...]:
    """Return the pods of all replicas: those of a kind of GPU, or of each replica."""
    if kind == "leaderworkerset":
        head = Group(f"{name}-head", "head", 0, 1, share, types[0])
        workers = Group(f"{name}-workers", "worker", 1, nodes_each - 1, share, types[0])
        return (head, workers) if nodes_each > 1 else (head,)
    if kind == "deployment":
        counts = Counter(types)
        if len(counts) == 1:
            return (Group(name, "head", 0, len(types), share, types[0]),)
        return tuple(
            Group(f"{name}-{i}", "head", 0, count, share, each, (("pool", str(i)),))
            for i, (each, count) in enumerate(counts.items())
        )
    return tuple(
        group
        for replica, gpu_type in enumerate(types)
        for group in _sets(name, replica, nodes_each, share, gpu_type)
    )


def _sets(
    name: str, replica: int, nodes_each: int, share: PodShare, gpu_type: str | None
) -> tuple[Group, ...]:
    """Return the StatefulSets of a replica: only the head has an HTTP port to probe."""
    labels = (("replica", str(replica)),)
    first = f"{name}-{replica}-head"
    address = f"{first}-0.{name}-nodes"
    head = Group(first, "head", 0, 1, share, gpu_type, labels, address)
    if nodes_each == 1:
        return (head,)
    rest = f"{name}-{replica}-rest"
    return (
        head,
        Group(rest, "worker", 1, nodes_each - 1, share, gpu_type, labels, address),
    )
