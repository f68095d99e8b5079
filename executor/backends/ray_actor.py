"""What runs on a Ray node for one rank: an actor that starts the rank, and says what it says.

The rank is a process of its own with the same entry as under torchrun. It stays free of Ray, whose
threads and signal handlers it would otherwise share, and it can be killed when it hangs in NCCL.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwright.executor.backends.local import rank_environment
from rankwright.executor.interface import interface_towards
from rankwright.executor.parent_death import VARIABLE
from rankwright.executor.run_options import RunOptions, worker_arguments
from rankwright.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor has come to be.

    Attributes:
        address: Of its node, as Ray knows it.
        gpus: What Ray gave it, as the driver numbers GPUs.
        port: One that was free there.
    """

    address: str
    gpus: tuple[str, ...]
    port: int


@dataclass(frozen=True, slots=True)
class News:
    """What a rank has done since it was last asked after.

    Attributes:
        log: New output.
        exit_code: As `subprocess` counts it; None while it runs.
        error: The line it left for the launcher, if it ended badly.
    """

    log: bytes
    exit_code: int | None
    error: str


class RankActor:
    """Runs one rank; its methods are called by the launch, over Ray."""

    def __init__(self, plan: str, rank: int) -> None:
        """Prepare for rank `rank` of `plan`, a plan as JSON."""
        self._plan = Plan.model_validate_json(plan)
        self._rank = self._plan.ranks[rank]
        self._folder = Path(tempfile.mkdtemp(prefix="rankwright-ray-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    def place(self) -> Place:
        """Return where this is."""
        import ray

        ids = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0)) as probe:
            port = int(probe.getsockname()[1])
        return Place(address, tuple(map(str, ids)), port)

    def check_machine(self, gpus: Sequence[str], device: str) -> None:
        """Check that this node, with `gpus` for us, is the one that the plan means.

        Raises:
            ValueError: It is another one.
            ProbeError: It cannot be read.
        """
        # Only where there are GPUs: it loads what the launcher needs to serve.
        from rankwright.executor.preflight import check_node

        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        check_node(self._plan, self._rank.node, device)

    def start(
        self, options: RunOptions, address: str, environment: Mapping[str, str], gpus: Sequence[str]
    ) -> None:
        """Start the rank.

        Args:
            options: How; a `worker` that begins with None means this node's Python.
            address: Of this node.
            environment: What the launch sets, for all ranks and for this one.
            gpus: Those of the node that ranks of this launch use, all of them: ranks must see each
                other's GPUs. Empty: none.
        """
        plan_path = self._folder / "plan.json"
        plan_path.write_text(self._plan.model_dump_json(), encoding="utf-8")
        # Ray sets these for the actor, which is not the rank.
        own = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        inherited = {name: value for name, value in os.environ.items() if name not in own}
        if gpus:
            inherited["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        interface = interface_towards(address)
        if interface is not None:
            # gloo looks up this machine's name, which on Debian leads to 127.0.1.1.
            inherited.setdefault("GLOO_SOCKET_IFNAME", interface)
        ranks = self._plan.ranks_of_node(self._rank.node)
        variables = {
            **rank_environment(self._plan, ranks, {**inherited, **environment}),
            "RANK": str(self._rank.rank),
            "LOCAL_RANK": str(ranks.index(self._rank)),
            "WORLD_SIZE": str(len(self._plan.ranks)),
            "LOCAL_WORLD_SIZE": str(len(ranks)),
            "RANKWRIGHT_RUN_DIR": str(self._folder),
            VARIABLE: "1",
        }
        python, *rest = options.worker
        command = [python or sys.executable, *rest, *worker_arguments(options, plan_path)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # its other end is ours: it closes when this process ends
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        threading.Thread(target=self._wait, daemon=True).start()

    def news(self, offset: int, within_s: float) -> News:
        """Return what is new after `offset` bytes of output, at once when the rank has ended."""
        assert self._process is not None, "start comes first"
        ended = self._ended.wait(within_s)
        with self._log.open("rb") as file:
            file.seek(offset)
            log = file.read()
        error = ""
        if ended:
            with contextlib.suppress(FileNotFoundError):
                path = self._folder / f"rank-{self._rank.rank}.error"
                error = (path.read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
        return News(log, self._process.returncode if ended else None, error)

    def kill(self) -> None:
        """Kill the rank with what it has started, and leave nothing behind."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._ended.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._folder / f"rank-{self._rank.rank}.log"

    def _wait(self) -> None:
        assert self._process is not None, "it has just been started"
        self._process.wait()
        self._ended.set()
