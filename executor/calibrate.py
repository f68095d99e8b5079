"""`calibrate`: time the engine's kernels and the links of this machine, in about a minute.

Starts `calibrate_ops.py` on the first GPU, and `measure.py` over all of them for collectives; needs
no torch itself.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from rankwright.cost_model.calibration import Calibration
from rankwright.executor.backends.ranks import tail
from rankwright.executor.measure import measure
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError

WORKER = (sys.executable, "-m", "rankwright.executor.calibrate_ops")

# An H200 takes half a minute; compiling the kernels on a slow disk takes as long again.
CALIBRATE_TIMEOUT_S = 600.0


def calibrate(
    cluster: Cluster,
    *,
    progress: Callable[[str], None] = lambda text: None,
    timeout_s: float = CALIBRATE_TIMEOUT_S,
    quick: bool = False,
) -> Calibration:
    """Return what the GPUs and links of this machine were measured to do.

    Args:
        cluster: This machine, as the probe read it.
        progress: Gets a line for each part of the work.
        timeout_s: Until it must be done.
        quick: A few shapes instead of all, and no collectives.

    Raises:
        ValueError: The cluster has several machines, or GPUs of more than one kind.
        ProbeError: The measurement failed; `kind` is 'measure_failed'.
    """
    if cluster.num_nodes != 1:
        raise ValueError(
            f"the cluster has {cluster.num_nodes} machines; calibrate on one of each kind"
        )
    gpus = cluster.nodes[0].gpus
    devices = sorted({gpu.device for gpu in gpus})
    if len(devices) > 1:
        raise ValueError(
            f"this machine has GPUs of several kinds ({', '.join(devices)}); choose one with "
            "CUDA_VISIBLE_DEVICES"
        )
    started_s = time.monotonic()
    found = _time_ops(gpus[0].index, devices[0] == "cpu", quick, progress, timeout_s)
    update: dict[str, object] = {"device": devices[0], "name": gpus[0].name}
    if len(gpus) > 1 and not quick:
        left_s = timeout_s - (time.monotonic() - started_s)
        measured = measure(cluster, progress=progress, timeout_s=left_s).measurements
        assert measured is not None
        update["collectives"] = measured.collectives
        update["notes"] = (*found.notes, *measured.notes)
        update["software"] = measured.software
    update["seconds"] = time.monotonic() - started_s
    update["measured_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    return found.model_copy(update=update)


def _time_ops(
    gpu: int, cpu: bool, quick: bool, progress: Callable[[str], None], timeout_s: float
) -> Calibration:
    with tempfile.TemporaryDirectory(prefix="rankwright-calibrate-") as name:
        folder = Path(name)
        result, log = folder / "ops.json", folder / "log"
        command = [*WORKER, "--output", str(result), "--device", "cpu" if cpu else "cuda"]
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        if not cpu:
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
            environment.setdefault("CUDA_VISIBLE_DEVICES", str(gpu))
        with log.open("wb") as errors:
            worker = subprocess.Popen(
                [*command, *(["--quick"] if quick else [])],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        teller = threading.Thread(target=_tell, args=(worker, progress), daemon=True)
        teller.start()
        try:
            code = worker.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProbeError(
                "measure_failed", f"the calibration did not end in {timeout_s:g} s"
            ) from None
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
            teller.join(5.0)
        if code != 0:
            said = " ".join(tail(log, 1)) or f"exit code {code}"
            if "ModuleNotFoundError" in said:
                said += "; install it with: pip install 'rankwright[executor]'"
            raise ProbeError("measure_failed", f"the calibration failed: {said}")
        try:
            return Calibration.model_validate_json(result.read_bytes())
        except (OSError, ValidationError) as error:
            raise ProbeError("measure_failed", f"the calibration left no result: {error}") from None


def _tell(worker: "subprocess.Popen[bytes]", progress: Callable[[str], None]) -> None:
    assert worker.stdout is not None
    with worker.stdout:
        for line in worker.stdout:
            progress(line.decode(errors="replace").rstrip())
