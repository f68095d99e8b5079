"""Rendered scripts on a real Slurm: what it admits, and what a job's tasks then see.

Most jobs here run a stand-in for the `rankwright` command, which records its arguments and
environment: they are about Slurm and the script. `test_slurm_launch.py` runs the command itself.
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.templates.plans import NCCL, cluster, cpu_plan, plan
from tests.templates.slurm_rig.rig import SlurmRig

from rankwright.planner.plan import Plan
from rankwright.templates.render import render

RECORD = """\
#!/bin/sh
node=$SLURM_NODEID
{ printf '%s\\n' "$@"; } > "$RECORD/arguments-$node"
env > "$RECORD/environment-$node"
"""
SERVE = """\
#!/bin/sh
trap 'echo drained > "$RECORD/drained-$SLURM_NODEID"; exit 0' TERM
echo serving > "$RECORD/serving-$SLURM_NODEID"
# Workers end when the head does, as the ranks of a worker do when the head stops them.
while [ ! -e "$RECORD/drained-0" ]; do sleep 0.1; done
"""
FAIL = """\
#!/bin/sh
[ "$SLURM_NODEID" = 1 ] && exit 7
exec sleep 60
"""


def submit(
    slurm: SlurmRig, made: Plan, folder: Path, stand_in: str, **options: object
) -> tuple[str, Path]:
    """The id of a job of `made` that runs `stand_in`, and its run directory."""
    render(made, "slurm", folder, **options)
    command = folder / "bin" / "rankwright"
    command.parent.mkdir()
    command.write_text(stand_in)
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    job = slurm.submit(folder / "rankwright.sbatch", {"PATH": path, "RECORD": str(folder)})
    return job, folder / "rankwright-logs" / job


def wait_for(*files: Path, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, f"none of {[f.name for f in files if not f.exists()]}"
        time.sleep(0.05)


def options_of(folder: Path, node: int) -> dict[str, str]:
    words = (folder / f"arguments-{node}").read_text().splitlines()
    words.remove("--force")  # 6 of the machine's 8 GPUs are used
    return dict(zip(words[2::2], words[3::2], strict=True))


def environment_of(folder: Path, node: int) -> dict[str, str]:
    lines = (folder / f"environment-{node}").read_text().splitlines()
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(plan, id="2x8"),
        pytest.param(lambda: plan((8,), tp=8, pp=1), id="1x8"),
        pytest.param(lambda: plan((6, 6), tp=6, pp=2), id="2x6"),
        pytest.param(cpu_plan, id="cpu"),
    ],
)
def test_slurm_admits_what_fits(slurm: SlurmRig, make: Callable[[], Plan], tmp_path: Path) -> None:
    render(make(), "slurm", tmp_path, time_limit="00:10:00", partition="gpu")
    done = slurm.run("sbatch", "--test-only", str(tmp_path / "rankwright.sbatch"))
    assert "to start at" in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(lambda: plan((16,), tp=8, pp=2), {}, id="GPUs"),
        pytest.param(lambda: plan((8, 8, 8), tp=8, pp=1), {}, id="nodes"),
        pytest.param(plan, {"partition": "nosuch"}, id="partition"),
        pytest.param(plan, {"time_limit": "1-00:00:00"}, id="time"),
        pytest.param(lambda: cpu_plan((64,), num_cpus=64), {}, id="CPUs"),
    ],
)
def test_slurm_refuses_what_does_not_fit(
    slurm: SlurmRig, make: Callable[[], Plan], options: dict[str, str], tmp_path: Path
) -> None:
    render(make(), "slurm", tmp_path, **options)
    done = slurm.run("sbatch", "--test-only", str(tmp_path / "rankwright.sbatch"))
    assert done.returncode != 0


def test_each_node_runs_one_launcher_with_its_number_and_gpus(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    no_ports = tuple(variable for variable in NCCL if variable.name != "NCCL_IB_HCA")
    made = plan((6, 6), tp=6, pp=2, machines=cluster((8, 8)), environment=no_ports)
    job, run_dir = submit(slurm, made, tmp_path, RECORD, port=9001, log_dir=str(tmp_path / "a b"))
    ended = slurm.wait(job)
    run_dir = tmp_path / "a b" / job
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    first, second = options_of(tmp_path, 0), options_of(tmp_path, 1)
    assert (first.pop("--node-rank"), second.pop("--node-rank")) == ("0", "1")
    assert first == second
    assert first["--nnodes"] == "2"
    assert first["--port"] == "9001"
    assert int(first["--master-port"]) == 20000 + 2 * int(job)
    # The node name resolves nowhere, so that Slurm's own address is taken.
    assert first["--master-addr"] == "127.0.100.1"
    assert (run_dir / "url").read_text() == "http://127.0.100.1:9001\n"
    assert Plan.model_validate_json((run_dir / "plan.json").read_text()) == made
    keys: set[str] = set()
    for node in (0, 1):
        words = (tmp_path / f"arguments-{node}").read_text().splitlines()
        assert words[:2] == ["launch", str(run_dir / "plan.json")]
        seen = environment_of(tmp_path, node)
        keys.add(seen["RANKWRIGHT_AUTHKEY"])
        assert seen["NCCL_SOCKET_IFNAME"] == "=eth0"
        assert seen["SLURM_CPUS_ON_NODE"] == "32"  # all of the node, though 14 were asked for
        if slurm.has_gpu_files:
            assert seen["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5"
    (key,) = keys
    assert re.fullmatch(r"[0-9a-f]{64}", key)


def test_a_node_without_the_plans_fabric_ends_the_job_before_anything_is_loaded(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    made = plan((6, 6), tp=6, pp=2, machines=cluster((8, 8)))
    job, _ = submit(slurm, made, tmp_path, RECORD)
    ended = slurm.wait(job)
    assert ended.state == "FAILED"
    for node in ("rig1", "rig2"):
        assert f"{node} is not fit: the fabric's port mlx5_0 is not active" in ended.output
    assert not (tmp_path / "arguments-0").exists()


def test_a_cpu_job_sees_no_gpus(slurm: SlurmRig, tmp_path: Path) -> None:
    job, _ = submit(slurm, cpu_plan((2,)), tmp_path, RECORD)
    assert slurm.wait(job).state == "COMPLETED"
    environment = environment_of(tmp_path, 0)
    assert "RANKWRIGHT_AUTHKEY" not in environment
    # --exclusive hands out every GPU of the node; none belongs to a step that asked for none.
    assert "SLURM_STEP_GPUS" not in environment


def test_a_term_to_the_batch_script_reaches_the_head_alone_and_the_job_completes(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    job, _ = submit(slurm, cpu_plan(), tmp_path, SERVE)
    wait_for(tmp_path / "serving-0", tmp_path / "serving-1")
    assert slurm.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    ended = slurm.wait(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    assert "TERM, letting running requests end" in ended.output
    assert (tmp_path / "drained-0").exists()
    assert not (tmp_path / "drained-1").exists()


def test_a_launcher_that_fails_ends_the_job_at_once_with_its_status(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    job, _ = submit(slurm, cpu_plan(), tmp_path, FAIL)
    ended = slurm.wait(job, timeout_s=30)
    assert ended.state == "FAILED"
    assert ended.exit_code != 0
    assert "ended with status" in ended.output


def test_unlike_nodes_are_components_of_one_job_and_numbered_as_the_plan_numbers_them(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    made = plan((4, 2), tp=2, pp=1, environment=NCCL[:1], machines=cluster((8, 8)))
    job, run_dir = submit(slurm, made, tmp_path, RECORD)
    ended = slurm.wait(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    (output,) = tmp_path.glob("*.out")  # of the first component; the last one's would be found
    hosts = re.findall(r"job \d+ on (\w+) (\w+), start", output.read_text())
    for node, name in enumerate(hosts[0]):
        assert options_of(tmp_path, node)["--node-rank"] == str(node)
        assert environment_of(tmp_path, node)["SLURMD_NODENAME"] == name
        if slurm.has_gpu_files:
            gpus = environment_of(tmp_path, node)["CUDA_VISIBLE_DEVICES"].split(",")
            assert len(gpus) == (4, 2)[node]
    assert (run_dir / "url").exists()


ENGINE = """\
#!/bin/bash
me=$RECORD/$NODE_RANK-$CUDA_VISIBLE_DEVICES
trap 'echo drained > "$me-drained"; exit 0' TERM
printf '%s\\n' "$@" > "$me.tmp"; mv "$me.tmp" "$me"
while :; do sleep 0.05; done
"""


def test_another_engine_runs_its_replicas_and_drains_on_every_node(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    made = plan((4, 4), tp=2, pp=1, environment=NCCL[:1], machines=cluster((8, 8)))
    render(made, "vllm", tmp_path, on="slurm", port=9001)
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(ENGINE)
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    job = slurm.submit(tmp_path / "rankwright.sbatch", {"PATH": path, "RECORD": str(tmp_path)})
    started = [tmp_path / f"{node}-{gpus}" for node in (0, 1) for gpus in ("0,1", "2,3")]
    wait_for(*started)
    ports = [file.read_text().split("--port\n")[1].split()[0] for file in started]
    assert ports == ["9001", "9002", "9003", "9004"]
    urls = (tmp_path / "rankwright-logs" / job / "url").read_text().split()
    assert [url.rpartition(":")[2] for url in urls] == ports
    assert slurm.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    ended = slurm.wait(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    assert all((tmp_path / f"{file.name}-drained").exists() for file in started)


def test_an_mpi_engine_gets_a_task_a_rank_on_the_gpus_of_its_replica(
    slurm: SlurmRig, tmp_path: Path
) -> None:
    made = plan((4, 4), tp=2, pp=2, environment=NCCL[:1], machines=cluster((8, 8)))
    # The rig has no PMI: the tasks are there all the same.
    render(made, "trtllm", tmp_path, on="slurm", mpi="none")
    command = tmp_path / "bin" / "trtllm-llmapi-launch"
    command.parent.mkdir()
    command.write_text(
        '#!/bin/sh\necho "$*" > "$RECORD/$SLURMD_NODENAME-$CUDA_VISIBLE_DEVICES-$SLURM_PROCID"\n'
    )
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    job = slurm.submit(tmp_path / "rankwright.sbatch", {"PATH": path, "RECORD": str(tmp_path)})
    ended = slurm.wait(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output
    ran = sorted(file.name for file in tmp_path.glob("rig*"))
    assert ran == [f"rig{node}-0,1,2,3-{rank}" for node in (1, 2) for rank in range(4)]
    words = (tmp_path / ran[0]).read_text().split()
    assert words[:2] == ["trtllm-serve", "meta-llama/Llama-3.1-405B"]
    assert (tmp_path / "rankwright-logs" / job / "parallel_config.yaml").exists()
