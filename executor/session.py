"""A running plan: its ranks and the front end that talks to them, from start to end.

What `launch` (serve until told to stop) and `generate` (answer some prompts) have in common. The
process that runs this never imports torch: it has to be ready, and able to report, while the ranks
are still loading.
"""

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from rankwright.executor.backends.agent import Agent, Rendezvous
from rankwright.executor.backends.local import LocalRanks, keep_logs, rank_environment
from rankwright.executor.backends.ranks import Failure, Ranks, tail
from rankwright.executor.front_end import FrontEnd
from rankwright.executor.log_tail import WARNING, LogTail
from rankwright.executor.run_options import WORKER, RunOptions, node_order, worker_arguments
from rankwright.planner.plan import Plan, RankPlan

# From Stop until the ranks are killed: they finish a step and destroy their process groups.
_STOP_GRACE_S = 10.0
_REFRESH_S = 0.2


class LaunchError(Exception):
    """The ranks could not start, or one of them ended; one line, exit code 5."""


class Session:
    """Ranks that run, and the way to talk to them."""

    def __init__(
        self, plan: Plan, front_end: FrontEnd, ranks: Ranks, run_dir: Path, timeout_s: float
    ) -> None:
        """Hold what `start` has made."""
        self.plan = plan
        self.front_end = front_end
        self.run_dir = run_dir
        self._ranks = ranks
        self._start_timeout_s = timeout_s
        self._keep_files = False

    async def ready(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Return when every replica takes requests; `report` gets what the first rank does.

        Raises:
            LaunchError: A rank ended, or the time is up.
        """
        deadline_s = time.monotonic() + self._start_timeout_s
        ready = asyncio.create_task(self.front_end.ready())
        ended = asyncio.create_task(self._ranks.first_end())
        try:
            while not ready.done():
                await asyncio.wait(
                    {ready, ended}, timeout=_REFRESH_S, return_when=asyncio.FIRST_COMPLETED
                )
                if ended.done():
                    self._keep_files = True
                    raise _error(self.plan, await self._ranks.failure(), "did not start")
                if time.monotonic() > deadline_s:
                    self._keep_files = True
                    raise LaunchError(await self._timeout_message())
                report(self._ranks.doing())
        finally:
            ready.cancel()
            ended.cancel()

    def warnings(self) -> list[str]:
        """Return what ranks have warned of in their logs, each line once."""
        lines = LogTail(lambda: sorted(self.run_dir.glob("rank-*.log"))).lines()
        return list(dict.fromkeys(line for line in lines if line.startswith(WARNING)))

    async def failure(self) -> LaunchError:
        """Wait until a rank ends or a leader hangs up; return what happened."""
        tasks = {
            asyncio.create_task(self._ranks.first_end()),
            asyncio.create_task(self.front_end.lost.wait()),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        self._keep_files = True
        failure = await self._ranks.failure()
        lost = [replica.lost for replica in self.front_end.replicas.values() if replica.lost]
        if failure.rank is None and lost:
            return LaunchError(f"a leader hung up but runs on: {lost[0]} (log: {failure.log})")
        return _error(self.plan, failure, "failed")

    async def stop(self) -> None:
        """End every rank, in good order if they can."""
        self.front_end.stop()
        await self._ranks.end(_STOP_GRACE_S)
        await self._ranks.kill()

    async def close(self) -> None:
        """Leave nothing behind: no process, and no files unless an error names them."""
        await self._ranks.kill()
        if not self._keep_files:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    async def _timeout_message(self) -> str:
        missing = sorted(set(range(self.plan.split.dp)) - self.front_end.replicas.keys())
        leader = next(rank for rank in self.plan.ranks if rank.replica == missing[0])
        log = self.run_dir / f"rank-{leader.rank}.log"
        said = "\n".join(f"  {line}" for line in tail(log, 10))
        said = said or f"  {self._ranks.doing() or '(nothing)'}"
        return (
            f"not ready after {self._start_timeout_s:g} s: no word from replica "
            f"{', '.join(map(str, missing))}; allow more with --start-timeout. "
            f"{describe_rank(self.plan, leader)} last said ({log}):\n{said}"
        )


@contextlib.asynccontextmanager
async def start(
    plan: Plan, options: RunOptions, agent: Agent | None = None
) -> AsyncIterator[Session]:
    """Start the ranks of this machine and the front end; all are gone at the end of the block.

    Args:
        plan: What to run.
        options: How.
        agent: That starts the ranks of this machine; None: one that is started now.
    """
    front_end = FrontEnd(
        plan.split.dp, address=_listen_address(options), authkey=shared_key(options)
    )
    async with front_end:
        host, _, port = front_end.address.rpartition(":")
        reach = f"{options.master_addr if options.nnodes > 1 else host}:{port}"
        ranks: Ranks
        if options.backend == "ray":
            # Here, not at the top: Ray is an extra.
            from rankwright.executor.backends.ray_ranks import RayRanks

            if agent is not None:
                agent.dismiss()
            run_dir = Path(tempfile.mkdtemp(prefix="rankwright-"))  # only the user may read it
            ranks = RayRanks(plan, options, run_dir, front_end.address, front_end.authkey)
        else:
            # Left without an order, it ends with the block.
            with Agent() if agent is None else agent as agent:
                run_dir = agent.run_dir
                ranks = start_ranks(plan, options, agent, reach, front_end.authkey)
        session = Session(plan, front_end, ranks, run_dir, options.start_timeout_s)
        try:
            yield session
        finally:
            await asyncio.shield(session.close())


class FollowedRanks:
    """The ranks of a machine that does not serve; machine 0 leads them."""

    def __init__(self, plan: Plan, ranks: LocalRanks, run_dir: Path) -> None:
        """Hold what `follow` has started."""
        self._plan = plan
        self._ranks = ranks
        self._run_dir = run_dir
        self._keep_files = False

    async def done(self) -> None:
        """Return when all have ended well.

        Raises:
            LaunchError: One has not.
        """
        await self._ranks.first_end()
        await self._ranks.end(_STOP_GRACE_S)
        if self._ranks.exit_code != 0:
            self._keep_files = True
            raise _error(self._plan, await self._ranks.failure(), "failed")

    async def close(self) -> None:
        """Leave nothing behind: no process, and no files unless an error names them."""
        await self._ranks.kill()
        if not self._keep_files:
            shutil.rmtree(self._run_dir, ignore_errors=True)


@contextlib.asynccontextmanager
async def follow(
    plan: Plan, options: RunOptions, agent: Agent | None = None
) -> AsyncIterator[FollowedRanks]:
    """Start the ranks of machine `options.node_rank`, not the one that serves; see `start`."""
    key = shared_key(options)
    assert key is not None, "several machines always share a key"
    address = f"{options.master_addr}:{leader_port(options)}"
    with Agent() if agent is None else agent as agent:
        ranks = start_ranks(plan, options, agent, address, key)
        followed = FollowedRanks(plan, ranks, agent.run_dir)
    try:
        yield followed
    finally:
        await asyncio.shield(followed.close())


def start_ranks(
    plan: Plan, options: RunOptions, agent: Agent, front_end: str, authkey: bytes
) -> LocalRanks:
    """Start the ranks of machine `options.node_rank`, which talk to `front_end` (host:port)."""
    plan_path = agent.run_dir / "plan.json"
    plan_path.write_text(plan.model_dump_json(), encoding="utf-8")
    node = node_order(plan)[options.node_rank]
    ranks = plan.ranks_of_node(node)
    if folder := os.environ.get("RANKWRIGHT_LOG_DIR"):
        if options.part is not None:  # ranks of every part are numbered from 0
            folder = os.path.join(folder, f"part-{options.part}")
        keep_logs(ranks, agent.run_dir, folder)
    environment = {
        **rank_environment(plan, ranks, os.environ, beside=options.ranks_beside),
        "RANKWRIGHT_FRONT_END": front_end,
        "RANKWRIGHT_AUTHKEY": authkey.hex(),
    }
    arguments = worker_arguments(options, plan_path)
    forks = tuple(options.worker) == WORKER and ranks_fork(plan, options, os.environ)
    port = options.master_port
    if port is None:
        port = 29500 if options.nnodes > 1 else _free_port()
    rendezvous = Rendezvous(options.nnodes, options.node_rank, options.master_addr, port)
    worker = arguments if forks else [*options.worker, *arguments]
    compiles = plan_path if compiles_ahead(plan, options, os.environ) else None
    return LocalRanks(ranks, agent, rendezvous, environment, worker, forks=forks, compiles=compiles)


def compiles_ahead(plan: Plan, options: RunOptions, environment: Mapping[str, str]) -> bool:
    """Whether kernels are compiled beside the start, and not by the rank that first needs them.

    Where `RANKWRIGHT_COMPILE_AHEAD` is 1: it has yet to run on a GPU.
    """
    return environment.get("RANKWRIGHT_COMPILE_AHEAD") == "1" and not _on_cpus(plan, options)


def _on_cpus(plan: Plan, options: RunOptions) -> bool:
    gpus = (gpu for node in plan.nodes_used() for gpu in plan.cluster.node(node).gpus)
    return options.device == "cpu" or all(gpu.device == "cpu" for gpu in gpus)


def ranks_fork(plan: Plan, options: RunOptions, environment: Mapping[str, str]) -> bool:
    """Whether ranks are forks of their agent, and not processes that import all by themselves.

    On CPUs they are. On GPUs they can be, as long as nothing has touched CUDA before; a trial there
    has yet to succeed, so `RANKWRIGHT_FORK_RANKS` has to ask for it. 0 forbids it anywhere.
    """
    asked = environment.get("RANKWRIGHT_FORK_RANKS")
    if asked in ("0", "1"):
        return asked == "1"
    return _on_cpus(plan, options)


def leader_port(options: RunOptions) -> int:
    """Port on which machine 0 listens for leaders: one that other machines can know."""
    return 0 if options.nnodes == 1 else (options.master_port or 29500) + 1


def shared_key(options: RunOptions) -> bytes | None:
    """Return the key from `RANKWRIGHT_AUTHKEY`; None on one machine, where a random one will do.

    Raises:
        ValueError: There are several machines and no key, or it is malformed.
    """
    text = os.environ.get("RANKWRIGHT_AUTHKEY")
    if not text:
        if options.nnodes == 1:
            return None
        raise ValueError(
            f"{options.nnodes} nodes need one key: set RANKWRIGHT_AUTHKEY to the same 64 hex "
            "digits on each, for example from `openssl rand -hex 32`"
        )
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) < 16:
        raise ValueError(
            "RANKWRIGHT_AUTHKEY must be at least 32 hex digits, for example from "
            "`openssl rand -hex 32`"
        )
    return key


def describe_rank(plan: Plan, rank: RankPlan) -> str:
    """Name a rank by where it is and what it holds."""
    node = plan.cluster.node(rank.node)
    is_cpu = all(gpu.device == "cpu" for gpu in node.gpus)
    replica = f"replica {rank.replica}, " if plan.split.dp > 1 else ""
    context = f"cp rank {rank.cp_rank}, " if plan.split.cp > 1 else ""
    return (
        f"rank {rank.rank} ({replica}stage {rank.stage}, {context}tp rank {rank.tp_rank}, "
        f"{'CPU rank' if is_cpu else 'GPU'} {rank.gpu} of node {rank.node} {node.name!r})"
    )


def _listen_address(options: RunOptions) -> tuple[str, int]:
    """Where leaders connect on this machine, the one that serves.

    Raises:
        ValueError: It cannot be had.
    """
    port = leader_port(options)
    host = options.host_interface or (options.master_addr if options.nnodes > 1 else "127.0.0.1")
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        # A service's or a bridge's address leads here without being this machine's own. The key
        # keeps strangers out on the others, too.
        foreign = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        if options.host_interface is None and options.nnodes > 1 and foreign:
            return "0.0.0.0", port
        raise ValueError(
            f"cannot listen for ranks on {host}:{port}: {error.strerror or error}; choose another "
            "with --host-interface or --master-port (leaders connect to the port after it)"
        ) from None
    return host, port


def _error(plan: Plan, failure: Failure, what: str) -> LaunchError:
    who = failure.agent if failure.rank is None else describe_rank(plan, failure.rank)
    return LaunchError(f"{who} {what}: {failure.error} (log: {failure.log})")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
