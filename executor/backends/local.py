"""Ranks of this machine, as processes under torchrun's agent.

torchrun gives each rank its environment (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`) and
ends all when one ends badly. What it does not do, and this module does: one log file a rank, the
order in which ranks ended (the first is the cause, the others are victims), and no process left.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rankwright.executor.backends.agent import AGENT_LOG, BEFORE_IMPORTS, Agent, Order, Rendezvous
from rankwright.executor.backends.ranks import Failure, describe_exit, last_line
from rankwright.planner.plan import Plan, RankPlan

# torchrun's own --log-dir makes two files four folders deep, and counts local ranks. `exec` keeps
# the process id, so that signals and exit codes are the rank's own.
_SHELL = (
    'echo $$ >"$RANKWRIGHT_RUN_DIR/rank-$RANK.pid" && '
    'exec "$@" >"$RANKWRIGHT_RUN_DIR/rank-$RANK.log" 2>&1'
)
_POLL_S = 0.1
# From the first rank's end until the others are killed: time for them to say what they saw.
_LAST_WORDS_S = 2.0
# torchrun names the exit code of each rank it saw end badly.
_EXIT_CODE = re.compile(r"exitcode\s*:\s*(-?\d+)\s*\(pid:\s*(\d+)\)")


class LocalRanks:
    """The ranks of one node, from their start to their end."""

    def __init__(
        self,
        ranks: Sequence[RankPlan],
        agent: Agent,
        rendezvous: Rendezvous,
        environment: Mapping[str, str],
        worker: Sequence[str],
        *,
        forks: bool,
        compiles: Path | None = None,
    ) -> None:
        """Have `agent` start `ranks`, whose files are in its folder.

        Args:
            ranks: Of this machine.
            agent: Without an order yet.
            rendezvous: Where it meets those of other machines.
            environment: Of the ranks.
            worker: Command of a rank, or with `forks` the arguments of our own worker.
            forks: Ranks are forks of the agent.
            compiles: Plan whose kernels the agent has compiled while ranks start.
        """
        self._ranks = {rank.rank: rank for rank in ranks}
        self._run_dir = agent.run_dir
        self._pids: dict[int, int] = {}
        self._watched: dict[int, int] = {}  # rank: descriptor that is readable when it has ended
        self._ended: list[int] = []
        self._changed = asyncio.Event()
        self._agent = agent.process
        # torchrun fills in ${local_rank} and the like, so a dollar must be doubled.
        shell = [part.replace("$", "$$") for part in ("-c", _SHELL, "rank", *worker)]
        agent.give(
            Order(
                rendezvous=rendezvous,
                num_ranks=len(ranks),
                environment={**environment, "RANKWRIGHT_RUN_DIR": str(agent.run_dir)},
                command=None if forks else "sh",
                arguments=list(worker) if forks else shell,
                compiles=None if compiles is None else str(compiles),
            )
        )

    def doing(self) -> str:
        """Return the last line of the first rank."""
        return last_line(self._run_dir / "rank-0.log")

    async def first_end(self) -> None:
        """Return when a rank or torchrun has ended."""
        while not self._ended and self._agent.poll() is None:
            self._find_ranks()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _POLL_S)

    async def end(self, within_s: float) -> bool:
        """Return whether all have ended by themselves within `within_s` seconds."""
        deadline_s = time.monotonic() + within_s
        while self._agent.poll() is None and time.monotonic() < deadline_s:
            self._find_ranks()
            await asyncio.sleep(_POLL_S / 2)
        return self._agent.poll() is not None

    async def failure(self) -> Failure:
        """Return why a rank ended, and kill the rest; for when something has gone wrong."""
        await self.end(_LAST_WORDS_S)
        self._find_ranks()
        first = self._ended[0] if self._ended else None
        for rank in self._pids:
            self._kill_rank(rank)
        # The agent now sees every rank gone and writes their exit codes.
        await self.end(_LAST_WORDS_S)
        await self.kill()
        return self._explain(first)

    async def kill(self) -> None:
        """Kill what is left, ranks and agent, and wait until it is gone."""
        self._find_ranks()
        for rank in self._pids:
            self._kill_rank(rank)
        if self._pids:
            await self.end(_LAST_WORDS_S)  # it waits for its children, or they would be zombies
        if self._agent.poll() is None:
            self._agent.kill()
            await asyncio.to_thread(self._agent.wait)
        # A rank that the agent had only just started may not have written its number yet.
        deadline_s = time.monotonic() + _POLL_S
        self._find_ranks()
        while len(self._pids) < len(self._ranks) and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S / 10)
            self._find_ranks()
        for rank in self._pids:
            self._kill_rank(rank)
        while self._watched:  # each empties it as it ends
            await asyncio.sleep(_POLL_S / 10)

    @property
    def exit_code(self) -> int | None:
        """Exit code of torchrun; None while it runs."""
        return self._agent.poll()

    def _find_ranks(self) -> None:
        """Watch the ranks that have started since the last look."""
        for rank in self._ranks.keys() - self._pids.keys():
            try:
                pid = int((self._run_dir / f"rank-{rank}.pid").read_text())
            except (FileNotFoundError, ValueError):
                continue  # not there yet, or not yet written
            self._pids[rank] = pid
            self._watch(rank, pid)

    def _watch(self, rank: int, pid: int) -> None:
        if not hasattr(os, "pidfd_open"):
            return  # not Linux: torchrun's end is what we see
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._note_end(rank)
            return
        self._watched[rank] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._note_end, rank)

    def _note_end(self, rank: int) -> None:
        if rank in self._watched:
            descriptor = self._watched.pop(rank)
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)
        self._ended.append(rank)
        self._changed.set()

    def _kill_rank(self, rank: int) -> None:
        """Kill a rank and what it started: torchrun makes each the leader of a session."""
        pid = self._pids[rank]
        if rank in self._ended and not _leads_group(pid):
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)

    def _explain(self, first: int | None) -> Failure:
        if first is None:
            # Not Linux, or torchrun itself went: the oldest error file is the best witness.
            errors = sorted(
                (path.stat().st_mtime_ns, rank)
                for rank in self._ranks
                if (path := self._error_file(rank)).is_file()
            )
            if not errors:
                log = self._run_dir / AGENT_LOG
                return Failure(None, last_line(log) or "no word from torchrun", log)
            first = errors[0][1]
        log = self._run_dir / f"rank-{first}.log"
        error = last_line(self._error_file(first)) or self._exit(first) or last_line(log)
        return Failure(self._ranks[first], error, log.resolve())

    def _exit(self, rank: int) -> str:
        """How a rank without an error file ended, from torchrun's log; empty if it is not there."""
        text = (self._run_dir / AGENT_LOG).read_text(errors="replace")
        codes = {int(pid): int(code) for code, pid in _EXIT_CODE.findall(text)}
        code = codes.get(self._pids.get(rank, -1))
        return "" if code is None else describe_exit(code, self._run_dir / f"rank-{rank}.log")

    def _error_file(self, rank: int) -> Path:
        return self._run_dir / f"rank-{rank}.error"


def keep_logs(ranks: Sequence[RankPlan], run_dir: Path, folder: str) -> None:
    """Let the logs of `ranks`, which are in `run_dir`, be files in `folder`, to outlive it.

    Raises:
        ValueError: There is no such folder, and none can be made.
    """
    kept = Path(folder).absolute()
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"RANKWRIGHT_LOG_DIR={folder!r}: {error.strerror}; name a folder you may write to"
        ) from None
    for rank in ranks:
        name = f"rank-{rank.rank}.log"
        (run_dir / name).symlink_to(kept / name)


def rank_environment(
    plan: Plan, ranks: Sequence[RankPlan], environment: Mapping[str, str], *, beside: int = 0
) -> dict[str, str]:
    """Return `environment` with what each of `ranks`, all of one machine, needs.

    What the user has set comes before what the plan sets, so that it can be changed without
    editing the plan.
    """
    ours = dict(BEFORE_IMPORTS)
    ours.update({variable.name: variable.value for variable in plan.environment})
    # Slurm and systemd signal every process at once: the parent drains, then stops the ranks.
    forced = {"RANKWRIGHT_IGNORE_TERM": "1"}
    gpus = plan.cluster.node(ranks[0].node).gpus
    if all(gpu.device == "cpu" for gpu in gpus):
        ours["OMP_NUM_THREADS"] = str(max(1, num_cpus() // (len(ranks) + beside)))
        return {**ours, **environment, **forced}
    # The plan counts GPUs as the driver does. CUDA's own default is fastest first, and it counts
    # anew what CUDA_VISIBLE_DEVICES leaves; the probe has respected that already.
    forced["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if {str(rank.gpu) for rank in ranks} <= {entry.strip() for entry in visible}:
        environment = {k: v for k, v in environment.items() if k != "CUDA_VISIBLE_DEVICES"}
    return {**ours, **environment, **forced}


def num_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _leads_group(pid: int) -> bool:
    """Whether a process group of this id is alive: its number is then not another's."""
    try:
        return os.getpgid(pid) == pid
    except (ProcessLookupError, PermissionError):
        return False
