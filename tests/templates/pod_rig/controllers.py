"""The pods that controllers make of rendered objects: names, labels and injected variables."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_INDEX = "batch.kubernetes.io/job-completion-index"
_GROUP = "leaderworkerset.sigs.k8s.io/worker-index"


@dataclass(frozen=True)
class PodSpec:
    """One pod as its controller made it."""

    name: str
    subdomain: str | None
    labels: dict[str, str]
    spec: dict[str, Any]


def pods_of(objects: list[dict[str, Any]]) -> list[PodSpec]:
    """Every pod of the workloads among `objects`, by number."""
    return [pod for item in objects for pod in _pods(item)]


def _pods(item: dict[str, Any]) -> Iterator[PodSpec]:
    name, spec = item["metadata"]["name"], item.get("spec", {})
    match item["kind"]:
        case "Deployment":
            yield _pod(f"{name}-0a1b2c-d3e4f", None, spec["template"])
        case "StatefulSet":
            first = spec["ordinals"]["start"]
            for number in range(first, first + spec["replicas"]):
                index = {"apps.kubernetes.io/pod-index": str(number)}
                yield _pod(f"{name}-{number}", spec["serviceName"], spec["template"], index)
        case "Job":
            for number in range(spec["completions"]):
                index = {_INDEX: str(number)}
                yield _pod(f"{name}-{number}", None, spec["template"], index)
        case "JobSet":
            (job,) = spec["replicatedJobs"]
            inner = job["template"]["spec"]
            for number in range(inner["completions"]):
                index = {_INDEX: str(number)}
                pod_name = f"{name}-{job['name']}-0-{number}"
                yield _pod(pod_name, name, inner["template"], index)
        case "LeaderWorkerSet":
            group = spec["leaderWorkerTemplate"]
            address = {"name": "LWS_LEADER_ADDRESS", "value": f"{name}-0.{name}.default"}
            for number in range(group["size"]):
                template = group["workerTemplate" if number else "leaderTemplate"]
                pod_name = f"{name}-0-{number}" if number else f"{name}-0"
                yield _pod(pod_name, name, template, {_GROUP: str(number)}, address)
        case _:
            return


def _pod(
    name: str,
    subdomain: str | None,
    template: dict[str, Any],
    labels: dict[str, str] | None = None,
    *injected: dict[str, Any],
) -> PodSpec:
    spec = copy.deepcopy(template["spec"])
    (container,) = spec["containers"]
    container["env"] = [*injected, *container["env"]]
    own = template["metadata"]["labels"] | (labels or {})
    return PodSpec(name, spec.get("subdomain", subdomain), own, spec)
