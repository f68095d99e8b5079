"""A rendered two-node script from `sbatch` to text, and to its end, with the real command.

Slurm starts a launcher on each of two pretended nodes, and each launcher one CPU rank, which holds
half of SmolLM2.
"""

import json
import os
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from tests.running import start_running
from tests.templates.plans import cluster, plan
from tests.templates.slurm_rig.rig import SlurmRig

from rankwright.cost_model.read_model import read_model
from rankwright.planner.plan import KvCachePlan, Limits, Plan
from rankwright.templates.render import render

START_S = 120
NUM_TOKENS = 32


def two_stages(folder: Path) -> Plan:
    made = plan(
        (1, 1),
        tp=1,
        pp=2,
        machines=cluster((1, 1), "cpu", num_cpus=2),
        model=read_model(folder),
        environment=(),
        memory_bytes_per_gpu=1e9,
    )
    limits = Limits(max_num_seqs=4, max_batched_tokens=256, max_model_len=512)
    return made.model_copy(update={"kv_cache": KvCachePlan(num_blocks=32), "limits": limits})


def free_port() -> int:
    # Below the range that the system hands out, where a port stays free until it is asked for.
    for port in range(8100, 8200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port from 8100 to 8199")


def complete(url: str, num_tokens: int, answers: list[str]) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": num_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=180) as response:
        answer = json.load(response)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] in ("length", "stop")
    answers.append(choice["text"])


def wait_until_healthy(slurm: SlurmRig, job: str, run_dir: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            url = (run_dir / "url").read_text().strip()
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return url
        except OSError:  # no file, no listener, or 503
            time.sleep(0.2)
        if "JobState=FAILED" in slurm.run("scontrol", "show", "job", job).stdout:
            break
    logs = "\n".join(log.read_text() for log in sorted(run_dir.glob("node-*.log")))
    raise AssertionError(f"the server did not come up:\n{logs}")


def test_a_rendered_job_serves_a_real_model_over_two_nodes_and_drains(
    slurm: SlurmRig, smollm2: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="needs rankwright[executor]")
    render(two_stages(smollm2), "slurm", tmp_path, port=free_port())
    command = tmp_path / "bin" / "rankwright"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m rankwright "$@"\n')
    command.chmod(0o755)
    source = Path(__file__).parents[2] / "src"
    job = slurm.submit(
        tmp_path / "rankwright.sbatch",
        {"PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(source)},
    )
    url = wait_until_healthy(slurm, job, tmp_path / "rankwright-logs" / job)

    answers: list[str] = []
    complete(url, 2, answers)
    assert answers == [" Paris."]

    # A request that runs when the TERM comes is answered in full, and the job then completes.
    request = threading.Thread(target=complete, args=(url, NUM_TOKENS, answers))
    start_running(url, request)
    assert slurm.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    request.join()
    assert len(answers) == 2, "the running request got no answer"
    assert answers[1].startswith(" Paris.")
    ended = slurm.wait(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
