"""The application that a rendered RayService names, deployed by Ray Serve on two Ray nodes."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tests.executor.conftest import Reference
from tests.executor.launched import complete
from tests.executor.plans import cpu_plan, two_nodes
from tests.executor.ranks_on_ray import pids_of_ranks
from tests.executor.test_launch import SPEC
from tests.executor.tiny_tokenizer import write_tokenizer
from tests.ports import free_port

from rankwright.cli.errors import exit_code
from rankwright.cost_model.read_model import read_model
from rankwright.executor.backends.tools import MissingToolError
from rankwright.executor.tokenizer import HubTokenizer
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import write_plan
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.render import render

# What `ray[serve]` brings, and nothing else of ours.
pytest.importorskip("watchfiles", reason="needs rankwright[serve]")
pytestmark = pytest.mark.timeout(300)


def rendered_config(plan: Plan, folder: Path, port: int) -> Path:
    """The `serveConfigV2` of the plan's RayService, with the plan where this machine has it."""
    files = render(plan, "kubernetes", folder, flavor="rayservice", port=port)
    (service,) = [
        item for item in read_objects(files["rankwright.yaml"]) if item["kind"] == "RayService"
    ]
    text = service["spec"]["serveConfigV2"]
    path = folder / "serve.yaml"
    path.write_text(text.replace("/etc/rankwright", str(folder)))
    return path


@contextlib.contextmanager
def served(config: Path, address: str) -> Iterator[list[str]]:
    """Deploy `config` and end all of Serve with the block; yields what Serve has said so far."""
    # Ctrl-C ends it, also where the shell that started the tests has set it to be ignored.
    run = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from ray.serve.scripts import cli; cli()"
    )
    command = [sys.executable, "-c", run, "run", str(config), "--address", address]
    # Replicas are Python processes that must find what this one finds.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or []))
        reader.start()
        try:
            yield lines
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            finally:
                reader.join(10)


def test_the_rendered_application_serves_a_model_over_two_ray_nodes(
    references: dict[str, Reference], ray_address: str, tmp_path: Path
) -> None:
    reference = references["llama"]
    folder = write_tokenizer(reference.folder)
    plan = two_nodes(cpu_plan(read_model(folder), pp=2))
    port = free_port()
    config = rendered_config(plan, tmp_path, port)
    url = f"http://127.0.0.1:{port}"
    with served(config, ray_address) as said:
        wait_until_ok(url, said)
        prompt = [5, 17, 42, 99, 7]
        answer = complete(url, prompt=prompt, max_tokens=12, temperature=0, ignore_eos=True)
        expected = HubTokenizer(folder).decode(reference.greedy(prompt, 12))
        assert answer["choices"][0]["text"] == expected
        assert len(pids_of_ranks()) == 2
        assert "rankwright_requests_total" in httpx.get(f"{url}/metrics").text
        os.kill(pids_of_ranks()[1], signal.SIGKILL)
        wait_for(lambda: httpx.get(f"{url}/health").json() == {"status": "failed"}, said)
    wait_for(lambda: not pids_of_ranks(), said)


def wait_until_ok(url: str, said: list[str]) -> None:
    def is_ok() -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    wait_for(is_ok, said)


def wait_for(what: Callable[[], bool], said: list[str]) -> None:
    deadline_s = time.monotonic() + 180
    while not what():
        assert time.monotonic() < deadline_s, "".join(said)
        time.sleep(0.2)


def test_requests_are_bounded_by_the_plan_and_no_gpu_is_asked_for_twice(tmp_path: Path) -> None:
    from rankwright.executor.backends.ray_serve import Settings, app

    plan = two_nodes(cpu_plan(SPEC, dp=2, max_num_seqs=8))
    write_plan(plan, tmp_path / "plan.json")
    made = app(Settings(plan=tmp_path / "plan.json", drain_s=7))
    deployment = made._bound_deployment
    assert deployment.num_replicas == 1
    assert deployment.max_ongoing_requests == 2 * 16
    assert deployment.max_queued_requests == 2 * 16
    assert deployment.ray_actor_options == {"num_cpus": 1}
    assert deployment._deployment_config.graceful_shutdown_timeout_s > 7
    with pytest.raises(ValueError, match="cannot be read"):
        app(Settings(plan=tmp_path / "none.json"))
    with pytest.raises(ValueError, match="modle_path"):
        Settings.model_validate({"plan": "plan.json", "modle_path": "/m"})


def test_without_ray_serve_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "rankwright.executor.backends.ray_serve"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delattr(sys.modules["ray"], "serve", raising=False)
    with pytest.raises(MissingToolError, match=r"pip install 'rankwright\[executor,serve\]'") as it:
        importlib.import_module(name)
    assert exit_code(it.value) == 4
