import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.templates.crd_schemas import problems
from tests.templates.plans import NCCL, cluster, cpu_plan, plan, spec

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates import kubernetes_objects
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.layout import DRAIN_S
from rankwright.templates.options import MAX_KUBERNETES_NAME
from rankwright.templates.render import render

PLANS = {
    "one machine": lambda: plan((8,), tp=8, pp=1),
    "part of a machine": lambda: plan((6,), tp=6, pp=1, machines=cluster((8,))),
    "two machines": plan,
    "uneven machines": lambda: plan((8, 4, 4, 8), tp=4, pp=1),
    "one cpu machine": lambda: cpu_plan((3,)),
    "two cpu machines": cpu_plan,
}
OPTIONS: dict[str, dict[str, object]] = {
    "none": {},
    "pvc": {
        "name": "no",  # a boolean, were it not quoted
        "namespace": "123",
        "image": "registry.example.com:5000/a/b@sha256:" + "0" * 64,
        "model_pvc": "weights",
        "model_path": '/models/it\'s "here"',
    },
    "host path": {"name": "a" * MAX_KUBERNETES_NAME, "model_host_path": "/srv/a b", "port": 9000},
}


def objects(made: Plan, **options: object) -> list[dict[str, Any]]:
    return read_objects(render(made, "kubernetes", None, **options)["rankwright.yaml"])


def of_kind(found: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    return [each for each in found if each["kind"] in kinds]


def pods(found: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each pod the controllers would make, with its number."""
    for workload in of_kind(found, "Deployment", "StatefulSet"):
        start = workload["spec"].get("ordinals", {}).get("start", 0)
        for number in range(start, start + workload["spec"]["replicas"]):
            yield number, workload["spec"]["template"]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return dict(only)


def gpu_limit(pod: dict[str, Any]) -> int:
    resources = container(pod)["resources"]
    limit = resources.get("limits", {}).get("nvidia.com/gpu", 0)
    assert resources["requests"].get("nvidia.com/gpu", 0) == limit
    return int(limit)


@given(
    counts=st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    device=st.sampled_from(["gpu", "cpu"]),
)
@settings(max_examples=60, deadline=None)
def test_pods_ask_for_the_gpus_of_the_plan_and_no_more(counts: list[int], device: str) -> None:
    made = plan(counts, tp=1, pp=1) if device == "gpu" else cpu_plan(counts)
    limits = dict(sorted((number, gpu_limit(pod)) for number, pod in pods(objects(made))))
    used = [count for count in counts if count]
    if device == "gpu":
        assert list(limits.items()) == list(enumerate(used))
        assert sum(limits.values()) == made.num_gpus
    else:
        assert list(limits.items()) == [(number, 0) for number in range(len(used))]


def test_deepseek_on_sixteen_gpus_asks_for_sixteen() -> None:
    made = plan((8, 8), tp=8, pp=2, model=spec("deepseek-ai/DeepSeek-V3", 61))
    assert sum(gpu_limit(pod) for _, pod in pods(objects(made))) == 16


def test_a_cpu_plan_asks_for_cpus_and_memory() -> None:
    (_, pod), _ = pods(objects(cpu_plan((2, 2), num_cpus=4)))
    # 4 CPUs less one for the machine itself; 2 ranks x (2 GiB and 1 GiB of /dev/shm).
    assert container(pod)["resources"] == {"requests": {"cpu": "3", "memory": "6144Mi"}}


def test_one_machine_is_a_deployment_and_several_are_stateful_sets() -> None:
    kinds = [each["kind"] for each in objects(PLANS["one machine"]())]
    assert kinds == ["ConfigMap", "Service", "Deployment", "NetworkPolicy"]
    names = [
        (each["metadata"]["name"], each["spec"]["ordinals"]["start"], each["spec"]["replicas"])
        for each in of_kind(objects(PLANS["uneven machines"](), name="x"), "StatefulSet")
    ]
    assert names == [("x-head", 0, 1), ("x-from-1", 1, 2), ("x-from-3", 3, 1)]


def test_another_vendors_gpus_have_another_name() -> None:
    made = plan((8,), tp=8, pp=1, machines=cluster((8,), "mi300x"))
    ((_, pod),) = pods(objects(made))
    assert container(pod)["resources"]["limits"] == {"amd.com/gpu": 8}
    ((_, pod),) = pods(objects(made, gpu_resource="amd.com/mi300"))
    assert container(pod)["resources"]["limits"] == {"amd.com/mi300": 8}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PLANS)
def test_the_api_server_would_know_every_field(name: str, options: str) -> None:
    pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for each in objects(PLANS[name](), **OPTIONS[options]):
        assert problems(each) == []


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PLANS)
def test_yamllint_finds_nothing(name: str, options: str) -> None:
    pytest.importorskip("yamllint", reason="pip install yamllint")
    config = importlib.import_module("yamllint.config").YamlLintConfig(
        "extends: default\n"
        "rules: {line-length: {max: 100, allow-non-breakable-inline-mappings: true}}"
    )
    text = render(PLANS[name](), "kubernetes", None, **OPTIONS[options])["rankwright.yaml"]
    problems = importlib.import_module("yamllint.linter").run(text, config)
    assert [str(problem) for problem in problems] == []


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PLANS)
def test_pods_pass_the_restricted_security_standard(name: str, options: str) -> None:
    for _, pod in pods(objects(PLANS[name](), **OPTIONS[options])):
        context, own = pod["spec"]["securityContext"], container(pod)["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["readOnlyRootFilesystem"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim"}
        if options == "host path":  # which the standard forbids: the docs say so
            allowed.add("hostPath")
        for volume in pod["spec"]["volumes"]:
            assert set(volume) - {"name"} <= allowed


@pytest.mark.parametrize("name", PLANS)
def test_every_pod_has_probes_shared_memory_and_time_to_drain(name: str) -> None:
    for number, pod in pods(objects(PLANS[name]())):
        own = container(pod)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if number == 0:
                assert own[probe]["httpGet"] == {"path": "/health", "port": "http"}
            else:
                assert ":8000/health" in own[probe]["exec"]["command"][-1]
        assert own["startupProbe"]["periodSeconds"] * own["startupProbe"]["failureThreshold"] >= 300
        sleep_s = own["lifecycle"]["preStop"]["sleep"]["seconds"]
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace_s > (sleep_s + DRAIN_S if number == 0 else sleep_s)
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in own["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(volumes) == set(mounts.values())


def test_workers_end_after_the_head_has_drained() -> None:
    (_, head), (_, worker) = pods(objects(plan()))
    head_sleep = container(head)["lifecycle"]["preStop"]["sleep"]["seconds"]
    worker_sleep = container(worker)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert worker_sleep >= head_sleep + DRAIN_S


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PLANS)
def test_names_are_within_their_limits_and_selectors_find_their_pods(
    name: str, options: str
) -> None:
    found = objects(PLANS[name](), **OPTIONS[options])
    for each in found:
        assert each["metadata"].get("namespace") == OPTIONS[options].get("namespace")
        assert each["metadata"]["labels"]["app.kubernetes.io/name"] == "rankwright"
        for value in each["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value)
        limit = {"StatefulSet": 52, "ConfigMap": 253}.get(each["kind"], 63)
        assert len(each["metadata"]["name"]) <= limit
    selectors = [
        each["spec"]["selector"]["matchLabels"]
        for each in of_kind(found, "Deployment", "StatefulSet")
    ]
    templates = [
        each["spec"]["template"]["metadata"]["labels"]
        for each in of_kind(found, "Deployment", "StatefulSet")
    ]
    for index, selector in enumerate(selectors):
        hits = [labels for labels in templates if selector.items() <= labels.items()]
        assert hits == [templates[index]]
    front = of_kind(found, "Service")[0]["spec"]["selector"]
    assert [front.items() <= labels.items() for labels in templates].count(True) == 1
    assert front.items() <= templates[0].items()
    for service in of_kind(found, "Service")[1:]:
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        assert all(service["spec"]["selector"].items() <= labels.items() for labels in templates)


def test_pods_of_one_plan_stay_on_machines_of_their_own() -> None:
    for _, pod in pods(objects(plan())):
        (term,) = pod["spec"]["affinity"]["podAntiAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


def test_the_plans_environment_reaches_the_pod_less_the_hosts_interfaces() -> None:
    text = render(plan(), "kubernetes")["rankwright.yaml"]
    assert "Left out, since pods have interfaces of their own: NCCL_SOCKET_IFNAME." in text
    for _, pod in pods(read_objects(text)):
        values = {each["name"]: each.get("value") for each in container(pod)["env"]}
        assert values["NCCL_IB_HCA"] == "=mlx5_0,mlx5_1"
        assert "NCCL_SOCKET_IFNAME" not in values
    for variable in NCCL[:2]:
        assert f"        # {variable.reason}\n" in text


def test_a_pod_has_the_loopback_interface_too() -> None:
    lo = EnvironmentVariable(name="GLOO_SOCKET_IFNAME", value="lo", reason="one machine")
    ((_, pod),) = pods(objects(plan((8,), tp=8, pp=1, environment=(lo,))))
    assert {"name": "GLOO_SOCKET_IFNAME", "value": "lo"} in container(pod)["env"]


def test_another_plan_has_another_config_map() -> None:
    names = set()
    for made in (plan(), plan(memory_bytes_per_gpu=1e9)):
        found = objects(made)
        (config,) = of_kind(found, "ConfigMap")
        assert config["immutable"] is True
        names.add(config["metadata"]["name"])
        for _, pod in pods(found):
            assert {"configMap": {"name": config["metadata"]["name"]}, "name": "plan"} in pod[
                "spec"
            ]["volumes"]
    assert len(names) == 2


def test_a_local_model_folder_is_mounted_from_the_machine_where_it_was() -> None:
    local = plan((8,), tp=8, pp=1, model=spec("/srv/models/llama"))
    ((_, pod),) = pods(objects(local))
    path = {"path": "/srv/models/llama", "type": "Directory"}
    assert {"hostPath": path, "name": "model"} in pod["spec"]["volumes"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container(pod)["volumeMounts"]}
    assert mounts["model"] == "/srv/models/llama"
    assert not any("--model-path" in word for word in container(pod)["args"])


def test_weights_on_a_claim_are_read_from_there() -> None:
    ((_, pod),) = pods(objects(PLANS["one machine"](), **OPTIONS["pvc"]))
    assert '--model-path=/models/it\'s "here"' in container(pod)["args"]
    claim = {"claimName": "weights", "readOnly": True}
    assert {"persistentVolumeClaim": claim, "name": "model"} in pod["spec"]["volumes"]


def test_a_host_path_that_climbs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must not contain '\.\.'"):
        objects(plan(), model_host_path="/srv/../etc")


def test_a_plan_larger_than_a_config_map_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_objects, "MAX_CONFIG_MAP_BYTES", 1000)
    with pytest.raises(ValueError, match="a ConfigMap takes 1000"):
        objects(plan())
