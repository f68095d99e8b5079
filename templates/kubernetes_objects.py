"""A plan as Kubernetes objects: plain ones by default, for clusters without any operator.

One machine is a Deployment. Several are StatefulSets and not an Indexed Job, because a server has
no completion: a StatefulSet restarts a lost pod for ever under the same name and number, where a
Job counts it towards a limit and then gives up. The head has a set of its own, since only it has an
HTTP port to probe; workers follow, a set for each run of machines that ask for the same.

Other flavors are for clusters that have their operators, or queues that admit only Jobs.
"""

import hashlib
import math
from itertools import groupby
from pathlib import PurePosixPath

from rankwright import __version__
from rankwright.planner.parts_plan import OwnPlan, PartsPlan
from rankwright.planner.plan import EnvironmentVariable
from rankwright.templates.fill import fill
from rankwright.templates.kubernetes_flavors import (
    Flavor,
    Group,
    PodShare,
    check_flavor,
    flavor_name,
    for_name,
)
from rankwright.templates.kubernetes_options import KubernetesOptions, PodOptions
from rankwright.templates.kubernetes_ray import (
    AGENT_PORT,
    DASHBOARD_PORT,
    GCS_PORT,
    OBJECT_STORE_BYTES,
    check_ray_port,
    ray_head,
    ray_workers,
)
from rankwright.templates.layout import (
    DRAIN_S,
    END_S,
    PORTS_OF_A_LAUNCH,
    SHM_BYTES_PER_RANK,
    NodeShare,
    needs_force,
    node_shares,
    start_budget_s,
)
from rankwright.templates.options import (
    KUBERNETES_PORT,
    default_name,
)
from rankwright.templates.plan_text import plan_text
from rankwright.templates.variables import checked_environment
from rankwright.topology.devices import DEVICES

KUBERNETES_FILE = "rankwright.yaml"

# The API server's limit on the data of a ConfigMap (Kubernetes docs, ConfigMap, "Motivation").
MAX_CONFIG_MAP_BYTES = 2**20

# kube-proxy and ingresses need a moment to forget a pod that is ending: the usual preStop sleep of
# servers behind them.
PRE_STOP_S = 10

# The image of the Dockerfile has this user. Any other number would do.
_OWN_USER = 10001

PROBE_PERIOD_S = 10
WAIT_FOR_HEAD_S = 300

_HEAD_LABEL = ("app.kubernetes.io/component", "head")

# These name network interfaces of the machine, of which a pod has the loopback one only.
INTERFACE_VARIABLES = frozenset({"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"})


def kubernetes_files(plan: OwnPlan, options: KubernetesOptions) -> dict[str, str]:
    """Return the objects of `plan` as one YAML file, by file name.

    Raises:
        ValueError: The machines are unlike, the flavor cannot ask for them, or the plan is too
            large for a ConfigMap.
    """
    name = options.name or default_name(plan)
    shares = node_shares(plan, told_apart=options.gpu_types is not None)
    groups = _groups(name, shares, options.gpu_types)
    kind = flavor_name(options.flavor, len(shares))
    flavor = check_flavor(kind, groups, options)
    if flavor.on_ray:
        if isinstance(plan, PartsPlan):
            raise ValueError(
                f"Ray Serve runs replicas of one shape, the plan has {plan.label()}; choose "
                "another flavor, or plan with --mixed-shapes never"
            )
        check_ray_port(options.port)
    environment, left_out = pod_environment(checked_environment(plan))
    model_mount, model_path, host_path = model_volume(plan, options)
    return fill_objects(
        plan,
        options,
        name,
        for_name(flavor, name),
        groups,
        app="rankwright",
        engine=None,
        on_engine="",
        config_files={},
        size=_describe_size(shares),
        notes=_notes(options, left_out, host_path),
        needs=flavor.needs,
        num_nodes=len(shares),
        num_replicas=1,
        flavor=kind,
        image=options.image or f"rankwright:{__version__}",
        run_as_user=_OWN_USER,
        health="/health",
        drain_s=DRAIN_S,
        start_s=start_budget_s(shares),
        force=needs_force(shares),
        environment=environment,
        max_replicas=options.max_replicas,
        scale_target=flavor.scale_target and flavor.scale_target.format(name=name),
        queue_length=options.queue_length,
        prometheus=options.prometheus,
        model_path=model_path,
        model_mount=model_mount,
        model_host_path=host_path,
        # Later than the launcher's own limit, which says why; this is for a launcher that hangs.
        startup_failures=startup_failures(shares),
        ray_head=ray_head(name),
        ray_workers=ray_workers(plan, shares, groups) if flavor.on_ray else (),
        object_store_bytes=OBJECT_STORE_BYTES,
        gcs_port=GCS_PORT,
        agent_port=AGENT_PORT,
    )


def startup_failures(shares: tuple[NodeShare, ...]) -> int:
    """Return how often a startup probe may fail before the pod counts as hung."""
    return math.ceil(start_budget_s(shares) / PROBE_PERIOD_S) + 6


def fill_objects(
    plan: OwnPlan,
    options: PodOptions,
    name: str,
    extras: Flavor,
    groups: tuple[Group, ...],
    **own: object,
) -> dict[str, str]:
    """Return the objects of `groups` as one YAML file, by file name.

    Args:
        plan: What is served; it stands in a ConfigMap.
        options: What was said about pods.
        name: Of the deployment.
        extras: The kind of workload, with the name in place.
        groups: Machines to ask for.
        own: Values of the template that are of one target.

    Raises:
        ValueError: The plan is too large for a ConfigMap.
    """
    text = plan_text(plan)
    if len(text) > MAX_CONFIG_MAP_BYTES:
        raise ValueError(
            f"the plan of {plan.num_gpus} ranks has {len(text)} bytes, a ConfigMap takes "
            f"{MAX_CONFIG_MAP_BYTES}; deploy replicas on their own (a smaller --dp)"
        )
    gpu_counts = sorted({group.share.num_gpus for group in groups} - {0})
    content = repr((text, own["config_files"])) if own["config_files"] else text
    objects = fill(
        "kubernetes/rankwright.yaml.j2",
        version=__version__,
        model=plan.model.name,
        split=plan.label(),
        kubernetes="1.34" if options.device_class else "1.31",
        name=name,
        plan_name=f"{name}-plan-{hashlib.sha256(content.encode()).hexdigest()[:8]}",
        namespace=options.namespace,
        plan_text=text.rstrip("\n"),
        pod_extras=extras,
        groups=groups,
        image_pull_secret=options.image_pull_secret,
        token_secret=options.token_secret,
        port=options.port,
        ports=range(KUBERNETES_PORT, KUBERNETES_PORT + PORTS_OF_A_LAUNCH),
        http_port="serve" if extras.on_ray else "http",  # KubeRay looks for this name
        dashboard_port=DASHBOARD_PORT,
        monitored_labels=(_HEAD_LABEL,) if extras.on_ray else extras.head_labels,
        wait_tries=WAIT_FOR_HEAD_S,
        gpu_resource=options.gpu_resource or _gpu_resource(_first_device(plan)),
        device_class=options.device_class if gpu_counts else None,
        claim_names={count: f"{name}-{count}-gpus" for count in gpu_counts},
        rdma_resource=options.rdma_resource,
        rdma_count=options.rdma_count,
        topology_key=options.topology_key,
        queue=options.queue,
        node_selector=pairs(options.node_selector),
        monitor=options.monitor,
        model_pvc=options.model_pvc,
        head_pre_stop_s=PRE_STOP_S,
        worker_pre_stop_s=PRE_STOP_S + DRAIN_S,
        grace_s=PRE_STOP_S + DRAIN_S + END_S,
        **({"peers": (), "address_variable": None} | own),
    )
    return {KUBERNETES_FILE: objects}


def _first_device(plan: OwnPlan) -> str:
    first = plan.ranks[0]
    gpus = plan.cluster.node(first.node).gpus
    return next(gpu.device for gpu in gpus if gpu.index == first.gpu)


def pairs(text: str | None) -> tuple[tuple[str, str], ...]:
    """Return `a=b,c=d` as pairs."""
    if not text:
        return ()
    return tuple(
        (key, value) for key, _, value in (pair.partition("=") for pair in text.split(","))
    )


def _groups(name: str, shares: tuple[NodeShare, ...], gpu_types: str | None) -> tuple[Group, ...]:
    """Return the head's machine and then each run of like machines.

    Raises:
        ValueError: `gpu_types` does not name every kind of GPU, or a machine has several.
    """
    types = dict(pairs(gpu_types))

    def wants(share: NodeShare) -> tuple[PodShare, str | None]:
        if not types or share.num_gpus == 0:
            return _pod_share(share), None
        (kind, *others) = dict.fromkeys(share.devices)
        if others or kind not in types:
            raise ValueError(
                f"the plan runs on {', '.join(dict.fromkeys(share.devices))} on node {share.node}; "
                "expected one kind of GPU on a node, and a type in gpu_types for each"
            )
        return _pod_share(share), types[kind]

    head = Group(f"{name}-head", "head", 0, 1, *wants(shares[0]))
    runs = [(key, list(run)) for key, run in groupby(shares[1:], key=wants)]
    workers: list[Group] = []
    for key, run in runs:
        start = run[0].node_rank
        suffix = "workers" if len(runs) == 1 else f"from-{start}"
        component = "worker" if len(runs) == 1 else f"worker-from-{start}"
        workers.append(Group(f"{name}-{suffix}", component, start, len(run), *key))
    return (head, *workers)


def _pod_share(share: NodeShare) -> PodShare:
    shm_bytes = SHM_BYTES_PER_RANK * share.num_ranks
    num_cpus = share.num_cpus
    if share.num_gpus == 0:
        # A CPU plan takes the whole machine; leave one CPU to kubelet and the daemons beside us,
        # or no machine can ever give it. A request only: idle CPUs are used all the same.
        num_cpus = max(1, num_cpus - 1)
    return PodShare(
        num_cpus=num_cpus,
        num_gpus=share.num_gpus,
        memory=quantity(share.memory_bytes + shm_bytes),
        shm=quantity(shm_bytes),
    )


def quantity(num_bytes: int) -> str:
    """Return bytes as Kubernetes writes them."""
    return f"{math.ceil(num_bytes / 2**20)}Mi"


def _gpu_resource(device: str) -> str:
    """Return the name under which the vendor's device plugin offers `device`."""
    vendor = DEVICES[device].vendor if device in DEVICES else "nvidia"
    return f"{vendor}.com/gpu"


def pod_environment(
    variables: tuple[EnvironmentVariable, ...],
) -> tuple[tuple[EnvironmentVariable, ...], tuple[str, ...]]:
    """Return the variables of the pods, and the names of those that only suit the machine."""
    unfit = {v.name for v in variables if v.name in INTERFACE_VARIABLES and v.value != "lo"}
    return tuple(v for v in variables if v.name not in unfit), tuple(sorted(unfit))


def model_volume(plan: OwnPlan, options: PodOptions) -> tuple[str, str | None, str | None]:
    """Return where weights are mounted, the path to launch from, and the folder on the machine."""
    host_path, mount, path = options.model_host_path, "/models", options.model_path
    if options.model_pvc is not None or host_path is not None:
        path = path or mount
    elif PurePosixPath(plan.model.name).is_absolute():  # planned from a local folder
        host_path = mount = plan.model.name
    if host_path is not None and ".." in PurePosixPath(host_path).parts:
        raise ValueError(f"a hostPath must not contain '..', got {host_path!r}; resolve it first")
    return mount, path, host_path


def _notes(
    options: KubernetesOptions, left_out: tuple[str, ...], host_path: str | None
) -> tuple[str, ...]:
    """Return what the reader of the file must know."""
    notes: list[str] = []
    if options.image is None:
        notes.append("Build and push the image of docs/deploy-kubernetes.md, or set `image`.")
    return (*notes, *pod_notes(options, left_out, host_path))


def pod_notes(
    options: PodOptions, left_out: tuple[str, ...], host_path: str | None
) -> tuple[str, ...]:
    """Return what the reader must know of weights and of variables left out."""
    notes: list[str] = []
    if host_path is not None:
        notes.append("Weights are read from the same folder of every machine (hostPath).")
    elif options.model_pvc is None:
        notes.append("No volume holds the weights: set `model_pvc` or `model_host_path`.")
    if left_out:
        notes.append(f"Left out, since pods have interfaces of their own: {', '.join(left_out)}.")
    return tuple(notes)


def _describe_size(shares: tuple[NodeShare, ...]) -> str:
    what = "GPUs" if shares[0].num_gpus else "CPU ranks"
    counts = [share.num_ranks for share in shares]
    if len(counts) == 1:
        return f"one machine, {counts[0]} {what}"
    return f"{len(counts)} machines, {' + '.join(map(str, counts))} {what}"
