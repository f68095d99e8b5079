"""`measure`: time the links, memories and matrix units of this machine, a process for each GPU.

Starts the ranks of `measure_links.py` and waits; needs no torch itself.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from rankwright.executor.backends.local import num_cpus, tail
from rankwright.topology.apply_measurements import apply_measurements
from rankwright.topology.cluster import Cluster, Node
from rankwright.topology.errors import ProbeError
from rankwright.topology.measurements import Measurements

WORKER = (sys.executable, "-m", "rankwright.executor.measure_links")

# Eight GPUs take below a minute; a machine whose links crawl, or whose disk does, some more.
MEASURE_TIMEOUT_S = 300.0
_POLL_S = 0.1
_TRANSPORT = re.compile(r" via ((?:P2P|SHM|NET|COLL)\S*)")


def measure(
    cluster: Cluster,
    *,
    progress: Callable[[str], None] = lambda text: None,
    timeout_s: float = MEASURE_TIMEOUT_S,
) -> Cluster:
    """Return `cluster`, which is this machine, with what its GPUs and links were measured to do.

    Args:
        cluster: One machine, as the probe read it.
        progress: Gets a line for each part of the work.
        timeout_s: Until it must be done.

    Raises:
        ValueError: The cluster has several machines.
        ProbeError: A rank failed; `kind` is 'measure_failed'.
    """
    if cluster.num_nodes != 1:
        raise ValueError(
            f"the cluster has {cluster.num_nodes} machines; measure each by itself, with "
            "--gather none"
        )
    folder = Path(tempfile.mkdtemp(prefix="rankwright-measure-"))
    try:
        measured = _run(cluster.nodes[0], folder, progress, timeout_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return apply_measurements(cluster, measured)


def measure_environment(
    node: Node, rank: int, port: int, folder: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return what rank `rank` of the measurement of `node` runs under, as torchrun would set it."""
    size = str(len(node.gpus))
    made = {
        **{name: value for name, value in environment.items() if not _of_torchrun(name)},
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1",
    }
    if all(gpu.device == "cpu" for gpu in node.gpus):
        made.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // len(node.gpus))))
        return made
    # Every rank sees every GPU, in the driver's order, since copies need both ends.
    made["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    visible = [entry.strip() for entry in made.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(entry.isdigit() or not entry for entry in visible):
        made["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in node.gpus)
    if "NCCL_DEBUG" not in made:
        # Says which way each channel goes, which nothing else tells.
        made["NCCL_DEBUG"] = "INFO"
        made["NCCL_DEBUG_SUBSYS"] = "INIT,P2P,NET,SHM"
        made["NCCL_DEBUG_FILE"] = str(folder / "nccl.%p")
    return made


def read_transports(texts: Mapping[str, str]) -> tuple[str, ...]:
    """Return the ways between GPUs that NCCL's logs name, without channel and adapter numbers.

    >>> read_transports({"log": "Channel 00/0 : 1[1] -> 0[0] [send] via NET/IB/0(4)/GDRDMA"})
    ('NET/IB/GDRDMA',)
    """
    found: set[str] = set()
    for text in texts.values():
        for way in _TRANSPORT.findall(text):
            words = way.split("/")
            kept = words[:2] if words[0] in ("P2P", "NET") else words[:1]
            found.add("/".join([*kept, *(["GDRDMA"] if "GDRDMA" in way else [])]))
    return tuple(sorted(found))


def _of_torchrun(name: str) -> bool:
    return name.startswith("TORCHELASTIC_") or name in (
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
    )


def _run(
    node: Node, folder: Path, progress: Callable[[str], None], timeout_s: float
) -> Measurements:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = folder / "measurements.json"
    indices = ",".join(str(gpu.index) for gpu in node.gpus)
    device = "cpu" if all(gpu.device == "cpu" for gpu in node.gpus) else "cuda"
    started_s = time.monotonic()
    progress(f"measuring {len(node.gpus)} {'ranks' if device == 'cpu' else 'GPUs'}: starting")
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(len(node.gpus)):
            with (folder / f"rank-{rank}.log").open("wb") as log:
                ranks.append(
                    subprocess.Popen(
                        [*WORKER, "--gpus", indices, "--device", device, "--output", str(result)],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if rank == 0 else log,
                        stderr=log,
                        env=measure_environment(node, rank, port, folder, os.environ),
                    )
                )
        teller = threading.Thread(target=_tell, args=(ranks[0], progress), daemon=True)
        teller.start()
        _wait(ranks, folder, started_s + timeout_s)
        teller.join(5.0)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    logs = {path.name: path.read_text(errors="replace") for path in folder.glob("nccl.*")}
    try:
        measured = Measurements.model_validate_json(result.read_bytes())
    except (OSError, ValidationError) as error:
        raise ProbeError("measure_failed", f"the ranks left no result: {error}") from None
    return measured.model_copy(update={"transports": read_transports(logs)})


def _tell(rank: subprocess.Popen[bytes], progress: Callable[[str], None]) -> None:
    assert rank.stdout is not None
    for line in rank.stdout:
        progress(line.decode(errors="replace").rstrip())


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path, deadline_s: float) -> None:
    """Return when all ranks have ended well.

    Raises:
        ProbeError: One has not, or the time is up.
    """
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline_s:
            break
        time.sleep(_POLL_S)
    for rank, process in enumerate(ranks):
        if process.poll() not in (None, 0):
            said = " ".join(tail(folder / f"rank-{rank}.log", 1)) or f"exit code {process.poll()}"
            if "ModuleNotFoundError" in said:
                said += "; install it with: pip install 'rankwright[executor]'"
            raise ProbeError("measure_failed", f"rank {rank} of the measurement failed: {said}")
    if any(process.poll() is None for process in ranks):
        said = " ".join(tail(folder / "rank-0.log", 1)) or "nothing"
        raise ProbeError(
            "measure_failed", f"the measurement did not end in time; rank 0 last said: {said}"
        )
