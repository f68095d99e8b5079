"""A launch as Kubernetes objects: the rendered file is applied, its pods watched, and deleted.

Everything goes through `kubectl`, with its context, its credentials and its proxy. How the pods do
is asked by label, so that every flavor of the manifest is followed alike.
"""

import json
import secrets
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwright.executor.backends.pods import explain_pods, explain_ray_service
from rankwright.executor.backends.tools import ToolError, check_tool, require, run_tool
from rankwright.executor.launch_record import KubernetesPlace, LaunchRecord, make_record
from rankwright.executor.launch_state import LaunchState, ServerState, phase_of, read_server
from rankwright.executor.log_tail import LogTail
from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.kubernetes_flavors import FLAVORS
from rankwright.templates.kubernetes_objects import KUBERNETES_FILE
from rankwright.templates.kubernetes_options import KubernetesOptions
from rankwright.templates.options import default_name, parse_options
from rankwright.templates.render import render

INSTALL = (
    "install it as https://kubernetes.io/docs/tasks/tools says, and give it a context of the "
    "cluster (KUBECONFIG)"
)
_OWNER = "rankwright"
# `kubectl logs --follow` ends when a container does; then it is started again, but not at once.
_LOG_RESTART_S = 5.0


def submit(plan: OwnPlan, folder: Path, settings: Mapping[str, object]) -> "KubernetesLaunch":
    """Render `plan` into `folder` and apply it.

    Args:
        plan: What to run.
        folder: Of the launch; made if missing.
        settings: Options of the target (`templates/kubernetes_options.py`).

    Raises:
        MissingToolError: There is no `kubectl`.
        ValueError: An option is not valid, or objects of this name exist.
        ToolError: Kubernetes refused; what was made is deleted again.
    """
    require("kubectl", INSTALL)
    options = parse_options(KubernetesOptions, "kubernetes", dict(settings))
    folder = folder.resolve()
    render(plan, "kubernetes", folder, **settings)
    asked = run_tool(["kubectl", "config", "current-context"])
    context = asked.stdout.strip() if asked.returncode == 0 else None  # none inside a pod
    name = options.name or default_name(plan)
    on_ray = options.flavor in FLAVORS and FLAVORS[options.flavor].on_ray
    place = KubernetesPlace(
        name=name,
        namespace=options.namespace or _namespace(context),
        context=context,
        manifest=folder / KUBERNETES_FILE,
        port=options.port,
        num_pods=len(plan.nodes_used()) + on_ray,
        on_ray=on_ray,
        made_key=False,
    )
    kubectl = _kubectl(place)
    if check_tool(
        [*kubectl, "get", "service", name, "--ignore-not-found", "--output=name"]
    ).strip():
        raise ValueError(
            f"there is a service {name!r} in namespace {place.namespace!r} already; choose another "
            "name with --set name=NAME, or delete what runs"
        )
    if place.num_pods > 1 and not on_ray:
        place = place.model_copy(update={"made_key": _make_key(kubectl, name)})
    launch = KubernetesLaunch(make_record(plan, "kubernetes", place))
    try:
        # On the server: on the client each object is copied into an annotation of itself, which
        # must be below 256 KiB, and plans of some thousand ranks are not.
        how = ["--server-side", f"--field-manager={_OWNER}"]
        check_tool([*kubectl, "apply", *how, f"--filename={place.manifest}"])
    except ToolError:
        launch.stop(drain=False)
        raise
    return launch


@dataclass
class KubernetesLaunch:
    """Objects that were applied."""

    record: LaunchRecord
    _stream: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    _stream_ended_s: float = field(default=0.0, init=False)
    _runs: bool = field(default=False, init=False)  # some container has output
    _logs: LogTail = field(init=False)

    def __post_init__(self) -> None:
        """Find the log."""
        self._logs = LogTail(lambda: [self._log_file] if self._log_file.exists() else [])

    @property
    def _place(self) -> KubernetesPlace:
        assert isinstance(self.record.place, KubernetesPlace)
        return self.record.place

    def look(self) -> LaunchState:
        """Return how the pods do.

        Raises:
            ToolError: Kubernetes does not answer.
        """
        place = self._place
        selector = f"app.kubernetes.io/name={_OWNER},app.kubernetes.io/instance={place.name}"
        kinds = "pods,services" + (",rayservices.ray.io" if place.on_ray else "")
        command = [*_kubectl(place), "get", kinds, f"--selector={selector}"]
        found: list[dict[str, Any]] = json.loads(check_tool([*command, "--output=json"]))["items"]
        pods = [item for item in found if item["kind"] == "Pod"]
        services = [item for item in found if item["kind"] == "Service"]
        service = next((s for s in services if s["metadata"]["name"] == place.name), None)
        if service is None:
            gone = f"{len(pods)} pods are ending" if pods else ""
            return LaunchState("stopping" if pods else "ended", gone)
        url = service_url(service, place)
        phase, detail = explain_pods(pods, place.num_pods)
        for item in found:
            if item["kind"] == "RayService":
                phase, detail = explain_ray_service(item, phase, detail)
        self._runs = phase in ("loading", "ready")
        if phase != "ready":
            return LaunchState(phase, detail, url)
        server = self._ask_server()
        hint = (
            f"kubectl port-forward --namespace {place.namespace} service/{place.name} {place.port}"
        )
        if server is None or server.status == "ok":
            return LaunchState("ready", f"from outside: `{hint}`", url, server)
        return LaunchState(phase_of(server), server.status, url, server)

    def log_lines(self) -> list[str]:
        """Return what the pods have printed since the last call; it is kept beside the manifest."""
        if self._stream is not None and self._stream.poll() is not None:
            self._stream, self._stream_ended_s = None, time.time()
        rested = time.time() - self._stream_ended_s > _LOG_RESTART_S
        if self._stream is None and self._runs and rested:
            self._follow_logs()
        return self._logs.lines()

    def stop(self, *, drain: bool) -> None:
        """Delete the objects; a pod gets time for its requests unless `drain` is false.

        Raises:
            ToolError: Kubernetes refused.
        """
        place, kubectl = self._place, _kubectl(self._place)
        gently = ["--wait=false", "--ignore-not-found"]
        check_tool([*kubectl, "delete", f"--filename={place.manifest}", *gently])
        if place.made_key:
            check_tool([*kubectl, "delete", "secret", f"{place.name}-key", *gently])
        if not drain:
            selector = f"--selector=app.kubernetes.io/instance={place.name}"
            check_tool([*kubectl, "delete", "pods", selector, "--grace-period=1", *gently])

    def close(self) -> None:
        """Stop to follow the logs."""
        if self._stream is not None:
            self._stream.terminate()
            self._stream.wait()
            self._stream, self._stream_ended_s = None, time.time()

    @property
    def _log_file(self) -> Path:
        return self._place.manifest.with_name("pods.log")

    def _follow_logs(self) -> None:
        place = self._place
        since = (
            f"--since-time={_rfc3339(self._stream_ended_s)}"
            if self._stream_ended_s
            else "--tail=-1"
        )
        with self._log_file.open("ab") as log:
            self._stream = subprocess.Popen(
                [
                    *(*_kubectl(place), "logs", "--follow", "--prefix", "--ignore-errors", since),
                    f"--selector=app.kubernetes.io/instance={place.name}",
                    f"--max-log-requests={max(5, 2 * place.num_pods)}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _ask_server(self) -> ServerState | None:
        """Ask through the API server: the service's address is for pods alone."""
        place = self._place
        path = f"/api/v1/namespaces/{place.namespace}/services/{place.name}:http/proxy"

        def fetch(page: str) -> str:
            return check_tool([*_kubectl(place, None), "get", "--raw", path + page])

        try:
            return read_server(fetch)
        except ToolError:  # it is not allowed, or the server says 503
            return None


def service_url(service: Mapping[str, Any], place: KubernetesPlace) -> str:
    """Return the URL of a Service: of its load balancer if it has one, else inside the cluster."""
    ingress = service.get("status", {}).get("loadBalancer", {}).get("ingress") or [{}]
    host = ingress[0].get("ip") or ingress[0].get("hostname")
    return f"http://{host or f'{place.name}.{place.namespace}.svc'}:{place.port}"


def _kubectl(place: KubernetesPlace, namespace: str | None = "") -> list[str]:
    """Return the start of a command in the context and namespace of `place`."""
    context = [] if place.context is None else [f"--context={place.context}"]
    where = [] if namespace is None else [f"--namespace={place.namespace}"]
    return ["kubectl", *context, *where]


def _namespace(context: str | None) -> str:
    chosen = [] if context is None else [f"--context={context}"]
    path = "--output=jsonpath={.contexts[0].context.namespace}"
    done = run_tool(["kubectl", *chosen, "config", "view", "--minify", path])
    return done.stdout.strip() or "default"


def _exists(kubectl: list[str], kind: str, name: str) -> bool:
    how = ["--ignore-not-found", "--output=name"]
    return bool(check_tool([*kubectl, "get", kind, name, *how]).strip())


def _make_key(kubectl: list[str], name: str) -> bool:
    """Make the secret by which the machines know each other; return whether there was none.

    It goes through standard input: arguments are for all users of the machine to see.
    """
    if _exists(kubectl, "secret", f"{name}-key"):
        return False
    labels = {"app.kubernetes.io/name": _OWNER, "app.kubernetes.io/instance": name}
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"{name}-key", "labels": labels},
        "stringData": {"key": secrets.token_hex(32)},
    }
    check_tool([*kubectl, "create", "--filename=-"], stdin=json.dumps(secret))
    return True


def _rfc3339(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))
