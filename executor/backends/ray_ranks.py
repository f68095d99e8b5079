"""Ranks on the nodes of a Ray cluster: a placement group that follows the plan, an actor a rank.

Each machine of the plan is one bundle, on a node of its own. An actor starts its rank with the
environment that torchrun would give it, so that ranks need not follow one another on a node.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rankwright.executor.backends.ranks import Failure, describe_exit, last_line
from rankwright.executor.backends.ray_actor import News, Place, RankActor
from rankwright.executor.backends.ray_cluster import Bundle, make_bundles, nodes
from rankwright.executor.run_options import WORKER, RunOptions
from rankwright.planner.plan import Plan, RankPlan

# How long an actor waits for its rank's end before it answers with the output so far.
_NEWS_S = 0.5
_POLL_S = 0.1
# From the first rank's end until the others are killed: time for them to say what they saw.
_LAST_WORDS_S = 2.0
# A leader's connection ends before Ray has noticed that its actor is gone.
_NOTICE_S = 15.0
_KILL_S = 10.0
_RAISED = re.compile(r"[\w.]+(Error|Exception)\b: .")
# Settings of the launching shell that ranks on other machines should have too.
_FORWARDED = ("NCCL_", "GLOO_", "TORCH_", "TRITON_", "HF_", "RANKWRIGHT_", "OMP_NUM_THREADS")


@dataclass(slots=True)
class _End:
    """How a rank ended: by itself with a code, or with its node."""

    exit_code: int | None
    error: str

    @property
    def is_cause(self) -> bool:
        """Whether it can be no consequence of another's end.

        A rank that loses a peer raises, or NCCL's watchdog aborts it.
        """
        if self.exit_code is None:
            return True
        return self.exit_code < 0 and -self.exit_code != signal.SIGABRT


class RayRanks:
    """The ranks of a plan on a Ray cluster, which this process has joined."""

    def __init__(
        self, plan: Plan, options: RunOptions, run_dir: Path, front_end: str, authkey: bytes
    ) -> None:
        """Start the ranks, whose leaders connect to `front_end` (host:port)."""
        self._plan, self._options, self._run_dir = plan, options, run_dir
        self._environment = {
            **{k: v for k, v in os.environ.items() if k.startswith(_FORWARDED)},
            "RANKWRIGHT_FRONT_END": front_end,
            "RANKWRIGHT_AUTHKEY": authkey.hex(),
        }
        self._group: PlacementGroup | None = None
        self._actors: dict[int, Any] = {}
        self._places: dict[int, Place] = {}
        self._ended: dict[int, _End] = {}
        self._problem = ""  # of what comes before the ranks
        self._changed = asyncio.Event()
        self._doing = "asking Ray for nodes"
        self._tasks = [asyncio.create_task(self._start())]

    def doing(self) -> str:
        """Return the last line of the first rank, or what is done before it starts."""
        return last_line(self._log(0)) or self._doing

    async def first_end(self) -> None:
        """Return when a rank has ended, or Ray has refused."""
        await self._changed.wait()

    async def end(self, within_s: float) -> bool:
        """Return whether all have ended by themselves within `within_s` seconds."""
        deadline_s = time.monotonic() + within_s
        while not self._all_ended and time.monotonic() < deadline_s:
            await asyncio.sleep(_POLL_S)
        return self._all_ended

    async def failure(self) -> Failure:
        """Return why a rank ended, and kill the rest; for when something has gone wrong."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.first_end(), _NOTICE_S)
        if self._problem:
            await self.kill()
            return Failure(None, self._problem, self._run_dir, agent="Ray")
        if self._ended:
            await self.end(_LAST_WORDS_S)
        ended = dict(self._ended)
        await self.kill()
        if not ended:
            return Failure(None, "no rank has ended", self._log(0), agent="Ray")
        first = next((r for r, end in ended.items() if end.is_cause), next(iter(ended)))
        error = ended[first].error
        if first in self._places:
            error += f" (Ray node {self._places[first].address})"
        return Failure(self._plan.ranks[first], error, self._log(first))

    async def kill(self) -> None:
        """Kill what is left, and give the nodes back."""
        for task in self._tasks:
            task.cancel()
        kills = [actor.kill.remote() for actor in self._actors.values()]
        if kills:
            # An actor whose node is gone cannot answer.
            await asyncio.to_thread(ray.wait, kills, num_returns=len(kills), timeout=_KILL_S)
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    @property
    def _all_ended(self) -> bool:
        return bool(self._problem) or len(self._ended) == len(self._plan.ranks)

    async def _start(self) -> None:
        try:
            bundles = make_bundles(self._plan, nodes())
            await self._place(bundles)
            await self._check()
            await self._run()
        except (RayError, ValueError) as error:
            self._problem = explain(error)
            self._changed.set()

    async def _place(self, bundles: list[Bundle]) -> None:
        """Get the nodes, and an actor for each rank on them."""
        wanted = " + ".join(str(bundle.resources) for bundle in bundles)
        self._doing = f"queued: Ray has no room yet for {wanted}"
        bound = all(bundle.node_id is not None for bundle in bundles)
        labels = [{"ray.io/node-id": str(bundle.node_id)} for bundle in bundles]
        selector: dict[str, Any] = {"bundle_label_selector": labels} if bound else {}
        self._group = group = placement_group(
            [bundle.resources for bundle in bundles],
            strategy="STRICT_PACK" if len(bundles) == 1 else "STRICT_SPREAD",
            **selector,
        )
        while not await asyncio.to_thread(group.wait, 1):
            pass
        self._doing = "starting an actor for each rank"
        plan = self._plan.model_dump_json()
        for index, bundle in enumerate(bundles):
            for rank in self._plan.ranks_of_node(bundle.node):
                actor = ray.remote(RankActor).options(  # type: ignore[attr-defined]
                    num_cpus=bundle.cpus_per_rank,
                    num_gpus=bundle.gpus_per_rank,
                    max_concurrency=4,  # `kill` must not wait for `news`
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=index
                    ),
                )
                self._actors[rank.rank] = actor.remote(plan, rank.rank)
        order = sorted(self._actors)
        found = await asyncio.gather(*(_get(self._actors[rank].place.remote()) for rank in order))
        self._places = dict(zip(order, found, strict=True))

    async def _check(self) -> None:
        """Check that each node is the one that the plan means.

        Raises:
            ValueError: Ray gave other GPUs than the plan uses.
            RayError: A node is another one; holds the ValueError of its actor.
        """
        checks: list[Coroutine[Any, Any, None]] = []
        for node in self._plan.nodes_used():
            ranks = self._plan.ranks_of_node(node)
            gpus, planned = self._gpus(node), sorted(str(rank.gpu) for rank in ranks)
            if not gpus:
                continue
            if sorted(gpus) != planned:
                raise ValueError(
                    f"Ray gave GPUs {', '.join(gpus)} of {self._places[ranks[0].rank].address}, "
                    f"and the plan uses {', '.join(planned)} of node {node}; plan for whole "
                    "machines, or wait until the planned ones are free"
                )
            if not self._options.force and self._options.device != "cpu":
                actor = self._actors[ranks[0].rank]
                checks.append(_get(actor.check_machine.remote(gpus, self._options.device)))
        await asyncio.gather(*checks)

    async def _run(self) -> None:
        """Start the ranks, and watch each."""
        first = self._places[0]
        environment = {
            **self._environment,
            "MASTER_ADDR": first.address,
            "MASTER_PORT": str(self._options.master_port or first.port),
        }
        options = self._options
        if tuple(options.worker) == WORKER:
            options = replace(options, worker=("", *WORKER[1:]))  # Python may be elsewhere there
        await asyncio.gather(
            *(
                _get(
                    self._actors[rank.rank].start.remote(
                        options, self._places[rank.rank].address, environment, self._gpus(rank.node)
                    )
                )
                for rank in self._plan.ranks
            )
        )
        self._doing = "starting ranks"
        self._tasks += [asyncio.create_task(self._watch(rank)) for rank in self._plan.ranks]

    async def _watch(self, rank: RankPlan) -> None:
        """Copy what a rank prints to our file, until it ends."""
        actor, offset = self._actors[rank.rank], 0
        with self._log(rank.rank).open("wb", buffering=0) as log:
            while True:
                try:
                    news: News = await _get(actor.news.remote(offset, _NEWS_S))
                except RayError as gone:
                    self._note_end(rank, _End(None, f"its actor is gone: {explain(gone)}"))
                    return
                log.write(news.log)
                offset += len(news.log)
                if news.exit_code is not None:
                    error = news.error or describe_exit(news.exit_code, self._log(rank.rank))
                    self._note_end(rank, _End(news.exit_code, error))
                    return

    def _note_end(self, rank: RankPlan, end: _End) -> None:
        self._ended[rank.rank] = end
        self._changed.set()

    def _gpus(self, node: int) -> list[str]:
        """GPUs of a node that ranks of this launch use, in the driver's order.

        Ray hands them out in an order of its own.
        """
        ranks = self._plan.ranks_of_node(node)
        found = {gpu for rank in ranks for gpu in self._places[rank.rank].gpus}
        return sorted(found, key=lambda gpu: (not gpu.isdigit(), int(gpu) if gpu.isdigit() else 0))

    def _log(self, rank: int) -> Path:
        return self._run_dir / f"rank-{rank}.log"


def explain(error: Exception) -> str:
    """Return the line of `error` that says what went wrong; Ray's hold a remote traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # An actor that could not be made: the remote traceback ends with what was raised.
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [type(error).__name__])[-1 if raised else 0]


async def _get(reference: Any) -> Any:
    """Return the value of an object reference, without blocking the loop."""
    return await asyncio.wrap_future(reference.future())
