"""The loop of every rank: the leader schedules and tells, the others listen and run.

One step: the leader takes in requests, decides a batch, broadcasts it; every rank of the replica
runs its part; the rank that samples sends the tokens back to the first stage, and the leader tells
the front end. In a pipeline as many batches are in flight as there are stages, so that all of them
compute. One more may be decided and sent ahead (docs/decisions/0004): on one stage of GPUs it reads
its tokens where the last one leaves them, so that no GPU waits for Python; in a pipeline they come
through memory that stages share (docs/decisions/0013), or to the first stage's host, which has all
else ready then.
"""

import os
import select
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection

from rankwright.executor.continuation import continued
from rankwright.executor.drawn import Drawn
from rankwright.executor.mesh import Mesh
from rankwright.executor.messages import (
    Abort,
    Hello,
    News,
    Stats,
    Stop,
    Submit,
    Tokens,
    decode,
    encode,
)
from rankwright.executor.runner import Runner
from rankwright.executor.scheduler import Scheduler
from rankwright.executor.sequence import Sequence
from rankwright.executor.stage_memory import VARIABLE
from rankwright.executor.step_batch import Continuation, StepBatch
from rankwright.executor.token_returns import TokenReturns, token_returns
from rankwright.planner.plan import Plan

# First bytes of a control message: eight, so that the arrays after them are aligned.
BATCH, NEXT, IDLE, STOP = (name.ljust(8) for name in (b"batch", b"next", b"idle", b"stop"))
_KIND_BYTES = 8
# An idle leader speaks up this often, so that silence means death (mesh.CONTROL_TIMEOUT).
HEARTBEAT_S = 5.0
# State for /metrics and /health, at most this often.
STATS_S = 0.1
# How long an idle leader waits for a request before it looks at the clock again.
IDLE_WAIT_S = 0.5
# Messages of the front end that a busy leader takes between two steps: those of a burst of requests
# cost some 0.1 ms each, and the GPU has one step to go on with.
MESSAGES_AT_ONCE = 32


def default_ahead(mesh: Mesh, runner: Runner) -> int:
    """Return how many batches are decided before the tokens that they go on from are known.

    One on GPUs where that is possible without a host between two steps: on one stage, and in
    pipelines whose stages share memory. `RANKWRIGHT_PIPELINE_AHEAD` as 0 or 1 decides for any
    other pipeline too.
    """
    if mesh.num_stages > 1:
        asked = os.environ.get(VARIABLE)
        if asked in ("0", "1"):
            return int(asked)
        return int(mesh.device.type == "cuda" and runner.stage_memory is not None)
    return int(mesh.device.type == "cuda" and runner.feeds_itself)


def _returns(mesh: Mesh, runner: Runner) -> TokenReturns | None:
    return token_returns(mesh, runner.stage_memory) if mesh.num_stages > 1 else None


@dataclass(slots=True)
class InFlight:
    """A batch that has been issued: whom it samples, and what it draws on this rank."""

    step: int
    sampled: list[Sequence]
    drawn: Drawn | None


class Follower:
    """A rank that runs what its leader says.

    Args:
        mesh: Its groups.
        runner: Its layers.
        ahead: Of the leader. The rank that samples then launches the next batch before the tokens
            of the last are there, if it has heard of it.
    """

    def __init__(self, mesh: Mesh, runner: Runner, *, ahead: int | None = None) -> None:
        self._mesh = mesh
        self._runner = runner
        self._is_eager = bool(default_ahead(mesh, runner) if ahead is None else ahead)
        self._returns = _returns(mesh, runner)
        self._last: StepBatch | None = None  # what the leader told of before

    def run(self) -> None:
        """Run batches until the leader says stop."""
        while (message := self._next_message())[:_KIND_BYTES] != STOP:
            if message[:_KIND_BYTES] != IDLE:
                self._last = batch = self._heard(message)
                self._run(batch)
        if self._returns is not None:
            self._returns.finish()
        self._runner.finish()
        self._mesh.finish()

    def _heard(self, message: bytes) -> StepBatch:
        """Return the batch that a message tells of."""
        content = memoryview(message)[_KIND_BYTES:]
        if message[:_KIND_BYTES] == BATCH:
            return StepBatch.decode(content)
        assert self._last is not None
        return continued(self._last, Continuation.decode(content))

    def _run(self, batch: StepBatch) -> None:
        if self._returns is None:
            self._runner.execute(batch)
            return
        if self._mesh.is_first_stage:
            self._returns.expect(batch.step, batch.num_samples)
        drawn = self._runner.execute(batch, self._returns)
        if self._mesh.is_sampler:
            assert drawn is not None
            self._returns.send(drawn, leave=self._mesh.num_stages if self._is_eager else 0)

    def _next_message(self) -> bytes:
        """Return what the leader says next; send the tokens that get ready meanwhile.

        What is ready goes first: the leader may have told of a batch that waits for these tokens.
        """
        if self._returns is not None:
            while self._returns.send_ready() and not self._mesh.has_heard():
                pass
        return self._mesh.hear()


class Leader:
    """The rank that schedules its replica and talks to the front end."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        runner: Runner,
        connection: Connection,
        *,
        eos_token_ids: tuple[int, ...],
        peak_memory_bytes: tuple[int, ...] = (),
        ahead: int | None = None,
        prefix_cache: bool = True,
    ) -> None:
        """Say hello to the front end.

        Args:
            plan: What to run.
            mesh: This rank's groups.
            runner: This rank's layers.
            connection: To the front end.
            eos_token_ids: Tokens that end a sequence.
            peak_memory_bytes: Of each rank, after start.
            ahead: Batches decided before the tokens they go on from are known; None: as
                `default_ahead` says.
            prefix_cache: Share KV blocks of equal tokens, where every rank holds all of them.
        """
        if ahead is None:
            ahead = default_ahead(mesh, runner)
        self._mesh = mesh
        self._runner = runner
        self._connection = connection
        # Kept: Connection.poll makes a selector each time, for a look between any two steps.
        self._news_poll = select.poll()
        self._news_poll.register(connection.fileno(), select.POLLIN)
        self.scheduler = Scheduler(
            num_blocks=plan.kv_cache.num_blocks,
            block_tokens=plan.kv_cache.block_tokens * plan.split.cp,
            max_num_seqs=plan.limits.max_num_seqs,
            max_batched_tokens=plan.limits.max_batched_tokens,
            max_model_len=plan.limits.max_model_len,
            eos_token_ids=eos_token_ids,
            depth=mesh.num_stages,
            ahead=ahead,
            num_parts=mesh.attention_ranks,
            prefix_cache=prefix_cache and mesh.split.cp == 1 and mesh.split.attention == "tp",
        )
        self._in_flight: deque[InFlight] = deque()
        self._returns = _returns(mesh, runner)
        self._stopping: Stop | None = None
        self._last_stats = self._last_word = 0.0
        self._send(
            Hello(
                replica=mesh.place.replica,
                num_kv_blocks=plan.kv_cache.num_blocks * mesh.attention_ranks,
                block_tokens=self.scheduler.room.block_tokens,
                max_num_seqs=plan.limits.max_num_seqs,
                max_model_len=self.scheduler.max_model_len,
                eos_token_ids=eos_token_ids,
                peak_memory_bytes=peak_memory_bytes,
            )
        )

    def run(self) -> None:
        """Serve until told to stop, or until the front end is gone."""
        while not self._done():
            self._take_messages()
            issued = self._issue()
            full = len(self._in_flight) >= self.scheduler.max_in_flight
            if self._in_flight and (not issued or full):
                self._collect()
            self._report()
        while self._in_flight:
            self._collect()
        self._mesh.tell(STOP)
        if self._returns is not None:
            self._returns.finish()
        self._runner.finish()
        self._mesh.finish()

    def _done(self) -> bool:
        if self._stopping is None:
            return False
        return not (self._stopping.drain and self.scheduler.has_work)

    def _take_messages(self) -> None:
        is_idle = not (self.scheduler.has_work or self._in_flight or self._stopping)
        try:
            for _ in range(MESSAGES_AT_ONCE):
                if not self._news_poll.poll(IDLE_WAIT_S * 1e3 if is_idle else 0):
                    break
                self._take(self._connection.recv_bytes())
                is_idle = False
        except (EOFError, OSError):
            # The front end is gone, and with it everybody who could read a token.
            self._stopping = Stop()

    def _take(self, data: bytes) -> None:
        message = decode(data)
        match message:
            case Submit():
                try:
                    self.scheduler.add(message.request_id, message.prompt, message.sampling)
                except ValueError as error:
                    self._send(
                        Tokens(
                            request_id=message.request_id,
                            token_ids=(),
                            finish_reason="error",
                            error=str(error),
                        )
                    )
            case Abort():
                if self.scheduler.abort(message.request_id):
                    self._send(
                        Tokens(request_id=message.request_id, token_ids=(), finish_reason="abort")
                    )
            case Stop():
                self._stopping = message
            case _:
                raise AssertionError(f"the front end sent {message.kind!r}")

    def _issue(self) -> bool:
        """Start the next batch, if there is one; return whether there was."""
        scheduled = self.scheduler.schedule()
        if scheduled is None:
            return False
        batch, sampled = scheduled
        if self._mesh.control.size > 1:
            follows = batch.continues
            self._mesh.tell(BATCH + batch.encode() if follows is None else NEXT + follows.encode())
            self._last_word = time.monotonic()
        if self._returns is None:
            drawn = self._runner.execute(batch)
        else:
            self._returns.expect(batch.step, len(sampled))
            drawn = self._runner.execute(batch, self._returns)
        self._in_flight.append(InFlight(batch.step, sampled, drawn))
        return True

    def _collect(self) -> None:
        """Take in the tokens of the oldest batch."""
        oldest = self._in_flight.popleft()
        if self._returns is not None:
            tokens = self._returns.tokens(oldest.step)
        else:
            assert oldest.drawn is not None
            tokens = oldest.drawn.wait()
        news = self.scheduler.complete(oldest.sampled, tokens)
        if news.request_ids:
            self._send(news)

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._last_stats >= STATS_S:
            self._last_stats = now
            scheduler = self.scheduler
            self._send(
                Stats(
                    replica=self._mesh.place.replica,
                    steps=scheduler.num_steps,
                    running=len(scheduler.running),
                    waiting=len(scheduler.waiting),
                    free_kv_blocks=scheduler.room.num_free_blocks,
                    generated_tokens=scheduler.num_generated,
                    prompt_tokens=scheduler.num_prompt_tokens,
                    reused_tokens=scheduler.num_reused_tokens,
                )
            )
        if self._mesh.control.size > 1 and now - self._last_word >= HEARTBEAT_S:
            self._mesh.tell(IDLE)
            self._last_word = now

    def _send(self, message: Hello | Tokens | News | Stats) -> None:
        try:
            self._connection.send_bytes(encode(message))
        except OSError:
            self._stopping = Stop()
