"""The kinds of workload that a plan's pods can be part of. A new one is a row and a `.yaml.j2`."""

from dataclasses import dataclass, replace

from rankwright.templates.kubernetes_options import KubernetesOptions, PodOptions

_APP = "app.kubernetes.io"


@dataclass(frozen=True, slots=True)
class PodShare:
    """What one pod asks for, as Kubernetes quantities."""

    num_cpus: int
    num_gpus: int
    memory: str
    shm: str


@dataclass(frozen=True, slots=True)
class Group:
    """Machines that are alike and follow each other: one StatefulSet."""

    name: str
    component: str
    start: int  # node rank of the first
    replicas: int
    share: PodShare
    gpu_type: str | None
    labels: tuple[tuple[str, str], ...] = ()  # that tell its pods from those of other groups
    head: str | None = None  # address of its head; None: the flavor's


@dataclass(frozen=True, slots=True)
class Flavor:
    """A kind of workload: how its pods find the head, and what tells the head's pod apart."""

    head: str = ""  # address of the head; {name} is the deployment's
    rank_label: str = ""  # of pods: their number
    head_labels: tuple[tuple[str, str], ...] = ((f"{_APP}/component", "head"),)
    needs_service: bool = True  # a headless one for names
    subdomain: str | None = None
    restart_policy: str | None = None
    needs: str = ""
    max_kinds: int | None = None  # of machines that it can ask for
    scale_target: str | None = None  # as JSON; {name} is the deployment's
    is_whole: bool = True  # one object that Kueue knows has all pods, so that it admits all or none
    num_nodes: range = range(1, 2**31)
    # Whether Ray runs in the pods and starts the ranks; it needs no order of pods, and no names.
    on_ray: bool = False


_INDEX = "batch.kubernetes.io/job-completion-index"
FLAVORS: dict[str, Flavor] = {
    "deployment": Flavor(
        head="{name}",
        rank_label="apps.kubernetes.io/pod-index",
        scale_target='{{"apiVersion": "apps/v1", "kind": "Deployment", "name": "{name}"}}',
        num_nodes=range(1, 2),
    ),
    "statefulset": Flavor(
        head="{name}-head-0.{name}-nodes",
        rank_label="apps.kubernetes.io/pod-index",
        is_whole=False,
    ),
    "job": Flavor(
        head="{name}-0.{name}-nodes",
        rank_label=_INDEX,
        head_labels=((_INDEX, "0"),),
        subdomain="{name}-nodes",
        restart_policy="Never",
        max_kinds=1,
    ),
    "jobset": Flavor(
        head="{name}-nodes-0-0.{name}",
        rank_label=_INDEX,
        head_labels=((_INDEX, "0"),),
        needs_service=False,
        restart_policy="Never",
        needs=", with JobSet",
        max_kinds=1,
    ),
    "leaderworkerset": Flavor(
        head="$(LWS_LEADER_ADDRESS)",
        rank_label="leaderworkerset.sigs.k8s.io/worker-index",
        needs_service=False,
        needs=", with LeaderWorkerSet",
        max_kinds=2,
        scale_target='{{"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", '
        '"name": "{name}"}}',
    ),
    "rayservice": Flavor(
        # KubeRay sets it on pods whose proxy it may send requests to.
        head_labels=(("ray.io/serve", "true"),),
        needs_service=False,
        needs=", with KubeRay 1.3 or later",
        is_whole=False,
        on_ray=True,
    ),
}


def flavor_name(wanted: str, num_nodes: int) -> str:
    """Return the flavor to use for `num_nodes` machines where `wanted` is 'auto'."""
    if wanted == "auto":
        return "deployment" if num_nodes == 1 else "statefulset"
    return wanted


def check_queue(name: str, options: PodOptions) -> None:
    """Check that a queue would admit all pods of the flavor called `name` at once.

    Raises:
        ValueError: It would not; with flavors of which it does.
    """
    if options.queue is not None and not FLAVORS[name].is_whole:
        whole = " or ".join(key for key, value in FLAVORS.items() if value.is_whole)
        raise ValueError(
            f"flavor={name} is no one object whose pods queue={options.queue} admits together; "
            f"use {whole}"
        )


def check_flavor(name: str, groups: tuple[Group, ...], options: KubernetesOptions) -> Flavor:
    """Return the flavor called `name` if it can ask for `groups`.

    Raises:
        ValueError: It cannot; with a flavor that can.
    """
    flavor = FLAVORS[name]
    num_nodes = sum(group.replicas for group in groups)
    if num_nodes not in flavor.num_nodes:
        raise ValueError(
            f"flavor={name} is for one machine, the plan has {num_nodes}; use statefulset, or auto"
        )
    # Unlike a leader and its workers, a Job's pods are all of one template.
    first = {(groups[0].share, groups[0].gpu_type)}
    rest = {(group.share, group.gpu_type) for group in groups[1:]}
    kinds = len(first | rest) if flavor.max_kinds == 1 else 1 + len(rest)
    if flavor.max_kinds is not None and kinds > flavor.max_kinds:
        raise ValueError(
            f"flavor={name} asks for {flavor.max_kinds} kind(s) of pod, the plan's machines are of "
            f"{kinds}; use statefulset, or plan with a --dp, --tp and --pp that fill all alike"
        )
    if flavor.on_ray and len({group.gpu_type for group in groups}) > 1:
        raise ValueError(
            f"flavor={name} leaves it to Ray which of its machines is which, and the plan's are of "
            "several kinds of GPU; use statefulset"
        )
    if options.rdma_resource is not None and groups[0].share.num_gpus == 0:
        raise ValueError(
            f"rdma_resource={options.rdma_resource} is for GPUs of several machines, and the plan "
            "is for CPUs; leave it out"
        )
    check_queue(name, options)
    if options.max_replicas > 1 and flavor.scale_target is None:
        scales = " or ".join(key for key, value in FLAVORS.items() if value.scale_target)
        raise ValueError(
            f"flavor={name} has no copies that max_replicas={options.max_replicas} could number; "
            f"use {scales}"
        )
    return flavor


def for_name(flavor: Flavor, name: str) -> Flavor:
    """Return `flavor` with the deployment's name in place."""
    subdomain = flavor.subdomain and flavor.subdomain.format(name=name)
    return replace(flavor, head=flavor.head.format(name=name), subdomain=subdomain)
