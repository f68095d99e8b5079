"""`launch --backend ray` on a real Ray cluster of two nodes on this machine.

The first test runs the real worker; the others run ranks that speak the protocol but have no model.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.executor.conftest import Reference
from tests.executor.launched import WORKER, Launched, complete, launched
from tests.executor.plans import cpu_plan, two_nodes
from tests.executor.ranks_on_ray import pids_of_ranks
from tests.executor.test_launch import SPEC, parent_of
from tests.executor.tiny_tokenizer import write_tokenizer

from rankwright.cli import main
from rankwright.cost_model.read_model import read_model
from rankwright.executor.backends.ray_cluster import RayNode, make_bundles
from rankwright.executor.tokenizer import HubTokenizer
from rankwright.planner.plan import Plan

pytest.importorskip("ray", reason="needs rankwright[ray]")
pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def launched_on_ray(folder: Path, plan: Plan, address: str, **extra: Any) -> Iterator[Launched]:
    with launched(folder, plan, backend="ray", ray_address=address, **extra) as it:
        yield it
    end = time.monotonic() + 20
    while pids_of_ranks():
        assert time.monotonic() < end, "ranks are left"
        time.sleep(0.1)


def test_a_model_is_served_over_two_ray_nodes_until_a_rank_is_killed(
    references: dict[str, Reference], ray_address: str, tmp_path: Path
) -> None:
    reference = references["llama"]
    folder = write_tokenizer(reference.folder)
    plan = two_nodes(cpu_plan(read_model(folder), pp=2))
    with launched_on_ray(tmp_path, plan, ray_address, model_path=str(folder)) as it:
        it.wait_for(lambda: "ready in" in it.text, within_s=150)
        prompt = [5, 17, 42, 99, 7]
        answer = complete(it.url(), prompt=prompt, max_tokens=12, temperature=0, ignore_eos=True)
        expected = HubTokenizer(folder).decode(reference.greedy(prompt, 12))
        assert answer["choices"][0]["text"] == expected
        os.kill(pids_of_ranks()[1], signal.SIGKILL)
        assert it.exit_code() == 5
    message = it.lines[-1]
    assert "rank 1 (stage 1, tp rank 0, CPU rank 0 of node 1 'here') failed" in message
    assert "killed by SIGKILL" in message
    assert "(Ray node " in message


def lines_of(url: str, metric: str) -> str:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return "\n".join(line for line in lines if line.startswith(metric))


def test_ranks_see_the_gpus_of_their_node_and_a_signal_drains(
    ray_address: str, tmp_path: Path
) -> None:
    # Ray hands out the 2 x 2 GPUs; the device is `cpu` since there is no driver to ask.
    plan = two_nodes(cpu_plan(SPEC, dp=4, device="h100-sxm"))
    options: dict[str, Any] = {"load_format": "dummy", "worker": WORKER, "device": "cpu"}
    slow = {"TEST_STEP_S": "0.05", "TORCH_SETTING_OF_THE_SHELL": "1"}
    with launched_on_ray(tmp_path, plan, ray_address, environment=slow, **options) as it:
        it.wait_for(lambda: "ready in" in it.text, within_s=180)
        for rank in range(4):
            # Not the one GPU of its actor: all that the plan counts.
            (log,) = tmp_path.glob(f"rankwright-*/rank-{rank}.log")
            it.wait_for(partial(contains, log, "CUDA_VISIBLE_DEVICES=None"))
        for pid in pids_of_ranks().values():
            assert b"TORCH_SETTING_OF_THE_SHELL=1" in Path(f"/proc/{pid}/environ").read_bytes()
        url = it.url()
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        answers: list[dict[str, Any]] = []
        job = threading.Thread(
            target=lambda: answers.append(complete(url, prompt="ab", max_tokens=160))
        )
        job.start()
        it.wait_for(lambda: "} 1.0" in lines_of(url, "rankwright_requests_running"))
        it.process.send_signal(signal.SIGTERM)
        job.join(60)
        assert answers[0]["choices"][0]["text"] == "ab" * 80
        assert it.exit_code() == 0
    assert list(tmp_path.glob("rankwright-*")) == []


def test_an_actor_that_dies_takes_its_rank_along_and_is_named(
    ray_address: str, tmp_path: Path
) -> None:
    plan = two_nodes(cpu_plan(SPEC, dp=2))
    options: dict[str, Any] = {"load_format": "dummy", "worker": WORKER}
    with launched_on_ray(tmp_path, plan, ray_address, **options) as it:
        it.wait_for(lambda: "ready in" in it.text, within_s=180)
        os.kill(parent_of(pids_of_ranks()[1]), signal.SIGKILL)
        assert it.exit_code() == 5
    assert "rank 1 (replica 1, stage 0" in it.lines[-1]
    assert "of node 1 'here') failed: its actor is gone" in it.lines[-1]


def test_a_launch_that_is_killed_takes_its_ranks_along(ray_address: str, tmp_path: Path) -> None:
    plan = two_nodes(cpu_plan(SPEC, dp=2))
    options: dict[str, Any] = {"load_format": "dummy", "worker": WORKER}
    with launched_on_ray(tmp_path, plan, ray_address, **options) as it:
        it.wait_for(lambda: "ready in" in it.text, within_s=180)
        assert pids_of_ranks().keys() >= {0, 1}
        it.process.kill()
        assert it.exit_code() == -signal.SIGKILL


def test_a_cluster_that_is_smaller_than_the_plan_is_refused_with_both_counts(
    ray_address: str, tmp_path: Path
) -> None:
    plan = two_nodes(cpu_plan(SPEC, dp=6))
    options: dict[str, Any] = {"load_format": "dummy", "worker": WORKER}
    with launched_on_ray(tmp_path, plan, ray_address, **options) as it:
        assert it.exit_code() == 2
    assert "the plan asks for 2 nodes x 3 CPUs" in it.text
    assert "the Ray cluster has 2 nodes x 2 GPUs and 2 CPUs" in it.text


def contains(path: Path, text: str) -> bool:
    return text in path.read_text()


def nodes(*hosts: str, gpus: float = 8, cpus: float = 16) -> list[RayNode]:
    return [RayNode(f"id-{host}", f"10.0.0.{i}", host, gpus, cpus) for i, host in enumerate(hosts)]


def test_machines_that_ray_knows_by_name_are_bound_to_their_nodes() -> None:
    plan = named(two_nodes(cpu_plan(SPEC, dp=4, device="h100-sxm")), "b", "10.0.0.0")
    bound = make_bundles(plan, nodes("a", "b"))
    assert [bundle.node_id for bundle in bound] == ["id-b", "id-a"]
    assert [bundle.resources for bundle in bound] == [{"CPU": 2, "GPU": 2}] * 2
    free = make_bundles(plan, nodes("c", "b"))
    assert [bundle.node_id for bundle in free] == ["id-b", "id-c"]  # c has the address 10.0.0.0
    assert [bundle.node_id for bundle in make_bundles(plan, nodes("x", "y"))] == [None, None]


def named(plan: Plan, *names: str) -> Plan:
    """The same plan on machines called `names`."""
    (node,) = plan.cluster.nodes
    machines = tuple(node.model_copy(update={"name": name, "count": 1}) for name in names)
    cluster = plan.cluster.model_copy(update={"nodes": machines})
    fields = {"cluster": cluster, "cluster_fingerprint": cluster.fingerprint}
    return plan.model_copy(update=fields)


def test_gpus_and_nodes_are_counted() -> None:
    plan = two_nodes(cpu_plan(SPEC, dp=4, device="h100-sxm"))
    with pytest.raises(ValueError, match=r"2 nodes x 2 GPUs .* has 2 nodes x 1 GPUs"):
        make_bundles(plan, nodes("a", "b", gpus=1))
    with pytest.raises(ValueError, match="has 1 node x 8 GPUs"):
        make_bundles(plan, nodes("a"))


def test_of_a_remote_traceback_the_cause_is_told() -> None:
    from rankwright.executor.backends.ray_ranks import explain

    text = "The actor died\n  File x\nModuleNotFoundError: No module named 'rankwright'\n"
    assert explain(RuntimeError(text)) == "ModuleNotFoundError: No module named 'rankwright'"
    assert explain(RuntimeError("The node is gone\nmore of it")) == "The node is gone"
    assert explain(RuntimeError()) == "RuntimeError"


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(two_nodes(cpu_plan(SPEC, pp=2)).model_dump_json())
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["launch", str(path), "--load-format", "dummy"]) == 4  # Ray by default
    assert "pip install 'rankwright[executor,ray]'" in capsys.readouterr().err


def test_a_ray_client_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(two_nodes(cpu_plan(SPEC, pp=2)).model_dump_json())
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", object())  # it is not asked
    assert main(["launch", str(path), "--load-format", "dummy"]) == 2
    assert "must run on a node of the cluster itself" in capsys.readouterr().err


def test_an_address_where_no_ray_is_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(two_nodes(cpu_plan(SPEC, pp=2)).model_dump_json())
    monkeypatch.setitem(sys.modules, "ray", object())  # it is not asked
    arguments = ["launch", str(path), "--load-format", "dummy", "--ray-address"]
    assert main([*arguments, "127.0.0.1:1"]) == 4
    assert "there is no Ray at 127.0.0.1:1" in capsys.readouterr().err
    assert main([*arguments, "head"]) == 2
    assert "is not HOST:PORT" in capsys.readouterr().err
