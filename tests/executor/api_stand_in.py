"""A stand-in for a Kubernetes API server, for the real `kubectl` to talk to.

It is not one: it keeps what is applied in a dictionary, checks it against schemas alone, and runs
no controller, so that a test says itself which pods there are and how they do. What it has of the
real one is the protocol: discovery, OpenAPI documents as far as kubectl reads them, server-side
apply, lists by label, logs that are followed, the proxy to services, deletion.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from tests.templates.crd_schemas import problems

# (group and version, kind, plural) of what the tests need.
KINDS = (
    ("v1", "ConfigMap", "configmaps"),
    ("v1", "Pod", "pods"),
    ("v1", "Secret", "secrets"),
    ("v1", "Service", "services"),
    ("apps/v1", "Deployment", "deployments"),
    ("batch/v1", "Job", "jobs"),
    ("apps/v1", "StatefulSet", "statefulsets"),
    ("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
    ("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    ("jobset.x-k8s.io/v1alpha2", "JobSet", "jobsets"),
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets"),
    ("ray.io/v1", "RayService", "rayservices"),
)
Key = tuple[str, str]  # plural, name


class ApiServer:
    """`with ApiServer() as api:` answers kubectl at `api.url`."""

    def __init__(self) -> None:
        self.objects: dict[Key, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.pages = {"/health": '{"status": "ok"}', "/metrics": ""}  # of the service
        self.log_lines: dict[str, list[str]] = {}  # by pod
        self.refuse = ""  # the plural of what cannot be applied
        self.closing = threading.Event()
        api = self

        class Handler(_Handler):
            server_state = api

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))

    def __enter__(self) -> "ApiServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def names(self, plural: str) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == plural)

    def set_pod(self, name: str, labels: dict[str, str], **status: Any) -> None:
        """Make a pod, or say how it does."""
        self.objects["pods", name] = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "models", "labels": labels, "uid": name},
            "spec": {"containers": [{"name": "launcher", "image": "x"}]},
            "status": status,
        }


class _Handler(BaseHTTPRequestHandler):
    server_state: ApiServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        self.server_state.requests.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        parts = url.path.strip("/").split("/")
        if parts[0] == "openapi":
            self._answer(_openapi(parts))
        elif url.path in ("/api", "/apis") or len(parts) == (2 if parts[0] == "api" else 3):
            self._answer(_discovery(parts))
        elif parts[-2] == "namespaces":  # that there is one
            metadata = {"name": parts[-1]}
            self._answer({"kind": "Namespace", "apiVersion": "v1", "metadata": metadata})
        elif "proxy" in parts:
            page = self.server_state.pages["/" + url.path.partition("/proxy/")[2]]
            self._send(200 if page else 503, page.encode(), "text/plain")
        elif parts[-1] == "log":
            self._log(parts[-2], "follow" in query)
        else:
            plural, name = _place(parts)
            if name is None:
                self._answer(self._list(plural, query.get("labelSelector", "")))
            elif (plural, name) in self.server_state.objects:
                self._answer(self.server_state.objects[plural, name])
            else:
                self._missing(plural, name)

    def do_PATCH(self) -> None:
        plural, name = _place(urlsplit(self.path).path.strip("/").split("/"))
        found = yaml.safe_load(self._body())
        assert name == found["metadata"]["name"]
        if plural == self.server_state.refuse:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403}
            self._answer({**status, "reason": "Forbidden", "message": f"{plural}: no"}, 403)
            return
        if wrong := problems(found):
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 422}
            self._answer({**status, "reason": "Invalid", "message": "; ".join(wrong)}, 422)
            return
        self._answer(self._keep(plural, found), 201)

    def do_POST(self) -> None:
        plural, _ = _place(urlsplit(self.path).path.strip("/").split("/"))
        self._answer(self._keep(plural, json.loads(self._body())), 201)

    def do_DELETE(self) -> None:
        plural, name = _place(urlsplit(self.path).path.strip("/").split("/"))
        self._body()
        assert name is not None
        if self.server_state.objects.pop((plural, name), None) is None:
            self._missing(plural, name)
        else:
            self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _keep(self, plural: str, found: dict[str, Any]) -> dict[str, Any]:
        found["metadata"] |= {"uid": "1", "resourceVersion": "1", "namespace": "models"}
        self.server_state.objects[plural, found["metadata"]["name"]] = found
        return found

    def _list(self, plural: str, selector: str) -> dict[str, Any]:
        wanted = dict(pair.split("=") for pair in selector.split(",") if pair)
        items = [
            found
            for (kind, _), found in sorted(self.server_state.objects.items())
            if kind == plural and wanted.items() <= found["metadata"].get("labels", {}).items()
        ]
        kind = next(kind for _, kind, each in KINDS if each == plural)
        version = next(version for version, _, each in KINDS if each == plural)
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items}

    def _log(self, pod: str, follow: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        while True:
            for line in self.server_state.log_lines.get(pod, [])[sent:]:
                self.wfile.write(f"{line}\n".encode())
                sent += 1
            if not follow or self.server_state.closing.wait(0.05):
                self.close_connection = True
                return

    def _missing(self, plural: str, name: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}
        details = {"name": name, "kind": plural}
        message = f'{plural} "{name}" not found'
        self._answer({**status, "reason": "NotFound", "details": details, "message": message}, 404)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, value: object, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _place(parts: list[str]) -> tuple[str, str | None]:
    """Plural and name out of `api/v1/namespaces/N/PLURAL[/NAME]`, or with `apis/GROUP/VERSION`."""
    rest = parts[parts.index("namespaces") + 2 :]
    return rest[0], rest[1] if len(rest) > 1 else None


def _discovery(parts: list[str]) -> dict[str, Any]:
    if parts == ["api"]:
        return {"kind": "APIVersions", "versions": ["v1"]}
    if parts == ["apis"]:
        versions = sorted({version for version, _, _ in KINDS if "/" in version})
        groups = [
            {
                "name": version.split("/")[0],
                "versions": [{"groupVersion": version, "version": version.split("/")[1]}],
                "preferredVersion": {"groupVersion": version, "version": version.split("/")[1]},
            }
            for version in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    asked = "/".join(parts[1:])
    verbs = ["create", "delete", "get", "list", "patch", "watch"]
    resources = [
        {"name": plural, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}
        for version, kind, plural in KINDS
        if version == asked
    ]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": asked,
        "resources": resources,
    }


def _openapi(parts: list[str]) -> dict[str, Any]:
    """The documents in which kubectl looks whether the server checks fields itself."""
    if parts == ["openapi", "v3"]:
        versions = sorted({version for version, _, _ in KINDS})
        paths = ["api/v1" if version == "v1" else f"apis/{version}" for version in versions]
        return {"paths": {path: {"serverRelativeURL": f"/openapi/v3/{path}"} for path in paths}}
    asked = "/".join(parts[3:])
    found: dict[str, Any] = {}
    for version, kind, plural in KINDS:
        if version == asked:
            group, _, name = version.rpartition("/")
            patch = {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {},
                "x-kubernetes-group-version-kind": {"group": group, "version": name, "kind": kind},
            }
            found[f"/{'/'.join(parts[2:])}/namespaces/{{namespace}}/{plural}/{{name}}"] = {
                "patch": patch
            }
    return {"openapi": "3.0.0", "info": {"title": "x", "version": "1"}, "paths": found}
