"""A RayService against its plan: what Ray may hand out on each machine, and what Serve is told."""

from typing import Any

import yaml

from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.checks.mismatch import ManifestMismatchError, expect, is_cpu

IMPORT_PATH = "rankwright.executor.backends.ray_serve:app"


def check_ray_service(plan: OwnPlan, service: dict[str, Any]) -> None:
    """Compare a RayService with `plan`, but for the GPUs of its pods.

    Raises:
        ManifestMismatchError: Ray would be told of other GPUs or CPUs than the pods have and the
            ranks need, or Serve of another plan.
    """
    cluster = service["spec"]["rayClusterConfig"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    (container,) = head["template"]["spec"]["containers"]
    expect("limits of the head", container["resources"].get("limits", {}), {})
    for what in ("num-cpus", "num-gpus"):
        expect(f"{what} of the head", head["rayStartParams"][what], "0")
    counted: list[tuple[int, int]] = []
    for group in workers:
        sizes = {key: group[key] for key in ("minReplicas", "maxReplicas")}
        expect("workers", sizes, dict.fromkeys(sizes, group["replicas"]))
        params = group["rayStartParams"]
        counted += [(int(params["num-gpus"]), int(params["num-cpus"]))] * group["replicas"]
    expect("GPUs and CPUs that Ray hands out", sorted(counted), sorted(_needed(plan)))
    ports = {
        port["containerPort"]
        for spec in (head, *workers)
        for port in spec["template"]["spec"]["containers"][0]["ports"]
        if port["name"] == "serve"
    }
    _check_application(service["spec"]["serveConfigV2"], ports)
    for spec in (head, *workers):
        _check_plan_file(spec["template"]["spec"])


def _needed(plan: OwnPlan) -> list[tuple[int, int]]:
    """GPUs and CPUs of each machine's ranks, with one CPU for the front end, wherever it is."""
    needed: list[tuple[int, int]] = []
    for node in {rank.node for rank in plan.ranks}:
        machine, count = plan.cluster.node(node), len(plan.ranks_of_node(node))
        each = max(1, machine.num_cpus // len(machine.gpus)) if is_cpu(plan) else 1
        needed.append((0 if is_cpu(plan) else count, count * each + 1))
    return needed


def _check_application(text: str, ports: set[int]) -> None:
    config = yaml.safe_load(text)
    expect("ports of HTTP", ports, {config["http_options"]["port"]})
    (application,) = config["applications"]
    expect("import_path", application["import_path"], IMPORT_PATH)
    expect("route_prefix", application["route_prefix"], "/")
    # Else the bounds on requests would not be those that follow from the plan.
    expect("deployments", application.get("deployments", []), [])
    expect("plan of the application", application["args"]["plan"], "/etc/rankwright/plan.json")


def _check_plan_file(pod: dict[str, Any]) -> None:
    """The plan is where the application looks for it, in every pod."""
    (container,) = pod["containers"]
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    if "configMap" not in volumes.get(places.get("/etc/rankwright", ""), {}):
        raise ManifestMismatchError("a pod of Ray has no plan in /etc/rankwright")
