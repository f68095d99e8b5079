"""torchrun's agent as seen by its parent: started early, told late what to start.

The agent has to import PyTorch, which takes seconds; its parent has to read the machine, to plan
and to import its HTTP server meanwhile. So the agent starts first, imports what ranks need, and
waits for its order on standard input. Ranks of CPUs are then forks of it, and import nothing again.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

AGENT_LOG = "torchrun.log"
# Set before a rank imports anything. A rank's log is read while it runs, and buffered
# lines would be lost with it. Pages of 2 MiB for the weights of CPU ranks: to read half a GiB into
# new memory then took 0.24 s of CPU, and 0.32 s with pages of 4 KiB (Linux 6.18, a Xeon in a VM).
BEFORE_IMPORTS = {"PYTHONUNBUFFERED": "1", "THP_MEM_ALLOC_ENABLE": "1"}
_MAIN = "rankwright.executor.backends.agent_main"


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the agents of all nodes meet.

    Attributes:
        nnodes: Machines.
        node_rank: Number of this one among them.
        master_addr: Address of the first one.
        master_port: Port there.
    """

    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int


@dataclass(frozen=True, slots=True)
class Order:
    """What an agent is told to start.

    Attributes:
        rendezvous: Where it meets the agents of other machines.
        num_ranks: Ranks on this machine.
        environment: Of the ranks, all of it.
        command: A process a rank; None: ranks are forks of the agent.
        arguments: Of the command, or of the worker in a fork.
        compiles: Plan whose kernels are compiled beside the start of the ranks; None: ranks do.
    """

    rendezvous: Rendezvous
    num_ranks: int
    environment: dict[str, str]
    command: str | None
    arguments: Sequence[str]
    compiles: str | None = None

    def encode(self) -> bytes:
        """Return the order as one line."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes | str) -> "Order":
        """Return the order that `encode` wrote."""
        fields = json.loads(line)
        return cls(**{**fields, "rendezvous": Rendezvous(**fields["rendezvous"])})


class Agent:
    """An agent that imports what it will need; a context manager that ends it if it had no order.

    Attributes:
        run_dir: A new folder for what it and its ranks write; only the user may read it.
        process: The agent's.
    """

    def __init__(self) -> None:
        """Start it."""
        self.run_dir = Path(tempfile.mkdtemp(prefix="rankwright-"))
        self._has_order = False
        with (self.run_dir / AGENT_LOG).open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _MAIN],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**BEFORE_IMPORTS, **os.environ, "RANKWRIGHT_RUN_DIR": str(self.run_dir)},
                # A terminal's Ctrl-C goes to the parent alone, which decides what it means.
                start_new_session=True,
            )

    def give(self, order: Order) -> None:
        """Tell it what to start; whoever does so also ends it, and removes its folder."""
        assert not self._has_order, "an agent takes one order"
        self._has_order = True
        assert self.process.stdin is not None
        # One that could not import anything is gone; its log says why.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(order.encode())
            self.process.stdin.close()

    def __enter__(self) -> "Agent":
        """Return it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it, if it has no order."""
        self.dismiss()

    def dismiss(self) -> None:
        """End it and remove its folder, unless it has an order."""
        if self._has_order or self.process.returncode is not None:
            return
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        shutil.rmtree(self.run_dir, ignore_errors=True)
