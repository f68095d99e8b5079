"""Several plans of one model behind one router: a session for each part, requests by speed.

A part is started, watched and stopped as any plan is; only where a request goes is decided over
all parts. If a rank of one part fails, the launch has failed.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from rankwright.executor.backends.agent import Agent
from rankwright.executor.front_end import FrontEnd, Replica, ReplicaLostError
from rankwright.executor.messages import Sampling, Tokens
from rankwright.executor.router import Load, choose_replica
from rankwright.executor.run_options import RunOptions
from rankwright.executor.session import LaunchError, Session, start
from rankwright.planner.parts_plan import PartsPlan, part_label
from rankwright.planner.plan import Plan


class PartsFrontEnd:
    """The front ends of all parts as one; replicas are numbered through, part by part."""

    def __init__(self, front_ends: Sequence[FrontEnd], parts: Sequence[Plan]) -> None:
        """Stand before `front_ends`, which are those of `parts`."""
        self._front_ends = tuple(front_ends)
        self._parts = tuple(parts)
        self._first = (0, *accumulate(part.num_replicas for part in parts))

    @property
    def replicas(self) -> dict[int, Replica]:
        """Those whose leaders said hello, by number."""
        return {
            first + number: replica
            for first, front_end in zip(self._first, self._front_ends, strict=False)
            for number, replica in front_end.replicas.items()
        }

    @property
    def lost(self) -> asyncio.Event:
        """That of the first part that has lost a replica; of the first one where none has."""
        events = [front_end.lost for front_end in self._front_ends]
        return next((event for event in events if event.is_set()), events[0])

    @property
    def is_ready(self) -> bool:
        """Whether every replica of every part takes requests."""
        return all(front_end.is_ready for front_end in self._front_ends)

    @property
    def num_outstanding(self) -> int:
        """Requests that are not finished."""
        return sum(front_end.num_outstanding for front_end in self._front_ends)

    @property
    def max_model_len(self) -> int:
        """Tokens of one request that every part takes: any of them may get it."""
        return min(front_end.max_model_len for front_end in self._front_ends)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset().union(*(front_end.eos_token_ids for front_end in self._front_ends))

    async def idle(self) -> None:
        """Return when no request is outstanding."""
        while self.num_outstanding:
            for front_end in self._front_ends:
                await front_end.idle()

    def stalled(self, after_s: float) -> list[int]:
        """Replicas that hold requests and have been silent for `after_s` seconds."""
        return [
            first + number
            for first, front_end in zip(self._first, self._front_ends, strict=False)
            for number in front_end.stalled(after_s)
        ]

    async def submit(
        self, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Tokens, None]:
        """Yield the tokens of one request as they come; see `FrontEnd.submit`.

        Raises:
            ReplicaLostError: No replica is there.
        """
        chosen = self._choose(len(prompt) + sampling.max_tokens)
        async with contextlib.aclosing(chosen.submit(prompt, sampling)) as messages:
            async for tokens in messages:
                yield tokens

    def abort_all(self, error: str) -> None:
        """End every outstanding request with `error`."""
        for front_end in self._front_ends:
            front_end.abort_all(error)

    def _choose(self, new_tokens: int) -> FrontEnd:
        """Return the part whose next replica would be done first; see `choose_replica`."""
        owners: dict[int, FrontEnd] = {}
        loads: list[Load] = []
        for first, front_end, part in zip(self._first, self._front_ends, self._parts, strict=False):
            tokens_per_s = part.prediction.output_tokens_per_s.value / part.num_replicas
            for number, replica in front_end.replicas.items():
                if replica.lost is None:
                    owners[first + number] = front_end
                    loads.append(
                        Load(
                            first + number,
                            replica.outstanding_tokens,
                            replica.num_requests,
                            tokens_per_s,
                            part.limits.max_num_seqs,
                        )
                    )
        if not loads:
            raise ReplicaLostError("no replica is running")
        return owners[choose_replica(loads, new_tokens)]


class PartsSession:
    """A running plan of parts: the session of each, and the way to talk to them all."""

    def __init__(self, plan: PartsPlan, sessions: Sequence[Session]) -> None:
        """Hold what `start_parts` has started."""
        self.front_end = PartsFrontEnd([one.front_end for one in sessions], plan.parts)
        self._plan = plan
        self._sessions = tuple(sessions)

    async def ready(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Return when every replica takes requests; `report` gets what parts do.

        Raises:
            LaunchError: A rank ended, or the time is up.
        """

        def of_part(number: int) -> Callable[[str], None]:
            return lambda text: report(f"part {number}: {text}" if text else "")

        async def one(number: int, session: Session) -> None:
            try:
                await session.ready(of_part(number))
            except LaunchError as error:
                raise self._named(number, error) from None

        tasks = [asyncio.create_task(one(*item)) for item in enumerate(self._sessions)]
        try:
            await asyncio.gather(*tasks)
        finally:
            await _cancel(tasks)

    def warnings(self) -> list[str]:
        """Return what ranks have warned of in their logs, each line once."""
        found = [line for session in self._sessions for line in session.warnings()]
        return list(dict.fromkeys(found))

    async def failure(self) -> LaunchError:
        """Wait until a rank ends or a leader hangs up; return what happened."""

        async def one(number: int, session: Session) -> LaunchError:
            return self._named(number, await session.failure())

        tasks = [asyncio.create_task(one(*item)) for item in enumerate(self._sessions)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(tasks)
        return next(task for task in tasks if task in done).result()

    async def stop(self) -> None:
        """End every rank, in good order if they can."""
        await asyncio.gather(*(session.stop() for session in self._sessions))

    def _named(self, number: int, error: LaunchError) -> LaunchError:
        return LaunchError(f"part {number} ({part_label(self._plan.parts[number])}): {error}")


@contextlib.asynccontextmanager
async def start_parts(
    plan: PartsPlan, options: RunOptions, agent: Agent | None = None
) -> AsyncIterator[PartsSession]:
    """Start the ranks of all parts on this machine; all are gone at the end of the block.

    Args:
        plan: What to run.
        options: How; each part finds a port of its own.
        agent: That starts the ranks of the first part; None: one that is started now.
    """
    async with contextlib.AsyncExitStack() as stack:
        sessions: list[Session] = []
        for number, part in enumerate(plan.parts):
            others = plan.num_gpus - part.num_gpus
            mine = replace(options, part=number, ranks_beside=others)
            started = start(part, mine, agent if number == 0 else None)
            sessions.append(await stack.enter_async_context(started))
        yield PartsSession(plan, sessions)


async def _cancel(tasks: "Sequence[asyncio.Task[object]]") -> None:
    """Cancel what of `tasks` still runs, and wait until it has ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
