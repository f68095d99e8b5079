"""What the states of pods mean to someone who waits for a server."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rankwright.executor.launch_state import Phase


def explain_pods(pods: Sequence[Mapping[str, Any]], num_pods: int) -> tuple[Phase, str]:
    """Return the phase of a launch of `num_pods` pods, and more of it in a few words.

    Args:
        pods: Those there are, as the API shows them.
        num_pods: Those that the plan wants.
    """
    if len(pods) < num_pods:
        return "starting", f"{len(pods)} of {num_pods} pods exist"
    for explain in (_failed, _stuck, _unscheduled):
        for pod in pods:
            found = explain(pod)
            if found is not None:
                phase, detail = found
                return phase, f"{pod['metadata']['name']}: {detail}"
    num_ready = sum(_condition(pod, "Ready").get("status") == "True" for pod in pods)
    if num_ready >= num_pods:
        return "ready", ""
    num_running = sum(_runs(pod) for pod in pods)
    if num_running < num_pods:
        return "starting", f"{num_running} of {num_pods} pods run"
    return "loading", f"{num_ready} of {num_pods} pods are ready"


def explain_ray_service(service: Mapping[str, Any], phase: Phase, detail: str) -> tuple[Phase, str]:
    """Return what a RayService says, where its pods alone are in `phase`, for `detail`.

    Its pods do not say whether it serves: of the workers, only the one with the front end is ready.
    """
    if phase not in ("loading", "ready"):
        return phase, detail
    status = service.get("status", {})
    parts = [status.get(part, {}) for part in ("activeServiceStatus", "pendingServiceStatus")]
    for part in parts:
        for application in part.get("applicationStatuses", {}).values():
            state, message = application.get("status", ""), application.get("message", "")
            if state == "DEPLOY_FAILED":
                return "failed", _short(_raised(message))
            if state != "RUNNING":
                return "loading", _short(f"Ray Serve: {state} {_raised(message)}".strip())
    if _condition(service, "Ready").get("status") == "True":
        return "ready", ""
    return "loading", "waiting for Ray and its Serve application"


def _raised(message: str) -> str:
    """Return what was raised at the end of the remote traceback in `message`, if there is one."""
    lines = [line.strip() for line in message.splitlines()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b: .", line)]
    return raised[-1] if raised else message


def _failed(pod: Mapping[str, Any]) -> tuple[Phase, str] | None:
    status = pod.get("status", {})
    if status.get("phase") != "Failed":
        return None
    return "failed", _short(status.get("message") or _last_end(pod) or "failed")


def _stuck(pod: Mapping[str, Any]) -> tuple[Phase, str] | None:
    """A container that waits for something that does not come by itself, mostly an image."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting", {})
        reason = waiting.get("reason", "")
        if reason == "CrashLoopBackOff":
            return "starting", f"started {container.get('restartCount', 0)} times, {_last_end(pod)}"
        if reason not in ("", "ContainerCreating", "PodInitializing"):
            return "starting", _short(f"{reason}: {waiting.get('message', '')}")
    return None


def _unscheduled(pod: Mapping[str, Any]) -> tuple[Phase, str] | None:
    condition = _condition(pod, "PodScheduled")
    if condition.get("status") != "False":
        return None
    return "queued", _short(condition.get("message") or condition.get("reason", ""))


def _runs(pod: Mapping[str, Any]) -> bool:
    containers = pod.get("status", {}).get("containerStatuses", [])
    return bool(containers) and all("running" in c.get("state", {}) for c in containers)


def _last_end(pod: Mapping[str, Any]) -> str:
    for container in pod.get("status", {}).get("containerStatuses", []):
        for state in (container.get("state", {}), container.get("lastState", {})):
            if "terminated" in state:
                ended = state["terminated"]
                return f"exit code {ended.get('exitCode')} ({ended.get('reason', 'no reason')})"
    return ""


def _condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    conditions: Sequence[Mapping[str, Any]] = pod.get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == kind), {})


def _short(text: str) -> str:
    """Return `text` in one line that fits most screens; the scheduler explains at length."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:197]}..."
