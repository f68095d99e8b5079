"""`measure`: time the links, memories and matrix units of this machine, a process for each GPU.

Starts the ranks of `measure_links.py` and waits; needs no torch itself. `measure_job.py` does the
same on every machine of a job.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from rankwright.executor.backends.local import num_cpus
from rankwright.executor.backends.ranks import tail
from rankwright.executor.interface import interface_towards
from rankwright.topology.apply_measurements import apply_measurements
from rankwright.topology.cluster import Cluster, Node
from rankwright.topology.errors import ProbeError
from rankwright.topology.measurements import Measurements

WORKER = (sys.executable, "-m", "rankwright.executor.measure_links")

# Eight GPUs take below a minute; a machine whose links crawl, or whose disk does, some more.
MEASURE_TIMEOUT_S = 300.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Team:
    """All ranks of a measurement, and where they meet.

    Attributes:
        places: Machine and GPU index of each rank, in order of machines.
        device: 'cuda' or 'cpu', of all of them.
        host: Address of machine 0.
        port: That its first rank listens on.
    """

    places: tuple[tuple[int, int], ...]
    device: str
    host: str
    port: int

    def ranks_of(self, machine: int) -> list[int]:
        """Return the ranks of a machine."""
        return [rank for rank, place in enumerate(self.places) if place[0] == machine]


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
            "--gather none, or all of them within a Slurm job or under torchrun"
        )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    team = make_team([cluster.nodes[0]], "127.0.0.1", port)
    measured = run_ranks(team, 0, progress, timeout_s)
    assert measured is not None
    return apply_measurements(cluster, measured)


def make_team(nodes: Sequence[Node], host: str, port: int) -> Team:
    """Return the ranks of machines, one for each GPU.

    Raises:
        ValueError: Some have GPUs and some CPU ranks, which cannot talk to each other.
    """
    kinds = {gpu.device == "cpu" for node in nodes for gpu in node.gpus}
    if len(kinds) > 1:
        without = [node.name for node in nodes if any(gpu.device == "cpu" for gpu in node.gpus)]
        raise ValueError(
            f"{', '.join(without)} has no GPU and others have: they cannot be measured together"
        )
    places = tuple((number, gpu.index) for number, node in enumerate(nodes) for gpu in node.gpus)
    return Team(places, "cpu" if kinds == {True} else "cuda", host, port)


def run_ranks(
    team: Team, machine: int, progress: Callable[[str], None], timeout_s: float
) -> Measurements | None:
    """Run the ranks of one machine until they end; return what was measured on machine 0.

    Raises:
        ProbeError: A rank failed; `kind` is 'measure_failed'.
    """
    folder = Path(tempfile.mkdtemp(prefix="rankwright-measure-"))
    try:
        return _run(team, machine, folder, progress, timeout_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure_environment(
    team: Team, rank: int, folder: Path, environment: Mapping[str, str]
) -> dict[str, str]:
    """Return what a rank of the measurement runs under, as torchrun would set it."""
    machine = team.places[rank][0]
    local = team.ranks_of(machine)
    made = {
        **{name: value for name, value in environment.items() if not _of_torchrun(name)},
        "RANK": str(rank),
        "LOCAL_RANK": str(local.index(rank)),
        "WORLD_SIZE": str(len(team.places)),
        "LOCAL_WORLD_SIZE": str(len(local)),
        "MASTER_ADDR": team.host,
        "MASTER_PORT": str(team.port),
        "PYTHONUNBUFFERED": "1",
    }
    if len(local) < len(team.places) and (interface := interface_towards(team.host)):
        made.setdefault("GLOO_SOCKET_IFNAME", interface)
        made.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    if team.device == "cpu":
        made.setdefault("OMP_NUM_THREADS", str(max(1, num_cpus() // len(local))))
        return made
    # Every rank sees every GPU, in the driver's order, since copies need both ends.
    made["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    visible = [entry.strip() for entry in made.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(entry.isdigit() or not entry for entry in visible):
        made["CUDA_VISIBLE_DEVICES"] = ",".join(str(team.places[each][1]) for each in local)
    if "NCCL_DEBUG" not in made:
        # Says which way each channel goes, which nothing else tells.
        made["NCCL_DEBUG"] = "INFO"
        made["NCCL_DEBUG_SUBSYS"] = "INIT,P2P,NET,SHM"
        made["NCCL_DEBUG_FILE"] = str(folder / "nccl.%h.%p")
    return made


def _of_torchrun(name: str) -> bool:
    return name.startswith("TORCHELASTIC_") or name in (
        *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
    )


def _run(
    team: Team, machine: int, folder: Path, progress: Callable[[str], None], timeout_s: float
) -> Measurements | None:
    result = folder / "measurements.json"
    places = ",".join(f"{node}:{gpu}" for node, gpu in team.places)
    started_s = time.monotonic()
    local = team.ranks_of(machine)
    if machine == 0:
        machines = len({node for node, _ in team.places})
        on = f" on {machines} machines" if machines > 1 else ""
        what = "ranks" if team.device == "cpu" else "GPUs"
        progress(f"measuring {len(team.places)} {what}{on}: starting")
    ranks: dict[int, subprocess.Popen[bytes]] = {}
    teller: threading.Thread | None = None
    try:
        for rank in local:
            with (folder / f"rank-{rank}.log").open("wb") as log:
                ranks[rank] = subprocess.Popen(
                    [
                        *(*WORKER, "--places", places),
                        *("--device", team.device, "--output", str(result)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if rank == 0 else log,
                    stderr=log,
                    env=measure_environment(team, rank, folder, os.environ),
                )
        if 0 in ranks:
            teller = threading.Thread(target=_tell, args=(ranks[0], progress), daemon=True)
            teller.start()
        _wait(ranks, folder, started_s + timeout_s)
        if teller is not None:
            teller.join(5.0)
    finally:
        for process in ranks.values():
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if machine != 0:
        return None
    try:
        return Measurements.model_validate_json(result.read_bytes())
    except (OSError, ValidationError) as error:
        raise ProbeError("measure_failed", f"the ranks left no result: {error}") from None


def _tell(rank: subprocess.Popen[bytes], progress: Callable[[str], None]) -> None:
    assert rank.stdout is not None
    for line in rank.stdout:
        progress(line.decode(errors="replace").rstrip())


def _wait(ranks: dict[int, subprocess.Popen[bytes]], folder: Path, deadline_s: float) -> None:
    """Return when all ranks have ended well.

    Raises:
        ProbeError: One has not, or the time is up.
    """
    while any(process.poll() is None for process in ranks.values()):
        if any(process.poll() not in (None, 0) for process in ranks.values()):
            break
        if time.monotonic() > deadline_s:
            break
        time.sleep(_POLL_S)
    for rank, process in ranks.items():
        if process.poll() not in (None, 0):
            said = " ".join(tail(folder / f"rank-{rank}.log", 1)) or f"exit code {process.poll()}"
            if "ModuleNotFoundError" in said:
                said += "; install it with: pip install 'rankwright[executor]'"
            raise ProbeError("measure_failed", f"rank {rank} of the measurement failed: {said}")
    if any(process.poll() is None for process in ranks.values()):
        first = min(ranks)
        said = " ".join(tail(folder / f"rank-{first}.log", 1)) or "nothing"
        raise ProbeError(
            "measure_failed", f"the measurement did not end in time; rank {first} last said: {said}"
        )
