"""The parent's side: requests go to the leader of a replica, tokens come back to who asked.

Everything here happens on the event loop; `listener.py` has the socket and its threads.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from rankwright.executor.listener import Link, Listener
from rankwright.executor.messages import (
    Abort,
    Hello,
    Message,
    News,
    Sampling,
    Stats,
    Stop,
    Submit,
    Tokens,
)
from rankwright.executor.router import Load, choose_replica


class ReplicaLostError(Exception):
    """No replica is there to take a request, or the one that had it is gone."""


@dataclass(slots=True, eq=False)
class Replica:
    """A replica whose leader said hello, as far as the front end knows."""

    link: Link
    hello: Hello
    outstanding_tokens: int = 0
    num_requests: int = 0
    stats: Stats | None = None
    heard_at_s: float = field(default_factory=time.monotonic)
    lost: str | None = None  # why it is gone


@dataclass(slots=True)
class _Request:
    replica: Replica
    outstanding_tokens: int
    messages: asyncio.Queue[Tokens] = field(default_factory=lambda: asyncio.Queue[Tokens]())


class FrontEnd:
    """Waits for the leaders of all replicas, and spreads requests over them.

    An async context manager; every method is for the event loop that entered it.
    """

    def __init__(
        self,
        num_replicas: int,
        *,
        address: tuple[str, int] = ("127.0.0.1", 0),
        authkey: bytes | None = None,
    ) -> None:
        """Prepare for `num_replicas` replicas.

        Args:
            num_replicas: Replicas of the plan.
            address: Host and port to listen on; port 0: a free one.
            authkey: What leaders must know; None: random.
        """
        self.authkey = secrets.token_bytes(32) if authkey is None else authkey
        self.replicas: dict[int, Replica] = {}
        self.lost = asyncio.Event()  # a leader hung up before `stop`
        self._by_link: dict[Link, Replica] = {}
        self._num_replicas = num_replicas
        self._bind_to = address
        self._ready = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._requests: dict[str, _Request] = {}
        self._stopping = False

    async def __aenter__(self) -> "FrontEnd":
        """Listen.

        Raises:
            OSError: The address cannot be listened on.
        """
        self._listener = Listener(
            self._bind_to, self.authkey, on_message=self._receive, on_end=self._lose
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hang up; a leader that still runs sees the end of the stream and stops."""
        self._stopping = True
        self._listener.close()
        self._end_requests("the launch has ended")

    @property
    def address(self) -> str:
        """Where leaders connect, `host:port`."""
        return self._listener.address

    @property
    def is_ready(self) -> bool:
        """Whether every replica has said hello and none is gone."""
        return self._ready.is_set() and not self.lost.is_set()

    @property
    def num_outstanding(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one request that every replica takes."""
        hellos = [replica.hello for replica in self.replicas.values()]
        return min(
            min(hello.max_model_len, hello.num_kv_blocks * hello.block_tokens) for hello in hellos
        )

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset(
            token for replica in self.replicas.values() for token in replica.hello.eos_token_ids
        )

    async def ready(self) -> None:
        """Return when every replica has said hello."""
        await self._ready.wait()

    async def idle(self) -> None:
        """Return when no request is outstanding."""
        await self._idle.wait()

    def stalled(self, after_s: float) -> list[int]:
        """Replicas that hold requests but have said nothing for `after_s` seconds."""
        now_s = time.monotonic()
        return sorted(
            number
            for number, replica in self.replicas.items()
            if replica.num_requests and now_s - replica.heard_at_s > after_s
        )

    async def submit(
        self, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Tokens, None]:
        """Yield the tokens of one request as they come; the last has a `finish_reason`.

        A caller that stops early must close the iterator (`contextlib.aclosing`): that takes the
        request back from the engine.

        Raises:
            ReplicaLostError: No replica is there.
        """
        replica = self._choose()
        request_id = uuid.uuid4().hex
        request = _Request(replica, len(prompt) + sampling.max_tokens)
        self._requests[request_id] = request
        replica.outstanding_tokens += request.outstanding_tokens
        replica.num_requests += 1
        self._idle.clear()
        replica.link.send(Submit(request_id=request_id, prompt=tuple(prompt), sampling=sampling))
        finished = False
        try:
            while not finished:
                tokens = await request.messages.get()
                finished = tokens.finish_reason is not None
                yield tokens
        finally:
            del self._requests[request_id]
            replica.outstanding_tokens -= request.outstanding_tokens
            replica.num_requests -= 1
            if not self._requests:
                self._idle.set()
            if not finished:
                replica.link.send(Abort(request_id=request_id))

    def abort_all(self, error: str) -> None:
        """End every outstanding request with `error`, and take it back from the engine."""
        for request_id, request in self._requests.items():
            request.replica.link.send(Abort(request_id=request_id))
        self._end_requests(error)

    def stop(self, *, drain: bool = False) -> None:
        """Tell every leader to end its replica; that they hang up is then no loss."""
        self._stopping = True
        for replica in self.replicas.values():
            replica.link.send(Stop(drain=drain))

    def _choose(self) -> Replica:
        loads = [
            Load(number, replica.outstanding_tokens, replica.num_requests)
            for number, replica in self.replicas.items()
            if replica.lost is None
        ]
        if not loads:
            raise ReplicaLostError("no replica is running")
        return self.replicas[choose_replica(loads)]

    def _end_requests(self, error: str, replica: Replica | None = None) -> None:
        for request_id, request in self._requests.items():
            if replica is None or replica is request.replica:
                request.messages.put_nowait(
                    Tokens(request_id=request_id, token_ids=(), finish_reason="error", error=error)
                )

    def _receive(self, link: Link, message: Message) -> None:
        if isinstance(message, Hello):
            self._welcome(link, message)
            return
        replica = self._by_link.get(link)
        if replica is None:
            link.close()  # it speaks before it has said which replica it leads
            return
        replica.heard_at_s = time.monotonic()
        if isinstance(message, Stats):
            replica.stats = message
        elif isinstance(message, News):
            for tokens in message.each():
                self._hand_on(replica, tokens)
        elif isinstance(message, Tokens):
            self._hand_on(replica, message)

    def _hand_on(self, replica: Replica, tokens: Tokens) -> None:
        """Give tokens to who waits for them; nobody does once a request was taken back."""
        request = self._requests.get(tokens.request_id)
        if request is None:
            return
        request.outstanding_tokens -= len(tokens.token_ids)
        replica.outstanding_tokens -= len(tokens.token_ids)
        request.messages.put_nowait(tokens)

    def _welcome(self, link: Link, hello: Hello) -> None:
        if hello.replica in self.replicas or not 0 <= hello.replica < self._num_replicas:
            link.close()  # a second leader of one replica, or of one that the plan has not
            return
        self.replicas[hello.replica] = self._by_link[link] = Replica(link, hello)
        if len(self.replicas) == self._num_replicas:
            self._ready.set()

    def _lose(self, link: Link, reason: str) -> None:
        replica = self._by_link.get(link)
        if replica is None or self._stopping:
            return
        replica.lost = reason
        self._end_requests(f"replica {replica.hello.replica} is gone: {reason}", replica)
        self.lost.set()
