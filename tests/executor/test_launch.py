"""Launching: ranks under torchrun, signals, failures, and nothing left behind.

The ranks are real processes that speak the real protocol but have no model (protocol_worker.py);
test_launch_end_to_end.py does the same with the real worker.
"""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.executor.launched import WORKER, Launched, complete
from tests.executor.launched import launched as launched_for_real
from tests.executor.plans import cpu_plan, two_nodes
from tests.ports import free_port

from rankwright.cost_model.read_model import read_model
from rankwright.executor.preflight import check_machine, find_model, listen, make_options
from rankwright.planner.plan import Plan

pytestmark = pytest.mark.timeout(240)

SPEC = read_model(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
)


@contextlib.contextmanager
def launched(folder: Path, plan: Plan, **extra: Any) -> Iterator[Launched]:
    """Launch `plan` on ranks that have no model."""
    with launched_for_real(folder, plan, load_format="dummy", worker=WORKER, **extra) as it:
        yield it


def test_a_signal_drains_running_requests_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plan = cpu_plan(SPEC, tp=2, dp=2)
    # The request takes 8 s, within which it has to be seen running and draining.
    with launched(tmp_path, plan, environment={"TEST_STEP_S": "0.05"}) as it:
        url = it.url()
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert len(it.processes()) == 5  # torchrun and four ranks
        answers: list[dict[str, Any]] = []
        job = threading.Thread(
            target=lambda: answers.append(complete(url, prompt="ab", max_tokens=160))
        )
        job.start()
        running = 'rankwright_requests_running{replica="0"} 1.0'
        it.wait_for(lambda: running in httpx.get(f"{url}/metrics").text)
        it.process.send_signal(signal.SIGINT)
        it.wait_for(lambda: httpx.get(f"{url}/health").json()["status"] == "draining")
        assert complete(url, prompt="x")["error"]["code"] == "draining"
        job.join(60)
        assert answers[0]["choices"][0]["text"] == "ab" * 80
        assert it.exit_code() == 0
        assert "1 requests are running" in it.text
        assert it.processes() == []
        assert list(tmp_path.glob("rankwright-*")) == []


def test_a_second_signal_ends_running_requests_at_once(tmp_path: Path) -> None:
    slow = {"TEST_STEP_S": "0.1"}
    with launched(tmp_path, cpu_plan(SPEC), drain_s=1000, environment=slow) as it:
        url = it.url()
        answers: list[dict[str, Any]] = []
        job = threading.Thread(
            target=lambda: answers.append(complete(url, prompt="ab", max_tokens=250))
        )
        job.start()
        running = 'rankwright_requests_running{replica="0"} 1.0'
        it.wait_for(lambda: running in httpx.get(f"{url}/metrics").text)
        it.process.send_signal(signal.SIGTERM)
        it.wait_for(lambda: "requests are running" in it.text)
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
        job.join(10)
        assert "the server has stopped" in answers[0]["error"]["message"]
        assert it.processes() == []


def test_a_signal_to_every_process_at_once_drains_too(tmp_path: Path) -> None:
    # Slurm and systemd send it so.
    with launched(tmp_path, cpu_plan(SPEC, pp=2), environment={"TEST_STEP_S": "0.05"}) as it:
        url = it.url()
        answers: list[dict[str, Any]] = []
        job = threading.Thread(
            target=lambda: answers.append(complete(url, prompt="ab", max_tokens=160))
        )
        job.start()
        running = 'rankwright_requests_running{replica="0"} 1.0'
        it.wait_for(lambda: running in httpx.get(f"{url}/metrics").text)
        for pid in (it.pid_of(0), it.pid_of(1), parent_of(it.pid_of(0)), it.process.pid):
            os.kill(pid, signal.SIGTERM)
        assert it.exit_code() == 0
        job.join(60)
        assert answers[0]["choices"][0]["text"] == "ab" * 80
        assert it.processes() == []


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_parent_that_is_killed_takes_its_ranks_along(tmp_path: Path) -> None:
    with launched(tmp_path, cpu_plan(SPEC, tp=2)) as it:
        it.url()
        it.process.kill()
        assert it.exit_code() == -signal.SIGKILL
        deadline_s = time.monotonic() + 30
        while left := it.processes():
            assert time.monotonic() < deadline_s, left
            time.sleep(0.02)


def test_a_rank_that_is_killed_takes_the_launch_down_by_name(tmp_path: Path) -> None:
    with launched(tmp_path, cpu_plan(SPEC, tp=1, pp=2)) as it:
        it.url()
        victim = it.pid_of(1)
        (log,) = tmp_path.glob("rankwright-*/rank-1.log")
        it.wait_for(lambda: "rank 1 runs as" in log.read_text())
        os.kill(victim, signal.SIGKILL)
        assert it.exit_code() == 5
        message = it.lines[-1]
        assert "rank 1 (stage 1, tp rank 0, CPU rank 1 of node 0 'here') failed" in message
        assert "killed by SIGKILL" in message
        assert message.endswith(f"(log: {log})")
        assert log.exists()
        assert it.processes() == []


def test_a_leader_that_crashes_ends_the_launch_and_tells_its_clients(tmp_path: Path) -> None:
    with launched(tmp_path, cpu_plan(SPEC, dp=2)) as it:
        url = it.url()
        assert "replica 0 is gone" in complete(url, prompt=[666])["error"]["message"]
        assert it.exit_code() == 5
        assert "rank 0 (replica 0, stage 0, tp rank 0" in it.lines[-1]
        assert "exit code 3" in it.lines[-1]
        assert it.processes() == []


def test_a_rank_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    plan = cpu_plan(SPEC, pp=3)
    failing = {"TEST_FAIL_RANK": "2", "TEST_START_S": "60"}
    with launched(tmp_path, plan, environment=failing) as it:
        assert it.exit_code() == 5
        message = it.lines[-1]
        assert "rank 2 (stage 2, tp rank 0, CPU rank 2 of node 0 'here') did not start" in message
        assert "RuntimeError: out of memory: 3 GB wanted" in message
        assert it.processes() == []


def test_ranks_that_never_get_ready_end_with_what_they_said_last(tmp_path: Path) -> None:
    slow = {"TEST_START_S": "60"}
    with launched(tmp_path, cpu_plan(SPEC), start_timeout_s=20, environment=slow) as it:
        assert it.exit_code() == 5
        assert "not ready after 20 s: no word from replica 0" in it.text
        assert "rank 0 runs as" in it.text
        assert it.processes() == []


def test_a_signal_while_starting_is_a_clean_end(tmp_path: Path) -> None:
    with launched(tmp_path, cpu_plan(SPEC), environment={"TEST_START_S": "60"}) as it:
        it.pid_of(0)
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
        assert it.processes() == []
        assert list(tmp_path.glob("rankwright-*")) == []


def test_two_machines_serve_one_plan(tmp_path: Path) -> None:
    plan = two_nodes(cpu_plan(SPEC, pp=2, dp=2))
    common = {
        "nnodes": 2,
        "master_port": free_port(),
        "environment": {"RANKWRIGHT_AUTHKEY": "ab" * 32},
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        launched(tmp_path / "a", plan, node_rank=0, **common) as first,
        launched(tmp_path / "b", plan, node_rank=1, **common) as second,
    ):
        # Their folders differ, so this worker's signal between ranks stays on one machine.
        url = first.url()
        assert complete(url, prompt="ab", max_tokens=4)["choices"][0]["text"] == "abab"
        first.process.send_signal(signal.SIGTERM)
        assert first.exit_code() == 0
        assert second.exit_code() == 0
        assert list(tmp_path.glob("*/rankwright-*")) == []


def test_a_plan_for_two_machines_is_refused_on_one() -> None:
    plan = two_nodes(cpu_plan(SPEC, pp=2, dp=2))
    with pytest.raises(ValueError, match="the plan uses 2 machines and nnodes is 1"):
        make_options(plan, backend="local")


def test_several_machines_are_for_ray_but_in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = two_nodes(cpu_plan(SPEC, pp=2, dp=2))
    assert make_options(plan).backend == "ray"
    assert make_options(plan, nnodes=2).backend == "local"
    assert make_options(cpu_plan(SPEC, pp=2)).backend == "local"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ValueError, match="the plan uses 2 machines and nnodes is 1"):
        make_options(plan)


def test_a_plan_for_gpus_is_refused_where_there_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = cpu_plan(SPEC, tp=2, device="h100-sxm")
    here = cpu_plan(SPEC, tp=2).cluster
    monkeypatch.setattr("rankwright.executor.preflight.probe", lambda: here)
    options = make_options(plan)
    with pytest.raises(ValueError, match="h100-sxm"):
        check_machine(plan, options)
    monkeypatch.setattr("rankwright.executor.preflight.probe", lambda: plan.cluster)
    check_machine(plan, options)


def test_a_plan_for_cpu_ranks_runs_on_any_machine() -> None:
    plan = cpu_plan(SPEC, tp=4)
    check_machine(plan, make_options(plan))


def test_weights_that_are_not_there_are_refused_before_the_start() -> None:
    plan = cpu_plan(SPEC)
    with pytest.raises(ValueError, match="--load-format dummy"):
        find_model(plan, make_options(plan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "mpi"}, "unknown backend 'mpi'; choose auto, local, ray"),
        ({"backend": "ray", "nnodes": 2}, "Ray starts the ranks of all machines itself"),
        ({"ray_address": "head:6379"}, "there is an address of Ray, and the backend is local"),
        ({"node_rank": 1}, "node_rank is 1, must be 0 to 0"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"start_timeout_s": 0}, "start_timeout_s is 0"),
        ({"master_port": 70000}, "master_port is 70000"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_options(cpu_plan(SPEC), **options)


def test_a_port_in_use_is_refused() -> None:
    with (
        listen("127.0.0.1", 0) as taken,
        pytest.raises(ValueError, match="choose another with --host or --port"),
    ):
        listen("127.0.0.1", taken.getsockname()[1])
