"""Kubernetes objects of separate pools against the plan: each pool, and the router's list of it."""

from functools import partial
from typing import Any

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.plan import Plan
from rankwright.templates.checks.engine_objects import check_read_objects
from rankwright.templates.checks.mismatch import ManifestMismatchError, expect
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.checks.pools_parts import (
    check_pool_config,
    check_router_config,
    check_transfer_flags,
)

_INSTANCE = "app.kubernetes.io/instance"
_BOOTSTRAP = "8998"  # where SGLang's prefill workers listen that are told no other port
Objects = list[dict[str, Any]]


def check_pools_objects(plan: DisaggregatedPlan, target: str, text: str) -> None:
    """Compare the objects of both pools and of the router with `plan`.

    Raises:
        ManifestMismatchError: They say something else.
    """
    parts: dict[str, Objects] = {}
    for item in read_objects(text):
        parts.setdefault(item["metadata"]["labels"][_INSTANCE], []).append(item)
    (name,) = [key for key in parts if f"{key}-prefill" in parts] or [""]
    expect("instances", set(parts), {name, f"{name}-prefill", f"{name}-decode"})
    hosts: dict[str, list[str]] = {}
    for role, pool in plan.pools.items():
        own = parts[f"{name}-{role}"]
        check_read_objects(
            pool,
            target,
            own,
            check_config=partial(_check_config, role),
            take_flags=partial(check_transfer_flags, target, role),
        )
        hosts[role] = _hosts(own)
        other = "decode" if role == "prefill" else "prefill"
        _check_reached(own, f"{name}-{other}")
        _check_addresses(own, target)
    _check_router(plan, target, parts[name], hosts)


def _check_config(role: str, plan: Plan, text: str) -> None:
    check_pool_config(plan, role, text)


def _of(objects: Objects, kind: str) -> Objects:
    return [item for item in objects if item["kind"] == kind]


def _hosts(objects: Objects) -> list[str]:
    """Return the name of the first pod of every worker, which a headless Service must give."""
    services = {
        item["metadata"]["name"]
        for item in _of(objects, "Service")
        if item["spec"].get("clusterIP") == "None"
    }
    found: dict[int, str] = {}
    for item in _of(objects, "StatefulSet"):
        spec = item["spec"]
        if spec["ordinals"]["start"] == 0:
            expect("service of the names", {spec["serviceName"]} <= services, True)
            number = int(spec["selector"]["matchLabels"]["replica"])
            found[number] = f"{item['metadata']['name']}-0.{spec['serviceName']}"
    return [found[number] for number in sorted(found)]


def _check_reached(objects: Objects, other: str) -> None:
    """Pods of the other pool may talk to these on every port."""
    (policy,) = _of(objects, "NetworkPolicy")
    allowed = [
        peer["podSelector"]["matchLabels"].get(_INSTANCE)
        for rule in policy["spec"]["ingress"]
        if "ports" not in rule
        for peer in rule["from"]
    ]
    expect("the other pool is let in", other in allowed, True)


def _check_addresses(objects: Objects, target: str) -> None:
    """A worker of vLLM tells the other pool its pod's address."""
    for item in _of(objects, "StatefulSet"):
        (container,) = item["spec"]["template"]["spec"]["containers"]
        paths = {
            entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
            for entry in container["env"]
            if "fieldRef" in entry.get("valueFrom", {})
        }
        wanted = "status.podIP" if target == "vllm" else None
        expect("side channel", paths.get("VLLM_NIXL_SIDE_CHANNEL_HOST"), wanted)


def _check_router(
    plan: DisaggregatedPlan, target: str, objects: Objects, hosts: dict[str, list[str]]
) -> None:
    (router,), (service,) = _of(objects, "Deployment"), _of(objects, "Service")
    template = router["spec"]["template"]
    selector = service["spec"]["selector"]
    expect(
        "router of the Service", selector.items() <= template["metadata"]["labels"].items(), True
    )
    (container,) = template["spec"]["containers"]
    (port,) = [entry["containerPort"] for entry in container["ports"]]
    expect("port of the Service", service["spec"]["ports"][0]["port"], port)
    words: list[str] = container["args"]
    if target == "trtllm":
        (config,) = _of(objects, "ConfigMap")
        urls = {role: [f"{host}:{port}" for host in found] for role, found in hosts.items()}
        check_router_config(plan, config["data"]["disagg_config.yaml"], urls, port)
        mounted = template["spec"]["volumes"][-1]["configMap"]["name"]
        expect("configuration of the router", mounted, config["metadata"]["name"])
        return
    for role, found in hosts.items():
        given = [words[i + 1] for i, word in enumerate(words) if word == f"--{role}"]
        expect(f"{role} workers of the router", given, [f"http://{host}:{port}" for host in found])
        if target == "sglang" and role == "prefill":
            sides = {words[i + 2] for i, word in enumerate(words) if word == "--prefill"}
            expect("bootstrap ports", sides, {_BOOTSTRAP})
    if str(port) not in words:
        raise ManifestMismatchError(f"the router is not told its port, {port}")
