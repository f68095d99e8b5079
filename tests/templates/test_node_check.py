"""The look at a node before anything is loaded, run here with a driver and a sysfs of our own."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.templates.plans import plan

from rankwright.templates.render import render

DRIVER = "#!/bin/sh\nfor gpu in $GPUS; do echo 570.1; done\n"
BROKEN = "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n"


def check(
    folder: Path, driver: str = DRIVER, gpus: int = 8, given: int = 8, state: str = "4: ACTIVE"
) -> "subprocess.CompletedProcess[str]":
    """What a node says of itself that has `gpus`, of which Slurm gave the job `given`."""
    made = plan((8,), tp=8, pp=1)
    text = render(made, "slurm", None, model_path=str(folder / "model"))["rankwright.sbatch"]
    function = (
        "check_node() {" + text.partition("\ncheck_node() {")[2].partition("\n}\n")[0] + "\n}"
    )
    (folder / "bin").mkdir()
    (folder / "bin/nvidia-smi").write_text(driver)
    (folder / "bin/nvidia-smi").chmod(0o755)
    # /dev/shm of a machine that runs tests may be as small as a container's.
    (folder / "bin/df").write_text("#!/bin/sh\necho 'Filesystem'\necho 'x 1 1 999999999 0% /'\n")
    (folder / "bin/df").chmod(0o755)
    for port in ("mlx5_0", "mlx5_1"):
        (folder / "class/infiniband" / port / "ports/1").mkdir(parents=True)
        (folder / "class/infiniband" / port / "ports/1/state").write_text(f"{state}\n")
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "GPUS": " ".join(map(str, range(gpus))),
        "SLURM_GPUS_ON_NODE": str(given),
        "SLURMD_NODENAME": "n1",
    }
    script = f"set -euo pipefail\n{function}\ncheck_node {folder} {folder}\n"
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )


def test_a_node_that_is_fit_says_its_driver_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    done = check(tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == ("570.1\n", "", 0)


@pytest.mark.parametrize(
    ("unfit", "words"),
    [
        ({"given": 4}, "Slurm gave 4 GPUs, the plan needs 8"),
        ({"gpus": 7}, "the driver finds 7 GPUs, the plan needs 8"),
        ({"driver": BROKEN}, "nvidia-smi: Failed to initialize NVML: Driver/library version mism"),
        ({"state": "1: DOWN"}, "the fabric's port mlx5_0 is not active"),
    ],
)
def test_a_node_that_is_not_says_why(tmp_path: Path, unfit: dict[str, Any], words: str) -> None:
    (tmp_path / "model").mkdir()
    done = check(tmp_path, **unfit)
    assert done.returncode == 1
    assert f"n1 is not fit: {words}" in done.stderr


def test_all_that_a_node_lacks_is_said_at_once(tmp_path: Path) -> None:
    done = check(tmp_path, given=4, state="1: DOWN")
    assert len(done.stderr.splitlines()) == 4, done.stderr
    assert "no weights to read in" in done.stderr
