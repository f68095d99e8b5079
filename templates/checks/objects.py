"""Kubernetes objects against their plan."""

import re
from typing import Any

import yaml

from rankwright.planner.plan import Plan
from rankwright.templates.checks.mismatch import (
    ManifestMismatchError,
    expect,
    expect_plan,
    is_cpu,
    ranks_by_node,
)

# libyaml's reader takes the same YAML and is ten times as fast, where PyYAML was built with it.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML file.

    Raises:
        ManifestMismatchError: A mapping has a key twice, of which readers silently keep one.
    """
    for node in yaml.compose_all(text, _LOADER):
        _refuse_double_keys(node)
    return list(yaml.load_all(text, _LOADER))


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


def check_objects(plan: Plan, text: str) -> None:
    """Compare objects with their plan.

    Raises:
        ManifestMismatchError: They ask for other pods or GPUs, or carry another plan.
    """
    objects = read_objects(text)
    ranks = ranks_by_node(plan)
    gpus_by_pod: dict[int, int] = {}
    for workload in objects:
        if workload["kind"] not in ("Deployment", "StatefulSet"):
            continue
        spec = workload["spec"]
        start = spec.get("ordinals", {}).get("start", 0)
        (container,) = spec["template"]["spec"]["containers"]
        resources = container["resources"]
        gpus = [v for k, v in resources.get("limits", {}).items() if k.endswith("/gpu") or "/" in k]
        expect("GPU resources of a container", len(gpus), 0 if is_cpu(plan) else 1)
        for ordinal in range(start, start + spec["replicas"]):
            expect(f"pods numbered {ordinal}", ordinal in gpus_by_pod, False)
            gpus_by_pod[ordinal] = gpus[0] if gpus else 0
        words = " ".join(container["command"] + container["args"])
        nnodes = re.findall(r"--nnodes (\d+)", words)
        expect("launch --nnodes", nnodes, [str(len(ranks))] if len(ranks) > 1 else [])
    pods = [gpus_by_pod[ordinal] for ordinal in sorted(gpus_by_pod)]
    expect("pods", sorted(gpus_by_pod), list(range(len(ranks))))
    expect("GPUs by pod", pods, [0] * len(ranks) if is_cpu(plan) else ranks)
    (config,) = [item for item in objects if item["kind"] == "ConfigMap"]
    expect_plan(plan, config["data"]["plan.json"])
