"""Kubernetes objects against their plan."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.checks.mismatch import (
    ManifestMismatchError,
    expect,
    expect_plan,
    is_cpu,
    ranks_by_node,
    variables,
)
from rankwright.templates.checks.ray_service import check_ray_service

# A pod has interfaces of its own: names of the machine's are wrong there.
HOST_INTERFACES = frozenset({"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"})

# libyaml's reader takes the same YAML and is ten times as fast, where PyYAML was built with it.
LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML file.

    Raises:
        ManifestMismatchError: A mapping has a key twice, of which readers silently keep one.
    """
    loader = LOADER(text)
    objects: list[dict[str, Any]] = []
    try:
        while loader.check_node():
            node = loader.get_node()
            _refuse_double_keys(node)
            objects.append(loader.construct_document(node))  # pyright: ignore[reportUnknownMemberType]
    finally:
        loader.dispose()
    return objects


def _refuse_double_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ManifestMismatchError(f"the key {key!r} is given twice{node.start_mark}")
        for _, value in node.value:
            _refuse_double_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_double_keys(value)


def check_objects(plan: OwnPlan, text: str) -> None:
    """Compare objects with their plan: pods, GPUs of each, launch, environment and the plan itself.

    Raises:
        ManifestMismatchError: They ask for other pods or GPUs, or carry another plan.
    """
    objects = read_objects(text)
    ranks = ranks_by_node(plan)
    claims = claimed_gpus(objects)
    services = [item for item in objects if item["kind"] == "RayService"]
    for service in services:
        check_ray_service(plan, service)
    gpus: dict[int, int] = {}
    for start, count, pod in workload_pods(objects):
        for ordinal in range(start, start + count):
            expect(f"pods numbered {ordinal}", ordinal in gpus, False)
            gpus[ordinal] = pod_gpus(plan, pod, claims)
        if services:
            _check_environment(plan, pod)
        else:
            _check_launch(plan, pod)
    expect("pods", sorted(gpus), list(range(len(ranks))))
    by_pod = [gpus[ordinal] for ordinal in sorted(gpus)]
    if services:  # which worker is which machine of the plan, Ray decides
        by_pod, ranks = sorted(by_pod), sorted(ranks)
    expect("GPUs by pod", by_pod, [0] * len(ranks) if is_cpu(plan) else ranks)
    (config,) = [item for item in objects if item["kind"] == "ConfigMap"]
    expect_plan(plan, config["data"]["plan.json"])


def workload_pods(objects: list[dict[str, Any]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield the number of the first pod of each template, how many there are, and the template."""
    for workload in objects:
        spec = workload.get("spec", {})
        match workload["kind"]:
            case "Deployment":
                yield 0, 1, spec["template"]  # a copy: autoscaling makes more
            case "StatefulSet":
                start = spec.get("ordinals", {}).get("start", 0)
                yield start, spec["replicas"], spec["template"]
            case "Job":
                expect("pods of the Job at once", spec["parallelism"], spec["completions"])
                yield 0, spec["completions"], spec["template"]
            case "JobSet":
                (job,) = spec["replicatedJobs"]
                expect("Jobs of the JobSet", job["replicas"], 1)
                inner = job["template"]["spec"]
                expect("pods of the Job at once", inner["parallelism"], inner["completions"])
                yield 0, inner["completions"], inner["template"]
            case "LeaderWorkerSet":
                group = spec["leaderWorkerTemplate"]
                yield 0, 1, group["leaderTemplate"]
                yield 1, group["size"] - 1, group["workerTemplate"]
            case "RayService":
                first = 0
                for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
                    yield first, group["replicas"], group["template"]
                    first += group["replicas"]
            case _:
                pass


def claimed_gpus(objects: list[dict[str, Any]]) -> dict[str, int]:
    """Return the devices that each ResourceClaimTemplate asks for."""
    claims: dict[str, int] = {}
    for item in objects:
        if item["kind"] == "ResourceClaimTemplate":
            (request,) = item["spec"]["spec"]["devices"]["requests"]
            claims[item["metadata"]["name"]] = request["exactly"]["count"]
    return claims


def pod_gpus(plan: OwnPlan, pod: dict[str, Any], claims: dict[str, int]) -> int:
    """Return the GPUs that a pod asks for, by a limit or a claim.

    Raises:
        ManifestMismatchError: Requests and limits differ, or there is more than one resource.
    """
    (container,) = pod["spec"]["containers"]
    limits = container["resources"].get("limits", {})
    requests = container["resources"]["requests"]
    counted = {key: value for key, value in requests.items() if "/" in key}
    expect("limits of what is counted", limits, counted)
    # The GPU comes first; what joins machines may follow.
    found = list(limits.values())[:1]
    own_claims = pod["spec"].get("resourceClaims", [])
    if own_claims:
        names = [{"name": claim["name"]} for claim in own_claims]
        expect("claims of the container", container["resources"]["claims"], names)
        found = [claims[claim["resourceClaimTemplateName"]] for claim in own_claims]
    expect("GPU resources of a container", len(found), 0 if is_cpu(plan) else 1)
    return found[0] if found else 0


def _check_launch(plan: OwnPlan, pod: dict[str, Any]) -> None:
    """The launcher's number of machines, and the environment."""
    (container,) = pod["spec"]["containers"]
    num_nodes = len(ranks_by_node(plan))
    words = " ".join(container["command"] + container["args"])
    nnodes = re.findall(r"--nnodes (\d+)", words)
    expect("launch --nnodes", nnodes, [str(num_nodes)] if num_nodes > 1 else [])
    _check_environment(plan, pod)


def _check_environment(plan: OwnPlan, pod: dict[str, Any]) -> None:
    """The plan's environment but for host interfaces."""
    (container,) = pod["spec"]["containers"]
    # As Kubernetes will set them: one dollar for two.
    given = {
        item["name"]: item["value"].replace("$$", "$")
        for item in container["env"]
        if "value" in item
    }
    for name, value in variables(plan).items():
        if name in HOST_INTERFACES and value != "lo":
            expect(name, given.get(name), None)
        else:
            expect(name, given.get(name), value)
