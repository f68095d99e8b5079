"""`launch --backend slurm`, `status` and `stop` on a real Slurm of two pretended nodes.

Jobs of the quick tests run a stand-in for the `rankwright` command, which prints what the launcher
prints and drains as it does; the first test runs the command itself.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.executor.command import ROOT, command, complete
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan, two_nodes
from tests.executor.tiny_tokenizer import write_tokenizer
from tests.running import start_running
from tests.templates.plans import NCCL, plan
from tests.templates.slurm_rig.rig import SlurmRig

from rankwright.cli import main
from rankwright.cost_model.read_model import read_model
from rankwright.executor.backends.slurm_offer import Machine, fits
from rankwright.executor.launch_record import read_records
from rankwright.executor.tokenizer import HubTokenizer
from rankwright.planner.plan import Plan

pytestmark = pytest.mark.timeout(240)


def gpu_plan(ranks_of_nodes: Sequence[int] = (8, 8), *, tp: int = 8, pp: int = 2) -> Plan:
    """Without the ports of a fabric, which the rig has not."""
    return plan(ranks_of_nodes, tp=tp, pp=pp, environment=NCCL[:1])


# What a launcher says and does, without a model.
SERVE = """\
#!/bin/sh
if [ "$1" != launch ]; then exit 2; fi
trap 'echo "rankwright: drained" >&2; touch "$RECORD/drained-$SLURM_JOB_ID"; exit 0' TERM
echo "rankwright: starting 1 ranks ..." >&2
if [ "$SLURM_NODEID" = 0 ]; then echo "rankwright: ready in 1.0 s: x on http://0.0.0.0:1" >&2; fi
while [ ! -e "$RECORD/drained-$SLURM_JOB_ID" ]; do sleep 0.1; done
"""
FAIL = """\
#!/bin/sh
echo "rankwright: rank $SLURM_NODEID (stage $SLURM_NODEID) did not start: no memory" >&2
exit 5
"""


@pytest.fixture
def environment(
    slurm: SlurmRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """Where commands find this Slurm, a state folder of this test, and `rankwright` for jobs."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    made = slurm.environment | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECORD": str(tmp_path),
    }
    yield made
    slurm.run("scancel", "--full", "--user=root")
    end = time.monotonic() + 30
    while slurm.run("squeue", "--noheader").stdout:
        assert time.monotonic() < end, "jobs do not end"
        time.sleep(0.1)


def install(folder: Path, stand_in: str) -> None:
    path = folder / "bin" / "rankwright"
    path.write_text(stand_in)
    path.chmod(0o755)


def write_plan(folder: Path, plan: Plan) -> str:
    path = folder / "plan.json"
    path.write_text(plan.model_dump_json())
    return str(path)


def launch_status(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["launches"]
    return found


def test_a_model_is_served_over_two_nodes_until_it_is_stopped(
    references: dict[str, Reference],
    slurm: SlurmRig,
    environment: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = references["llama"]
    folder = write_tokenizer(reference.folder)
    made = two_nodes(cpu_plan(read_model(folder), tp=2, pp=2))
    install(tmp_path, f'#!/bin/sh\nexec {sys.executable} -m rankwright "$@"\n')
    arguments = ["launch", write_plan(tmp_path, made), "--backend", "slurm", "--port", "8203"]
    arguments += ["--model-path", str(folder), "--job-dir", str(tmp_path / "job")]
    jobs = environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with command(*arguments, environment=jobs, cwd=tmp_path) as it:
        url = it.url(within_s=150)
        prompt = [5, 17, 42, 99, 7]
        answer = complete(url, prompt=prompt, max_tokens=12, temperature=0, ignore_eos=True)
        expected = HubTokenizer(folder).decode(reference.greedy(prompt, 12))
        assert answer["choices"][0]["text"] == expected

        (found,) = launch_status(capsys)
        assert (found["state"], found["url"], found["replicas_up"]) == ("ready", url, 1)
        assert found["backend"] == "slurm"

        # A request that runs when it is stopped is answered in full.
        answers: list[dict[str, Any]] = []
        body = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True}
        request = threading.Thread(target=lambda: answers.append(complete(url, **body)))
        start_running(url, request)
        assert main(["stop", found["id"]]) == 0
        request.join()
        assert "usage" in answers[0], (answers[0], it.text)
        assert answers[0]["usage"]["completion_tokens"] == 200
        assert it.exit_code() == 0
    phases = re.findall(r"^rankwright: \S+ is (\w+)", it.text, re.MULTILINE)
    assert "loading" in phases
    assert "0: rankwright: starting 4 ranks" in it.text, "logs are streamed"
    assert slurm.wait(found["place"]["job"]).state == "COMPLETED"
    assert read_records() == []
    logs = sorted(path.name for path in Path(found["place"]["run_dir"]).glob("rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(4)]


def test_a_second_launch_waits_its_turn_and_both_are_stopped(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, SERVE)
    plan_path = write_plan(tmp_path, gpu_plan())
    submitting = {"environment": environment, "cwd": tmp_path}
    with command("launch", plan_path, "--backend", "slurm", "--detach", **submitting) as first:
        assert first.exit_code() == 0
    assert "submitted job" in first.text
    with command("launch", plan_path, "--backend", "slurm", **submitting) as second:
        # The machines are taken.
        second.wait_for(lambda: re.search(r"is queued: (Resources|Priority)", second.text))
        second.process.send_signal(signal.SIGINT)
        assert second.exit_code() == 0, "nobody can answer here: it is left to itself"
    older, newer = launch_status(capsys)
    assert f"{newer['id']} runs on; `rankwright stop {newer['id']}` ends it" in second.text
    assert (older["state"], newer["state"]) == ("ready", "queued")
    assert older["place"]["folder"] != newer["place"]["folder"]
    assert main(["stop"]) == 2
    assert "several launches" in capsys.readouterr().err
    assert main(["stop", newer["place"]["job"]]) == 0  # it never ran
    assert main(["stop"]) == 0
    assert (tmp_path / f"drained-{older['place']['job']}").exists()
    assert read_records() == []


def test_ctrl_c_asks_and_a_yes_drains(
    slurm: SlurmRig, environment: dict[str, str], tmp_path: Path
) -> None:
    install(tmp_path, SERVE)
    arguments = ["launch", write_plan(tmp_path, gpu_plan()), "--backend", "slurm"]
    with command(*arguments, environment=environment, cwd=tmp_path, terminal=True) as it:
        it.url()
        it.process.send_signal(signal.SIGINT)
        it.wait_for(lambda: re.search(r"stop \S+\? \[y/N\]", it.text))
        it.type("y\n")
        assert it.exit_code() == 0
    assert "has ended" in it.text
    (job,) = (path.name.partition("-")[2] for path in tmp_path.glob("drained-*"))
    assert slurm.wait(job).state == "COMPLETED"


def test_a_second_ctrl_c_leaves_it_running(
    slurm: SlurmRig, environment: dict[str, str], tmp_path: Path
) -> None:
    install(tmp_path, SERVE)
    arguments = ["launch", write_plan(tmp_path, gpu_plan()), "--backend", "slurm"]
    with command(*arguments, environment=environment, cwd=tmp_path, terminal=True) as it:
        it.url()
        it.process.send_signal(signal.SIGINT)
        it.wait_for(lambda: re.search(r"stop \S+\? \[y/N\]", it.text))
        it.process.send_signal(signal.SIGINT)
        assert it.exit_code() == 0
    assert "runs on" in it.text
    (record,) = read_records()
    assert "JobState=RUNNING" in slurm.run("scontrol", "show", "job", record.place.job).stdout  # type: ignore[union-attr]


def test_a_job_that_fails_is_told_with_its_cause(
    environment: dict[str, str], tmp_path: Path
) -> None:
    install(tmp_path, FAIL)
    arguments = ["launch", write_plan(tmp_path, gpu_plan()), "--backend", "slurm"]
    with command(*arguments, environment=environment, cwd=tmp_path) as it:
        assert it.exit_code() == 5
    assert "has failed: FAILED, exit code" in it.lines[-2]
    assert "did not start: no memory" in it.lines[-2]
    assert read_records() == []


def test_unlike_nodes_are_one_launch(
    slurm: SlurmRig, environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, SERVE)
    arguments = ["launch", write_plan(tmp_path, gpu_plan((8, 4), tp=4, pp=1)), "--backend", "slurm"]
    with command(*arguments, environment=environment, cwd=tmp_path) as it:
        it.url()
        (found,) = launch_status(capsys)
        assert found["state"] == "ready"
        assert main(["stop"]) == 0
        assert it.exit_code() == 0
    assert slurm.wait(found["place"]["job"]).state == "COMPLETED"


def test_machines_are_given_out_so_that_all_fit() -> None:
    h100, small, cpus = Machine({"h100": 8}, 64), Machine({"": 4}, 32), Machine({}, 64)
    assert fits([Machine({"": 4}, 1), Machine({"": 8}, 1)], [small, h100])
    assert fits([Machine({"h100": 4}, 1), Machine({"": 4}, 1)], [h100, small])
    assert fits([cpus], [h100])
    assert not fits([Machine({"a100": 4}, 1)], [h100, small])
    assert not fits([Machine({"": 4}, 64)], [small])
    assert not fits([Machine({"": 4}, 1)] * 3, [h100, small])


def test_a_plan_that_slurm_has_no_machines_for_is_refused_with_both_counts(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(tmp_path, gpu_plan((8, 8, 8), tp=8, pp=1))
    assert main(["launch", path, "--backend", "slurm"]) == 2
    error = capsys.readouterr().err
    assert "the plan asks for 3 nodes x (8 GPUs" in error
    assert "partition gpu has 2 nodes x (8 GPUs and 32 CPUs)" in error
    path = write_plan(tmp_path, gpu_plan((16,), tp=8))
    assert main(["launch", path, "--backend", "slurm", "--set", "partition=nosuch"]) == 2
    assert "partition nosuch has no machine" in capsys.readouterr().err


def test_without_sbatch_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", write_plan(tmp_path, gpu_plan()), "--backend", "slurm"]) == 4
    assert "slurm-client" in capsys.readouterr().err


def test_an_option_that_a_job_cannot_honour_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_plan(tmp_path, gpu_plan())
    assert main(["launch", path, "--backend", "slurm", "--drain", "5"]) == 2
    assert "--drain has no meaning with --backend slurm" in capsys.readouterr().err
    assert main(["launch", path, "--detach"]) == 2
    assert "--detach has no meaning with --backend auto" in capsys.readouterr().err
