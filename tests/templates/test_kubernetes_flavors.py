"""Every flavor and option against the real schemas, and what each asks for."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.templates.crd_schemas import crds_folder, custom_schemas, problems
from tests.templates.plans import cluster, cpu_plan, mixed_plan, plan

from rankwright.planner.plan import Plan
from rankwright.templates.checks.objects import read_objects, workload_pods
from rankwright.templates.kubernetes_flavors import FLAVORS
from rankwright.templates.render import render

FABRIC: dict[str, object] = {
    "rdma_resource": "rdma/ib",
    "rdma_count": 8,
    "topology_key": "x.io/rack",
}
EXTRAS: dict[str, dict[str, object]] = {
    "plain": {},
    "all": {
        **FABRIC,
        "image_pull_secret": "registry",
        "token_secret": "hub",
        "namespace": "a",
        "device_class": "gpu.nvidia.com",
        "node_selector": "pool=a,example.com/b=",
        "monitor": True,
        "model_pvc": "weights",
    },
}


def objects(made: Plan, **options: object) -> list[dict[str, Any]]:
    return read_objects(render(made, "kubernetes", None, **options)["rankwright.yaml"])


def of_kind(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (item,) = [each for each in found if each["kind"] == kind]
    return item


def pods(found: list[dict[str, Any]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    return workload_pods(found)


def check(found: list[dict[str, Any]]) -> None:
    """As a server would: each object, and each pod that a controller would make of it."""
    pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for item in found:
        if "k8s.io" not in item["apiVersion"] and "." in item["apiVersion"].partition("/")[0]:
            needs_crds()
        if item["apiVersion"].startswith(("leaderworkerset", "jobset", "ray.io")):
            needs_crds()
        assert problems(item) == [], item["kind"]
    for start, _, template in pods(found):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = f"x-{start}"
        assert problems(pod) == []


def needs_crds() -> None:
    if crds_folder() is None:
        pytest.skip("no CRDs here: RANKWRIGHT_CRDS names no folder that has them")


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_server_would_admit_every_object(flavor: str, num_nodes: int, extras: str) -> None:
    if num_nodes not in FLAVORS[flavor].num_nodes:
        with pytest.raises(ValueError, match="is for one machine, the plan has 2; use stateful"):
            objects(plan(), flavor=flavor)
        return
    made = plan((8,) * num_nodes, tp=8, pp=1)
    check(objects(made, flavor=flavor, **EXTRAS[extras]))


@pytest.mark.parametrize("flavor", ["deployment", "leaderworkerset"])
@pytest.mark.parametrize("prometheus", [None, "http://prometheus.monitoring:9090"])
def test_copies_follow_the_queue(flavor: str, prometheus: str | None) -> None:
    options: dict[str, object] = {"prometheus": prometheus} if prometheus else {}
    made = plan((8,), tp=8, pp=1) if flavor == "deployment" else plan()
    found = objects(made, flavor=flavor, max_replicas=3, queue_length=7, **options)
    check(found)
    scaler = of_kind(found, "ScaledObject" if prometheus else "HorizontalPodAutoscaler")
    target = of_kind(found, scaler["spec"]["scaleTargetRef"]["kind"])
    assert scaler["spec"]["scaleTargetRef"]["name"] == target["metadata"]["name"]
    assert "replicas" not in target["spec"], "an apply would undo what the scaler did"
    assert "7" in str(scaler["spec"])


def test_the_schemas_can_refuse() -> None:
    needs_crds()
    found = of_kind(objects(plan(), flavor="leaderworkerset"), "LeaderWorkerSet")
    broken = copy.deepcopy(found)
    broken["spec"]["leaderWorkerTemplate"]["sizes"] = 2
    assert problems(broken)
    broken = copy.deepcopy(found)
    worker = broken["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]
    worker["env"].append(worker["env"][0])
    assert any("two entries" in problem for problem in problems(broken))
    jobset = of_kind(objects(plan(), flavor="jobset"), "JobSet")
    jobset["spec"]["failurePolicy"]["restartStrategy"] = "Never"
    assert problems(jobset)
    assert any("x-kubernetes-validations" in str(schema) for schema in custom_schemas().values())


@pytest.mark.parametrize(
    ("flavor", "head"),
    [
        ("statefulset", "x-head-0.x-nodes"),
        ("job", "x-0.x-nodes"),
        ("jobset", "x-nodes-0-0.x"),
        ("leaderworkerset", "$(LWS_LEADER_ADDRESS)"),
    ],
)
def test_every_pod_knows_its_number_and_where_its_head_is(flavor: str, head: str) -> None:
    found = objects(plan(), flavor=flavor, name="x")
    for _, _, pod in pods(found):
        environment = {each["name"]: each for each in pod["spec"]["containers"][0]["env"]}
        assert environment["HEAD"]["value"] == head
        path = environment["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert path == f"metadata.labels['{FLAVORS[flavor].rank_label}']"
    named = [each for each in found if each["kind"] == "Service" and "clusterIP" in each["spec"]]
    assert bool(named) == FLAVORS[flavor].needs_service
    assert FLAVORS[flavor].subdomain is None or named[0]["metadata"]["name"] == "x-nodes"


def test_a_job_of_our_own_that_is_wrong_is_not_started_again() -> None:
    job = of_kind(objects(plan(), flavor="job"), "Job")["spec"]
    assert (job["completions"], job["parallelism"]) == (2, 2)
    rule = job["podFailurePolicy"]["rules"][0]
    (container,) = job["template"]["spec"]["containers"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == container["name"]


@pytest.mark.parametrize("flavor", ["job", "jobset"])
def test_machines_that_one_template_cannot_ask_for_are_refused(flavor: str) -> None:
    with pytest.raises(ValueError, match=r"asks for 1 kind.*are of 2; use statefulset"):
        objects(plan((8, 4), tp=4, pp=1), flavor=flavor)


def test_a_leader_and_its_workers_may_be_two_kinds() -> None:
    found = of_kind(
        objects(plan((8, 4, 4), tp=4, pp=1), flavor="leaderworkerset"), "LeaderWorkerSet"
    )
    group = found["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 3
    gpus = [
        group[name]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        for name in ("leaderTemplate", "workerTemplate")
    ]
    assert gpus == [8, 4]
    with pytest.raises(ValueError, match="are of 3"):
        objects(plan((8, 4, 8), tp=4, pp=1), flavor="leaderworkerset")


def test_on_ray_all_machines_are_workers_and_those_alike_one_group() -> None:
    found = objects(plan((8, 4, 8), tp=4, pp=1), flavor="rayservice", name="x", model_pvc="w")
    cluster = of_kind(found, "RayService")["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    told = [
        (
            group["replicas"],
            group["rayStartParams"]["num-gpus"],
            group["rayStartParams"]["num-cpus"],
        )
        for group in cluster["workerGroupSpecs"]
    ]
    # A CPU a rank, and one for the front end, wherever Ray puts it.
    assert told == [(2, "8", "9"), (1, "4", "5")]
    assert {head["rayStartParams"][what] for what in ("num-cpus", "num-gpus")} == {"0"}
    (container,) = head["template"]["spec"]["containers"]
    assert container["resources"].keys() == {"requests"}
    assert "nvidia.com/gpu" not in container["resources"]["requests"]
    # The machines of the plan are apart; the head may be beside one, and needs no weights.
    assert "affinity" not in head["template"]["spec"]
    assert "model" not in {volume["name"] for volume in head["template"]["spec"]["volumes"]}
    for _, _, pod in pods(found):
        (apart,) = pod["spec"]["affinity"]["podAntiAffinity"].popitem()[1]
        labels = apart["labelSelector"]["matchLabels"]
        assert labels.items() <= pod["metadata"]["labels"].items()
        assert not labels.items() <= head["template"]["metadata"]["labels"].items()
    # KubeRay makes the head's Service of the named ports and of no others.
    names = {port["name"] for port in container["ports"]}
    assert names == {"gcs-server", "dashboard", "serve"}
    assert not [item for item in found if item["kind"] == "PodDisruptionBudget"]


def test_a_cpu_plan_on_ray_asks_for_the_cpus_of_its_ranks() -> None:
    made = cpu_plan((3, 3))
    machine = made.cluster.node(0)
    (group,) = of_kind(objects(made, flavor="rayservice"), "RayService")["spec"][
        "rayClusterConfig"
    ]["workerGroupSpecs"]
    each = machine.num_cpus // len(machine.gpus)
    assert group["rayStartParams"]["num-cpus"] == str(3 * each + 1)
    assert group["rayStartParams"]["num-gpus"] == "0"


def test_serve_is_told_of_the_weights_and_of_how_long_they_take() -> None:
    made = plan((4,), tp=4, pp=1, machines=cluster((8,)))
    found = objects(made, flavor="rayservice", model_pvc="w", model_path="/models/it's", port=9000)
    config = yaml.safe_load(of_kind(found, "RayService")["spec"]["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 9000}
    (application,) = config["applications"]
    settings = application["args"]
    assert settings["model_path"] == "/models/it's"
    assert settings["force"] is True  # four GPUs of eight
    assert settings["start_timeout_s"] > 300
    service = of_kind(found, "Service")["spec"]
    assert service["ports"] == [{"name": "http", "port": 9000, "targetPort": "serve"}]


def test_kinds_of_gpu_that_ray_would_mix_up_are_refused() -> None:
    types = "h100-sxm=NVIDIA-H100-80GB-HBM3,a100-sxm-80gb=NVIDIA-A100-SXM4-80GB"
    with pytest.raises(ValueError, match="leaves it to Ray which of its machines is which"):
        objects(mixed_plan(), flavor="rayservice", gpu_types=types)
    one = "h100-sxm=NVIDIA-H100-80GB-HBM3"
    for _, _, pod in pods(objects(plan(), flavor="rayservice", gpu_types=one)):
        assert pod["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": one.partition("=")[2]}


def test_machines_of_two_kinds_are_told_apart_by_their_label() -> None:
    types = "h100-sxm=NVIDIA-H100-80GB-HBM3,a100-sxm-80gb=NVIDIA-A100-SXM4-80GB"
    found = objects(mixed_plan(), gpu_types=types)
    labels = [pod["spec"]["nodeSelector"]["nvidia.com/gpu.product"] for _, _, pod in pods(found)]
    assert labels == ["NVIDIA-H100-80GB-HBM3", "NVIDIA-A100-SXM4-80GB"]
    with pytest.raises(ValueError, match="a type in gpu_types for each"):
        objects(mixed_plan(), gpu_types="h100-sxm=NVIDIA-H100-80GB-HBM3")
    check(found)


def test_rdma_is_asked_for_with_what_it_takes_to_lock_memory() -> None:
    for _, _, pod in pods(objects(plan(), **FABRIC)):
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["rdma/ib"] == 8
        assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
        # The capability is of no effect for another user.
        assert pod["spec"]["securityContext"]["runAsUser"] == 0
        (near,) = pod["spec"]["affinity"]["podAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert near["topologyKey"] == "x.io/rack"
    with pytest.raises(ValueError, match="the plan is for CPUs; leave it out"):
        objects(cpu_plan(), rdma_resource="rdma/ib")


def test_claims_ask_for_the_gpus_in_place_of_limits() -> None:
    found = objects(plan((8, 4), tp=4, pp=1), device_class="gpu.nvidia.com")
    counts = {
        each["metadata"]["name"]: each["spec"]["spec"]["devices"]["requests"][0]["exactly"]["count"]
        for each in found
        if each["kind"] == "ResourceClaimTemplate"
    }
    assert sorted(counts.values()) == [4, 8]
    claimed = []
    for _, _, pod in pods(found):
        (claim,) = pod["spec"]["resourceClaims"]
        claimed.append(counts[claim["resourceClaimTemplateName"]])
        assert "limits" not in pod["spec"]["containers"][0]["resources"]
    assert claimed == [8, 4]


@pytest.mark.parametrize("flavor", FLAVORS)
def test_ranks_are_reached_by_the_plans_own_pods_alone(flavor: str) -> None:
    made = plan() if 2 in FLAVORS[flavor].num_nodes else plan((8,), tp=8, pp=1)
    found = objects(made, flavor=flavor, name="x", port=9000)
    policy = of_kind(found, "NetworkPolicy")["spec"]
    for _, _, pod in pods(found):
        labels = policy["podSelector"]["matchLabels"]
        assert labels.items() <= pod["metadata"]["labels"].items()
    (http,) = [rule for rule in policy["ingress"] if "from" not in rule]
    assert http == {"ports": [{"port": 9000}]}
    own = [rule["from"] for rule in policy["ingress"] if rule.keys() == {"from"}]
    assert own == ([[{"podSelector": policy["podSelector"]}]] if made.split.pp > 1 else [])
    (others,) = [rule for rule in policy["ingress"] if len(rule) == 2] or [None]
    assert (others is not None) == FLAVORS[flavor].on_ray  # its dashboard is for the operator
    if others is not None:
        operator = {"app.kubernetes.io/component": "kuberay-operator"}
        assert others["from"][0]["podSelector"]["matchLabels"] == operator
        assert others["ports"] == [{"port": 8265}]


def test_machines_are_emptied_one_at_a_time() -> None:
    found = objects(plan(), name="x")
    budget = of_kind(found, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    for _, _, pod in pods(found):
        assert budget["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_replicas": 2}, "flavor=statefulset has no copies"),
        ({"prometheus": "http://a:1"}, "max_replicas scales by"),
        ({"node_selector": "a=b,-c=d"}, "node_selector has '-c=d'"),
        ({"flavor": "raycluster"}, "expected auto, deployment, statefulset"),
        ({"flavor": "rayservice", "port": 8265}, "port=8265 is one that Ray uses itself"),
        ({"flavor": "rayservice", "port": 10500}, "10002 to 19999.; expected another"),
        ({"flavor": "rayservice", "max_replicas": 2}, "flavor=rayservice has no copies"),
        ({"queue": "serving"}, "no one object whose pods queue=serving admits together; use d"),
    ],
)
def test_options_that_do_not_fit_say_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objects(plan(), **options)


@pytest.mark.parametrize("flavor", [name for name, row in FLAVORS.items() if row.is_whole])
def test_a_queue_admits_all_pods_or_none_and_places_them(flavor: str) -> None:
    made = plan() if 2 in FLAVORS[flavor].num_nodes else plan((8,), tp=8, pp=1)
    found = objects(made, flavor=flavor, queue="serving", topology_key="x.io/rack")
    check(found)
    label = "kueue.x-k8s.io/queue-name"
    queued = [item["kind"] for item in found if label in item["metadata"]["labels"]]
    assert len(queued) == 1, "the one object that has the pods"
    if made.split.pp == 1:
        return
    places = [pod["metadata"]["annotations"] for _, _, pod in pods(found)]
    assert {place["kueue.x-k8s.io/podset-required-topology"] for place in places} == {"x.io/rack"}
    groups = [place.get("kueue.x-k8s.io/podset-group-name") for place in places]
    assert groups == (["group"] * 2 if flavor == "leaderworkerset" else [None])
    assert all("podAffinity" not in pod["spec"]["affinity"] for _, _, pod in pods(found))


def nulls(item: Any, path: str = "$") -> Iterator[str]:
    if item is None:
        yield path
    pairs = item.items() if isinstance(item, dict) else ()
    for key, value in enumerate(item) if isinstance(item, list) else pairs:
        yield from nulls(value, f"{path}.{key}")


@pytest.mark.parametrize("flavor", FLAVORS)
def test_no_value_is_left_empty(flavor: str) -> None:
    made = plan() if 2 in FLAVORS[flavor].num_nodes else plan((8,), tp=8, pp=1)
    assert list(nulls(objects(made, flavor=flavor))) == []
